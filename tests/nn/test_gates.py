"""Gates with written-out gradients: the numbers of plain autograd, in the layout of the convolution before them."""

import pytest
import torch

from condgen.engine.world import World
from condgen.nn import vpn
from condgen.nn.gates import Cell, Multiply, tanh
from condgen.rng import StepRandom
from condgen.systems.vpn import Vpn
from condgen.types import Batch, Condition, ConditionSpec, Frames, FramesSpec, LabelSpec, TargetSpec

SIDE, LENGTH = 4, 3


def plain_multiply(four, h, dim=1):
    g1, g2, g3, u = four.chunk(4, dim)
    return g1.sigmoid() * torch.tanh(g2.sigmoid() * h + g3.sigmoid() * u.tanh())


def plain_cell(four, cell):
    i, f, o, g = four.chunk(4, 1)
    made = i.sigmoid() * g.tanh() + (0 if cell is None else f.sigmoid() * cell)
    return o.sigmoid() * made.tanh(), made


def made(*shape, seed=0, layout=torch.contiguous_format):
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=random, dtype=torch.float64)
    return values.contiguous(memory_format=layout).requires_grad_() if len(shape) == 4 else values.requires_grad_()


def same(one, other):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_multiplicative_unit_and_its_gradients_are_those_of_plain_autograd(layout):
    four, h = made(2, 12, 3, 4, layout=layout), made(2, 3, 3, 4, seed=1, layout=layout)
    probe = made(2, 3, 3, 4, seed=2).detach()
    one, other = Multiply.apply(four, h, 1), plain_multiply(four, h)
    slopes = [torch.autograd.grad(out, (four, h), probe) for out in (one, other)]
    same([one, *slopes[0]], [other, *slopes[1]])
    assert slopes[0][0].is_contiguous(memory_format=layout) and one.is_contiguous(memory_format=layout)
    assert torch.autograd.gradcheck(lambda a, b: Multiply.apply(a, b, 1), (four, h))


def test_gates_may_lie_in_the_last_dimension():
    four, h = made(2, 5, 12), made(2, 5, 3, seed=1)
    one, other = Multiply.apply(four, h, 2), plain_multiply(four, h, 2)
    same([one, *torch.autograd.grad(one.sum(), (four, h))], [other, *torch.autograd.grad(other.sum(), (four, h))])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("used", ["both", "h", "cell"])
@pytest.mark.parametrize("first", [False, True])
def test_a_cell_and_its_gradients_are_those_of_plain_autograd(layout, used, first):
    """Also where only one of its two results is looked at, and at the first step, without a cell."""
    four, cell = made(2, 12, 3, 4, layout=layout), None if first else made(2, 3, 3, 4, seed=1, layout=layout)
    weights = [made(2, 3, 3, 4, seed=seed).detach() for seed in (2, 3)]
    pick = {"both": (0, 1), "h": (0,), "cell": (1,)}[used]
    asked = [four] if cell is None else [four, cell]
    found = []
    for results in (Cell.apply(four, cell), plain_cell(four, cell)):
        total = sum((results[n] * weights[n]).sum() for n in pick)
        found.append([*results, *torch.autograd.grad(total, asked)])
    same(*found)
    assert found[0][2].is_contiguous(memory_format=layout)


@pytest.mark.parametrize(("kind", "error"), [(torch.float64, 0), (torch.float32, 2e-7), (torch.bfloat16, 4e-3)])
def test_tanh_by_the_sigmoid(kind, error):
    x = torch.cat([torch.linspace(-12, 12, 2001), torch.logspace(-6, 0, 200), torch.tensor([-1e4, 1e4, 0.0])]).to(kind)
    assert (tanh(x).double() - torch.tanh(x.double())).abs().max() <= error + 1e-15
    assert tanh(x).dtype == kind and tanh(x).abs().max() == 1 and tanh(x[-1:]) == 0


def small(decoder="masked", channels=1, **options):
    torch.manual_seed(0)
    spec = ConditionSpec(frames=FramesSpec(2, channels, SIDE, SIDE), label=LabelSpec(3))
    sizes = {"width": 6, "encoder_blocks": 2, "decoder_blocks": 2, "hidden": 3, "values": 2, **options}
    system = Vpn(condition=spec, target=TargetSpec(channels, SIDE, SIDE, LENGTH), decoder=decoder, **sizes).double()
    for parameter in system.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return system


def rows(count, channels=1):
    random = torch.Generator().manual_seed(1)
    target, past = (torch.rand(count, t, channels, SIDE, SIDE, generator=random).double() * 2 - 1 for t in (LENGTH, 2))
    known = torch.ones(count, 2, dtype=torch.bool)
    known[0, 0] = False
    return Batch(target, Condition(frames=Frames(past, known), label=torch.arange(count) % 3))


@pytest.mark.parametrize("decoder", ["masked", "two-stack", "independent"])
def test_the_gradients_of_a_network_are_those_of_plain_autograd(decoder, monkeypatch):
    """Formulas, sums in place and the order of frames at once."""
    system, batch = small(decoder), rows(2)

    def slopes():
        loss = system.nll_loss(batch, StepRandom(0, rows=2))["loss"]
        return [loss, *torch.autograd.grad(loss, list(system.parameters()))]

    fast = slopes()
    monkeypatch.setattr(vpn.Multiply, "apply", plain_multiply)
    monkeypatch.setattr(vpn.Cell, "apply", plain_cell)
    same(fast, slopes())
    assert all(slope.abs().max() > 0 for slope in fast[1:])


@pytest.mark.parametrize("decoder", ["masked", "two-stack", "independent"])
def test_a_clip_of_a_batch_costs_what_it_costs_alone(decoder):
    """Frames are computed one after the other, all clips at once: none may meet another's label, past or context."""
    system, batch = small(decoder), rows(4)
    with torch.no_grad():
        together = system.frame_nats(batch.target, batch.condition)
        parts = [slice(n, n + 1) for n in range(4)]
        alone = [system.frame_nats(batch.target[part], batch.condition.index(part)) for part in parts]
    same([together], [torch.cat(alone)])
    assert together.std() > 0


@pytest.mark.parametrize("decoder", ["masked", "two-stack", "independent"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_one_layout_from_the_first_block_to_the_last(decoder, channels_last):
    """Where kernels are channels-last, so are activations and gradients: otherwise each is laid out anew."""
    system = small(decoder).float()
    world = World(channels_last=channels_last)
    world.place(system)
    batch = world.place_batch(rows(2))
    layout, seen = (torch.channels_last if channels_last else torch.contiguous_format), []

    def check(module, given, result):
        for activation in (given[0], result):
            seen.append(activation.is_contiguous(memory_format=layout))
            activation.register_hook(lambda slope: seen.append(slope.is_contiguous(memory_format=layout)))

    for unit in system.modules():
        if isinstance(unit, vpn.Unit):
            unit.register_forward_hook(check)
    target = batch.target.float()
    system.nll_loss(Batch(target, batch.condition.to("cpu", torch.float32)), StepRandom(0, rows=2))["loss"].backward()
    assert len(seen) >= 4 * 8 and all(seen)
