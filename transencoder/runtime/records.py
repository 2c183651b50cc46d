"""run.json: what made an output folder, and whether it holds this very run."""

import dataclasses
import functools
import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import huggingface_hub
import torch
import transformers

import transencoder
from transencoder.config.options import result_options
from transencoder.errors import InputError, is_first_process, storage_error
from transencoder.runtime.accelerator import DRIVER_VARIABLE
from transencoder.runtime.files import MODEL_MARKS, model_files, place_model, read_json, sha256, write_json
from transencoder.runtime.locks import lock, unlock

RUN_FILE = "run.json"
# What evaluate_encoders.py leaves in a folder: its results, and the scores of the pairs that they come from.
RESULTS_FILE, PAIR_SCORES_FILE = "results.json", "pair-scores.parquet"
# Commit of every Hub dataset that this process has loaded; data/hub_sets.py notes them here.
HUB_COMMITS: dict[str, str] = {}
COMMIT = re.compile(r"[0-9a-f]{40}")


class HubSource(NamedTuple):
    """Name a model or a data set on the Hub."""

    name: str
    kind: Literal["model", "dataset"]
    revision: str | None = None

    def __str__(self) -> str:
        return self.name


Input = Path | HubSource


def identity(arguments: Any, inputs: Iterable[Input]) -> dict[str, Any]:
    """Return what decides the result: the options, and what is in every input.

    Args:
        arguments: a stage's dataclass of options.
        inputs: files, models' folders and names on the Hub; `data.pools.input_files` finds them. What is none of
            these is passed over.
    """
    return {**result_options(arguments), "inputs": {str(name): found for name in inputs if (found := content(name))}}


def model_identity(name: str, pooling: str | None) -> dict[str, Any]:
    """Return what tells a model from another: its files' checksums or its commit on the Hub, and how it pools."""
    found = content(Path(name) if Path(name).exists() else HubSource(name, "model"))
    return {"files": found or name, "pooling": pooling}


def content(source: Input) -> str | dict[str, str] | None:
    """Return what is there now: the SHA-256 of a file, those of a model's files, or a commit on the Hub; else None."""
    if isinstance(source, HubSource):
        commit = hub_commit(*source)
        return f"commit {commit}" if commit else None
    names = model_files(source) if source.is_dir() else []
    try:
        if source.is_file():
            return sha256(source)
        return {name: sha256(source / name) for name in names} or None
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from error


def hub_commit(name: str, kind: str = "dataset", revision: str | None = None) -> str | None:
    """Return the commit that a revision on the Hub stands for now, by default the newest; None where nobody knows."""
    if COMMIT.fullmatch(revision or ""):
        return revision
    try:
        return str(huggingface_hub.HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=10).sha)
    except huggingface_hub.errors.HFValidationError:  # no such name can be on the Hub
        return None
    except Exception:  # offline mode, or one of the HTTP client's many ways to say "no connection"
        found = [
            huggingface_hub.try_to_load_from_cache(name, mark, repo_type=kind, revision=revision)
            for mark in MODEL_MARKS
        ]
        return next((Path(path).parent.name for path in found if isinstance(path, str)), None)


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
    names = [name for name in {**before, **now} if name != "inputs" and before.get(name) != now.get(name)]
    changes = [f"{name} is {before.get(name)!r} there and {now.get(name)!r} here" for name in names[:3]]
    return ", ".join(changes or changed_inputs(before.get("inputs", {}), now.get("inputs", {}))[:3])


def changed_inputs(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return for each input whose content is another one, by file, a few words that say so."""
    old, new = _by_file(before), _by_file(now)
    found = []
    for name in {**old, **new}:
        was, is_ = old.get(name, ""), new.get(name, "")
        at_hub = was.startswith("commit ") or is_.startswith("commit ")
        if was == is_ or (at_hub and not (was and is_)):  # where the Hub is not reached, nobody knows
            continue
        advice = "; HF_HUB_OFFLINE=1 takes what was downloaded before" if at_hub else ""
        found.append(f"{name} is at {was} there and at {is_} here{advice}" if at_hub else f"{name} has changed since")
    return found


def _by_file(inputs: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name, value in inputs.items():
        found |= {f"{name}/{file}": sum_ for file, sum_ in value.items()} if isinstance(value, dict) else {name: value}
    return found


def claim(arguments: Any, stage: str, now: dict[str, Any], result: str | None = None) -> bool:
    """Check a stage's output folder before work begins.

    Args:
        arguments: with output_dir and overwrite.
        stage: the script's name without ".py".
        now: the `identity`.
        result: the file that the stage writes, where it may lie beside other files; by default the folder is all its
            own.
    Returns:
        Whether the folder already holds this very run's result.
    Raises:
        InputError: it holds another run's results, or foreign files, which --overwrite does not touch either.
    """
    where, folder = f"--output_dir {arguments.output_dir}", Path(arguments.output_dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{where}: not a folder")
    there = [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.exists() else []
    if not there or (result and not (folder / result).exists() and not (folder / RUN_FILE).exists()):
        return False
    advice = "choose another --output_dir"
    try:
        run = read_json(folder / RUN_FILE)
        found_stage, found, status = run["stage"], {**_defaults(arguments), **run["arguments"]}, run["status"]
    except FileNotFoundError:
        raise InputError(f"{where}: holds files that are not this tool's; {advice}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where}: {RUN_FILE} cannot be read; delete the folder, or {advice}") from error
    if arguments.overwrite:
        return False
    advice += " or add --overwrite"
    if found_stage != stage:
        raise InputError(f"{where}: holds the result of {found_stage}; {advice}")
    changed = difference(found, now)
    if changed:
        if os.environ.get(DRIVER_VARIABLE):  # which has no --overwrite
            advice = f"put it back, or delete {folder}, and the same command makes it again"
        raise InputError(f"{where}: holds another run's results ({changed}); {advice}")
    # Somebody may have deleted what was damaged.
    return status == "complete" and any(folder.glob(result or "model*.safetensors"))


def _defaults(arguments: Any) -> dict[str, Any]:
    """Return what an option stood at in a record that is older than it is."""
    fields = dataclasses.fields(arguments)
    return {f.name: f.default for f in fields if f.metadata["identity"] and f.default is not dataclasses.MISSING}


def write_run(arguments: Any, stage: str, status: str, now: dict[str, Any], **metadata: Any) -> None:
    """Write run.json; from "running" to "complete" the first process holds the folder's lock.

    Args:
        arguments: with output_dir.
        stage: the script's name without ".py".
        status: "running", or "complete", which is written last of all.
        now: the `identity`, as it was when the stage began.
        metadata: what else run.json says.
    Raises:
        InputError: the folder cannot be made.
    """
    folder = Path(arguments.output_dir)
    metadata |= {"hub_datasets": HUB_COMMITS} if HUB_COMMITS else {}
    versions = {"transencoder": code_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    record = dict(stage=stage, status=status, arguments=now, versions=versions, **metadata)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        where = f"--output_dir {folder}"
        raise storage_error(error, where) or InputError(f"{where}: cannot be written: {error.strerror}") from error
    if is_first_process():
        lock(folder)
    write_json(folder / RUN_FILE, {**record, "files": _placed(folder)})
    if status == "complete":
        unlock(folder)


def place(source: Path, folder: Path) -> None:
    """Put the saved model in `source` into a stage's folder, in the place of the one that an earlier run left there.

    run.json says which files are the model's: no others are deleted.
    """
    before = _placed(folder)
    names = sorted({*before, *model_files(source)})
    write_json(folder / RUN_FILE, {**read_json(folder / RUN_FILE), "files": names})
    place_model(source, folder, before)


def _placed(folder: Path) -> list[str]:
    """Return the files of the model that a stage has put into its folder; all of it where an older version did."""
    try:
        run = read_json(folder / RUN_FILE)
    except (OSError, ValueError):
        return []
    there = model_files(folder)
    return [name for name in there if name in run.get("files", there)] if isinstance(run, dict) else []
