"""The shards that a long scoring has done so far, on disk: after a crash or a signal it goes on from there.

.OUTPUT.parquet.parts/metadata.json              whose shards these are
.OUTPUT.parquet.parts/encoder-0.part-3.npz    the encoder's outputs for the fourth `rows` inputs
"""

import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from transencoder.errors import InputError, writing
from transencoder.runtime.accelerator import log
from transencoder.runtime.files import replacing, write_json
from transencoder.runtime.locks import lock, unlock

METADATA_FILE = "metadata.json"


class Shards:
    """A folder of shards. The first process has the output's lock meanwhile.

    Args:
        output: the file that the shards will become.
        metadata: what the scores depend on; shards that depend on other things are deleted.
        rows: inputs of a shard.
    """

    def __init__(self, output: Path, metadata: dict[str, Any], rows: int, accelerator: Accelerator):
        self.folder, self.rows, self.accelerator = _folder(output), rows, accelerator
        self.output = output
        if self.folder.is_symlink() or self.folder.is_file():  # what is written and deleted there is somebody else's
            raise InputError(f"{self.folder}: not a folder, where one for partial results belongs; delete it")
        if accelerator.is_main_process:
            lock(output)
        metadata = json.loads(json.dumps({**metadata, "rows": rows}))
        if accelerator.is_main_process and self._found() != metadata:
            shutil.rmtree(self.folder, ignore_errors=True)
            with writing(self.folder):
                self.folder.mkdir(parents=True)
            write_json(self.folder / METADATA_FILE, metadata)
        accelerator.wait_for_everyone()
        done = sum(1 for _ in self.folder.glob("*.npz"))
        if done:
            log(f"going on from {self.folder}: {done} shards are done")

    def _found(self) -> Any:
        try:
            return json.loads((self.folder / METADATA_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def load(self, name: str, number: int, rows: int) -> np.ndarray | None:
        """Load a shard: float32 [rows] or [rows, d]; None if there is none, or it is damaged."""
        path = self._path(name, number)
        try:
            shard = _read(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, NotImplementedError):
            shard = np.empty(0)
        if len(shard) == rows:
            return shard
        log(f"warning: {path} is damaged; scoring it again")
        return None

    def save(self, name: str, number: int, shard: np.ndarray) -> None:
        """Keep a shard, from the first process."""
        if self.accelerator.is_main_process:
            with replacing(self._path(name, number)) as temporary:
                np.savez(temporary, shard)  # a ZIP file, which has a checksum

    def all_of(self, name: str) -> Iterator[np.ndarray]:
        """Yield the shards that have been loaded or saved under names that begin with `name`."""
        for path in sorted(self.folder.glob(f"{name}*.npz")):
            yield _read(path)

    def remove(self) -> None:
        """Delete the shards once the output is there, and give its lock back."""
        if self.accelerator.is_main_process:
            shutil.rmtree(self.folder)
            unlock(self.output)

    def _path(self, name: str, number: int) -> Path:
        return self.folder / f"{name}.part-{number}.npz"


def _read(path: Path) -> np.ndarray:
    with np.load(path) as file:
        return file["arr_0"]


def remove_shards(output: Path) -> None:
    """Delete the shards of an output that is whole."""
    shutil.rmtree(_folder(output), ignore_errors=True)


def _folder(output: Path) -> Path:
    return output.with_name(f".{output.name}.parts")
