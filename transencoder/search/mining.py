"""Candidate pairs from sentences: a mix of neighbours by words, neighbours by vectors, and random pairs.

Everything goes block by block. What grows with the number of sentences lies on disk, but for a few bytes for each pair
(the keys that find repeats) and for each sentence (where it lies in the files).
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from accelerate import Accelerator

from transencoder.config.arguments import MiningArguments
from transencoder.data.scores import check_place, write_tables
from transencoder.data.tables import PAIRS, SENTENCES, content_checksum
from transencoder.data.tokens import tokenize
from transencoder.embeddings import embed
from transencoder.errors import InputError
from transencoder.inference import Inference
from transencoder.model_checks import check_bi_encoder, check_encoders
from transencoder.model_files import model_options
from transencoder.runtime.accelerator import log, progress_bar
from transencoder.runtime.files import replacing
from transencoder.runtime.optional import load_optional
from transencoder.runtime.shards import Shards
from transencoder.runtime.waiting import wait_long
from transencoder.scoring import Teachers
from transencoder.search.mix import Sides, Source, parse_mix, wanted_pairs
from transencoder.search.neighbours import LexicalIndex, search_vectors, vector_index

OVERDRAW = 2.0  # a pair may be found from both of its ends, and by several sources
QUERIES = 8192  # sentences whose neighbours are looked for at a time
WRITTEN_ROWS = 65_536  # pairs of a Parquet row group
LEXICAL_ROWS = 100_000  # above it, a sentence's lexical neighbours are those in a random part of about this size
LIBRARY = {"lexical": "bm25s", "nearest": "faiss"}
BINS = np.linspace(-1.0, 1.0, 81)
SPREAD_BANDS = 10  # of the cosine from 0 to 1; the lowest has the pairs below 0, too


def draw(ranked: np.ndarray, source: Source, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw some neighbours of each sentence at random from the source's band of ranks.

    Args:
        ranked: int64 [rows, k], neighbours from rank 1 on; -1 where there are no more.
        counts: int64 [rows], how many to draw; where the band has fewer, all of them are taken.
    Returns:
        int64 [rows, most], -1 behind the last one drawn.
    """
    band = ranked[:, source.low - 1 : source.high]
    order = np.argsort(np.where(band < 0, 2.0, rng.random(band.shape)), axis=1)[:, : counts.max(initial=0)]
    drawn = np.take_along_axis(band, order, axis=1)
    return np.where(np.arange(drawn.shape[1]) < counts[:, None], drawn, -1)


def without_self(found: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Remove each sentence itself from its neighbours: `found`, int64 [rows, k], becomes int64 [rows, k - 1]."""
    own = found == rows[:, None]
    own[:, -1] |= ~own.any(axis=1)  # where it was not found, the last neighbour goes
    return found[~own].reshape(len(found), -1)


class Miner:
    """A search for pairs that keeps what it has found in shards, and so goes on after a crash.

    Args:
        vectors: of both sides, float32 [sentences, d], of unit length, memory-mapped.
    """

    def __init__(
        self,
        sides: Sides,
        vectors: tuple[np.ndarray, np.ndarray],
        sources: list[Source],
        wanted: list[int],
        seed: int,
        shards: Shards,
        accelerator: Accelerator,
    ):
        self.sides, self.vectors, self.sources, self.wanted = sides, vectors, sources, wanted
        self.seed, self.shards, self.accelerator = seed, shards, accelerator

    def mine(self) -> tuple[np.ndarray, np.ndarray]:
        """Find the pairs; returns their keys (int64, ascending) and the numbers of their sources (int8)."""
        for kind, search in (("lexical", self._lexical_blocks), ("nearest", self._nearest_blocks)):
            numbers = [number for number, source in enumerate(self.sources) if source.kind == kind]
            if numbers:
                search(numbers)
        keys, origins = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int8)
        for number, (source, wanted) in enumerate(zip(self.sources, self.wanted, strict=True)):
            found = self._random_keys(wanted) if source.kind == "random" else self._drawn_keys(number)
            found = np.setdiff1d(found, keys)
            if len(found) > wanted:
                found = np.sort(self._rng(number, "trim").choice(found, wanted, replace=False))
            short = f" of {wanted} that were asked for" if len(found) < wanted else ""
            log(f"{source.name}: {len(found)} pairs{short}")
            keys = np.concatenate([keys, found])
            order = np.argsort(keys, kind="stable")
            keys, origins = keys[order], np.append(origins, np.full(len(found), number, dtype=np.int8))[order]
        if len(keys) == 0:
            raise InputError("--mix: none of these sources has found a pair; add others")
        return keys, origins

    def _rng(self, number: int, step: str, block: int = 0) -> np.random.Generator:
        """Make a generator for one draw, so that none depends on what was done before a restart."""
        return np.random.default_rng((self.seed, number, *step.encode(), block))

    def _nearest_blocks(self, numbers: list[int]) -> None:
        """Draw from the neighbours by vectors, for all such sources at once."""
        index = vector_index(self.vectors[1], self.shards.folder, self.seed)
        blocks = [
            np.arange(at, min(at + QUERIES, len(self.sides.first))) for at in range(0, len(self.sides.first), QUERIES)
        ]
        self._draw_blocks(
            numbers, blocks, lambda rows, k: search_vectors(index, self.vectors[0][rows], k), "Nearest neighbours"
        )

    def _lexical_blocks(self, numbers: list[int]) -> None:
        """Draw from the neighbours by words, each sentence's in a random share of the other side."""
        first, second = self.sides.first, self.sides.second
        shares = -(-len(second) // LEXICAL_ROWS)
        there = np.array_split(self._rng(0, "deal").permutation(len(second)), shares)
        here = there if self.sides.single else np.array_split(self._rng(1, "deal").permutation(len(first)), shares)
        for share, (rows, others) in enumerate(zip(here, there, strict=True)):
            rows, others = np.sort(rows), np.sort(others)
            index = LexicalIndex(second[others]["sentence"])
            blocks = [rows[at : at + QUERIES] for at in range(0, len(rows), QUERIES)]

            def search(
                block: np.ndarray, k: int, index: LexicalIndex = index, others: np.ndarray = others
            ) -> np.ndarray:
                found = index.search(first[block]["sentence"], k)
                return np.where(found < 0, -1, others[found])

            title = f"Lexical neighbours ({share + 1} of {shares})" if shares > 1 else "Lexical neighbours"
            self._draw_blocks(numbers, blocks, search, title, share)

    def _draw_blocks(
        self,
        numbers: list[int],
        blocks: list[np.ndarray],
        search: Callable[[np.ndarray, int], np.ndarray],
        title: str,
        share: int = 0,
    ) -> None:
        """Look for the neighbours of every block's sentences, and keep what each source draws from them."""
        k = max(self.sources[number].high for number in numbers) + self.sides.single
        bar = progress_bar(self.accelerator, len(blocks), title)
        for place, rows in enumerate(blocks):
            bar.update()
            names = {number: f"drawn-{number}-{share}" for number in numbers}
            if all(self.shards.load(name, place, len(rows)) is not None for name in names.values()):
                continue
            counts = {
                number: self._counts(number, len(rows), share * len(self.sides.first) + place) for number in numbers
            }
            asked = np.flatnonzero(sum(counts.values()))
            ranked = np.full((len(rows), k - self.sides.single), -1, dtype=np.int64)
            if len(asked):
                found = search(rows[asked], k)
                ranked[asked] = without_self(found, rows[asked]) if self.sides.single else found
            for number, name in names.items():
                rng = self._rng(number, "draw", share * len(self.sides.first) + place)
                drawn = draw(ranked, self.sources[number], counts[number], rng)
                self.shards.save(name, place, np.column_stack([rows, drawn]))
        bar.close()

    def _counts(self, number: int, rows: int, block: int) -> np.ndarray:
        """Return how many neighbours of each sentence to draw: more than wanted, as some pairs are found twice."""
        each = OVERDRAW * self.wanted[number] / len(self.sides.first)
        return (math.floor(each) + (self._rng(number, "counts", block).random(rows) < each % 1)).astype(np.int64)

    def _drawn_keys(self, number: int) -> np.ndarray:
        """Return the distinct keys of what a source has drawn, ascending; int64 [pairs]."""
        found = []
        for block in self.shards.all_of(f"drawn-{number}-"):
            rows, neighbours = np.broadcast_arrays(block[:, :1], block[:, 1:])
            there = neighbours >= 0
            found.append(self.sides.keys(rows[there], neighbours[there]))
        return np.unique(np.concatenate(found))

    def _random_keys(self, wanted: int) -> np.ndarray:
        """Return the distinct keys of random pairs, ascending; int64 [pairs]."""
        most = len(self.sides.first) * len(self.sides.second)
        rng, size = self._rng(0, "random"), int(min(OVERDRAW * wanted, 8 * most)) + 16
        rows, others = rng.integers(len(self.sides.first), size=size), rng.integers(len(self.sides.second), size=size)
        apart = rows != others if self.sides.single else np.full(size, True)
        return np.unique(self.sides.keys(rows[apart], others[apart]))


def texts_of(sides: Sides, keys: np.ndarray, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Return both sentences of each pair; where there is one side, in random order."""
    rows, others = np.divmod(keys, len(sides.second))
    if sides.single:
        turn = rng.random(len(keys)) < 0.5
        rows, others = np.where(turn, others, rows), np.where(turn, rows, others)
    return sides.first[rows]["sentence"], sides.second[others]["sentence"]


def cosines(miner: Miner, keys: np.ndarray) -> np.ndarray:
    """Return the cosine of each pair: float32 [pairs]."""
    rows, others = np.divmod(keys, len(miner.sides.second))
    return np.einsum("nd,nd->n", miner.vectors[0][rows], miner.vectors[1][others]).astype(np.float32)


def spread_evenly(similarities: np.ndarray, wanted: int, rng: np.random.Generator) -> np.ndarray:
    """Choose pairs so that there are equally many of each similarity.

    A band that has too few gives all it has, and the others make up for it.

    Args:
        similarities: float32 [pairs], cosines, or other scores from 0 to 1.
        wanted: how many to keep.
    Returns:
        int64 [wanted], places in `similarities`, ascending; all, where there are no more than that.
    """
    bands = (similarities.clip(0, 1 - 1e-6) * SPREAD_BANDS).astype(int)
    members = [rng.permutation(np.flatnonzero(bands == band)) for band in range(SPREAD_BANDS)]
    kept, left = [], wanted
    for done, rows in enumerate(sorted(members, key=len)):
        kept.append(rows[: left // (SPREAD_BANDS - done)])
        left -= len(kept[-1])
    return np.sort(np.concatenate(kept))


def scores_by(
    encoder: str, arguments: MiningArguments, sides: Sides, keys: np.ndarray, inference: Inference
) -> np.ndarray:
    """Return an encoder's scores of the pairs, from 0 for the lowest to 1: float32 [pairs]. All processes score.

    The texts of the pairs are in memory meanwhile.
    """
    rows, others = np.divmod(keys, len(sides.second))
    texts = dict(zip(PAIRS, (sides.first[rows]["sentence"], sides.second[others]["sentence"]), strict=True))
    teacher = Teachers([encoder], options=model_options(arguments))
    (scores,) = teacher.score([datasets.Dataset.from_dict(texts)], inference)
    return (scores - scores.min()) / (np.ptp(scores) or 1.0)


def mined_blocks(miner: Miner, keys: np.ndarray, origins: np.ndarray, counts: np.ndarray) -> Iterator[pa.Table]:
    """Yield what was found, block by block: sentence1, sentence2, source, similarity.

    Args:
        keys, origins: as `Miner.mine` returns them.
        counts: int64 [sources, bins of `BINS`], to which the pairs' similarities are added.
    """
    sides = miner.sides
    names = pa.array([source.name for source in miner.sources])
    for block, start in enumerate(range(0, len(keys), WRITTEN_ROWS)):
        some, origin = keys[start : start + WRITTEN_ROWS], origins[start : start + WRITTEN_ROWS]
        texts = texts_of(sides, some, miner._rng(0, "turn", block))
        similarity = cosines(miner, some)
        for number, row in enumerate(counts):
            row += np.histogram(similarity[origin == number].clip(-1, 1), BINS)[0]
        different = np.asarray([one != other for one, other in zip(*texts, strict=True)])  # two sides may share one
        columns = [*texts, names.take(pa.array(origin)), similarity]
        yield pa.table(columns, names=[*PAIRS, "source", "similarity"]).filter(pa.array(different))


def check_mining(arguments: MiningArguments) -> None:
    """Raise `InputError` for encoders that cannot be loaded, and as `picture_of`."""
    picture_of(arguments)
    options = model_options(arguments)
    for name in arguments.encoders:
        check_bi_encoder(name, options)
    check_encoders([arguments.spread_by] if arguments.spread_by else [], options)


def picture_of(arguments: MiningArguments) -> Path:
    """Return where the picture goes; raise `InputError` if it cannot be written, or would replace another file."""
    picture = Path(arguments.histogram or Path(arguments.output).with_suffix(".png"))
    check_place(picture, "--histogram")
    if picture.exists() and not picture.read_bytes().startswith(b"\x89PNG"):
        raise InputError(f"--histogram {picture}: exists and is no PNG; choose another name")
    return picture


def mine_to_file(arguments: MiningArguments, sides: Sides, accelerator: Accelerator, metadata: dict) -> None:
    """Mine, and write the pairs and the picture from the first process; all processes encode.

    Raises:
        InputError: as `parse_mix`, `wanted_pairs`, `load_optional` and `picture_of`, or no pair was found.
    """
    output = Path(arguments.output)
    sources = parse_mix(arguments.mix)
    wanted = wanted_pairs(sources, arguments.num_pairs, sides)
    for kind in {source.kind for source in sources} - {"random"}:
        load_optional(LIBRARY[kind])  # now, not after all sentences are encoded
    load_optional("matplotlib.figure")
    looked_for = [arguments.spread * number for number in wanted]
    tables = [sides.first] if sides.single else [sides.first, sides.second]
    read = {"read": [content_checksum(table) for table in tables]}
    shards = Shards(output, {**metadata, **read}, arguments.shard_rows, accelerator)
    inference = Inference(accelerator, arguments.eval_batch_tokens, shards)
    encoders = [inference.load(name, model_options(arguments)) for name in arguments.encoders]
    vectors = [
        embed(
            [(encoder, [tokenize(table, SENTENCES, encoder.preprocessor(side))]) for encoder in encoders],
            shards.folder / f"vectors-{side}.vec",
            inference,
        )
        for side, table in enumerate(tables)
    ]
    miner = Miner(sides, (vectors[0], vectors[-1]), sources, looked_for, arguments.seed, shards, accelerator)
    keys, origins = miner.mine() if accelerator.is_main_process else (np.empty(0), np.empty(0))
    scores, found = None, shards.folder / "found.npy"
    if arguments.spread_by:
        if accelerator.is_main_process:
            np.save(found, keys)
        wait_long()
        scores = scores_by(arguments.spread_by, arguments, sides, np.load(found), inference)
    if not accelerator.is_main_process:
        return wait_long()
    if len(keys) > sum(wanted):
        blocks = range(0, len(keys), WRITTEN_ROWS)
        if scores is None:
            scores = np.concatenate([cosines(miner, keys[start : start + WRITTEN_ROWS]) for start in blocks])
        kept = spread_evenly(scores, sum(wanted), miner._rng(0, "spread"))
        over = f"the scores of {arguments.spread_by}" if arguments.spread_by else "the cosine"
        log(f"{len(kept)} of {len(keys)} pairs are kept, spread evenly over {over}")
        keys, origins = keys[kept], origins[kept]
    counts = np.zeros((len(sources), len(BINS) - 1), dtype=np.int64)

    def blocks_and_picture() -> Iterator[pa.Table]:
        yield from mined_blocks(miner, keys, origins, counts)
        # The pairs, whose appearance says that all is done, come last.
        plot_similarities(picture_of(arguments), sources, counts)

    rows = write_tables(output, blocks_and_picture(), metadata)
    shards.remove()
    log(f"{output}: {rows} pairs")
    wait_long()


def plot_similarities(path: Path, sources: list[Source], counts: np.ndarray) -> None:
    """Plot the histogram of each source's similarities as a PNG.

    Args:
        counts: int64 [sources, bins of `BINS`].
    """
    figure = load_optional("matplotlib.figure").Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for source, row in zip(sources, counts, strict=True):
        axis.stairs(row, BINS, label=f"{source.name} ({row.sum()})", linewidth=1.5)
    axis.set_xlabel("cosine of the bi-encoder")
    axis.set_ylabel("pairs")
    axis.set_xlim(max(-1.0, BINS[max(0, np.flatnonzero(counts.sum(0)).min() - 2)]), 1.0)
    axis.grid(alpha=0.3)
    axis.legend(title="source", fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
