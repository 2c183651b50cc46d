"""Pseudo-labels: the pairs that a student learns from, and the scores that its teachers give them."""

import dataclasses
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from accelerate.utils import set_seed

from transencoder.config.arguments import LabelArguments, ScoringArguments
from transencoder.data.pools import check_both_orders, input_files, is_ordered, read_pool, swap_of
from transencoder.data.scores import is_made, read_metadata, write_scores
from transencoder.data.tables import PAIRS, blocks, content_checksum, numbers, read_pairs, row_hashes
from transencoder.data.tasks import Task
from transencoder.errors import InputError
from transencoder.inference import Inference
from transencoder.losses import ranks
from transencoder.model_checks import ONE_SCALE, check_encoders
from transencoder.model_files import model_options
from transencoder.runtime.accelerator import log
from transencoder.runtime.records import HUB_COMMITS, code_version, identity
from transencoder.runtime.shards import Shards
from transencoder.runtime.waiting import wait_long
from transencoder.scoring import Teachers
from transencoder.selection import believed_rows, hold_out, training_rows

# Pairs that a file of scores shares with a labelled set, and correlation on them, from which it holds its labels.
SHARED_PAIRS, SAME_SCORES = 10, 0.999


class StudentPairs:
    """The pairs that a student learns from: read and checked now, scored by its teachers only by `labels`.

    Args:
        arguments: with --scores, or --teachers and --pairs.
        dev: the set that the checkpoint is chosen on, whose labels must not be the scores.
    Raises:
        InputError: as `read_label_pairs`.
    """

    def __init__(self, arguments: LabelArguments, dev: Task | None):
        self.arguments, self.pairs = arguments, read_label_pairs(arguments, dev)
        if arguments.teachers:
            self.teachers = teachers_of(arguments, arguments.teachers, self.pairs, order_matters(arguments), dev)

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def to_train_on(self) -> int:
        """How many pairs are left once some are held out."""
        return training_rows(len(self.pairs), self.arguments)

    @property
    def swap(self) -> bool:
        """Whether a cross-encoder trains on both orders of a pair."""
        return swap_of(self.arguments.swap, order_matters(self.arguments))

    def labels(self, inference: Inference) -> tuple[datasets.Dataset, Task | None]:
        """Return the pairs with the column `score`, and those that are held out.

        Teachers' scores are kept as teacher-scores.parquet in the output folder; the teachers are gone at the return.
        """
        arguments, labelled = self.arguments, self.pairs
        if arguments.teachers:
            path = Path(arguments.output_dir) / "teacher-scores.parquet"
            metadata = identity(arguments, input_files(arguments))
            if not is_made(path, metadata, overwrite=arguments.overwrite):
                score_to_file(self.teachers, self.pairs, path, inference, arguments.shard_rows, metadata)
            labelled = read_pairs([str(path)], _label_columns(arguments))
            check_label_range(str(path), labelled, arguments)
        set_seed(arguments.seed)  # teachers may have drawn numbers, and a new head is random
        labels, held_out = hold_out(labelled, arguments)
        return believed(labels, arguments), held_out


def _label_columns(arguments: LabelArguments) -> tuple[str, ...]:
    return ("score", "disagreement") if arguments.by_disagreement else ("score",)


def believed(labels: datasets.Dataset, arguments: LabelArguments) -> datasets.Dataset:
    """Return the pairs on whose scores the teachers agree, where they are to count for more than the others.

    What counts twice is there twice: so it does under every loss. `training_rows` knows how many rows there will be.

    Args:
        labels: with the column disagreement.
    """
    if not arguments.by_disagreement:
        return labels
    # In a random order, so that it is not the last of the file that go where many are equal.
    order = np.random.default_rng(arguments.seed).permutation(len(labels))
    disagreement = numbers(labels, "disagreement")
    order = order[np.argsort(disagreement[order], kind="stable")]
    rows = np.sort(order[: believed_rows(len(labels), arguments)])
    if dropped := len(labels) - len(rows):
        log(f"{dropped} of {len(labels)} pairs are dropped: the teachers disagree on them most")
    if arguments.weight_disagreement and len(rows):
        often = 2 * (1 - ranks(disagreement[rows]))  # 1 on average
        rows = rows[np.searchsorted(often.cumsum(), np.arange(len(rows)) + 0.5)]
        log(f"{len(np.unique(rows))} pairs are taken once or twice, as the teachers agree on them")
    return labels.select(rows)


def read_label_pairs(arguments: LabelArguments, dev: Task | None = None) -> datasets.Dataset:
    """Return a student's training pairs, checked: with the column `score` from --scores, or without it from --pairs.

    Raises:
        InputError: also for a score outside [-1, 1], neither a cosine nor a probability, and for the labels of `dev`.
    """
    if arguments.teachers:
        check_encoders(arguments.teachers, model_options(arguments), arguments.averages(arguments.teachers))
        return read_pool(arguments, drop_duplicates=True)
    (path,) = arguments.scores
    pairs = read_pairs([path], _label_columns(arguments), arguments)
    check_label_range(path, pairs, arguments)
    check_no_labels(path, pairs, dev)
    return pairs


def check_label_range(path: str, pairs: datasets.Dataset, arguments: LabelArguments) -> None:
    """Raise `InputError` for a label outside [-1, 1], unless step 2 rescales them."""
    if getattr(arguments, "rescale", "none") == "none":
        check_range(path, pairs, "step 2 takes other scales with --rescale logistic")


def check_range(path: str, pairs: datasets.Dataset, advice: str) -> None:
    """Raise `InputError` with `advice` for a score outside [-1, 1]."""
    scores = numbers(pairs, "score")
    (outside,) = np.nonzero(np.abs(scores) > 1 + 1e-5)
    if len(outside):
        row = outside[0]
        raise InputError(
            f"{path}: row {row + 1}: score {scores[row]} is not in [-1, 1], as cosines and probabilities are; {advice}"
        )


def teachers_of(
    arguments: LabelArguments | ScoringArguments,
    names: list[str],
    pairs: datasets.Dataset,
    ordered: bool,
    dev: Task | None = None,
) -> Teachers:
    """Return those who score `pairs`: encoders, and files of scores, which are read and matched to the pairs now.

    Args:
        names: the encoders.
        ordered: whether (b, a) is another pair than (a, b).
        dev: the set that the checkpoint is chosen on, whose labels must not be the scores.
    Raises:
        InputError: also for a file that has a score of no pair.
    """
    check_both_orders(arguments.both_orders, ordered)
    return Teachers(
        names,
        arguments.teacher_weights,
        model_options(arguments),
        arguments.both_orders,
        arguments.lexical_weight,
        arguments.teacher_scale,
        arguments.smooth_neighbours,
        [_scores_in(path, pairs, ordered, arguments, dev) for path in arguments.scores or []],
    )


def _scores_in(
    path: str, pairs: datasets.Dataset, ordered: bool, arguments: LabelArguments | ScoringArguments, dev: Task | None
) -> np.ndarray:
    """Return a file's scores of `pairs`, found by their text: float64 [pairs], NaN where it has none.

    Where it has several of a pair, or of both its orders, their mean counts.
    """
    scored = read_pairs([path], "score", arguments)
    if arguments.teacher_scale == "none":
        check_range(path, scored, ONE_SCALE)
    check_no_labels(path, scored, dev)
    known = pd.Series(numbers(scored, "score")).groupby(_keys(scored, ordered)).mean()
    found = known.reindex(_keys(pairs, ordered)).to_numpy()
    matched = np.count_nonzero(~np.isnan(found))
    if not matched:
        raise InputError(
            f"--scores {path}: none of its {len(scored)} pairs is to be scored; they are told by their text"
        )
    alone = matched < len(pairs) and arguments.teacher_scale == "none"
    more = "; the others have a mean without it, and on another scale: see --teacher_scale" if alone else ""
    log(f"{path}: scores of {matched} of {len(pairs)} pairs{more}")
    return found


def _keys(pairs: datasets.Dataset, ordered: bool) -> np.ndarray:
    """Return a number by which equal pairs are known, in either order unless `ordered`: uint64 [pairs]."""
    orders = [PAIRS] if ordered else [PAIRS, PAIRS[::-1]]
    parts = [np.min([row_hashes(block.select(list(order))) for order in orders], axis=0) for _, block in blocks(pairs)]
    return np.concatenate(parts)


def order_matters(arguments: LabelArguments) -> bool:
    """Return whether a student's training pairs must not be swapped, which files of scores say of their pairs."""
    if arguments.pairs:
        return is_ordered(arguments.pairs, arguments.extra_pairs)
    path = Path(arguments.scores[0])
    return path.suffix == ".parquet" and path.is_file() and bool((read_metadata(path) or {}).get("ordered"))


def score_to_file(
    teachers: Teachers,
    pairs: datasets.Dataset,
    path: Path,
    inference: Inference,
    shard_rows: int,
    metadata: dict[str, Any],
) -> np.ndarray:
    """Score `pairs`, write `path` from the first process, and return the scores.

    Args:
        shard_rows: inputs after which what is done is kept on disk, for a run that is interrupted.
        metadata: what the scores depend on; it goes into the file.
    """
    accelerator = inference.accelerator
    shards = Shards(path, {**metadata, "read": content_checksum(pairs)}, shard_rows, accelerator)
    (mean,) = teachers.means([pairs], dataclasses.replace(inference, shards=shards))
    scores = mean.scores()
    if accelerator.is_main_process:
        record = {"world_size": accelerator.num_processes, "code": code_version()}
        record |= {"hub_datasets": HUB_COMMITS} if HUB_COMMITS else {}
        write_scores(path, pairs, scores, {**metadata, **record}, mean.disagreement())
    shards.remove()
    wait_long()
    return scores


def check_no_labels(scores_file: str, pairs: datasets.Dataset, dev: Task | None) -> None:
    """Refuse training scores that are the labels of the set on which the checkpoint is chosen.

    A pool may hold the pairs of a labelled set, as the paper's does; what it may not hold is their labels. They are
    recognised by their values: on at least `SHARED_PAIRS` common pairs, in either order, the scores are the labels on
    another scale. No teacher's scores are.

    Args:
        pairs: columns sentence1, sentence2 and score.
    """
    if dev is None:
        return
    labels = dict(zip(zip(*(dev.pairs[name] for name in PAIRS), strict=True), dev.pairs[dev.gold], strict=True))
    known = pa.array({sentence for pair in labels for sentence in pair}, pa.large_string())
    found = [pc.is_in(pairs.data.column(name).cast(pa.large_string()), known) for name in PAIRS]
    (rows,) = np.nonzero(np.asarray(pc.and_(*found)))
    common = pairs.select(rows)
    shared = []
    for first, second, score in zip(*(common[name] for name in (*PAIRS, "score")), strict=True):
        label = labels.get((first, second), labels.get((second, first)))
        if label is not None:
            shared.append((score, label))
    if len(shared) < SHARED_PAIRS or np.ptp(shared, axis=0).min() == 0:
        return
    if abs(np.corrcoef(np.transpose(shared))[0, 1]) > SAME_SCORES:
        raise InputError(
            f"--scores {scores_file}: on the {len(shared)} pairs that it shares with --dev ({dev.title}) its scores "
            f"are the {dev.gold}s themselves; train on an encoder's scores (score_pairs.py), which reads no label"
        )
