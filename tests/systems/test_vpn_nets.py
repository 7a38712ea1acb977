"""Video pixel networks: who sees whom by gradient, published sizes, and the same network pixel by pixel."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from condgen.nn import vpn_decoder
from condgen.nn.causal import ConditionBias
from condgen.nn.vpn import Block, ConvLstm, Encoder, Unit, convolution, multiply
from condgen.nn.vpn_decoder import MaskedDecoder, TwoStackDecoder
from condgen.systems.vpn import Conditioned
from condgen.types import Condition, ConditionSpec, Frames, FramesSpec, TargetSpec

DECODERS = ("masked", "two-stack", "independent")
UNITS = ("multiplicative", "relu")
SIDE, LENGTH = 3, 2


def make(decoder, channels=3, kind="multiplicative", past=1, blocks=2, **options):
    torch.manual_seed(0)
    frames = FramesSpec(past, channels, SIDE, SIDE) if past else None
    network = Conditioned(
        ConditionSpec(frames=frames), TargetSpec(channels, SIDE, SIDE, LENGTH), decoder=decoder, outputs=2 * channels,
        kind=kind, width=12, encoder_blocks=2, decoder_blocks=blocks, dilated=True, hidden=3, future_actions=False,
        save_memory=False, **options,
    ).double()  # fmt: skip
    for parameter in network.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return network


def influence(network, channels, tries=3):
    """bool (draws, past inputs) and (draws, inputs), in the order of drawing: frames, rows, columns, colours."""
    found = []
    for seed in range(tries):  # a ReLU may be silent at one clip
        random = torch.Generator().manual_seed(seed)
        shape = (channels, SIDE, SIDE)
        past, clip = (torch.rand(1, t, *shape, generator=random).double() * 2 - 1 for t in (1, LENGTH))
        probe = torch.randn(2, 1, 1, 1, generator=random).double()

        def draws(past, clip, probe=probe):
            told = Condition(frames=Frames(past, torch.ones(1, 1, dtype=torch.bool)))
            out = network(clip, network.told(told, 1, clip.dtype))[0]
            return (out.unflatten(1, (2, channels)) * probe).sum(1).permute(0, 2, 3, 1).flatten()

        slopes = torch.autograd.functional.jacobian(draws, (past, clip))
        found.append([s[:, 0].permute(0, 1, 3, 4, 2).flatten(1) != 0 for s in slopes])
    return [torch.stack(parts).any(0) for parts in zip(*found, strict=True)]


def earlier(channels):
    order = torch.arange(LENGTH * SIDE * SIDE * channels)
    return order[None] < order[:, None], order // (SIDE * SIDE * channels)


@pytest.mark.parametrize("kind", UNITS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("decoder", DECODERS)
def test_nothing_depends_on_what_is_drawn_later_and_all_of_the_past_is_seen_everywhere(decoder, channels, kind):
    """In time, row, column and colour. Two stacks see every earlier pixel, the baseline none of its frame."""
    past, own = influence(make(decoder, channels, kind), channels)
    before, frame = earlier(channels)
    others = frame[None] < frame[:, None]
    assert past.all()
    assert own[others].all()
    if decoder == "independent":
        assert torch.equal(own, others)
    elif decoder == "two-stack":
        assert torch.equal(own, before)
    else:
        expected = before.clone().view(*[LENGTH, SIDE, SIDE, channels] * 2)
        for (row, column), (y, x) in blind_spot():
            for t in range(LENGTH):
                expected[t, row, column, :, t, y, x] = False
        assert torch.equal(own, expected.view_as(own))


def blind_spot(blocks=2):
    """(pixel, earlier pixel) pairs of one frame that no chain of 3 x 3 masked convolutions joins."""
    places = set(itertools.product(range(SIDE), range(SIDE)))
    window = {(0, 0), (0, -1), (-1, -1), (-1, 0), (-1, 1)}
    for row, column in places:
        seen = {(row + dy, column + dx) for dy, dx in window - {(0, 0)}} & places
        for _ in range(2 * blocks):
            seen |= {(y + dy, x + dx) for y, x in seen for dy, dx in window} & places
            seen -= {(row, column)}
        for y, x in places:
            if (y, x) < (row, column) and (y, x) not in seen:
                yield (row, column), (y, x)


def test_the_masked_decoder_has_a_blind_spot_at_the_right():
    assert list(blind_spot()) and all(y < row and x > column for (row, column), (y, x) in blind_spot())


def test_without_the_shift_the_rows_above_leak(monkeypatch):
    monkeypatch.setattr(vpn_decoder, "down", lambda x: x)
    _, own = influence(make("two-stack"), 3, tries=1)
    assert (own & ~earlier(3)[0]).any()


@pytest.mark.parametrize("kind", UNITS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("chosen", [MaskedDecoder, TwoStackDecoder])
def test_pixel_by_pixel_gives_the_parameters_of_the_whole_forward(chosen, channels, kind):
    torch.manual_seed(0)
    net = chosen(channels, 4 * channels, width=6, blocks=2, kind=kind, vector=2, maps=3, save_memory=False).double()
    for parameter in net.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    x, vector = torch.rand(2, channels, 4, 5).double() * 2 - 1, torch.randn(2, 2).double()
    context = torch.randn(2, 3, 4, 5).double()
    with torch.no_grad():
        whole, parts = net(x, vector, [context]), torch.zeros(2, 4 * channels, 4, 5).double()
        steps = net.steps(2, (4, 5), vector, [context])
        for row in range(4):
            steps.start_row(row)
            for column, k in itertools.product(range(5), range(channels)):
                parts[:, k::channels, row, column] = steps.parameters(column, k)
                steps.put(column, k, x[:, k : k + 1, row, column])
    torch.testing.assert_close(whole, parts, atol=1e-12, rtol=1e-12)
    assert whole.std() > 0.05


def count(module, without=()):
    return sum(p.numel() for name, p in module.named_parameters() if not set(name.split(".")) & set(without))


def test_published_sizes():
    """Parameters of the parts; what the context adds to every gate is this project's choice and counted by itself."""
    block = Block(128, convolution, "multiplicative")
    encoder = Encoder(1, width=128, blocks=8, kind="multiplicative", dilated=True, vector=0, save_memory=False)
    decoder = MaskedDecoder(1, 256, width=128, blocks=12, kind="multiplicative", vector=0, maps=256, save_memory=False)
    lstm = ConvLstm(256, 256)
    assert count(block) == 1_246_592
    assert count(encoder.blocks) == 9_972_736 and count(encoder.enter) == 2 * 256
    assert count(lstm) == 4_719_616
    below = 12 * 2 * 4 * 128 * 128 * 3  # the row of each 3 x 3 kernel that its mask empties is not stored
    assert count(decoder.blocks, without=("told",)) == 14_959_104 - below
    assert count(decoder.blocks) - count(decoder.blocks, without=("told",)) == 12 * 2 * 256 * 4 * 128


def test_dilations_repeat_and_keep_the_resolution():
    for dilated, expected in ((True, [1, 2, 4, 8, 1, 2]), (False, [1] * 6)):
        encoder = Encoder(1, width=2, blocks=6, kind="relu", dilated=dilated, vector=0, save_memory=False)
        assert [unit.conv.dilation[0] for block in encoder.blocks for unit in block.units] == [
            d for d in expected for _ in range(2)
        ]
        assert encoder(torch.zeros(1, 1, 5, 7), None).shape == (1, 4, 5, 7)


def test_a_multiplicative_unit_is_the_formula_of_the_paper():
    torch.manual_seed(0)
    conv = convolution(3, 12, 3)
    unit = Unit(conv, "multiplicative", 12, 0, 0)
    assert torch.equal(conv.bias, torch.tensor([2.0] * 6 + [0.0] * 6)), "an untrained unit lets its memory through"
    conv.bias.data.normal_()
    h = torch.randn(2, 3, 4, 4)
    w, b = conv.weight.split(3), conv.bias.split(3)
    g1, g2, g3 = (torch.sigmoid(F.conv2d(h, w[i], b[i], padding=1)) for i in range(3))
    expected = g1 * torch.tanh(g2 * h + g3 * torch.tanh(F.conv2d(h, w[3], b[3], padding=1)))
    torch.testing.assert_close(unit(h, None, None), expected)
    torch.testing.assert_close(multiply(conv(h), h), expected)
    relu = convolution(3, 3, 3)
    torch.testing.assert_close(Unit(relu, "relu", 3, 0, 0)(h, None, None), F.relu(relu(h)))


def test_a_block_adds_to_its_input_and_a_last_one_does_not():
    block, last = Block(2, convolution, "relu"), Block(2, convolution, "relu", outputs=4)
    x = torch.randn(1, 4, 3, 3)
    for module in (block, last):
        module.widen.weight.data.zero_()
    assert torch.equal(block(x, None, None), x) and not last(x, None, None).any()


def test_the_lstm_is_the_formula_of_shi_and_starts_by_remembering():
    torch.manual_seed(0)
    lstm = ConvLstm(2, 3)
    assert torch.equal(lstm.inward.bias, torch.tensor([0.0] * 3 + [1.0] * 3 + [0.0] * 6))
    x, h, cell = torch.randn(1, 2, 4, 4), torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    both = torch.cat([lstm.inward.weight, lstm.back.weight], 1)
    i, f, o, g = F.conv2d(torch.cat([x, h], 1), both, lstm.inward.bias, padding=1).chunk(4, 1)
    expected = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    new, kept = lstm(x, (h, cell))
    torch.testing.assert_close(kept, expected)
    torch.testing.assert_close(new, torch.sigmoid(o) * torch.tanh(expected))
    zero = torch.zeros(1, 3, 4, 4)
    torch.testing.assert_close(lstm(x, None), lstm(x, (zero, zero)))


def test_the_context_enters_every_gate_of_every_masked_unit():
    for decoder in ("masked", "two-stack"):
        units = [m for m in make(decoder).decoder.modules() if isinstance(m, Unit)]
        assert len(units) == (4 if decoder == "masked" else 8)
        for unit in units:
            assert isinstance(unit.told, ConditionBias) and unit.told.map.shape[:2] == (48, 3)


DIRTY = """
import torch
from condgen.nn.vpn import convolution
torch.manual_seed(0)
conv = convolution(24, 48, 3, dilation=2).to(memory_format=torch.channels_last)
x = torch.randn(2, 24, 32, 32).contiguous(memory_format=torch.channels_last)
exact, = torch.autograd.grad(conv(x).sum(), conv.weight)
for _ in range(8):
    for size in range(10, 22):
        torch.full((2**size,), 1e30)  # freed at once: what the next allocation finds
    with torch.autocast("cpu", torch.bfloat16):
        found, = torch.autograd.grad(conv(x).sum(), conv.weight)
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.05 * exact.abs().max().item())
"""


def test_a_dilated_gradient_in_bf16_holds_nothing_that_lay_in_memory():
    """In a process of its own, whose memory is filled with large numbers before it is used and after."""
    environment = {**os.environ, "MALLOC_PERTURB_": "143", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", DIRTY], check=True, env=environment, timeout=120)
