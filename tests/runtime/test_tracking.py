"""What experiment trackers get, read back from TensorBoard's files."""

import importlib.util
import json
import os

import pytest
from conftest import launch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from transencoder.errors import InputError
from transencoder.runtime import accelerator as runtime


def events(folder):
    """Every run that TensorBoard finds below a folder, read."""
    runs = []
    for path in sorted({file.parent for file in folder.rglob("events.out.tfevents.*")}):
        runs.append(EventAccumulator(str(path)))
        runs[-1].Reload()
    return runs


def scalars(folder):
    """Name -> [(step, value)] of all runs below a folder."""
    return {
        name: [(event.step, event.value) for event in run.Scalars(name)]
        for run in events(folder)
        for name in run.Tags()["scalars"]
    }


@pytest.mark.slow
def test_tensorboard_gets_the_curves_the_options_and_the_whole_table(tiny_bert, corpus, tmp_path):
    start = tmp_path / "start"
    words = ["--model_name_or_path", tiny_bert, "--sentences", corpus / "sentences.txt", "--output_dir", start]
    words += ["--pooling", "mean", "--total_batch_size", 8, "--num_epochs", 2, "--learning_rate", "1e-3"]
    words += [
        "--dev",
        corpus / "dev.jsonl",
        "--eval_steps",
        8,
        "--mixed_precision",
        "no",
        "--report_to",
        "tensorboard",
    ]
    result = launch("train_contrastive.py", *words)
    assert result.returncode == 0, result.stderr[-3000:]
    found = scalars(start)
    assert [step for step, _ in found["train/loss"]] == [10, 20]
    # 24 steps without warm-up: after step 10 the rate of step 11 is 14/24 of the peak.
    assert found["train/learning_rate"] == [(10, pytest.approx(1e-3 * 14 / 24)), (20, pytest.approx(1e-3 * 4 / 24))]
    assert all(value > 0 for name in ("grad_norm", "examples_per_second") for _, value in found[f"train/{name}"])
    run = json.loads((start / "run.json").read_text())
    dev = {entry["step"]: entry["dev"] for entry in run["history"]}
    assert dict(found["dev/spearman"]) == pytest.approx(dev) and sorted(dev) == [8, 12, 16, 24]
    options = [path.read_text() for path in start.rglob("hparams.yml")]
    assert len(options) == 1 and "learning_rate: 0.001" in options[0] and "temperature: 0.05" in options[0]

    output = tmp_path / "tables"
    words = ["--encoders", start, "--tasks", f"mine={corpus / 'test.jsonl'}", corpus / "dev.jsonl"]
    result = launch("evaluate_encoders.py", *words, "--output_dir", output, "--report_to", "tensorboard")
    assert result.returncode == 0, result.stderr[-3000:]
    texts = {name: run.Tensors(name) for run in events(output) for name in run.Tags()["tensors"]}
    (table,) = texts["results/text_summary"]
    assert (output / "results.md").read_text().startswith(table.tensor_proto.string_val[0].decode())
    values = [entry["value"] for entry in json.loads((output / "results.json").read_text())]
    assert [value for points in scalars(output).values() for _, value in points] == pytest.approx(values)


def test_a_tracker_that_is_not_installed_is_one_line_before_any_work(step1, tmp_path, monkeypatch, run_script):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, find=importlib.util.find_spec: hide(name, find))
    words = [*step1, tmp_path / "o"]
    for tracker, advice in (
        ("trackio", "pip install trackio"),
        ("all", "pip install tensorboard or wandb or trackio"),
    ):
        result = run_script("train_contrastive.py", *words, "--report_to", tracker)
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
        assert f"--report_to {tracker}" in result.stderr and advice in result.stderr
    assert not (tmp_path / "o").exists()


def hide(name, find):
    return None if name in runtime.TRACKERS else find(name)


def test_all_trackers_are_those_that_are_installed(monkeypatch):
    installed = {"tensorboard", "trackio"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in installed or None)
    assert runtime.trackers("all") == ["tensorboard", "trackio"]
    assert runtime.trackers("none") == []
    with pytest.raises(InputError, match="--report_to wandb: not installed"):
        runtime.trackers("wandb")


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_the_other_trackers_work_offline(tracker, tiny_bert, corpus, tmp_path, monkeypatch):
    pytest.importorskip(tracker, reason=f"{tracker} is not among the tested packages; pip install {tracker}")
    for name, value in {"WANDB_MODE": "offline", "TRACKIO_DIR": tmp_path / "trackio"}.items():
        monkeypatch.setenv(name, str(value))
    words = [
        "--encoders",
        tiny_bert,
        "--pooling",
        "mean",
        "--tasks",
        corpus / "dev.jsonl",
        "--output_dir",
        tmp_path / "o",
    ]
    result = launch("evaluate_encoders.py", *words, "--report_to", tracker)
    assert result.returncode == 0, result.stderr[-3000:]
    written = [path for path in tmp_path.rglob("*") if path.suffix in (".wandb", ".db") and os.path.getsize(path)]
    assert written
