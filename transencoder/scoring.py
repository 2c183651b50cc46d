"""Encoders and pairs -> scores, sharded over processes; a bi-encoder sees each sentence once."""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from torch import nn

from transencoder.arguments import LabelArguments
from transencoder.data import tokenize, turned, unique_sentences
from transencoder.embeddings import unit, write_vectors
from transencoder.encoders import BiEncoder, CrossEncoder, load_encoder
from transencoder.errors import InputError, storage_error
from transencoder.files import code_version, difference, identity, write_file
from transencoder.hub_tables import COMMITS
from transencoder.inference import each_part, run_sharded
from transencoder.lexical import lexical_scores
from transencoder.model_names import check_encoders
from transencoder.parts import Parts, remove_parts
from transencoder.pools import is_ordered, read_pool
from transencoder.soundness import check_no_labels, check_scores
from transencoder.tables import MAPPED_BYTES, PAIRS, RANDOM_ROWS, SENTENCES, blocks, numbers, read_pairs, release_pages
from transencoder.tasks import Task

COSINE_ROWS = RANDOM_ROWS // 2  # pairs whose embeddings are gathered at a time
FACTS = b"transencoder"  # key of the Parquet metadata that says where scores come from


class PreparedPairs:
    """Pairs tokenised for one encoder, so that scoring them again (dev evaluation) costs forward passes only.

    Args:
        pairs: columns sentence1 and sentence2.
    """

    def __init__(self, encoder: BiEncoder | CrossEncoder, pairs: datasets.Dataset):
        self.size = len(pairs)
        if encoder.kind == "bi":
            sentences, (self.first, self.second) = unique_sentences(pairs)
            self.tokens = tokenize(sentences, SENTENCES, encoder.tokenizer, encoder.max_length)
        else:
            self.tokens = tokenize(pairs, PAIRS, encoder.tokenizer, encoder.max_length)


def score_prepared(
    model: nn.Module,
    prepared: PreparedPairs,
    accelerator: Accelerator,
    batch_tokens: int | None,
    title: str = "Scoring",
) -> np.ndarray:
    """Scores of prepared pairs.

    Args:
        model: a bi- or cross-encoder, as it is or as `accelerator.prepare` returned it.
        batch_tokens: tokens, padding included, in one forward pass; None chooses what suits the hardware.
    Returns:
        float32 [pairs], the same on every process; see `as_scores`.
    """
    encoder = accelerator.unwrap_model(model)
    training = model.training
    model.eval()
    rows = np.arange(len(prepared.tokens))
    outputs = run_sharded(model, encoder, prepared.tokens, rows, accelerator, batch_tokens, title)
    model.train(training)
    return as_scores(encoder, prepared, outputs)


def as_scores(encoder: BiEncoder | CrossEncoder, prepared: PreparedPairs, outputs: torch.Tensor) -> np.ndarray:
    """Scores from what the encoder made of the prepared rows.

    Args:
        outputs: float32 [sentences, d], embeddings, or [pairs], logits.
    Returns:
        float32 [pairs]: cosines in [-1, 1], or sigmoids of the logits, taken in float32 because half precision ties
        the scores near 0 and 1.
    """
    if encoder.kind == "cross":
        return outputs.sigmoid().cpu().numpy()
    return cosines(unit(outputs.cpu().numpy()), prepared.first, prepared.second)


def cosines(vectors: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosine of each pair of vectors, block by block.

    Args:
        vectors: float32 [sentences, d], of unit length; may be memory-mapped.
        first, second: int [pairs], rows of `vectors`.
    Returns:
        float32 [pairs].
    """
    found = np.empty(len(first), dtype=np.float32)
    for start in range(0, len(found), COSINE_ROWS):
        rows = slice(start, start + COSINE_ROWS)
        if vectors.nbytes > MAPPED_BYTES:  # looking for pages to give back takes as long as many cosines
            release_pages()
        found[rows] = (vectors[first[rows]] * vectors[second[rows]]).sum(axis=1)
    return found


def score_in_parts(
    encoder: BiEncoder | CrossEncoder,
    pairs: datasets.Dataset,
    accelerator: Accelerator,
    batch_tokens: int | None,
    parts: Parts,
    label: str,
    title: str,
) -> np.ndarray:
    """As `score_prepared`, for any number of pairs: in memory is a number for each, all else lies on disk.

    Args:
        parts: where what is done is kept, under the name `label`, and a bi-encoder's embeddings.
    """
    if encoder.kind == "bi":
        sentences, places = unique_sentences(pairs)
        path = parts.folder / f"{label}.vec"
        widths = [encoder.backbone.config.hidden_size]
        vectors = write_vectors([encoder], widths, sentences, path, accelerator, batch_tokens, parts, [title])
        scores = cosines(vectors, *places)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            path.unlink()
        return scores
    tokens = tokenize(pairs, PAIRS, encoder.tokenizer, encoder.max_length)
    scores, row = np.empty(len(pairs), dtype=np.float32), 0
    for part in each_part(encoder, tokens, accelerator, batch_tokens, title, parts, label):
        scores[row : row + len(part)] = torch.from_numpy(part).sigmoid()
        row += len(part)
    return scores


@dataclass
class Teachers:
    """Encoders whose mean score is taken. This mean is all there is to mutual distillation.

    Args:
        names: folders or Hub ids of bi- and cross-encoders.
        weights: of the encoders in the mean, in any unit; equal by default.
        pooling: of those that are plain language models.
        both_orders: a cross-encoder's score is the mean of those of (a, b) and (b, a).
        lexical_weight: share of `lexical_scores` in the score.
    """

    names: list[str]
    weights: list[float] | None = None
    pooling: str | None = None
    both_orders: bool = False
    lexical_weight: float = 0.0

    def shares(self) -> np.ndarray:
        """The weights as parts of one."""
        weights = np.ones(len(self.names)) if self.weights is None else np.asarray(self.weights)
        return weights / weights.sum()


def score_with(
    teachers: Teachers,
    sets: list[datasets.Dataset],
    accelerator: Accelerator,
    batch_tokens: int | None,
    parts: Parts | None = None,
) -> list[np.ndarray]:
    """Mean scores of the encoders, which are loaded one after another.

    Args:
        sets: sets of pairs.
        parts: where what is done is kept, for a single set.
    Returns:
        For each set, float32 [pairs].
    """
    totals = [np.zeros(len(pairs)) for pairs in sets]
    for number, (name, share) in enumerate(zip(teachers.names, teachers.shares(), strict=True)):
        encoder = load_encoder(name, teachers.pooling).to(accelerator.device).eval()
        title = f"Scoring with {Path(name).name}"
        for total, pairs in zip(totals, sets, strict=True):
            orders = [pairs, turned(pairs)] if teachers.both_orders and encoder.kind == "cross" else [pairs]
            for turn, order in enumerate(orders):
                if parts is None:
                    scores = score_prepared(encoder, PreparedPairs(encoder, order), accelerator, batch_tokens, title)
                else:
                    label = f"encoder-{number}-{turn}"
                    scores = score_in_parts(encoder, order, accelerator, batch_tokens, parts, label, title)
                check_scores(name, scores)
                total += share / len(orders) * scores
    weight = teachers.lexical_weight
    if weight:
        totals = [(1 - weight) * total + weight * lexical_scores(p) for total, p in zip(totals, sets, strict=True)]
    return [total.astype(np.float32) for total in totals]


def write_scores(path: Path, pairs: datasets.Dataset, scores: np.ndarray, facts: dict[str, Any]) -> None:
    """Write sentence1, sentence2 and score (float32) as Parquet, atomically; `facts` go into the file's metadata."""

    def tables() -> Iterator[pa.Table]:
        for start, block in blocks(pairs):
            columns = [block[name] for name in PAIRS]
            yield pa.table([*columns, scores[start : start + len(block)]], names=[*PAIRS, "score"])

    write_tables(path, tables(), facts)


def write_tables(path: Path, tables: Iterator[pa.Table], facts: dict[str, Any]) -> int:
    """Write tables of one schema as the row groups of a Parquet file, atomically; returns how many rows there are."""
    first = next(tables)
    schema, rows = first.schema.with_metadata({FACTS: json.dumps(facts)}), len(first)

    def write(stream: BinaryIO) -> None:
        nonlocal rows
        with pq.ParquetWriter(stream, schema) as writer:
            writer.write_table(first.replace_schema_metadata(schema.metadata))
            for table in tables:
                writer.write_table(table.replace_schema_metadata(schema.metadata))
                rows += len(table)

    write_file(path, write)
    return rows


def read_facts(path: Path) -> dict[str, Any] | None:
    """What `write_scores` was told about the scores; None for another tool's file."""
    metadata = pq.read_schema(path).metadata or {}
    try:
        facts = json.loads(metadata.get(FACTS, b"null"))
    except (ValueError, RecursionError):
        return None
    return facts if isinstance(facts, dict) else None


def check_output(path: Path) -> None:
    """Raise `InputError` if `path` cannot become a Parquet file, before there is anything to lose."""
    if path.suffix != ".parquet" or path.is_dir():
        raise InputError(f"--output {path}: must be the name of a .parquet file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        where = f"--output {path}"
        raise storage_error(error, where) or InputError(f"{where}: cannot be written: {error.strerror}") from error


def scores_are_there(path: Path, facts: dict[str, Any], what: str = "scores") -> bool:
    """Whether `path` already holds the scores, or what else there is, that `facts` describe.

    Raises:
        InputError: it holds something else, or nothing can be written there.
    """
    check_output(path)
    if not path.exists():
        return False
    try:
        found = read_facts(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"--output {path}: exists and is not a Parquet file; add --overwrite") from error
    if found is None:
        raise InputError(f"--output {path}: exists and was not written by this tool; add --overwrite")
    for name in ("world_size", "hub_datasets", "code"):  # for the record
        found.pop(name, None)
    changed = difference(found, json.loads(json.dumps(facts)))
    if changed:
        raise InputError(f"--output {path}: holds other {what} ({changed}); choose another name or add --overwrite")
    remove_parts(path)  # a kill may have come in between
    return True


def read_label_pairs(arguments: LabelArguments, dev: Task | None = None) -> datasets.Dataset:
    """A student's training pairs, checked: with the column `score` from --scores, or without it from --pairs.

    Raises:
        InputError: also for a score outside [-1, 1], neither a cosine nor a probability, and for the labels of `dev`.
    """
    if not arguments.scores:
        check_encoders(arguments.teachers, None)
        return read_pool(arguments, drop_duplicates=True)
    pairs = read_pairs([arguments.scores], "score", arguments.columns)
    scores = numbers(pairs, "score")
    (outside,) = np.nonzero(np.abs(scores) > 1 + 1e-5)
    if len(outside):
        row = outside[0]
        raise InputError(f"{arguments.scores}: row {row + 1}: score {scores[row]} is not in [-1, 1]")
    check_no_labels(arguments.scores, pairs, dev)
    return pairs


def order_matters(arguments: LabelArguments) -> bool:
    """Whether a student's training pairs must not be turned round, which files of scores say of their pairs."""
    if arguments.pairs:
        return is_ordered(arguments.pairs, arguments.extra_pairs)
    path = Path(arguments.scores)
    return path.suffix == ".parquet" and path.is_file() and bool((read_facts(path) or {}).get("ordered"))


def pseudo_labels(arguments: LabelArguments, pairs: datasets.Dataset, accelerator: Accelerator) -> datasets.Dataset:
    """`pairs` with the column `score`, which --teachers give them first where there is none.

    Teachers' scores are kept as teacher-scores.parquet in the output folder; the teachers are gone at the return.
    """
    if arguments.scores:
        return pairs
    path, facts = Path(arguments.output_dir) / "teacher-scores.parquet", identity(arguments)
    if arguments.overwrite or not scores_are_there(path, facts):
        teachers = Teachers(arguments.teachers, arguments.teacher_weights)
        score_to_file(teachers, pairs, path, accelerator, arguments.eval_batch_tokens, arguments.shard_rows, facts)
    return read_pairs([str(path)], "score")


def score_to_file(
    teachers: Teachers,
    pairs: datasets.Dataset,
    path: Path,
    accelerator: Accelerator,
    batch_tokens: int | None,
    shard_rows: int,
    facts: dict[str, Any],
) -> np.ndarray:
    """Score `pairs`, write `path` from the first process, and return the scores.

    Args:
        shard_rows: inputs after which what is done is kept on disk, for a run that is interrupted.
        facts: what the scores depend on; they go into the file's metadata.
    """
    parts = Parts(path, facts, shard_rows, accelerator)
    (scores,) = score_with(teachers, [pairs], accelerator, batch_tokens, parts)
    if accelerator.is_main_process:
        record = {"world_size": accelerator.num_processes, "code": code_version()}
        record |= {"hub_datasets": COMMITS} if COMMITS else {}
        write_scores(path, pairs, scores, {**facts, **record})
    parts.remove()
    accelerator.wait_for_everyone()
    return scores
