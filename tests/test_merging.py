"""Merging a student with its start: the mixture by hand, what chooses it, and what step 3 leaves."""

import json
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import launch, random_pairs, write_jsonl
from safetensors.torch import load_file

from transencoder.config.parsing import parse_stage
from transencoder.data.tasks import load_task
from transencoder.encoders import load_bi_encoder
from transencoder.errors import InputError
from transencoder.inference import Inference
from transencoder.merging import SHARES, merge_with_start, mixed
from transencoder.scoring import Teachers
from transencoder.selection import select_by, training_rows


def test_a_mixture_by_hand():
    start = {"w": torch.tensor([1.0, -2.0]), "n": torch.tensor([3])}
    student = {"w": torch.tensor([3.0, 2.0], dtype=torch.bfloat16), "n": torch.tensor([4])}
    expected = {0.0: [1.0, -2.0], 0.25: [1.5, -1.0], 0.5: [2.0, 0.0], 0.75: [2.5, 1.0], 1.0: [3.0, 2.0]}
    for share in SHARES:
        found = mixed(start, student, share)
        assert found["w"].dtype == torch.float32 and found["w"].tolist() == expected[share]
        assert found["n"].tolist() == [4]  # what is no weight stays


def test_the_ends_of_a_mixture_are_exact():
    draws = torch.Generator().manual_seed(0)
    start, student = ({"w": torch.randn(1000, generator=draws) * 10.0**k} for k in (6, -6))
    assert torch.equal(mixed(start, student, 0.0)["w"], start["w"])
    assert torch.equal(mixed(start, student, 1.0)["w"], student["w"])


@pytest.fixture
def inference():
    AcceleratorState._reset_state(reset_partial_state=True)  # another test may have chosen bf16 for this process
    return Inference(Accelerator(cpu=True, mixed_precision="no"), 4096)


@pytest.fixture
def models(tiny_bert, bi_encoder, tmp_path):
    """A start, and a student that is some way from it."""
    student = load_bi_encoder(str(bi_encoder))
    torch.manual_seed(3)
    for parameter in student.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    student.save_pretrained(tmp_path / "student")
    (tmp_path / "output").mkdir()
    (tmp_path / "output/run.json").write_text("{}")
    return SimpleNamespace(start=bi_encoder, student=tmp_path / "student", output=tmp_path / "output")


def arguments_of(models, how):
    words = ["--model_name_or_path", models.start, "--scores", "x", "--output_dir", models.output, "--dev", "x"]
    return parse_stage("distill_cross2bi", argv=[*map(str, words), "--merge_with_start", str(how)])


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("taught_by", "share"), [("start", 0.0), ("student", 1.0)])
def test_dev_may_choose_the_start_or_the_student(models, taught_by, share, inference, tmp_path):
    rows = random_pairs(60, seed=4)
    task = load_task(f"mine={write_jsonl(tmp_path / 'dev.jsonl', rows)}")
    scores = Teachers([str(getattr(models, taught_by))]).score([task.pairs], inference)[0]
    rows = [{**row, "score": float(score)} for row, score in zip(rows, scores, strict=True)]
    task = load_task(f"mine={write_jsonl(tmp_path / 'dev.jsonl', rows)}")
    expected = weights(getattr(models, taught_by))
    found = merge_with_start(arguments_of(models, "dev"), models.student, task, inference)["merged_with_start"]
    assert (found["share"], found["by"], found["metric"]) == (share, "dev", "spearman")
    assert found["tried"][share] == pytest.approx(100) and sorted(found["tried"]) == list(SHARES)
    assert found["tried"][1 - share] < 99 and not (tmp_path / "merged").exists()
    kept = weights(models.output)
    assert kept.keys() == expected.keys() and all(torch.equal(kept[name], expected[name]) for name in expected)


def test_a_given_share_is_taken(models, inference, tmp_path):
    start, student = weights(models.start), weights(models.student)
    found = merge_with_start(arguments_of(models, 0.25), models.student, None, inference)
    assert found == {"merged_with_start": {"share": 0.25}}
    for name, value in weights(models.output).items():
        torch.testing.assert_close(value, 0.75 * start[name] + 0.25 * student[name])
    load_bi_encoder(str(models.output))
    assert "model.safetensors" in json.loads((models.output / "run.json").read_text())["files"]


def test_a_choice_that_cannot_be_made_is_refused():
    words = ["--model_name_or_path", "m", "--scores", "s", "--output_dir", "o", "--merge_with_start"]
    for value in ("1.5", "-0.1", "nan", "half"):
        with pytest.raises(InputError, match=f"merge_with_start {value}: must be dev, agreement, off or from 0"):
            parse_stage("distill_cross2bi", argv=[*words, value])
    with pytest.raises(InputError, match="--merge_with_start dev: needs labelled pairs"):
        select_by(parse_stage("distill_cross2bi", argv=[*words, "dev"]))
    by_agreement = parse_stage("distill_cross2bi", argv=[*words, "agreement", "--num_held_out", "20"])
    assert select_by(by_agreement) == "last" and training_rows(100, by_agreement) == 80


@pytest.mark.slow
def test_step_3_merges_by_agreement_with_one_process_and_with_two(bi_encoder, tmp_path):
    rows = random_pairs(64)
    columns = {name: [row[name] for row in rows] for name in ("sentence1", "sentence2")}
    pq.write_table(pa.table({**columns, "score": [row["score"] / 5 for row in rows]}), tmp_path / "s.parquet")
    words = ["--model_name_or_path", bi_encoder, "--scores", tmp_path / "s.parquet", "--num_held_out", 24]
    words += ["--merge_with_start", "agreement", "--total_batch_size", 8, "--learning_rate", "1e-3", "--num_epochs", 2]
    found = []
    for processes in (1, 2):
        output = tmp_path / f"{processes}"
        command = [*words, "--output_dir", output, "--mixed_precision", "no"]
        result = launch("distill_cross2bi.py", *command, processes=processes)
        assert result.returncode == 0, result.stderr[-3000:]
        assert "Merged with the start: " in result.stderr and not (output / "checkpoints").exists()
        facts = json.loads((output / "run.json").read_text())
        assert facts["status"] == "complete" and facts["examples"] == 40 and facts["kept_step"] == facts["steps"]
        found.append(facts["merged_with_start"])
    one, two = found
    assert one["by"] == "agreement" and one["tried"][f"{one['share']}"] == max(one["tried"].values())
    assert two["share"] == one["share"] and two["tried"] == pytest.approx(one["tried"], abs=0.5)
