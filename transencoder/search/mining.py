"""Candidate pairs from sentences: a mix of neighbours by words, neighbours by vectors, and random pairs.

Everything goes block by block. What grows with the number of sentences lies on disk, but for a few bytes for each pair
(the keys that find repeats) and for each sentence (where it lies in the files).
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from accelerate import Accelerator

from transencoder.config.arguments import DEFAULT_MIX, MiningArguments
from transencoder.data.tables import PAIRS
from transencoder.embeddings import embed
from transencoder.errors import InputError
from transencoder.labels import write_tables
from transencoder.runtime.accelerator import log, progress_bar
from transencoder.runtime.files import replacing
from transencoder.runtime.optional import load_optional
from transencoder.runtime.shards import Parts
from transencoder.runtime.waiting import wait_long
from transencoder.search.neighbours import LexicalIndex, search_vectors, vector_index

PAIRS_PER_SENTENCE = 4  # unless the number of pairs is given
BAND = (1, 10)  # of a source that names none
OVERDRAW = 2.0  # a pair may be found from both of its ends, and by several sources
QUERIES = 8192  # sentences whose neighbours are looked for at a time
WRITTEN_ROWS = 65_536  # pairs of a Parquet row group
LEXICAL_ROWS = 100_000  # above it, a sentence's lexical neighbours are those in a random part of about this size
SOURCE = re.compile(r"(lexical|nearest)(?::(\d+)-(\d+))?|random")
LIBRARY = {"lexical": "bm25s", "nearest": "faiss"}
BINS = np.linspace(-1.0, 1.0, 81)
SPREAD_BANDS = 10  # of the cosine from 0 to 1; the lowest has the pairs below 0, too


@dataclass(frozen=True)
class Source:
    """One source of pairs.

    Args:
        kind: "lexical", "nearest" or "random".
        low, high: ranks of the neighbours that are taken, from 1; both ends included.
        share: of the pairs, in any unit.
    """

    kind: str
    low: int
    high: int
    share: float

    @property
    def name(self) -> str:
        """As the mix calls it: nearest:4-20."""
        return self.kind if self.kind == "random" else f"{self.kind}:{self.low}-{self.high}"


@dataclass(frozen=True)
class Sides:
    """The sentences that are paired: with one another, or with those of a second side.

    Args:
        first, second: column sentence; the same table where there is one side.
    """

    first: datasets.Dataset
    second: datasets.Dataset

    @property
    def single(self) -> bool:
        """Whether there is one side only."""
        return self.first is self.second

    def keys(self, rows: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
        """A number for each pair, the same for both of its orders where there is one side: int64, as `rows`."""
        if self.single:
            rows, neighbours = np.minimum(rows, neighbours), np.maximum(rows, neighbours)
        return rows * len(self.second) + neighbours


def parse_mix(words: list[str] | None) -> list[Source]:
    """["nearest:1-3=2", "random=1"] -> two sources; None -> the default mix.

    Raises:
        InputError: an unknown source, a band that is none, a share that is not positive, a source that is there twice.
    """
    sources = []
    for word in words or DEFAULT_MIX:
        name, _, share = word.partition("=")
        match = SOURCE.fullmatch(name)
        try:
            amount = float(share)
        except ValueError:
            amount = math.nan
        if not match or not 0 < amount < math.inf:
            raise InputError(f"--mix {word}: must be SOURCE=SHARE: lexical=1 nearest:4-20=0.5 random=1 (see --help)")
        low, high = (int(match[2]), int(match[3])) if match[2] else BAND
        if not 1 <= low <= high:
            raise InputError(f"--mix {word}: the ranks must go from 1 or more upwards")
        sources.append(Source(match[1] or "random", low, high, amount))
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise InputError(f"--mix {' '.join(words)}: a source is there twice")
    return sources


def wanted_pairs(sources: list[Source], num_pairs: int | None, sides: Sides) -> list[int]:
    """How many pairs each source is to give: all together `num_pairs`, or a few for each sentence.

    Raises:
        InputError: a band of ranks that begins behind the last neighbour.
    """
    others = len(sides.second) - sides.single
    for source in sources:
        if source.kind != "random" and source.low > others:
            raise InputError(
                f"--mix {source.name}: there is no neighbour of rank {source.low} among {others} sentences"
            )
    total = num_pairs or PAIRS_PER_SENTENCE * len(sides.first)
    ends = np.rint(np.cumsum([source.share for source in sources]) / sum(s.share for s in sources) * total).astype(int)
    return np.diff(ends, prepend=0).tolist()


def draw(ranked: np.ndarray, source: Source, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Some neighbours of each sentence, at random from the source's band of ranks.

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
    """`found` (int64 [rows, k], neighbours) without the sentence itself, the others moved up: int64 [rows, k - 1]."""
    own = found == rows[:, None]
    own[:, -1] |= ~own.any(axis=1)  # where it was not found, the last neighbour goes
    return found[~own].reshape(len(found), -1)


class Miner:
    """Looks for pairs, and keeps what it has found in parts, so that it goes on after a crash.

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
        parts: Parts,
        accelerator: Accelerator,
    ):
        self.sides, self.vectors, self.sources, self.wanted = sides, vectors, sources, wanted
        self.seed, self.parts, self.accelerator = seed, parts, accelerator

    def mine(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys (int64, ascending) and source numbers (int8) of the pairs that were found."""
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
        """A generator of its own for each draw, so that none depends on what was done before a restart."""
        return np.random.default_rng((self.seed, number, *step.encode(), block))

    def _nearest_blocks(self, numbers: list[int]) -> None:
        """Draw from the neighbours by vectors, for all such sources at once."""
        index = vector_index(self.vectors[1], self.parts.folder, self.seed)
        blocks = [
            np.arange(at, min(at + QUERIES, len(self.sides.first))) for at in range(0, len(self.sides.first), QUERIES)
        ]
        self._draw_blocks(
            numbers, blocks, lambda rows, k: search_vectors(index, self.vectors[0][rows], k), "Nearest neighbours"
        )

    def _lexical_blocks(self, numbers: list[int]) -> None:
        """The same by words, each sentence within a random part of the other side."""
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
            if all(self.parts.load(name, place, len(rows)) is not None for name in names.values()):
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
                self.parts.save(name, place, np.column_stack([rows, drawn]))
        bar.close()

    def _counts(self, number: int, rows: int, block: int) -> np.ndarray:
        """How many neighbours of each sentence to draw: more than are wanted, as some pairs are found twice."""
        each = OVERDRAW * self.wanted[number] / len(self.sides.first)
        return (math.floor(each) + (self._rng(number, "counts", block).random(rows) < each % 1)).astype(np.int64)

    def _drawn_keys(self, number: int) -> np.ndarray:
        """Distinct keys of what a source has drawn, ascending; without pairs of a sentence with itself."""
        found = []
        for path in sorted(self.parts.folder.glob(f"drawn-{number}-*.npy")):
            block = np.load(path)
            rows, neighbours = np.broadcast_arrays(block[:, :1], block[:, 1:])
            there = neighbours >= 0
            found.append(self.sides.keys(rows[there], neighbours[there]))
        return np.unique(np.concatenate(found))

    def _random_keys(self, wanted: int) -> np.ndarray:
        """Distinct keys of pairs that are drawn at random, ascending."""
        rng, size = self._rng(0, "random"), int(OVERDRAW * wanted) + 16
        rows, others = rng.integers(len(self.sides.first), size=size), rng.integers(len(self.sides.second), size=size)
        apart = rows != others if self.sides.single else np.full(size, True)
        return np.unique(self.sides.keys(rows[apart], others[apart]))


def texts_of(sides: Sides, keys: np.ndarray, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Both sentences of each pair; where there is one side, in an order that is drawn."""
    rows, others = np.divmod(keys, len(sides.second))
    if sides.single:
        turn = rng.random(len(keys)) < 0.5
        rows, others = np.where(turn, others, rows), np.where(turn, rows, others)
    return sides.first[rows]["sentence"], sides.second[others]["sentence"]


def cosines(miner: Miner, keys: np.ndarray) -> np.ndarray:
    """The similarity of each pair: float32 [pairs]."""
    rows, others = np.divmod(keys, len(miner.sides.second))
    return np.einsum("nd,nd->n", miner.vectors[0][rows], miner.vectors[1][others]).astype(np.float32)


def spread_evenly(similarities: np.ndarray, wanted: int, rng: np.random.Generator) -> np.ndarray:
    """Which pairs to keep so that there are as many of each similarity.

    A band that has too few gives all it has, and the others make up for it.

    Args:
        similarities: float32 [pairs], cosines.
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


def mined_blocks(miner: Miner, wanted: int, counts: np.ndarray) -> Iterator[pa.Table]:
    """What was found, block by block: sentence1, sentence2, source, similarity.

    Args:
        wanted: how many pairs; where more were found, they are spread evenly.
        counts: int64 [sources, bins of `BINS`], to which the pairs' similarities are added.
    """
    sides = miner.sides
    keys, origins = miner.mine()
    if len(keys) > wanted:
        blocks = range(0, len(keys), WRITTEN_ROWS)
        similarities = np.concatenate([cosines(miner, keys[start : start + WRITTEN_ROWS]) for start in blocks])
        kept = spread_evenly(similarities, wanted, miner._rng(0, "spread"))
        log(f"{len(kept)} of {len(keys)} pairs are kept, spread evenly over the cosine")
        keys, origins = keys[kept], origins[kept]
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


def mine_to_file(arguments: MiningArguments, sides: Sides, accelerator: Accelerator, facts: dict) -> None:
    """Mine, and write the pairs and the picture from the first process; all processes encode.

    Raises:
        InputError: as `parse_mix`, `wanted_pairs` and `load_optional`, or no pair was found.
    """
    output = Path(arguments.output)
    sources = parse_mix(arguments.mix)
    wanted = wanted_pairs(sources, arguments.num_pairs, sides)
    for kind in {source.kind for source in sources} - {"random"}:
        load_optional(LIBRARY[kind])  # now, not after all sentences are encoded
    load_optional("matplotlib.figure")
    looked_for = [arguments.spread * number for number in wanted]
    parts = Parts(output, facts, arguments.shard_rows, accelerator)
    encoders, batch_tokens, pooling = arguments.encoders, arguments.eval_batch_tokens, arguments.pooling
    vectors = [
        embed(encoders, table, parts.folder / f"vectors-{place}.vec", accelerator, batch_tokens, parts, pooling)
        for place, table in enumerate([sides.first] if sides.single else [sides.first, sides.second])
    ]
    if not accelerator.is_main_process:
        return wait_long()
    miner = Miner(sides, (vectors[0], vectors[-1]), sources, looked_for, arguments.seed, parts, accelerator)
    counts = np.zeros((len(sources), len(BINS) - 1), dtype=np.int64)

    def blocks_and_picture() -> Iterator[pa.Table]:
        yield from mined_blocks(miner, sum(wanted), counts)
        # The pairs, whose appearance says that all is done, come last.
        plot_similarities(Path(arguments.histogram or output.with_suffix(".png")), sources, counts)

    rows = write_tables(output, blocks_and_picture(), facts)
    parts.remove()
    log(f"{output}: {rows} pairs")
    wait_long()


def plot_similarities(path: Path, sources: list[Source], counts: np.ndarray) -> None:
    """A PNG with the histogram of each source's similarities.

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
