"""Which stages a launch does, what it overwrites, and how it tells the driver to go on; stages are stand-ins here."""

import gc
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from accelerate import PartialState
from datasets import Dataset

from transencoder.config.parsing import parse_stage
from transencoder.data.scores import write_scores
from transencoder.errors import BrokenRun, FullDisk
from transencoder.run import runner
from transencoder.run.completion import is_complete
from transencoder.run.layout import Layout
from transencoder.run.plan import load_plan
from transencoder.run.runner import Runner
from transencoder.run.stages import make_stages, read_stages, write_stages
from transencoder.runtime.files import write_json
from transencoder.runtime.locks import unlock
from transencoder.runtime.records import claim, content, identity

STUDENTS = [{"name": "one", "plm": "a"}, {"name": "two", "plm": "b"}]


def section(**changes):
    return {"students": STUDENTS[:1], "pairs": ["p"], "sentences": ["s"], "tasks": ["stsb"], "cycles": 2, **changes}


class Stages:
    """Makes stages' outputs, and notes them with the words of each."""

    def __init__(self, scores=(1.0, 2.0, 3.0)):
        self.done, self.before, self.scores = [], lambda stage: None, scores

    def __call__(self, stage, words):
        self.done.append((stage.title, "--overwrite" in words))
        self.before(stage)
        make(stage.output, self.scores)

    @property
    def titles(self):
        return [title for title, _ in self.done]


def make(output, scores=(1.0, 2.0, 3.0)):
    """What a stage leaves."""
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".parquet":
        pairs = {f"sentence{side}": [str(row) for row in range(len(scores))] for side in (1, 2)}
        pq.write_table(pa.table({**pairs, "score": list(scores)}), output)
        return
    output.mkdir(exist_ok=True)
    write_json(output / "run.json", {"status": "complete"})
    (output / "results.json").write_text("[]")


@pytest.fixture(scope="module", autouse=True)
def frozen():
    gc.freeze()  # what the libraries are is not looked at again after each stage


@pytest.fixture
def run(tmp_path):
    yield tmp_path / "run"
    for name in ("", "one", "two"):
        unlock(tmp_path / "run" / name)


def launch(run, call, changes=None, **options):
    """One launch: its outcome, and its runner."""
    plan = load_plan({"run_transencoder": section(**(changes or {}))}, "r")
    run.mkdir(exist_ok=True)
    made = Runner(run, make_stages(plan, run, run / "recipe.yaml"), plan, call, PartialState(), **options)
    made.run()
    return Layout(run).outcome(options.get("student")).read_text().strip()


def test_a_plan_is_written_and_read(tmp_path):
    plan = load_plan({"run_transencoder": section(students=STUDENTS)}, "r")
    stages = make_stages(plan, tmp_path, tmp_path / "recipe.yaml", 7)
    write_stages(stages, tmp_path / "plan.jsonl")
    assert read_stages(tmp_path / "plan.jsonl") == stages
    lines = [json.loads(line) for line in (tmp_path / "plan.jsonl").read_text().splitlines()]
    assert len(lines) == 17 and {line["owner"] for line in lines} == {"one", "two"}
    assert all(line["words"][-2:] == ["--seed", "7"] for line in lines)


def test_a_launch_does_what_is_not_done_yet_and_overwrites_what_comes_after(run, capsys):
    call = Stages()
    assert launch(run, call) == "summarize" and len(call.done) == 12
    # A cycle's table goes into a folder that is there already.
    assert [title for title, overwrite in call.done if overwrite] == ["cycle 1: measure", "cycle 2: measure"]
    assert "[3/12] cycle 1: label with the bi-encoder\n" in capsys.readouterr().err
    again = Stages()
    assert launch(run, again) == "summarize" and again.done == []
    assert capsys.readouterr().err.count(": done before") == 12
    labels = Layout(run).scores(2, "bi")
    labels.write_bytes(labels.read_bytes()[:100])
    (Layout(run).encoder(2, "cross", "one") / "checkpoints").mkdir()
    last = Stages()
    assert launch(run, last) == "summarize"
    assert last.done == [
        ("cycle 2: label with the bi-encoder", False),
        ("cycle 2: cross-encoder of one", True),
        ("cycle 2: label with the cross-encoder", True),
        ("cycle 2: bi-encoder of one", True),
        ("cycle 2: measure", True),
    ]


@pytest.fixture
def noted(run, tmp_path):
    """A run whose stages note their inputs, as real ones do: pairs.tsv is read by both stages that label."""
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("a\tb")

    def call(stage, words):
        layout = Layout(run)
        inputs = {
            layout.scores(1, "bi"): [pairs, layout.encoder(0, "bi", "one")],
            layout.encoder(1, "cross", "one"): [layout.scores(1, "bi")],
            layout.scores(1, "cross"): [pairs, layout.encoder(1, "cross", "one")],
        }.get(Path(stage.output), [])
        noted = {"inputs": {str(path): content(path) for path in inputs}}
        call.done.append(stage.title)
        call.before(stage)
        make(stage.output)
        if stage.output.endswith(".parquet"):
            write_scores(Path(stage.output), Dataset.from_dict(PAIR), np.ones(1, "float32"), noted)
        elif "encoder" in stage.output or "contrastive" in stage.output:
            (Path(stage.output) / "model.safetensors").write_text(call.weights)
            write_json(Path(stage.output) / "run.json", {"status": "complete", "arguments": noted})

    call.weights, call.done, call.before, call.pairs = "first", [], lambda stage: None, pairs
    assert launch(run, call, {"cycles": 1}) == "summarize" and len(call.done) == 7
    call.done.clear()
    return call


PAIR = {"sentence1": ["a"], "sentence2": ["b"]}
AGAIN = ["label with the bi-encoder", "cross-encoder of one", "label with the cross-encoder", "bi-encoder of one"]


def test_what_changed_since_a_stage_read_it_ends_the_run(run, noted):
    assert launch(run, noted, {"cycles": 1}) == "summarize" and not noted.done
    noted.pairs.write_text("a\tc")
    why = rf"{noted.pairs} has changed since, and .*bi-scores.parquet was made from it; .* choose another --output_dir"
    with pytest.raises(BrokenRun, match=why):
        launch(run, noted, {"cycles": 1})
    assert not noted.done
    noted.pairs.write_text("a\tb")
    assert launch(run, noted, {"cycles": 1}) == "summarize"


def interrupt():
    raise KeyboardInterrupt


def test_what_was_made_anew_makes_what_follows_anew(run, noted, monkeypatch):
    """Also where a kill came in between: the second launch knows nothing of the first one."""
    shutil.rmtree(Layout(run).encoder(0, "bi", "one"))
    noted.weights = "second"

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runner, "free_stage", interrupt)  # right behind the stage
        launch(run, noted, {"cycles": 1})
    noted.done.clear()
    launch(run, noted, {"cycles": 1})
    assert noted.done == [f"cycle 1: {title}" for title in [*AGAIN, "measure"]]


@pytest.mark.parametrize(
    "name", ["contrastive/one/model.safetensors", "start/results.json", "cycle-1/bi-scores.parquet"]
)
def test_a_flipped_bit_in_what_a_stage_made_ends_the_run(run, noted, name):
    path = run / name
    whole = path.read_bytes()
    place = min(9, len(whole) - 1)
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(
        BrokenRun, match=f"{name}: damaged, or changed since it was made; put it back, or delete .*{name[:9]}"
    ):
        launch(run, noted, {"cycles": 1})
    path.write_bytes(whole)
    assert launch(run, noted, {"cycles": 1}) == "summarize" and not noted.done


def test_an_input_that_changes_during_a_run_ends_it(run, noted):
    shutil.rmtree(run)

    def change(stage):
        if stage.title == "cycle 1: cross-encoder of one":
            noted.pairs.write_text("a\tc")

    noted.before = change
    with pytest.raises(BrokenRun, match=rf"{noted.pairs} has changed since, while the run was under way"):
        launch(run, noted, {"cycles": 1})
    assert noted.done[-1] == "cycle 1: label with the cross-encoder"


def test_what_a_kill_left_beside_a_complete_output_is_removed(run):
    launch(run, Stages())
    encoder, labels = Layout(run).encoder(1, "bi", "one"), Layout(run).scores(1, "bi")
    left = [encoder / "checkpoints", labels.with_name(f".{labels.name}.parts")]
    for folder in left:
        folder.mkdir()
    launch(run, Stages())
    assert not any(folder.exists() for folder in left)


@pytest.mark.parametrize(("code", "outcome"), [(2, "failed"), (1, "failed"), (75, "stopped")])
def test_a_stage_that_ends_the_process_ends_the_launch(run, capsys, code, outcome):
    call = Stages()

    def end(stage):
        if stage.script == "distill_bi2cross.py":
            raise SystemExit(code)

    call.before = end
    with pytest.raises(SystemExit) as stop:
        launch(run, call)
    assert stop.value.code == code and Layout(run).outcome(None).read_text().strip() == outcome
    said = "'cycle 1: cross-encoder of one' failed (see above)" in capsys.readouterr().err
    assert said == (outcome == "failed")


def test_a_full_disk_is_told_once(run, monkeypatch):
    def no_room(path, text):
        raise FullDisk(f"{path}: cannot be written: No space left on device")

    call = Stages()
    call.before = lambda stage: sys.exit(1)  # which has said so
    monkeypatch.setattr(runner, "write_text", no_room)
    with pytest.raises(SystemExit):
        launch(run, call)


def test_an_error_of_ours_keeps_its_traceback(run, capsys):
    call = Stages()
    call.before = lambda stage: 1 / 0
    with pytest.raises(SystemExit):
        launch(run, call)
    error = capsys.readouterr().err
    assert "ZeroDivisionError" in error and "'contrastive start of one' failed (see above)" in error


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_that_no_stage_takes_ends_the_launch_behind_the_stage(run, number):
    call = Stages()
    call.before = lambda stage: os.kill(os.getpid(), number)
    with pytest.raises(SystemExit) as stop:
        launch(run, call)
    assert stop.value.code == 75 and call.titles == ["contrastive start of one"]
    assert Layout(run).outcome(None).read_text().strip() == "stopped"
    assert signal.getsignal(number) == signal.SIG_DFL


def test_where_a_process_can_do_one_stage_each_has_its_own_launch(run, capsys):
    launch(run, Stages())
    labels = Layout(run).scores(2, "cross")
    labels.unlink()
    outcomes, done = ["again 0"], []
    while outcomes[-1].startswith("again"):
        call = Stages()
        outcomes.append(launch(run, call, once=True, remade=int(outcomes[-1].split()[1])))
        done += call.done
        assert len(call.done) == 1
    assert outcomes[1:] == ["again 10", "again 11", "summarize"]
    assert done == [
        ("cycle 2: label with the cross-encoder", False),
        ("cycle 2: bi-encoder of one", True),
        ("cycle 2: measure", True),
    ]
    assert capsys.readouterr().err.count("has a launch of its own") == 2


def test_the_loop_ends_where_the_labels_hardly_change(run, capsys):
    call = Stages()
    assert launch(run, call, {"stop_at": 0.9, "cycles": 3}) == "summarize"
    assert call.titles[-1] == "cycle 2: label with the bi-encoder" and "the loop ends" in capsys.readouterr().err
    again = Stages()
    assert launch(run, again, {"stop_at": 0.9, "cycles": 3}) == "summarize" and not again.done


def test_students_wait_for_what_the_others_make(run, monkeypatch, capsys):
    monkeypatch.setattr(runner, "POLL", 0.01)
    students, calls, outcomes = {"students": STUDENTS, "cycles": 1}, {}, {}

    def work(name):
        calls[name] = Stages()
        outcomes[name] = launch(run, calls[name], students, student=name)

    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # signals are for the main thread
    threads = [threading.Thread(target=work, args=(name,)) for name in ("one", "two")]
    for thread in reversed(threads):
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert outcomes == {"one": "summarize", "two": "nothing"}
    assert calls["two"].titles == [
        "contrastive start of two",
        "cycle 1: cross-encoder of two",
        "cycle 1: bi-encoder of two",
    ]
    assert len(calls["one"].titles) == 7 and "contrastive start of one: waiting for one" in capsys.readouterr().err


def test_a_student_that_failed_is_not_waited_for(run, monkeypatch):
    monkeypatch.setattr(runner, "POLL", 0.01)
    students = {"students": STUDENTS, "cycles": 1}
    with pytest.raises(BrokenRun, match=r"no 'contrastive start of one' from one in 0 s \(--patience\)"):
        launch(run, Stages(), students, student="two", patience=0)
    Layout(run).outcome("one").write_text("failed\n")
    with pytest.raises(BrokenRun, match="'contrastive start of one' failed at one; start both again"):
        launch(run, Stages(), students, student="two")


def test_each_cycle_is_pushed_beside_the_work(run, tmp_path):
    pushed = tmp_path / "pushed"
    call = Stages()

    def wait(stage):  # until the last push is through, as nothing waits for it here
        if stage.title.endswith(": label with the bi-encoder"):
            while not pushed.exists() or pushed.read_text().count("x") < stage.cycle:
                time.sleep(0.01)
            time.sleep(0.1)

    call.before = wait
    assert launch(run, call, push=["bash", "-c", f"printf x >>{pushed}"]) == "summarize"
    assert pushed.read_text() == "xx"  # the start, and cycle 1; the driver pushes the end


# --- what is complete ------------------------------------------------------------------------------------------------


def test_an_output_is_complete_when_all_of_it_is_there(tmp_path):
    folder, file = tmp_path / "model", tmp_path / "scores.parquet"
    assert not is_complete(folder) and not is_complete(file)
    folder.mkdir()
    write_json(folder / "run.json", {"status": "complete"})
    assert not is_complete(folder)
    (folder / "model.safetensors").touch()
    assert is_complete(folder)
    for text in ('{"status": "running"}', '{"status": "comp', "[]", ""):
        (folder / "run.json").write_text(text)
        assert not is_complete(folder), text
    make(file)
    assert is_complete(file)
    file.write_bytes(file.read_bytes()[:-9])
    assert not is_complete(file)


def test_a_stage_that_2c7a3c1_made_is_taken_up(tmp_path):
    """run.json as the code before the one launch wrote it: its arguments mean the same run today."""
    output = tmp_path / "contrastive" / "one"
    make(output)
    words = ["--model_name_or_path", "bert", "--sentences", "s.txt", "--output_dir", str(output), "--pooling", "mean"]
    arguments = parse_stage("train_contrastive", argv=words)
    recorded = json.loads(RECORDED)
    assert recorded["arguments"].keys() <= identity(arguments, []).keys()
    write_json(output / "run.json", recorded)
    (output / "model.safetensors").touch()
    assert is_complete(output) and claim(arguments, "train_contrastive", identity(arguments, []))


RECORDED = """{
  "stage": "train_contrastive",
  "status": "complete",
  "arguments": {
    "seed": 2021, "mixed_precision": "auto", "columns": null, "data_dir": null, "learning_rate": 3e-05,
    "total_batch_size": 64, "num_epochs": 1, "max_steps": null, "warmup_ratio": 0.0, "weight_decay": 0.01,
    "max_grad_norm": 1.0, "max_length": 32, "dropout": null, "length_window": 32, "dev": null, "eval_steps": 200,
    "select_by": null, "model_name_or_path": "bert", "sentences": ["s.txt"], "method": "simcse",
    "num_sentences": null, "temperature": 0.05, "mlp_head": true, "pooling": "mean", "mask_characters": 5,
    "drophead": 0.0, "inputs": {}
  },
  "versions": {"transencoder": "0.1.0+g2c7a3c1", "torch": "2.13.0", "transformers": "5.23.0"},
  "kept_step": 2, "steps": 2
}"""
