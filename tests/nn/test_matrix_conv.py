"""Convolutions as products of matrices: the numbers, gradients and layouts of torch's own classes."""

import pytest
import torch
from torch import nn

from condgen.engine.world import World
from condgen.nn import matrix_conv
from condgen.nn.matrix_conv import Window, pixels_of
from condgen.nn.vgan_nets import Moving, Size
from condgen.rng import StepRandom
from condgen.systems.vgan import Vgan
from condgen.types import Batch, ConditionSpec, TargetSpec

LAYOUTS = {2: torch.channels_last, 3: torch.channels_last_3d}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "window",
    [
        (4, 2, 1),
        ((2, 4, 4), 1, 0),
        ((3, 4, 4), (1, 2, 2), 1),
        (3, 2, 1),
        ((2, 1, 1), 1, 0),
        ((4, 4), 2, 1),
        ((4, 4), 1, 0),
    ],
)
def test_it_is_the_convolution_of_torch(window, transposed, monkeypatch):
    """Odd sizes too, where the last pixels are seen by fewer positions."""
    kernel = window[0]
    axes = len(kernel) if isinstance(kernel, tuple) else 3
    name = f"Conv{'Transpose' if transposed else ''}{axes}d"
    torch.manual_seed(0)
    mine, layout = getattr(matrix_conv, name)(5, 6, *window).double(), LAYOUTS[axes]
    theirs = getattr(nn, name)(5, 6, *window).double()
    theirs.load_state_dict(mine.state_dict())
    x = torch.randn(2, 5, *(5, 4, 7)[-axes:]).double()
    mine.weight.data, x = (t.contiguous(memory_format=layout) for t in (mine.weight.data, x))
    x.requires_grad_()
    monkeypatch.setattr(matrix_conv, "HEAVY", 0)
    monkeypatch.setattr(matrix_conv, "FEW", 10**6)
    found = []
    for conv in (mine, theirs):
        made = conv(x)
        probe = torch.randn(made.shape, generator=torch.Generator().manual_seed(1)).double()
        found.append([made, *torch.autograd.grad((made * probe).sum(), (x, conv.weight, conv.bias))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
    assert all(t.is_contiguous(memory_format=layout) for t in (found[0][0], found[0][2]))


@pytest.mark.parametrize(("down", "side"), [(True, 4), (False, 2)])  # 2 x 2 x 2 positions a row
def test_only_where_kernels_outweigh_positions(down, side, monkeypatch):
    calls = []
    for name in ("convolve", "spread"):
        monkeypatch.setattr(matrix_conv, name, lambda *given: calls.append(given))
    kind = matrix_conv.Conv3d if down else matrix_conv.ConvTranspose3d
    heavy, light = kind(128, 128, 4, 2, 1), kind(128, 127, 4, 2, 1)
    rows = torch.zeros(matrix_conv.FEW // 8, 128, side, side, side)
    more = torch.zeros(matrix_conv.FEW // 8 + 1, 128, side, side, side)
    for conv in (heavy, light):
        conv(rows)
        assert not calls  # not channels-last
        conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last_3d)
    light(rows), heavy(more)
    assert not calls
    heavy(rows)
    assert len(calls) == 1


def test_overlapping_patches_of_bf16_are_added_up_in_single_precision():
    patches, window = torch.randn(1, 2, 3, 4, 4, 8).bfloat16(), Window((4, 4), (2, 2), (1, 1))
    made, exact = (pixels_of(p, window, window.fine((2, 3))) for p in (patches, patches.float()))
    assert torch.equal(made, exact.bfloat16())


def test_vgan_is_the_same_with_and_without(monkeypatch):
    """Both losses and all gradients."""
    torch.manual_seed(0)
    system = Vgan(
        condition=ConditionSpec(),
        target=TargetSpec(3, 16, 16, 4),
        generator_width=4,
        discriminator_width=4,
        noise_dim=3,
    )
    World().place(system)
    batch, found = Batch(torch.rand(2, 4, 3, 16, 16) * 2 - 1), []
    for heavy in (0, matrix_conv.HEAVY):
        monkeypatch.setattr(matrix_conv, "HEAVY", heavy)
        values = []
        for phase in system.phases():
            part = system.get_submodule(phase.trains[0])
            loss = phase.loss(batch, StepRandom(0, rows=2))["loss"]
            values += [loss, *torch.autograd.grad(loss, list(part.parameters()))]
        found.append(values)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_foreground_and_mask_of_one_convolution_are_those_of_two():
    torch.manual_seed(0)
    moving = Moving(3, 3, Size.of(16, 4), 4, mask=True, from_map=False).double()
    code = torch.randn(2, 3, 1, 1, 1).double()
    foreground, mask = moving(code)
    body = moving.body(code)
    apart = torch.tanh(moving.foreground(body)), torch.sigmoid(moving.mask(body))
    for one, other in zip((foreground, mask), apart, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
    assert list(moving.state_dict())[-4:] == ["foreground.weight", "foreground.bias", "mask.weight", "mask.bias"]
