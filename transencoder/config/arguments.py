"""Every stage's arguments, with the paper's values as defaults."""

import math
from dataclasses import dataclass
from typing import Literal

from transencoder.config.options import HubArguments, ReportArguments, StageArguments, option
from transencoder.errors import InputError

# What mine_pairs.py looks for unless it is told otherwise (docs/results.md compares mixes).
DEFAULT_MIX = ("lexical:1-10=1", "nearest:1-3=1", "nearest:4-20=1", "nearest:21-100=1", "random=1")


@dataclass
class TrainingArguments(HubArguments, ReportArguments, StageArguments):
    """What the three training stages share."""

    GROUP = "training (the defaults are the paper's, where it gives a value)"

    output_dir: str = option("Folder for the trained model.")
    learning_rate: float = option("Peak learning rate.")
    total_batch_size: int = option("Examples in one optimizer step, over all processes and accumulation steps.")
    micro_batch_size: int | None = option(
        "Most examples in one forward pass of one process; accumulation follows from it. Default: no accumulation.",
        None,
    )
    num_epochs: int = option("Passes over the data.", 1)
    max_steps: int | None = option("Stop after this many optimizer steps, whatever num_epochs says.", None)
    warmup_ratio: float = option("Share of the steps with a linearly rising learning rate.", 0.0)
    weight_decay: float = option("AdamW weight decay (not on biases and norms).", 0.01)
    max_grad_norm: float = option("Gradient clipping.", 1.0)
    max_length: int = option("Most tokens of one input; the rest is cut off.", 64)
    dropout: float | None = option("Dropout of the encoder. Default: what its configuration says.", None)
    length_window: int = option(
        "Batches are cut from windows of so many shuffled batches, sorted by length: less padding. 1: plain shuffle.",
        32,
    )
    dev: str | None = option(
        "Labelled pairs for choosing the checkpoint: FILE, NAME=FILE or a task such as stsb.dev.", None
    )
    eval_steps: int = option("Dev evaluation every this many steps, and at each epoch's end.", 200)
    checkpointing_steps: int = option(
        "Save a checkpoint every this many steps, to go on from after a crash; 0: only when a signal asks for it.",
        500,
    )
    checkpoints_total_limit: int = option("Keep this many checkpoints, the newest ones.", 2)
    select_by: Literal["dev", "agreement", "last"] | None = option(
        "Which checkpoint is kept: the best on --dev; the one whose scores of held-out pairs agree best with the "
        "teacher's (Spearman; not in step 1); or the last. Default: dev when --dev is given, else last.",
        None,
    )


@dataclass
class ContrastiveArguments(TrainingArguments):
    """Step 1. Defaults that differ between the two methods are filled in afterwards."""

    GROUP = "contrastive learning"

    model_name_or_path: str = option("Pretrained language model: Hub id or folder.")
    sentences: list[str] = option("Unlabelled sentences: FILE(s), Hub dataset id(s), wiki1m, or a pool's (sts_sickr).")
    method: Literal["simcse", "mirror"] = option(
        "simcse: dropout twice. mirror: also random span masking on one side.", "simcse"
    )
    num_sentences: int | None = option("Random subset of this size. Default: all for simcse, 10000 for mirror.", None)
    learning_rate: float | None = option("Peak learning rate. Default: 3e-5 for simcse, 2e-5 for mirror.", None)
    total_batch_size: int | None = option(
        "Sentences in one step, all processes together. Default: 64 for simcse, 200 for mirror.", None
    )
    max_length: int | None = option("Most tokens of a sentence. Default: 32 for simcse, 50 for mirror.", None)
    temperature: float | None = option("Temperature of InfoNCE. Default: 0.05 for simcse, 0.04 for mirror.", None)
    mlp_head: bool | None = option(
        "Dense + tanh on top in training, dropped afterwards. Default: true for simcse, false for mirror.", None
    )
    pooling: Literal["cls", "mean"] = option("How token vectors become a sentence vector.", "cls")
    mask_characters: int = option("mirror: length of the masked span, in characters of sentences with >= 30.", 5)
    drophead: float = option(
        "Probability of dropping a whole attention head; if above 0, replaces dropout (mirror: 0.05).", 0.0
    )

    METHOD_DEFAULTS = {
        "simcse": dict(learning_rate=3e-5, total_batch_size=64, max_length=32, temperature=0.05, mlp_head=True),
        "mirror": dict(
            learning_rate=2e-5,
            total_batch_size=200,
            max_length=50,
            temperature=0.04,
            mlp_head=False,
            num_sentences=10_000,
        ),
    }

    def __post_init__(self) -> None:
        for name, value in self.METHOD_DEFAULTS[self.method].items():
            if getattr(self, name) is None:
                setattr(self, name, value)


@dataclass
class ShardArguments:
    """How often a long scoring is saved."""

    GROUP = "scoring"

    shard_rows: int = option(
        "Inputs after which what is scored is kept on disk, to go on from after a crash or a signal.", 65536
    )


@dataclass
class PoolArguments:
    """Which of the unlabelled pairs are taken."""

    GROUP = "choice of pairs"

    num_training_pairs: int | None = option("Random sample of the pairs of this size. Default: all.", None)
    extra_pairs: list[str] | None = option("More pairs, beside that sample: pools or FILE(s), as --pairs.", None)
    num_extra_pairs: int | None = option("Random sample of --extra_pairs of this size. Default: all.", None)

    def __post_init__(self) -> None:
        if self.num_extra_pairs is not None and not self.extra_pairs:
            raise InputError("--num_extra_pairs needs --extra_pairs")


@dataclass
class LabelArguments(ShardArguments, PoolArguments):
    """Where a student's pseudo-labels come from: a file of scores, or teachers that score the pairs first."""

    GROUP = "labels: --scores, or --teachers and --pairs"

    scores: str | None = option("Scored pairs (sentence1, sentence2, score), as score_pairs.py writes them.", None)
    teachers: list[str] | None = option("Instead of --scores: encoder(s) that score --pairs first.", None)
    pairs: list[str] | None = option("With --teachers: the unlabelled pairs, as score_pairs.py takes them.", None)
    teacher_weights: list[float] | None = option("With --teachers: their weights in the mean. Default: equal.", None)
    num_held_out: int = option("Pairs that --select_by agreement takes out of training.", 500)

    def __post_init__(self) -> None:
        if bool(self.scores) == bool(self.teachers):
            raise InputError("give either --scores FILE or --teachers ENCODER --pairs FILE")
        if bool(self.teachers) != bool(self.pairs):
            raise InputError("--teachers and --pairs go together")
        if self.scores and (self.extra_pairs or self.num_training_pairs):
            raise InputError("--num_training_pairs and --extra_pairs go with --teachers, or with score_pairs.py")
        super().__post_init__()
        check_weights(self.teacher_weights, len(self.teachers or []))


@dataclass
class Bi2CrossArguments(LabelArguments, TrainingArguments):
    """Step 2."""

    GROUP = "the cross-encoder"

    model_name_or_path: str = option("Pretrained language model that becomes the cross-encoder: Hub id or folder.")
    learning_rate: float = option("Peak learning rate.", 2e-5)
    total_batch_size: int = option("Pairs in one step, all processes together.", 32)
    max_length: int = option("Most tokens of a pair.", 64)
    warmup_ratio: float = option("Share of the steps with a linearly rising learning rate.", 0.1)
    negatives: Literal["shift", "clip"] = option(
        "Negative cosines. shift: map [lowest, 1] to [0, 1], so that no difference is lost; clip: they become 0.",
        "shift",
    )
    loss: Literal["bce", "mse"] = option("On the score. mse is the paper's ablation.", "bce")
    carry_over: bool = option(
        "The model is a cross-encoder, whose weights and head are trained on; the paper's ablation of a fresh one.",
        False,
    )
    rescale: Literal["none", "logistic"] = option(
        "Scores before they become targets. logistic: sigmoid of twice the standard score, which spreads them.",
        "none",
    )
    swap: bool | None = option(
        "Train on (a, b) and on (b, a). Default: true, but for pools whose order matters (QNLI).", None
    )


@dataclass
class Cross2BiArguments(LabelArguments, TrainingArguments):
    """Step 3."""

    GROUP = "the bi-encoder"

    model_name_or_path: str = option("The step-1 bi-encoder, or any sentence-transformers folder or Hub id.")
    learning_rate: float = option("Peak learning rate.", 5e-5)
    total_batch_size: int = option("Pairs in one step, all processes together (large models: 64).", 128)
    num_epochs: int = option("Passes over the data (binary tasks: 15).", 10)
    max_length: int = option("Most tokens of a sentence.", 32)
    loss: Literal["mse", "bce"] = option("On the cosine. bce is the paper's ablation.", "mse")
    pooling: Literal["cls", "mean"] | None = option("Only for a start that does not say how it pools.", None)


@dataclass
class ScoringArguments(ShardArguments, PoolArguments, StageArguments):
    """Labelling, and scoring a file."""

    GROUP = "scoring"

    encoders: list[str] = option("Bi- and cross-encoders, whose scores are averaged: folders or Hub ids.")
    pairs: list[str] = option(
        "Pairs to score: pools (sts sickr sts_sickr qqp qnli mrpc snli), FILE(s) or Hub dataset ids (ORG/NAME:split)."
    )
    data_dir: str | None = option(
        "Folder with the pools as pool.NAME.jsonl(.gz), or their tasks as NAME.SPLIT.jsonl(.gz); without it they come "
        "by Hub.",
        None,
    )
    output: str = option("Parquet file to write: sentence1, sentence2, score, in the order of the input.")
    both_orders: bool = option(
        "Cross-encoders score (a, b) and (b, a), and the mean counts; not where order matters, as in QNLI.", False
    )
    lexical_weight: float = option(
        "Share of the pairs' TF-IDF cosine (character n-grams) in the score; the encoders' mean has the rest.", 0.0
    )
    drop_duplicates: bool = option("Keep only the first of exactly equal pairs.", False)
    teacher_weights: list[float] | None = option("Weights of the encoders in the mean. Default: equal.", None)
    pooling: Literal["cls", "mean"] | None = option(
        "Only for a plain language model, which does not say how it pools.", None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(self.teacher_weights, len(self.encoders))


@dataclass
class MiningArguments(ShardArguments, StageArguments):
    """Candidate pairs from sentences."""

    GROUP = "mining"

    sentences: list[str] = option("Sentences: FILE(s), Hub dataset id(s), wiki1m, or a pool's (sts_sickr).")
    sentences_b: list[str] | None = option(
        "A second side, such as answers: then a pair has a sentence of each side, the first side's first.", None
    )
    encoders: list[str] = option("Bi-encoder(s), whose mean cosine says what is near: folders or Hub ids.")
    output: str = option("Parquet file to write: sentence1, sentence2, source, similarity.")
    num_pairs: int | None = option("Pairs to find, all sources together. Default: four for each sentence.", None)
    mix: list[str] | None = option(
        "Where they come from, SOURCE=SHARE ...; SOURCE is lexical (BM25) or nearest (the encoders' cosine), each "
        f"with a band of ranks as in nearest:4-20 if so wished, or random. Default: {' '.join(DEFAULT_MIX)}.",
        None,
    )
    spread: int = option(
        "Look for this many times as many pairs, and keep those whose cosines are spread evenly from 0 to 1. 1: keep "
        "what the mix gives.",
        1,
    )
    histogram: str | None = option("PNG with the similarities of each source. Default: beside the output.", None)
    data_dir: str | None = option("Folder with the pools that --sentences names; without it they come by Hub.", None)
    pooling: Literal["cls", "mean"] | None = option(
        "Only for a plain language model, which does not say how it pools.", None
    )


@dataclass
class EvaluationArguments(ReportArguments, StageArguments):
    """Tables."""

    GROUP = "measuring"

    encoders: list[str] = option("Bi- and cross-encoders to evaluate: folders or Hub ids.")
    tasks: list[str] = option(
        "Tasks (sts12 ... stsb sickr qqp qnli mrpc, stsb.dev, ...), groups (sts sts_sickr binary), or NAME=FILE with "
        "gold labels."
    )
    output_dir: str = option("Folder for results.json and results.md.")
    ensemble: bool = option("Evaluate the mean of all encoders' scores, not each encoder.", False)
    with_ensembles: bool = option(
        "Evaluate each encoder, and the means of the bi-encoders, of the cross-encoders, and of all.", False
    )
    paper: str | None = option(
        "Setting of the paper's tables whose figures stand beside ours, such as simcse-bert-base/self.", None
    )
    pooling: Literal["cls", "mean"] | None = option(
        "Only for a plain language model, which does not say how it pools.", None
    )

    def __post_init__(self) -> None:
        if self.ensemble and self.with_ensembles:
            raise InputError("--ensemble and --with_ensembles exclude one another")


# What a number may be: lowest and highest.
LIMITS = {
    "total_batch_size": (1, None),
    "micro_batch_size": (1, None),
    "num_epochs": (1, None),
    "max_steps": (1, None),
    "eval_steps": (1, None),
    "checkpointing_steps": (0, None),
    "checkpoints_total_limit": (1, None),
    "eval_batch_tokens": (1, None),
    "shard_rows": (1, None),
    "length_window": (1, None),
    "mask_characters": (1, None),
    "num_sentences": (2, None),
    "num_held_out": (2, None),
    "num_training_pairs": (2, None),
    "num_extra_pairs": (1, None),
    "num_pairs": (1, None),
    "spread": (1, None),
    "max_length": (3, None),
    "seed": (0, 2**32 - 1),
    "warmup_ratio": (0, 1),
    "dropout": (0, 1),
    "drophead": (0, 1),
    "weight_decay": (0, None),
    "lexical_weight": (0, 1),
    "threshold": (0, 1),
    "top_k": (1, None),
    "candidates": (1, None),
    "neighbours": (1, None),
}
POSITIVE = ("learning_rate", "temperature", "max_grad_norm")

STAGES = {
    "train_contrastive": ContrastiveArguments,
    "mine_pairs": MiningArguments,
    "score_pairs": ScoringArguments,
    "distill_bi2cross": Bi2CrossArguments,
    "distill_cross2bi": Cross2BiArguments,
    "evaluate_encoders": EvaluationArguments,
}


def check_weights(weights: list[float] | None, encoders: int) -> None:
    """Raise `InputError` unless there is a positive weight for each encoder."""
    if weights is not None and (len(weights) != encoders or not all(0 < weight < math.inf for weight in weights)):
        shown = " ".join(map(str, weights))
        raise InputError(f"--teacher_weights {shown}: must be one positive number for each of {encoders} encoder(s)")
