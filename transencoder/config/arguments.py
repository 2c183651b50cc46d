"""Every stage's arguments, with the paper's values as defaults."""

import math
from dataclasses import dataclass
from typing import Literal

from transencoder.config.options import (
    EncoderArguments,
    HubArguments,
    ReportArguments,
    ShardArguments,
    StageArguments,
    check_keep,
    option,
    with_default,
)
from transencoder.errors import InputError

# What mine_pairs.py looks for unless it is told otherwise (docs/results.md compares mixes).
DEFAULT_MIX = ("lexical:1-10=1", "nearest:1-3=1", "nearest:4-20=1", "nearest:21-100=1", "random=1")


@dataclass
class TrainingArguments(HubArguments, ReportArguments, StageArguments):
    """Options of the three training stages."""

    GROUP = "training (the defaults are the paper's, where it gives a value)"

    output_dir: str = option("Folder for the trained model.", identity=False)
    learning_rate: float = option("Peak learning rate.", positive=True)
    total_batch_size: int = option(
        "Examples in one optimizer step, over all processes and accumulation steps.", limits=(1, None)
    )
    micro_batch_size: int | None = option(
        "Examples per forward pass and process, at most; gradients are accumulated. Default: no accumulation.",
        None,
        limits=(1, None),
        identity=False,
    )
    num_epochs: int = option("Passes over the data.", 1, limits=(1, None))
    max_steps: int | None = option(
        "Stop after this many optimizer steps, whatever num_epochs says.", None, limits=(1, None)
    )
    warmup_ratio: float = option("Share of the steps in which the learning rate rises linearly.", 0.0, limits=(0, 1))
    weight_decay: float = option("AdamW weight decay (not on biases and norms).", 0.01, limits=(0, None))
    max_grad_norm: float = option("Gradient clipping.", 1.0, positive=True)
    max_length: int = option("Longest input in tokens; the rest is cut off.", 64, limits=(3, None))
    dropout: float | None = option("Dropout of the encoder. Default: as in its configuration.", None, limits=(0, 1))
    length_window: int = option(
        "Length grouping: sort the examples of this many batches by length, for less padding. 1: plain shuffle.",
        32,
        limits=(1, None),
    )
    cuda_graphs: Literal["auto", "off"] = option(
        "auto: on one GPU, record a training step once for each length and replay it, which changes no result.",
        "auto",
        identity=False,
    )
    dev: str | None = option(
        "Labelled pairs for choosing the checkpoint: FILE, NAME=FILE or a task such as stsb.dev.", None
    )
    eval_steps: int = option("Evaluate on --dev every N steps, and after each epoch.", 200, limits=(1, None))
    checkpointing_steps: int = option(
        "Save a checkpoint every N steps, to resume from after a crash; 0: only on a signal.",
        500,
        limits=(0, None),
        identity=False,
    )
    checkpoints_total_limit: int = option(
        "Number of checkpoints to keep, the newest ones.", 2, limits=(1, None), identity=False
    )
    select_by: Literal["dev", "agreement", "last"] | None = option(
        "Which checkpoint is kept: the best on --dev; the one whose scores of held-out pairs agree best with the "
        "teacher's (Spearman; not in step 1); or the last. Default: dev when --dev is given, else last.",
        None,
    )

    def count_micro_batches(self, rows: int, num_processes: int) -> int:
        """Return how many micro-batches of each process make a batch: the gradient accumulation steps.

        Raises:
            InputError: fewer rows than one batch, or a batch that the processes cannot share equally.
        """
        total = self.total_batch_size
        if rows < total:
            raise InputError(f"{rows} examples are fewer than one batch; lower --total_batch_size (now {total})")
        if total % num_processes:
            raise InputError(f"--total_batch_size {total}: not divisible by {num_processes} processes")
        share = total // num_processes
        count = math.ceil(share / min(self.micro_batch_size or share, share))
        if share % count:
            raise InputError(
                f"--micro_batch_size {self.micro_batch_size}: {share} examples of each process do not split into "
                f"{count} equal parts"
            )
        return count


@dataclass
class ContrastiveArguments(ShardArguments, TrainingArguments):
    """Options of step 1. Defaults that differ between the two methods are filled in afterwards."""

    GROUP = "contrastive learning"

    model_name_or_path: str = option("Pretrained language model: Hub id or folder.")
    sentences: list[str] = option("Unlabelled sentences: FILE(s), Hub dataset id(s), wiki1m, or a pool's (sts_sickr).")
    method: Literal["simcse", "mirror"] = option(
        "simcse: dropout twice. mirror: also random span masking on one side.", "simcse"
    )
    num_sentences: int | None = option(
        "Size of a random subset. Default: all for simcse, 10000 for mirror.", None, limits=(2, None)
    )
    learning_rate: float | None = with_default(
        TrainingArguments, "learning_rate", None, "Peak learning rate. Default: 3e-5 for simcse, 2e-5 for mirror."
    )
    total_batch_size: int | None = with_default(
        TrainingArguments,
        "total_batch_size",
        None,
        "Sentences in one step, all processes together. Default: 64 for simcse, 200 for mirror.",
    )
    max_length: int | None = with_default(
        TrainingArguments,
        "max_length",
        None,
        "Longest sentence in tokens. Default: 32 for simcse, 50 for mirror.",
    )
    temperature: float | None = option(
        "Temperature of the loss. Default: 0.05 for simcse, 0.04 for mirror.", None, positive=True
    )
    mlp_head: bool | None = option(
        "Train with a dense layer and tanh on top, then drop it. Default: true, but not for mirror or with --teacher.",
        None,
    )
    loss: str = option(
        "What is learned; --teacher changes the default.", "info_nce", choices="transencoder.losses:CONTRASTIVE_LOSSES"
    )
    teacher: str | None = option("Bi-encoder to learn from, by --loss teacher: folder or Hub id.", None)
    queue_size: int = option("--teacher: number of sentences that each one is compared with.", 8192, limits=(2, None))
    teacher_temperature: float = option("--teacher: temperature of its similarities.", 0.05, positive=True)
    pooling: str = option(
        "How token vectors are combined into a sentence vector.", "cls", choices="transencoder.pooling:POOLINGS"
    )
    mask_characters: int = option(
        "mirror: length of the masked span in characters, for sentences of at least 30.", 5, limits=(1, None)
    )
    drophead: float = option(
        "Probability of dropping a whole attention head; if above 0, replaces dropout (mirror: 0.05).",
        0.0,
        limits=(0, 1),
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
        if self.teacher:
            if self.method == "mirror" or self.mlp_head:
                raise InputError("--teacher: goes with --method simcse, and without --mlp_head")
            self.loss, self.mlp_head = "teacher", False
        elif self.loss == "teacher":
            raise InputError("--loss teacher: needs a bi-encoder to learn from, --teacher MODEL")
        for name, value in self.METHOD_DEFAULTS[self.method].items():
            if getattr(self, name) is None:
                setattr(self, name, value)


@dataclass
class PoolArguments:
    """Options of choosing among the unlabelled pairs."""

    GROUP = "choice of pairs"

    num_training_pairs: int | None = option(
        "Size of a random sample of the pairs. Default: all.", None, limits=(2, None)
    )
    extra_pairs: list[str] | None = option("Pairs to add to that sample: pools or FILE(s), as for --pairs.", None)
    num_extra_pairs: int | None = option(
        "Size of a random sample of --extra_pairs. Default: all.", None, limits=(1, None)
    )

    def __post_init__(self) -> None:
        if self.num_extra_pairs is not None and not self.extra_pairs:
            raise InputError("--num_extra_pairs needs --extra_pairs")


@dataclass
class TeacherArguments(EncoderArguments):
    """Options of the mean of several teachers' scores."""

    GROUP = "teachers"

    scores: list[str] | None = option(
        "File(s) of other tools' scores (sentence1, sentence2, score): further teachers. They are matched to --pairs "
        "by text, and need not cover them all: a pair's mean is over the teachers that scored it.",
        None,
    )
    teacher_weights: list[float] | None = option(
        "Weights in the mean, first of the encoders, then of the files of --scores. Default: equal.", None
    )
    teacher_scale: str = option("Scaling of each teacher's scores.", "none", choices="transencoder.losses:SCALES")
    both_orders: bool = option(
        "Cross-encoders score (a, b) and (b, a), and the mean counts. Not if order matters, as in QNLI.", False
    )
    lexical_weight: float = option(
        "Weight of the pairs' TF-IDF cosine (character n-grams) in the score; the teachers' mean gets the rest.",
        0.0,
        limits=(0, 1),
    )
    smooth_neighbours: int = option(
        "Bi-encoders compare neighbourhoods: to each vector, less the mean of all, add the mean of its N nearest "
        "among the pairs' sentences. For finding duplicates, 20; not for graded similarity. 0: off.",
        0,
        limits=(0, 1000),
    )

    def averages(self, encoders: list[str]) -> bool:
        """Return whether the scores of `encoders`, or theirs and others, are averaged as they are."""
        several = len(encoders) + len(self.scores or []) + bool(self.lexical_weight) > 1
        return several and self.teacher_scale == "none"

    def check_weights(self, encoders: list[str] | None) -> None:
        """Raise `InputError` unless there is a positive weight for each teacher."""
        weights, teachers = self.teacher_weights, len(encoders or []) + len(self.scores or [])
        if weights is not None and not (
            len(weights) == teachers and all(weight > 0 for weight in weights) and math.isfinite(sum(weights))
        ):
            shown = " ".join(map(str, weights))
            raise InputError(
                f"--teacher_weights {shown}: must be one positive number for each of {teachers} teacher(s)"
            )


@dataclass
class LabelArguments(TeacherArguments, ShardArguments, PoolArguments):
    """Options of a student's pseudo-labels: a file of scores, or teachers that score the pairs first."""

    GROUP = "labels: --scores, or --teachers and --pairs"

    scores: list[str] | None = with_default(
        TeacherArguments,
        "scores",
        None,
        "Scored pairs (sentence1, sentence2, score), as score_pairs.py writes them. With --teachers: file(s) of other "
        "tools' scores, as further teachers, matched to --pairs by text; they need not cover them all.",
    )
    teachers: list[str] | None = option("Encoder(s) that score --pairs first.", None)
    pairs: list[str] | None = option("With --teachers: the unlabelled pairs, as score_pairs.py takes them.", None)
    num_held_out: int = option("Pairs that --select_by agreement holds out of training.", 500, limits=(2, None))
    drop_disagreement: float = option(
        "Share of the pairs to leave out: those whose teachers disagree most. With several teachers, score_pairs.py "
        "writes the column disagreement; --teacher_scale rank makes their scores comparable.",
        0.0,
        limits=(0, 1),
    )
    weight_disagreement: bool = option(
        "Sample a pair more often the better its teachers agree: by rank, from twice to never.", False
    )

    @property
    def by_disagreement(self) -> bool:
        """Return whether it matters how far a pair's teachers are from one another."""
        return bool(self.drop_disagreement or self.weight_disagreement)

    def __post_init__(self) -> None:
        if not (self.scores or self.teachers):
            raise InputError("give either --scores FILE or --teachers ENCODER --pairs FILE")
        if bool(self.teachers) != bool(self.pairs):
            raise InputError("--teachers and --pairs go together")
        if not self.teachers:
            if len(self.scores) > 1:
                raise InputError("--scores: several files are teachers of --pairs, beside --teachers")
            if self.extra_pairs or self.num_training_pairs:
                raise InputError("--num_training_pairs and --extra_pairs go with --teachers, or with score_pairs.py")
            for name in ("teacher_weights", "teacher_scale", "both_orders", "lexical_weight", "smooth_neighbours"):
                if getattr(self, name) != getattr(TeacherArguments, name):
                    raise InputError(f"--{name} goes with --teachers, or with score_pairs.py")
        super().__post_init__()
        self.check_weights(self.teachers)
        if self.teachers:
            several = [self.lexical_weight, self.both_orders]
            self.check_disagreement(len(self.teachers) + len(self.scores or []) + sum(map(bool, several)))

    def check_disagreement(self, teachers: int) -> None:
        """Raise `InputError` if pairs are chosen by how far `teachers` agree, and there is one."""
        if self.by_disagreement and teachers < 2:
            name = "drop_disagreement" if self.drop_disagreement else "weight_disagreement"
            raise InputError(f"--{name}: one teacher scores the pairs; add others, --both_orders or --lexical_weight")


@dataclass
class Bi2CrossArguments(LabelArguments, TrainingArguments):
    """Options of step 2."""

    GROUP = "the cross-encoder"

    model_name_or_path: str = option(
        "Model to start from, Hub id or folder: a language model, or a classifier of pairs, which keeps its head if "
        "it gives one score."
    )
    learning_rate: float = with_default(TrainingArguments, "learning_rate", 2e-5)
    total_batch_size: int = with_default(
        TrainingArguments, "total_batch_size", 32, "Pairs in one step, all processes together."
    )
    max_length: int = with_default(TrainingArguments, "max_length", 64, "Longest pair in tokens.")
    warmup_ratio: float = with_default(TrainingArguments, "warmup_ratio", 0.1)
    negatives: str = option("How to treat negative cosines.", "shift", choices="transencoder.losses:NEGATIVES")
    loss: str = option("Loss on the score.", "bce", choices="transencoder.losses:CROSS_LOSSES")
    rescale: str = option("Rescaling of scores into targets.", "none", choices="transencoder.losses:RESCALINGS")
    swap: bool | None = option(
        "Train on both (a, b) and (b, a). Default: true, except for pools whose order matters (QNLI).", None
    )


@dataclass
class Cross2BiArguments(LabelArguments, TrainingArguments):
    """Options of step 3."""

    GROUP = "the bi-encoder"

    model_name_or_path: str = option("The step-1 bi-encoder, or any sentence-transformers folder or Hub id.")
    learning_rate: float = with_default(TrainingArguments, "learning_rate", 5e-5)
    total_batch_size: int = with_default(
        TrainingArguments, "total_batch_size", 128, "Pairs in one step, all processes together (large models: 64)."
    )
    num_epochs: int = with_default(TrainingArguments, "num_epochs", 10, "Passes over the data (binary tasks: 15).")
    max_length: int = with_default(TrainingArguments, "max_length", 32, "Longest sentence in tokens.")
    loss: str = option("Loss on the cosine.", "mse", choices="transencoder.losses:BI_LOSSES")
    temperature: float = option("Temperature of cosent, listwise and --contrastive_share.", 0.05, positive=True)
    contrastive_share: float = option(
        "Weight of InfoNCE in the loss; its negatives are the other second sentences of the batch.", 0.0, limits=(0, 1)
    )
    contrastive_above: float = option(
        "Pairs with a score above this are the positives of --contrastive_share.", 0.8, limits=(-1, 1)
    )
    merge_with_start: str = option(
        "Mix the weights after training: (1 - a) x start + a x student. Give a as a number, or let dev or agreement "
        "choose it among 0, 0.25, 0.5, 0.75 and 1, by --dev or by the teachers' scores of held-out pairs. Or off.",
        "off",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge_with_start not in ("off", "dev", "agreement"):
            try:
                share = float(self.merge_with_start)
            except ValueError:
                share = -1.0
            if not 0 <= share <= 1:
                raise InputError(
                    f"--merge_with_start {self.merge_with_start}: must be dev, agreement, off or from 0 to 1"
                )
            self.merge_with_start = share


@dataclass
class ScoringArguments(TeacherArguments, ShardArguments, PoolArguments, StageArguments):
    """Options of labelling, and of scoring a file."""

    GROUP = "scoring"

    encoders: list[str] = option("Bi- and cross-encoders, whose scores are averaged: folders or Hub ids.")
    pairs: list[str] = option(
        "Pairs to score: pools (sts sickr sts_sickr qqp qnli mrpc snli), FILE(s) or Hub dataset ids (ORG/NAME:split)."
    )
    data_dir: str | None = option(
        "Folder with the pools as pool.NAME.jsonl(.gz), or their tasks as NAME.SPLIT.jsonl(.gz). Default: they come "
        "from the Hub.",
        None,
    )
    output: str = option(
        "Parquet file to write: sentence1, sentence2, score, in the order of the input.", identity=False
    )
    drop_duplicates: bool = option("Keep only the first of identical pairs.", False)
    keep: list[str] | None = option(
        "Columns of the files to copy to the output, such as id; row numbers are added.", None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep, ("sentence1", "sentence2", "score", "disagreement", "row"))
        self.check_weights(self.encoders)


@dataclass
class MiningArguments(EncoderArguments, ShardArguments, StageArguments):
    """Options of finding candidate pairs among sentences."""

    GROUP = "mining"

    sentences: list[str] = option("Sentences: FILE(s), Hub dataset id(s), wiki1m, or a pool's (sts_sickr).")
    sentences_b: list[str] | None = option(
        "A second side, such as answers: a pair's second sentence is then one of these.", None
    )
    encoders: list[str] = option("Bi-encoder(s) whose mean cosine decides what is near: folders or Hub ids.")
    output: str = option("Parquet file to write: sentence1, sentence2, source, similarity.", identity=False)
    num_pairs: int | None = option(
        "Number of pairs to find, over all sources. Default: four per sentence.", None, limits=(1, 10**9)
    )
    mix: list[str] | None = option(
        "Where pairs come from, SOURCE=SHARE ...; SOURCE is lexical (BM25), nearest (the encoders' cosine) or random. "
        f"The first two can have a range of ranks, as in nearest:4-20. Default: {' '.join(DEFAULT_MIX)}.",
        None,
    )
    spread: int = option(
        "Find N times as many pairs, and keep a part whose cosines are spread evenly from 0 to 1. 1: keep what the "
        "mix gives.",
        1,
        limits=(1, 1000),
    )
    spread_by: str | None = option(
        "Spread them evenly over the scores of this cross-encoder, from the lowest to the highest, instead of over "
        "the cosine. It scores all pairs that --spread finds. Folder or Hub id.",
        None,
    )
    histogram: str | None = option(
        "PNG with the similarities of each source. Default: beside the output.", None, identity=False
    )
    data_dir: str | None = option(
        "Folder with the pools that --sentences names. Default: load them from the Hub.", None
    )

    def __post_init__(self) -> None:
        if self.spread_by and self.spread == 1:
            raise InputError("--spread_by: needs more pairs to choose from, --spread 2 or more")


@dataclass
class EvaluationArguments(EncoderArguments, ReportArguments, StageArguments):
    """Options of measuring encoders."""

    GROUP = "measuring"

    encoders: list[str] = option("Bi- and cross-encoders to evaluate: folders or Hub ids.")
    tasks: list[str] = option(
        "Tasks (sts12 ... stsb sickr qqp qnli mrpc, stsb.dev, ...), groups (sts sts_sickr binary), or NAME=FILE with "
        "gold labels."
    )
    output_dir: str = option("Folder for results.json and results.md.", identity=False)
    ensemble: bool = option("Evaluate the mean of all encoders' scores, not each encoder.", False)
    with_ensembles: bool = option(
        "Evaluate each encoder, and the means of the bi-encoders, of the cross-encoders, and of all.", False
    )
    paper: str | None = option(
        "Setting of the paper's tables whose figures stand beside ours, such as simcse-bert-base/self.", None
    )

    def __post_init__(self) -> None:
        if self.ensemble and self.with_ensembles:
            raise InputError("--ensemble and --with_ensembles exclude one another")
