"""Models ready to be tried: two sentences -> scores, a file of sentences -> search. `page.py` shows it."""

import errno
import importlib.util
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
from accelerate import Accelerator

from transencoder.config.recipes import read_recipe
from transencoder.config.tools import DemoArguments
from transencoder.data.tables import read_sentences
from transencoder.embeddings import score_texts
from transencoder.encoders import BiEncoder, CrossEncoder, load_encoder
from transencoder.errors import InputError
from transencoder.model_files import check_bi_encoder, check_cross_encoder
from transencoder.run.layout import Layout
from transencoder.run.summary import Round, best_round, collect_rounds
from transencoder.runtime.accelerator import start
from transencoder.search.index import Hit, Searcher, SentenceIndex, index_in_memory
from transencoder.search.neighbours import EXACT_ROWS

MOST_SENTENCES = EXACT_ROWS  # of a file that somebody waits for; search.py keeps an index of more of them


@dataclass(frozen=True)
class Choice:
    """Which models are tried: folders or Hub ids. `start`: the bi-encoder that the trained ones are compared with."""

    bi_encoder: str
    cross_encoder: str | None = None
    start: str | None = None
    pooling: str | None = None


@dataclass(frozen=True)
class Corpus:
    """Sentences that can be searched. `name`: of the file, as a person knows it."""

    name: str
    index: SentenceIndex


@dataclass(frozen=True)
class Found:
    """A result. `before`: its place, from 1, as the bi-encoder alone had it."""

    hit: Hit
    before: int


# --- before anything is loaded ---------------------------------------------------------------------------------------


def check_packages() -> None:
    """Raise `InputError` if what the page needs is not installed."""
    if importlib.util.find_spec("gradio") is None:
        raise InputError("the page needs a package that is not installed: pip install gradio")


def check_port(host: str, port: int) -> None:
    """Raise `InputError` if nothing can listen there."""
    try:
        socket.create_server((host, port)).close()
    except (OSError, UnicodeError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise InputError(f"--port {port}: already in use; choose another") from error
        why = getattr(error, "strerror", None) or error
        raise InputError(f"--host {host} --port {port}: cannot listen there: {why}") from error


def choose_models(arguments: DemoArguments) -> Choice:
    """The models of a run, or those that are named, which win; checked, and nothing is loaded.

    Raises:
        InputError: no finished run, or a model that is missing, broken or of the wrong kind.
    """
    names = models_of_run(Path(arguments.run)) if arguments.run is not None else {}
    for name in ("bi_encoder", "cross_encoder", "start", "pooling"):
        if getattr(arguments, name) is not None:
            names[name] = getattr(arguments, name)
    if "bi_encoder" not in names:
        raise InputError("which models? Give --run FOLDER of a finished run, or --bi_encoder MODEL")
    choice = Choice(**names)
    check_bi_encoder(choice.bi_encoder, choice.pooling)
    if choice.cross_encoder is not None:
        check_cross_encoder(choice.cross_encoder, "--cross_encoder")
    if choice.start is not None:
        check_bi_encoder(choice.start, choice.pooling)
    return choice


def models_of_run(run: Path) -> dict[str, str | None]:
    """The best encoders of a run and the start of the best bi-encoder's student, as the fields of a `Choice`."""
    path = Layout(run).recipe
    if not path.is_file():
        raise InputError(f"--run {run}: not a run of run_transencoder.sh (no {path.name})")
    recipe, rounds = read_recipe(str(path)), [r for r in collect_rounds(run) if r.path]
    if any(r.values.keys() != rounds[0].values.keys() for r in rounds):
        raise InputError(f"--run {run}: not all of its encoders were measured on the same sets")
    best = best_round(rounds, "bi")
    first = next(r for r in rounds if r.cycle == 0 and r.student == best.student)
    crosses = [r for r in rounds if r.kind == "cross"]
    return {
        "bi_encoder": _kept(run, best),
        "cross_encoder": _kept(run, best_round(rounds, "cross")) if crosses else None,
        "start": first.path,
        # Of a ready start that is a plain language model, as the run itself was told.
        "pooling": {**recipe.get("common", {}), **recipe.get("score_pairs", {})}.get("pooling"),
    }


def _kept(run: Path, best: Round) -> str:
    """Where the best encoder of its kind lies: no copy is made of a start from the Hub."""
    folder = Layout(run).best(best.kind)
    return str(folder) if folder.is_dir() else best.path


def keep_uploads_in(folder: Path) -> None:
    """Let everything that is uploaded, and what is made of it, lie in `folder`; before gradio is imported."""
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")
    datasets.config.HF_DATASETS_CACHE = folder / "cache"


# --- at work ---------------------------------------------------------------------------------------------------------


@dataclass
class Demo:
    """Loaded models, and what is done with them on the page.

    Args:
        corpus: what is searched as long as nothing is uploaded.
    """

    choice: Choice
    bi_encoder: BiEncoder
    cross_encoder: CrossEncoder | None
    start: BiEncoder | None
    accelerator: Accelerator
    candidates: int
    columns: list[str] | None
    seed: int
    corpus: Corpus | None = None

    def score(self, first: str, second: str) -> dict[str, dict[str, float]]:
        """Scores of two sentences: "start" and "trained" -> "bi-encoder", "cross-encoder" and "both", their mean.

        A cross-encoder's score is the mean of both orders'. Absent is what there is no encoder for.
        Raises:
            InputError: a sentence is empty.
        """
        first, second = typed(first, "the first sentence"), typed(second, "the second sentence")
        sides = {"start": [self.start], "trained": [self.bi_encoder, self.cross_encoder]}
        found: dict[str, dict[str, float]] = {}
        for side, encoders in sides.items():
            scores = {
                f"{encoder.kind}-encoder": float(score_texts(encoder, [first], [second], self.accelerator)[0])
                for encoder in encoders
                if encoder is not None
            }
            if len(scores) == 2:
                scores["both"] = sum(scores.values()) / 2
            if scores:
                found[side] = scores
        return found

    def upload(self, path: str, track: Callable = iter) -> Corpus:
        """Read and encode the sentences of an uploaded file.

        Args:
            track: as for `index_in_memory`.
        Raises:
            InputError: as `read_corpus`; the file is called by its name, as it lies in a folder that nobody knows.
        """
        try:
            sentences = read_corpus([path], self.columns)
        except InputError as error:
            raise InputError(str(error).replace(path, Path(path).name)) from error
        return self.encode(Path(path).name, sentences, track)

    def encode(self, name: str, sentences: list[str], track: Callable = iter) -> Corpus:
        """Distinct sentences, ready to be searched; `track` as for `index_in_memory`."""
        return Corpus(name, index_in_memory(sentences, self.bi_encoder, self.accelerator, self.seed, track))

    def search(self, corpus: Corpus | None, query: str, k: int) -> list[Found]:
        """The `k` best sentences for a query, best first.

        Raises:
            InputError: no corpus, an empty query, or more results than sentences.
        """
        if corpus is None:
            raise InputError("nothing to search yet: choose a file of sentences")
        query = typed(query, "the query")
        size = len(corpus.index)
        if not 1 <= k <= size:
            raise InputError(f"{corpus.name}: {k} results of {size} sentences; ask for 1 to {size}")
        depth = max(k, self.candidates)
        searcher = Searcher(corpus.index, self.bi_encoder, self.cross_encoder, self.accelerator, depth)
        best, retrieved, _ = searcher.search(query, min(depth, size))
        places = {hit.sentence: place for place, hit in enumerate(retrieved, start=1)}
        return [Found(hit, places[hit.sentence]) for hit in best[:k]]


def typed(text: str | None, what: str) -> str:
    """The content of a text box; raises `InputError` where there is none. `what`: how the error calls the box."""
    text = (text or "").strip()
    if not text:
        raise InputError(f"{what} is empty")
    return text


def read_corpus(paths: list[str], columns: list[str] | None) -> list[str]:
    """The distinct sentences of files, few enough to be encoded while somebody waits.

    Raises:
        InputError: as `read_sentences`, and for too many.
    """
    sentences = read_sentences(paths, columns)
    if len(sentences) > MOST_SENTENCES:
        names = " ".join(paths)
        raise InputError(
            f"{names}: {len(sentences):,} sentences; at most {MOST_SENTENCES:,} here, any number in search.py"
        )
    return sentences["sentence"][:]


def open_demo(arguments: DemoArguments, choice: Choice) -> Demo:
    """Read the sentences, if there are any, and load the models."""
    sentences = read_corpus(arguments.sentences, arguments.columns) if arguments.sentences else []
    accelerator = start(arguments)
    encoders = [
        load_encoder(name, choice.pooling).to(accelerator.device).eval() if name is not None else None
        for name in (choice.bi_encoder, choice.cross_encoder, choice.start)
    ]
    demo = Demo(choice, *encoders, accelerator, arguments.candidates, arguments.columns, arguments.seed)
    if sentences:
        demo.corpus = demo.encode(" ".join(Path(path).name for path in arguments.sentences), sentences)
    return demo
