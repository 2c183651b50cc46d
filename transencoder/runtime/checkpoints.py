"""Checkpoints of a training under way: written whole or not at all, and the newest that is whole is read.

OUTPUT_DIR/checkpoints/step-000400/    model, optimizer, schedule, random states (Accelerate saves them), progress.json
OUTPUT_DIR/checkpoints/best-000200/    the model with the best score so far, which OUTPUT_DIR gets in the end

Each has a manifest.json with its files' sizes and SHA-256. No code that somebody may have put there is run: what
Accelerate, PyTorch or DeepSpeed keep as pickles must hold tensors, numbers and texts only.
"""

import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from accelerate.utils.other import TORCH_SAFE_GLOBALS
from torch import nn

from transencoder.errors import BrokenRun, InputError, writing
from transencoder.runtime.accelerator import log
from transencoder.runtime.backends import backend_name
from transencoder.runtime.files import read_json, sha256, write_json

MANIFEST, PROGRESS = "manifest.json", "progress.json"
FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # environment variable of PyTorch
PICKLES, SHARDS_METADATA = (".bin", ".pkl", ".pt"), ".metadata"  # of torch.save, and of FSDP, which pickles by itself
# What these hold beside tensors, numbers and texts.
OF_DEEPSPEED = (
    "deepspeed.runtime.zero.config:ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler:LossScaler",
    "deepspeed.runtime.fp16.loss_scaler:DynamicLossScaler",
    "deepspeed.utils.tensor_fragment:fragment_address",
)
OF_FSDP = {
    "pathlib": {"PosixPath"},
    "torch": {"Size", "float32", "int64"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.serialization": {"_get_layout"},
}


class Stateful(Protocol):
    """Anything whose state is a dictionary that JSON can hold; all processes ask for it together."""

    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102

    def load_state_dict(self, state: dict[str, Any]) -> None: ...  # noqa: D102


class Checkpoints:
    """The folder `checkpoints` of one training run.

    Accelerate's own rotation removes the oldest checkpoint before the new one is whole, and reads a half-written one.
    So its `save_state` writes to a temporary name here, and the folder is renamed when it is complete.

    Args:
        progress: how far the training is; goes into progress.json.
        keep: how many to keep.
    """

    def __init__(self, accelerator: Accelerator, output_dir: str, progress: Stateful, keep: int):
        self.accelerator, self.folder, self.keep = accelerator, Path(output_dir) / "checkpoints", keep
        self.progress = progress
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
        progress = self.progress.state_dict()
        try:
            with writing(target):
                self.accelerator.save_state(str(temporary))
        except BrokenRun:  # a disk that is full has no room for half a checkpoint
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            setting = dict(backend=backend_name(self.accelerator), world_size=self.accelerator.num_processes)
            write_json(temporary / PROGRESS, progress)
            seal(temporary, step=step, best_step=best_step, **setting)
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
        with only_data():
            self.accelerator.load_state(str(path))
        self.progress.load_state_dict(read_json(path / PROGRESS))
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
    if "backend" not in newest or PROGRESS not in newest["files"]:
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


def seal(folder: Path, **metadata: Any) -> None:
    """Write manifest.json into a folder that is otherwise whole."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    content = {name: [path.stat().st_size, sha256(path)] for name, path in sorted(files.items())}
    write_json(folder / MANIFEST, {**metadata, "files": content})


def check_sealed(folder: Path) -> None:
    """Raise `BrokenRun` unless a folder is as it was when it was sealed."""
    if problem := _damage(folder):
        raise BrokenRun(f"{folder}: {problem}; delete {folder.parent}, and the same command trains anew")


def _manifest(path: Path) -> dict[str, Any] | None:
    """Read a checkpoint's metadata; returns None if there is none, or not all of it."""
    try:
        manifest = read_json(path / MANIFEST)
        return manifest if {"step", "best_step", "world_size", "files"} <= manifest.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _problem(path: Path) -> str | None:
    """Say why a checkpoint cannot be gone on from; returns None if it can."""
    manifest = _manifest(path)
    if manifest is None:
        return f"{MANIFEST} cannot be read"
    best = path.parent / f"best-{manifest['best_step']:06}"
    found = _damage(path) or _not_data(path)
    return found or (manifest["best_step"] and (damage := _damage(best)) and f"{best.name}: {damage}") or None


def _damage(path: Path) -> str | None:
    """Say what of a sealed folder is not as it was written."""
    if not path.is_dir():
        return "is missing"
    try:
        files = dict(read_json(path / MANIFEST)["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    for name, (size, checksum) in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size or sha256(file) != checksum:
            return f"{name} is damaged"
    added = sorted(str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir())
    return next((f"{name} does not belong there" for name in added if name not in (*files, MANIFEST)), None)


def _not_data(path: Path) -> str | None:
    """Say which file of a checkpoint names anything but tensors, numbers and texts, which loading it might call."""
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        name = str(file.relative_to(path))
        try:
            if file.suffix in PICKLES:
                with _known_globals():
                    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file)
                if unknown:
                    return f"{name} holds {unknown[0]}, which is not data"
            elif file.name == SHARDS_METADATA:
                with file.open("rb") as stream:
                    _Metadata(stream).load()
        except Exception as error:  # whatever the bytes make of the unpickler
            return f"{name} cannot be read as data ({type(error).__name__}: {' '.join(str(error).split())[:100]})"
    if (path / PROGRESS).is_file():
        try:
            read_json(path / PROGRESS)
        except ValueError:
            return f"{PROGRESS} cannot be read"
    return None


@contextmanager
def only_data() -> Iterator[None]:
    """While it is entered, torch.load builds tensors, numbers and texts only, whoever calls it and however."""
    before = os.environ.get(FORCE)
    os.environ[FORCE] = "1"
    try:
        with _known_globals():
            yield
    finally:
        os.environ.pop(FORCE)
        if before is not None:
            os.environ[FORCE] = before


def _known_globals() -> AbstractContextManager[None]:
    """Return what makes known the classes of data that Accelerate and DeepSpeed save."""
    of_deepspeed = [resolve_name(name) for name in OF_DEEPSPEED] if "deepspeed" in sys.modules else []
    return torch.serialization.safe_globals(TORCH_SAFE_GLOBALS + of_deepspeed)


class _Metadata(pickle.Unpickler):
    """Read FSDP's metadata, which PyTorch unpickles with no care of its own; anything unknown is an error."""

    def find_class(self, module: str, name: str) -> Any:
        if name in OF_FSDP.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")
