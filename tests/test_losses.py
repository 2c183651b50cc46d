"""The losses against values worked out by hand."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from conftest import ROOT, random_pairs, write_jsonl
from safetensors.torch import load_file

from transencoder.batches import LengthWindowSampler
from transencoder.config.options import Choice, HubTarget
from transencoder.config.parsing import parse_stage
from transencoder.data.tables import PAIRS
from transencoder.hub.card import CardContent, render_card
from transencoder.labels import write_scores
from transencoder.losses import (
    BI_LOSSES,
    CROSS_LOSSES,
    CosineLoss,
    InfoNCE,
    QueueLoss,
    bce_targets,
    contrastive,
    cosent,
    cosine_bce,
    cosine_mse,
    info_nce,
    listwise,
    logistic,
    margin_mse,
    pairwise_logistic,
    scaled_bce,
    soft_bce,
    soft_mse,
)
from transencoder.training import make_optimizer

# --- step 1 ----------------------------------------------------------------------------------------------------------

FIRST = torch.tensor([[1.0, 0.0], [0.0, 5.0]])
SECOND = torch.tensor([[3.0, 0.0], [0.6, 0.8]])


def test_info_nce_of_two_sentences():
    # Cosines: 1.0 0.6    divided by 0.5: 2.0 1.2
    #          0.0 0.8                    0.0 1.6
    # -log softmax of the diagonal: log(1 + e^-0.8) = 0.371101, log(1 + e^-1.6) = 0.183901; mean 0.277501
    assert info_nce(FIRST, SECOND, temperature=0.5).item() == pytest.approx(0.277501, abs=1e-5)
    # The candidates are the rows of `second`: columns of the table above would give log(1 + e^-2.0), log(1 + e^-0.4).
    # 0.126928, 0.513015; mean 0.319972
    assert info_nce(SECOND, FIRST, temperature=0.5).item() == pytest.approx(0.319972, abs=1e-5)


def test_info_nce_does_not_see_the_length_of_embeddings():
    assert info_nce(7 * FIRST, 0.1 * SECOND, 0.5).item() == pytest.approx(0.277501, abs=1e-5)


def test_info_nce_pulls_the_two_views_together_and_others_apart():
    torch.manual_seed(0)
    first, second = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    info_nce(first, second, 0.05).backward()
    with torch.no_grad():
        before = F.cosine_similarity(first[:, None], second[None], dim=-1)
        step = [first - 1e-2 * first.grad, second - 1e-2 * second.grad]
        change = F.cosine_similarity(step[0][:, None], step[1][None], dim=-1) - before
    assert change.diagonal().mean() > 0
    assert change[~torch.eye(6, dtype=torch.bool)].mean() < 0


def train_half(rank: int, folder: str) -> None:
    """One of two processes: its half of the batch, and the gradients averaged as data-parallel training does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    batch = torch.load(f"{folder}/batch.pt")
    weight = batch["weight"].requires_grad_()
    rows = slice(4 * rank, 4 * rank + 4)
    loss = info_nce(batch["first"][rows] @ weight, batch["second"][rows] @ weight, 0.1)
    loss.backward()
    both = torch.cat([weight.grad.flatten(), loss.detach()[None]])
    dist.all_reduce(both)
    if rank == 0:
        torch.save(both / 2, f"{folder}/mean.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_info_nce_of_two_processes_trains_as_one_process_with_the_whole_batch(tmp_path: Path):
    torch.manual_seed(0)
    batch = {"first": torch.randn(8, 5), "second": torch.randn(8, 5), "weight": torch.randn(5, 3)}
    torch.save(batch, tmp_path / "batch.pt")
    torch.multiprocessing.spawn(train_half, args=(str(tmp_path),), nprocs=2)
    mean = torch.load(tmp_path / "mean.pt")

    weight = batch["weight"].requires_grad_()
    loss = info_nce(batch["first"] @ weight, batch["second"] @ weight, 0.1)
    loss.backward()
    torch.testing.assert_close(mean[:-1].reshape(5, 3), weight.grad)
    torch.testing.assert_close(mean[-1], loss.detach())


def test_queue_loss_of_two_sentences():
    # Teacher: cosines 1 and 0 over 0.5: softmax of 2 and 0, 0.880797 and 0.119203. Student: 0.6 and 0.8 over 0.25:
    # softmax of 2.4 and 3.2, 0.310026 and 0.689974. Divergence: 0.880797 log(0.880797 / 0.310026) + 0.119203
    # log(0.119203 / 0.689974) = 0.919703 - 0.209300 = 0.710404
    queue = torch.eye(2)
    loss_of = QueueLoss(torch.nn.functional.pad(queue, (0, 1)), queue, 0.25, 0.5)
    batch = {"inputs": {"x": torch.tensor([[3.0, 4.0]])}, "teacher": torch.tensor([[1.0, 0.0, 0.0]])}
    loss = loss_of(lambda x: x, {**batch, "places": torch.tensor([-1])})
    assert loss.item() == pytest.approx(0.710404, abs=1e-5)
    # A sentence of the queue is left out of its own distribution, which is one of a single sentence here.
    assert loss_of(lambda x: x, {**batch, "places": torch.tensor([1])}).item() == 0


class NoisyLinear(torch.nn.Module):
    """A stand-in for an encoder with dropout: inputs as a model's, embeddings as their output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(6, 4))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return F.dropout(input_ids @ self.weight, 0.5, self.training)


def test_a_batch_in_micro_batches_has_the_loss_and_the_gradient_of_the_whole_batch():
    first, second, model, loss_of = torch.randn(8, 6), torch.randn(8, 6), NoisyLinear().eval(), InfoNCE(0.1)
    whole = info_nce(model(first), model(second), 0.1)
    (expected,) = torch.autograd.grad(whole, model.weight)
    micro_batches = [
        {"inputs": {"input_ids": torch.cat([first[i : i + 2], second[i : i + 2]])}} for i in range(0, 8, 2)
    ]
    loss_of.look_ahead(model, micro_batches)
    for micro_batch in micro_batches:
        loss = loss_of(model, micro_batch)
        assert loss.item() == pytest.approx(whole.item(), abs=1e-6)
        (loss / 4).backward()  # as gradient accumulation divides
    torch.testing.assert_close(model.weight.grad, expected)
    # Without micro-batches, the plain loss.
    assert loss_of(model, {"inputs": {"input_ids": torch.cat([first, second])}}).item() == pytest.approx(whole.item())


def test_a_micro_batch_is_dropped_out_alike_in_both_passes():
    model, loss_of, seen = NoisyLinear().train(), InfoNCE(0.1), []
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().clone()))
    micro_batches = [{"inputs": {"input_ids": torch.randn(4, 6)}} for _ in range(3)]
    loss_of.look_ahead(model, micro_batches)
    for micro_batch in micro_batches:
        loss_of(model, micro_batch)
    for before, after in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(before, after)
    assert not torch.equal(seen[0] == 0, seen[1] == 0)  # and not alike in two micro-batches


# --- step 2 ----------------------------------------------------------------------------------------------------------


def test_soft_bce_of_two_pairs():
    # Logit 0 against 0.5: log 2 = 0.693147. Logit 2 against 1: log(1 + e^-2) = 0.126928. Mean 0.410038
    loss = soft_bce(torch.tensor([0.0, 2.0]), torch.tensor([0.5, 1.0]))
    assert loss.item() == pytest.approx(0.410038, abs=1e-5)
    # Logit 2 against 0.25: 0.25 log(1 + e^-2) + 0.75 log(1 + e^2) = 0.031732 + 1.595196
    assert soft_bce(torch.tensor([2.0]), torch.tensor([0.25])).item() == pytest.approx(1.626928, abs=1e-5)


@pytest.mark.parametrize("score", [0.1, 0.5, 0.9])
def test_soft_bce_is_least_where_the_sigmoid_is_the_score(score):
    best = torch.tensor([score]).logit()
    logits = torch.tensor([best - 1, best, best + 1], requires_grad=True)
    soft_bce(logits, torch.full((3,), score)).backward()
    below, at, above = logits.grad.tolist()
    assert at == pytest.approx(0, abs=1e-6)
    assert below < -0.01  # towards the score from both sides
    assert above > 0.01


def test_shifted_targets_keep_every_difference():
    # [-0.25, 1] is mapped to [0, 1]: (x + 0.25) / 1.25
    targets = bce_targets(np.array([-0.25, 0.0, 0.5, 1.0], dtype=np.float32), "none", "shift")
    np.testing.assert_allclose(targets, [0.0, 0.2, 0.6, 1.0], atol=1e-6)


def test_clipped_targets_make_every_negative_cosine_0():
    targets = bce_targets(np.array([-1.0, -0.25, 0.0, 0.5, 1.0], dtype=np.float32), "none", "clip")
    assert targets.tolist() == [0.0, 0.0, 0.0, 0.5, 1.0]


@pytest.mark.parametrize("negatives", ["shift", "clip"])
def test_targets_without_negative_cosines_are_the_cosines(negatives):
    assert bce_targets(np.array([0.25, 0.5], dtype=np.float32), "none", negatives).tolist() == [0.25, 0.5]


@pytest.mark.parametrize("negatives", ["shift", "clip"])
def test_targets_never_leave_0_to_1(negatives):
    # A cosine of equal vectors may come out a little above 1.
    targets = bce_targets(np.array([-1.0, -0.5, 1.0000001], dtype=np.float32), "none", negatives)
    assert targets.min() >= 0
    assert targets.max() <= 1


def test_logistic_scores_spread_over_their_standard_score():
    # Mean 0.6, deviation sqrt((0.04 + 0.04) / 4) = 0.141421: standard scores -1.414214, 1.414214, 0, 0.
    # Sigmoid of twice that: 1 / (1 + e^2.828427) = 0.055807, 0.944193, 0.5, 0.5
    found = logistic(np.array([0.4, 0.8, 0.6, 0.6]))
    np.testing.assert_allclose(found, [0.055807, 0.944193, 0.5, 0.5], atol=1e-5)


def test_scores_that_need_no_other_scale_stay():
    scores = np.array([0.4, 0.6], dtype=np.float32)
    assert bce_targets(scores, "none", "shift").tolist() == scores.tolist()
    assert logistic(np.full(3, 0.7, dtype=np.float32)).tolist() == pytest.approx([0.7] * 3)  # no spread
    two = logistic(np.array([0.4, 0.6]))
    assert two.tolist() == pytest.approx([0.119203, 0.880797], abs=1e-5)  # sigmoid of -2, 2


# --- step 3 ----------------------------------------------------------------------------------------------------------


def test_cosine_mse_of_two_pairs():
    # Cosines 0.6 and 0, scores 1 and 0.5: (0.4^2 + 0.5^2) / 2 = 0.205; the length of the vectors does not matter
    first, second = torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.6, 0.8], [0.0, 9.0]])
    assert cosine_mse(first, second, torch.tensor([1.0, 0.5])).item() == pytest.approx(0.205, abs=1e-6)


def test_cosine_mse_moves_the_cosine_towards_the_score():
    first = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    second = torch.tensor([[0.6, 0.8], [0.6, 0.8]])
    cosine_mse(first, second, torch.tensor([0.9, 0.3])).backward()
    up, down = F.cosine_similarity(first.detach() - 0.1 * first.grad, second).tolist()
    assert 0.6 < up < 0.9
    assert 0.3 < down < 0.6


# --- ablations -------------------------------------------------------------------------------------------------------


def test_soft_mse_of_two_pairs():
    # Logit 0 against 0.5: 0. Logit 2 against 1: (1 - 0.880797)^2 = 0.0142093. Mean 0.0071047
    loss = soft_mse(torch.tensor([0.0, 2.0]), torch.tensor([0.5, 1.0]))
    assert loss.item() == pytest.approx(0.0071047, abs=1e-6)


def test_cosine_bce_of_two_pairs():
    # Cosines 0.6 and 0, scores 1 and 0.5: log(1 + e^-0.6) = 0.437488, log 2 = 0.693147; mean 0.565317
    first, second = torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.6, 0.8], [0.0, 9.0]])
    assert cosine_bce(first, second, torch.tensor([1.0, 0.5])).item() == pytest.approx(0.565317, abs=1e-5)
    # A score below 0 counts as 0: log(1 + e^0.6) = 1.037488
    assert cosine_bce(first[:1], second[:1], torch.tensor([-0.5])).item() == pytest.approx(1.037488, abs=1e-5)


# --- pairs compared with pairs ---------------------------------------------------------------------------------------

# Cosines 0.6, 0 and 0.8.
ONE, OTHER = torch.tensor([[2.0, 0.0], [1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.6, 0.8], [0.0, 9.0], [0.8, 0.6]])


def test_margin_mse_of_two_pairs():
    # Sigmoids 0.5 and 0.880797 differ by 0.380797, the targets by 0.5: 0.119203^2 = 0.0142093
    logits, targets = torch.tensor([0.0, 2.0]), torch.tensor([0.5, 1.0])
    assert margin_mse(logits, targets).item() == pytest.approx(0.0142093, abs=1e-6)
    assert margin_mse(logits, targets - 0.4).item() == pytest.approx(0.0142093, abs=1e-6)  # the level does not matter
    assert margin_mse(logits[:1], targets[:1]).item() == 0


def test_margin_mse_is_the_mean_over_all_two_pairs():
    torch.manual_seed(0)
    logits, targets = torch.randn(5), torch.rand(5)
    scores = logits.sigmoid()
    squares = [(scores[i] - scores[j] - targets[i] + targets[j]) ** 2 for i in range(5) for j in range(5) if i != j]
    torch.testing.assert_close(margin_mse(logits, targets), torch.stack(squares).mean())


def test_pairwise_logistic_of_three_pairs():
    # Targets 0.9 over 0.1 with logits 0 and 2: 0.8 log(1 + e^2); 0.9 over 0.6 with 0 and 1: 0.3 log(1 + e);
    # 0.6 over 0.1 with 1 and 2: 0.5 log(1 + e). (0.8 x 2.126928 + 0.8 x 1.313262) / 1.6 = 1.720095
    loss = pairwise_logistic(torch.tensor([0.0, 2.0, 1.0]), torch.tensor([0.9, 0.1, 0.6]))
    assert loss.item() == pytest.approx(1.720095, abs=1e-5)
    assert pairwise_logistic(torch.tensor([0.0, 2.0]), torch.tensor([0.5, 0.5])).item() == 0


def test_scaled_bce_of_two_pairs():
    # Cosines 0.6 and 0 become the logits 10 x 0.6 - 5 = 1 and -5. Against 1: log(1 + e^-1) = 0.313262. Against 0.5:
    # (log(1 + e^5) + log(1 + e^-5)) / 2 = 2.506715. Mean 1.409988
    scaling = torch.tensor([np.log(10.0), -5.0])
    loss = scaled_bce(ONE[:2], OTHER[:2], torch.tensor([1.0, 0.5]), scaling=scaling)
    assert loss.item() == pytest.approx(1.409988, abs=1e-5)


def test_cosent_of_three_pairs():
    # The first one should be above both others: log(1 + e^((0 - 0.6) / 0.5) + e^((0.8 - 0.6) / 0.5)), which is
    # log(1 + 0.301194 + 1.491825) = 1.027123. The others' scores are equal.
    loss = cosent(ONE, OTHER, torch.tensor([3.0, 0.5, 0.5]), temperature=0.5)
    assert loss.item() == pytest.approx(1.027123, abs=1e-5)
    assert cosent(ONE, OTHER, torch.ones(3), temperature=0.5).item() == 0


def test_listwise_of_two_candidates():
    # Softmax of cosines 0.6 and 0 over 0.5: 0.768525, 0.231475; of the scores 1 and 0.5: 0.731059, 0.268941.
    # 0.731059 (log 0.731059 - log 0.768525) + 0.268941 (log 0.268941 - log 0.231475) = 0.003809
    scores, anchors = torch.tensor([1.0, 0.5, 0.3]), torch.tensor([7, 7, 9])
    loss = listwise(ONE, OTHER, scores, temperature=0.5, anchors=anchors)
    assert loss.item() == pytest.approx(0.003809, abs=1e-5)  # the third one is alone
    assert listwise(ONE, OTHER, scores, temperature=0.5, anchors=torch.arange(3)).item() == 0


def test_contrastive_counts_the_pairs_above_and_no_pair_that_shares_a_sentence():
    # The losses of the two pairs are 0.371101 and 0.183901, as of `info_nce`.
    scores, apart = torch.tensor([0.9, 0.1]), torch.tensor([0, 1])
    for above, expected in ((0.0, 0.277501), (0.5, 0.371101), (0.95, 0.0)):
        loss = contrastive(FIRST, SECOND, scores, 0.5, above, anchors=apart, others=apart)
        assert loss.item() == pytest.approx(expected, abs=1e-5)
    for sides in ({"anchors": apart * 0, "others": apart}, {"anchors": apart, "others": apart * 0}):
        assert contrastive(FIRST, SECOND, scores, 0.5, 0.0, **sides).item() == 0
    # The second pair's second sentence is the first pair's first one: it is left with itself, the other as it was.
    loss = contrastive(FIRST, SECOND, scores, 0.5, 0.0, anchors=apart, others=torch.tensor([2, 0]))
    assert loss.item() == pytest.approx(0.183901 / 2, abs=1e-5)


@pytest.mark.parametrize("name", BI_LOSSES)
def test_a_share_of_the_loss_is_contrastive_and_all_gradients_are_finite(name):
    torch.manual_seed(0)
    weight = torch.randn(4, 6, requires_grad=True)
    inputs, scores, anchors = torch.randn(10, 4), torch.rand(5), torch.tensor([0, 0, 1, 2, 2])
    batch = {"inputs": {"x": inputs}, "scores": scores, "anchors": anchors, "others": torch.arange(5) + 10}

    def loss_with(share: float) -> torch.Tensor:
        loss_of = CosineLoss(name, 0.1, share, 0.3)
        head = loss_of.head() or torch.nn.Identity()
        return loss_of(lambda x: head(x @ weight), batch)

    whole, half, none = loss_with(0.0), loss_with(0.5), loss_with(1.0)
    torch.testing.assert_close(half, (whole + none) / 2)
    half.backward()
    assert weight.grad.isfinite().all() and weight.grad.abs().sum() > 0


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_rows_of_a_group_come_together(micro_batches):
    draw = np.random.default_rng(0)
    groups, lengths = draw.integers(30, size=120), draw.integers(3, 40, size=120)
    sampler = LengthWindowSampler(lengths, 8, micro_batches, 4, seed=1, groups=groups)
    rows = list(sampler)
    batches = np.reshape(rows, (-1, 8))
    assert sorted(batches.ravel()) == list(range(120))
    parts = sum(len(set(groups[batch])) for batch in batches)
    assert parts <= 30 + len(batches) + 120 // 32  # torn only where a batch or a window ends
    sampler.epoch = 1
    assert list(sampler) != rows


LOSSES = [("distill_cross2bi.py", name) for name in BI_LOSSES] + [
    ("distill_bi2cross.py", name) for name in CROSS_LOSSES
]


@pytest.mark.parametrize(("script", "name"), LOSSES)
def test_every_loss_trains_a_model_that_is_saved_as_any_other(
    script, name, bi_encoder, tiny_bert, tmp_path, run_script
):
    is_bi = script == "distill_cross2bi.py"
    model, start = tmp_path / "model", bi_encoder if is_bi else tiny_bert
    scores = write_jsonl(tmp_path / "scores.jsonl", [{**row, "score": row["score"] / 5} for row in random_pairs(32)])
    words = ["--model_name_or_path", start, "--scores", scores, "--output_dir", model, "--loss", name]
    words += ["--total_batch_size", 8, "--max_steps", 3, "--mixed_precision", "no"]
    result = run_script(script, *words, *(["--contrastive_share", 0.2] if is_bi else []))
    assert result.returncode == 0, result.stderr
    if is_bi:
        before, after = (load_file(folder / "model.safetensors") for folder in (start, model))
        assert before.keys() == after.keys()


def test_scale_and_bias_have_a_learning_rate_of_their_own():
    model, head = torch.nn.Linear(2, 2), CosineLoss("bce_scaled", 0.05).head()
    words = ["--model_name_or_path", "m", "--scores", "s", "--output_dir", "o"]
    optimizer = make_optimizer(torch.nn.Sequential(model, head), parse_stage("distill_cross2bi", argv=words))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates == {id(model.weight): 5e-5, id(model.bias): 5e-5, id(head.values): 1e-2}


# --- all -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_computed_in_float32(kind):
    torch.manual_seed(0)
    first, second = torch.randn(4, 16).to(kind), torch.randn(4, 16).to(kind)
    logits, scores = torch.randn(4).to(kind), torch.rand(4).to(kind)
    for loss, inputs in [
        (info_nce, (first, second)),
        (soft_bce, (logits, scores)),
        (cosine_mse, (first, second, scores)),
    ]:
        extra = (0.05,) if loss is info_nce else ()
        found = loss(*inputs, *extra)
        assert found.dtype == torch.float32
        assert found == loss(*(value.float() for value in inputs), *extra)


# --- registries ------------------------------------------------------------------------------------------------------

WITH_A_NEW_LOSS = """
import runpy, sys
from torch.nn.functional import huber_loss
from transencoder.config.options import Choice
from transencoder.losses import CROSS_LOSSES

loss = lambda logits, targets: huber_loss(logits.sigmoid(), targets)
CROSS_LOSSES["huber"] = Choice(loss, "less weight on outliers", "Huber loss")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_new_loss_is_an_entry_in_its_registry_and_nothing_else(tiny_bert, tmp_path, monkeypatch):
    """It parses, trains, and the model's card says it."""
    scores, model = tmp_path / "scores.parquet", tmp_path / "out" / "model"
    pairs = datasets.Dataset.from_list([{name: row[name] for name in PAIRS} for row in random_pairs(32)])
    write_scores(scores, pairs, np.linspace(0, 1, len(pairs), dtype=np.float32), {"pairs": ["mine"]})
    words = ["--model_name_or_path", tiny_bert, "--scores", scores, "--output_dir", model, "--loss", "huber"]
    words = [ROOT / "scripts" / "distill_bi2cross.py", *words, "--total_batch_size", "16"]
    command = [sys.executable, "-c", WITH_A_NEW_LOSS, *map(str, words)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    monkeypatch.setitem(CROSS_LOSSES, "huber", Choice(None, "", "Huber loss"))
    card = render_card(CardContent("acme/x", model, "cross", str(tiny_bert), ""), HubTarget())
    assert "give to pairs of sentences (Huber loss)." in " ".join(card.split())
    assert "| `loss` | huber |" in card
