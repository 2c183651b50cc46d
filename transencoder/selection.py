"""Which checkpoint is kept, with labels or without: the one that is best on labelled pairs, or that agrees best with
its teacher, or the last. And how far two files of labels agree.
"""

import math
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from transencoder.config.arguments import LabelArguments, TrainingArguments
from transencoder.data.tables import PAIRS, row_hashes
from transencoder.data.tasks import Task
from transencoder.errors import InputError


def select_by(arguments: TrainingArguments) -> str:
    """Return "dev", "agreement" or "last"; raises `InputError` for a choice by what is not there."""
    if arguments.select_by == "dev" and not arguments.dev:
        raise InputError("--select_by dev: needs labelled pairs, --dev FILE")
    if arguments.select_by == "agreement" and not isinstance(arguments, LabelArguments):
        raise InputError("--select_by agreement: not in step 1, which has no teacher to agree with; use last")
    if merged_by(arguments) == "dev" and not arguments.dev:
        raise InputError("--merge_with_start dev: needs labelled pairs, --dev FILE")
    return arguments.select_by or ("dev" if arguments.dev else "last")


def merged_by(arguments: TrainingArguments) -> str | float:
    """Return how a student is mixed with its start: by "dev" or "agreement", its share as given, or "off"."""
    return getattr(arguments, "merge_with_start", "off")


def training_rows(rows: int, arguments: LabelArguments) -> int:
    """Return how many of `rows` pairs are left to train on once some are held out, and others dropped.

    Raises:
        InputError: more than half of the pairs would be held out.
    """
    return believed_rows(rows - held_out_rows(rows, arguments), arguments)


def held_out_rows(rows: int, arguments: TrainingArguments) -> int:
    """Return how many of `rows` pairs are held out; raises `InputError` if that is more than half of them."""
    if "agreement" not in (select_by(arguments), merged_by(arguments)):
        return 0
    held_out = arguments.num_held_out
    if 2 * held_out > rows:
        raise InputError(f"--num_held_out {held_out}: more than half of the {rows} pairs; give less, or more pairs")
    return held_out


def believed_rows(rows: int, arguments: LabelArguments) -> int:
    """Return how many of `rows` pairs are left once those are dropped on which the teachers disagree."""
    return rows - round(arguments.drop_disagreement * rows)


def hold_out(labels: datasets.Dataset, arguments: TrainingArguments) -> tuple[datasets.Dataset, Task | None]:
    """Take a random sample of the scored pairs out of training, where agreement with the teacher chooses anything.

    Args:
        labels: columns sentence1, sentence2 and score, the teacher's.
    Returns:
        The pairs to train on, and the held-out ones as a task whose gold values are the teacher's scores: a student's
        Spearman correlation on it is its agreement with the teacher. None where nothing is held out.
    """
    size = held_out_rows(len(labels), arguments)
    if not size:
        return labels, None
    order = np.random.default_rng(arguments.seed).permutation(len(labels))
    held_out = labels.select(np.sort(order[:size]))
    return labels.select(np.sort(order[size:])), Task("agreement", "held-out", held_out, "score")


def agreement(first: Path, second: Path) -> float:
    """Return Spearman's rho, -1 to 1, between two files of scores of the same pairs; NaN where one is constant.

    Raises:
        InputError: a file that is not one of scores, or files of different pairs.
    """
    scores, pairs = zip(*(_read_scores(path) for path in (first, second)), strict=True)
    if not np.array_equal(*pairs):
        raise InputError(f"{second}: not the pairs of {first}, in the same order")
    if any(np.ptp(values) == 0 for values in scores):
        return math.nan
    from scipy import stats  # imported here: it takes a second, and checking a recipe needs none of it

    return float(stats.spearmanr(*scores).statistic)


def _read_scores(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the scores of a file, float [pairs], and the number by which each pair is known, uint64 [pairs]."""
    if not path.is_file():  # a pipe would be waited for
        raise InputError(f"{path}: not a file of scores, nor any other file")
    scores, pairs = [], []
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=[*PAIRS, "score"]):
                scores.append(batch["score"].to_numpy())
                pairs.append(row_hashes(pa.table(batch).select(PAIRS)))
        return np.concatenate(scores), np.concatenate(pairs)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise InputError(f"{path}: not a file of scores, as score_pairs.py writes them") from error
