"""examples/demo.py: asked over its own server, it gives the scores of the stages."""

import json
import os
import runpy
import sys

import gradio as gr
import httpx
import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import ROOT, random_sentences, save_telling_encoders
from gradio_client import Client
from gradio_client.exceptions import AppError

from transencoder.data.tables import read_pairs
from transencoder.inference import Inference
from transencoder.scoring import Teachers

DEMO = ROOT / "examples" / "demo.py"


@pytest.fixture(scope="module")
def run(bi_encoder, tiny_bert, tmp_path_factory):
    """What a finished run leaves for the demo."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "best").mkdir()
    save_telling_encoders(folder / "best", tiny_bert)
    for kind in ("bi", "cross"):
        (folder / "best" / kind).rename(folder / "best" / f"{kind}-encoder")
    encoders = [{"cycle": 0, "path": str(bi_encoder)}, {"cycle": 1, "path": "cycle-1"}]
    (folder / "results.json").write_text(json.dumps({"encoders": encoders, "search": {"rank_by": "bi"}}))
    return folder


@pytest.fixture
def client(run, tmp_path, monkeypatch):
    """A client of the page, served by a thread of this process."""
    sentences = tmp_path / "sentences.txt"
    sentences.write_text(
        "\n".join(["a " * 1500, *random_sentences(80), "", "where is my parcel", "where is my parcel"]) + "\n"
    )
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    monkeypatch.setattr(sys, "argv", [str(DEMO), str(run), str(sentences)])
    pages, launch = [], gr.Blocks.launch

    def launch_in_thread(page, **options):
        pages.append(page)
        return launch(page, **options, prevent_thread_lock=True, quiet=True)

    monkeypatch.setattr(gr.Blocks, "launch", launch_in_thread)
    runpy.run_path(str(DEMO), run_name="__main__")
    yield Client(pages[0].local_url, verbose=False)
    pages[0].close()


def test_scores_are_those_of_the_stages_and_a_sentence_is_found(client, run, bi_encoder, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    first, second = "how do i pay my order", "cancel the plan"
    (tmp_path / "pairs.txt").write_text(f"{first}||{second}\n{second}||{second}\n")
    pairs, accelerator = read_pairs([str(tmp_path / "pairs.txt")]), Accelerator(cpu=True)
    rows = dict(client.predict(first, second, api_name="/score")["data"])
    folders = {"start": bi_encoder}
    folders |= {f"{kind}-encoder": run / "best" / f"{kind}-encoder" for kind in ("bi", "cross")}
    for name, folder in folders.items():
        (scores,) = Teachers([str(folder)], both_orders=True).score([pairs], Inference(accelerator))
        assert rows[name] == pytest.approx(scores[0], abs=1e-3), name
    assert rows["mean of both"] == pytest.approx((rows["bi-encoder"] + rows["cross-encoder"]) / 2, abs=2e-3)

    found = client.predict("where is my parcel", 7, api_name="/search")["data"]
    assert len(found) == 7
    (itself,) = [row for row in client.predict("where is my parcel", 50, api_name="/search")["data"] if row[2] == 1]
    assert itself[0] == "where is my parcel"
    cosines = [row[2] for row in found]
    assert cosines == sorted(cosines, reverse=True)  # results.json says so


def test_duplicates_are_exact_repeats_and_then_the_nearest_pairs(client):
    rows = client.predict(0, api_name="/duplicates")["data"]
    assert rows[0] == ["where is my parcel", "(the same, 2 times)", 1]
    assert len(rows) > 10 and all(first != second for first, second, *_ in rows)
    cosines = [row[2] for row in rows[1:]]
    assert cosines == sorted(cosines, reverse=True)
    some = client.predict(cosines[5], api_name="/duplicates")["data"]
    assert some == [row for row in rows if row[2] >= cosines[5]]


def test_examples_are_sentences_of_the_file(client, tmp_path):
    """Of the first ones, and of none that is too long to be asked for."""
    sentences = (tmp_path / "sentences.txt").read_text().splitlines()
    samples = [part["props"]["samples"] for part in client.config["components"] if part["type"] == "dataset"]
    pairs, queries = samples
    assert queries == [[text, 10] for text in sentences[1:4]]
    assert {pair[0] for pair in pairs} == set(sentences[1:4])
    assert all(first != second and second in sentences for first, second in pairs)


def test_long_texts_uploads_other_hosts_and_monitoring_are_refused(client):
    with pytest.raises(AppError, match="At most 2000 characters"):
        client.predict("a" * 2001, "b", api_name="/score")
    with pytest.raises(AppError, match="At most 2000 characters"):
        client.predict("a" * 2001, 5, api_name="/search")
    url = client.src.rstrip("/")
    assert httpx.get(f"{url}/config").status_code == 200
    assert httpx.get(f"{url}/config", headers={"Host": "evil.example"}).status_code == 400
    for page in ("monitoring", "monitoring/summary"):
        assert httpx.get(f"{url}/{page}").status_code == 403
    files = {"files": ("a.parquet", b"0" * 2000)}
    assert httpx.post(f"{url}/gradio_api/upload", files=files).status_code == 413


def test_the_last_models_and_a_column_of_a_table_are_taken(run, tmp_path, monkeypatch):
    (tmp_path / "last").symlink_to(run / "best")
    (tmp_path / "results.json").write_text('{"encoders": [], "search": null}')
    (tmp_path / "tickets.csv").write_text("id;question\n1;where is it\n2;where is it\n3;\n4;cancel my plan\n")
    words = [str(DEMO), str(tmp_path), str(tmp_path / "tickets.csv"), "--columns", "sentence=question"]
    monkeypatch.setattr(sys, "argv", words)
    arguments = runpy.run_path(str(DEMO))["parse"]()
    assert arguments.models == tmp_path / "last"
    assert arguments.counts == {"where is it": 2, "cancel my plan": 1}


@pytest.mark.parametrize("missing", ["run", "sentences"])
def test_what_is_missing_is_one_line(run, tmp_path, monkeypatch, capsys, missing):
    words = [str(tmp_path / "none") if missing == "run" else str(run), str(tmp_path / "none.txt")]
    monkeypatch.setattr(sys, "argv", [str(DEMO), *words])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(DEMO), run_name="__main__")
    assert "none" in capsys.readouterr().err.splitlines()[-1]
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
