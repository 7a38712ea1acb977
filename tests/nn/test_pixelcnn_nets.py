"""Masked networks: published masks and sizes, who sees whom by gradient, and the same network pixel by pixel."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from condgen.errors import ConfigError
from condgen.nn import gated_pixelcnn, pixelcnnpp, pixelrnn
from condgen.nn.causal import CausalConv2d
from condgen.nn.gated_pixelcnn import GatedPixelCnn
from condgen.nn.pixelcnn import PixelCnn2016
from condgen.nn.pixelcnnpp import PixelCnnPp
from condgen.nn.pixelrnn import PixelRnn, Reorder, diagonal_sweep
from condgen.nn.weight_norm import WeightNormConv2d, concat_elu, drawn_mask

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
    "row_lstm": lambda c, p, k, **told: PixelRnn(
        c, p, diagonal=False, width=6, blocks=2, head_width=24, colours=k, **told
    ),
    "diagonal_bilstm": lambda c, p, k, **told: PixelRnn(
        c, p, diagonal=True, width=6, blocks=2, head_width=24, colours=k, **told
    ),
    "row_lstm-skip": lambda c, p, k, **told: PixelRnn(
        c, p, diagonal=False, skip=True, width=6, blocks=3, head_width=24, colours=k, **told
    ),
    "diagonal_bilstm-skip": lambda c, p, k, **told: PixelRnn(
        c, p, diagonal=True, skip=True, width=6, blocks=2, head_width=24, colours=k, **told
    ),
}
CASES = [(name, *form) for name in NETS for form in ((3, 3), (3, 1), (1, 1))]  # architecture, channels, colours


def make(name, channels, colours, **told):
    torch.manual_seed(0)
    net = NETS[name](channels, 4 * max(3, colours), colours, **told).double().eval()
    for parameter in net.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return net


def influence(net, channels, colours, size=(SIDE, SIDE), pictures=4, told=None):
    """bool (draws, inputs), both in the order in which they are drawn: whether a draw depends on an input, at any of
    several pictures, since a ReLU may be silent at one. told: vector and maps."""
    vector, maps = told or (None, [])
    pictures = torch.rand(pictures, 1, channels, *size, dtype=torch.float64) * 2 - 1
    probe = torch.randn(net(pictures[0], vector, maps).shape[1], dtype=torch.float64)

    def draws(x):
        out = net(x, vector, maps)[0] * probe[:, None, None]
        return torch.stack([out[k::colours].sum(0) for k in range(colours)], -1).flatten()

    slopes = [torch.autograd.functional.jacobian(draws, x)[:, 0] for x in pictures]  # (draws, C, H, W)
    return torch.stack([s.permute(0, 2, 3, 1).flatten(1) != 0 for s in slopes]).any(0)


def allowed(channels, colours, size=(SIDE, SIDE)):
    """Strictly earlier colours; where pixels are drawn whole, colours of strictly earlier pixels."""
    pixels = size[0] * size[1]
    draw, read = torch.arange(pixels * colours)[:, None], torch.arange(pixels * channels)[None]
    return read < draw if colours == channels else read // channels < draw


@pytest.mark.parametrize(("name", "channels", "colours"), CASES)
def test_no_draw_depends_on_what_is_drawn_later(name, channels, colours):
    seen = influence(make(name, channels, colours), channels, colours)
    assert not (seen & ~allowed(channels, colours)).any()


@pytest.mark.parametrize("name", NETS)
def test_another_value_moves_what_comes_later_and_nothing_before(name):
    """Over RGB in the order of colours: each of the values of a picture is replaced, one after the other."""
    side = 6 if name == "pixelcnn++" else 5
    net, count = make(name, 3, 3), 3 * side * side
    random = torch.Generator().manual_seed(3)
    picture, other = (torch.rand(1, 3, side, side, generator=random).double() * 2 - 1 for _ in range(2))
    flat = [x.permute(0, 2, 3, 1).reshape(1, count) for x in (picture, other)]  # in the order in which they are drawn
    changed = torch.where(torch.eye(count, dtype=torch.bool), flat[1], flat[0])
    changed = changed.view(count, side, side, 3).permute(0, 3, 1, 2).contiguous()  # another layout rounds otherwise
    with torch.no_grad():
        base, moved = (net(x, None, []).unflatten(1, (-1, 3)).permute(0, 3, 4, 2, 1).reshape(len(x), count, -1)
                       for x in (picture.repeat(count, 1, 1, 1), changed))  # fmt: skip
    same = (base == moved).all(2)  # (what was changed, what is drawn)
    earlier = torch.ones(count, count, dtype=torch.bool).tril()
    assert same[earlier].all()
    later = (~same).sum(1)
    assert (later[:-3] > 0).all() and later[-1] == 0  # for the last pixel's green a ReLU may be silent


@pytest.mark.parametrize("name", NETS)
def test_a_condition_without_weights_is_no_condition(name):
    """V = 0: the network of the same weights that knows none."""
    told, alone = make(name, 3, 3, vector=VECTOR, maps=MAPS), make(name, 3, 3)
    with torch.no_grad():
        for key, parameter in told.named_parameters():
            if ".told" in key:
                parameter.zero_()
        left = alone.load_state_dict(told.state_dict(), strict=False)
        assert not left.missing_keys and left.unexpected_keys and all(".told" in key for key in left.unexpected_keys)
        x = torch.rand(2, 3, SIDE, SIDE, dtype=torch.float64)
        maps = [torch.randn(2, MAPS, SIDE >> s, SIDE >> s, dtype=torch.float64) for s in range(2)]
        same = told(x, torch.randn(2, VECTOR, dtype=torch.float64), maps)
        torch.testing.assert_close(same, alone(x, None, []), atol=1e-13, rtol=0)


@pytest.mark.parametrize("name", NETS)
def test_nor_with_a_vector_and_a_map_which_every_draw_sees(name):
    """Over RGB in the order of colours; of the map the place itself, at least."""
    net = make(name, 3, 3, vector=VECTOR, maps=MAPS)
    vector = torch.randn(1, VECTOR, dtype=torch.float64, requires_grad=True)
    finest = torch.randn(1, MAPS, SIDE, SIDE, dtype=torch.float64, requires_grad=True)
    told = (vector, [finest, torch.randn(1, MAPS, SIDE // 2, SIDE // 2, dtype=torch.float64)])
    seen = influence(net, 3, 3, pictures=1, told=told)
    assert not (seen & ~allowed(3, 3)).any() and seen.any()
    out = net(torch.rand(1, 3, SIDE, SIDE, dtype=torch.float64), *told).abs().sum((0, 1))
    for r, c in itertools.product(range(SIDE), range(SIDE)):
        slopes = torch.autograd.grad(out[r, c], (vector, finest), retain_graph=True)
        assert slopes[0].any() and slopes[1][0, 0, r, c] != 0


@pytest.mark.parametrize(
    ("name", "channels", "colours"), [case for case in CASES if case[0] in ("gated", "pixelcnn++")]
)
def test_every_earlier_colour_is_seen(name, channels, colours):
    seen = influence(make(name, channels, colours), channels, colours)
    missing = (allowed(channels, colours) & ~seen).nonzero()
    assert len(missing) == 0, missing[:5]


def test_the_2016_network_has_exactly_the_blind_spot_of_its_kernels():
    side = 6
    first = {(y, x) for y in range(4) for x in range(-3, 4) if y or x < 0}
    block = {(0, -1), (0, 0), (1, -1), (1, 0), (1, 1)}
    seen = influence(make("pixelcnn", 1, 1), 1, 1, (side, side))
    expected = torch.zeros_like(seen)
    places = range(side)
    for r, c, (dy, dx), (ey, ex) in itertools.product(places, places, first, block):
        via, at = (r - ey, c + ex), (r - ey - dy, c + ex + dx)
        if all(place in places for place in via + at):
            expected[r * side + c, at[0] * side + at[1]] = True
    assert torch.equal(seen, expected)
    assert (allowed(1, 1, (side, side)) & ~seen).any()


def row_lstm_context(height, width, layers):
    """Which pixels each place sees, from the definition: a 7x7 mask A, then per layer a triangle of states."""
    places = list(itertools.product(range(height), range(width)))
    first = {(y, x) for y in range(4) for x in range(-3, 4) if y or x < 0}
    stream = {(r, c): {(r - y, c + x) for y, x in first} & set(places) for r, c in places}
    for _ in range(layers):
        states = {}
        for r, c in places:
            states[r, c] = stream[r, c] | stream.get((r, c - 1), set())
            states[r, c] |= set().union(*(states.get((r - 1, c + x), set()) for x in (-1, 0, 1)))
        stream = {place: stream[place] | states[place] for place in places}
    return torch.tensor([[read in stream[place] for read in places] for place in places])


def rnn(diagonal, layers=1, channels=1, colours=1, skip=False):
    torch.manual_seed(0)
    net = PixelRnn(channels, 12, diagonal=diagonal, width=6, blocks=layers, head_width=24, colours=colours, skip=skip)
    for parameter in net.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return net.double()


@pytest.mark.parametrize(("size", "layers", "share"), [((5, 5), 1, 0.987), ((4, 9), 1, 0.784), ((4, 9), 3, None)])
def test_row_lstm_sees_exactly_its_triangle(size, layers, share):
    seen = influence(rnn(False, layers), 1, 1, size)
    assert torch.equal(seen, row_lstm_context(*size, layers))
    if share:  # of earlier pixels, measured by others
        assert (seen.sum() / allowed(1, 1, size).sum()).item() == pytest.approx(share, abs=5e-4)


@pytest.mark.parametrize(("size", "layers"), [((5, 5), 1), ((4, 7), 1), ((4, 7), 3)])
def test_diagonal_bilstm_sees_all_but_the_last_pixel_of_the_row_above(size, layers):
    (height, width), seen = size, influence(rnn(True, layers), 1, 1, size)
    expected = allowed(1, 1, size)
    for r, c in itertools.product(range(1, height), range(width - 4)):
        expected[r * width + c, r * width - 1] = False
    assert torch.equal(seen, expected)


def test_in_order_of_colours_diagonal_bilstm_misses_only_that_pixels_last_colour():
    seen = influence(rnn(True, 1, 3, 3), 3, 3, (3, 6))
    expected = allowed(3, 3, (3, 6))
    for r, c, k in itertools.product((1, 2), range(2), range(3)):
        expected[(r * 6 + c) * 3 + k, r * 18 - 1] = False
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("diagonal", [False, True])
def test_skips_lead_from_every_layer_to_the_output_beside_the_residuals(diagonal):
    plain, net = rnn(diagonal, 3, 3, 3), rnn(diagonal, 3, 3, 3, skip=True)
    assert sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in plain.parameters()) == 3 * (6 * 12 + 12)
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    with torch.no_grad():
        for name, value in plain.state_dict().items():
            held = net.state_dict()[name]
            held[: len(value)].copy_(value), held[len(value) :].zero_()  # no skips: the rest is the network without
        torch.testing.assert_close(net(x, None, []), plain(x, None, []), atol=1e-13, rtol=0)
        for layer in net.blocks:  # what a skip adds joins the stream at the end
            layer.widen.bias[12:] += 0.5
        net.head = plain.head = torch.nn.Identity()
        torch.testing.assert_close(net(x, None, []) - plain(x, None, []), torch.full((2, 12, 4, 5), 1.5).double())
        base = net(x, None, [])
        for layer in net.blocks:
            layer.widen.weight[12:].normal_()
            now = net(x, None, [])
            assert (now != base).any()
            base = now


def test_without_the_shift_the_direction_from_the_right_leaks(monkeypatch):
    monkeypatch.setattr(pixelrnn, "down", lambda x: x)
    assert (influence(rnn(True), 1, 1) & ~allowed(1, 1)).any()


def test_the_direction_from_the_right_adds_nothing_to_the_first_row():
    net, x = rnn(True), torch.rand(2, 1, 3, 5, dtype=torch.float64)
    before = net(x, None, [])
    net.blocks[0].recur.data[1].add_(1)
    same = (net(x, None, []) == before).all(3).all(1)
    assert same[:, 0].all() and not same[:, 1:].any()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (5, 1), (3, 7), (6, 4)])
def test_the_states_are_those_of_the_equations_cell_by_cell(height, width):
    """Row LSTM and both directions of Diagonal BiLSTM, as written, a cell after the other."""
    for diagonal in (False, True):
        layer = rnn(diagonal).blocks[0]
        gates = torch.randn(2, 24 * layer.directions, height, width, dtype=torch.float64)
        found = layer.states(gates)
        zero = gates.new_zeros(2, 6)
        for way in range(layer.directions):
            across = range(width) if way == 0 else range(width - 1, -1, -1)
            back, weights = (-1 if way == 0 else 1), layer.recur[way].unflatten(0, (layer.taps, 6))
            cells, states = {}, {}
            for r, c in itertools.product(range(height), across):
                reads = [(r - 1, c), (r, c + back)] if diagonal else [(r - 1, c + x) for x in (-1, 0, 1)]
                total = gates[:, 24 * way : 24 * way + 24, r, c]
                total = total + sum(states.get(p, zero) @ w for p, w in zip(reads, weights, strict=True))
                o, f, i = (torch.sigmoid(total[:, 6 * n : 6 * n + 6]) for n in range(3))
                cells[r, c] = f * cells.get(reads[1], zero) + i * torch.tanh(total[:, 18:])
                states[r, c] = o * torch.tanh(cells[r, c])
                torch.testing.assert_close(found[way, :, :, r, c], states[r, c], atol=1e-12, rtol=1e-12)


def test_the_order_of_cells_is_undone_in_values_and_gradients():
    sweep = diagonal_sweep(3, 5)
    x = torch.randn(2, 15, 1, dtype=torch.float64, requires_grad=True)
    inverse = sweep.order.argsort(1)
    assert torch.equal(Reorder.apply(Reorder.apply(x, sweep.order, inverse), inverse, sweep.order), x)
    assert torch.autograd.gradcheck(lambda x: Reorder.apply(x, sweep.order, inverse), x)
    assert sweep.order[0, :6].tolist() == [0, 1, 5, 2, 6, 10] and sweep.order[1, :3].tolist() == [4, 3, 9]


def test_a_wider_row_lstm_pixel_by_pixel():
    torch.manual_seed(0)
    net = PixelRnn(1, 12, diagonal=False, kernel=5, width=6, blocks=2, head_width=12, colours=1).double()
    x, parts = torch.rand(1, 1, 4, 6, dtype=torch.float64), []
    with torch.no_grad():
        steps = net.steps(1, (4, 6), None, [])
        for row in range(4):
            steps.start_row(row)
            for column in range(6):
                parts.append(steps.parameters(column, 0).clone())
                steps.put(column, 0, x[:, :, row, column])
        torch.testing.assert_close(torch.stack(parts, 2).view(1, 12, 4, 6), net(x, None, []), atol=1e-13, rtol=1e-12)


def test_bfloat16_keeps_the_cell_state_in_float32():
    net = rnn(True, 2).float()
    x = torch.rand(2, 1, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, None, [])
        assert net.blocks[0].states(torch.randn(1, 48, 4, 4, dtype=torch.bfloat16)).dtype == torch.float32
    out.float().square().mean().backward()
    torch.testing.assert_close(out.float(), net(x, None, []), atol=0.05, rtol=0.05)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())


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
    mask = drawn_mask((2, 6, 4, 5), 0.25, x.device)[0] / -0.75
    for dropout, kept in ((0.0, None), (0.25, mask)):
        torch.manual_seed(1)
        lean, whole = conv(x, dropout=dropout), plain(conv, x, kept)
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
