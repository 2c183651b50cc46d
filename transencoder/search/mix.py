"""Which sentences are paired, and the sources that the pairs come from."""

import math
import re
from dataclasses import dataclass

import datasets
import numpy as np

from transencoder.config.arguments import DEFAULT_MIX
from transencoder.config.options import Reading
from transencoder.data.pools import read_sentence_pool
from transencoder.errors import InputError

PAIRS_PER_SENTENCE = 4  # unless the number of pairs is given
BAND = (1, 10)  # ranks of a source that names none
LAST_RANK = 10_000  # neighbours of a sentence that are held in memory, for thousands of sentences at a time
LARGEST_SHARE = 1e9  # the shares can be added up
SOURCE = re.compile(r"(lexical|nearest)(?::(\d+)-(\d+))?|random")


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
        """Return how the mix calls it: nearest:4-20."""
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
        """Tell whether there is one side only."""
        return self.first is self.second

    def keys(self, rows: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
        """Number each pair, both of its orders alike where there is one side: int64, as `rows`."""
        if self.single:
            rows, neighbours = np.minimum(rows, neighbours), np.maximum(rows, neighbours)
        return rows * len(self.second) + neighbours


def read_sides(sentences: list[str], sentences_b: list[str] | None, data_dir: str | None, reading: Reading) -> Sides:
    """Read the sentences of one side, or of two; sources as `read_sentence_pool` takes them."""
    first = read_sentence_pool(sentences, data_dir, reading)
    return Sides(first, read_sentence_pool(sentences_b, data_dir, reading) if sentences_b else first)


def parse_mix(words: list[str] | None) -> list[Source]:
    """Parse ["nearest:1-3=2", "random=1"] into two sources; None stands for the default mix.

    Raises:
        InputError: an unknown source, ranks that do not ascend, a share that is not positive, or a source given twice.
    """
    sources = []
    for word in words or DEFAULT_MIX:
        name, _, share = word.partition("=")
        match = SOURCE.fullmatch(name)
        try:
            amount = float(share)
        except ValueError:
            amount = math.nan
        if not match or not 0 < amount <= LARGEST_SHARE:
            raise InputError(f"--mix {word}: must be SOURCE=SHARE: lexical=1 nearest:4-20=0.5 random=1 (see --help)")
        low, high = (int(match[2]), int(match[3])) if match[2] else BAND
        if not 1 <= low <= high <= LAST_RANK:
            raise InputError(f"--mix {word}: the ranks must go upwards, from 1 or more to at most {LAST_RANK}")
        sources.append(Source(match[1] or "random", low, high, amount))
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise InputError(f"--mix {' '.join(words)}: a source is there twice")
    return sources


def wanted_pairs(sources: list[Source], num_pairs: int | None, sides: Sides) -> list[int]:
    """Share out `num_pairs`, or a few for each sentence, to the sources.

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
