"""Checkpoints of a training under way: written whole or not at all, and the newest that is whole is read.

OUTPUT_DIR/checkpoints/step-000400/    what Accelerate saves (model, optimizer, schedule, random states, progress)
                                       and manifest.json: every file's size and SHA-256
OUTPUT_DIR/checkpoints/best-000200/    the model with the best score so far, which OUTPUT_DIR gets in the end
"""

import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from transencoder.errors import BrokenRun, InputError, writing
from transencoder.runtime.accelerator import log
from transencoder.runtime.backends import backend_name
from transencoder.runtime.files import read_json, sha256, write_json

MANIFEST = "manifest.json"


class Checkpoints:
    """The folder `checkpoints` of one training run.

    Accelerate's own rotation removes the oldest checkpoint before the new one is whole, and reads a half-written one.
    So its `save_state` writes to a temporary name here, and the folder is renamed when it is complete.

    Args:
        keep: how many to keep.
    """

    def __init__(self, accelerator: Accelerator, output_dir: str, keep: int):
        self.accelerator, self.folder, self.keep = accelerator, Path(output_dir) / "checkpoints", keep
        if backend_name(accelerator) == "plain":
            # DDP's names of the weights begin with "module."; without it one process can go on where two stopped.
            accelerator.register_save_state_pre_hook(self._save_unwrapped)
            accelerator.register_load_state_pre_hook(self._load_unwrapped)

    def best(self, step: int) -> Path:
        """Return where the model of `step`, the best so far, lies."""
        return self.folder / f"best-{step:06}"

    def save(self, step: int, best_step: int) -> None:
        """Write a checkpoint of everything the Accelerator knows; then remove what is no longer needed."""
        temporary, target = self.folder / f".step-{step:06}.tmp", self.folder / f"step-{step:06}"
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        try:
            with writing(target):
                self.accelerator.save_state(str(temporary))
        except BrokenRun:  # a disk that is full has no room for half a checkpoint
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            files = {str(path.relative_to(temporary)): path for path in temporary.rglob("*") if path.is_file()}
            content = {name: [path.stat().st_size, sha256(path)] for name, path in sorted(files.items())}
            setting = dict(backend=backend_name(self.accelerator), world_size=self.accelerator.num_processes)
            write_json(temporary / MANIFEST, dict(step=step, best_step=best_step, **setting, files=content))
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
            self._rotate(best_step)
        self.accelerator.wait_for_everyone()

    def load_newest(self) -> bool:
        """Load the newest checkpoint that is whole; returns whether there was one."""
        choice = [self.newest() if self.accelerator.is_main_process else None]
        (path,) = broadcast_object_list(choice)
        if path is None:
            return False
        self.accelerator.load_state(str(path))
        self.accelerator.step = 0  # micro-batches of a batch; their number may have changed
        if self.accelerator.is_main_process:
            written = _manifest(path)["world_size"]
            now = self.accelerator.num_processes
            change = f", which {written} processes wrote and {now} read" if written != now else ""
            log(f"going on from {path}{change}")
        return True

    def newest(self) -> Path | None:
        """Return the newest checkpoint that is whole."""
        for path in reversed(_numbered(self.folder)):
            problem = _problem(path)
            if not problem:
                return path
            log(f"warning: {path}: {problem}; trying the checkpoint before it")
        return None

    def _save_unwrapped(self, models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
        weights[:] = [self.accelerator.unwrap_model(model).state_dict() for model in models]

    def _load_unwrapped(self, models: list[nn.Module], folder: str) -> None:
        models[:] = [self.accelerator.unwrap_model(model) for model in models]

    def _rotate(self, best_step: int) -> None:
        """Remove all but the newest `keep` checkpoints, and the best models that none of those refers to."""
        checkpoints = _numbered(self.folder)
        for path in checkpoints[: -self.keep]:
            shutil.rmtree(path)
        needed = {best_step, *((_manifest(path) or {}).get("best_step") for path in checkpoints[-self.keep :])}
        for path in self.folder.glob("best-*"):
            if int(path.name.rpartition("-")[2]) not in needed:
                shutil.rmtree(path)


def remove_checkpoints(output_dir: str) -> None:
    """Delete the checkpoints of a training that is over, or is to begin anew."""
    shutil.rmtree(Path(output_dir) / "checkpoints", ignore_errors=True)


def check_resumable(output_dir: str, accelerator: Accelerator) -> None:
    """Refuse, before any model is loaded, to go on from checkpoints that this run cannot read.

    Raises:
        InputError: the newest one was written by an older version of this package, under another backend, or by
            DeepSpeed with another number of processes, each of which has its shard.
    """
    manifests = [_manifest(path) for path in reversed(_numbered(Path(output_dir) / "checkpoints"))]
    newest = next((manifest for manifest in manifests if manifest), None)
    if newest is None:
        return
    backend, where = backend_name(accelerator), f"--output_dir {output_dir}: its checkpoints were written"
    anew = f"delete {output_dir} and run the same command again"
    if "backend" not in newest:
        raise InputError(f"{where} by an older version, whose models had other names; {anew}")
    advice = f"launch it the same way, or {anew}"
    if newest["backend"] != backend:
        raise InputError(f"{where} under {newest['backend']}, this is {backend}; {advice}")
    if backend.startswith("deepspeed") and newest["world_size"] != accelerator.num_processes:
        raise InputError(
            f"{where} by {newest['world_size']} processes, these are {accelerator.num_processes}, and DeepSpeed "
            f"cannot shard them anew; {advice}"
        )


def _numbered(folder: Path) -> list[Path]:
    """Return the checkpoints, oldest first: step-1000000 comes after step-999900."""
    steps = [(path.name.removeprefix("step-"), path) for path in folder.glob("step-*") if path.is_dir()]
    return [path for _, path in sorted((int(step), path) for step, path in steps if step.isdecimal())]


def _manifest(path: Path) -> dict[str, Any] | None:
    """Read a checkpoint's metadata; returns None if there is none, or not all of it."""
    try:
        manifest = read_json(path / MANIFEST)
        return manifest if {"step", "best_step", "world_size", "files"} <= manifest.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _problem(path: Path) -> str | None:
    """Say what is wrong with a checkpoint; returns None if it is as it was written."""
    manifest = _manifest(path)
    if manifest is None:
        return f"{MANIFEST} cannot be read"
    for name, (size, checksum) in manifest["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size or sha256(file) != checksum:
            return f"{name} is damaged"
    best = path.parent / f"best-{manifest['best_step']:06}"
    return f"{best.name} is missing" if manifest["best_step"] and not best.is_dir() else None
