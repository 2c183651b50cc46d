"""The stages: each script's options, what comes after it, and the words of its models' cards."""

from dataclasses import dataclass

from transencoder.config.arguments import (
    Bi2CrossArguments,
    ContrastiveArguments,
    Cross2BiArguments,
    EvaluationArguments,
    MiningArguments,
    ScoringArguments,
)


@dataclass(frozen=True)
class Stage:
    """Describe a script that the driver runs.

    Args:
        arguments: the class of its options.
        next: the commands that take what it makes; {} stands for that.
        card: for training stages, how the model was trained; {loss} and others stand for the choice's `card`.
    """

    arguments: type
    next: str = ""
    card: str = ""


STAGES = {
    "train_contrastive": Stage(
        ContrastiveArguments,
        "score_pairs.py --encoders {} --pairs FILE --output bi-scores.parquet",
        "A language model was tuned so that {loss}.",
    ),
    "mine_pairs": Stage(MiningArguments, "score_pairs.py --encoders DIR --pairs {} --output FILE.parquet"),
    "score_pairs": Stage(ScoringArguments, "distill_bi2cross.py, or distill_cross2bi.py, --scores {}"),
    "distill_bi2cross": Stage(
        Bi2CrossArguments,
        "score_pairs.py --encoders {} --pairs FILE --output cross-scores.parquet",
        "A cross-encoder, which reads both sentences together, learned the scores that its teachers give to pairs of "
        "sentences ({loss}).",
    ),
    "distill_cross2bi": Stage(
        Cross2BiArguments,
        "evaluate_encoders.py --encoders {} --tasks NAME=FILE --output_dir DIR, or search.py",
        "A bi-encoder learned the scores that its teachers give to pairs of sentences, as the cosine of its two "
        "vectors ({loss}).",
    ),
    "evaluate_encoders": Stage(EvaluationArguments),
}
