"""The training loop: what is kept, and when it is written."""

import datasets
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import random_pairs
from safetensors.torch import load_file

from transencoder import training
from transencoder.batches import PairInputs
from transencoder.config.parsing import parse_stage
from transencoder.encoders import CrossEncoder, load_cross_encoder
from transencoder.losses import soft_bce
from transencoder.training import Trainer


class Training:
    """Two epochs of step 2 in batches of 4, sorted by length, 32 steps in all."""

    def __init__(self, tiny_bert, output, graphs, monkeypatch, *words):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True, mixed_precision="no")
        stage = ["--model_name_or_path", "m", "--scores", "s", "--output_dir", str(output)]
        options = ["--total_batch_size", "4", "--num_epochs", "2", "--learning_rate", "1e-3", "--eval_steps", "8"]
        arguments = parse_stage("distill_bi2cross", argv=[*stage, *options, "--checkpointing_steps", "8", *words])
        torch.manual_seed(1)
        encoder = load_cross_encoder(str(tiny_bert), dropout=arguments.dropout)
        rows = [{**row, "score": row["score"] / 5} for row in random_pairs(64)]
        rows = PairInputs(datasets.Dataset.from_list(rows), encoder, 64, swap=False)
        monkeypatch.setattr(training, "cuda_graphs", lambda *_: graphs)
        self.shapes, self.losses, self.stop_after = [], [], None
        self.trainer = Trainer(accelerator, encoder, rows, self.loss_of, arguments, None)
        self.output = output
        output.mkdir(exist_ok=True)
        (output / "run.json").write_text("{}")  # as the stage begins it

    def loss_of(self, model, batch):
        if len(self.losses) == self.stop_after:
            raise KeyboardInterrupt
        self.shapes.append(tuple(batch["inputs"]["input_ids"].shape))
        loss = soft_bce(model(**batch["inputs"]), batch["scores"])
        self.losses.append(loss.item())
        return loss

    def run(self):
        """Weights, and the mean losses that are evaluated."""
        history = self.trainer.run()["history"]
        return load_file(self.output / "model.safetensors"), [entry["loss"] for entry in history]


class Chosen(Training):
    """Has dev scores that are given: of steps 8, 16, 24 and 32."""

    def __init__(self, scores, *given):
        super().__init__(*given)
        self.trainer.sets, self.trainer.select_by, self.trainer.keep_best = {"dev": self}, "dev", True
        self.scores, self.metric, self.weights = iter(scores), "spearman", []

    def score(self, model):
        self.weights.append({name: value.clone() for name, value in model.state_dict().items()})
        return next(self.scores)


@pytest.fixture
def writes(monkeypatch):
    """The folders that models are written to, in order."""
    names, save = [], CrossEncoder.save_pretrained

    def spy(self, folder, *given):
        names.append(folder.name)
        save(self, folder, *given)

    monkeypatch.setattr(CrossEncoder, "save_pretrained", spy)
    return names


@pytest.mark.parametrize(
    ("every", "scores", "written", "best"),
    [
        ("0", [1.0, 2.0, 3.0, 2.5], ["best-000024"], 2),  # once, at the end
        ("16", [1.0, 2.0, 3.0, 2.5], ["best-000016", "best-000024"], 2),  # and with a checkpoint
        ("8", [1.0, 0.5, None, 0.9], ["best-000008"], 0),  # once, though three checkpoints refer to it
    ],
)
def test_the_best_model_is_kept_in_memory_and_written_with_checkpoints_and_at_the_end(
    tiny_bert, tmp_path, monkeypatch, writes, every, scores, written, best
):
    run = Chosen(scores, tiny_bert, tmp_path, None, monkeypatch, "--checkpointing_steps", every)
    found, _ = run.run()
    assert writes == written
    state = run.trainer.model.state_dict()
    assert any(not torch.equal(value, run.weights[best][name]) for name, value in state.items())  # it went on
    for name, value in found.items():
        assert any(torch.equal(value, kept) for kept in run.weights[best].values()), name


def test_a_best_model_on_disk_outlives_a_kill_and_one_in_memory_is_found_again(
    tiny_bert, tmp_path, monkeypatch, writes
):
    """The checkpoint of step 16 refers to the best model of step 8; that of step 24 was in memory only."""
    whole = Chosen([2.0, 1.0, 3.0, 1.0], tiny_bert, tmp_path / "whole", None, monkeypatch).run()
    killed = Chosen([2.0, 1.0, 3.0], tiny_bert, tmp_path / "killed", None, monkeypatch, "--checkpointing_steps", "16")
    killed.stop_after = 27
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    folder = tmp_path / "killed" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["best-000008", "step-000016"]
    eight = load_file(folder / "best-000008" / "model.safetensors")
    for scores, expected in (([3.0, 1.0], whole[0]), ([1.0, 1.0], eight)):
        again = Chosen(scores, tiny_bert, tmp_path / "killed", None, monkeypatch, "--checkpointing_steps", "0")
        found, _ = again.run()
        for name, value in expected.items():
            assert torch.equal(value, found[name]), name
