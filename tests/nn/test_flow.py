"""The flow is invertible, its log-determinant is the Jacobian's, and its layout is the published one."""

import math

import pytest
import torch
import torch.nn.functional as F

from condgen.errors import ShapeError
from condgen.nn.coupling import Area, Coupling, FlowNorm, Given, WeightNormConv2d, checkerboards, moments
from condgen.nn.flow import (
    MultiScaleFlow,
    dequantise,
    fit,
    from_logits,
    reorder,
    restore,
    to_logits,
    to_pixels,
)

CONDITIONS = {"alone": {}, "vector": {"vector": 3}, "map": {"maps": 2}, "both": {"vector": 3, "maps": 2}}
OPTIONS = [
    {"norm": norm, "net_norm": net_norm, "affine": affine}
    for norm in ("actnorm", "batch", "none")
    for net_norm in ("batch", "none")
    for affine in ("released", "paper")
]
name = {"ids": lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value}
each_option = pytest.mark.parametrize("options", OPTIONS, **name)
each_condition = pytest.mark.parametrize("kind", CONDITIONS)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(channels=2, seed=0, **options):
    """A float64 flow in evaluation mode with nothing left at its start value."""
    torch.manual_seed(seed)
    flow = MultiScaleFlow(channels, **{"width": 4, "blocks": 1, **options}).double()
    for key, value in [*flow.named_parameters(), *flow.named_buffers()]:
        if key.endswith((".factor", ".bias", ".log_scale", "running_mean")):
            value.data.add_(0.3 * torch.randn_like(value))
        elif key.endswith("running_var"):
            value.data.mul_(1 + torch.rand_like(value))
    flow.initialised.fill_(True)
    return flow.eval()


def given(kind, rows, side=4):
    """What `kind` needs, for forward and inverse."""
    out = {}
    if kind in ("vector", "both"):
        out["vector"] = draw(rows, 3, seed=5)
    if kind in ("map", "both"):
        out["map"] = draw(rows, 2, side, side, seed=6)
    return out


@each_option
@each_condition
def test_inverse_of_forward_and_forward_of_inverse(options, kind):
    flow, x = made(3, scales=3, **options, **CONDITIONS[kind]), draw(2, 3, 8, 8)
    with torch.no_grad():
        z, _ = flow(x, **given(kind, 2))
        torch.testing.assert_close(flow.inverse(z, **given(kind, 2)), x, atol=1e-10, rtol=0)
        torch.testing.assert_close(flow(flow.inverse(x, **given(kind, 2)), **given(kind, 2))[0], x, atol=1e-10, rtol=0)
    assert (z - x).abs().max() > 0.1


@pytest.mark.parametrize(
    ("channels", "scales", "size", "more"),
    [
        (1, 1, (5, 3), {}), (1, 4, (64, 64), {}), (3, 4, (8, 24), {}), (3, 2, (32, 32), {"final": 0}),
        (1, 2, (28, 28), {"checkerboard": 1, "channelwise": 2, "final": 3}), (3, 2, (8, 8), {"lag": 0.9}),
    ],
)  # fmt: skip
def test_shapes_and_inverse_at_other_sizes(channels, scales, size, more):
    flow, x = made(channels, scales=scales, width=2, norm="batch", **more), draw(1, channels, *size)
    with torch.no_grad():
        z, logdet = flow(x)
        back = flow.inverse(z)
    assert z.shape == x.shape and logdet.shape == (1,)
    torch.testing.assert_close(back, x, atol=1e-10, rtol=0)


@each_option
@each_condition
def test_log_determinant_is_that_of_the_jacobian(options, kind):
    flow, x = made(scales=2, **options, **CONDITIONS[kind]), draw(2, 2, 4, 4)
    context = given(kind, 2, side=8)  # a map of another size
    _, logdet = flow(x, **context)
    for row in range(2):
        one = {key: value[row : row + 1] for key, value in context.items()}
        jacobian = torch.autograd.functional.jacobian(lambda v, c=one: flow(v[None], **c)[0][0], x[row])
        expected = torch.linalg.slogdet(jacobian.reshape(32, 32)).logabsdet
        torch.testing.assert_close(logdet[row], expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("lag", [0.0, 0.9])
def test_batch_norm_in_training_is_the_evaluated_map_with_the_statistics_it_used(lag):
    torch.manual_seed(0)
    flow, x = MultiScaleFlow(2, scales=2, width=4, blocks=1, norm="batch", lag=lag).double(), draw(4, 2, 4, 4)
    for module in flow.modules():
        if isinstance(module, FlowNorm):
            module.momentum = 1.0  # running statistics become those that were used
    z, logdet = flow.train()(x)
    again, evaluated = flow.eval()(x)
    torch.testing.assert_close(again, z, atol=1e-12, rtol=0)
    torch.testing.assert_close(evaluated, logdet, atol=1e-10, rtol=0)


def test_batch_norm_uses_the_changed_half_and_keeps_running_statistics():
    norm, y = FlowNorm(2, "batch", momentum=0.1).double().train(), draw(3, 2, 4, 4) * 2 + 1
    _, odd = checkerboards(y)
    out, logdet = norm(y, odd, initialise=False)
    mask = odd.mask[0, 0] > 0
    inside = y[..., mask]
    mean, var = inside.mean((0, 2)), inside.var((0, 2), unbiased=False)
    torch.testing.assert_close(out[..., ~mask], y[..., ~mask])
    torch.testing.assert_close(out[..., mask].mean((0, 2)), torch.zeros(2).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(logdet, -0.5 * 8 * (var + 1e-4).log().sum())
    torch.testing.assert_close(norm.running_mean.flatten(), 0.1 * mean)
    torch.testing.assert_close(norm.running_var.flatten(), 0.9 + 0.1 * var)


def test_lag_mixes_running_statistics_into_training_and_gradients_see_only_the_batch():
    norm, y = FlowNorm(1, "batch", lag=0.75).double().train(), draw(4, 1, 2, 2).requires_grad_()
    out, _ = norm(y, Area(None, 4), initialise=False)
    mean, var = moments(y, Area(None, 4))
    torch.testing.assert_close(out, (y - 0.25 * mean) / (0.25 * var + 0.75 + 1e-4).sqrt())
    torch.testing.assert_close(norm.running_mean, 0.25 * mean.detach())
    (gradient,) = torch.autograd.grad(out.sum(), y)
    assert gradient.abs().max() > 0  # zero where the mean is the batch's alone


def test_actnorm_takes_its_parameters_from_the_first_training_batch_and_only_from_that():
    torch.manual_seed(0)
    flow = MultiScaleFlow(3, scales=2, width=4, blocks=1, norm="actnorm").double()
    seen = []
    for module in flow.modules():
        if isinstance(module, FlowNorm):
            module.register_forward_hook(lambda m, args, out: seen.append((args[1], out[0])))
    x = draw(16, 3, 8, 8) * 3 + 2
    before = {key: value.clone() for key, value in flow.state_dict().items()}
    flow.eval()(x)
    assert all(torch.equal(value, before[key]) for key, value in flow.state_dict().items())  # not in evaluation
    seen.clear()
    z, logdet = flow.train()(x)
    for area, y in seen:
        mean, var = moments(y, area)
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-10, rtol=0)
        torch.testing.assert_close(var, torch.ones_like(var), atol=1e-3, rtol=0)
    assert len(seen) == 10 and bool(flow.initialised)
    kept = {key: value.clone() for key, value in flow.state_dict().items()}
    flow(x * 5)
    assert all(torch.equal(value, kept[key]) for key, value in flow.state_dict().items())
    other = MultiScaleFlow(3, scales=2, width=4, blocks=1, norm="actnorm").double()
    other.load_state_dict(kept)
    torch.testing.assert_close(other.train()(x), (z, logdet))  # a resumed flow does not start again


def test_masks_alternate_so_that_two_couplings_leave_nothing_untouched():
    x = draw(1, 2, 4, 6)
    even, odd = checkerboards(x)
    assert odd.mask[0, 0, :2, :3].tolist() == [[0, 1, 0], [1, 0, 1]] and torch.equal(even.mask, 1 - odd.mask)
    assert (even.positions, odd.positions) == (12, 12)
    assert [a.positions for a in checkerboards(draw(1, 1, 3, 3))] == [5, 4]
    for stage, area in (("spatial", even), ("deep", Area(None, 24))):
        flow = made(2, scales=2)
        y = F.pixel_unshuffle(x, 2) if stage == "deep" else x
        first, second = getattr(flow, stage)[0][:2]
        moved = first(y, area, Given())[0] != y
        again = second(y, odd if stage == "spatial" else area, Given())[0] != y
        assert not (moved & again).any() and (moved | again).all()
        if stage == "deep":
            assert moved[:, :4].all() and again[:, 4:].all()


def test_after_three_couplings_every_pixel_depends_on_its_neighbours():
    flow, x = made(2, scales=1, final=3), draw(1, 2, 4, 4)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v[None])[0][0], x[0]).abs().amax((0, 3))
    for r in range(4):
        for c in range(4):
            near = jacobian[r, c, max(0, r - 1) : r + 2, max(0, c - 1) : c + 2]
            assert (near > 0).all(), (r, c)


def test_a_coupling_reads_only_what_it_keeps():
    for stage, shape in (("spatial", (1, 2, 4, 4)), ("deep", (1, 8, 2, 2))):
        coupling, x = getattr(made(2, scales=2), stage)[0][0], draw(*shape)
        area = checkerboards(x)[0] if stage == "spatial" else Area(None, 4)
        jacobian = torch.autograd.functional.jacobian(lambda v: coupling(v[None], area, Given())[0][0], x[0])
        jacobian = jacobian.reshape(x.numel(), -1)
        y, _ = coupling(x, area, Given())
        moved = (y != x).flatten()
        inner = jacobian[moved][:, moved]
        assert torch.equal(inner, inner.diagonal().diag()) and (inner.diagonal() > 0).all()
        assert torch.equal(jacobian[~moved], torch.eye(x.numel(), dtype=x.dtype)[~moved])


def test_squeeze_order_and_its_inverse():
    x = torch.arange(8.0).view(1, 2, 2, 2)
    squeezed = F.pixel_unshuffle(x, 2)
    assert squeezed.flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert reorder(squeezed).flatten().tolist() == [0, 4, 3, 7, 1, 5, 2, 6]
    assert torch.equal(restore(reorder(squeezed)), squeezed)


def test_what_is_factored_out_and_where_it_lies_in_z():
    flow = made(3, scales=3, norm="none", start="identity")
    for module in flow.modules():
        if isinstance(module, Coupling):
            module.factor.data.zero_()
            module.net.last.bias.data.zero_()
    x = draw(2, 3, 8, 8)
    z, logdet = flow(x)
    assert torch.equal(z, x) and not logdet.any()  # the layout of z is the layout of x
    shapes = [tuple(part.shape[1:]) for part in flow.parts(z)]
    assert shapes == [(12, 2, 2), (12, 2, 2), (6, 4, 4)] and sum(math.prod(s) for s in shapes) == 3 * 64
    out = flow.parts(z)[-1]
    assert torch.equal(out[:, :3], x[:, :, ::2, 1::2]) and torch.equal(out[:, 3:], x[:, :, 1::2, ::2])
    kept = reorder(F.pixel_unshuffle(x, 2)).chunk(2, 1)[0]
    assert torch.equal(kept[:, :3], x[:, :, ::2, ::2]) and torch.equal(kept[:, 3:], x[:, :, 1::2, 1::2])


@pytest.mark.parametrize("kind", ["alone", "both"])
def test_rows_do_not_depend_on_each_other_or_on_their_order(kind):
    flow, x, order = made(scales=2, **CONDITIONS[kind]).train(), draw(4, 2, 4, 4), [2, 0, 3, 1]
    context = given(kind, 4)
    z, logdet = flow(x, **context)
    moved, changed = flow(x[order], **{key: value[order] for key, value in context.items()})
    torch.testing.assert_close((moved, changed), (z[order], logdet[order]), atol=1e-12, rtol=0)


@each_option
def test_gradient_reaches_the_condition_both_ways_and_every_parameter(options):
    flow, context = made(scales=2, vector=3, maps=2, **options).train(), given("both", 3)
    context = {key: value.requires_grad_() for key, value in context.items()}
    z, logdet = flow(draw(3, 2, 4, 4), **context)
    (z.square().sum() - logdet.sum()).backward()
    assert all(value.grad.flatten(1).abs().sum(1).all() for value in context.values())
    silent = [key for key, p in flow.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent
    for module in flow.modules():
        if isinstance(module, Coupling):  # the stem and the block each have their bias
            assert all(part.any() for part in module.net.bias.weight.grad.chunk(2))
    for value in context.values():
        value.grad = None
    flow.eval().inverse(draw(3, 2, 4, 4), **context).square().sum().backward()
    assert all(value.grad.flatten(1).abs().sum(1).all() for value in context.values())


def density(flow, x, **context):
    z, logdet = flow(x, **context)
    return (logdet - 0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)).exp()


@pytest.mark.parametrize("options", [{"norm": "actnorm"}, {"norm": "batch", "affine": "paper", "vector": 3}], **name)
def test_density_of_two_pixels_integrates_to_one(options):
    """Over all pairs of logits, on a grid."""
    flow, axis = made(1, scales=1, **options), torch.linspace(-12, 12, 161, dtype=torch.float64)
    pairs = torch.cartesian_prod(axis, axis).view(-1, 1, 1, 2)
    context = {"vector": draw(1, 3).expand(len(pairs), 3)} if "vector" in options else {}
    with torch.no_grad():
        total = density(flow, pairs, **context).sum() * (axis[1] - axis[0]) ** 2
    assert float(total) == pytest.approx(1, abs=5e-3)


def test_density_of_a_two_by_two_picture_integrates_to_one_over_both_scales():
    """By importance sampling from a wide normal law round the flow's own samples."""
    flow, rows = made(1, scales=2, norm="actnorm"), 30_000
    with torch.no_grad():
        own = flow.inverse(draw(rows, 1, 2, 2)).flatten(1)
        law = torch.distributions.MultivariateNormal(own.mean(0), 2 * own.T.cov())
        root = torch.linalg.cholesky(law.covariance_matrix)
        points = law.mean + draw(rows, 4, seed=1) @ root.T
        weights = density(flow, points.view(-1, 1, 2, 2)) / law.log_prob(points).exp()
    error = float(weights.std() / math.sqrt(rows))
    assert error < 0.01 and abs(float(weights.mean()) - 1) < 4 * error


def test_autocast_narrows_the_networks_alone():
    flow, x = made(3, scales=2).float(), draw(2, 3, 8, 8).float()
    wide, exact = flow(x)
    kinds = set()
    flow.spatial[0][0].net.stem.register_forward_hook(lambda m, args, out: kinds.add(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, logdet = flow(x)
        back = flow.inverse(z)
    assert kinds == {torch.bfloat16} and z.dtype == logdet.dtype == back.dtype == torch.float32
    assert 0 < (logdet - exact).abs().max() < 0.5 and (z - wide).abs().max() < 0.2
    half = flow(x.bfloat16())
    assert half[0].dtype == half[1].dtype == torch.float32


def test_logits_and_their_log_determinant_as_computed_by_hand():
    k = torch.tensor([0.0, 1, 128, 255], dtype=torch.float64).view(4, 1)
    u = torch.tensor([0, 0.25, 0.5, 0.999], dtype=torch.float64).view(4, 1)
    unit = dequantise(k / 127.5 - 1, u)
    y, logdet = to_logits(unit)
    expected = torch.tensor([-2.94443898, -2.85556181, 0.00703128, 2.94436497], dtype=torch.float64)
    torch.testing.assert_close(y.flatten(), expected, atol=1e-8, rtol=0)
    expected = torch.tensor([2.94166505, 2.86206099, 1.28094621, 2.94159844], dtype=torch.float64)
    torch.testing.assert_close(logdet, expected, atol=1e-8, rtol=0)
    torch.testing.assert_close(from_logits(y), unit)
    jacobian = torch.autograd.functional.jacobian(lambda v: to_logits(v[None])[0][0], unit.flatten())
    torch.testing.assert_close(to_logits(unit.view(1, 4))[1][0], torch.linalg.slogdet(jacobian).logabsdet)


def test_every_value_comes_back_from_its_interval():
    values = torch.arange(256.0)
    pixels = values / 127.5 - 1
    for noise in (0.001, 0.5, 0.999):
        back = to_pixels(from_logits(to_logits(dequantise(pixels, torch.full((256,), noise))[:, None])[0][:, 0]))
        assert torch.equal(back.add(1).mul(127.5).round(), values)
    torch.testing.assert_close(to_pixels(dequantise(pixels, torch.full((256,), 0.5))), pixels, atol=1e-6, rtol=0)


def test_weight_norm_is_torchs():
    torch.manual_seed(0)
    ours, x = WeightNormConv2d(3, 5, 3), torch.randn(2, 3, 6, 6)
    theirs = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(3, 5, 3, padding=1))
    ours.gain.data.mul_(torch.rand_like(ours.gain) + 0.5)
    theirs.parametrizations.weight.original0.data.copy_(ours.gain)
    theirs.parametrizations.weight.original1.data.copy_(ours.weight)
    theirs.bias.data.copy_(ours.bias)
    torch.testing.assert_close(ours(x), theirs(x))
    assert list(torch.nn.Conv2d(3, 5, 3).weight.shape) == list(ours.weight.shape)


def test_maps_of_any_size_fit():
    maps = draw(1, 2, 8, 8)
    assert fit(maps, (8, 8)) is maps
    torch.testing.assert_close(fit(maps, (2, 4)), F.avg_pool2d(maps, (4, 2)))
    assert torch.equal(fit(maps, (16, 16)), maps.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize(("shape", "says"), [((1, 3, 9, 8), "multiples of 4.*data.size"), ((1, 1, 8, 8), r"\(B, 3,")])
def test_pictures_that_cannot_be_squeezed(shape, says):
    flow = made(3, scales=3)
    for call in (flow, flow.inverse):
        with pytest.raises(ShapeError, match=says):
            call(draw(*shape))
