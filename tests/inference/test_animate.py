"""Going on from a picture: the trained length is the plain sample; what follows knows the newest frames alone."""

import pytest
import torch

from condgen.errors import ConfigError, ShapeError
from condgen.inference.animate import animate, given_frames
from condgen.inference.sample import sample_rows, sample_streams
from condgen.systems.base import System
from condgen.systems.vgan import Vgan
from condgen.systems.vpn import Vpn
from condgen.types import Condition, ConditionSpec, Frames, FramesSpec, Image, ImageSpec, LabelSpec, TargetSpec


class Counts(System):
    """Frame t of its clip is the last given value + step (t + 1), or + step t where clips start with what is given."""

    consumes = ("temporal", "vector", "map")
    makes = "clips"

    def __init__(self, *, condition, target, overlap=False):
        super().__init__(condition=condition, target=target)
        self.overlap, self.asked = overlap, []

    def phases(self):
        return []

    def sample(self, condition, *, random):
        given = condition.frames.pixels if condition.frames is not None else condition.image.pixels[:, None]
        self.asked.append((condition, random.seed))
        past = given.shape[1]
        ahead = torch.arange(self.target_spec.frames) + (1 - past if self.overlap else 1)
        return given[:, -1:] + 0.01 * ahead.view(-1, 1, 1, 1)


def counts(past=1, overlap=False, field="frames"):
    spec = {"frames": FramesSpec(past, 1, 2, 2)} if field == "frames" else {"image": ImageSpec(1, 2, 2)}
    return Counts(condition=ConditionSpec(label=LabelSpec(2), **spec), target=TargetSpec(1, 2, 2, 4), overlap=overlap)


def start(past=1, rows=2, field="frames"):
    pixels = (torch.arange(past) - past + 1).view(1, past, 1, 1, 1) * 0.01 + torch.zeros(rows, past, 1, 2, 2)
    label = torch.arange(rows) % 2
    if field == "image":
        return Condition(label=label, image=Image(pixels[:, 0]))
    return Condition(label=label, frames=Frames(pixels, torch.ones(rows, past, dtype=torch.bool)))


@pytest.mark.parametrize("frames", [1, 3, 4, 5, 11])
@pytest.mark.parametrize(
    ("past", "overlap", "field"),
    [(1, True, "frames"), (1, False, "frames"), (3, True, "frames"), (3, False, "frames"), (1, True, "image")],
)  # fmt: skip
def test_parts_join_without_a_step(frames, past, overlap, field):
    system = counts(past, overlap, field)
    made = animate(system, start(past, field=field), frames, overlap=overlap)
    assert made.shape == (2, frames, 1, 2, 2)
    first = 1 - past if overlap else 1
    torch.testing.assert_close(made[0, :, 0, 0, 0], 0.01 * torch.arange(first, first + frames).float())
    for condition, _ in system.asked:
        assert torch.equal(condition.label, torch.tensor([0, 1]))  # other fields stay
    seeds = [seed for _, seed in system.asked]
    assert seeds[0] == 0 and len(set(seeds)) == len(seeds)  # other noise for each part


def test_the_first_trained_length_is_the_plain_sample():
    torch.manual_seed(0)
    spec = ConditionSpec(frames=FramesSpec(1, 3, 8, 8))
    system = Vgan(condition=spec, target=TargetSpec(3, 8, 8, 4), generator_width=2, discriminator_width=2, noise_dim=3)
    asked = Condition(frames=Frames(torch.rand(2, 1, 3, 8, 8), torch.ones(2, 1, dtype=torch.bool)))
    long = animate(system, asked, 9, overlap=True, seed=5)
    assert torch.equal(long[:, :4], sample_rows(system, asked, seed=5, ids=[0, 1]))
    assert torch.equal(long[1:], animate(system, asked.index([1]), 9, overlap=True, seed=5, ids=[1]))
    parts = sample_streams(system, asked, seed=5, ids=[0, 1], batch_size=1)
    torch.testing.assert_close(parts["video"], long[:, :4], atol=1e-6, rtol=0)
    assert {n: p.shape[2] for n, p in parts.items()} == {"video": 3, "foreground": 3, "mask": 1, "background": 3}


@pytest.mark.parametrize("output", ["softmax", "sigmoid"])
def test_a_system_with_a_memory_goes_on_with_it(output):
    torch.manual_seed(0)
    spec = ConditionSpec(frames=FramesSpec(2, 1, 4, 4))
    sizes = {"width": 3, "encoder_blocks": 1, "decoder_blocks": 1, "hidden": 4}
    system = Vpn(condition=spec, target=TargetSpec(1, 4, 4, 2), output=output, **sizes)
    for parameter in system.parameters():
        parameter.data.add_(torch.randn_like(parameter))  # far from the even probabilities of a start
    asked = Condition(frames=Frames(torch.rand(3, 2, 1, 4, 4) * 2 - 1, torch.ones(3, 2, dtype=torch.bool)))
    short = sample_rows(system, asked, seed=5, ids=[0, 1, 2])
    long = animate(system, asked, 7, overlap=False, seed=5)
    assert long.shape == (3, 7, 1, 4, 4) and torch.equal(long[:, :2], short)
    assert torch.equal(long, sample_rows(system, asked, seed=5, ids=[0, 1, 2], batch_size=1, length=7))
    assert torch.equal(animate(system, asked, 1, overlap=False, seed=5), short[:, :1])
    # what came before the newest two frames is still known: a new start from those two goes on otherwise
    other = animate(system, asked, 7, overlap=False, seed=5, temperature=0.0)
    newest = Condition(frames=Frames(other[:, 2:4], asked.frames.mask))
    assert not torch.equal(animate(system, newest, 3, overlap=False, seed=5, temperature=0.0), other[:, 4:])
    assert torch.equal(other, animate(system, asked, 7, overlap=False, seed=6, temperature=0.0))
    assert torch.equal(sample_rows(system, asked.index([]), seed=0, ids=[], length=7), torch.empty(0, 7, 1, 4, 4))
    with pytest.raises(ConfigError, match="length=7"):
        sample_rows(counts(), start(), seed=0, ids=[0, 1], length=7)


def test_what_cannot_be_animated_is_said():
    with pytest.raises(ShapeError, match="needs frames or an image"):
        given_frames(Condition(label=torch.tensor([0])))
    with pytest.raises(ConfigError, match="at least 1"):
        animate(counts(), start(), 0, overlap=False)
    pictures = Counts(condition=ConditionSpec(), target=TargetSpec(1, 2, 2))
    with pytest.raises(ConfigError, match="makes pictures"):
        animate(pictures, start(), 2, overlap=False)
    grey = counts()
    grey.target_spec = TargetSpec(3, 2, 2, 4)
    with pytest.raises(ConfigError, match="ask for at most 4 frames"):
        animate(grey, start(), 5, overlap=False)
    moved = start()
    moved = Condition(frames=Frames(moved.frames.pixels, moved.frames.mask, torch.zeros(2, 1, 2)))
    with pytest.raises(ConfigError, match="actions"):
        animate(counts(), moved, 5, overlap=False)
