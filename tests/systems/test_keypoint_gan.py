"""What is given is returned unchanged, and the networks are the published ones."""

import pytest
import torch

from condgen.errors import ConfigError
from condgen.rng import RowRandom, StepRandom
from condgen.systems.keypoint_gan import KeypointGan, as_triples
from condgen.types import Batch, Condition, ConditionSpec, Keypoints, KeypointsSpec, TargetSpec, Text, TextSpec

SPEC = ConditionSpec(text=TextSpec(pooled=7), keypoints=KeypointsSpec(4))


def tiny(**options):
    torch.manual_seed(0)
    options = {"generator_width": 4, "discriminator_width": 4, "noise_dim": 5, **options}
    return KeypointGan(condition=SPEC, target=TargetSpec(3, 16, 16), **options)


def condition(visible=True, rows=6):
    generator = torch.Generator().manual_seed(1)
    text = Text(torch.randn(rows, 7, generator=generator))
    xy = torch.rand(rows, 4, 2, generator=generator)
    mask = torch.rand(rows, 4, generator=generator) < 0.5 if visible == "some" else torch.full((rows, 4), visible)
    return Condition(text=text, keypoints=Keypoints(torch.where(mask[..., None], xy, 0), mask))


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_published_parameter_counts():
    with torch.device("meta"):
        system = KeypointGan(
            condition=ConditionSpec(text=TextSpec(1024), keypoints=KeypointsSpec(15)), target=TargetSpec(3, 128, 128)
        )
    assert count(system.generator) == 2_715_949
    assert count(system.discriminator) == 946_177


def test_everything_given_comes_back_exactly():
    asked = condition()
    done = tiny().eval().complete(asked, random=RowRandom(0, range(6)))
    assert torch.equal(done.xy, asked.keypoints.xy) and done.visible.all()


def test_given_points_are_kept_and_the_others_are_drawn_by_noise_and_words():
    system, asked = tiny().eval(), condition("some")
    given = asked.keypoints.visible
    first, second = (system.complete(asked, random=RowRandom(seed, range(6)), threshold=0.0) for seed in (0, 1))
    assert torch.equal(first.xy[given], asked.keypoints.xy[given]) and first.visible.all()
    assert not torch.equal(first.xy[~given], second.xy[~given])
    told = Condition(text=Text(asked.text.pooled.flip(0)), keypoints=asked.keypoints)
    assert not torch.equal(system.complete(told, random=RowRandom(0, range(6)), threshold=0.0).xy, first.xy)


def test_what_stays_invisible_is_stored_as_zeros():
    done = tiny().eval().complete(condition("some"), random=RowRandom(0, range(6)), threshold=1.0)
    assert torch.equal(done.visible, condition("some").keypoints.visible) and (done.xy[~done.visible] == 0).all()


def test_garbage_in_invisible_points_reaches_nobody():
    asked = condition("some")
    points = asked.keypoints
    dirty = Condition(
        text=asked.text, keypoints=Keypoints(torch.where(points.visible[..., None], points.xy, 0.7), points.visible)
    )
    assert torch.equal(as_triples(dirty), as_triples(asked))
    gone = asked.drop(torch.ones(6, dtype=torch.bool), ["keypoints"])
    assert as_triples(gone).abs().sum() == 0


@pytest.mark.parametrize(("drop", "share"), [(0.9, 0.1), (0.0, 1.0), (1.0, 0.0)])
def test_training_hides_points_from_the_generator(drop, share):
    system, seen = tiny(drop=drop), []
    forward = system.generator.forward
    system.generator.forward = lambda noise, given, c: seen.append(given) or forward(noise, given, c)
    data = Batch(torch.zeros(6, 3, 16, 16), condition())
    for step in range(30):
        system.discriminator_loss(data, StepRandom(step, rows=6))
    kept = (torch.cat(seen)[..., 2] > 0).float().mean().item()
    assert kept == pytest.approx(share, abs=0.06)


def test_both_conditions_are_needed():
    with pytest.raises(ConfigError, match="needs both; the data give text"):
        KeypointGan(condition=SPEC.without(["keypoints"]), target=TargetSpec(3, 16, 16))


def test_a_short_training_learns_where_the_words_put_the_points():
    """Two words, two places: hidden points land nearer to the right place than to the other."""
    places, words = torch.tensor([0.2, 0.8]), torch.eye(2).repeat_interleave(4, dim=1)[:, :7]
    system = tiny(generator_width=16, discriminator_width=16)
    optimizers = [torch.optim.Adam(getattr(system, p.name).parameters(), 2e-3, (0.5, 0.999)) for p in system.phases()]
    for step in range(150):
        random = StepRandom("points", step, rows=32)
        which = torch.randint(2, (32,), generator=random.local)
        xy = places[which][:, None, None] + 0.05 * torch.randn(32, 4, 2, generator=random.local)
        data = Batch(
            torch.zeros(32, 3, 16, 16),
            Condition(text=Text(words[which]), keypoints=Keypoints(xy, torch.ones(32, 4, dtype=torch.bool))),
        )
        for phase, optimizer in zip(system.phases(), optimizers, strict=True):
            optimizer.zero_grad()
            phase.loss(data, random)["loss"].backward()
            optimizer.step()
    which = torch.arange(2).repeat(8)
    asked = Condition(
        text=Text(words[which]), keypoints=Keypoints(torch.zeros(16, 4, 2), torch.zeros(16, 4, dtype=torch.bool))
    )
    done = system.eval().complete(asked, random=RowRandom(0, range(16)), threshold=0.0).xy.mean((1, 2))
    assert ((done - places[which]).abs() < (done - places[1 - which]).abs()).float().mean() > 0.85
