"""What saves work changes no result."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel

from transencoder.runtime.speed import (
    ATTENTION_ENDS,
    CPUDropout,
    keep_few_primitives,
    read_first_token_only,
    use_cpu_dropout,
)

SIZES = dict(vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
OTHER_OPTIONS = {
    "distilbert": dict(dim=16, n_layers=3, n_heads=2, hidden_dim=32, vocab_size=50),
    "modernbert": SIZES | dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
}


def make_model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    options = OTHER_OPTIONS.get(kind, SIZES)
    return AutoModel.from_config(CONFIG_MAPPING[kind](max_position_embeddings=20, **options)).eval()


def first_token(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Size]:
    """The first token's last state, the gradients of all weights by its sum of squares, and all states' shape."""
    ids = torch.arange(5, 35).view(3, 10)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    first = states[:, 0]
    model.zero_grad()
    first.pow(2).sum().backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return first.detach(), gradients, states.shape


@pytest.mark.parametrize("kind", ATTENTION_ENDS)
def test_the_first_token_and_its_gradients_are_those_of_the_whole_layer(kind):
    model = make_model(kind)
    whole, gradients, shape = first_token(model)
    assert shape == (3, 10, 16)
    read_first_token_only(model)
    alone, others, shape = first_token(model)
    assert shape == (3, 1, 16)
    torch.testing.assert_close(alone, whole)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, msg=name)


def test_an_architecture_that_is_not_known_computes_all_tokens():
    model = make_model("modernbert")
    read_first_token_only(model)
    assert first_token(model)[2] == (3, 10, 16)


def test_dropout_keeps_and_scales_up_the_share_that_it_should():
    dropout = CPUDropout(0.1)
    torch.manual_seed(3)
    ones = torch.ones(501, 403, requires_grad=True)
    dropped = dropout(ones)
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.9).item()}
    kept = (dropped > 0).double().mean().item()
    assert abs(kept - 0.9) < 4 * (0.09 / ones.numel()) ** 0.5  # four standard deviations
    dropped.sum().backward()
    assert torch.equal(ones.grad, dropped.detach())


def test_dropout_draws_from_torchs_generator():
    dropout, states = CPUDropout(0.3), torch.ones(7, 9)
    torch.manual_seed(5)
    first, second = dropout(states), dropout(states)
    torch.manual_seed(5)
    assert torch.equal(dropout(states), first) and not torch.equal(first, second)
    rows = [torch.equal(first[0], row) for row in first[1:]]
    assert not all(rows)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_dropout_of_nothing_and_of_everything(probability):
    dropped = CPUDropout(probability)(torch.ones(4, 4))
    assert torch.equal(dropped, torch.full((4, 4), 1 - probability))


def test_every_dropout_layer_is_exchanged_and_none_works_outside_training():
    model = make_model("bert")
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout)]
    before, weights = first_token(model)[0], model.state_dict().keys()
    use_cpu_dropout(model)
    changed = {name: module for name, module in model.named_modules() if type(module) is CPUDropout}
    assert list(changed) == names and {module.p for module in changed.values()} == {0.1}
    assert torch.equal(first_token(model)[0], before) and model.state_dict().keys() == weights
    model.train()
    assert not torch.equal(first_token(model)[0], before)


CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


@pytest.mark.parametrize(
    ("precision", "before", "after"),
    [("no", "", "8"), ("no", "64", "64"), ("bf16", "", "24"), ("fp16", "", None)],
)
def test_few_primitives_are_kept_unless_the_user_says_otherwise(monkeypatch, precision, before, after):
    monkeypatch.setenv(CAPACITY, before)
    if not before:
        monkeypatch.delenv(CAPACITY)
    keep_few_primitives(precision)
    assert os.environ.get(CAPACITY) == after


GELU_OF_FORTY_SHAPES_TWICE = """
import torch
from transencoder.runtime.speed import keep_few_primitives
keep_few_primitives("no")
torch.set_num_threads(1)
for length in [*range(5, 45)] * 2:
    torch.nn.functional.gelu(torch.ones(20, length, 128))
"""


def test_the_number_of_primitives_is_set_before_onednn_reads_it():
    """oneDNN tells of each one that it has to make: all of them twice, if eight of forty are kept."""
    made = {}
    for capacity in ({}, {CAPACITY: "1024"}):
        environment = {name: value for name, value in os.environ.items() if name != CAPACITY}
        environment |= {"ONEDNN_VERBOSE": "profile_create", **capacity}
        command = [sys.executable, "-c", GELU_OF_FORTY_SHAPES_TWICE]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        made[capacity.get(CAPACITY)] = result.stdout.count("create:cache_miss")
    if made["1024"] == 0:
        pytest.skip("this PyTorch does not compute GELU with oneDNN")
    assert made == {None: 80, "1024": 40}


FREED = """
import resource
from pathlib import Path

from transencoder.runtime.speed import release_freed_memory


def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


blocks = [bytearray(65_536) for _ in range(3_000)]
last = blocks.pop()  # stands above the others, so that the C library cannot give them back by itself
blocks.clear()
before = resident_mb()
release_freed_memory()
print(before - resident_mb())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked to give memory back")
def test_freed_memory_goes_back_to_the_system():
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 150  # of 197 MB
