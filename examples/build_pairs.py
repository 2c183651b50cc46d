"""Build the example sentence and pair files from support_questions.tsv.

Run:

    python3 examples/build_pairs.py            # or: --seed 7

Writes next to this script: sentences.txt, and for measuring pairs.dev.tsv and pairs.test.tsv
(label 1 = same intent, 0 = different intent). The same seed gives the same files. Only the
standard library is used.
"""

import argparse
import csv
import itertools
import random
from collections import namedtuple
from pathlib import Path

HERE = Path(__file__).resolve().parent
COLUMNS = ["intent", "family", "split", "question"]
SPLITS = ("train", "dev", "test")
EVAL_PAIRS = {"dev": 900, "test": 1800}
POSITIVE_SHARE = 0.40
FAMILY_SHARE = 0.35  # of the negatives in dev and test: same family, different intent

Row = namedtuple("Row", COLUMNS)


def read_questions(path):
    """Read and check the questions; raise ValueError at the first broken rule."""
    with open(path, encoding="utf-8", newline="") as handle:
        reader = csv.reader(handle, delimiter="\t", quoting=csv.QUOTE_NONE)
        if next(reader) != COLUMNS:
            raise ValueError(f"{path}: the header must be {COLUMNS}")
        rows = []
        for number, cells in enumerate(reader, start=2):
            if len(cells) != len(COLUMNS):
                raise ValueError(f"{path}:{number}: {len(cells)} columns, not {len(COLUMNS)}")
            rows.append(Row(*cells))
    seen, family_of, split_of = set(), {}, {}
    for number, row in enumerate(rows, start=2):
        where = f"{path}:{number}"
        key = row.question.strip().lower()
        if not key:
            raise ValueError(f"{where}: empty question")
        if '"' in row.question or row.question != row.question.strip():
            raise ValueError(f"{where}: double quote or outer space in the question")
        if key in seen:
            raise ValueError(f"{where}: this question is there twice")
        if row.split not in SPLITS:
            raise ValueError(f"{where}: unknown split {row.split!r}")
        if family_of.setdefault(row.intent, row.family) != row.family:
            raise ValueError(f"{where}: intent {row.intent} is in two families")
        if split_of.setdefault(row.family, row.split) != row.split:
            raise ValueError(f"{where}: family {row.family} is in two splits")
        seen.add(key)
    return rows


def group_pairs(rows):
    """Sort all pairs of rows into (same intent, same family only, different family)."""
    same, near, far = [], [], []
    for a, b in itertools.combinations(rows, 2):
        group = same if a.intent == b.intent else near if a.family == b.family else far
        group.append((a.question, b.question))
    return same, near, far


def sample(rng, pairs, count):
    """Draw `count` pairs and put each in a random order."""
    if len(pairs) < count:
        raise ValueError(f"{count} pairs wanted, only {len(pairs)} there")
    return [pair if rng.random() < 0.5 else pair[::-1] for pair in rng.sample(pairs, count)]


def eval_pairs(rng, rows, count):
    """Draw labelled pairs from the questions of one split."""
    same, near, far = group_pairs(rows)
    n_same = round(count * POSITIVE_SHARE)
    n_near = round((count - n_same) * FAMILY_SHARE)
    labelled = [(a, b, 1) for a, b in sample(rng, same, n_same)]
    labelled += [(a, b, 0) for a, b in sample(rng, near, n_near)]
    labelled += [(a, b, 0) for a, b in sample(rng, far, count - n_same - n_near)]
    rng.shuffle(labelled)
    return labelled


def write_tsv(path, header, rows):
    with open(path, "w", encoding="utf-8", newline="") as handle:
        # QUOTE_NONE: the writer stops with an error if a question would need quoting.
        writer = csv.writer(handle, delimiter="\t", quoting=csv.QUOTE_NONE, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def main():
    parser = argparse.ArgumentParser(description="Build the example sentence and pair files.")
    parser.add_argument("--seed", type=int, default=7, help="random seed (default: 7)")
    rng = random.Random(parser.parse_args().seed)

    rows = read_questions(HERE / "support_questions.tsv")
    sentences = [row.question for row in rows]
    rng.shuffle(sentences)
    (HERE / "sentences.txt").write_bytes(("\n".join(sentences) + "\n").encode("utf-8"))

    counts = {}
    for split, count in EVAL_PAIRS.items():
        labelled = eval_pairs(rng, [row for row in rows if row.split == split], count)
        write_tsv(HERE / f"pairs.{split}.tsv", ["sentence1", "sentence2", "label"], labelled)
        counts[split] = (len(labelled), sum(label for _, _, label in labelled))

    print(
        f"{len({row.intent for row in rows})} intents, {len({row.family for row in rows})} families, "
        f"{len(rows)} questions; pairs: "
        + ", ".join(f"{split} {total} ({same} same)" for split, (total, same) in counts.items())
    )


if __name__ == "__main__":
    main()
