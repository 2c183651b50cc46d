"""Recorded training steps, on a CPU: in the place of a CUDA graph stands the step itself, called again."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from test_training import Training

from transencoder.data import tokens
from transencoder.encoders import load_cross_encoder
from transencoder.losses import InfoNCE
from transencoder.runtime import cuda_graphs
from transencoder.runtime.cuda_graphs import WARM_UP


class StandIn:
    """Calls a step in the place of recording and replaying it, and counts."""

    def __init__(self):
        self.warmed, self.recorded, self.replayed = 0, 0, 0

    def warm_up(self, step):
        self.warmed += 1
        return step()

    def record(self, step):
        self.recorded += 1

        def replay():
            self.replayed += 1
            return step()

        return replay


class Broken(StandIn):
    """Fails in the middle of a recording, when half of the gradients are there."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def record(self, step):
        for parameter in self.model().parameters():
            parameter.grad = torch.full_like(parameter, 1e3)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")


def assert_equal(one, other):
    assert one[1] == other[1]
    for name, value in one[0].items():
        assert torch.equal(value, other[0][name]), name


@pytest.mark.parametrize("dropout", ["0", "0.1"])
def test_recorded_steps_give_what_eager_steps_give(tiny_bert, tmp_path, monkeypatch, dropout):
    """With dropout, too: the graphs draw from the same generator."""
    graphs = StandIn()
    eager = Training(tiny_bert, tmp_path / "eager", None, monkeypatch, "--dropout", dropout)
    weights, losses = eager.run()
    recorded = Training(tiny_bert, tmp_path / "recorded", graphs, monkeypatch, "--dropout", dropout)
    others, other_losses = recorded.run()
    assert recorded.shapes == eager.shapes
    assert recorded.losses == pytest.approx(eager.losses, rel=1e-4)
    assert other_losses == pytest.approx(losses, rel=1e-4)
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, atol=1e-5, rtol=1e-4, msg=name)
    counts = [eager.shapes.count(shape) for shape in set(eager.shapes)]
    assert graphs.recorded == sum(count > WARM_UP for count in counts) > 1
    assert graphs.warmed == sum(min(count, WARM_UP) for count in counts)
    assert graphs.replayed == 32 - graphs.warmed > 8


def test_the_learning_rate_is_read_from_the_device_and_nothing_else_notices(tiny_bert, tmp_path, monkeypatch):
    run = Training(tiny_bert, tmp_path, StandIn(), monkeypatch, "--warmup_ratio", "0.5")
    optimizer, seen = run.trainer.optimizer.optimizer, []
    step = optimizer.step

    def spy():
        seen.append([(id(group["lr"]), group["lr"].item(), group["capturable"]) for group in optimizer.param_groups])
        return step()

    monkeypatch.setattr(optimizer, "step", spy)
    run.run()
    expected = [1e-3 * (n / 16 if n < 16 else (32 - n) / 16) for n in range(32)]
    for group in range(2):
        assert len({step[group][0] for step in seen}) == 1  # the same tensor at every step
        assert [step[group][1] for step in seen] == pytest.approx(expected)
        assert all(step[group][2] for step in seen)
    assert all(isinstance(group["lr"], float) and not group["capturable"] for group in optimizer.param_groups)


def test_what_cannot_be_recorded_is_computed_eagerly(tiny_bert, tmp_path, monkeypatch, capsys):
    whole = Training(tiny_bert, tmp_path / "whole", StandIn(), monkeypatch).run()
    assert "CUDA graphs" not in capsys.readouterr().err
    broken = Broken(lambda: run.trainer.model)
    run = Training(tiny_bert, tmp_path / "broken", broken, monkeypatch)
    assert_equal(whole, run.run())
    lines = [line for line in capsys.readouterr().err.splitlines() if "CUDA graphs" in line]
    assert lines == [
        "Training goes on without CUDA graphs, more slowly: a step cannot be recorded "
        "(operation not permitted when stream is capturing)"
    ]


def test_a_loss_that_fails_is_not_taken_for_one_that_cannot_be_recorded(tiny_bert, tmp_path, monkeypatch):
    run = Training(tiny_bert, tmp_path, StandIn(), monkeypatch)
    run.trainer.recorded.loss_of = lambda model, batch: batch["no such column"]
    with pytest.raises(KeyError):
        run.run()


@pytest.mark.parametrize("second", [StandIn(), None], ids=["recorded", "eager"])
def test_a_recorded_training_goes_on_where_it_was(tiny_bert, tmp_path, monkeypatch, second):
    """To the bit; and to rounding without graphs, as the checkpoint knows nothing of them."""
    whole = Training(tiny_bert, tmp_path / "whole", StandIn(), monkeypatch).run()
    first = Training(tiny_bert, tmp_path / "killed", StandIn(), monkeypatch)
    first.stop_after = 21
    with pytest.raises(KeyboardInterrupt):
        first.run()
    resumed = Training(tiny_bert, tmp_path / "killed", second, monkeypatch)
    found = resumed.run()
    assert len(resumed.losses) == 16
    if second:
        assert_equal(whole, found)
    for name, value in whole[0].items():
        torch.testing.assert_close(found[0][name], value, atol=1e-5, rtol=1e-4, msg=name)


def accelerator_of_a_gpu(**changes):
    given = dict(
        device=torch.device("cuda"), num_processes=1, distributed_type=DistributedType.NO, scaler=None, deepspeed=None
    )
    return SimpleNamespace(**given | changes)


@pytest.mark.parametrize(
    ("changes", "micro_batches", "loss_of", "said"),
    [
        ({}, 1, InfoNCE(0.05), None),
        ({"device": torch.device("cpu"), "num_processes": 2}, 1, None, None),
        ({"num_processes": 2}, 1, None, "2 processes"),
        ({"distributed_type": DistributedType.FSDP}, 1, None, "fsdp"),
        ({}, 2, None, "gradient accumulation"),
        ({"scaler": object()}, 2, None, "gradient accumulation and fp16, which scales the loss"),
        ({}, 1, SimpleNamespace(is_recordable=False), "a loss with a memory"),
    ],
)
def test_what_is_in_the_way_is_said_in_a_line(monkeypatch, capsys, changes, micro_batches, loss_of, said):
    monkeypatch.setattr(cuda_graphs, "CUDAGraphs", StandIn)
    accelerator = accelerator_of_a_gpu(**changes)
    found = cuda_graphs.cuda_graphs(accelerator, micro_batches, loss_of)
    assert (found is None) == (said is not None or accelerator.device.type == "cpu")
    line = "" if said is None else f"Training without CUDA graphs, which do not go with {said}\n"
    assert capsys.readouterr().err == line


def test_the_option_turns_them_off(tiny_bert, tmp_path, monkeypatch):
    assert Training(tiny_bert, tmp_path, StandIn(), monkeypatch, "--cuda_graphs", "off").trainer.recorded is None


def test_a_gpus_batches_are_padded_to_a_multiple_of_eight_within_the_models_length(tiny_bert, monkeypatch):
    encoder = load_cross_encoder(str(tiny_bert)).eval()
    texts = [["a", "the card is late"], ["my parcel", "is the parcel not late"]]
    plain = encoder.preprocessor().batch(*texts)
    length = plain["input_ids"].shape[1]
    monkeypatch.setattr(tokens, "MULTIPLE", {"cpu": 8})
    padded = encoder.preprocessor().batch(*texts)
    assert length % 8 and padded["input_ids"].shape == (2, -(-length // 8) * 8)
    assert not padded["attention_mask"][:, length:].any()
    torch.testing.assert_close(encoder(**padded), encoder(**plain))
    encoder.model.max_seq_length = length + 1
    assert encoder.preprocessor().batch(*texts)["input_ids"].shape == (2, length + 1)
