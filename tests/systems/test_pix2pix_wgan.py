"""WGAN-GP as a loss of pix2pix: the published penalty, in float32, of one picture at a time, on fresh batches."""

import pytest
import torch

from condgen.data.base import BatchDataset, RowDataset
from condgen.engine.log import Log
from condgen.engine.run import RunFolder
from condgen.engine.trainer import OptimOptions, Trainer, TrainOptions
from condgen.engine.world import World
from condgen.errors import ConfigError, ShapeError
from condgen.losses.adversarial import fake_loss, generator_loss, gradient_penalty, interpolates, real_loss
from condgen.rng import StepRandom
from condgen.systems.pix2pix import Pix2Pix
from condgen.types import Batch, Condition, ConditionSpec, Image, ImageSpec, Sample, TargetSpec

WGAN = {"loss": "wgan", "gradient_penalty": 10.0, "critic_repeats": 5}


def tiny(side=16, **options):
    torch.manual_seed(0)
    options = {"generator_width": 4, "discriminator_width": 4, "patch": 16, **WGAN, **options}
    return Pix2Pix(condition=ConditionSpec(image=ImageSpec(1, side, side)), target=TargetSpec(3, side, side), **options)


def batch(rows=4, side=16):
    generator = torch.Generator().manual_seed(1)
    source, target = torch.rand(2, rows, 3, side, side, generator=generator) * 2 - 1
    return Batch(target, Condition(image=Image(source[:, :1])))


def draws(rows=4, seed=0):
    return StepRandom(seed, rows=rows)


def test_the_losses_are_the_scores_themselves():
    scores = torch.tensor([[-3.0, 1.0], [5.0, 2.0]])
    assert float(real_loss(scores, "wgan")) == -1.25 and float(fake_loss(scores, "wgan")) == 1.25
    assert float(generator_loss(scores, "wgan")) == -1.25


def test_the_penalty_of_a_plane_is_its_slope_less_one_squared():
    pixels = interpolates(torch.zeros(3, 2, 4, 4), torch.ones(3, 2, 4, 4), torch.rand(3))
    slope = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    penalty = gradient_penalty((pixels * slope).flatten(1).sum(1), pixels)
    torch.testing.assert_close(penalty, (slope.norm() - 1) ** 2)
    (pull,) = torch.autograd.grad(penalty, slope)
    torch.testing.assert_close(pull, 2 * (slope.norm() - 1) * slope / slope.norm())


def test_a_critic_without_slope_costs_one_and_its_gradient_is_finite():
    pixels = interpolates(torch.zeros(2, 3), torch.ones(2, 3), torch.rand(2))
    slope = torch.zeros(3, requires_grad=True)
    penalty = gradient_penalty((pixels * slope).sum(1), pixels)
    penalty.backward()
    assert penalty.item() == 1 and torch.isfinite(slope.grad).all()


def test_mixtures_are_leaves_between_their_own_two_pictures():
    real, fake, share = torch.zeros(3, 2, 4, 4).bfloat16(), torch.ones(3, 2, 4, 4), torch.tensor([0.25, 1.0, 0.0])
    mixed = interpolates(real, fake.requires_grad_(), share)
    assert mixed.is_leaf and mixed.requires_grad and mixed.dtype == torch.float32
    torch.testing.assert_close(mixed.detach()[:, 0, 0, 0], torch.tensor([0.75, 0.0, 1.0]))
    with pytest.raises(ShapeError, match="shares"):
        interpolates(real, fake, share[:, None])
    with pytest.raises(ShapeError, match="one score each"):
        gradient_penalty(mixed.mean(1), mixed)


def test_the_critic_pays_the_gap_and_ten_times_the_penalty():
    losses = tiny().discriminator_loss(batch(), draws())
    expected = losses["real"] + losses["fake"] + 10 * losses["gradient_penalty"]
    torch.testing.assert_close(losses["loss"], expected)


@pytest.mark.parametrize("norm", ["auto", "instance", "none"])
def test_the_penalty_of_a_batch_is_the_mean_of_those_of_its_pictures(norm):
    """Which batch norm in the critic would break: pictures would see each other."""
    system, data, share = tiny(discriminator_norm=norm), batch(), torch.rand(4)
    fake = system.translate(data.condition, draws(), (16, 16)).detach()

    def penalty(rows):
        mixed = interpolates(data.target[rows], fake[rows], share[rows])
        return gradient_penalty(system.discriminator(mixed, data.condition.index(rows)).flatten(1).mean(1), mixed)

    apart = torch.stack([penalty([i]) for i in range(4)])
    torch.testing.assert_close(penalty([0, 1, 2, 3]), apart.mean())
    assert apart.std() > 0


def test_only_the_picture_is_mixed_and_shares_come_from_the_given_random(monkeypatch):
    system, data = tiny(noise="none"), batch()
    seen = []
    system.discriminator.register_forward_hook(lambda module, given, out: seen.append((*given, out)))
    torch.manual_seed(5)
    first = system.discriminator_loss(data, draws())["gradient_penalty"]
    (real, _, _), (fake, _, _), (mixed, condition, _) = seen
    assert condition is data.condition
    share = draws().rand()[:, None, None, None]
    torch.testing.assert_close(mixed.detach(), share * real + (1 - share) * fake)
    torch.manual_seed(6)
    assert torch.equal(system.discriminator_loss(data, draws())["gradient_penalty"], first)
    assert not torch.equal(system.discriminator_loss(data, draws(seed=1))["gradient_penalty"], first)


def test_the_penalty_is_float32_under_autocast():
    system, kinds = tiny(), []
    system.discriminator.register_forward_hook(lambda module, given, out: kinds.append((given[0].dtype, out.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        system.discriminator_loss(batch(), draws())
    assert kinds[0][1] == torch.bfloat16 and kinds[2] == (torch.float32, torch.float32)


def test_the_penalty_trains_the_critic_alone():
    system, data = tiny(), batch()
    system.discriminator_loss(data, draws())["gradient_penalty"].backward()
    assert all(p.grad is None for p in system.generator.parameters())
    assert any(p.grad is not None and p.grad.any() for p in system.discriminator.parameters())


def test_a_trained_critic_measures_the_distance_between_two_pictures():
    """Kantorovich-Rubinstein: with slope s the gap between two points d apart is s d; s d - 10 (s - 1)^2 is largest
    at s = 1 + d / 20."""
    system, one = tiny(discriminator_norm="none"), batch(1)
    real = one.target.expand(8, -1, -1, -1) * 0.2
    data = Batch(real, one.condition.index([0] * 8), shared=real + 0.1)
    optimizer = torch.optim.Adam(system.discriminator.parameters(), 5e-3, betas=(0.0, 0.9))
    for step in range(80):
        losses = system.discriminator_loss(data, draws(8, step))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    distance = (data.shared - real)[0].norm().item()
    gap = -(losses["real"] + losses["fake"]).item()
    assert gap == pytest.approx(distance * (1 + distance / 20), rel=0.1)


def test_a_trained_critic_measures_the_shift_of_a_gaussian():
    """The Wasserstein distance of N(0, I) and N(shift, I) is d = |shift|, and the gap d (1 + d / 20) as above."""
    torch.manual_seed(0)
    shift = torch.tensor([3.0, -4.0, 0.0, 0.0]).view(1, 4, 1, 1)
    critic = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU(),
        torch.nn.Linear(64, 1),
    )  # fmt: skip
    optimizer, gaps = torch.optim.Adam(critic.parameters(), 2e-3, betas=(0.0, 0.9)), []
    for _ in range(400):
        real, fake = torch.randn(256, 4, 1, 1) + shift, torch.randn(256, 4, 1, 1)
        between = interpolates(real, fake, torch.rand(256))
        gap = real_loss(critic(real), "wgan") + fake_loss(critic(fake), "wgan")
        optimizer.zero_grad()
        (gap + 10 * gradient_penalty(critic(between)[:, 0], between)).backward()
        optimizer.step()
        gaps.append(-gap.item())
    assert sum(gaps[-50:]) / 50 == pytest.approx(5 * (1 + 5 / 20), rel=0.05)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"gradient_penalty": 0.0}, "system.gradient_penalty=10"),
        ({"discriminator_norm": "batch"}, "choose instance or none"),
    ],
)
def test_what_has_no_bound_or_no_meaning_is_refused(options, says):
    with pytest.raises(ConfigError, match=says):
        tiny(**options)


class Rows(RowDataset):
    """Forty pictures and their negatives."""

    def __init__(self) -> None:
        self.provides, self.target = ConditionSpec(image=ImageSpec(1, 16, 16)), TargetSpec(3, 16, 16)
        self.pixels = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8)

    def __len__(self) -> int:
        return 40

    def key(self, index: int) -> str:
        return str(index)

    def sample(self, index: int, random: torch.Generator | None) -> Sample:
        return Sample(str(index), self.pixels[index], image=255 - self.pixels[index, :1])


def test_each_repeat_has_a_fresh_batch_and_the_fakes_of_that_batch(tmp_path):
    system, seen = tiny(noise="none", norm="instance"), {"discriminator": [], "generator": []}
    for name, log in seen.items():
        method = getattr(system, f"{name}_loss")

        def watched(data, random, log=log, method=method):
            with torch.no_grad():
                log.append((data.keys, torch.equal(data.shared, system.shared(data, random))))
            return method(data, random)

        setattr(system, f"{name}_loss", watched)
    run = RunFolder(tmp_path)
    rows = BatchDataset(Rows(), Rows().provides, batch_size=4, seed=1)
    options = TrainOptions(steps=2, batch_size=4, seed=1, checkpoint_every=0)
    optim = {"default": OptimOptions(lr=1e-4, betas=(0.0, 0.9))}
    Trainer(system, rows, lambda b: b, optim, options, World(), run, Log(run, quiet=True)).train()
    critic, generator = seen["discriminator"], seen["generator"]
    assert len(critic) == 10 and len(generator) == 2
    assert len({key for keys, _ in critic for key in keys}) == 40  # one pass over the rows: none was used twice
    assert all(same for _, same in critic + generator)
    assert [keys for keys, _ in generator] == [critic[0][0], critic[5][0]]
