"""What a stage leaves on disk. A result appears under its name only when it is whole."""

import ctypes
import glob
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from transencoder.errors import writing

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux: relative paths are the process's; two names change places

# Whatever a saved model consists of: an overwritten bi-encoder must not leave its modules.json to a cross-encoder.
MODEL_FILES = (
    "[0-9]*_[A-Z]*",  # modules of sentence-transformers, such as 1_Pooling
    "*.model",
    "*.safetensors*",
    "added_tokens.json",
    "chat_template*",
    "config*.json",
    "generation_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "token*",
    "vocab*",
    "merges.txt",
)
MODEL_MARKS = ("config.json", "modules.json")  # a folder that has one holds a model


def sha256(*files: Path) -> str:
    """Return the SHA-256 of the files' contents, one after another."""
    return digest(hashlib.sha256(), *files)


def digest(hasher: Any, *files: Path) -> str:
    """Return what a hash of `hashlib` or `xxhash` makes of the files' contents, one after another, as hex digits."""
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                hasher.update(block)
    return hasher.hexdigest()


def model_files(folder: Path) -> list[str]:
    """Return the files that the model in a folder consists of, relative to it and sorted; none in other folders."""
    found = [path for pattern in MODEL_FILES for path in folder.glob(pattern)]
    found += [file for path in found if path.is_dir() for file in path.rglob("*")]
    names = sorted({path.relative_to(folder).as_posix() for path in found if path.is_file()})
    return names if any(name in MODEL_MARKS or name.endswith(".safetensors") for name in names) else []


def read_json(path: Path) -> Any:
    """Read a JSON file; raises OSError, or ValueError, which stands for a pipe and for endless nesting, too."""
    if path.exists() and not path.is_file():
        raise ValueError("not a file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def write_json(path: Path, content: Any) -> None:
    """Write `content` to `path` as JSON, atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield where to write a file or a folder that takes the place of `path` once it is whole.

    It has the same name in a temporary folder beside `path`. After an error or a kill, `path` is as it was before.
    Folders change places in one step, where the system can do that; elsewhere the old one is gone between two renames.
    What killed processes of this machine left behind is deleted. A link to a folder stays, and its target is replaced.
    """
    path = path.resolve() if path.is_dir() else path
    # Students on several machines may write the same recipe at the same time.
    before, after = f".{path.name}.{socket.gethostname()}.", ".tmp"
    folder = path.with_name(f"{before}{os.getpid()}{after}")
    with writing(path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            yield folder / path.name
            new = folder / path.name
            if not _exchanged(new, path):
                if path.is_dir() or (new.is_dir() and path.is_symlink()):
                    os.replace(path, folder / f"{path.name}.old")
                os.replace(new, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    for left in path.parent.glob(f"{glob.escape(before)}*{after}"):
        number = left.name.removeprefix(before).removesuffix(after)
        if number.isdecimal() and not psutil.pid_exists(int(number)):
            shutil.rmtree(left, ignore_errors=True)


def _exchanged(new: Path, old: Path) -> bool:
    """Let two folders change places in one step; returns whether that was done, as Linux can."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None or not old.is_dir() or not new.is_dir():
        return False
    return rename(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), RENAME_EXCHANGE) == 0


def place_model(source: Path, target: Path, before: list[str]) -> None:
    """Put the saved model in `source` into the folder `target`.

    `source` keeps it, so that a process that is killed in between can do the same again; the weights' bytes are shared
    where the file system can do that.

    Args:
        before: files of `target` that are replaced, or deleted.
    """
    names = model_files(source)
    with writing(target):
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(source / name, target / name)
    for old in (target / name for name in before if name not in names):
        old.unlink(missing_ok=True)
        if old.parent != target and not any(old.parent.iterdir()):
            old.parent.rmdir()


def _link_or_copy(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # such as FAT, or a network's
        shutil.copy2(source, target)
