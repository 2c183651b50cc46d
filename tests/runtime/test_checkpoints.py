"""A run that was killed, or asked to stop, and started again ends as one that was left alone."""

import contextlib
import json
import pickle
import random
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import launch_command, random_pairs, warm_python, write_jsonl
from safetensors.numpy import load_file
from torch import nn

from transencoder.errors import BrokenRun, InputError
from transencoder.runtime import checkpoints
from transencoder.runtime.checkpoints import Checkpoints, check_resumable, check_sealed, seal
from transencoder.runtime.shards import Shards
from transencoder.training import Progress

STAGES = {
    "contrastive": ["train_contrastive.py", "--method", "mirror", "--pooling", "mean"],
    "cross": ["distill_bi2cross.py"],
    "bi": ["distill_cross2bi.py", "--pooling", "mean", "--micro_batch_size", "4"],
}


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    rows = [{**row, "score": row["score"] / 5} for row in random_pairs(64)]
    return write_jsonl(tmp_path_factory.mktemp("scores") / "scores.jsonl", rows)


def words(stage, tiny_bert, corpus, scores, output):
    """A training of some 80 steps with dropout, dev evaluations and checkpoints at steps of their own."""
    data = ["--sentences", corpus / "sentences.txt"] if stage == "contrastive" else ["--scores", scores]
    given = [*STAGES[stage], "--model_name_or_path", tiny_bert, *data, "--dev", corpus / "dev.jsonl"]
    given += ["--output_dir", output, "--total_batch_size", 16, "--learning_rate", "1e-3", "--mixed_precision", "no"]
    given += ["--eval_steps", 7, "--num_epochs", {"contrastive": 13, "cross": 10, "bi": 20}[stage]]
    return [*map(str, given), "--checkpointing_steps", "3"]


def start(*given, **how):
    return subprocess.Popen(**launch_command(*given, **how), stderr=subprocess.PIPE, text=True)


def finish(process):
    error = process.communicate(timeout=300)[1]
    return process.returncode, error


def kill_all(process):
    """The launcher and everything below it: workers of a killed launcher would go on by themselves."""
    members = warm_python().family(process.pid)
    for member in reversed(members):
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(members[1:], timeout=10)
    process.communicate()


def wait_for(process, there):
    while not there() and process.poll() is None:
        time.sleep(0.002)


def wait_for_step(process, output, step):
    wait_for(process, lambda: any(path.name >= f"step-{step:06}" for path in output.glob("checkpoints/step-*")))


def result(folder):
    facts = json.loads((folder / "run.json").read_text())
    return facts["history"], facts["kept_step"], load_file(folder / "model.safetensors"), facts["resumed_at_steps"]


def assert_same(one, other):
    assert one[:2] == other[:2]
    for name, value in one[2].items():
        assert np.array_equal(value, other[2][name]), name


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_training_ends_as_one_left_alone(stage, tiny_bert, corpus, scores, tmp_path):
    """One process, SIGKILL at random moments, with dropout: the same to the last bit."""
    assert finish(start(*words(stage, tiny_bert, corpus, scores, tmp_path / "whole")))[0] == 0
    draw, output = random.Random(stage), tmp_path / "killed"
    given = words(stage, tiny_bert, corpus, scores, output)
    for step in sorted(draw.sample(range(3, 22, 3), 2)):
        process = start(*given)
        wait_for_step(process, output, step)
        time.sleep(draw.random() * 0.02)
        kill_all(process)
        assert process.returncode != 0 and not (output / "model.safetensors").exists()
    code, error = finish(start(*given))
    assert code == 0 and "going on from" in error, error
    whole, killed = result(tmp_path / "whole"), result(output)
    assert len(killed[3]) >= 1
    assert_same(whole, killed)
    assert not (output / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(number, tiny_bert, corpus, scores, tmp_path):
    """No checkpoint was due: only the signal makes one."""
    output = tmp_path / "stopped"
    given = [*words("cross", tiny_bert, corpus, scores, output), "--checkpointing_steps", "0"]
    process = start(*given)
    while "step 7/" not in process.stderr.readline() and process.poll() is None:  # the first evaluation
        pass
    worker = warm_python().family(process.pid)[-1]
    assert worker.name() == "worker"
    worker.send_signal(number)
    code, error = finish(process)
    assert code != 0 and "stopped by a signal after step" in error
    assert finish(start(*given))[0] == 0
    assert finish(start(*words("cross", tiny_bert, corpus, scores, tmp_path / "whole")))[0] == 0
    assert len(result(output)[3]) == 1
    assert_same(result(tmp_path / "whole"), result(output))


@pytest.fixture(scope="module")
def whole(tiny_bert, corpus, scores, tmp_path_factory):
    """What one process makes of `same_everywhere`, without an interruption."""
    output = tmp_path_factory.mktemp("whole") / "whole"
    assert finish(start(*same_everywhere(tiny_bert, corpus, scores, output)))[0] == 0
    return result(output)


def same_everywhere(tiny_bert, corpus, scores, output):
    """A training without dropout, in batches of 24, which one, two and three processes can share out."""
    return [*words("cross", tiny_bert, corpus, scores, output), "--dropout", "0", "--total_batch_size", "24"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "first", "second"),
    [("", 2, 1), ("", 1, 2), ("fsdp", 2, 3), ("deepspeed_zero2", 2, 2), ("deepspeed_zero3", 2, 2)],
)
def test_other_processes_go_on_where_some_were_killed(
    config, first, second, whole, tiny_bert, corpus, scores, tmp_path
):
    given = same_everywhere(tiny_bert, corpus, scores, tmp_path)
    process = start(*given, processes=first, config=config)
    wait_for_step(process, tmp_path, 12)
    kill_all(process)
    code, error = finish(start(*given, processes=second, config=config))
    said = f"which {first} processes wrote and {second} read" if first != second else "going on from"
    assert code == 0 and said in error, error
    history, _, weights, resumed_at = result(tmp_path)
    assert len(resumed_at) == 1
    assert [entry["step"] for entry in history] == [entry["step"] for entry in whole[0]]
    assert [entry["loss"] for entry in history] == pytest.approx([entry["loss"] for entry in whole[0]], rel=1e-4)
    for name, value in whole[2].items():
        np.testing.assert_allclose(weights[name], value, atol=2e-4, err_msg=name)


@pytest.mark.slow
def test_scoring_goes_on_at_the_part_it_was_in(tiny_bert, corpus, tmp_path):
    def given(name):
        output = ["--output", tmp_path / name, "--mixed_precision", "no", "--shard_rows", 4]
        return [
            "score_pairs.py",
            "--encoders",
            tiny_bert,
            "--pooling",
            "mean",
            "--pairs",
            corpus / "pairs.jsonl",
            *output,
        ]

    assert finish(start(*given("whole.parquet")))[0] == 0
    parts = tmp_path / ".killed.parquet.parts"
    process = start(*given("killed.parquet"))
    wait_for(process, lambda: len(list(parts.glob("*.npz"))) >= 5)
    kill_all(process)
    done = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.npz")}
    assert len(done) >= 5 and not (tmp_path / "killed.parquet").exists()
    damaged = min(parts.glob("*.npz"))
    damaged.write_bytes(damaged.read_bytes()[:-3])
    code, error = finish(start(*given("killed.parquet")))
    assert code == 0 and "shards are done" in error and f"{damaged.name} is damaged" in error, error
    assert not parts.exists()
    whole, killed = (pq.read_table(tmp_path / f"{name}.parquet")["score"].to_pylist() for name in ("whole", "killed"))
    assert whole == killed


# --- what a checkpoint must be to be used ----------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path):
    """Checkpoints of steps 2, 4 and 6 of a model of one weight, which is the step; the best one was that of step 4."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(nn.Linear(1, 1, bias=False))
    progress = Progress(torch.zeros(()))
    kept = Checkpoints(accelerator, str(tmp_path), progress, keep=2)
    for step in (2, 4, 6):
        nn.init.constant_(model.weight, step)
        best = min(step, 4)
        if best == step:
            kept.best(best).mkdir(parents=True)
            (kept.best(best) / "model.safetensors").write_bytes(b"weights")
            seal(kept.best(best))
        progress.step = step
        kept.save(step, best)
    nn.init.constant_(model.weight, 0)
    return kept, model


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_old_checkpoints_and_best_models_are_removed(trained):
    kept, _ = trained
    assert names(kept.folder) == ["best-000004", "step-000004", "step-000006"]


def test_the_newest_checkpoint_is_loaded(trained):
    kept, model = trained
    assert kept.load_newest() and model.weight.item() == 6


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("model.safetensors", truncate, "model.safetensors is damaged"),
        ("model.safetensors", flip, "model.safetensors is damaged"),
        ("model.safetensors", lambda path: path.unlink(), "model.safetensors is missing"),
        ("manifest.json", truncate, "manifest.json cannot be read"),
        ("manifest.json", lambda path: path.write_text("{}"), "manifest.json cannot be read"),
        ("manifest.json", lambda path: path.unlink(), "manifest.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_a_warning(trained, capsys, name, spoil, said):
    kept, model = trained
    spoil(kept.folder / "step-000006" / name)
    assert kept.load_newest() and model.weight.item() == 4
    error = capsys.readouterr().err
    assert "warning" in error and "step-000006" in error and said in error


def test_a_half_written_checkpoint_is_not_seen(trained):
    kept, model = trained
    shutil.copytree(kept.folder / "step-000006", kept.folder / ".step-000008.tmp")
    assert kept.load_newest() and model.weight.item() == 6


def test_a_checkpoint_without_its_best_model_is_skipped(trained, capsys):
    kept, _ = trained
    shutil.rmtree(kept.folder / "best-000004")
    assert not kept.load_newest()
    assert capsys.readouterr().err.count("best-000004: is missing") == 2


@pytest.mark.parametrize("spoil", [truncate, flip])
def test_a_damaged_best_model_is_no_result(trained, capsys, spoil):
    kept, _ = trained
    spoil(kept.folder / "best-000004" / "model.safetensors")
    assert not kept.load_newest()
    assert capsys.readouterr().err.count("best-000004: model.safetensors is damaged") == 2
    with pytest.raises(BrokenRun, match=r"model.safetensors is damaged; delete .*checkpoints, and the same"):
        check_sealed(kept.best(4))


class Code:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def plant(code, path, save):
    """Put code into a file of a checkpoint whose manifest says that it belongs there."""
    with path.open("wb") as file:
        save(code, file)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    (path.parent / "manifest.json").unlink()
    del manifest["files"]
    seal(path.parent, **manifest)


@pytest.mark.parametrize("save", [torch.save, pickle.dump], ids=["torch", "pickle"])
@pytest.mark.parametrize(
    "name", ["optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", ".metadata", "progress.json"]
)
def test_no_code_of_a_checkpoint_is_run(trained, tmp_path, capsys, name, save):
    kept, model = trained
    plant(Code(tmp_path / "ran"), kept.folder / "step-000006" / name, save)
    assert kept.load_newest() and model.weight.item() == 4 and kept.progress.step == 4
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 2 and re.search(rf"step-000006: {name} (holds|cannot be read)", error), error
    with checkpoints.only_data(), pytest.raises(pickle.UnpicklingError):
        torch.load(kept.folder / "step-000006" / name, weights_only=False)
    assert not (tmp_path / "ran").exists()


def test_nothing_to_go_on_from(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    assert not Checkpoints(Accelerator(cpu=True), str(tmp_path), Progress(torch.zeros(())), keep=2).load_newest()


def test_checkpoints_of_another_backend_are_refused(trained, monkeypatch):
    kept, _ = trained
    output = str(kept.folder.parent)
    check_resumable(output, kept.accelerator)
    monkeypatch.setattr(checkpoints, "backend_name", lambda accelerator: "fsdp")
    with pytest.raises(InputError, match=r"written under plain, this is fsdp.*delete .* again"):
        check_resumable(output, kept.accelerator)
    monkeypatch.setattr(checkpoints, "backend_name", lambda accelerator: "deepspeed-zero2")
    path = kept.folder / "step-000006" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "backend": "deepspeed-zero2", "world_size": 4}))
    with pytest.raises(InputError, match="written by 4 processes, these are 1"):
        check_resumable(output, kept.accelerator)


def test_checkpoints_of_an_older_version_are_refused(trained):
    kept, _ = trained
    for path in kept.folder.glob("step-*/manifest.json"):
        manifest = json.loads(path.read_text())
        manifest["engine"] = manifest.pop("backend")  # as it was called then
        path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"checkpoints were written by an older version.*delete .* again"):
        check_resumable(str(kept.folder.parent), kept.accelerator)


def test_checkpoints_are_ordered_by_number(trained):
    kept, model = trained
    for place, step in enumerate((999_998, 1_000_000)):
        target = kept.folder / f"step-{step:06}"
        (kept.folder / f"step-00000{4 + 2 * place}").rename(target)
    (kept.folder / "step-000006.bak").mkdir()
    assert kept.newest().name == "step-1000000" and kept.load_newest() and model.weight.item() == 6
    kept.save(1_000_002, 0)
    assert [name for name in names(kept.folder) if name.startswith("step")] == [
        "step-000006.bak",
        "step-1000000",
        "step-1000002",
    ]


def test_parts_of_another_scoring_are_thrown_away(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, output, part = Accelerator(cpu=True), tmp_path / "out.parquet", np.ones((3, 2), dtype=np.float32)
    parts = Shards(output, {"encoders": ["a"]}, 3, accelerator)
    parts.save("encoder-0", 0, part)
    again = Shards(output, {"encoders": ["a"]}, 3, accelerator)
    assert np.array_equal(again.load("encoder-0", 0, 3), part)
    assert again.load("encoder-0", 0, 2) is None and again.load("encoder-0", 1, 3) is None
    for facts, rows in (({"encoders": ["b"]}, 3), ({"encoders": ["a"]}, 4)):
        assert Shards(output, facts, rows, accelerator).load("encoder-0", 0, 3) is None
    parts.remove()
    assert names(tmp_path) == []
