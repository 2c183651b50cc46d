"""The figures of the paper's tables (Liu et al., ICLR 2022), to stand beside ours.

recipes/paper/figures.json holds them: Spearman x 100 for STS and SICK-R, AUC x 100 for QQP, QNLI and MRPC, and the
averages "sts_sickr" and "binary". A row is named SETTING/KIND, and a setting START/METHOD:
"simcse-bert-base/self/cross" is the cross-encoder of self-distillation that began with SimCSE-BERT-base. The starts
simcse-base and simcse-large are ensembles of the BERT and the RoBERTa student. KIND is bi or cross. METHOD is one of

    start           the start itself
    self, mutual    on STS and SICK pairs for the STS tasks, on the task's own pairs for QQP, QNLI and MRPC
    self-transfer, mutual-transfer    trained on STS and SICK pairs, measured on QQP, QNLI and MRPC
    self-seeds      the mean over five seeds
    sequential      students that keep their weights from cycle to cycle (carry_over)
    bi-only         plain self-distillation, without a cross-encoder
"""

import functools
import json
from pathlib import Path

import numpy as np

from transencoder.data.tasks import GROUPS
from transencoder.errors import InputError

FIGURES = Path(__file__).parents[2] / "recipes" / "paper" / "figures.json"


@functools.cache
def figures() -> dict[str, dict[str, float]]:
    """Load the paper's figures: row -> task or group -> figure, x 100."""
    return json.loads(FIGURES.read_text(encoding="utf-8"))


def published(task: str, row: str) -> float | None:
    """Return the paper's figure, x 100; None where it prints none.

    Args:
        task: a registered task, or "sts_sickr" or "binary" for the average that the paper prints of them.
        row: such as "simcse-bert-base/self/bi".
    """
    return figures().get(row, {}).get(task)


def published_values(row: str, tests: list[str]) -> list[float | None]:
    """Return the figures of a table's row: one for each of `tests`, then their mean.

    The mean of a whole group is the one that the paper prints.
    """
    values = [published(test, row) for test in tests]
    for group in ("sts_sickr", "binary"):
        if set(tests) == set(GROUPS[group]):
            return [*values, published(group, row)]
    known = [value for value in values if value is not None]
    return [*values, float(np.mean(known)) if known and len(known) == len(values) else None]


def row_of(setting: str, kind: str, at_start: bool = False) -> str:
    """Return the name of a row.

    Args:
        setting: such as "simcse-bert-base/self".
        kind: "bi" or "cross".
        at_start: the encoder that the setting begins with, in its place.
    """
    return f"{setting.partition('/')[0]}/start/bi" if at_start else f"{setting}/{kind}"


def check_setting(setting: str, where: str) -> None:
    """Raise `InputError` for a setting that the paper does not have. `where`: how the message names its place."""
    settings = sorted({row.rpartition("/")[0] for row in figures()})
    if setting not in settings:
        raise InputError(f"{where}: the paper has no {setting!r}; it has: {', '.join(settings)}")
