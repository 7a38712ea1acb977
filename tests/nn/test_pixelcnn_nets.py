"""Masked networks: published masks and sizes, who sees whom by gradient, and the same network pixel by pixel."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from condgen.errors import ConfigError
from condgen.nn import gated_pixelcnn, pixelcnnpp
from condgen.nn.causal import CausalConv2d
from condgen.nn.gated_pixelcnn import GatedPixelCnn
from condgen.nn.pixelcnn import PixelCnn2016
from condgen.nn.pixelcnnpp import PixelCnnPp
from condgen.nn.weight_norm import WeightNormConv2d, concat_elu

SIDE, VECTOR, MAPS = 4, 2, 1
NETS = {
    "pixelcnn": lambda c, p, k, **told: PixelCnn2016(
        c, p, width=6, blocks=1, kernel=3, head_width=24, colours=k, **told
    ),
    "gated": lambda c, p, k, **told: GatedPixelCnn(
        c, p, width=12, blocks=5, kernel=3, head_width=24, colours=k, **told
    ),
    "pixelcnn++": lambda c, p, k, **told: PixelCnnPp(
        c, p, width=6, blocks=2, scales=2, dropout=0.5, colours=k, head_width=24, **told
    ),
}
CASES = [(name, *form) for name in NETS for form in ((3, 3), (3, 1), (1, 1))]  # architecture, channels, colours


def make(name, channels, colours, **told):
    torch.manual_seed(0)
    net = NETS[name](channels, 4 * max(3, colours), colours, **told).double().eval()
    for parameter in net.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return net


def influence(net, channels, colours, side=SIDE, pictures=4):
    """bool (draws, inputs), both in the order in which they are drawn: whether a draw depends on an input, at any of
    several pictures, since a ReLU may be silent at one."""
    pictures = torch.rand(pictures, 1, channels, side, side, dtype=torch.float64) * 2 - 1
    probe = torch.randn(net(pictures[0], None, []).shape[1], dtype=torch.float64)

    def draws(x):
        out = net(x, None, [])[0] * probe[:, None, None]
        return torch.stack([out[k::colours].sum(0) for k in range(colours)], -1).flatten()

    slopes = [torch.autograd.functional.jacobian(draws, x)[:, 0] for x in pictures]  # (draws, C, H, W)
    return torch.stack([s.permute(0, 2, 3, 1).flatten(1) != 0 for s in slopes]).any(0)


def allowed(channels, colours, side=SIDE):
    """Strictly earlier colours; where pixels are drawn whole, colours of strictly earlier pixels."""
    draw, read = torch.arange(side * side * colours)[:, None], torch.arange(side * side * channels)[None]
    return read < draw if colours == channels else read // channels < draw


@pytest.mark.parametrize(("name", "channels", "colours"), CASES)
def test_no_draw_depends_on_what_is_drawn_later(name, channels, colours):
    seen = influence(make(name, channels, colours), channels, colours)
    assert not (seen & ~allowed(channels, colours)).any()


@pytest.mark.parametrize(("name", "channels", "colours"), [case for case in CASES if case[0] != "pixelcnn"])
def test_every_earlier_colour_is_seen(name, channels, colours):
    seen = influence(make(name, channels, colours), channels, colours)
    missing = (allowed(channels, colours) & ~seen).nonzero()
    assert len(missing) == 0, missing[:5]


def test_the_2016_network_has_exactly_the_blind_spot_of_its_kernels():
    side = 6
    first = {(y, x) for y in range(4) for x in range(-3, 4) if y or x < 0}
    block = {(0, -1), (0, 0), (1, -1), (1, 0), (1, 1)}
    seen = influence(make("pixelcnn", 1, 1), 1, 1, side)
    expected = torch.zeros_like(seen)
    places = range(side)
    for r, c, (dy, dx), (ey, ex) in itertools.product(places, places, first, block):
        via, at = (r - ey, c + ex), (r - ey - dy, c + ex + dx)
        if all(place in places for place in via + at):
            expected[r * side + c, at[0] * side + at[1]] = True
    assert torch.equal(seen, expected)
    assert (allowed(1, 1, side) & ~seen).any()


def test_without_the_shift_the_vertical_stack_leaks(monkeypatch):
    monkeypatch.setattr(gated_pixelcnn, "down", lambda x: x)
    assert (influence(make("gated", 3, 3), 3, 3) & ~allowed(3, 3)).any()
    monkeypatch.setattr(pixelcnnpp, "down", lambda x: x)
    assert (influence(make("pixelcnn++", 3, 1), 3, 1) & ~allowed(3, 1)).any()


@pytest.mark.parametrize("told", [{}, {"vector": VECTOR, "maps": MAPS}], ids=["alone", "told"])
@pytest.mark.parametrize(("name", "channels", "colours"), CASES)
def test_pixel_by_pixel_gives_the_parameters_of_the_whole_forward(name, channels, colours, told):
    net = make(name, channels, colours, **told)
    for kind, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        net = net.to(kind)
        x = (torch.rand(2, channels, SIDE, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1).to(kind)
        vector = torch.randn(2, VECTOR).to(kind) if told else None
        maps = [torch.randn(2, MAPS, SIDE >> s, 8 >> s).to(kind) for s in range(2)] if told else []
        with torch.no_grad():
            whole, parts = net(x, vector, maps), torch.zeros(2, 4 * max(3, colours), SIDE, 8, dtype=kind)
            steps = net.steps(2, (SIDE, 8), vector, maps)
            for row in range(SIDE):
                steps.start_row(row)
                for column, k in itertools.product(range(8), range(colours)):
                    parts[:, k::colours, row, column] = steps.parameters(column, k)
                    steps.put(column, k, x[:, :, row, column] if colours == 1 else x[:, k : k + 1, row, column])
        assert (whole - parts).abs().max() < tolerance * whole.abs().max().clamp(min=1)


def test_masks_have_the_published_numbers_of_ones():
    assert CausalConv2d(3, 6, above=3, left=3, right=3, kind="A", colours=3).mask.sum() == 438
    assert CausalConv2d(6, 6, above=1, left=1, right=1, kind="B", colours=3).mask.sum() == 168
    assert CausalConv2d(6, 6, kind="B", colours=3).mask.sum() == 24


def test_the_published_size_has_the_published_number_of_parameters():
    with torch.device("meta"):
        net = PixelCnnPp(3, 100, width=160, blocks=5, scales=3, dropout=0.5, colours=1, head_width=160)
    assert sum(p.numel() for p in net.parameters()) == 53_659_080


def test_colours_that_cannot_be_dealt_out_are_refused():
    with pytest.raises(ConfigError, match="multiples of 3"):
        CausalConv2d(3, 128, colours=3)


def plain(conv, x, dropout_mask=None):
    """What a WeightNormConv2d of concat_elu computes, by torch's own operations."""
    y = concat_elu(x) if dropout_mask is None else concat_elu(x) * dropout_mask
    return F.conv2d(F.pad(y, conv.pad), conv.folded(), conv.b, conv.stride)


def test_the_lean_convolution_has_the_values_and_gradients_of_the_plain_one():
    torch.manual_seed(0)
    conv = WeightNormConv2d(3, 4, (2, 3), pad=(1, 1, 1, 0), elu=True).double()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    inputs = (x, *conv.parameters())
    torch.manual_seed(1)
    mask = torch.empty(2, 6, 4, 5, dtype=torch.bool).bernoulli_(0.75) / 0.75
    for dropout, kept in ((0.0, None), (0.25, mask)):
        torch.manual_seed(1)
        lean, whole = conv(x, dropout), plain(conv, x, kept)
        torch.testing.assert_close(lean, whole)
        weights = torch.randn_like(lean)
        ours, theirs = (torch.autograd.grad((out * weights).sum(), inputs) for out in (lean, whole))
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other)


def test_bfloat16_keeps_float32_gradients_of_float32_weights():
    conv = WeightNormConv2d(3, 4, (2, 2), pad=(1, 0, 1, 0), elu=True)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = conv(x)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16 and x.grad.dtype == conv.v.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), plain(conv, x), atol=0.1, rtol=0.05)


def test_the_first_batch_sets_every_channel_to_mean_0_and_its_scale():
    torch.manual_seed(0)
    net = PixelCnnPp(3, 30, width=6, blocks=1, scales=2, dropout=0.5, colours=1, head_width=24)
    seen = {}
    x = torch.rand(4, 3, 8, 8) * 2 - 1
    net.calibrate(x, None, [])
    for name, module in net.named_modules():
        if isinstance(module, WeightNormConv2d):
            module.register_forward_hook(lambda m, given, out, name=name: seen.update({name: (m.scale, out)}))
    net.eval()(x, None, [])
    assert net.calibrated and len(seen) > 15
    for scale, out in seen.values():
        torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(out.shape[1]), atol=1e-4, rtol=0)
        torch.testing.assert_close(out.std((0, 2, 3)), torch.full((out.shape[1],), scale), atol=0.03 * scale, rtol=0.02)
