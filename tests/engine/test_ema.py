"""Averaged weights against the formula, and what happens to everything that is not averaged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from condgen.engine.ema import Ema
from condgen.errors import CheckpointError, ConfigError


def network():
    torch.manual_seed(0)
    made = nn.ModuleDict({"a": nn.Linear(3, 2), "norm": nn.BatchNorm1d(2), "b": nn.Linear(2, 1)})
    made.register_buffer("scratch", torch.zeros(2), persistent=False)
    return made


def move(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.randn_like(parameter)


@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_follows_the_formula_with_warmup(warmup):
    module = network()
    ema = Ema(module, decay=0.7, warmup=warmup)
    expected = module["a"].weight.detach().double().clone()
    for n in range(30):
        move(module)
        decay = min(0.7, (1 + n) / (10 + n)) if warmup else 0.7
        expected = decay * expected + (1 - decay) * module["a"].weight.detach().double()
        ema.update()
    torch.testing.assert_close(ema.tensors()["a.weight"].double(), expected, rtol=0, atol=1e-6)


def test_names_are_those_of_the_state_dict_and_can_be_limited():
    module = network()
    assert set(Ema(module).tensors()) == set(module.state_dict())
    assert set(Ema(module, ("norm",)).tensors()) == {n for n in module.state_dict() if n.startswith("norm.")}


def test_decay_zero_is_a_plain_copy():
    module = network()
    ema = Ema(module, decay=0.0)
    move(module)
    ema.update()
    assert torch.equal(ema.tensors()["b.weight"], module["b"].weight)


def test_applied_swaps_and_restores_also_after_an_error():
    module = network()
    ema = Ema(module, ("a",), decay=0.9)
    move(module)
    own, average = module["a"].weight.detach().clone(), ema.tensors()["a.weight"].clone()
    with pytest.raises(KeyError), ema.applied(module):
        assert torch.equal(module["a"].weight, average)
        raise KeyError
    assert torch.equal(module["a"].weight, own) and torch.equal(ema.tensors()["a.weight"], average)
    with pytest.raises(ValueError, match="another system"), ema.applied(network()):
        pass


def test_tied_weights_are_averaged_and_swapped_once():
    module = network()
    module["c"] = nn.Linear(2, 1)
    module["c"].weight = module["b"].weight
    ema = Ema(module, decay=0.9)
    assert set(ema.tensors()) == set(module.state_dict())
    move(module)
    ema.update()
    assert ema.tensors()["c.weight"] is ema.tensors()["b.weight"]
    average = ema.tensors()["b.weight"].clone()
    with ema.applied():
        assert torch.equal(module["b"].weight, average) and module["c"].weight is module["b"].weight
    assert not torch.equal(module["b"].weight, average)


def test_buffers_are_the_system_s_own():
    module = network()
    ema = Ema(module)
    module["norm"].running_mean.fill_(7)
    assert torch.equal(ema.tensors()["norm.running_mean"], torch.full((2,), 7.0))


def test_load_restores_and_is_strict():
    module, other = network(), network()
    move(other)
    source, ema = Ema(other), Ema(module)
    ema.load(source.tensors())
    assert torch.equal(ema.tensors()["a.weight"], other["a"].weight)
    held = dict(source.tensors())
    del held["a.weight"]
    held["a.wait"] = torch.zeros(1)
    held["b.bias"] = torch.zeros(5)
    with pytest.raises(CheckpointError, match=r"missing: a\.weight; unexpected: a\.wait; of another shape: b\.bias"):
        ema.load(held)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ConfigError, match="ema_decay"):
        Ema(network(), decay=decay)


def test_without_decay_there_is_no_copy_and_the_weights_are_as_they_are():
    module = nn.Linear(3, 2)
    ema = Ema(module, decay=0.0)
    assert ema.tensors()["weight"].data_ptr() == module.weight.data_ptr()
    saved = {name: value + 1 for name, value in ema.tensors().items()}
    before = module.weight.detach().clone()
    ema.load(saved)  # an average of another run must not replace the weights
    with ema.applied():
        assert torch.equal(module.weight, before)
    module.weight.data = module.weight.data + 2
    ema.update()
    assert torch.equal(ema.tensors()["weight"], before + 2)
