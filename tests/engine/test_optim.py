"""Optimisers by name and stateless schedules."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from condgen.engine.optim import OptimOptions, learning_rate, make_optimizer, state_keys
from condgen.errors import ConfigError

TOTAL = 100


def rates(**options):
    chosen = OptimOptions(lr=1.0, **options)
    return [learning_rate(step, TOTAL, chosen) for step in range(TOTAL)]


def test_constant_with_warmup_rises_in_equal_steps_to_the_peak():
    got = rates(warmup=4)
    assert got[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and set(got[4:]) == {1.0}


def test_linear_is_flat_then_falls_evenly_towards_zero():
    got = rates(schedule="linear", decay_start=50)
    assert set(got[:51]) == {1.0}
    assert got[75] == pytest.approx(0.5) and got[-1] == pytest.approx(1 / 50)
    assert learning_rate(TOTAL, TOTAL, OptimOptions(schedule="linear", decay_start=50)) == 0


def test_cosine_starts_at_the_peak_after_the_warmup_and_halves_in_the_middle():
    got = rates(schedule="cosine", warmup=20)
    assert got[20] == 1.0 and got[60] == pytest.approx(0.5) and 0 < got[-1] < 0.01
    assert all(a >= b for a, b in itertools.pairwise(got[20:]))


def test_step_multiplies_at_every_interval():
    got = rates(schedule="step", decay_start=10, decay_every=30, decay_factor=0.5)
    assert [got[9], got[10], got[39], got[40], got[69], got[70]] == [1, 1, 1, 0.5, 0.5, 0.25]


def test_exponential_multiplies_at_every_step_after_the_warmup():
    got = rates(schedule="exponential", warmup=2, decay_start=5, decay_factor=0.99)
    assert got[:7] == [0.5, 1, 1, 1, 1, 1, 0.99] and got[-1] == pytest.approx(0.99**94)
    released = OptimOptions(lr=1e-3, schedule="exponential", decay_factor=0.999995)
    assert learning_rate(500_000, 1_000_000, released) == pytest.approx(1e-3 * 0.082085, rel=1e-4)  # e^-2.5


@pytest.mark.parametrize("name", ["adam", "adamw", "rmsprop", "sgd"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_every_optimiser_descends_and_keeps_the_state_it_says(name, momentum):
    options = OptimOptions(name=name, lr=0.05, momentum=momentum)
    weight = nn.Parameter(torch.ones(4))
    optimizer = make_optimizer([weight], options)
    for _ in range(5):
        (weight**2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(weight.detach().max()) < 1
    kept = {key for key, value in optimizer.state[weight].items() if isinstance(value, torch.Tensor)}
    assert kept == state_keys(options)
    if name != "rmsprop":
        assert optimizer.defaults["fused"] is True


def test_adamw_decays_weights_apart_from_the_gradient():
    ends = []
    for name in ("adam", "adamw"):
        weight = nn.Parameter(torch.ones(1))
        optimizer = make_optimizer([weight], OptimOptions(name=name, lr=0.1, weight_decay=0.5, betas=(0.0, 0.0)))
        weight.grad = torch.full((1,), 3.0)
        optimizer.step()
        ends.append(float(weight.detach()))
    # betas 0: Adam moves by lr * sign; AdamW also shrinks by lr * decay
    assert ends == pytest.approx([0.9, 0.95 - 0.1], abs=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "adm"}, "Did you mean 'adam'"),
        ({"schedule": "cos"}, "Did you mean 'cosine'"),
        ({"lr": 0.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"betas": (0.5,)}, "betas"),
        ({"betas": (0.5, 1.0)}, "betas"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"momentum": 1.0}, "momentum"),
        ({"schedule": "step"}, "decay_every"),
        ({"schedule": "exponential"}, "near 1"),
        ({"decay_factor": 0.0}, "decay_factor"),
        ({"warmup": -1}, "warmup"),
    ],
)
def test_impossible_options_say_what_is_allowed(given, message):
    with pytest.raises(ConfigError, match=message):
        OptimOptions(**given)


def test_betas_from_yaml_become_a_tuple():
    assert OptimOptions(betas=[0.0, 0.9]).betas == (0.0, 0.9)


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_flat_adam_is_adam(name, layout):
    def weights() -> list[nn.Parameter]:
        g = torch.Generator().manual_seed(0)
        shapes = [(6, 5, 3, 3), (7,), (4, 3)]
        tensors = [torch.randn(shape, generator=g) for shape in shapes]
        return [nn.Parameter(t.to(memory_format=layout) if t.dim() == 4 else t) for t in tensors]

    ours, theirs = weights(), weights()
    mine = make_optimizer(ours, OptimOptions(name=name, lr=0.1, weight_decay=0.01))
    kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    peer = kind(theirs, lr=0.1, betas=(0.5, 0.999), weight_decay=0.01)
    for step in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(step))
            b.grad = a.grad.clone()
        mine.step()
        peer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert ours[0].is_contiguous(memory_format=layout)
