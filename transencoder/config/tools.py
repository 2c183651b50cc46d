"""Options of the scripts that use trained models: no recipe, no folder of results."""

from dataclasses import dataclass
from typing import Any, Literal

from transencoder.config.options import (
    CommonArguments,
    EncoderArguments,
    ShardArguments,
    StageArguments,
    check_keep,
    option,
    with_default,
)
from transencoder.config.parsing import StageParser, check_numbers
from transencoder.errors import InputError


@dataclass
class ToolArguments(ShardArguments, EncoderArguments, CommonArguments):
    """Options of search.py and find_duplicates.py."""

    GROUP = "sentences and encoders"

    # What the results have anyway.
    TAKEN = ("sentence", "file", "row", "score", "bi_encoder", "cross_encoder", "alike", "cluster", "kind", "size")

    bi_encoder: str = option("Bi-encoder that finds candidates: a folder or Hub id.")
    columns: list[str] | None = option("Rename columns, ours=theirs: sentence=question.", None)
    sentences: list[str] | None = option("Sentences, one a line, or FILE(s) or Hub dataset ids with a column.", None)
    keep: list[str] | None = option("Columns of --sentences that the results have, too, such as id.", None)
    eval_batch_tokens: int | None = with_default(StageArguments, "eval_batch_tokens", None)

    def __post_init__(self) -> None:
        check_keep(self.keep, self.TAKEN)


@dataclass
class SearchArguments(ToolArguments):
    """Options of retrieving sentences and re-ranking them."""

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
    top_k: int = option("Results of a query.", 10, limits=(1, None))
    candidates: int | None = option(
        "Sentences that are retrieved for the cross-encoder to re-rank. Default: 50, or --top_k where that is more.",
        None,
        limits=(1, None),
    )
    rank_by: Literal["bi", "cross", "mean"] | None = option(
        "Score that orders the results: the bi-encoder's, the cross-encoder's, or the mean. Default: what the run of "
        "the cross-encoder measured to be best (search.json beside its folder), else the mean.",
        None,
    )
    hybrid: bool = option(
        "Retrieve by words, too (BM25), and fuse both by their ranks; finds names and numbers.", False
    )
    output: str | None = option("JSONL file for the results. Default: a table on the terminal.", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.candidates = self.candidates or max(50, self.top_k)
        if self.candidates < self.top_k:
            raise InputError(f"--candidates {self.candidates}: fewer than --top_k {self.top_k}")
        if self.rank_by in ("cross", "mean") and not self.cross_encoder:
            raise InputError(f"--rank_by {self.rank_by}: needs --cross_encoder")


@dataclass
class DuplicatesArguments(ToolArguments):
    """Options of finding groups of paraphrases."""

    GROUP = "duplicates"

    cross_encoder: str | None = option(
        "Cross-encoder that confirms: a folder or Hub id. Default: the bi-encoder alone decides.", None
    )
    output: str = option("CSV or JSONL file to write: cluster, kind, size, score, row, sentence.")
    neighbours: int = option("Nearest neighbours of each sentence that are looked at.", 20, limits=(1, None))
    threshold: float = option(
        "Two sentences are one if the mean of the encoders' scores, 0 to 1, is at least this.", 0.85, limits=(0, 1)
    )
    sweep: bool = option("Show what other thresholds would give, with pairs that are just above them.", False)


def parse_tool(arguments: type, description: str | None) -> Any:
    """Return an instance of `arguments` from the command line."""
    (parsed,) = StageParser(arguments, description).parse_args_into_dataclasses()
    check_numbers(parsed)
    return parsed
