"""The page that `demo.py` is tried on. Needs Gradio; everything that a browser loads comes from this machine."""

import html
import os
import signal
from typing import Any

import gradio as gr

from transencoder.demo import Choice, Corpus, Demo, Found
from transencoder.errors import InputError
from transencoder.runtime.accelerator import log

MOST_RESULTS = 50
LARGEST_FILE = "100mb"
SECONDS_SHOWN = 20  # of an error
# A font of the browser's own machine: none is loaded.
THEME = gr.themes.Default(
    primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)
STYLE = """
.gradio-container { max-width: 1000px !important; margin: auto !important; }
.results { width: 100%; border-collapse: collapse; }
.results, .results tr, .results th, .results td { border: 0 !important; }
.results tr { border-bottom: 1px solid var(--border-color-primary) !important; }
.results th, .results td { padding: 8px !important; text-align: left; }
.results .sentence { width: 55%; }
.results th.number, .results td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.results .bar { height: 8px; border-radius: 4px; min-width: 140px; background: var(--border-color-primary); }
.results .bar div { height: 8px; border-radius: 4px; background: #2563eb; }
.results .start .bar div { background: #94a3b8; }
.about, .results th { opacity: 0.75; }
.about span { display: inline-block; }
"""
EXAMPLES = [
    ["How do I remove a card from my account?", "delete my credit card from my profile"],
    ["can I pay by card", "do you accept cash or only cards"],
    ["where is my parcel", "package has not arrived"],
    ["How do I cancel my subscription?", "cancel my order"],
]
FORMATS = ".txt with one a line, or .tsv, .csv, .jsonl or .parquet with a column"
# Two threads must not use a tokenizer at the same time.
ONE_AT_A_TIME = {"concurrency_limit": 1, "concurrency_id": "models"}
ROWS = {"bi-encoder": "bi-encoder", "cross-encoder": "cross-encoder", "both": "mean of both"}


def build_page(demo: Demo) -> gr.Blocks:
    """Both parts of the page: two sentences, and search in a file."""
    with gr.Blocks(title="Trans-Encoder", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(f"<h1>Trans-Encoder</h1>{models_note(demo.choice)}", padding=False)
        with gr.Tab("Two sentences"):
            _add_scores(demo)
        with gr.Tab("Search in a file"):
            _add_search(demo, page)
    return page


def _add_scores(demo: Demo) -> None:
    with gr.Row():
        first = gr.Textbox(label="First sentence", elem_id="first", max_lines=4)
        second = gr.Textbox(label="Second sentence", elem_id="second", max_lines=4)
    button = gr.Button("Compare", variant="primary", elem_id="compare")
    result = gr.HTML(elem_id="scores", padding=False)
    gr.Examples(EXAMPLES, [first, second])

    def compare(one: str, other: str) -> str:
        return scores_table(shown_errors(demo.score, one, other))

    gr.on([button.click, first.submit, second.submit], compare, [first, second], result, **ONE_AT_A_TIME)


def _add_search(demo: Demo, page: gr.Blocks) -> None:
    corpus = gr.State()
    with gr.Row():
        file = gr.File(label="File of sentences", elem_id="file", height=176)
        with gr.Column(scale=2):
            query = gr.Textbox(label="Query", elem_id="query")
            k = gr.Slider(1, MOST_RESULTS, 10, step=1, label="Results", elem_id="k")
    status = gr.HTML(elem_id="status", padding=False)
    button = gr.Button("Search", variant="primary", elem_id="search")
    result = gr.HTML(elem_id="found", padding=False)

    def begin() -> tuple[Corpus | None, str, str]:
        return demo.corpus, corpus_note(demo.corpus), ""

    def forget() -> tuple[None, str, str]:
        """So that a file that is refused is not taken for the one before it."""
        return None, corpus_note(None), ""

    def read(path: str, progress: gr.Progress = gr.Progress()) -> tuple[Corpus, str]:  # noqa: B008 Gradio's way
        def track(blocks: list) -> Any:
            return progress.tqdm(blocks, desc="Encoding")

        read = shown_errors(demo.upload, path, track)
        return read, corpus_note(read)

    def search(corpus: Corpus | None, query: str, k: float) -> str:
        return found_table(shown_errors(demo.search, corpus, query, int(k or 0)))

    gr.on([page.load, file.clear], begin, None, [corpus, status, result])
    file.upload(forget, None, [corpus, status, result]).then(read, file, [corpus, status], **ONE_AT_A_TIME)
    gr.on([button.click, query.submit], search, [corpus, query, k], result, **ONE_AT_A_TIME)


def shown_errors(work: Any, *arguments: Any) -> Any:
    """The result of `work`; bad input is told on the page instead of the terminal."""
    try:
        return work(*arguments)
    except InputError as error:
        raise gr.Error(html.escape(str(error)), duration=SECONDS_SHOWN, print_exception=False) from error


# --- what is shown ---------------------------------------------------------------------------------------------------


def models_note(choice: Choice) -> str:
    """HTML: which models these are."""
    names = {"start": choice.start, "bi-encoder": choice.bi_encoder, "cross-encoder": choice.cross_encoder}
    shown = [
        f"<span>{what}: <code>{html.escape(name)}</code></span>" for what, name in names.items() if name is not None
    ]
    return f'<p class="about">{" &middot; ".join(shown)}</p>'


def corpus_note(corpus: Corpus | None) -> str:
    """HTML: what is searched."""
    if corpus is None:
        return f'<p class="about">Nothing to search: choose a file of sentences ({FORMATS}).</p>'
    return f'<p class="about">Searching {len(corpus.index):,} sentences of {html.escape(corpus.name)}.</p>'


def scores_table(scores: dict[str, dict[str, float]]) -> str:
    """HTML: a row for each encoder, a column for each side. `scores`: as `Demo.score` gives them."""
    rows = [name for name in ROWS if any(name in side for side in scores.values())]
    head = "".join(f'<th colspan="2">{side}</th>' for side in scores)
    body = "".join(
        f"<tr><td>{ROWS[row]}</td>{''.join(_score_cells(side, found.get(row)) for side, found in scores.items())}</tr>"
        for row in rows
    )
    return f'<table class="results"><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>'


def _score_cells(side: str, score: float | None) -> str:
    """A number, and a bar from 0 to 1."""
    if score is None:
        return f'<td class="number">&ndash;</td><td class="{side}"></td>'
    bar = f'<div class="bar"><div style="width: {100 * min(max(score, 0), 1):.1f}%"></div></div>'
    return f'<td class="number">{score:.3f}</td><td class="{side}">{bar}</td>'


def found_table(results: list[Found]) -> str:
    """HTML: a row for each result."""
    reranked = results[0].hit.rerank is not None
    titles = ["both", "bi-encoder", "cross-encoder", "retrieved at"] if reranked else ["bi-encoder"]
    head = "".join(f'<th class="number">{title}</th>' for title in titles)
    rows = []
    for place, found in enumerate(results, start=1):
        hit = found.hit
        numbers = [f"{hit.score:.3f}"]
        if reranked:
            numbers = [f"{(hit.score + hit.rerank) / 2:.3f}", *numbers, f"{hit.rerank:.3f}", str(found.before)]
        cells = "".join(f'<td class="number">{number}</td>' for number in numbers)
        rows.append(f'<tr><td class="number">{place}</td><td>{html.escape(hit.sentence)}</td>{cells}</tr>')
    head = f'<tr><th></th><th class="sentence">sentence</th>{head}</tr>'
    return f'<table class="results"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'


# --- the server ------------------------------------------------------------------------------------------------------


def serve(page: gr.Blocks, host: str, port: int) -> None:
    """Serve the page until SIGINT or SIGTERM."""
    # Gradio asks its own server whether it is there: not through a proxy.
    os.environ["no_proxy"] = ",".join(filter(None, [os.environ.get("no_proxy"), "localhost", host]))
    page.queue()
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        mcp_server=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        max_file_size=LARGEST_FILE,
        theme=THEME,
        css=STYLE,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, the uploads being deleted
    log(f"{page.local_url} in a browser shows the page; Ctrl-C ends it")
    page.block_thread()
