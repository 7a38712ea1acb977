"""Laws of 8-bit pixels are probabilities, KL terms are what Monte Carlo says, and nothing overflows."""

import math

import pytest
import torch

from condgen.losses import likelihood as L
from condgen.nn.observation import Observation
from condgen.rng import RowRandom

GREY = torch.arange(256, dtype=torch.float64) / 127.5 - 1
INTERVALS = [L.gaussian_interval_log_prob, L.logistic_interval_log_prob]


def at(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize("law", INTERVALS)
@pytest.mark.parametrize("mean", [-3.0, -1.0, -0.2, 0.0, 0.7, 1.0, 40.0])
@pytest.mark.parametrize("log_scale", [-7.0, -3.0, 0.0, 1.0])
def test_256_probabilities_sum_to_one(law, mean, log_scale):
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
        log_p = law(GREY.to(dtype), at(mean, dtype=dtype), at(log_scale, dtype=dtype))
        assert torch.isfinite(log_p).all()
        assert float(log_p.exp().sum()) == pytest.approx(1, abs=tolerance)


def test_the_interval_of_the_logistic_law_has_the_released_values():
    """Inner levels of the released code, which adds 1e-7; its scale is x / 2 * 127.5 / 128, ours [-1, 1]."""
    stretch = 256 / 127.5
    levels = torch.tensor([128, 200])
    log_p = L.logistic_interval_log_prob(GREY[levels], at(0.1 * stretch), at(-3 + math.log(stretch)))
    expected = at(-4.77566753, -6.27447134)
    torch.testing.assert_close((log_p.exp() + 1e-7).log(), expected, atol=1e-8, rtol=0)


def test_the_interval_of_the_gaussian_law_is_a_difference_of_distribution_functions():
    mean, std = at(0.13), 0.2
    low, high = GREY - 1 / 255, GREY + 1 / 255
    phi = torch.special.ndtr
    mass = phi((high - mean) / std) - phi((low - mean) / std)
    mass[0], mass[-1] = phi((high[0] - mean) / std), 1 - phi((low[-1] - mean) / std)
    torch.testing.assert_close(L.gaussian_interval_log_prob(GREY, mean, at(math.log(std))).exp(), mass)


@pytest.mark.parametrize("law", INTERVALS)
def test_gradients_are_finite_far_away_and_agree_with_finite_differences(law):
    mean = torch.tensor([-60.0, 0.3, 60.0], requires_grad=True)
    log_scale = torch.full((256, 3), -7.0, requires_grad=True)
    law(GREY.float()[:, None].expand(256, 3), mean, log_scale).sum().backward()
    assert torch.isfinite(mean.grad).all() and torch.isfinite(log_scale.grad).all()
    inputs = (at(0.31, 0.3).requires_grad_(), at(-1.2, -3.0).requires_grad_())
    assert torch.autograd.gradcheck(lambda m, s: law(GREY[[0, 77, 171, 255], None], m, s), inputs)


def test_the_normal_tail_has_its_value_and_its_slope_in_float32():
    x = torch.tensor([-2e4, -1e4, -100, -31, -29, -3, 0, 5], requires_grad=True)
    exact = x.detach().double().requires_grad_()
    reference = torch.special.log_ndtr(exact)
    ours = L.log_ndtr(x)
    torch.testing.assert_close(ours.double(), reference, rtol=1e-6, atol=1e-9)
    slopes = [torch.autograd.grad(y.sum(), at_)[0].double() for y, at_ in ((ours, x), (reference, exact))]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-9)


def test_bernoulli_sums_to_one_over_all_binary_vectors():
    logits = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    every = torch.cartesian_prod(*[at(-1, 1)] * 8)
    log_p = L.bernoulli_log_prob(logits.expand(256, 8), every).sum(1)
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-12)


def test_kl_golden_value_monte_carlo_and_torch():
    mean, log_std = at(0.5, -1), at(-0.25, 0.15)
    assert float(L.gaussian_kl(mean, log_std, 0.0, 0.0).sum()) == pytest.approx(0.703194734, abs=1e-9)
    prior_mean, prior_log_std = at(0.2, 0.4), at(0.3, -0.6)
    closed = L.gaussian_kl(mean, log_std, prior_mean, prior_log_std)
    normal = torch.distributions.Normal
    theirs = torch.distributions.kl_divergence(normal(mean, log_std.exp()), normal(prior_mean, prior_log_std.exp()))
    torch.testing.assert_close(closed, theirs)
    z = mean + log_std.exp() * torch.randn(10**6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ratio = L.gaussian_log_prob(z, mean, log_std) - L.gaussian_log_prob(z, prior_mean, prior_log_std)
    torch.testing.assert_close(ratio.mean(0), closed, atol=1e-2, rtol=0)
    assert bool(((ratio.mean(0) - closed).abs() < 4 * ratio.std(0) / 1000).all())


def test_free_bits_take_the_mean_over_the_batch_before_the_floor():
    groups = at([0.0, 3.0], [1.0, 5.0])
    assert float(L.free_bits(groups, 2.0)) == 2 + 4
    assert float(L.free_bits(groups, 0.0)) == 0.5 + 4
    per_example = groups.clamp_min(2.0).mean(0).sum()
    assert float(L.free_bits(at([0.0], [4.0]), 2.0)) == 2 != float(per_example)


def test_log_mean_exp_golden():
    assert float(L.log_mean_exp(at(-3, -1, -2), 0)) == pytest.approx(-1.6910063, abs=1e-6)


def test_log1mexp_at_both_ends():
    x = at(1e-12, 0.1, math.log(2), 3, 800).requires_grad_()
    torch.testing.assert_close(L.log1mexp(x), torch.log(-torch.expm1(-x)))
    assert torch.isfinite(torch.autograd.grad(L.log1mexp(x).sum(), x)[0]).all()


@pytest.mark.parametrize("law", ["gaussian", "logistic"])
def test_uniform_noise_gives_the_interval_in_the_mean(law):
    """E over u of density * width is the mass, so that K draws of log_prob tighten to the interval's."""
    torch.manual_seed(0)
    laws = {how: Observation(law, 1, scale="fixed", initial=0.3, dequantisation=how) for how in ("interval", "uniform")}
    raw, pixels = torch.full((1, 1, 1, 1), 0.2), torch.full((1, 1, 1, 1), 31 / 127.5 - 1)
    exact = laws["interval"].log_prob(raw, pixels)
    drawn = laws["uniform"].log_prob(raw.expand(20000, 1, 1, 1), pixels, RowRandom(0, [0]))
    assert drawn.std() > 0
    torch.testing.assert_close(L.log_mean_exp(drawn, 0), exact[0], atol=1e-3, rtol=0)


@pytest.mark.parametrize("law", ["bernoulli", "gaussian", "logistic"])
@pytest.mark.parametrize("scale", ["fixed", "learned", "predicted"])
def test_draws_follow_the_probabilities(law, scale):
    observed = Observation(law, 1, scale=scale, initial=0.4)
    raw = torch.full((20000, observed.outputs, 1, 1), 0.4)
    drawn = observed.draw(raw, RowRandom(3, range(20000))).flatten()
    levels = (-1.0, 1.0) if law == "bernoulli" else GREY.tolist()
    p = [float(observed.log_prob(raw[:1], torch.full((1, 1, 1, 1), level)).detach().exp()) for level in levels]
    assert sum(p) == pytest.approx(1, abs=1e-4)
    for low, high in ((-1, -0.5), (-0.5, 0.5), (0.5, 0.99), (0.99, 1.01)):
        share = float(((drawn >= low) & (drawn < high)).float().mean())
        assert share == pytest.approx(sum(q for q, x in zip(p, levels, strict=True) if low <= x < high), abs=0.02)
    if law == "bernoulli":
        assert float(observed.mean(raw[:1])) == pytest.approx(2 * p[1] - 1, abs=1e-6)


@pytest.mark.parametrize("law", ["bernoulli", "gaussian", "logistic"])
def test_half_precision_outside_does_not_reach_the_sums(law):
    observed = Observation(law, 3, initial=0.05)
    raw = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    pixels = torch.sign(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = observed.log_prob(raw, pixels)
    assert inside.dtype == torch.float32
    exact = observed.double().log_prob(raw, pixels)
    assert torch.equal(inside, observed.float().log_prob(raw.float(), pixels))
    torch.testing.assert_close(inside, exact.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", ["fixed", "learned", "predicted"])
def test_every_scale_starts_at_its_initial_value(scale):
    law = Observation("gaussian", 3, scale=scale, initial=0.2)
    raw = torch.zeros(2, law.outputs, 4, 4)
    mean, log_scale = law.parameters_of(raw)
    assert law.outputs == (6 if scale == "predicted" else 3) and (law.log_scale is not None) == (scale == "learned")
    torch.testing.assert_close(log_scale.exp().expand_as(mean), torch.full((2, 3, 4, 4), 0.2))
    raw[:, 3:] = 0.5  # a predicted log scale is counted from there
    torch.testing.assert_close(
        law.parameters_of(raw)[1] - log_scale, torch.zeros_like(log_scale) + 0.5 * (scale == "predicted")
    )
