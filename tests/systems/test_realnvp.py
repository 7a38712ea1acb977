"""Real NVP's likelihood is the one it claims, its networks are the published ones, and its noise is a latent."""

import math

import pytest
import torch

from condgen.errors import ShapeError
from condgen.nn.coupling import Coupling
from condgen.nn.flow import from_logits
from condgen.pixels import pixels_to_float, pixels_to_uint8
from condgen.rng import RowRandom, StepRandom
from condgen.systems.base import HasLatent, HasLikelihood
from condgen.systems.realnvp import RealNvp
from condgen.types import Batch, Condition, ConditionSpec, Image, ImageSpec, LabelSpec, TargetSpec

EVERYTHING = ConditionSpec(label=LabelSpec(3), image=ImageSpec(1, 8, 8))


def tiny(side=8, channels=3, condition=None, **options):
    torch.manual_seed(0)
    options = {"scales": 2, "width": 4, "blocks": 1, **options}
    return RealNvp(condition=condition or ConditionSpec(), target=TargetSpec(channels, side, side), **options)


def pictures(rows=4, side=8, channels=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    return pixels_to_float(torch.randint(0, 256, (rows, channels, side, side), generator=g, dtype=torch.uint8))


def asked(rows=4):
    maps = torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    return Condition(label=torch.arange(rows) % 3, image=Image(maps))


def identity(**options):
    """The logit map alone."""
    system = tiny(norm="none", start="identity", **options)
    assert not any(module.factor.any() for module in system.modules() if isinstance(module, Coupling))
    return system.eval()


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_published_cifar_10_network():
    """The public re-implementation (chrischute/real-nvp) has 19,631,640 parameters. It has no norm between couplings,
    and where this has one factor per channel it has two numbers.
    """
    with torch.device("meta"):
        options = {"scales": 2, "width": 64, "blocks": 8, "net_norm": "batch"}
        system = RealNvp(condition=ConditionSpec(), target=TargetSpec(3, 32, 32), norm="none", **options)
        factors = sum(p.numel() for n, p in system.named_parameters() if n.endswith(".factor"))
        assert count(system) + factors == 19_631_640
        normed = RealNvp(condition=ConditionSpec(), target=TargetSpec(3, 32, 32), norm="batch", **options)
    assert count(normed) == count(system)  # batch norm of the flow has no parameters, as published
    assert [len(stage) for stage in (*system.flow.flow.spatial, *system.flow.flow.deep)] == [3, 4, 3]


@pytest.mark.parametrize(
    ("side", "asked_for", "scales"), [(32, 0, 4), (64, 0, 5), (32, 2, 2), (28, 0, 3), (48, 0, 4), (8, 0, 2), (2, 0, 2)]
)
def test_scales_until_the_side_is_four_pixels(side, asked_for, scales):
    with torch.device("meta"):
        system = RealNvp(
            condition=ConditionSpec(), target=TargetSpec(1, side, side), scales=asked_for, width=1, blocks=0
        )
    assert system.flow.flow.scales == scales


@pytest.mark.parametrize(
    ("target", "options", "says"),
    [
        (TargetSpec(3, 9, 8), {}, "data.size to a multiple of 4"),
        (TargetSpec(3, 12, 12), {"scales": 4}, "system.scales of at most 3"),
        (TargetSpec(3, 8, 8, frames=2), {}, "clips of 2 frames"),
    ],
)
def test_what_cannot_work_is_said_before_training(target, options, says):
    with pytest.raises(ShapeError, match=says):
        RealNvp(condition=ConditionSpec(), target=target, **options)


def test_it_says_what_its_likelihood_is():
    system = tiny()
    assert isinstance(system, HasLikelihood) and isinstance(system, HasLatent)
    assert (system.likelihood, system.dequantisation) == ("lower bound (uniform dequantisation)", "uniform")


def test_log_prob_without_couplings_is_that_of_a_normal_law_of_logits():
    """By hand, one value after another."""
    system, x = identity(side=2, channels=1), pictures(2, 2, 1)
    u = RowRandom(4, [0, 1]).rand(1, 2, 2)
    expected = []
    for row in range(2):
        total = 0.0
        for k, noise in zip(x[row].add(1).mul(127.5).round().flatten().tolist(), u[row].flatten().tolist()):
            p = 0.05 + 0.9 * (k + noise) / 256
            y = math.log(p / (1 - p))
            total += -0.5 * (y * y + math.log(2 * math.pi)) + math.log(0.9 / (p * (1 - p))) - math.log(256)
        expected.append(total)
    given = system.log_prob(x, Condition(), random=RowRandom(4, [0, 1]))
    torch.testing.assert_close(given, torch.tensor(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("told", [None, 1])
def test_probabilities_of_all_pictures_sum_to_the_mass_inside_the_pixel_range(told):
    """4 pixels: the mean of 256 ** 4 exp(log_prob) over random pictures, against the mass that the flow puts on them.

    Samples outside of [0, 1] are clipped when shown, so their share is missing from the sum, which is below 1.
    Alone, and under a condition of a vector and a map.
    """
    system, rows = tiny(side=2, channels=1, condition=None if told is None else EVERYTHING).eval(), 60_000
    one = Condition() if told is None else asked(2).index([told] * rows)
    for module in system.modules():
        if isinstance(module, Coupling):
            module.factor.data.normal_(0, 0.3)
    with torch.no_grad():
        drawn = StepRandom("pictures", rows=rows).randint(256, 1, 2, 2)
        weight = system.log_prob(pixels_to_float(drawn.to(torch.uint8)), one, random=StepRandom(0, rows=rows))
        total = (weight.double() + 4 * math.log(256)).exp()
        unit = from_logits(system.flow.inverse(StepRandom(1, rows=rows).randn(1, 2, 2), one))
        inside = ((unit >= 0) & (unit <= 1)).flatten(1).all(1).double().mean()
    error = float(total.std()) / math.sqrt(rows)
    assert 0.1 < inside < 0.999999 and error < 0.01
    assert abs(float(total.mean() - inside)) < 4 * error + 0.01


def test_more_draws_tighten_the_bound():
    system, x = tiny(norm="none").eval(), pictures(8)
    with torch.no_grad():
        draws = torch.stack([system.log_prob(x, Condition(), random=StepRandom(i, rows=8)) for i in range(64)])
    bounds = [
        float((draws.view(-1, k, 8).logsumexp(1) - math.log(k)).mean()) for k in (1, 4, 16, 64)
    ]  # the same draws in larger groups: never lower, by Jensen's inequality
    assert bounds == sorted(bounds) and bounds[-1] > bounds[0] + 1e-3


def test_the_loss_is_the_mean_of_log_prob_in_bits_per_dimension():
    system, x = tiny(condition=EVERYTHING).eval(), pictures()
    losses = system.nll_loss(Batch(x, asked()), StepRandom(3, rows=4))
    expected = -system.log_prob(x, asked(), random=StepRandom(3, rows=4)).mean() / (3 * 64 * math.log(2))
    torch.testing.assert_close(losses["loss"], expected)
    assert torch.equal(losses["loss"], losses["bits_per_dim"])


def test_the_penalty_is_the_released_one():
    """Against nats per picture: squares of weight norm's gains and of the factors, nothing else."""
    plain, system, data = tiny(), tiny(scale_l2=0.01), Batch(pictures(), Condition())
    for module in [*plain.modules(), *system.modules()]:
        if isinstance(module, Coupling):
            module.factor.data.fill_(0.5)  # 0 at first
    base, losses = plain.nll_loss(data, StepRandom(0, rows=4)), system.nll_loss(data, StepRandom(0, rows=4))
    named = [p for n, p in system.named_parameters() if n.split(".")[-1] in ("gain", "factor")]
    assert sum(p.dim() == 4 for p in named) == 10 * 6 and sum(p.dim() == 3 for p in named) == 10
    squares = sum(float(p.detach().square().sum()) for p in named)
    assert float(losses["l2"].detach()) == pytest.approx(squares, rel=1e-5)
    extra = float((losses["loss"] - base["loss"]).detach()) * 3 * 64 * math.log(2)
    assert extra == pytest.approx(0.01 * squares, rel=1e-3)


def test_noise_is_drawn_from_what_is_given_in_training_and_in_evaluation():
    system, x = tiny(), pictures()
    for mode in (system.train(), system.eval()):
        one, same, other = (mode.log_prob(x, Condition(), random=StepRandom(s, rows=4)) for s in (0, 0, 1))
        assert torch.equal(one, same) and not torch.equal(one, other)
    alone = system.log_prob(x[2:3], Condition(), random=RowRandom(0, [2]))
    among = system.log_prob(x, Condition(), random=RowRandom(0, range(4)))
    torch.testing.assert_close(alone[0], among[2], atol=1e-3, rtol=0)


@pytest.mark.parametrize("norm", ["actnorm", "batch"])
def test_encode_and_decode_are_inverse(norm):
    system, x = tiny(condition=EVERYTHING, norm=norm), pictures()
    system.train().nll_loss(Batch(x, asked()), StepRandom(0, rows=4))
    system.eval()
    with torch.no_grad():
        latent = system.encode(x, asked())
        torch.testing.assert_close(system.decode(latent, asked()), x, atol=1e-4, rtol=0)
        drawn = system.sample(asked(), random=RowRandom(0, range(4)))
        again = system.decode(system.encode(pixels_to_float(pixels_to_uint8(drawn)), asked()), asked())
    assert torch.equal(pixels_to_uint8(again), pixels_to_uint8(drawn))
    with pytest.raises(ShapeError, match="this system takes"):
        system.decode(latent[:, :1], asked())


def test_temperature_scales_the_noise():
    assert tiny().sample_fields == {} and tiny(temperature=0.7).sample_fields == {"temperature": "0.7"}
    system = tiny().eval()
    noise = RowRandom(0, range(4)).randn(3, 8, 8)
    with torch.no_grad():
        for given, scale in ((None, 1.0), (0.7, 0.7), (0.0, 0.0)):
            drawn = system.sample(Condition(), random=RowRandom(0, range(4)), temperature=given)
            torch.testing.assert_close(drawn, system.decode(scale * noise, Condition()))
        assert torch.equal(
            tiny(temperature=0.0).eval().sample(Condition(), random=RowRandom(0, [0])),
            system.sample(Condition(), random=RowRandom(9, [3]), temperature=0.0),
        )


@pytest.mark.parametrize("field", ["label", "image"])
def test_the_likelihood_depends_on_each_condition(field):
    system, x = tiny(condition=EVERYTHING).eval(), pictures()
    moved = asked().index([1, 2, 0, 1])
    other = Condition(**{f: getattr(moved if f == field else asked(), f) for f in ("label", "image")})
    base = system.log_prob(x, asked(), random=StepRandom(0, rows=4))
    assert ((system.log_prob(x, other, random=StepRandom(0, rows=4)) - base).abs() > 0).all()


def test_fields_enter_as_vectors_and_pictures_as_maps():
    assert tiny(condition=EVERYTHING).flow.stack.widths["vector"] == 3
    assert tiny(condition=EVERYTHING).flow.stack.widths["map"] == 1


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "batch", "net_norm": "batch"}, {"norm": "batch", "batch_lag": 0.9, "affine": "paper"},
        {"norm": "none", "start": "identity"}, {"scale_l2": 5e-5, "scales": 1},
    ],
)  # fmt: skip
def test_every_option_learns(options):
    """Eight pictures of one colour each: far below 8 bits after a few steps."""
    system = tiny(condition=EVERYTHING, **options).train()
    data = Batch(pictures(8)[:, :, :1, :1].expand(-1, -1, 8, 8).contiguous(), asked(8))
    adam, seen = torch.optim.Adam(system.parameters(), 5e-3), []
    for step in range(30):
        adam.zero_grad()
        losses = system.nll_loss(data, StepRandom(step, rows=8))
        losses["loss"].backward()
        adam.step()
        seen.append(float(losses["bits_per_dim"].detach()))
    assert all(map(math.isfinite, seen)) and seen[-1] < seen[0] - 0.5


def test_losses_stay_float32_under_autocast_and_close_to_float32():
    system, data = tiny(condition=EVERYTHING), Batch(pictures(), asked())
    system.train().nll_loss(data, StepRandom(0, rows=4))
    exact = system.nll_loss(data, StepRandom(0, rows=4))["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = system.nll_loss(data, StepRandom(0, rows=4))["loss"]
    assert narrow.dtype == torch.float32 and 0 < abs(float((narrow - exact).detach())) < 0.02


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_sixteen_pictures_of_noise_are_learned_by_heart():
    """8 bits to begin with; under 2 at the end, on fresh dequantisation noise."""
    system, data, steps = tiny(channels=1, width=32), Batch(pictures(16, channels=1)), 1500
    optimizer = torch.optim.Adam(system.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        losses = system.nll_loss(data, StepRandom(step, rows=16))
        optimizer.zero_grad()
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(system.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        nats = -system.eval().log_prob(data.target, Condition(), random=RowRandom(7, range(16))).mean().item()
    assert nats / 64 / math.log(2) < 2
