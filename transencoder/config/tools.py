"""Options of the scripts that use trained models: no recipe, no folder of results."""

from dataclasses import dataclass
from typing import Any, Literal

from transencoder.config.options import option
from transencoder.config.parsing import StageParser, check_numbers
from transencoder.errors import InputError


@dataclass
class EncoderArguments:
    """How sentences are read and models are run."""

    GROUP = "sentences and encoders"

    columns: list[str] | None = option("Rename columns, ours=theirs: sentence=question.", None)
    pooling: Literal["cls", "mean"] | None = option(
        "Only for a plain language model, which does not say how it pools.", None
    )
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "Autocast type. auto: bf16 where the hardware computes in it, else fp32.", "auto"
    )
    seed: int = option("Seed of the index's clusters and of the communities.", 2021)


@dataclass
class ToolArguments(EncoderArguments):
    """What search.py and find_duplicates.py share."""

    GROUP = EncoderArguments.GROUP

    bi_encoder: str = option("Bi-encoder that finds candidates: a folder or Hub id.")
    sentences: list[str] | None = option("Sentences, one a line, or FILE(s) or Hub dataset ids with a column.", None)
    eval_batch_tokens: int | None = option(
        "Tokens (padding included) in one forward pass. Default: 16384 on a GPU, else 2048.", None
    )
    shard_rows: int = option("Sentences encoded before what is done is kept on disk.", 65536)


@dataclass
class SearchArguments(ToolArguments):
    """Retrieve, then re-rank."""

    GROUP = "search"

    index: str = option("Folder of the index. With --sentences it is made, or gets those that are not in it yet.")
    cross_encoder: str | None = option(
        "Cross-encoder that re-ranks: a folder or Hub id. Default: no re-ranking.", None
    )
    query: list[str] | None = option("What to look for. Without --query, --queries and --relevant: a prompt.", None)
    queries: str | None = option("File of queries, one a line.", None)
    relevant: str | None = option(
        "File of pairs with the column label: reports recall@TOP_K of each one's true partners.", None
    )
    top_k: int = option("Results of a query.", 10)
    candidates: int = option("Sentences that the bi-encoder finds for the cross-encoder to re-rank.", 50)
    output: str | None = option("JSONL file for the results. Default: a table on the terminal.", None)

    def __post_init__(self) -> None:
        if self.candidates < self.top_k:
            raise InputError(f"--candidates {self.candidates}: fewer than --top_k {self.top_k}")


@dataclass
class DuplicatesArguments(ToolArguments):
    """Clusters of paraphrases."""

    GROUP = "duplicates"

    cross_encoder: str = option("Cross-encoder that confirms: a folder or Hub id.")
    output: str = option("CSV file to write: cluster, size, score, sentence.")
    neighbours: int = option("Nearest neighbours of each sentence that are looked at.", 20)
    threshold: float = option("Least mean of both encoders' scores, 0 to 1, at which two sentences are one.", 0.85)


def parse_tool(arguments: type, description: str | None) -> Any:
    """An instance of `arguments` from the command line."""
    (parsed,) = StageParser(arguments, description).parse_args_into_dataclasses()
    check_numbers(parsed)
    return parsed
