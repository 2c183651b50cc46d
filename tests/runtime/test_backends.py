"""However a global batch is cut, and whatever backend shares out the work: the same losses, weights and scores."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from accelerate.commands import launch as accelerate_launch
from conftest import launch, random_pairs, write_jsonl
from safetensors.numpy import load_file

from transencoder.encoders import load_bi_encoder
from transencoder.model_files import ModelOptions
from transencoder.runtime import backends

pytestmark = pytest.mark.slow

STAGES = {
    "contrastive": ["train_contrastive.py", "--method", "simcse", "--pooling", "mean", "--num_epochs", "3"],
    "cross": ["distill_bi2cross.py", "--num_epochs", "2"],
    "bi": ["distill_cross2bi.py", "--pooling", "mean", "--num_epochs", "4"],
}
# Name -> Accelerate configuration, processes, and what one process takes at a time: 32 in one step each.
WAYS = {
    "one-process": ("cpu", 1, 32),
    "accumulated": ("cpu", 1, 8),
    "two-processes": ("multi_gpu", 2, 16),
    "fsdp": ("fsdp", 2, 16),
    "fsdp-accumulated": ("fsdp", 2, 8),
    "zero2": ("deepspeed_zero2", 2, 16),
    "zero3": ("deepspeed_zero3", 2, 16),
    "zero3-accumulated": ("deepspeed_zero3", 2, 8),
}
# Every stage under every backend; accumulation under the sharding ones once, where it is cheapest to see.
RUNS = [(stage, way) for stage in STAGES for way in list(WAYS)[1:] if stage == "cross" or "-accumulated" not in way]


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    rows = [{**row, "score": row["score"] / 5} for row in random_pairs(64)]
    return write_jsonl(tmp_path_factory.mktemp("scores") / "scores.jsonl", rows)


@pytest.fixture(scope="module")
def teacher(tiny_bert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "bi"
    load_bi_encoder(str(tiny_bert), ModelOptions("mean")).save_pretrained(folder)
    return folder


def train(stage, way, tiny_bert, teacher, corpus, scores, output):
    """A run of a dozen steps without dropout; the cross-encoder's labels come from a teacher in the same process."""
    config, processes, micro_batch_size = WAYS[way]
    data = {
        "contrastive": ["--sentences", corpus / "sentences.txt"],
        "cross": ["--teachers", teacher, "--pairs", corpus / "pairs.jsonl"],
        "bi": ["--scores", scores],
    }[stage]
    result = launch(
        *STAGES[stage],
        *("--model_name_or_path", tiny_bert, *data, "--dev", corpus / "dev.jsonl", "--output_dir", output),
        *("--total_batch_size", 32, "--micro_batch_size", micro_batch_size, "--learning_rate", "1e-3"),
        *("--dropout", 0, "--mixed_precision", "no", "--eval_steps", 3),
        processes=processes,
        config=config,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    facts = json.loads((output / "run.json").read_text())
    assert facts["world_size"] == processes
    return facts, load_file(output / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tiny_bert, teacher, corpus, scores, tmp_path_factory):
    """Stage -> folder, facts and weights of one process that takes 32 at once; trained when first asked for."""
    done = {}

    def of(stage):
        if stage not in done:
            folder = tmp_path_factory.mktemp(stage) / "one-process"
            done[stage] = (folder, *train(stage, "one-process", tiny_bert, teacher, corpus, scores, folder))
        return done[stage]

    return of


@pytest.mark.parametrize(("stage", "way"), RUNS)
def test_losses_and_weights_are_those_of_one_process(stage, way, whole, tiny_bert, teacher, corpus, scores, tmp_path):
    folder, facts, weights = whole(stage)
    other_facts, other_weights = train(stage, way, tiny_bert, teacher, corpus, scores, tmp_path)
    assert len(facts["history"]) >= 3
    for entry, other in zip(facts["history"], other_facts["history"], strict=True):
        # Ranks are compared apart: two pairs of all but the same score may change theirs.
        assert {**other, "dev": 0} == pytest.approx({**entry, "dev": 0}, rel=1e-4)
        assert other["dev"] == pytest.approx(entry["dev"], abs=0.1)
    assert weights.keys() == other_weights.keys()
    for name, value in weights.items():
        assert other_weights[name].shape == value.shape and other_weights[name].dtype == np.float32
        np.testing.assert_allclose(other_weights[name], value, atol=1e-5, err_msg=name)
    if stage == "cross":
        one, two = (pq.read_table(path / "teacher-scores.parquet")["score"] for path in (folder, tmp_path))
        np.testing.assert_allclose(two.to_numpy(), one.to_numpy(), atol=1e-6)


@pytest.fixture(scope="module")
def score(whole, corpus, tmp_path_factory):
    """Score the pairs with a cross- and a bi-encoder together; how they are launched -> the table of scores."""
    words = ["--encoders", whole("cross")[0], whole("bi")[0], "--pairs", corpus / "pairs.jsonl"]

    def run(**how):
        path = tmp_path_factory.mktemp("scored") / "scores.parquet"
        result = launch("score_pairs.py", *words, "--mixed_precision", "no", "--output", path, **how)
        assert result.returncode == 0, result.stderr[-3000:]
        return pq.read_table(path)

    return run


@pytest.fixture(scope="module")
def expected_scores(score):
    return score()["score"].to_numpy()


@pytest.mark.parametrize("config", ["multi_gpu", "fsdp", "deepspeed_zero2", "deepspeed_zero3"])
def test_scores_are_those_of_one_process(config, score, expected_scores):
    table = score(config=config, processes=2)
    assert json.loads(table.schema.metadata[b"transencoder"])["world_size"] == 2
    np.testing.assert_allclose(table["score"].to_numpy(), expected_scores, atol=1e-6)


@pytest.mark.parametrize("devices", [0, 1, 4])
@pytest.mark.parametrize("launcher", ["accelerate launch", "accelerate launch --multi_gpu --num_processes 2"])
def test_accelerate_has_no_default_to_list(monkeypatch, caplog, devices, launcher):
    monkeypatch.setattr(accelerate_launch, "default_config_file", "none")
    monkeypatch.setattr(backends, "default_config_file", "none")
    monkeypatch.setattr("torch.accelerator.device_count", lambda: devices)
    monkeypatch.setattr("torch.cuda.device_count", lambda: devices)
    monkeypatch.setattr("torch.cuda.is_available", lambda: devices > 0)
    words = backends.spelled_out(launcher).split()
    parser = accelerate_launch.launch_command_parser()
    found, *_ = accelerate_launch._validate_launch_command(parser.parse_args([*words[2:], "x.py"]))
    assert not caplog.records and found.quiet
    processes = 2 if "--multi_gpu" in launcher else max(devices, 1)
    assert (found.num_processes, found.multi_gpu, found.mixed_precision) == (processes, processes > 1, "no")


def test_a_launcher_with_settings_of_its_own_keeps_them(monkeypatch, tmp_path):
    monkeypatch.setattr(backends, "default_config_file", "none")
    named = "accelerate launch --config_file c.yaml"
    assert backends.spelled_out(named) == "accelerate launch --quiet --config_file c.yaml"
    assert backends.spelled_out("python -m accelerate.commands.launch") == "python -m accelerate.commands.launch"
    (tmp_path / "default.yaml").touch()
    monkeypatch.setattr(backends, "default_config_file", str(tmp_path / "default.yaml"))
    assert backends.spelled_out("accelerate launch") == "accelerate launch --quiet"
