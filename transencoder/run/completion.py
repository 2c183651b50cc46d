"""What of a run is done."""

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from transencoder.data.scores import read_metadata
from transencoder.errors import InputError
from transencoder.run.layout import Layout
from transencoder.runtime.checkpoints import remove_checkpoints
from transencoder.runtime.files import model_files, read_json, sha256, write_json
from transencoder.runtime.records import PAIR_SCORES_FILE, RESULTS_FILE, RUN_FILE, changed_inputs, content
from transencoder.runtime.shards import remove_shards
from transencoder.selection import agreement


def is_complete(output: Path) -> bool:
    """Return whether a stage's output is whole: a Parquet file, or a folder with a model or results."""
    if output.suffix == ".parquet":
        try:
            pq.read_metadata(output)
        except (OSError, pa.ArrowException):
            return False
        return True
    try:
        run = read_json(output / RUN_FILE)
    except (OSError, ValueError):
        return False
    made = any(output.glob("model*.safetensors")) or (output / RESULTS_FILE).is_file()
    return isinstance(run, dict) and run.get("status") == "complete" and made


class Checksums:
    """What a run's stages read and made, compared with what is there now.

    Args:
        run: folder of the run.
        path: JSON file that keeps the checksums of what stages made, by their outputs' paths inside the run.
    """

    def __init__(self, run: Path, path: Path):
        self.run, self.path = run, path
        self.seen: dict[str, Any] = {}  # what was in each input when this launch first looked
        try:
            self.made = dict(read_json(path))
        except (OSError, ValueError, TypeError):
            self.made = {}

    def check(self, output: Path) -> bool:
        """Return whether a complete output was made from something in the run that has been made anew since.

        Raises:
            InputError: a file of it is not as its stage left it, or an input from elsewhere has changed since.
        """
        made, now = self.made.setdefault(self._name(output), {}), _sums(output)
        for name, sum_ in made.items():
            if now.get(name) != sum_:
                whole = output.suffix == ".parquet" or (output / RESULTS_FILE).is_file()
                advice = output / RESULTS_FILE if whole and output.is_dir() else output
                raise InputError(
                    f"{output.parent / name}: damaged, or changed since it was made; put it back, or delete {advice}, "
                    "and the same command makes it again"
                )
        self._note(output, now)
        noted = _inputs(output)
        there = {name: self._content(name, value) for name, value in noted.items()}
        # What is gone is missed by those who need it; an older version noted models in another way.
        changed = {
            name: value
            for name, value in noted.items()
            if isinstance(there[name], type(value)) and there[name] != value
        }
        for name in changed:
            if not Path(name).resolve().is_relative_to(self.run.resolve()):
                words = changed_inputs({name: changed[name]}, {name: there[name]})
                raise InputError(
                    f"{', '.join(words[:3])}, and {output} was made from it; put it back, or choose another "
                    "--output_dir"
                )
        return bool(changed)

    def add(self, output: Path) -> None:
        """Note what a stage has just made.

        Raises:
            InputError: it has read something else from a file than the stages of this launch before it.
        """
        for name in [name for name in self.seen if Path(name) == output]:
            del self.seen[name]
        self._note(output, _sums(output))
        for name, value in _inputs(output).items():
            if words := changed_inputs({name: self.seen.setdefault(name, value)}, {name: value}):
                raise InputError(
                    f"{', '.join(words[:3])}, while the run was under way; put it back and delete {output}, or choose "
                    "another --output_dir"
                )

    def forget(self, output: Path) -> None:
        """Drop what is known of an output, which is going to be made."""
        if self.made.pop(self._name(output), None):
            write_json(self.path, self.made)

    def _content(self, name: str, noted: Any) -> Any:
        """Return what is in a file or a model's folder, which is looked at once; of the Hub, what was noted first."""
        if name not in self.seen:
            self.seen[name] = noted if str(noted).startswith("commit ") else content(Path(name))
        return self.seen[name]

    def _note(self, output: Path, sums: dict[str, str]) -> None:
        if self.made.get(self._name(output)) != sums:
            self.made[self._name(output)] = sums
            write_json(self.path, self.made)

    def _name(self, output: Path) -> str:
        return output.relative_to(self.run).as_posix()


def _sums(output: Path) -> dict[str, str]:
    """Return the SHA-256 of the files of an output, by their names in its parent folder."""
    files = [output] if output.is_file() else [output / name for name in model_files(output)]
    files += [output / name for name in (RUN_FILE, RESULTS_FILE, PAIR_SCORES_FILE)]
    return {path.relative_to(output.parent).as_posix(): sha256(path) for path in files if path.is_file()}


def _inputs(output: Path) -> dict[str, Any]:
    """Return what a stage noted about its inputs."""
    record = read_metadata(output) if output.suffix == ".parquet" else read_json(output / RUN_FILE).get("arguments")
    return (record or {}).get("inputs", {})


def tidy(output: Path) -> None:
    """Delete what a kill left beside a complete output: checkpoints, shards, a lock."""
    remove_checkpoints(str(output))
    remove_shards(output)
    output.with_name(f".{output.name}.lock").unlink(missing_ok=True)


def label_agreement(run: Path, cycle: int) -> float:
    """Return how far a cycle's labels agree with those of the cycle before: -1 to 1; NaN where there are none."""
    layout = Layout(run)
    files = layout.scores(cycle - 1, "bi"), layout.scores(cycle, "bi")
    return agreement(*files) if all(file.is_file() for file in files) else math.nan


def stopped_before(run: Path, cycle: int, stop_at: float | None) -> bool:
    """Return whether the loop ended before `cycle`, since its labels were nearly those of the cycle before."""
    return stop_at is not None and label_agreement(run, cycle) >= stop_at
