"""Options that several scripts share, and how an option is written."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal


def option(help: str, default: Any = dataclasses.MISSING, **kwargs: Any) -> Any:
    """A dataclass field that is an option with a help text; without a default it is required."""
    return field(default=default, metadata={"help": help, **kwargs}, kw_only=True)


@dataclass(frozen=True)
class Choice:
    """An entry of a registry.

    Args:
        function: what does it.
        help: for --help.
        card: for model cards.
    """

    function: Any
    help: str
    card: str = ""


def is_text(word: str) -> bool:
    """Whether it can be written as UTF-8, and be a file's name."""
    return "\0" not in word and not any("\ud800" <= character <= "\udfff" for character in word)


@dataclass
class StageArguments:
    """What every stage takes."""

    GROUP = "every stage"

    recipe: str | None = option("YAML file; its `common` section and the section named like the script apply.", None)
    overwrite: bool = option("Replace what an earlier run left at the output.", False)
    seed: int = option("Seed of weights, data order and dropout (paper: 2021).", 2021)
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "Autocast type. auto: what the launcher says, else bf16 where the hardware computes in it, else fp32.", "auto"
    )
    columns: list[str] | None = option("Rename columns, ours=theirs: sentence1=question1 score=gold.", None)
    eval_batch_tokens: int | None = option(
        "Tokens (padding included) in one forward pass when scoring, per process. Default: 16384 on a GPU, else 2048.",
        None,
    )


@dataclass
class ReportArguments:
    """Where a stage that measures something reports it."""

    GROUP = "measuring and reporting"

    report_to: Literal["none", "tensorboard", "wandb", "trackio", "all"] = option("Experiment tracker.", "none")
    data_dir: str | None = option(
        "Folder with the evaluation tasks as NAME.jsonl(.gz); without it they come by Hub.", None
    )


@dataclass
class HubTarget:
    """Where models go on the Hub, and what their cards say that no file tells."""

    GROUP = "the Hub"

    hub_model_id: str | None = option("ORG/NAME of the repository.", None)
    hub_public: bool = option("Let everybody see the repository, which is private otherwise.", False)
    hub_license: str | None = option("Licence, by the Hub's name for it. Default: the base model's.", None)
    hub_language: str | None = option("Language codes with commas: en,de. Default: the base model's.", None)


@dataclass
class HubArguments(HubTarget):
    """Whether a training stage publishes its model."""

    GROUP = HubTarget.GROUP

    push_to_hub: bool = option("Push the model to --hub_model_id when it is done.", False)
