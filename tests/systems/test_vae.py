"""What the papers of `condgen.systems.vae` claim: bounds, their order, gradients, counts, and both architectures."""

import math

import pytest
import torch

from condgen.errors import ConfigError, ShapeError
from condgen.losses.likelihood import log_mean_exp
from condgen.nn.iaf import Iaf
from condgen.nn.ladder import LadderLayer, LadderVae
from condgen.nn.latent import VectorVae, draw_posterior
from condgen.nn.vae_nets import halvings
from condgen.rng import RowRandom, StepRandom
from condgen.systems.base import HasLatent, HasLikelihood
from condgen.systems.vae import Vae
from condgen.types import Batch, Condition, ConditionSpec, LabelSpec, TargetSpec

NONE = Condition()
ARCHITECTURES = ["conv", "mlp", "ladder"]


def made(channels=1, side=8, labels=0, **options):
    torch.manual_seed(0)
    options = {"width": 4, "latent_dim": 3, "iaf_width": 6, "depth": 1, **options}
    spec = ConditionSpec(label=LabelSpec(labels)) if labels else ConditionSpec()
    return Vae(condition=spec, target=TargetSpec(channels, side, side), **options)


def pictures(rows=4, channels=1, side=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, channels, side, side), generator=generator) / 127.5 - 1


def bound(system, data, seed=0, condition=NONE):
    return system.bound_loss(Batch(data, condition), StepRandom(seed, rows=len(data)))


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_of_the_paper():
    """Tanh, 500 units, 20 latents at 28 x 28; and with a second head for a predicted deviation."""
    options = {"architecture": "mlp", "side": 28, "width": 500, "latent_dim": 20}
    assert count(made(law="bernoulli", **options)) == 815_824
    assert count(made(law="gaussian", scale="predicted", **options)) == 815_824 + 784 * 501


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("posterior", ["gaussian", "iaf"])
@pytest.mark.parametrize("law", ["bernoulli", "gaussian", "logistic"])
@pytest.mark.parametrize("labels", [0, 3])
def test_every_combination_trains_samples_and_has_a_likelihood(architecture, posterior, law, labels):
    binarise = "threshold" if law == "bernoulli" else "none"
    system = made(3, 8, labels, architecture=architecture, posterior=posterior, law=law, binarise=binarise)
    condition = Condition(label=torch.tensor([0, 1, 2, 0])) if labels else NONE
    assert isinstance(system, HasLikelihood) and isinstance(system, HasLatent)
    data = pictures(4, 3)
    losses = bound(system, data, condition=condition)
    losses["loss"].backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in system.parameters())
    with torch.no_grad():
        system.eval()
        for mode in ("mean", "noisy"):
            drawn = system.sample(condition, random=RowRandom(0, range(4)), sample_mode=mode)
            assert drawn.shape == data.shape and drawn.abs().max() <= 1
        seen = system.observed(data, RowRandom(0, range(4)))
        nats = system.log_prob(seen, condition, random=RowRandom(0, range(4)))
        assert nats.shape == (4,) and nats.dtype == torch.float32 and bool((nats < 0).all())
        latent = system.encode(data, condition)
        assert system.decode(latent, condition).shape == data.shape


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [16, 28, 32, 48, 64, 128])
def test_sizes(side, channels):
    for architecture in ("conv", "ladder"):
        system = made(channels, side, architecture=architecture, width=2).eval()
        with torch.no_grad():
            assert system.sample(NONE, random=RowRandom(0, [0])).shape == (1, channels, side, side)
            assert math.isfinite(float(system.log_prob(pictures(1, channels, side), NONE, random=RowRandom(0, [0]))))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("posterior", ["gaussian", "iaf"])
def test_the_elbo_is_the_mean_weight_and_below_the_bounds_of_more_draws(architecture, posterior):
    system, data = made(architecture=architecture, posterior=posterior).eval(), pictures(1)
    many = data.expand(4000, -1, -1, -1)
    with torch.no_grad():
        weights = system.log_prob(many, NONE, random=RowRandom(0, range(4000))).double()
        losses = bound(system, many)
    elbo = -float(losses["elbo_bits"]) * 64 * math.log(2)
    error = float(weights.std()) / math.sqrt(4000)
    assert float(weights.mean()) == pytest.approx(elbo, abs=6 * error + 1e-3)
    rising = [float(log_mean_exp(weights.view(-1, k), 1).mean()) for k in (1, 10, 100, 4000)]
    assert rising == sorted(rising) and rising[0] < rising[-1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_closed_kl_is_the_mean_of_the_drawn_ratio(architecture):
    """A published port mixes up deviation and variance here."""
    system = made(architecture=architecture)
    with torch.no_grad():
        for parameter in system.model.parameters():
            parameter.mul_(1.5)
        noise = [RowRandom(1, [0]).randn(20000, *shape)[0] for shape in system.model.noise_shapes]
        found = system.model.infer(pictures(1), None, noise)
    gap = found.ratio.sum(1).mean() - found.kl.sum(1).mean()
    assert float(found.kl.sum(1).mean()) > 0.01
    assert abs(float(gap)) < 5 * float((found.ratio - found.kl).sum(1).std()) / math.sqrt(20000)


def test_the_ladder_sums_to_one():
    """One pixel-pair of black and white at a time: E over the prior of p(x | z), summed over all pictures, is 1, and
    the importance-weighted bound reaches that marginal likelihood through q."""
    system = made(1, 2, architecture="ladder", scales=1, law="bernoulli", binarise="threshold", posterior="iaf").eval()
    every = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4).view(16, 1, 2, 2)
    with torch.no_grad():
        for parameter in system.parameters():
            parameter.mul_(2)
        noise = [RowRandom(1, [0]).randn(20000, *shape)[0] for shape in system.model.noise_shapes]
        raw = system.model.generate(None, noise)
        prior = torch.stack([
            log_mean_exp(system.observation.log_prob(raw, one[None].expand(20000, -1, -1, -1)), 0) for one in every
        ])  # fmt: skip
        through_q = torch.stack([
            log_mean_exp(system.log_prob(one[None].expand(4000, -1, -1, -1), NONE, random=RowRandom(2, range(4000))), 0)
            for one in every
        ])  # fmt: skip
    assert float(prior.exp().sum()) == pytest.approx(1, abs=1e-5)
    assert prior.std() > 0.05
    torch.testing.assert_close(through_q, prior, atol=0.03, rtol=0)


@pytest.mark.parametrize("posterior", ["gaussian", "iaf"])
def test_the_vector_model_sums_to_one_through_q(posterior):
    system = made(1, 2, architecture="mlp", law="bernoulli", binarise="threshold", posterior=posterior).eval()
    every = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4).view(16, 1, 2, 2)
    with torch.no_grad():
        for parameter in system.model.decoder.parameters():
            parameter.mul_(2)
        system.model.encoder.heads.bias[3:] += 0.5  # q wider than p: weights without a heavy tail
        one = RowRandom(2, range(4000))
        nats = torch.stack([log_mean_exp(system.log_prob(x.expand(4000, 1, 2, 2), NONE, random=one), 0) for x in every])
    assert float(nats.exp().sum()) == pytest.approx(1, abs=0.03)
    assert nats.exp().max() > 2 * nats.exp().min()


class Linear(torch.nn.Module):
    """Stands for an encoder or a decoder by a fixed linear map."""

    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, *inputs):
        return self.fn(*inputs)


def linear_gaussian(shrink=1.0):
    """x = w z + b + s eps, one latent: p(x) and the true posterior are known. shrink 1: q is the true posterior."""
    w, b, s = torch.tensor([0.8, -0.5], dtype=torch.float64), torch.tensor([0.1, 0.2], dtype=torch.float64), 0.6
    precision = 1 + float(w.square().sum()) / s**2

    def encode(pixels, given):
        mean = ((pixels.flatten(1) - b) @ w / s**2 / precision)[:, None]
        return mean, torch.full_like(mean, -0.5 * math.log(precision) + math.log(shrink)), None

    covariance = torch.outer(w, w) + s**2 * torch.eye(2, dtype=torch.float64)
    marginal = torch.distributions.MultivariateNormal(b, covariance)
    model = VectorVae(Linear(encode), Linear(lambda z, given: (z * w + b)[:, :, None, None]), 1)

    def weights(x, noise):
        found = model.infer(x[:, :, None, None], None, [noise])
        log_p = torch.distributions.Normal(found.raw[:, :, 0, 0], s).log_prob(
            x.repeat_interleave(len(noise) // len(x), 0)
        )
        return log_p.sum(1), found

    return weights, marginal


def test_with_the_true_posterior_every_weight_is_the_marginal_likelihood():
    weights, marginal = linear_gaussian()
    x = torch.tensor([[0.3, -0.4], [2.0, 1.0]], dtype=torch.float64)
    noise = torch.randn(2000, 1, dtype=torch.float64)
    log_p, found = weights(x, noise)
    exact = marginal.log_prob(x).repeat_interleave(1000, 0)
    torch.testing.assert_close(log_p - found.ratio.sum(1), exact, atol=1e-10, rtol=0)


def test_elbo_iwae_and_marginal_likelihood_are_in_order():
    weights, marginal = linear_gaussian(shrink=2.0)
    x = torch.tensor([[0.3, -0.4]], dtype=torch.float64)
    noise = torch.randn(40000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_p, found = weights(x, noise)
    log_w = log_p - found.ratio.sum(1)
    by_k = [float(log_mean_exp(log_w.view(-1, k), 1).mean()) for k in (1, 5, 50, 40000)]
    exact = float(marginal.log_prob(x))
    assert by_k[0] < by_k[1] < by_k[2] < exact + 1e-3
    assert by_k[3] == pytest.approx(exact, abs=5e-3)
    closed = float((log_p - found.kl.sum(1)).mean())
    assert closed == pytest.approx(by_k[0], abs=0.02)  # estimators A and B of the paper


def test_gradients_through_the_noise_agree_with_finite_differences():
    eps = torch.randn(3, 2, dtype=torch.float64)
    inputs = [torch.randn(3, 2, dtype=torch.float64).requires_grad_() for _ in range(2)]

    def objective(mean, log_std):
        drawn = draw_posterior(mean, log_std, eps, 0.3, -0.2)
        return drawn.latent.sin().sum() + drawn.ratio.sum() + drawn.kl.sum()

    assert torch.autograd.gradcheck(objective, inputs)


def test_importance_trains_on_the_bound_of_k_draws():
    data = pictures(3)
    losses = bound(made(importance=4), data)
    assert losses["loss"] < losses["elbo_bits"]
    one = made(importance=1)
    noise = StepRandom(0, rows=3).randn(4, 3).flatten(0, 1)
    found = one.model.infer(data, None, [noise])
    log_w = one.observation.log_prob(found.raw, data) - found.ratio.sum(1)
    expected = -log_mean_exp(log_w.view(3, 4), 1).mean() / (64 * math.log(2))
    torch.testing.assert_close(losses["loss"], expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_draws_stand_beside_their_own_picture_and_condition(architecture):
    """Three draws of two pictures at once equal the draws of each alone."""
    prior = "standard" if architecture == "ladder" else "conditional"
    system = made(labels=3, architecture=architecture, posterior="iaf", prior=prior).eval()
    torch.nn.init.normal_((system.model.given_top if architecture == "ladder" else system.model.prior).weight)
    data, condition = pictures(2), Condition(label=torch.tensor([0, 2]))
    with torch.no_grad():
        noise = [torch.randn(6, *shape) for shape in system.model.noise_shapes]
        found = system.model.infer(data, system._given(condition), noise)
        log_p = system.observation.log_prob(found.raw, data)
        for row in (0, 1):
            mine = slice(3 * row, 3 * row + 3)
            given = system._given(condition.index([row]))
            alone = system.model.infer(data[row : row + 1], given, [n[mine] for n in noise])
            torch.testing.assert_close(alone.ratio, found.ratio[mine], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(alone.raw, found.raw[mine], atol=1e-5, rtol=1e-4)
            mine_p = system.observation.log_prob(alone.raw, data[row : row + 1])
            torch.testing.assert_close(mine_p, log_p[mine], atol=1e-3, rtol=1e-5)


def test_the_weight_of_the_kl_rises_with_updates_and_survives_a_checkpoint():
    data = pictures()

    def weight(system, seed=0, **place):
        losses = system.bound_loss(Batch(data), StepRandom(seed, rows=4, **place))
        losses = {name: value.detach() for name, value in losses.items()}
        nats = float(losses["loss"]) * 64 * math.log(2)
        return (nats - float(losses["distortion"])) / float(losses["kl"])

    system = made(kl_warmup=4, beta=2.0)
    seen = [weight(system) for _ in range(6)]
    assert seen == pytest.approx([0.5, 1, 1.5, 2, 2, 2], abs=0.02)
    resumed = made(kl_warmup=4, beta=2.0)
    for _ in range(2):
        weight(resumed)
    again = made(kl_warmup=4, beta=2.0)
    again.load_state_dict(resumed.state_dict())
    assert weight(again) == pytest.approx(1.5, abs=0.02)
    assert weight(again.eval()) == weight(again)  # looking does not count
    parts = made(kl_warmup=4, beta=2.0)
    for rank in (0, 1):  # two micro-batches on each of two processes: one update
        parts.updates.zero_()
        for micro in (0, 1):
            place = {"rank": rank, "world": 2, "offset": (2 * micro + rank) * 4, "total": 16}
            assert weight(parts, **place) == pytest.approx(0.5, abs=0.02)
        assert int(parts.updates) == 1


def test_free_bits_leave_the_small_groups_alone():
    data = pictures()
    plain, free = made(), made(free_bits=50.0)
    losses = bound(free, data)
    nats = losses["loss"].item() * 64 * math.log(2)
    assert nats - losses["distortion"].item() == pytest.approx(3 * 50, rel=1e-3)
    torch.testing.assert_close(losses["elbo_bits"], bound(plain, data)["elbo_bits"])


def test_samples_change_with_z_and_decode_inverts_encode_after_overfitting():
    torch.manual_seed(0)
    data = pictures(4, side=8, seed=3)
    system = made(width=16, latent_dim=8)
    optimizer = torch.optim.Adam(system.parameters(), 5e-3)
    first = float(bound(system, data)["elbo_bits"])
    for step in range(120):
        optimizer.zero_grad()
        losses = bound(system, data, step)
        losses["loss"].backward()
        optimizer.step()
    assert float(losses["elbo_bits"]) < first - 2
    with torch.no_grad():
        again = system.eval().decode(system.encode(data, NONE), NONE)
        drawn = system.sample(NONE, random=RowRandom(0, range(8)))
    own = (again - data).square().mean((1, 2, 3))
    other = (again - data.roll(1, 0)).square().mean((1, 2, 3))
    assert bool((own < 0.5 * other).all())
    assert float(drawn.std(0).mean()) > 0.02


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_encode_gives_the_latent_that_decode_takes(architecture):
    system, data = made(architecture=architecture, posterior="iaf").eval(), pictures()
    with torch.no_grad():
        zeros = [torch.zeros(4, *shape) for shape in system.model.noise_shapes]
        raw = system.model.infer(data, None, zeros).raw
        torch.testing.assert_close(system.decode(system.encode(data, NONE), NONE), system.observation.mean(raw))


def test_the_ladder_at_zero_residuals_is_its_skips():
    model = LadderVae((1, 8, 8), 0, outputs=1, width=4, latent=2, depth=1, scales=2)
    with torch.no_grad():
        for layer in model.layers:
            layer.down_out.weight.zero_()
            layer.down_out.bias.zero_()
        model.top.normal_()
        noise = [torch.randn(2, *shape) for shape in model.noise_shapes]
        skips = model.top[None, :, None, None].expand(2, -1, 4, 4)
        torch.testing.assert_close(model.generate(None, noise), model.head(torch.nn.functional.elu(skips)))


def test_the_top_of_the_ladder_conditions_every_layer_below():
    """What is drawn on top moves the priors further down: the latents are a hierarchy."""
    model = made(architecture="ladder", depth=2).model
    noise = [torch.randn(1, *shape) for shape in model.noise_shapes]
    with torch.no_grad():
        base = model._down(None, 1, noise)[1]
        moved = model._down(None, 1, [*noise[:-1], noise[-1] + 1])[1]
    assert all(bool((a.latent != b.latent).any()) for a, b in zip(base, moved, strict=True))


def test_half_precision_keeps_the_likelihood_in_float32():
    system, data = made(3, 16, width=8).eval(), pictures(2, 3, 16)
    with torch.no_grad():
        exact = system.log_prob(data, NONE, random=RowRandom(0, [0, 1]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = system.log_prob(data, NONE, random=RowRandom(0, [0, 1]))
            losses = bound(system, data)
    assert half.dtype == losses["loss"].dtype == losses["kl"].dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=5e-3, atol=0)
    assert bool((half != half.bfloat16()).any())


def test_the_prior_of_the_condition():
    system = made(labels=3, prior="conditional").eval()
    torch.nn.init.normal_(system.model.prior.weight)
    condition, data = Condition(label=torch.tensor([0, 1])), pictures(1).expand(2, -1, -1, -1)
    with torch.no_grad():
        mean, _ = system.model._prior(system._given(condition))
        assert not torch.equal(mean[0], mean[1])
        noise = [RowRandom(1, [0, 1]).randn(20000, 3).flatten(0, 1)]
        found = system.model.infer(data, system._given(condition), noise)
    gap = (found.ratio - found.kl).sum(1).view(2, -1)
    assert bool((gap.mean(1).abs() < 5 * gap.std(1) / math.sqrt(20000)).all())
    with pytest.raises(ConfigError, match="needs a condition"):
        made(prior="conditional")


def test_samples_come_from_the_prior_of_the_condition_with_its_deviation():
    system = made(labels=3, prior="conditional").eval()
    torch.nn.init.normal_(system.model.prior.weight)
    system.model.decoder = Linear(lambda z, given: z)
    given = system._given(Condition(label=torch.tensor([0, 2])))
    with torch.no_grad():
        mean, log_std = system.model._prior(given)
        noise = torch.randn(2, 3)
        torch.testing.assert_close(system.model.generate(given, [noise]), mean + log_std.exp() * noise)
    assert log_std.abs().max() > 0.2


def test_a_layer_of_the_ladder_has_the_moments_of_both_directions():
    """q = N(bottom-up mean + top-down mean, exp of the sum of both log deviations), p = N of the top-down ones."""
    layer = LadderLayer(4, 1)
    h, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 1, 2, 2)
    values = {"p mean": 0.3, "p log std": 0.7, "q mean": -0.4, "q log std": 0.2}
    below = (torch.full((3, 1, 2, 2), 1.5), torch.full((3, 1, 2, 2), -0.5), torch.zeros(3, 0, 2, 2))
    with torch.no_grad():
        layer.down_in.weight.zero_()
        layer.down_in.bias[:4] = torch.tensor(list(values.values()))
        _, drawn = layer.down(h, noise)
        torch.testing.assert_close(drawn.latent, 0.3 + math.exp(0.7) * noise)
        _, drawn = layer.down(h, noise, below)
    q, p = torch.distributions.Normal(1.1, math.exp(-0.3)), torch.distributions.Normal(0.3, math.exp(0.7))
    torch.testing.assert_close(drawn.latent, 1.1 + math.exp(-0.3) * noise)
    torch.testing.assert_close(drawn.kl, torch.distributions.kl_divergence(q, p).expand(3, 1, 2, 2))
    torch.testing.assert_close(drawn.ratio, q.log_prob(drawn.latent) - p.log_prob(drawn.latent))


@pytest.mark.parametrize("halve", [False, True])
def test_a_layer_of_the_ladder_at_zero_residuals_passes_on_what_it_gets(halve):
    layer, h = LadderLayer(4, 2, halve=halve), torch.randn(1, 4, 4, 4)
    for conv in (layer.up_out, layer.down_out):
        torch.nn.init.zeros_(conv.weight), torch.nn.init.zeros_(conv.bias)
    above, part = layer.up(h)
    assert torch.equal(above, h[:, :, ::2, ::2] if halve else h)
    below, _ = layer.down(above, torch.randn(1, 2, *above.shape[2:]), part)
    expected = above.repeat_interleave(2, 2).repeat_interleave(2, 3) if halve else above
    assert torch.equal(below, expected)


def test_the_flow_of_a_layer_of_the_ladder_hears_both_directions():
    layer = LadderLayer(4, 2, flow=Iaf(2, 4, [6], spatial=True))
    h, noise = torch.randn(1, 4, 2, 2), torch.randn(1, 2, 2, 2)
    _, below = layer.up(torch.randn(1, 4, 2, 2))
    base = layer.down(h, noise, below)[1].latent
    moved = layer.down(h, noise, (*below[:2], below[2] + 1))[1].latent
    context = sum(layer.sizes_down[:4])  # where the top-down part of the context begins
    with torch.no_grad():
        layer.down_in.bias[context : context + 4] += 1
    torch.testing.assert_close(layer.down(h, noise, below)[1].latent, moved)  # they are added
    assert (moved != base).any()


def test_binarisation():
    data = pictures(200, seed=5)
    dynamic, threshold = (made(law="bernoulli", binarise=how) for how in ("dynamic", "threshold"))
    drawn = dynamic.observed(data, RowRandom(0, range(200)))
    assert set(drawn.unique().tolist()) == {-1.0, 1.0} == set(threshold.observed(data, None).unique().tolist())
    assert torch.equal(threshold.observed(data, None) > 0, data > 0)
    grey = data > 0.5
    assert 0.7 < float((drawn[grey] > 0).float().mean()) < 0.95
    with pytest.raises(ShapeError, match="black and white"):
        threshold.log_prob(data, NONE, random=RowRandom(0, range(200)))
    cross = made(law="bernoulli")
    assert cross.likelihood.startswith("none") and threshold.likelihood.startswith("lower bound")
    with pytest.raises(ConfigError, match="cross-entropy"):
        cross.log_prob(data, NONE, random=RowRandom(0, range(200)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"binarise": "threshold"}, "law=bernoulli"),
        ({"importance": 2, "beta": 0.5}, "no KL term"),
        ({"architecture": "ladder", "side": 12, "scales": 3}, "multiples of 8"),
        ({"side": 50}, "halved"),
        ({"architecture": "ladder", "prior": "conditional", "labels": 2}, "architecture conv or mlp"),
    ],
)
def test_what_cannot_work_is_said_before_training(options, says):
    with pytest.raises((ConfigError, ShapeError), match=says):
        made(**options)


def test_halvings():
    assert [halvings(s, s) for s in (16, 28, 32, 48, 64, 128)] == [2, 2, 3, 3, 4, 5]
