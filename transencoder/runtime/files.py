"""What a stage leaves on disk. A result appears under its name only when it is whole."""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from transencoder.errors import writing
from transencoder.runtime.locks import remove_abandoned

# Whatever a saved model consists of: an overwritten bi-encoder must not leave its modules.json to a cross-encoder.
MODEL_FILES = (
    "[0-9]*_*",
    "*.model",
    "chat_template*",
    "config*.json",
    "model*.safetensors*",
    "modules.json",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "token*",
    "vocab*",
    "merges.txt",
)


def sha256(*files: Path) -> str:
    """Checksum of the files' contents, one after another."""
    sha = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                sha.update(block)
    return sha.hexdigest()


def read_json(path: Path) -> Any:
    """The content of a JSON file; raises OSError or ValueError, the latter for a pipe or for endless nesting, too."""
    if path.exists() and not path.is_file():
        raise ValueError("not a file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def write_json(path: Path, content: Any) -> None:
    """Write `content` to `path` by way of a temporary name."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 `text` to `path` by way of a temporary name."""
    write_file(path, lambda stream: stream.write(text.encode()))


def write_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, and put it in the place of `path`."""
    # Students on several machines may write the same recipe at the same time.
    host = socket.gethostname()
    temporary = path.with_name(f".{path.name}.{host}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with temporary.open("wb") as stream:
                write(stream)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    remove_abandoned(path.parent, f".{path.name}.{host}.*.tmp")


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder beside `folder`, and put it in the place of `folder`."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    with writing(folder):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            write(temporary)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
        except Exception:  # a disk that is full has no room for half a folder
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` for what is to become it; removed in the end, as are those of killed processes."""
    host = socket.gethostname()
    folder = target.with_name(f".{target.name}.{host}.{os.getpid()}.tmp")
    with writing(target):
        try:
            folder.mkdir(exist_ok=True)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    remove_abandoned(target.parent, f".{target.name}.{host}.*.tmp")


def place_model(source: Path, target: Path) -> None:
    """Put the saved model in `source` into the folder `target`, in the place of the one that may be there.

    `source` keeps it, so that a process that is killed in between can do the same again; the weights' bytes are shared
    where the file system can do that.
    """
    for old in (path for pattern in MODEL_FILES for path in target.glob(pattern)):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    with writing(target):
        shutil.copytree(source, target, copy_function=_link_or_copy, dirs_exist_ok=True)


def _link_or_copy(source: str, target: str) -> None:
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # such as FAT, or a network's
        shutil.copy2(source, target)
