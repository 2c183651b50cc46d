"""run.json: what made an output folder, and whether it holds this very run."""

import dataclasses
import functools
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

import transencoder
from transencoder.config.options import result_options
from transencoder.errors import InputError, is_first_process, storage_error
from transencoder.runtime.files import read_json, sha256, write_json
from transencoder.runtime.locks import lock, unlock

RUN_FILE = "run.json"
# What evaluate_encoders.py leaves in a folder: its results, and the scores of the pairs that they come from.
RESULTS_FILE, PAIR_SCORES_FILE = "results.json", "pair-scores.parquet"
# Commit of every Hub dataset that this process has loaded; data/hub_sets.py notes them here.
HUB_COMMITS: dict[str, str] = {}


def identity(arguments: Any, inputs: Iterable[Path]) -> dict[str, Any]:
    """Return what decides the result: the options, and the SHA-256 of every input.

    Args:
        arguments: a stage's dataclass of options.
        inputs: files and models' folders; `data.pools.input_files` finds them. What is neither is passed over.
    """
    return {**result_options(arguments), "inputs": {str(path): sum_ for path in inputs if (sum_ := _checksum(path))}}


def model_identity(name: str, pooling: str | None) -> dict[str, str | None]:
    """Return what tells a model from another: the checksum of its weights or its Hub id, and how it pools."""
    return {"weights": _checksum(Path(name)) or name, "pooling": pooling}


def _checksum(path: Path) -> str | None:
    """Return the SHA-256 of a file, or of the weights in a model's folder; None for anything else."""
    files = sorted(path.glob("model*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        return None
    try:
        return sha256(*files)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from error


@functools.cache
def code_version() -> str:
    """Return the version and, in a checkout, its commit: "0.1.0+g1a2b3c4d5e6f", with ".dirty" for changed files."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return transencoder.__version__
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=.dirty", "--abbrev=12", "--exclude=*"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout that it does not trust
        return transencoder.__version__
    return f"{transencoder.__version__}+g{commit}"


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return in words what sets two runs apart: "seed is 1 there and 2 here"."""
    files = [
        path
        for path in {**before.get("inputs", {}), **now.get("inputs", {})}
        if before.get("inputs", {}).get(path) != now.get("inputs", {}).get(path)
    ]
    names = [name for name in {**before, **now} if name != "inputs" and before.get(name) != now.get(name)]
    changes = [f"{name} is {before.get(name)!r} there and {now.get(name)!r} here" for name in names[:3]]
    return ", ".join(changes or [f"{path} has changed since" for path in files[:3]])


def claim(arguments: Any, stage: str, inputs: Iterable[Path], result: str | None = None) -> bool:
    """Check a stage's output folder before work begins.

    Args:
        arguments: with output_dir and overwrite.
        stage: the script's name without ".py".
        inputs: as `identity` takes them.
        result: the file that the stage writes, where it may lie beside other files; by default the folder is all its
            own.
    Returns:
        Whether the folder already holds this very run's result.
    Raises:
        InputError: it holds another run's results or foreign files.
    """
    where, folder = f"--output_dir {arguments.output_dir}", Path(arguments.output_dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{where}: not a folder")
    if arguments.overwrite or not folder.exists() or not any(folder.iterdir()):
        return False
    if result and not (folder / result).exists() and not (folder / RUN_FILE).exists():
        return False
    advice = "choose another --output_dir or add --overwrite"
    try:
        run = read_json(folder / RUN_FILE)
        found_stage, found, status = run["stage"], {**_defaults(arguments), **run["arguments"]}, run["status"]
    except FileNotFoundError:
        raise InputError(f"{where}: holds files that are not this tool's; {advice}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where}: {RUN_FILE} cannot be read; delete the folder, {advice}") from error
    if found_stage != stage:
        raise InputError(f"{where}: holds the result of {found_stage}; {advice}")
    changed = difference(found, identity(arguments, inputs))
    if changed:
        raise InputError(f"{where}: holds another run's results ({changed}); {advice}")
    # Somebody may have deleted what was damaged.
    return status == "complete" and any(folder.glob(result or "model*.safetensors"))


def _defaults(arguments: Any) -> dict[str, Any]:
    """Return what an option stood at in a record that is older than it is."""
    fields = dataclasses.fields(arguments)
    return {f.name: f.default for f in fields if f.metadata["identity"] and f.default is not dataclasses.MISSING}


def write_run(arguments: Any, stage: str, status: str, inputs: Iterable[Path], **metadata: Any) -> None:
    """Write run.json; from "running" to "complete" the first process holds the folder's lock.

    Args:
        arguments: with output_dir.
        stage: the script's name without ".py".
        status: "running", or "complete", which is written last of all.
        inputs: as `identity` takes them.
        metadata: what else run.json says.
    Raises:
        InputError: the folder cannot be made.
    """
    folder = Path(arguments.output_dir)
    metadata |= {"hub_datasets": HUB_COMMITS} if HUB_COMMITS else {}
    versions = {"transencoder": code_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    content = dict(stage=stage, status=status, arguments=identity(arguments, inputs), versions=versions, **metadata)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        where = f"--output_dir {folder}"
        raise storage_error(error, where) or InputError(f"{where}: cannot be written: {error.strerror}") from error
    if is_first_process():
        lock(folder)
    write_json(folder / RUN_FILE, content)
    if status == "complete":
        unlock(folder)
