"""Walks, sums and projection: ends, lengths, speed, and what the text of a sum means."""

import math

import pytest
import torch

from condgen.errors import ConfigError, ShapeError
from condgen.inference import latent
from condgen.inference.latent import lerp, neighbours, path, project, slerp, weighted_sum
from condgen.inference.terms import parse_sum, parse_walk
from condgen.rng import RowRandom, derive
from condgen.systems.acgan import AcGan
from condgen.types import Condition, ConditionSpec, LabelSpec, TargetSpec

T = torch.linspace(0, 1, 9)


def two(width=40, seed=0):
    return torch.randn(2, width, generator=torch.Generator().manual_seed(seed))


def angles(points):
    unit = points.double() / points.double().norm(dim=1, keepdim=True)
    return torch.acos((unit[:-1] * unit[1:]).sum(1).clamp(-1, 1))


def test_slerp_keeps_ends_length_and_speed():
    a, b = two()
    b = b / b.norm() * a.norm()
    points = slerp(a, b, T)
    assert torch.equal(points[0], a) and torch.equal(points[-1], b)
    torch.testing.assert_close(points.norm(dim=1), a.norm().expand(9))
    steps = angles(points)
    torch.testing.assert_close(steps, steps.mean().expand(8), rtol=1e-4, atol=0)
    assert lerp(a, b, T)[4].norm() < 0.8 * a.norm()  # what slerp is there to avoid


def test_slerp_stays_in_the_plane_of_its_ends_and_between_their_lengths():
    a, b = two()
    points = slerp(a, 3 * b, T)
    assert torch.linalg.matrix_rank(torch.cat([points, two()]), rtol=1e-4) == 2
    torch.testing.assert_close(points.norm(dim=1), torch.lerp(a.norm(), 3 * b.norm(), T))


def test_slerp_of_parallel_opposite_and_zero_vectors_is_finite():
    a, _ = two()
    torch.testing.assert_close(slerp(a, 2 * a, T), a * (1 + T[:, None]))
    half = slerp(a, -a, T)
    torch.testing.assert_close(half.norm(dim=1), a.norm().expand(9))
    torch.testing.assert_close(angles(half), torch.full((8,), math.pi / 8).double(), rtol=1e-3, atol=0)
    torch.testing.assert_close(slerp(torch.zeros(40), a, T), T[:, None] * a)


def test_a_path_goes_through_every_stop_once():
    stops = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    walked = path(stops, 5)
    assert walked.shape == (11, 12) and torch.equal(walked[[0, 5, 10]], stops)
    straight = path(stops, 5, noise="uniform")
    torch.testing.assert_close(straight.diff(dim=0)[:5], ((stops[1] - stops[0]) / 5).expand(5, -1))
    assert not torch.allclose(straight, walked)
    with pytest.raises(ConfigError, match="2 stops"):
        path(stops[:1], 5)


def test_sums_are_plain_where_the_signs_add_up_to_one_and_means_otherwise():
    a, b, c = torch.eye(3)
    assert weighted_sum(torch.stack([a, b, c]), [1, -1, 1]).tolist() == [1, -1, 1]
    assert weighted_sum(torch.stack([a, b]), [1, 1]).tolist() == [0.5, 0.5, 0]
    with pytest.raises(ConfigError, match="direction"):
        weighted_sum(torch.stack([a, b]), [1, -1])


def test_neighbours_begin_with_the_sum_and_stay_within_a_quarter():
    z = torch.randn(50, generator=torch.Generator().manual_seed(2))
    found = neighbours(z, 9, seed=0)
    assert torch.equal(found[0], z) and torch.equal(found, neighbours(z, 9, seed=0))
    moved = (found[1:] - z).abs()
    assert 0.24 < moved.max() <= 0.25 + 1e-6 and moved.mean() == pytest.approx(0.125, abs=0.02)


# what is written


def test_a_sum_is_read_with_its_signs():
    terms = parse_sum("s12, s40,s7 - s3 + a-b.png")
    assert [t.sign for t in terms] == [1, -1, 1] and [t.kind for t in terms] == ["samples", "samples", "picture"]
    assert [t.ids for t in terms] == [(12, 40, 7), (3,), ()]
    names = parse_sum("animals-nature - T-shirt/top + Ankle boot + s1", ["s1"])
    assert [t.text for t in names] == ["animals-nature", "T-shirt/top", "Ankle boot", "s1"]
    assert [t.kind for t in names] == ["named"] * 4 and [t.sign for t in names] == [1, -1, 1, 1]
    assert [t.sign for t in parse_sum("- Bag + Coat + 3")] == [-1, 1, 1]


def test_a_walk_is_read_with_its_noise():
    assert [t.text for t in parse_walk("cat..dog .. cat")] == ["cat", "dog", "cat"]
    assert [(t.text, t.ids) for t in parse_walk("cat@s3 .. big dog@s7,s8")] == [("cat", (3,)), ("big dog", (7, 8))]
    assert [t.text for t in parse_walk("../a.png .. ../b/../c.jpg")] == ["../a.png", "../b/../c.jpg"]
    assert [t.kind for t in parse_walk("s1..s5")] == ["samples", "samples"]


@pytest.mark.parametrize(
    ("read", "text", "says"),
    [
        (parse_sum, "", "a term is missing"),
        (parse_sum, "A - - B", "a term is missing"),
        (parse_sum, "A -", "a term is missing"),
        (parse_sum, "A-B", "spaces around"),
        (parse_sum, "A - s3", "Use one kind"),
        (parse_sum, "A@s3 - B + C", "belongs to --walk"),
        (parse_walk, "cat", "two stops"),
        (parse_walk, "cat ..", "two stops"),
        (parse_walk, "cat@s1 .. dog", "name their noise"),
        (parse_walk, "cat@s1 .. s3", "mixes labels"),
        (parse_walk, "@s1 .. s3", "label is missing"),
    ],
)
def test_what_cannot_be_read_says_how_to_write_it(read, text, says):
    with pytest.raises(ConfigError, match=says):
        read(text)


# pictures


def system(noise="normal"):
    torch.manual_seed(0)
    made = AcGan(
        condition=ConditionSpec(label=LabelSpec(3)), target=TargetSpec(3, 16, 16), generator_width=0.1,
        discriminator_width=0.1, noise_dim=5, noise=noise,
    )  # fmt: skip
    for layer in made.generator.modules():  # fresh weights are so small that every picture is grey
        if isinstance(layer, torch.nn.Linear | torch.nn.ConvTranspose2d):
            torch.nn.init.normal_(layer.weight, std=0.1)
    return made


@pytest.mark.parametrize("noise", ["normal", "uniform"])
def test_projection_finds_the_noise_of_a_picture_that_the_system_can_make(noise):
    made, label = system(noise).eval(), Condition(label=torch.tensor([1, 2]))
    z = made.draw(RowRandom(5, [0, 1]))
    with torch.no_grad():
        pictures = made.decode(z, label)
        far = made.decode(made.draw(RowRandom(6, [0, 1])), label)
    made.train()
    before = [p.clone() for p in made.parameters()]
    found = project(made, pictures, label, steps=150, lr=0.1)
    assert (found.error < 0.2 * (far - pictures).square().flatten(1).mean(1).sqrt()).all()
    if noise == "uniform":
        assert found.latent.abs().max() <= 1
    assert made.training and all(torch.equal(a, b) for a, b in zip(before, made.parameters(), strict=True))
    assert not any(p.grad is not None for p in made.parameters())
    with pytest.raises(ShapeError, match="16, 16"):
        project(made, pictures[..., :8], label)


def test_projection_keeps_the_best_of_its_four_starts():
    made, label = system().eval(), Condition(label=torch.tensor([0, 1]))
    with torch.no_grad():
        pictures = made.decode(made.draw(RowRandom(5, [0, 1])), label)
        starts = latent.draw(made, range(8), seed=derive(3, "projection"))
        errors = (made.decode(starts, label.repeat(4)) - pictures.repeat_interleave(4, 0)).square().flatten(1).mean(1)
    found = project(made, pictures, label, seed=3, steps=1, lr=1e-6)
    torch.testing.assert_close(found.error, errors.view(2, 4).amin(1).sqrt(), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.latent, starts.view(2, 4, 5)[range(2), errors.view(2, 4).argmin(1)])


def test_draw_is_the_noise_of_a_sample():
    made, label = system().eval(), Condition(label=torch.tensor([1, 2]))
    with torch.no_grad():
        drawn = made.decode(latent.draw(made, [4, 9], seed=3), label)
        torch.testing.assert_close(drawn, made.sample(label, random=RowRandom(3, [4, 9])))
