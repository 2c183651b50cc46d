"""The figures of the paper's tables (Liu et al., ICLR 2022), to stand beside ours.

A row is named SETTING/KIND, and a setting START/METHOD: "simcse-bert-base/self/cross" is the cross-encoder of
self-distillation that began with SimCSE-BERT-base. KIND is bi or cross. METHOD is one of

    start           the start itself
    self, mutual    on STS and SICK pairs for the STS tasks, on the task's own pairs for QQP, QNLI and MRPC
    self-transfer, mutual-transfer    trained on STS and SICK pairs, measured on QQP, QNLI and MRPC
    self-seeds      the mean over five seeds
    sequential      students that keep their weights from cycle to cycle (carry_over)
    bi-only         plain self-distillation, without a cross-encoder
"""

import numpy as np

from transencoder.data.tasks import GROUPS
from transencoder.errors import InputError

STS, BINARY = "sts_sickr", "binary"

# Spearman x 100: STS12, 13, 14, 15, 16, STS-B, SICK-R, and their average.
STS_ROWS = {
    "simcse-bert-base/start/bi": (68.64, 82.39, 74.30, 80.69, 78.71, 76.54, 72.22, 76.21),
    "simcse-bert-base/self/bi": (72.17, 84.40, 76.69, 83.28, 80.91, 81.26, 71.84, 78.65),
    "simcse-bert-base/self/cross": (71.94, 84.14, 76.39, 82.87, 80.65, 81.06, 71.16, 78.32),
    "simcse-bert-base/mutual/bi": (75.09, 85.10, 77.90, 85.08, 83.05, 83.90, 72.76, 80.41),
    "simcse-bert-base/mutual/cross": (75.44, 85.59, 78.03, 84.44, 82.65, 83.61, 69.52, 79.90),
    "simcse-roberta-base/start/bi": (68.34, 80.96, 73.13, 80.86, 80.61, 80.20, 68.62, 76.10),
    "simcse-roberta-base/self/bi": (73.36, 82.47, 76.39, 83.96, 82.67, 82.05, 67.63, 78.36),
    "simcse-roberta-base/self/cross": (72.59, 83.24, 76.83, 84.20, 82.82, 82.85, 69.51, 78.86),
    "simcse-roberta-base/mutual/bi": (75.01, 85.22, 78.26, 85.16, 83.22, 83.88, 72.56, 80.47),
    "simcse-roberta-base/mutual/cross": (76.37, 85.87, 79.03, 85.77, 83.77, 84.65, 72.62, 81.15),
}

# The average alone, of the same seven sets.
STS_AVERAGES = {
    "simcse-bert-base/self-seeds/bi": 78.72,
    "simcse-bert-base/self-seeds/cross": 78.21,
    "simcse-bert-base/sequential/bi": 78.08,
    "simcse-bert-base/sequential/cross": 77.92,
    "simcse-bert-base/bi-only/bi": 77.16,
    "simcse-bert-large/start/bi": 78.42,
    "simcse-bert-large/self/bi": 79.68,
    "simcse-bert-large/self/cross": 79.85,
    "simcse-bert-large/mutual/bi": 82.65,
    "simcse-bert-large/mutual/cross": 82.52,
    "simcse-roberta-large/start/bi": 78.92,
    "simcse-roberta-large/self/bi": 81.40,
    "simcse-roberta-large/self/cross": 80.90,
    "simcse-roberta-large/mutual/bi": 82.93,
    "simcse-roberta-large/mutual/cross": 82.93,
    # Ensembles of the BERT and the RoBERTa student.
    "simcse-base/mutual/bi": 80.67,
    "simcse-base/mutual/cross": 81.09,
    "simcse-large/mutual/bi": 83.01,
    "simcse-large/mutual/cross": 83.07,
    "mirror-roberta-base/start/bi": 75.08,
    "mirror-roberta-base/self/bi": 77.64,
    "mirror-roberta-base/self/cross": 78.09,
    "mirror-roberta-base-drophead/start/bi": 76.72,
    "mirror-roberta-base-drophead/self/bi": 80.26,
    "mirror-roberta-base-drophead/self/cross": 80.87,
    "contrastive-tension/start/bi": 72.04,
    "contrastive-tension/self/bi": 74.68,
    "contrastive-tension/self/cross": 74.93,
    "declutr/start/bi": 66.66,
    "declutr/self/bi": 74.57,
    "declutr/self/cross": 74.01,
}

# AUC x 100: QQP, QNLI, MRPC, and their average.
BINARY_ROWS = {
    "simcse-bert-base/start/bi": (80.38, 71.38, 75.02, 75.59),
    "simcse-bert-base/self/bi": (82.10, 75.30, 75.71, 77.70),
    "simcse-bert-base/self/cross": (82.10, 75.61, 76.21, 77.97),
    "simcse-bert-base/mutual/bi": (84.00, 76.93, 76.62, 79.18),
    "simcse-bert-base/mutual/cross": (84.29, 77.11, 77.77, 79.72),
    "simcse-bert-base/self-transfer/bi": (80.80, 72.35, 74.53, 75.89),
    "simcse-bert-base/self-transfer/cross": (80.84, 78.81, 79.42, 79.69),
    "simcse-bert-base/mutual-transfer/bi": (83.24, 72.88, 75.86, 77.33),
    "simcse-bert-base/mutual-transfer/cross": (82.40, 78.30, 78.72, 79.81),
}

SETTINGS = {row.rpartition("/")[0] for row in (*STS_ROWS, *STS_AVERAGES, *BINARY_ROWS)}


def published(task: str, row: str) -> float | None:
    """The paper's figure, x 100; None where it prints none.

    Args:
        task: a registered task, or "sts_sickr" or "binary" for the average that the paper prints of them.
        row: such as "simcse-bert-base/self/bi".
    """
    for group, rows in ((STS, STS_ROWS), (BINARY, BINARY_ROWS)):
        if row in rows and task in (*GROUPS[group], group):
            return rows[row][(*GROUPS[group], group).index(task)]
    return STS_AVERAGES.get(row) if task == STS else None


def published_values(row: str, tests: list[str]) -> list[float | None]:
    """The figures of a table's row: for each of `tests`, and then their mean, which the paper has for whole groups."""
    values = [published(test, row) for test in tests]
    for group in (STS, BINARY):
        if set(tests) == set(GROUPS[group]):
            return [*values, published(group, row)]
    known = [value for value in values if value is not None]
    return [*values, float(np.mean(known)) if known and len(known) == len(values) else None]


def row_of(setting: str, kind: str, at_start: bool = False) -> str:
    """The name of a row.

    Args:
        setting: such as "simcse-bert-base/self".
        kind: "bi" or "cross".
        at_start: the encoder that the setting begins with, in its place.
    """
    return f"{setting.partition('/')[0]}/start/bi" if at_start else f"{setting}/{kind}"


def check_setting(setting: str, where: str) -> None:
    """Raise `InputError` for a setting that the paper does not have. `where`: how the message names its place."""
    if setting not in SETTINGS:
        raise InputError(f"{where}: the paper has no {setting!r}; it has: {', '.join(sorted(SETTINGS))}")
