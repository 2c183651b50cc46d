"""Encoders and pairs -> scores, sharded over processes; a bi-encoder sees each sentence once."""

import json
import os
import tempfile
from collections.abc import Iterator
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
from transencoder.errors import InputError
from transencoder.files import difference
from transencoder.lexical import lexical_scores
from transencoder.runtime import progress_bar
from transencoder.tables import PAIRS, SENTENCES, read_pairs

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
    accelerator: Accelerator,
    batch_tokens: int,
    title: str,
) -> torch.Tensor:
    """The model's output for every row, on every process: float32 [rows] or [rows, d].

    Every process runs the same number of forward passes (a short process repeats its last batch and drops the result),
    as sharded models need; the parts are put together by a sum over processes, each row being filled by one of them.
    """
    batches = list(token_batches(tokens.lengths, batch_tokens))
    rounds = -(-len(batches) // accelerator.num_processes)
    filled: torch.Tensor | None = None
    bar = progress_bar(accelerator, rounds, title)
    for round_ in range(rounds):
        mine = round_ * accelerator.num_processes + accelerator.process_index
        rows = batches[min(mine, len(batches) - 1)]
        inputs = {name: value.to(accelerator.device) for name, value in pad(tokens, rows, encoder.tokenizer).items()}
        with autocast(accelerator):
            outputs = model(**inputs)
        if filled is None:
            filled = torch.zeros((len(tokens), *outputs.shape[1:]), dtype=torch.float32, device=outputs.device)
        if mine < len(batches):
            filled[torch.from_numpy(rows).to(filled.device)] = outputs
        bar.update()
    bar.close()
    return accelerator.reduce(filled, "sum") if accelerator.num_processes > 1 else filled


def score_prepared(
    model: nn.Module, prepared: PreparedPairs, accelerator: Accelerator, batch_tokens: int, title: str = "Scoring"
) -> np.ndarray:
    """Scores of prepared pairs.

    Args:
        model: a bi- or cross-encoder, as it is or as `accelerator.prepare` returned it.
        batch_tokens: tokens, padding included, in one forward pass.
    Returns:
        float32 [pairs], the same on every process: cosines in [-1, 1], or sigmoids of the logits, taken in float32
        because half precision ties the scores near 0 and 1.
    """
    encoder = accelerator.unwrap_model(model)
    training = model.training
    model.eval()
    outputs = run_sharded(model, encoder, prepared.tokens, accelerator, batch_tokens, title)
    model.train(training)
    if encoder.kind == "cross":
        return outputs.sigmoid().cpu().numpy()
    embeddings = torch.nn.functional.normalize(outputs, dim=-1)
    first, second = torch.from_numpy(prepared.first), torch.from_numpy(prepared.second)
    cosines = [
        (embeddings[first[rows]] * embeddings[second[rows]]).sum(-1).cpu()
        for rows in torch.arange(prepared.size).split(COSINE_ROWS)
    ]
    return torch.cat(cosines).numpy()


def score_with(
    names: list[str],
    sets: list[datasets.Dataset],
    accelerator: Accelerator,
    batch_tokens: int,
    pooling: str | None = None,
    both_orders: bool = False,
    weights: list[float] | None = None,
) -> list[np.ndarray]:
    """Mean scores of several encoders, loaded one after another. This mean is all there is to mutual distillation.

    Args:
        names: folders or Hub ids of bi- and cross-encoders.
        sets: sets of pairs.
        both_orders: a cross-encoder's score is the mean of those of (a, b) and (b, a).
        weights: of the encoders in the mean, in any unit; equal by default.
    Returns:
        For each set, float32 [pairs].
    """
    totals = [np.zeros(len(pairs)) for pairs in sets]
    shares = np.ones(len(names)) if weights is None else np.asarray(weights)
    for name, share in zip(names, shares / shares.sum(), strict=True):
        encoder = load_encoder(name, pooling).to(accelerator.device)
        for total, pairs in zip(totals, sets, strict=True):
            orders = [pairs, turned(pairs)] if both_orders and encoder.kind == "cross" else [pairs]
            for order in orders:
                prepared = PreparedPairs(encoder, order)
                title = f"Scoring with {Path(name).name}"
                total += share / len(orders) * score_prepared(encoder, prepared, accelerator, batch_tokens, title)
    return [total.astype(np.float32) for total in totals]


def write_scores(path: Path, pairs: datasets.Dataset, scores: np.ndarray, facts: dict[str, Any]) -> None:
    """Write sentence1, sentence2 and score (float32) as Parquet, atomically; `facts` go into the file's metadata."""
    names = [*PAIRS, "score"]
    table = pa.table(
        [pa.chunked_array(in_order(pairs).data.column(name).chunks) for name in PAIRS] + [scores], names=names
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        pq.write_table(table.replace_schema_metadata({FACTS: json.dumps(facts)}), temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_facts(path: Path) -> dict[str, Any] | None:
    """What `write_scores` was told about the scores; None for another tool's file."""
    return json.loads((pq.read_schema(path).metadata or {}).get(FACTS, b"null"))


def check_output(path: Path) -> None:
    """Raise `InputError` if `path` cannot become a Parquet file, before there is anything to lose."""
    if path.suffix != ".parquet" or path.is_dir():
        raise InputError(f"--output {path}: must be the name of a .parquet file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(f"--output {path}: cannot be written: {error.strerror}") from error


def scores_are_there(path: Path, facts: dict[str, Any]) -> bool:
    """Whether `path` already holds the scores that `facts` describe.

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
    found.pop("world_size", None)  # for the record: the scores do not depend on it
    changed = difference(found, json.loads(json.dumps(facts)))
    if changed:
        raise InputError(f"--output {path}: holds other scores ({changed}); choose another name or add --overwrite")
    return True


def read_label_pairs(arguments: LabelArguments) -> datasets.Dataset:
    """A student's training pairs, checked: with the column `score` from --scores, or without it from --pairs.

    Raises:
        InputError: also for a score outside [-1, 1]: neither a cosine nor a probability.
    """
    if not arguments.scores:
        check_encoders(arguments.teachers, None)
        return read_pairs(arguments.pairs, columns=arguments.columns, drop_duplicates=True)
    pairs = read_pairs([arguments.scores], "score", arguments.columns)
    scores = np.asarray(pairs["score"])
    (outside,) = np.nonzero(np.abs(scores) > 1 + 1e-5)
    if len(outside):
        row = outside[0]
        raise InputError(f"{arguments.scores}: row {row + 1}: score {scores[row]} is not in [-1, 1]")
    return pairs


def pseudo_labels(arguments: LabelArguments, pairs: datasets.Dataset, accelerator: Accelerator) -> datasets.Dataset:
    """`pairs` with the column `score`, which --teachers give them first where there is none.

    Teachers' scores are kept as teacher-scores.parquet in the output folder; the teachers are gone at the return.
    """
    if arguments.scores:
        return pairs
    path = Path(arguments.output_dir) / "teacher-scores.parquet"
    score_to_file(
        arguments.teachers, pairs, path, accelerator, arguments.eval_batch_tokens, weights=arguments.teacher_weights
    )
    return read_pairs([str(path)], "score")


def score_to_file(
    names: list[str],
    pairs: datasets.Dataset,
    path: Path,
    accelerator: Accelerator,
    batch_tokens: int,
    pooling: str | None = None,
    both_orders: bool = False,
    lexical_weight: float = 0.0,
    facts: dict[str, Any] | None = None,
    weights: list[float] | None = None,
) -> np.ndarray:
    """Score `pairs` with the mean of the encoders, write `path` from the first process, and return the scores.

    Args:
        lexical_weight: share of `lexical_scores` in the score.
        weights: of the encoders in their mean; equal by default.
    """
    (scores,) = score_with(names, [pairs], accelerator, batch_tokens, pooling, both_orders, weights)
    if lexical_weight:
        scores = (1 - lexical_weight) * scores + lexical_weight * lexical_scores(pairs)
    if accelerator.is_main_process:
        write_scores(path, pairs, scores, {**(facts or {"encoders": names}), "world_size": accelerator.num_processes})
    accelerator.wait_for_everyone()
    return scores
