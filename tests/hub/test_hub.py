"""Publishing, against a Hub on the loopback device: what gets there, what cannot go wrong, and what the cards say."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import ROOT, launch, random_pairs, warm_python, write_jsonl, write_measured
from huggingface_hub import HfApi, ModelCard, constants
from support.loopback_hub import TOKEN, LoopbackHub

from transencoder.config.options import RunTarget
from transencoder.config.parsing import parse_stage
from transencoder.config.recipes import read_recipe
from transencoder.data.pools import input_files
from transencoder.data.scores import write_scores
from transencoder.data.tables import read_pairs
from transencoder.data.tasks import TASKS, load_task
from transencoder.encoders import load_bi_encoder, load_cross_encoder
from transencoder.errors import InputError
from transencoder.hub import card, releases
from transencoder.hub import push as hub
from transencoder.inference import Inference
from transencoder.model_files import ModelOptions
from transencoder.run.plan import load_plan
from transencoder.runtime.files import write_json
from transencoder.runtime.records import identity, write_run
from transencoder.scoring import Teachers

TARGET = RunTarget(hub_model_id="acme/tiny")
HISTORY = dict(examples=96, steps=6, kept_step=6, world_size=1, mixed_precision="no", dev=50.0, dev_metric="spearman")


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub that this process, and those it starts, take for the Hub; waiting for it is noted, not done."""
    with LoopbackHub() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        server.waits = []
        clock = SimpleNamespace(sleep=server.waits.append, time=time.time)
        monkeypatch.setattr("huggingface_hub.utils._http.time", clock)
        variables = dict(HF_ENDPOINT=server.url, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1", HF_TOKEN=TOKEN)
        for name, value in (variables | {"HF_HOME": str(tmp_path / "hf-home")}).items():
            monkeypatch.setenv(name, value)
        yield server


# --- a run as the driver leaves it, without the training -------------------------------------------------------------


def save_encoder(kind, plm, folder, seed):
    torch.manual_seed(seed)
    plain = ModelOptions("mean")
    encoder = load_cross_encoder(str(plm)) if kind == "cross" else load_bi_encoder(str(plm), plain)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    folder.mkdir(parents=True)
    encoder.save_pretrained(folder)


def record(stage, folder, *words):
    history = HISTORY | ({"swap": True} if stage == "distill_bi2cross" else {})
    arguments = parse_stage(stage, argv=[*map(str, words), "--output_dir", str(folder)])
    write_run(arguments, stage, "complete", identity(arguments, input_files(arguments)), **history)


def results(folder, encoders, values):
    """results.json with a Spearman of our choice on dev and test for each encoder."""
    entries = []
    for encoder, (dev, test) in zip(encoders, values, strict=True):
        kind = "cross" if "cross" in str(encoder) else "bi"
        for split, value in (("dev", dev), ("test", test)):
            facts = dict(encoders=[str(encoder)], kind=kind, task="mine", split=split, n=40)
            entries += [dict(facts, metric="spearman", value=value), dict(facts, metric="pearson", value=value - 1)]
    folder.mkdir(exist_ok=True)
    write_json(folder / "results.json", entries)


@pytest.fixture(scope="module")
def finished(tiny_bert, corpus, tmp_path_factory):
    """Two cycles of one student, the first of which is the best on dev."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    pairs, start = read_pairs([str(corpus / "pairs.jsonl")]), run / "contrastive" / "one"
    save_encoder("bi", tiny_bert, start, 0)
    dev = ["--dev", corpus / "dev.jsonl"]
    words = ["--model_name_or_path", tiny_bert, "--sentences", corpus / "sentences.txt", *dev]
    record("train_contrastive", start, *words)
    results(run / "start", [start], [(50.0, 51.0)])
    teacher = start
    for cycle, values in ((1, [(61.0, 60.0), (63.0, 62.0)]), (2, [(60.0, 64.0), (62.0, 65.0)])):
        folder = run / f"cycle-{cycle}"
        folder.mkdir()
        cross, bi = folder / "cross-encoder" / "one", folder / "bi-encoder" / "one"
        for kind, model, base, taught_by in (("cross", cross, tiny_bert, teacher), ("bi", bi, start, cross)):
            scores = folder / f"{'bi' if kind == 'cross' else 'cross'}-scores.parquet"
            facts = {"encoders": [str(taught_by)], "pairs": [str(corpus / "pairs.jsonl")], "both_orders": True}
            write_scores(scores, pairs, np.linspace(0, 1, len(pairs), dtype=np.float32), facts)
            save_encoder(kind, tiny_bert, model, 10 * cycle + (kind == "bi"))
            stage = "distill_bi2cross" if kind == "cross" else "distill_cross2bi"
            record(stage, model, "--model_name_or_path", base, "--scores", scores, *dev, "--seed", 7)
        results(folder, [cross, bi], values)
        teacher = bi
    student = {"name": "one", "plm": str(tiny_bert)}
    tests = write_jsonl(corpus / "seen.jsonl", random_pairs(64)[:10] + random_pairs(30, seed=3))
    section = {"students": [student], "sentences": str(corpus / "sentences.txt"), "pairs": str(corpus / "pairs.jsonl")}
    section |= {"dev": f"mine.dev={corpus / 'dev.jsonl'}", "tasks": [f"mine={tests}"], "cycles": 2}
    (run / "recipe.yaml").write_text(yaml.safe_dump({"run_transencoder": section}))
    (run / "progress.png").write_bytes(b"\x89PNG and so on")
    return run


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "runs" / "tiny")


def push(run, target=TARGET):
    return hub.push(run, releases.run_repositories(run, target), target)


def contents(folder):
    """Path -> checksum of everything in a folder, but for the lock."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".push.lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def state(server):
    return {
        name: ([commit.oid for commit in repo.commits], repo.tags, repo.private) for name, repo in server.repos.items()
    }


# --- what gets there -------------------------------------------------------------------------------------------------


def test_a_run_becomes_two_private_repositories_with_a_tag_for_each_cycle(server, run, capsys):
    before = contents(run)
    assert push(run)
    assert sorted(server.repos) == ["acme/tiny-bi", "acme/tiny-cross"]
    bi, cross = server.repos["acme/tiny-bi"], server.repos["acme/tiny-cross"]
    assert bi.private and cross.private
    assert list(bi.tags) == ["cycle-0", "cycle-1", "cycle-2"] and list(cross.tags) == ["cycle-1", "cycle-2"]
    folders = {"cycle-0": "contrastive/one", "cycle-1": "cycle-1/bi-encoder/one", "cycle-2": "cycle-2/bi-encoder/one"}
    for tag, folder in folders.items():
        assert bi.at(tag).files["model.safetensors"] == (run / folder / "model.safetensors").read_bytes()
    # main went back to the first cycle, which is the best on dev.
    assert bi.commits[-1].message == "cycle 1, bi-encoder" and len(bi.commits) == 5
    assert bi.at("main").files == bi.at("cycle-1").files
    assert cross.at("main").files["model.safetensors"] == cross.at("cycle-1").files["model.safetensors"]
    expected = {".gitattributes", "README.md", "recipe.yaml", "progress.png", "config.json", "model.safetensors"}
    expected |= {"tokenizer.json", "tokenizer_config.json"}
    expected |= {"modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"}
    assert set(cross.at("main").files) == expected
    assert set(bi.at("main").files) == expected | {"1_Pooling/config.json"}
    assert contents(run) == before
    assert "Pushed cycle 2, cross-encoder to acme/tiny-cross, tag cycle-2" in capsys.readouterr().err


def test_pushing_twice_changes_nothing(server, run, capsys):
    push(run)
    before, uploads = state(server), server.count("PUT", "/lfs/")
    capsys.readouterr()
    assert push(run)
    assert state(server) == before and server.count("PUT", "/lfs/") == uploads == 6
    assert capsys.readouterr().err == ""


def test_what_a_later_cycle_adds_is_all_that_is_pushed(server, run, capsys):
    (run / "cycle-2" / "results.json").rename(run / "hidden")
    assert push(run)
    assert list(server.repos["acme/tiny-bi"].tags) == ["cycle-0", "cycle-1"]
    (run / "hidden").rename(run / "cycle-2" / "results.json")
    capsys.readouterr()
    assert push(run)
    said = capsys.readouterr().err
    assert said.count("tag cycle-") == 2 and said.count("tag cycle-2") == 2


def test_main_is_at_the_last_cycle_where_no_dev_set_chose(server, run):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    del recipe["run_transencoder"]["dev"]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for path in run.glob("*/results.json"):
        path.write_text(json.dumps([entry for entry in json.loads(path.read_text()) if entry["split"] == "test"]))
    push(run)
    assert [commit.message for commit in server.repos["acme/tiny-bi"].commits][1:] == [
        "start, bi-encoder",
        "cycle 1, bi-encoder",
        "cycle 2, bi-encoder",
    ]


def test_a_public_repository_is_asked_for(server, run):
    assert push(run)
    assert push(run, dataclasses.replace(TARGET, hub_public=True))
    assert not any(repo.private for repo in server.repos.values())
    assert push(run)  # and it stays open
    assert not any(repo.private for repo in server.repos.values())


def test_every_student_has_a_pair_of_repositories(run):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    section = recipe["run_transencoder"]
    section["students"].append({"name": "two", "plm": "org/two"})
    plan = load_plan(recipe, "x")
    assert releases.repository_id(TARGET, plan, "two", "cross") == "acme/tiny-two-cross"
    with pytest.raises(InputError, match="acme/tiny-a--b-bi"):
        section["students"][1]["name"] = "a--b"
        releases.check_run_target(TARGET, load_plan(recipe, "x"))


def test_a_start_that_the_recipe_names_is_not_published(server, run):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    ready = shutil.move(run / "contrastive" / "one", run.parent / "ready")
    recipe["run_transencoder"]["students"][0]["bi_encoder"] = str(ready)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    results(run / "start", [ready], [(99.0, 51.0)])
    assert push(run)
    assert list(server.repos["acme/tiny-bi"].tags) == ["cycle-1", "cycle-2"]
    assert server.repos["acme/tiny-bi"].commits[-1].message == "cycle 1, bi-encoder"


# --- what is worse than its start ------------------------------------------------------------------------------------


def fall(run, cycle_2_noise=2.0, start="contrastive/one"):
    """Measure again, on a test set only, so that the last bi-encoder is that much worse than the start."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["run_transencoder"].pop("dev", None)
    rows = [{"label": int(row.pop("score") > 2.5), **row} for row in random_pairs(200, seed=3)]
    path = write_jsonl(run.parent / "labelled.jsonl", rows)
    recipe["run_transencoder"]["tasks"] = [f"mine={path}"]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    task, draws = load_task(f"mine={path}"), np.random.default_rng(0)

    def scores(noise):
        return [np.asarray(task.pairs["label"]) + noise * draws.normal(size=200)]

    write_measured(run / "start", [str(run / start)], [task], [scores(0.5)])
    for cycle, noise in ((1, 0.1), (2, cycle_2_noise)):
        names = [str(run / f"cycle-{cycle}/{kind}-encoder/one") for kind in ("cross", "bi")]
        write_measured(run / f"cycle-{cycle}", names, [task], [scores(0.1), scores(noise)])


def first_line(files):
    """Of a card, behind its title."""
    return files["README.md"].decode().partition("\n# ")[2].split("\n\n")[1]


def test_main_stays_at_a_start_that_is_better_unless_the_worse_one_is_asked_for(server, run):
    fall(run)
    assert push(run)
    bi, cross = server.repos["acme/tiny-bi"], server.repos["acme/tiny-cross"]
    assert list(bi.tags) == ["cycle-0", "cycle-1", "cycle-2"] and bi.at("main").files == bi.at("cycle-0").files
    text = bi.at("main").files["README.md"].decode()
    assert "`main` is at start, bi-encoder, as cycle 2, bi-encoder, the latest, is worse." in text
    assert first_line(bi.at("cycle-1").files).startswith(
        "**This bi-encoder is better than the start**, the bi-encoder's tag `cycle-0`: +"
    )
    worse = first_line(bi.at("cycle-2").files)
    assert worse.startswith("**This bi-encoder is worse than the start: use the bi-encoder's tag `cycle-0`**: -")
    assert worse.endswith(" on mine, AUC x 100.")
    assert "the start" not in first_line(bi.at("cycle-0").files)
    assert first_line(cross.at("main").files).startswith("**This cross-encoder is better than the start**, ")
    assert push(run, dataclasses.replace(TARGET, push_worse=True))
    assert bi.at("main").files["model.safetensors"] == bi.at("cycle-2").files["model.safetensors"]


def test_nothing_is_pushed_that_is_worse_than_somebodys_own_model(server, run, capsys):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    ready = shutil.move(run / "contrastive" / "one", run.parent / "ready")
    (ready / "run.json").unlink()
    (ready / "README.md").write_text("---\nlicense: mit\n---\n\n# all-Good-v2\nA model.\n")
    recipe["run_transencoder"]["students"][0]["bi_encoder"] = str(ready)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    fall(run, start=ready)
    assert push(run)
    assert list(server.repos) == ["acme/tiny-cross"]
    assert "Not pushed to acme/tiny-bi: VERDICT worse: bi-encoder -" in capsys.readouterr().err
    fall(run, 0.1, start=ready)
    assert push(run)
    text = server.repos["acme/tiny-bi"].at("main").files["README.md"].decode()
    assert "Adapted from `all-Good-v2` without further labels by" in text and "without training labels" not in text
    assert "No labels were used in training beyond those in `all-Good-v2`." in text and "- unsupervised" not in text
    text = server.repos["acme/tiny-cross"].at("main").files["README.md"].decode()
    assert "Made from `tiny-bert`, taught by `all-Good-v2`, without further labels by" in text


def test_where_a_start_was_made_here_no_label_went_into_it(server, run):
    """The driver's flag is remembered, and a start that another run made from a language model holds no labels."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    ready = shutil.move(run / "contrastive" / "one", run.parent / "ready")
    recipe["run_transencoder"]["students"][0]["bi_encoder"] = str(ready)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    fall(run, start=ready)
    record = run / "cycle-2/bi-encoder/one/run.json"
    write_json(record, json.loads(record.read_text()) | {"merged_with_start": {"share": 0.25, "by": "dev"}})
    target = dataclasses.replace(TARGET, push_worse=True)
    hub.remember(run, target)
    assert hub.recall(run) == target and push(run, hub.recall(run))
    text = server.repos["acme/tiny-bi"].at("main").files["README.md"].decode()
    assert "Made from `tiny-bert` without training labels" in text and "- unsupervised" in text
    assert "\nA bi-encoder learned the scores that its teachers give to pairs of sentences, as the cosine of" in text
    assert "**This bi-encoder is worse than the start: use `ready`**: -" in text
    assert "Weights: 0.75 x the start's + 0.25 x the trained ones, the mixture that was best on the" in text


def test_a_teacher_from_outside_is_named_in_place_of_a_promise(server, run, bi_encoder, tmp_path):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    for teacher, name in (({"scores": "llm.csv"}, "llm.csv"), ({"model": str(bi_encoder)}, "bi")):
        recipe["run_transencoder"]["teachers"] = [teacher]
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        (bi, _) = releases.run_repositories(run, TARGET)
        (tmp_path / name).mkdir()
        bi.main.write(tmp_path / name, TARGET)
        text = (tmp_path / name / "README.md").read_text()
        assert f"Made from `tiny-bert`, taught by `{name}`, without further labels by" in text
        assert "unsupervised" not in text and "without training labels" not in text


def test_labels_that_came_after_the_run_are_known(server, run):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    del recipe["run_transencoder"]["dev"], recipe["run_transencoder"]["tasks"]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write_json(run / "results.json", {"verdict": "VERDICT worse: bi-encoder -3.00", "word": "worse"})
    assert push(run)
    bi = server.repos["acme/tiny-bi"]
    assert bi.at("main").files == bi.at("cycle-0").files
    assert "VERDICT" not in first_line(bi.at("main").files)  # that is the start
    assert first_line(bi.at("cycle-2").files) == "VERDICT worse: bi-encoder -3.00"
    assert b"VERDICT" not in server.repos["acme/tiny-cross"].at("main").files["README.md"]
    assert push(run, dataclasses.replace(TARGET, push_worse=True))
    assert first_line(bi.at("main").files) == "VERDICT worse: bi-encoder -3.00"


# --- what goes wrong costs nothing -----------------------------------------------------------------------------------

ALWAYS = float("inf")
FAILURES = {
    "429": (("POST", "/preupload/", 429, None, {"Retry-After": "7"}), "429 Too Many Requests"),
    "5xx": (("POST", "/preupload/", 503, None, {}), "503"),
    "5xx at the commit": (("POST", "/commit/", 500, None, {}), "500"),
    "5xx at the start": (("POST", "/repos/create", 502, None, {}), "502"),
    "5xx while uploading": (("PUT", "/lfs/", 500, None, {}), "Error while uploading"),
    "quota": (
        ("POST", "/objects/batch", 403, None, {"X-Error-Message": "Private storage is full"}),
        "storage is full",
    ),
    "quota of one file": (
        (
            "POST",
            "/objects/batch",
            200,
            {"objects": [{"oid": "ab" * 32, "size": 1, "error": {"code": 413, "message": "Storage limit reached"}}]},
            {},
        ),
        "Storage limit reached",
    ),
    "tag": (("POST", "/tag/", 500, None, {}), "500"),
    "no rights": (
        ("POST", "/repos/create", 403, None, {"X-Error-Message": "You have no rights in acme"}),
        "You have no rights in acme",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_one_line_and_is_made_up_for_later(server, run, capsys, name):
    fault, words = FAILURES[name]
    before = contents(run)
    server.fail(*fault)
    assert not push(run)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == [
        "Not pushed to acme/tiny-bi",
        "Not pushed to acme/tiny-cross",
    ]
    assert all(words in line for line in lines[:-1])
    assert lines[-1].endswith(f"to push later: python scripts/push_to_hub.py {run}")
    assert contents(run) == before
    server.faults.clear()
    assert push(run)
    assert len(server.repos["acme/tiny-bi"].tags) == 3 and len(server.repos["acme/tiny-cross"].tags) == 2


def test_the_client_tries_again_before_it_gives_up(server, run):
    server.fail("POST", "/preupload/", 503, times=2)
    server.fail("POST", "/objects/batch", 429, headers={"Retry-After": "7"}, times=1)
    assert push(run)
    assert server.waits == [1, 2, 8.0]


def test_an_upload_that_is_cut_off_starts_again(server, run):
    server.cut_uploads(2)
    assert push(run)
    files = server.repos["acme/tiny-bi"].at("cycle-0").files
    assert files["model.safetensors"] == (run / "contrastive/one/model.safetensors").read_bytes()


def test_an_upload_that_is_cut_off_for_good_leaves_no_half_of_a_model(server, run, capsys):
    server.cut_uploads(100)
    assert not push(run)
    assert "Error while uploading" in capsys.readouterr().err
    assert all(len(repo.commits) == 1 and not repo.tags for repo in server.repos.values())
    server.cut_uploads(0)
    assert push(run)


def test_a_dead_server_is_one_line_for_each_repository(server, run, capsys):
    server.stop()
    assert not push(run)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "Connection refused" in lines[0]


def test_a_commit_without_its_tag_gets_it_later(server, run):
    server.fail("POST", "/tag/", 500)
    push(run)
    server.faults.clear()
    assert push(run)
    bi = server.repos["acme/tiny-bi"]
    assert [commit.message for commit in bi.commits][1:3] == ["start, bi-encoder", "cycle 1, bi-encoder"]
    assert bi.tags["cycle-0"] == bi.commits[1].oid


def test_a_bad_token_is_one_line_that_does_not_hold_it(server, run, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_notTheRightOne")
    server.fail("GET", "/api/models/", 401, headers={"X-Error-Message": "no access for hf_notTheRightOne"})
    assert not push(run)
    said = "".join(capsys.readouterr())
    assert "401" in said and "hf_notTheRightOne" not in said and len(said.splitlines()) == 3
    assert not server.repos


def test_no_token_is_one_line(server, run, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    assert not push(run)
    assert "401" in capsys.readouterr().err.splitlines()[0]


def test_the_token_is_never_written(server, run, capsys):
    server.fail("POST", "/commit/", 400, {"error": f"bad token {TOKEN}"}, times=1)
    push(run)
    push(run)
    assert TOKEN not in "".join(capsys.readouterr())
    everything = [path.read_bytes() for path in run.rglob("*") if path.is_file()]
    everything += [content for repo in server.repos.values() for c in repo.commits for content in c.files.values()]
    assert all(TOKEN.encode() not in content for content in everything)


@pytest.mark.parametrize(
    ("files", "taken"),
    [
        ({"README.md": b"# mine\n"}, True),
        ({"README.md": b"---\ntags: [trans-encoder]\npipeline_tag: sentence-similarity\n---\n", "x.bin": b"1"}, True),
        ({"README.md": b"---\ntags: [trans-encoder]\npipeline_tag: text-ranking\n---\n", "x.bin": b"1"}, False),
        ({"README.md": b"---\npipeline_tag: sentence-similarity\n---\n", "model.gguf": b"1"}, False),
        ({"precious.gguf": b"1"}, False),
    ],
    ids=["blank", "ours", "of the other kind", "somebody else's", "without a card"],
)
def test_a_repository_of_another_kind_is_left_alone(server, run, capsys, files, taken):
    server.create("acme/tiny-bi", files)
    assert push(run) == taken
    if not taken:
        assert "acme/tiny-bi: it exists and holds something else" in capsys.readouterr().err
        assert len(server.repos["acme/tiny-bi"].commits) == 1
    assert len(server.repos["acme/tiny-cross"].tags) == 2  # the other one was pushed all the same


def test_a_tag_is_never_moved_to_other_weights(server, run, capsys):
    push(run)
    before = state(server)
    save_encoder("bi", run / "contrastive/one", run / "other", 99)
    shutil.move(run / "other/model.safetensors", run / "cycle-1/bi-encoder/one/model.safetensors")
    assert not push(run)
    assert "its tag cycle-1 holds other weights" in capsys.readouterr().err
    assert state(server) == before


# --- the cards -------------------------------------------------------------------------------------------------------


def python_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.S)


def run_cards(cards):
    """In a process that knows the Hub by HF_ENDPOINT only: what `scores` is after each block of code of each card."""
    blocks = [block for text in cards for block in re.findall(r"```python\n(.*?)```", text, re.S)]
    lines = ["import json, numpy", "found = []"]
    lines += [f"{block}found.append(float(numpy.asarray(scores).ravel()[0]))" for block in blocks]
    program = "\n".join([*lines, "print(json.dumps(found))"])
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_cards_own_code_loads_the_models_and_gives_their_scores(server, run):
    assert push(run, dataclasses.replace(TARGET, hub_public=True))
    cards = [ModelCard.load(f"acme/tiny-{kind}").content for kind in ("bi", "cross")]
    tagged = cards[0].replace('"acme/tiny-bi"', '"acme/tiny-bi", revision="cycle-2"')
    pair = [{"sentence1": "where is my parcel", "sentence2": "my package has not arrived"}]
    pairs = read_pairs([str(write_jsonl(run / "pair.jsonl", pair))])
    expected = []
    AcceleratorState._reset_state(reset_partial_state=True)  # another test may have chosen bf16 for this process
    inference = Inference(Accelerator(cpu=True, mixed_precision="no"), 4096)
    for folder in ("cycle-1/bi-encoder/one", "cycle-1/cross-encoder/one", "cycle-2/bi-encoder/one"):
        expected += 2 * [float(Teachers([str(run / folder)]).score([pairs], inference)[0][0])]
    assert len(set(expected)) == 3
    # By sentence-transformers and by transformers alone, for each card.
    assert run_cards([*cards, tagged]) == pytest.approx(expected, abs=1e-6)


def test_the_card_says_what_the_hub_understands(server, run):
    push(run, dataclasses.replace(TARGET, hub_license="apache-2.0", hub_language="en,de"))
    loaded = ModelCard.load("acme/tiny-cross", token=TOKEN)
    loaded.validate()
    data = loaded.data
    assert data.library_name == "sentence-transformers" and data.pipeline_tag == "text-ranking"
    assert data.license == "apache-2.0" and data.language == ["en", "de"] and data.model_name == "tiny-cross"
    assert {"trans-encoder", "self-distillation", "text-ranking"} <= set(data.tags)
    found = {(r.dataset_name, r.dataset_split, r.metric_type): r.metric_value for r in data.eval_results}
    assert found == {
        ("mine.dev", "dev", "spearmanr"): 61.0,
        ("mine.dev", "dev", "pearsonr"): 60.0,
        ("mine", "test", "spearmanr"): 60.0,
        ("mine", "test", "pearsonr"): 59.0,
    }


def test_the_card_says_how_the_model_was_made(server, run):
    push(run)
    text = server.repos["acme/tiny-cross"].at("main").files["README.md"].decode()
    assert "| mine | 40 | 51.00 | 60.00 |" in text and "| mine.dev | 40 | 50.00 | 61.00 |" in text
    assert "*Transductive*: 10 of the 40 pairs of `mine`" in text
    assert "`mine.dev` chose what was kept" in text
    assert "Teacher: `acme/tiny-bi` at tag `cycle-0`" in text
    assert "Data: 64 distinct pairs, without labels, from `pairs.jsonl`" in text
    assert "This is *cycle 1, cross-encoder*" in text and "| cycle 2, bi-encoder | 62.00 | 65.00 |" in text
    assert "seed 7" in text and "| `swap` | True |" in text and torch.__version__ in text
    assert "![score against half-cycle](progress.png)" in text and "liu2022transencoder" in text
    assert "scored (a, b) and (b, a)" not in text  # its teacher is a bi-encoder
    assert str(run.parent) not in text and str(Path.home()) not in text
    bi = server.repos["acme/tiny-bi"].at("main").files["README.md"].decode()
    assert "Teacher: `acme/tiny-cross` at tag `cycle-1`" in bi and "scored (a, b) and (b, a)" in bi
    start = server.repos["acme/tiny-bi"].at("cycle-0").files["README.md"].decode()
    assert "Data: 96 distinct sentences" in start and "Teacher" not in start and "| start |" not in start


def test_licence_language_and_revision_are_the_base_models(server, run, tiny_bert, monkeypatch):
    files = {path.name: path.read_bytes() for path in tiny_bert.iterdir()}
    server.create("org/base", {**files, "README.md": b"---\nlicense: mit\nlanguage: en\n---\n"}, private=False)
    huggingface_hub.hf_hub_download("org/base", "config.json")  # as training with it leaves it in the cache
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["run_transencoder"]["students"][0]["plm"] = "org/base"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for path in run.rglob("run.json"):
        path.write_text(path.read_text().replace(str(tiny_bert), "org/base"))
    assert push(run)
    loaded = ModelCard.load("acme/tiny-cross", token=TOKEN)
    assert loaded.data.license == "mit" and loaded.data.language == "en"
    assert loaded.data.base_model == "org/base" and loaded.data.to_dict()["base_model_relation"] == "finetune"
    assert f"Start: `org/base` at revision `{server.repos['org/base'].commits[-1].oid}`" in loaded.content


def test_a_folder_that_is_not_there_is_not_taken_for_a_model_of_the_hub(server):
    server.create("org/base", {"config.json": b"{}"}, private=False)
    assert card.hub_origin("org/base") == ("org/base", None)
    for name in ("runs/elsewhere", ".models/bert-tiny", "/gone/bert"):
        assert card.hub_origin(name) == (None, None)


def test_a_card_that_the_hub_refuses_is_one_line(server, run, capsys):
    assert not push(run, dataclasses.replace(TARGET, hub_license="My Own Licence"))
    assert '"license" must match' in capsys.readouterr().err.splitlines()[0]
    assert all(len(repo.commits) == 1 for repo in server.repos.values())


def test_the_papers_figures_stand_beside_ours_where_it_has_them(run):
    entries = [dict(encoders=["x"], kind="bi", split="test", n=9, metric="spearman", value=70.0, task=t) for t in "ab"]
    entries[0]["task"] = "stsb"
    facts = card.CardContent("acme/x", run, "bi", "plm", "", entries, [dict(entries[0], value=60.0)])
    assert "paper" not in card.results_table(facts)
    facts.paper = "simcse-bert-base/self/bi"
    assert card.results_table(facts).splitlines()[2:] == [
        "| stsb | 9 | 60.00 | 70.00 | 81.26 |",
        "| b | 9 | - | 70.00 | - |",
    ]


def test_whole_benchmarks_of_the_hub_are_pushed_in_its_newer_form_too(server, run):
    """Of STS13 no more than a part was measured, and QQP here is another sample than GLUE's."""
    cross = run / "cycle-1/cross-encoder/one"
    measured = json.loads((run / "cycle-1/results.json").read_text())
    for task, n in (("sts12", 3108), ("sts13", 9), ("qqp", 10_000)):
        facts = dict(encoders=[str(cross)], kind="cross", task=task, split="test", n=n)
        metrics = ["auc"] if task == "qqp" else ["spearman", "pearson"]
        measured += [dict(facts, metric=metric, value=71.23456) for metric in metrics]
    write_json(run / "cycle-1/results.json", measured)
    assert push(run)
    assert HfApi().model_info("acme/tiny-bi", expand=["evalResults"]).eval_results is None
    (found,) = HfApi().model_info("acme/tiny-cross", expand=["evalResults"]).eval_results
    assert (found.dataset_id, found.task_id, found.value) == ("mteb/sts12-sts", "STS12", 71.2346)
    assert found.dataset_revision == TASKS["sts12"].revision and found.source_url is None
    assert found.notes.startswith("Spearman's rho x 100 of a cross-encoder. ") and "*Transductive*" in found.notes
    commits = server.repos["acme/tiny-cross"].commits
    assert [".eval_results/trans-encoder.yaml" in commit.files for commit in commits] == [False, True, False, True]


def test_the_recipe_and_the_command_are_good_on_another_machine(server, run, tiny_bert, tmp_path):
    """Models have their Hub ids where these are known, bundled files their place, and all else is a placeholder."""
    server.create("distil-base", {"config.json": b"{}"}, private=False)
    named = shutil.copytree(tiny_bert, tmp_path / "copy")
    (named / "README.md").write_text("# all-Good-v2\n\n    SentenceTransformer('org/all-Good-v2')\n")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    section = recipe["run_transencoder"]
    section["students"][0] |= {"bi_encoder": str(named), "cross_encoder_plm": "distil-base"}
    section["sentences"] = ["examples/sentences.txt", str(ROOT / "examples" / "sentences.txt")]
    section["teachers"] = [{"scores": "/gone/llm.csv"}, {"model": "runs/gone"}]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert push(run)
    files = server.repos["acme/tiny-cross"].at("main").files
    (tmp_path / "published.yaml").write_bytes(files["recipe.yaml"])
    published = read_recipe(str(tmp_path / "published.yaml"))["run_transencoder"]
    student = {"name": "one", "plm": "path/to/tiny-bert", "bi_encoder": "org/all-Good-v2"}
    assert published["students"] == [student | {"cross_encoder_plm": "distil-base"}]
    assert published["sentences"] == 2 * ["examples/sentences.txt"] and published["pairs"] == "path/to/pairs.jsonl"
    assert published["dev"] == "mine.dev=path/to/dev.jsonl" and published["tasks"] == ["mine=path/to/seen.jsonl"]
    assert published["teachers"] == [{"scores": "path/to/llm.csv"}, {"model": "path/to/gone"}]
    assert published["cycles"] == 2
    text = files["README.md"].decode()
    assert "Replace each `path/to/...` with a file or model of your own" in text and "(SHA-256 `{" not in text
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "distil-base"
    stage = hub.stage_repository(run / "contrastive/one", TARGET).main.content
    assert "--model_name_or_path path/to/tiny-bert --sentences path/to/sentences.txt" in stage.command
    assert "--dev path/to/dev.jsonl" in stage.command and str(run) not in stage.command


def test_a_checksum_is_of_weights_or_a_commit(run):
    assert card._checksum({"config.json": "ab", "model.safetensors": "cd"}) == " (SHA-256 `cd`)"
    assert card._checksum("commit ef") == " (commit ef)" and card._checksum(None) == ""


def test_registered_tasks_are_named_as_the_hubs_data(run):
    entry = dict(encoders=["x"], kind="bi", task="stsb", split="test", n=1379, metric="spearman", value=70.123456)
    result = card.eval_result(entry)
    assert result.dataset_type == "mteb/stsbenchmark-sts" and len(result.dataset_revision) == 40
    assert result.metric_value == 70.1235 and result.dataset_split == "test"
    assert card.eval_result(dict(entry, task="qqp", metric="auc")).metric_type == "roc_auc"
    part = card.eval_result(dict(entry, n=200))  # it must not stand beside others' results on the whole set
    assert part.dataset_type == "stsb" and part.dataset_revision is None


# --- the scripts -----------------------------------------------------------------------------------------------------


def test_the_script_pushes_remembers_where_to_and_says_when_it_failed(server, run, run_script):
    result = run_script("push_to_hub.py", run)
    assert result.returncode == 2 and "--hub_model_id ORG/NAME" in result.stderr and not server.requests
    server.fail("POST", "/repos/create", 503, times=2)
    result = run_script("push_to_hub.py", run, "--hub_model_id", "acme/other", "--hub_public")
    assert result.returncode == 1 and "503" in result.stderr
    result = run_script("push_to_hub.py", run)
    assert result.returncode == 0 and not server.repos["acme/other-bi"].private
    assert len(server.repos["acme/other-bi"].tags) == 3


@pytest.mark.parametrize("name", ["tiny", "acme/ti ny", "acme/a--b", "acme/tiny/x"])
def test_a_name_that_no_repository_can_have_is_refused(run, run_script, name):
    result = run_script("push_to_hub.py", run, "--hub_model_id", name)
    assert result.returncode == 2 and name in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_folder_that_was_not_made_here_is_refused(corpus, run_script):
    result = run_script("push_to_hub.py", corpus, "--hub_model_id", "acme/x")
    assert result.returncode == 2 and "neither a run" in result.stderr and len(result.stderr.splitlines()) == 1


def test_flags_that_do_not_go_together_are_refused(run, step1, tmp_path, run_script):
    words = [*step1, tmp_path / "o"]
    result = run_script("train_contrastive.py", *words, "--push_to_hub")
    assert result.returncode == 2 and "--hub_model_id" in result.stderr
    recipe = run / "recipe.yaml"
    result = run_script("plan_run.py", "--recipe", recipe, "--output_dir", tmp_path / "o", "--hub_public")
    assert result.returncode == 2 and "--push_to_hub ORG/NAME" in result.stderr
    result = run_script("plan_run.py", "--recipe", recipe, "--output_dir", tmp_path / "o", "--push_worse")
    assert result.returncode == 2 and "--push_to_hub ORG/NAME" in result.stderr
    content = yaml.safe_load(recipe.read_text()) | {"common": {"push_to_hub": True}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    result = run_script("plan_run.py", "--recipe", tmp_path / "r.yaml", "--output_dir", tmp_path / "o")
    assert result.returncode == 2 and "push_to_hub" in result.stderr and not (tmp_path / "o").exists()


@pytest.mark.slow
def test_a_stage_pushes_what_it_made_and_does_not_fail_with_the_hub(server, tiny_bert, corpus, tmp_path):
    output = tmp_path / "start"
    words = ["--model_name_or_path", tiny_bert, "--sentences", corpus / "sentences.txt", "--output_dir", output]
    words += ["--total_batch_size", 32, "--pooling", "mean", "--push_to_hub", "--hub_model_id", "acme/start"]
    result = launch("train_contrastive.py", *words)
    assert result.returncode == 0, result.stderr[-3000:]
    repo = server.repos["acme/start"]
    assert repo.at("main").files["model.safetensors"] == (output / "model.safetensors").read_bytes()
    text = repo.at("main").files["README.md"].decode()
    assert "accelerate launch scripts/train_contrastive.py" in text and "--total_batch_size 32" in text
    assert json.loads((output / "run.json").read_text())["arguments"].get("hub_model_id") is None
    # The same command again finds nothing to do, and the Hub unplugged is no failure.
    commits = len(repo.commits)
    server.stop()
    again = launch("train_contrastive.py", *words)
    assert again.returncode == 0 and "complete already" in again.stderr and len(repo.commits) == commits
    assert "Not pushed to acme/start" in again.stderr and f"push_to_hub.py {output}" in again.stderr


def drive(*words):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{warm_python().path}:{environment['PATH']}"
    command = ["bash", ROOT / "scripts/run_transencoder.sh", *words, "--launcher", "python"]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, cwd=ROOT, timeout=900
    )


@pytest.mark.slow
def test_the_driver_pushes_beside_the_work_and_unplugging_the_hub_changes_nothing(server, tiny_bert, corpus, tmp_path):
    stage = dict(total_batch_size=16, learning_rate=1e-3, num_epochs=1, eval_steps=100)
    section = {"students": [{"name": "one", "plm": str(tiny_bert)}], "sentences": str(corpus / "sentences.txt")}
    section |= {"pairs": str(corpus / "pairs.jsonl"), "tasks": [f"mine={corpus / 'test.jsonl'}"], "cycles": 1}
    content = {"common": {"mixed_precision": "no"}, "run_transencoder": section, "distill_bi2cross": stage}
    content |= {"train_contrastive": {**stage, "pooling": "mean"}, "distill_cross2bi": stage}
    recipe, run, other = tmp_path / "tiny.yaml", tmp_path / "run", tmp_path / "unplugged"
    recipe.write_text(yaml.safe_dump(content))
    result = drive("--recipe", recipe, "--output_dir", run, "--push_to_hub", "acme/tiny")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Not pushed" not in result.stderr and TOKEN not in result.stdout + result.stderr
    assert list(server.repos["acme/tiny-bi"].tags) == ["cycle-0", "cycle-1"]
    assert list(server.repos["acme/tiny-cross"].tags) == ["cycle-1"]
    for kind in ("bi", "cross"):
        files = server.repos[f"acme/tiny-{kind}"].at("main").files
        assert files["model.safetensors"] == (run / f"last/{kind}-encoder/model.safetensors").read_bytes()
        ModelCard(files["README.md"].decode()).validate()
    assert HfApi().model_info("acme/tiny-bi").private

    # From where the last two stages are missing, with a Hub that goes away in the middle of the first upload.
    shutil.copytree(run, other)
    shutil.rmtree(other / "cycle-1/bi-encoder")
    (other / "cycle-1/results.json").unlink()
    (other / "hub.json").unlink()
    server.blobs.clear()  # nothing is there already
    server.on_upload = server.stop
    result = drive("--recipe", recipe, "--output_dir", other, "--push_to_hub", "acme/other")
    assert result.returncode == 0, result.stderr[-3000:]
    assert server.stopped and not server.repos["acme/other-bi"].tags
    assert "Not pushed to acme/other-bi" in result.stderr and f"push_to_hub.py {other}" in result.stderr
    for path in ("last/bi-encoder/model.safetensors", "last/cross-encoder/model.safetensors", "progress.png"):
        assert (other / path).read_bytes() == (run / path).read_bytes(), path
    tables = [(folder / "results.md").read_text().replace(f"# {folder.name}\n", "") for folder in (run, other)]
    assert tables[0] == tables[1]
