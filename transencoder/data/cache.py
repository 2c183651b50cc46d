"""The cache: what tables and tokens are kept as, memory-mapped, under names that say what they were made of."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import datasets
import xxhash

from transencoder.errors import BrokenRun, writing
from transencoder.runtime.accelerator import log
from transencoder.runtime.files import digest, read_json, replacing, write_json
from transencoder.runtime.waiting import local_main_process_first

CACHE_VERSION = 3  # raise it when what is written to the cache changes


@contextmanager
def cache_folder() -> Iterator[Path]:
    """Yield where tables and tokens are kept: a folder of the `datasets` cache (HF_DATASETS_CACHE).

    Raises:
        BrokenRun: a file is gone, as somebody has deleted the cache while it was in use.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "trans-encoder"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    except FileNotFoundError as error:
        raise BrokenRun(f"{folder}: a file is gone from the cache; the same command makes it again") from error


def cache_key(*parts: Any) -> str:
    """Return a name for a cache file, from everything its content depends on."""
    return hashlib.sha256(json.dumps([CACHE_VERSION, *parts]).encode()).hexdigest()[:32]


def checksum(*files: Path) -> str:
    """Return a checksum of the files' contents that tells damage and changes, not attacks; as fast as memory is."""
    return digest(xxhash.xxh3_128(), *files)


def cached(names: list[str], make: Callable[..., str | None], load: Callable[..., Any]) -> Any:
    """Return what `load` makes of files of the cache, which `make` writes first unless they are there and whole.

    Args:
        names: of the files.
        make: takes the paths to write to; returns a line to be logged whenever they are used, or none.
        load: takes the paths of the files.
    """
    with cache_folder() as folder:
        paths = [folder / name for name in names]
        seal = paths[0].with_suffix(".json")  # the line, and a checksum of it and the files; written last
        with local_main_process_first():
            if not _is_whole(paths, seal):
                with ExitStack() as stack:
                    temporaries = [stack.enter_context(replacing(path)) for path in paths]
                    line = make(*temporaries)
                    content = {"checksum": cache_key(checksum(*temporaries), line), "log": line}
                write_json(seal, content)
            if line := read_json(seal)["log"]:
                log(line)
        return load(*paths)


def _is_whole(paths: list[Path], seal: Path) -> bool:
    try:
        found = read_json(seal)
        return found["checksum"] == cache_key(checksum(*paths), found["log"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
