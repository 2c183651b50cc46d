"""How an option is written, the form of a registry, and the options that several scripts share."""

import dataclasses
import os
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from transencoder.errors import InputError


def option(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    limits: tuple[float | None, float | None] = (None, None),
    positive: bool = False,
    identity: bool = True,
    choices: str | None = None,
) -> Any:
    """Return a dataclass field that is an option; without a default it is required.

    Args:
        help: for --help.
        default: the value without the command line and the recipe.
        limits: the lowest and the highest value of a number; None for no limit.
        positive: the number must be above 0.
        identity: whether the option changes the result; False if it changes only how a run goes.
        choices: a registry of `Choice` as "module:ATTRIBUTE", imported when the parser is built.
    """
    metadata = dict(help=help, limits=limits, positive=positive, identity=identity, choices=choices)
    return field(default=default, metadata=metadata, kw_only=True)


def with_default(base: type, name: str, default: Any, help: str | None = None) -> Any:
    """Return the option `name` of the class `base` with another default and, if given, another help text."""
    metadata = next(option.metadata for option in dataclasses.fields(base) if option.name == name)
    return field(default=default, metadata={**metadata, "help": help or metadata["help"]}, kw_only=True)


@dataclass(frozen=True)
class Choice:
    """Describe an entry of a registry.

    Args:
        function: what does it.
        help: for --help.
        card: for model cards.
    """

    function: Any
    help: str
    card: str = ""


def result_options(arguments: Any) -> dict[str, Any]:
    """Return the options that change the result, by name."""
    fields = dataclasses.fields(arguments)
    return {option.name: getattr(arguments, option.name) for option in fields if option.metadata["identity"]}


def is_text(word: str) -> bool:
    """Return whether `word` can be written as UTF-8 and be a file's name."""
    return "\0" not in word and not any("\ud800" <= character <= "\udfff" for character in word)


def check_keep(keep: list[str] | None, taken: tuple[str, ...]) -> None:
    """Raise `InputError` if a column that is kept has the name of one that the results have anyway."""
    if both := sorted({*(keep or [])} & {*taken}):
        raise InputError(f"--keep {both[0]}: the results have such a column anyway; rename the file's")


def with_home(word: str) -> str:
    """Return "/home/me/a.tsv" for "~/a.tsv", in NAME=~/a.tsv too, where no shell does that."""
    return re.sub(r"^([\w.-]+=)?~(?=/)", lambda found: (found[1] or "") + os.path.expanduser("~"), word)


@dataclass
class Reading:
    """Options of reading files and Hub sets."""

    GROUP = "reading"

    columns: list[str] | None = option("Rename columns, ours=theirs: sentence1=question1 score=gold.", None)
    skip_bad_rows: bool = option(
        "Leave out and count invalid rows, such as those with an empty sentence or a score that is not a number.",
        False,
    )


@dataclass
class CommonArguments(Reading):
    """Options of every stage and of the tools that use trained models."""

    GROUP = "general"

    seed: int = option("Random seed (paper: 2021).", 2021, limits=(0, 2**32 - 1))
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "Autocast type. auto: the launcher's setting, else bf16 if the hardware supports it, else fp32.", "auto"
    )


@dataclass
class StageArguments(CommonArguments):
    """Options of every stage."""

    GROUP = CommonArguments.GROUP

    recipe: str | None = option(
        "YAML file; its section `common` and the one named after the script apply.", None, identity=False
    )
    overwrite: bool = option("Replace what an earlier run left at the output.", False, identity=False)
    eval_batch_tokens: int | None = option(
        "Tokens per forward pass and process when scoring, padding included. Default: 65536 on a GPU, else 2048.",
        None,
        limits=(1, None),
        identity=False,
    )


@dataclass
class ShardArguments:
    """Options of saving the work of a long scoring."""

    GROUP = "scoring"

    shard_rows: int = option(
        "Save scores or vectors every this many inputs, to resume from there after a crash or a signal.",
        65536,
        limits=(1, None),
        identity=False,
    )


@dataclass
class ModelArguments:
    """Options of reading bi-encoders, where their own files leave it open or somebody wants it otherwise."""

    GROUP = "models"

    pooling: str | None = option(
        "Pooling of a plain language model, which does not say how it pools. Not for other models.",
        None,
        choices="transencoder.pooling:POOLINGS",
    )
    prompt_name: list[str] | None = option(
        "Name of a prompt in the models' configuration, or two: for queries or first sentences, and for passages or "
        "second ones. Default: the models' default prompt.",
        None,
    )
    prompt: list[str] | None = option("The same as text, which is put before each sentence unchanged.", None)


@dataclass
class EncoderArguments(ModelArguments):
    """Options of reading encoders of both kinds."""

    GROUP = ModelArguments.GROUP

    label: str | None = option(
        "For a classifier with several labels: the one whose probability is the score, such as entailment.", None
    )


@dataclass
class ReportArguments:
    """Options of measuring and reporting."""

    GROUP = "measuring and reporting"

    report_to: Literal["none", "tensorboard", "wandb", "trackio", "all"] = option(
        "Experiment tracker.", "none", identity=False
    )
    data_dir: str | None = option(
        "Folder with the evaluation tasks as NAME.jsonl(.gz). Default: they come from the Hub.", None
    )


@dataclass
class HubTarget:
    """Options of publishing: where models go, and what their cards cannot read from a file."""

    GROUP = "the Hub"

    hub_model_id: str | None = option("ORG/NAME of the repository.", None, identity=False)
    hub_public: bool = option("Make the repository public. Otherwise it is private.", False, identity=False)
    hub_license: str | None = option("Licence, as the Hub names it. Default: the base model's.", None, identity=False)
    hub_language: str | None = option(
        "Language codes, separated by commas: en,de. Default: the base model's.", None, identity=False
    )


@dataclass
class RunTarget(HubTarget):
    """Options of publishing a run."""

    GROUP = HubTarget.GROUP

    push_worse: bool = option(
        "Publish a bi-encoder as `main` even if it was measured to be worse than its start.", False, identity=False
    )


@dataclass
class HubArguments(HubTarget):
    """Options of publishing the model of a training stage."""

    GROUP = HubTarget.GROUP

    push_to_hub: bool = option("Push the model to --hub_model_id when it is done.", False, identity=False)
