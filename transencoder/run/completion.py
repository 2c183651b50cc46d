"""What of a run is done."""

import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from transencoder.run.layout import Layout
from transencoder.runtime.checkpoints import remove_checkpoints
from transencoder.runtime.files import read_json
from transencoder.runtime.records import RESULTS_FILE, RUN_FILE
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
