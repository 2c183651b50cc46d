"""Encoders and pairs -> scores, sharded over processes; a bi-encoder sees each sentence once."""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from torch import nn

from transencoder.arguments import LabelArguments
from transencoder.data import TokenRows, in_order, pad, tokenize, turned, unique_sentences
from transencoder.encoders import BiEncoder, CrossEncoder, check_encoders, load_encoder
from transencoder.engines import autocast
from transencoder.errors import InputError, storage_error
from transencoder.files import code_version, difference, identity, write_file
from transencoder.hub_tables import COMMITS
from transencoder.interruption import StopSignal, stop_here
from transencoder.lexical import lexical_scores
from transencoder.parts import Parts, remove_parts
from transencoder.pools import is_ordered, read_pool
from transencoder.runtime import progress_bar
from transencoder.soundness import check_no_labels, check_scores
from transencoder.tables import PAIRS, SENTENCES, read_pairs
from transencoder.tasks import Task

COSINE_ROWS = 65536  # pairs whose embeddings are gathered at a time
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


def token_batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Row indices, longest first, cut so that rows x longest row stays within `batch_tokens` (at least one row)."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // int(lengths[order[start]]))
        yield order[start : start + size]
        start += size


@torch.inference_mode()
def run_sharded(
    model: nn.Module,
    encoder: BiEncoder | CrossEncoder,
    tokens: TokenRows,
    rows: np.ndarray,
    accelerator: Accelerator,
    batch_tokens: int,
    title: str,
) -> torch.Tensor:
    """The model's output for `rows`, on every process: float32 [rows] or [rows, d].

    Every process runs the same number of forward passes (a short process repeats its last batch and drops the result),
    as sharded models need; the parts are put together by a sum over processes, each row being filled by one of them.
    """
    batches = list(token_batches(tokens.lengths[rows], batch_tokens))
    rounds = -(-len(batches) // accelerator.num_processes)
    filled: torch.Tensor | None = None
    bar = progress_bar(accelerator, rounds, title)
    for round_ in range(rounds):
        mine = round_ * accelerator.num_processes + accelerator.process_index
        batch = batches[min(mine, len(batches) - 1)]
        inputs = pad(tokens, rows[batch], encoder.tokenizer)
        with autocast(accelerator):
            outputs = model(**{name: value.to(accelerator.device) for name, value in inputs.items()})
        if filled is None:
            filled = torch.zeros((len(rows), *outputs.shape[1:]), dtype=torch.float32, device=outputs.device)
        if mine < len(batches):
            filled[torch.from_numpy(batch).to(filled.device)] = outputs
        bar.update()
    bar.close()
    return accelerator.reduce(filled, "sum") if accelerator.num_processes > 1 else filled


def each_part(
    model: nn.Module,
    tokens: TokenRows,
    accelerator: Accelerator,
    batch_tokens: int,
    title: str,
    parts: Parts,
    name: str,
) -> Iterator[np.ndarray]:
    """`run_sharded` for all rows, part by part: each is kept on disk when it is done, and never computed again.

    A signal to stop is obeyed at the end of a part.
    """
    starts = range(0, len(tokens), parts.rows)
    with StopSignal() as stop:
        for number, start in enumerate(starts):
            rows = np.arange(start, min(start + parts.rows, len(tokens)))
            part = parts.load(name, number, len(rows))
            if part is None:
                where = f"{title} ({number + 1} of {len(starts)})" if len(starts) > 1 else title
                part = run_sharded(model, model, tokens, rows, accelerator, batch_tokens, where).cpu().numpy()
                parts.save(name, number, part)
                if number + 1 < len(starts) and stop.on_any_process(accelerator):
                    stop_here(accelerator, stop, f"part {number + 1} of {len(starts)} ({title})")
            yield part


def score_prepared(
    model: nn.Module, prepared: PreparedPairs, accelerator: Accelerator, batch_tokens: int, title: str = "Scoring"
) -> np.ndarray:
    """Scores of prepared pairs.

    Args:
        model: a bi- or cross-encoder, as it is or as `accelerator.prepare` returned it.
        batch_tokens: tokens, padding included, in one forward pass.
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
    embeddings = torch.nn.functional.normalize(outputs, dim=-1)
    first, second = torch.from_numpy(prepared.first), torch.from_numpy(prepared.second)
    cosines = [
        (embeddings[first[rows]] * embeddings[second[rows]]).sum(-1).cpu()
        for rows in torch.arange(prepared.size).split(COSINE_ROWS)
    ]
    return torch.cat(cosines).numpy()


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
    batch_tokens: int,
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
                prepared = PreparedPairs(encoder, order)
                if parts is None:
                    scores = score_prepared(encoder, prepared, accelerator, batch_tokens, title)
                else:
                    label = f"encoder-{number}-{turn}"
                    done = each_part(encoder, prepared.tokens, accelerator, batch_tokens, title, parts, label)
                    scores = as_scores(encoder, prepared, torch.cat([torch.from_numpy(part) for part in done]))
                check_scores(name, scores)
                total += share / len(orders) * scores
    weight = teachers.lexical_weight
    if weight:
        totals = [(1 - weight) * total + weight * lexical_scores(p) for total, p in zip(totals, sets, strict=True)]
    return [total.astype(np.float32) for total in totals]


def write_scores(path: Path, pairs: datasets.Dataset, scores: np.ndarray, facts: dict[str, Any]) -> None:
    """Write sentence1, sentence2 and score (float32) as Parquet, atomically; `facts` go into the file's metadata."""
    names = [*PAIRS, "score"]
    table = pa.table(
        [pa.chunked_array(in_order(pairs).data.column(name).chunks) for name in PAIRS] + [scores], names=names
    )
    write_file(path, lambda stream: pq.write_table(table.replace_schema_metadata({FACTS: json.dumps(facts)}), stream))


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
    scores = np.asarray(pairs["score"])
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
    batch_tokens: int,
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
