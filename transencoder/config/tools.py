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
    sentences: list[str] | None = option("Text FILE(s), one sentence per line; tables or Hub dataset ids.", None)
    keep: list[str] | None = option("Columns of --sentences to copy into the results, such as id.", None)
    eval_batch_tokens: int | None = with_default(StageArguments, "eval_batch_tokens", None)

    def __post_init__(self) -> None:
        check_keep(self.keep, self.TAKEN)


@dataclass
class SearchArguments(ToolArguments):
    """Options of retrieving sentences and re-ranking them."""

    GROUP = "search"

    index: str = option("Folder of the index. --sentences creates it, or adds sentences that are not in it yet.")
    cross_encoder: str | None = option(
        "Cross-encoder that re-ranks: a folder or Hub id. Default: no re-ranking.", None
    )
    query: list[str] | None = option(
        "What to search for. Without --query, --queries or --relevant, a prompt opens.", None
    )
    queries: str | None = option("File with one query per line.", None)
    relevant: str | None = option(
        "File of pairs with a column label: reports recall@TOP_K of the sentences paired with label 1.", None
    )
    top_k: int = option("Results per query.", 10, limits=(1, None))
    candidates: int | None = option(
        "Sentences retrieved for the cross-encoder to re-rank. Default: 50, or --top_k if that is more.",
        None,
        limits=(1, None),
    )
    rank_by: Literal["bi", "cross", "mean"] | None = option(
        "Score to sort by: the bi-encoder's, the cross-encoder's, or the mean. Default: what the cross-encoder's run "
        "measured to be best (search.json beside its folder), else the mean.",
        None,
    )
    hybrid: bool = option("Also retrieve by words (BM25), and fuse both rankings; finds names and numbers.", False)
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
        "Cross-encoder that checks them: a folder or Hub id. Default: the bi-encoder alone decides.", None
    )
    output: str = option("CSV or JSONL file to write: cluster, kind, size, score, row, sentence.")
    neighbours: int = option("Nearest neighbours to check for each sentence.", 20, limits=(1, None))
    threshold: float = option(
        "Mean of the encoders' scores from which two sentences are duplicates.", 0.85, limits=(0, 1)
    )
    sweep: bool = option("Show the groups that other thresholds give, with pairs just above each.", False)


def parse_tool(arguments: type, description: str | None) -> Any:
    """Return an instance of `arguments` from the command line."""
    (parsed,) = StageParser(arguments, description).parse_args_into_dataclasses()
    check_numbers(parsed)
    return parsed
