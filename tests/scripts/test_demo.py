"""Trying models: which ones, their scores, search in an uploaded file; and the page in a real browser."""

import importlib.util
import re
import shutil
import signal
import socket
import subprocess

import datasets
import numpy as np
import pytest
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import launch_command, random_sentences, save_telling_encoders

from transencoder import demo as demo_module
from transencoder.config.tools import DemoArguments
from transencoder.demo import Choice, Demo, choose_models
from transencoder.embeddings import run_on_texts
from transencoder.encoders import load_encoder
from transencoder.errors import InputError
from transencoder.runtime.files import write_json
from transencoder.scoring import Teachers, score_with
from transencoder.search.index import index_in_memory

PAIR = ("how do i pay my order", "cancel the plan")
DEV, TEST = ("gold", "dev"), ("gold", "test")


@pytest.fixture(scope="module")
def models(bi_encoder, tiny_bert, tmp_path_factory):
    """Folders "start", "bi" and "cross", with weights that make scores differ."""
    folder = tmp_path_factory.mktemp("demo-models")
    (folder / "start").symlink_to(bi_encoder)
    save_telling_encoders(folder, tiny_bert)
    return {kind: str(folder / kind) for kind in ("start", "bi", "cross")}


def on_cpu():
    """An Accelerator in float32, whatever ran before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def demo(models):
    encoders = [load_encoder(models[kind]).eval() for kind in ("bi", "cross", "start")]
    return Demo(Choice("bi"), *encoders, on_cpu(), candidates=12, columns=None, seed=0)


def make_run(folder, models, dev=(60, 70, 65, 50, 75, 80), **section):
    """A finished run of two students and one cycle.

    Args:
        dev: scores on the dev set: of the starts, the cross- and the bi-encoders of students a and b.
    """
    students = [{"name": "a", "plm": "x"}, {"name": "b", "plm": "y"}]
    plan = {
        "students": students,
        "sentences": "s.txt",
        "pairs": "p.tsv",
        "tasks": "gold=t.tsv",
        "dev": "gold.dev=d.tsv",
    }
    folder.mkdir()
    recipe = {"run_transencoder": {**plan, **section, "cycles": 1}, "score_pairs": {"pooling": "cls"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    places = [f"contrastive/{name}" for name in "ab"]
    places += [f"cycle-1/{kind}-encoder/{name}" for kind in ("cross", "bi") for name in "ab"]
    entries = {"start": [], "cycle-1": []}
    for place, value in zip(places, dev, strict=True):
        kind = "cross" if "cross" in place else "bi"
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).symlink_to(models["cross" if kind == "cross" else "bi" if "cycle" in place else "start"])
        for (task, split), measured in ((DEV, value), (TEST, 50)):
            entry = {"encoders": [f"elsewhere/{place}"], "kind": kind, "task": task, "split": split}
            entries["start" if "contrastive" in place else "cycle-1"].append(
                {**entry, "metric": "auc", "value": measured}
            )
    for name, rows in entries.items():
        (folder / name).mkdir(exist_ok=True)
        write_json(folder / name / "results.json", rows)
    return folder


# --- which models ----------------------------------------------------------------------------------------------------


def test_a_run_gives_its_best_models_and_the_start_of_their_student(tmp_path, models):
    run = make_run(tmp_path / "run", models)
    choice = choose_models(DemoArguments(run=str(run)))
    assert choice == Choice(
        f"{run}/cycle-1/bi-encoder/b", f"{run}/cycle-1/cross-encoder/a", f"{run}/contrastive/b", "cls"
    )
    for kind in ("bi", "cross"):
        shutil.copytree(models[kind], run / "best" / f"{kind}-encoder")
    choice = choose_models(DemoArguments(run=str(run), start=models["bi"]))  # what is named wins
    assert choice == Choice(f"{run}/best/bi-encoder", f"{run}/best/cross-encoder", models["bi"], "cls")


def test_a_start_that_is_best_or_was_ready_is_found(tmp_path, models):
    best = make_run(tmp_path / "best", models, dev=(99, 70, 65, 50, 75, 80))
    choice = choose_models(DemoArguments(run=str(best)))
    assert choice.start == choice.bi_encoder == f"{best}/contrastive/a"
    ready = [{"name": "a", "plm": "x"}, {"name": "b", "plm": "y", "bi_encoder": models["start"]}]
    run = make_run(tmp_path / "ready", models, students=ready)
    text = (run / "start" / "results.json").read_text()
    (run / "start" / "results.json").write_text(text.replace("elsewhere/contrastive/b", models["start"]))
    choice = choose_models(DemoArguments(run=str(run)))
    assert choice.start == models["start"] and choice.bi_encoder == f"{run}/cycle-1/bi-encoder/b"


def test_a_run_without_cross_encoders_gives_none(tmp_path, models):
    run = make_run(tmp_path / "run", models, alternate=False)
    assert choose_models(DemoArguments(run=str(run))).cross_encoder is None


# --- scores and search -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(models):
    """The scores of PAIR as score_pairs.py computes them, with `both_orders`."""
    pairs = datasets.Dataset.from_dict({"sentence1": PAIR[:1], "sentence2": PAIR[1:]})
    names = {"start": ["start"], "bi": ["bi"], "cross": ["cross"], "both": ["bi", "cross"]}
    teachers = {key: Teachers([models[name] for name in value], both_orders=True) for key, value in names.items()}
    return {key: float(score_with(teacher, [pairs], on_cpu(), 512)[0][0]) for key, teacher in teachers.items()}


def test_scores_are_those_of_scoring_a_file(demo, expected):
    found = demo.score(f" {PAIR[0]}\n", PAIR[1])
    assert list(found) == ["start", "trained"] and list(found["start"]) == ["bi-encoder"]
    assert found["start"]["bi-encoder"] == pytest.approx(expected["start"], abs=1e-5)
    trained = [found["trained"][name] for name in ("bi-encoder", "cross-encoder", "both")]
    np.testing.assert_allclose(trained, [expected[name] for name in ("bi", "cross", "both")], atol=1e-5)
    assert len({round(value, 3) for value in expected.values()}) == 4  # so that no two could be mixed up


def test_only_what_is_there_is_scored(demo, expected):
    alone = Demo(demo.choice, demo.bi_encoder, None, None, demo.accelerator, 12, None, 0)
    assert alone.score(*PAIR) == {"trained": {"bi-encoder": pytest.approx(expected["bi"], abs=1e-5)}}
    corpus = alone.encode("x", random_sentences(20))
    results = alone.search(corpus, "cancel my plan", 3)
    assert [found.before for found in results] == [1, 2, 3] and results[0].hit.rerank is None


def test_an_index_in_memory_holds_each_sentence_beside_its_vector(demo):
    sentences, seen = random_sentences(150), []

    def track(blocks):
        seen.extend(len(block) for block in blocks)
        return iter(blocks)

    index = index_in_memory(sentences, demo.bi_encoder, demo.accelerator, 0, track)
    vectors = run_on_texts(demo.bi_encoder, sentences, accelerator=demo.accelerator)
    np.testing.assert_allclose(index.vectors.reconstruct_n(0, 150), vectors, atol=1e-5)
    assert index.texts(np.arange(150)) == sentences and seen == [64, 64, 22]


def test_search_re_ranks_and_says_where_a_result_was_before(demo):
    sentences = random_sentences(40)
    corpus = demo.encode("x", sentences)
    cosines = run_on_texts(demo.bi_encoder, [sentences[7], *sentences], accelerator=demo.accelerator)
    cosines = cosines[1:] @ cosines[0]
    columns = [[sentences[7]] * 40, sentences]
    orders = [run_on_texts(demo.cross_encoder, *c, accelerator=demo.accelerator) for c in (columns, columns[::-1])]
    both = cosines + np.mean(orders, axis=0)
    retrieved = np.argsort(-cosines, kind="stable")
    best = sorted(retrieved[:12], key=lambda row: -both[row])
    found = demo.search(corpus, sentences[7], 12)
    assert [one.hit.sentence for one in found] == [sentences[row] for row in best]
    assert [retrieved[one.before - 1] for one in found] == best
    assert len(demo.search(corpus, sentences[7], 40)) == 40  # more than the candidates, and all there are


def test_what_cannot_be_done_is_told_in_one_line(demo, tmp_path, monkeypatch):
    corpus = demo.encode("few.txt", ["how do i pay", "cancel my plan"])
    for work, message in (
        (lambda: demo.score(" ", "a"), "the first sentence is empty"),
        (lambda: demo.score("a", None), "the second sentence is empty"),
        (lambda: demo.search(corpus, "\n", 1), "the query is empty"),
        (lambda: demo.search(None, "a", 1), "nothing to search yet: choose a file of sentences"),
        (lambda: demo.search(corpus, "a", 3), "few.txt: 3 results of 2 sentences; ask for 1 to 2"),
        (lambda: demo.search(corpus, "a", 0), "few.txt: 0 results of 2 sentences; ask for 1 to 2"),
    ):
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            work()
    monkeypatch.setattr(demo_module, "MOST_SENTENCES", 2)
    for name, content, message in (
        ("empty.txt", b"", "empty.txt: the file is empty"),
        ("one.txt", b"a\na\n", "one.txt: fewer than two distinct sentences"),
        ("latin.txt", "Grüße\nb\n".encode("latin-1"), "latin.txt: not UTF-8 text"),
        ("a.docx", b"a\nb\n", "a.docx: unknown format; known: .txt"),
        ("blank.txt", b"a\n\nb\n", "blank.txt: row 2: sentence is empty"),
        ("columns.csv", b"a,b\n1,2\n", "columns.csv: no column 'sentence'; it has: a, b"),
        ("many.txt", b"a\nb\nc\n", "many.txt: 3 sentences; at most 2 here"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"^{re.escape(message)}"):
            demo.upload(str(tmp_path / name))
    (tmp_path / "good.csv").write_bytes(b"sentence,x\nhow do i pay,1\ncancel,2\n")
    good = demo.upload(str(tmp_path / "good.csv"))
    assert good.name == "good.csv" and good.index.texts(np.arange(2)) == ["how do i pay", "cancel"]


# --- the script ------------------------------------------------------------------------------------------------------


def test_the_script_refuses_in_one_line_before_any_model_is_loaded(models, tmp_path, run_script, monkeypatch):
    monkeypatch.setattr(demo_module, "load_encoder", lambda *_: pytest.fail("loaded"))
    run, bi = make_run(tmp_path / "run", models), ["--bi_encoder", models["bi"]]
    unfinished = make_run(tmp_path / "unfinished", models)
    (unfinished / "cycle-1" / "results.json").unlink()
    odd = make_run(tmp_path / "odd", models)
    write_json(odd / "cycle-1" / "results.json", [])
    (tmp_path / "one.txt").write_text("one\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for words, message in (
            ([], "--run FOLDER of a finished run, or --bi_encoder MODEL"),
            (["--run", tmp_path], "not a run of run_transencoder.sh (no recipe.yaml)"),
            (["--run", tmp_path / "none"], "not a run of run_transencoder.sh (no recipe.yaml)"),
            (["--run", unfinished], "run_transencoder.sh has not finished there"),
            (["--run", odd], "not all of its encoders were measured on the same sets"),
            (["--run", run, "--cross_encoder", tmp_path / "none"], "none: no such folder"),
            (["--bi_encoder", models["cross"]], "a cross-encoder, where a bi-encoder is needed"),
            ([*bi, "--cross_encoder", models["start"]], "is not a cross-encoder"),
            ([*bi, "--start", tmp_path], "not an encoder (no config.json)"),
            ([*bi, "--port", port], f"--port {port}: already in use"),
            ([*bi, "--port", 70000], "--port 70000: must be from 1 to 65535"),
            ([*bi, "--host", "192.0.2.1"], "--host 192.0.2.1 --port 7860: cannot listen there"),
            ([*bi, "--host", "x" * 80], "cannot listen there"),
        ):
            result = run_script("demo.py", *words)
            assert result.returncode == 2 and message in result.stderr, (words, result.stderr)
            assert len(result.stderr.splitlines()) == 1 and not result.stdout
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "gradio" else find(name, *more)
    )
    result = run_script("demo.py", *bi, "--port", port)
    assert result.returncode == 2 and result.stderr.endswith("not installed: pip install gradio\n")


# --- in a browser ----------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
# Writes down to whom the script talks, and runs it.
LISTENING = """
import runpy, sys
file = open(sys.argv[1], "w")
def hook(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
        print(arguments[0] if event == "socket.getaddrinfo" else arguments[1][0], file=file, flush=True)
sys.addaudithook(hook)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def on_page(test):
    """Mark a test that needs a browser."""
    return pytest.mark.browser(pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")(test))


@pytest.fixture(scope="module")
def served(models, tmp_path_factory):
    """The page of a run, served by the script: its address and the file of all that the script talked to."""
    folder = tmp_path_factory.mktemp("served")
    run = make_run(folder / "run", models)
    (folder / "sentences.txt").write_text("\n".join(random_sentences(30)) + "\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["--run", run, "--sentences", folder / "sentences.txt", "--port", port, "--mixed_precision", "no"]
    command = launch_command("demo.py", *words, direct=True)
    command["args"][1:1] = ["-c", LISTENING, str(folder / "talked-to")]
    command["env"] |= {"TMPDIR": str(folder)}
    server = subprocess.Popen(**command, stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        for line in server.stderr:
            lines.append(line)
            if "in a browser" in line:
                break
        else:
            pytest.fail("".join(lines))
        yield f"http://127.0.0.1:{port}", folder / "talked-to"
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        assert not list(folder.glob("trans-encoder-*"))  # nothing is left of what was uploaded
    finally:
        server.kill()


@pytest.fixture(scope="module")
def page(served, tmp_path_factory):
    """The page in a browser, with `asked`, the addresses of all that it loaded."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        profile = tmp_path_factory.mktemp("profile")
        context = playwright.chromium.launch_persistent_context(profile, executable_path=CHROMIUM, args=FLAGS)
        page = context.pages[0]
        page.set_default_timeout(60_000)
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(served[0])
        page.wait_for_selector("#first textarea")
        yield page
        context.close()


def cells(page, table):
    """The text of a table's rows, once it is there."""
    page.wait_for_selector(f"{table} td")
    return [
        [cell.inner_text().replace("\u2013", "-") for cell in row.query_selector_all("td")]
        for row in page.query_selector_all(f"{table} tbody tr")
    ]


def error_on(page):
    """The text of the error that the page shows, which is then put away."""
    shown = page.wait_for_selector(".toast-body")
    text = shown.inner_text()
    page.click(".toast-close")
    page.wait_for_selector(".toast-body", state="detached")
    return text


def choose_file(page, name, content):
    page.set_input_files("#file input[type=file]", [{"name": name, "mimeType": "text/plain", "buffer": content}])


@on_page
def test_the_page_shows_the_scores_of_two_sentences(page, expected):
    page.fill("#first textarea", PAIR[0])
    page.click("#compare")
    assert "the second sentence is empty" in error_on(page)
    page.fill("#second textarea", PAIR[1])
    page.click("#compare")
    start, bi, cross, both = (f"{expected[name]:.3f}" for name in ("start", "bi", "cross", "both"))
    assert cells(page, "#scores") == [
        ["bi-encoder", start, "", bi, ""],
        ["cross-encoder", "-", "", cross, ""],
        ["mean of both", "-", "", both, ""],
    ]


@on_page
def test_a_sentence_finds_itself_first_in_the_sentences_of_the_command_line(page):
    page.get_by_role("tab", name="Search in a file").click()
    page.wait_for_selector("#status >> text=30 sentences of sentences.txt")
    page.fill("#query textarea", random_sentences(30)[4])
    page.press("#query textarea", "Enter")
    rows = cells(page, "#found")
    assert [row[0] for row in rows] == [str(place) for place in range(1, 11)]
    assert rows[0][1] == random_sentences(30)[4] and rows[0][3] == "1.000" and rows[0][5] == "1"


@on_page
def test_an_uploaded_file_is_searched_and_a_bad_one_refused_on_the_page(page):
    page.get_by_role("tab", name="Search in a file").click()
    choose_file(page, "latin.txt", "how do i pay\nGrüße\n".encode("latin-1"))
    assert error_on(page).endswith("latin.txt: not UTF-8 text")
    page.click("#search")  # not what was there before
    assert error_on(page).endswith("nothing to search yet: choose a file of sentences")
    page.click("#file button[aria-label='Clear']")
    page.wait_for_selector("#status >> text=30 sentences of sentences.txt")
    odd = "cancel <b>my</b> plan ${1+1} {{x}}"
    choose_file(page, "few.txt", f"how do i pay\n{odd}\n".encode())
    page.wait_for_selector("#status >> text=2 sentences of few.txt")
    page.fill("#query textarea", odd)
    page.click("#search")
    assert error_on(page).endswith("few.txt: 10 results of 2 sentences; ask for 1 to 2")
    page.fill("#k input[type=number]", "2")
    page.press("#k input[type=number]", "Tab")
    page.click("#search")
    assert [row[1] for row in cells(page, "#found")] == [odd, "how do i pay"]


@on_page
def test_nothing_comes_from_another_machine(page, served):
    address, talked_to = served
    assert len(page.asked) > 10 and all(url.startswith((address, "data:", "blob:")) for url in page.asked)
    assert set(talked_to.read_text().split()) == {"127.0.0.1"}
