"""The mathematics of `condgen.systems.cqf`: both losses on densities that are known, the change of variables, the
bound. Checks of arXiv:1901.01091 and of its parts with numbers that were computed apart."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from condgen.losses.likelihood import gaussian_log_prob, log_mean_exp
from condgen.metrics.likelihood import bits_per_dim
from condgen.nn.flow import MultiScaleFlow, dequantise, to_logits
from condgen.nn.latent import Draw
from condgen.rng import RowRandom
from condgen.systems import cqf
from condgen.systems.cqf import Cqf, PixelMap, quality_loss
from condgen.types import Condition, ConditionSpec, TargetSpec

NONE = Condition()
DOUBLE = torch.float64


def made(channels=1, side=8, **options):
    torch.manual_seed(0)
    small = {"width": 4, "discriminator_width": 4, "latent_dim": 3, "flow_width": 4, "flow_blocks": 1, "iaf_width": 8}
    return Cqf(condition=ConditionSpec(), target=TargetSpec(channels, side, side), **{**small, **options})


def pictures(rows=4, channels=1, side=8):
    return torch.randint(0, 256, (rows, channels, side, side), generator=torch.Generator().manual_seed(3)) / 127.5 - 1


def stirred(module, share=0.3):
    """Parameters away from their start, where many are 0."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * share)
    return module


# coverage and quality on one dimension


def quantiles(count):
    return torch.special.ndtri((torch.arange(count, dtype=DOUBLE) + 0.5) / count)


def log_data(x):
    parts = [
        gaussian_log_prob(x, torch.tensor(m, dtype=DOUBLE), torch.tensor(0.3, dtype=DOUBLE).log()) for m in (-2, 2)
    ]
    return torch.logaddexp(*parts) - math.log(2)


NORMAL = quantiles(2001)
DATA = torch.cat([-2 + 0.3 * NORMAL, 2 + 0.3 * NORMAL])


def fitted(start, coverage, quality):
    """(m, s) of N(m, s^2) after descending coverage * L_C + quality * L_Q with the best D."""
    mean, log_std = (torch.tensor(v, dtype=DOUBLE, requires_grad=True) for v in (start[0], math.log(start[1])))
    optimizer = torch.optim.LBFGS([mean, log_std], lr=0.1, max_iter=400, tolerance_grad=1e-9, tolerance_change=1e-13)

    def loss():
        optimizer.zero_grad()
        x = mean + log_std.exp() * NORMAL
        covered = -gaussian_log_prob(DATA, mean, log_std).mean()
        judged = quality_loss(log_data(x) - gaussian_log_prob(x, mean, log_std))
        total = coverage * covered + quality * judged
        total.backward()
        return total

    optimizer.step(loss)
    return mean.item(), log_std.exp().item()


def divergences(mean, std):
    """KL(data || model) and KL(model || data) on a grid."""
    x = torch.linspace(-40, 40, 400_001, dtype=DOUBLE)
    log_p, log_q = log_data(x), gaussian_log_prob(x, torch.tensor(mean), torch.tensor(std, dtype=DOUBLE).log())
    wide = x[1] - x[0]
    return tuple(float((a.exp() * (a - b)).sum() * wide) for a, b in ((log_p, log_q), (log_q, log_p)))


@pytest.mark.parametrize(
    ("start", "coverage", "quality", "mean", "std", "forward", "reverse"),
    [
        ((1.5, 0.5), 1, 0, 0.0, 2.0224, 1.2151, 7.364),
        ((1.5, 0.5), 0, 1, 2.0, 0.3, 43.75, math.log(2)),
        ((0.0, 1.5), 0, 1, 0.0, 1.6498, None, 6.571),
        ((1.5, 0.5), 1, 1, 1.646, 1.0145, 3.329, 4.391),
        ((0.0, 1.5), 1, 1, 0.0, 1.6738, 1.2559, 6.574),
    ],
)
def test_coverage_spreads_quality_drops_a_mode_and_the_sum_lies_between(
    start, coverage, quality, mean, std, forward, reverse
):
    m, s = fitted(start, coverage, quality)
    assert (m, s) == (pytest.approx(mean, abs=4e-3), pytest.approx(std, abs=4e-3))
    found = divergences(mean, std)
    assert found[1] == pytest.approx(reverse, rel=2e-3)
    assert forward is None or found[0] == pytest.approx(forward, rel=2e-3)


def test_the_quality_loss_is_the_divergence_where_d_is_best():
    x = 0.4 + 1.3 * torch.randn(2_000_000, generator=torch.Generator().manual_seed(0))
    logits = gaussian_log_prob(x, torch.tensor(0.0), torch.tensor(0.0)) - gaussian_log_prob(
        x, torch.tensor(0.4), torch.tensor(1.3).log()
    )
    assert float(quality_loss(logits)) == pytest.approx(0.162636, abs=2e-3)


def test_the_quality_loss_is_the_sum_of_both_classical_ones():
    logits = torch.linspace(-20, 20, 401, dtype=DOUBLE)
    both = F.softplus(-logits) - F.softplus(logits)  # -ln D and ln(1 - D)
    torch.testing.assert_close(both, -logits, atol=1e-6, rtol=0)
    assert float(quality_loss(logits[:7])) == pytest.approx(float(both[:7].mean()), abs=1e-5)


# the change of variables


@pytest.mark.parametrize("two_scales", [False, True])
def test_the_pixel_map_is_inverted_and_its_determinant_is_that_of_its_jacobian(two_scales):
    flow = MultiScaleFlow(2, scales=2, width=4, blocks=1, final=4 if two_scales else 0, affine="paper").double()
    f = PixelMap(stirred(flow)).eval()
    unit = torch.rand(1, 2, 4, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y, log_det = f(unit)
        assert (f.inverse(y) - unit).abs().max() < 1e-10
        other = torch.randn_like(y)
        assert (f(f.inverse(other))[0] - other).abs().max() < 1e-8
    jacobian = torch.autograd.functional.jacobian(lambda x: f(x)[0], unit).reshape(32, 32)
    assert float(torch.linalg.slogdet(jacobian).logabsdet) == pytest.approx(float(log_det), abs=1e-8)
    assert not torch.allclose(y, to_logits(unit)[0], atol=0.1)


def test_the_inverse_in_single_precision():
    system = made(3, 32, flow_width=16)
    stirred(system.flow, 0.05)
    unit = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        assert (system.flow.inverse(system.flow(unit)[0]) - unit).abs().max() < 1e-4


def test_without_a_flow_the_pixel_itself_is_observed():
    f = PixelMap(None)
    unit = torch.rand(2, 1, 4, 4)
    y, log_det = f(unit)
    torch.testing.assert_close(y, 2 * unit - 1)
    torch.testing.assert_close(log_det, torch.full((2,), 16 * math.log(2)))
    torch.testing.assert_close(f.inverse(y), unit)


def test_a_flow_that_does_nothing_leaves_the_elbo_of_logits():
    """ln p of VAE-F is then that of a Gaussian VAE on logit data plus the determinant of the logit."""
    system, data = made(3, quality=False).eval(), pictures(4, 3)
    with torch.no_grad():
        for name, parameter in system.flow.named_parameters():
            if name.endswith((".factor", "last.gain", "last.bias")):
                parameter.zero_()
        found = system.log_prob(data, NONE, random=RowRandom(1, range(4)))
        random = RowRandom(1, range(4))
        logits, log_det = to_logits(dequantise(data, random.rand(3, 8, 8)))
        drawn = system.encoder((2 * dequantise(data, RowRandom(1, range(4)).rand(3, 8, 8)) - 1), NONE, random.randn(3))
        mean, log_std = system.observation.parameters_of(system.decoder(drawn.latent, NONE))
        plain = gaussian_log_prob(logits, mean, log_std).flatten(1).sum(1) - drawn.ratio.sum(1)
    torch.testing.assert_close(found, plain + log_det - 192 * math.log(256), rtol=1e-6, atol=1e-3)


# the bound on a model whose density is known


class Known(nn.Module):
    """Stands for encoder, decoder or flow."""

    def __init__(self, fn, inverse=None):
        super().__init__()
        self.fn, self.inverse = fn, inverse

    def forward(self, *inputs):
        return self.fn(*inputs)


class Fixed(RowRandom):
    """The same dequantisation in every row, and noise of its own in each."""

    def rand(self, *shape):
        one = torch.rand(shape, generator=torch.Generator().manual_seed(9))
        return one.expand(self.rows, *shape)

    def randn(self, *shape):
        return torch.randn(self.rows, *shape, generator=torch.Generator().manual_seed(self.seed))


def linear_gaussian(shrink=1.0):
    """y = 3 x - 1, y = a z + b + 0.7 noise, one z. shrink 1: q is the true posterior. -> system, ln p(x) in nats."""
    system = made(quality=False, scale="fixed", initial_scale=0.7, latent_dim=1).eval()
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(64, generator=generator) * 0.4, torch.randn(64, generator=generator) * 0.1
    precision = 1 + float(a.square().sum()) / 0.7**2

    def infer(pixels, condition, noise):
        y = 3 * (pixels.flatten(1) + 1) / 2 - 1
        mean = ((y - b) @ a / 0.7**2 / precision)[:, None]
        std = shrink / math.sqrt(precision)
        z = mean + std * noise
        ratio = gaussian_log_prob(z, mean, torch.full_like(mean, math.log(std))) - gaussian_log_prob(
            z, torch.zeros_like(z), torch.zeros_like(z)
        )
        return Draw(z, ratio, torch.full_like(ratio, math.nan))  # a closed KL is no weight

    system.encoder = Known(infer)
    system.decoder = Known(lambda z, condition: (z * a + b).view(-1, 1, 8, 8))
    system.flow = Known(lambda unit: (3 * unit - 1, unit.new_full((len(unit),), 64 * math.log(3))))
    marginal = torch.distributions.MultivariateNormal(b, torch.outer(a, a) + 0.49 * torch.eye(64))

    def exact(pixels):
        unit = dequantise(pixels, Fixed(0, range(len(pixels))).rand(1, 8, 8))
        return marginal.log_prob((3 * unit - 1).flatten(1)) + 64 * math.log(3) - 64 * math.log(256)

    return system, exact


def test_with_the_true_posterior_every_weight_is_the_likelihood():
    system, exact = linear_gaussian()
    data = pictures(3)
    with torch.no_grad():
        for seed in (0, 1):
            found = system.log_prob(data, NONE, random=Fixed(seed, range(3)))
            torch.testing.assert_close(found, exact(data), rtol=1e-5, atol=2e-3)


def test_the_bound_rises_with_draws_to_the_likelihood():
    system, exact = linear_gaussian(shrink=2.0)
    data = pictures(1)
    rows = 100_000
    with torch.no_grad():
        weights = system.log_prob(data.expand(rows, -1, -1, -1), NONE, random=Fixed(0, range(rows)))
    rising = [float(log_mean_exp(weights.double().view(-1, k), 1).mean()) for k in (1, 10, 100, rows)]
    truth = float(exact(data))
    assert rising[0] < rising[1] < rising[2] < truth + 0.01
    assert rising[0] < truth - 0.3
    assert rising[3] == pytest.approx(truth, abs=0.02)


@pytest.mark.parametrize(
    ("flow", "iaf", "scale"), list(product([False, True], [False, True], ["learned", "predicted"]))
)
def test_the_elbo_of_training_is_the_mean_weight(flow, iaf, scale):
    system = made(quality=False, flow=flow, iaf=iaf, scale=scale).eval()
    many = pictures(1).expand(1500, -1, -1, -1)
    with torch.no_grad():
        weights = system.log_prob(many, NONE, random=RowRandom(0, range(1500))).double()
        losses = system.coverage_loss(cqf.Batch(many), cqf.StepRandom(0, rows=1500))
    elbo = -float(losses["elbo_bits"]) * 64 * math.log(2)
    assert float(weights.mean()) == pytest.approx(elbo, abs=6 * float(weights.std()) / math.sqrt(1500) + 1e-3)
    rising = [float(log_mean_exp(weights.view(-1, k), 1).mean()) for k in (1, 10, 100)]
    assert rising == sorted(rising)


@pytest.mark.parametrize("options", [
    {"flow": False, "initial_scale": 0.4}, {"scale": "predicted", "initial_scale": 1.5},
    {"two_scales": True, "iaf": True, "residual": True, "scale": "learned", "initial_scale": 1.5},
], ids=["VAE", "VAE-F", "further"])  # fmt: skip
def test_probabilities_of_all_pictures_sum_to_the_mass_inside_the_pixel_range(options):
    """4 pixels: exp(log_prob) has mean p(x) over z of q, so its mean over all pictures, times how many there are, is
    the share of noisy samples that are not clipped. Noise, dequantisation, logit, flow and KL all have to be right."""
    system, rows = made(1, 2, quality=False, **options).eval(), 40_000
    stirred(system.flow, 0.1), stirred(system.decoder, 0.1), stirred(system.encoder, 0.05)
    with torch.no_grad():
        system.encoder.net.heads.bias[3:] += 0.2  # q wider than p: no heavy tail of weights
        levels = cqf.StepRandom("pictures", rows=rows).randint(256, 1, 2, 2)
        weights = system.log_prob(levels / 127.5 - 1, NONE, random=cqf.StepRandom(0, rows=rows))
        total = (weights.double() + 4 * math.log(256)).exp()
        drawn = cqf.StepRandom(1, rows=rows)
        unit = system._generate(drawn.randn(3), NONE, drawn, "noisy")
        inside = ((unit >= 0) & (unit <= 1)).flatten(1).all(1).double().mean()
    error = float(total.std()) / math.sqrt(rows)
    assert 0.05 < inside < 0.9999 and error < 0.02
    assert abs(float(total.mean() - inside)) < 4 * error


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_uniform_density_has_eight_bits_whatever_the_scale_of_y(scale, monkeypatch):
    system = made(3, quality=False, flow=False)
    for parameter in system.encoder.net.heads.parameters():
        nn.init.zeros_(parameter)  # q = p: no KL
    monkeypatch.setattr(
        cqf.likelihood, "gaussian_log_prob", lambda y, mean, log_std: torch.full_like(y, -math.log(scale))
    )
    if scale == 1:
        system.flow = Known(lambda unit: (unit, unit.new_zeros(len(unit))))
    score = bits_per_dim(system, pictures(6, 3))
    assert score.value == pytest.approx(8, abs=1e-5)
    assert score.error == pytest.approx(0, abs=1e-6)
