"""VGAN: published sizes, the algebra of its streams, what each loss sees, and the model of a frame's future."""

import pytest
import torch
from torch.nn import functional as F

from condgen.engine.sample import sample_rows
from condgen.errors import ConfigError, ShapeError
from condgen.nn.vgan_nets import Size, compose
from condgen.rng import RowRandom, StepRandom
from condgen.systems.vgan import Vgan
from condgen.types import (
    Batch,
    Condition,
    ConditionSpec,
    Frames,
    FramesSpec,
    Image,
    ImageSpec,
    LabelSpec,
    TargetSpec,
    Text,
    TextSpec,
)

PUBLISHED = TargetSpec(3, 64, 64, 32)
SMALL = TargetSpec(3, 16, 16, 8)
FRAME = ConditionSpec(frames=FramesSpec(1, 3, 16, 16))
TINY = {"generator_width": 4, "discriminator_width": 4}


def count(module):
    return sum(p.numel() for p in module.parameters())


def small(condition=ConditionSpec(), target=SMALL, **options):
    torch.manual_seed(0)
    return Vgan(condition=condition, target=target, **{**TINY, **options})


def frame(rows=2, side=16):
    pixels = torch.rand(rows, 1, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return Condition(frames=Frames(pixels, torch.ones(rows, 1, dtype=torch.bool)))


def clips(rows=2, target=SMALL):
    return torch.rand(rows, *target.shape, generator=torch.Generator().manual_seed(2)) * 2 - 1


def sharpen(system):
    """Untrained weights are so small that everything is nearly grey: let the streams say something."""
    with torch.no_grad():
        for parameter in system.generator.parameters():
            if parameter.dim() > 1:
                parameter.mul_(20)
    return system


# sizes


@pytest.fixture
def unfilled(monkeypatch):
    """Sizes need no random weights."""
    monkeypatch.setattr("condgen.systems.vgan.initialise", lambda module: None)
    with torch.device("meta"):
        yield


def test_the_unconditional_networks_have_the_published_parameters(unfilled):
    system = Vgan(condition=ConditionSpec(), target=PUBLISHED)
    assert count(system.generator) == 16_245_383 and count(system.discriminator) == 11_057_858
    assert count(system.generator.moving) == 12_667_716 and count(system.generator.still) == 3_577_667


@pytest.mark.parametrize("spec", [{"frames": FramesSpec(1, 3, 64, 64)}, {"image": ImageSpec(3, 64, 64)}])
def test_the_networks_for_a_frame_have_the_published_parameters(spec, unfilled):
    system = Vgan(condition=ConditionSpec(**spec), target=PUBLISHED)
    generator = system.generator
    assert count(generator) == 68_216_455 and count(system.discriminator) == 44_135_810
    assert [count(p) for p in (generator.encoder, generator.still, generator.moving)] == [
        11_021_696,
        11_018_883,
        46_175_876,
    ]


def test_the_layers_have_the_published_shapes():
    seen = {}
    system = Vgan(condition=ConditionSpec(), target=PUBLISHED, generator_width=8, discriminator_width=4)

    def note(name):
        return lambda module, given, made: seen.setdefault(name, []).append(tuple(made.shape[1:]))

    for name, body in (("moving", system.generator.moving.body), ("critic", system.discriminator.trunk.body)):
        for layer in body:
            if "Conv" in type(layer).__name__:
                layer.register_forward_hook(note(name))
    made = system.generator(Condition(), torch.randn(1, 100))
    system.discriminator(made.video, Condition())
    assert seen["moving"] == [(64, 2, 4, 4), (32, 4, 8, 8), (16, 8, 16, 16), (8, 16, 32, 32)]
    assert seen["critic"] == [(4, 16, 32, 32), (8, 8, 16, 16), (16, 4, 8, 8), (32, 2, 4, 4)]
    assert made.video.shape == made.foreground.shape == (1, 3, 32, 64, 64)
    assert made.mask.shape == (1, 1, 32, 64, 64) and made.background.shape == (1, 3, 1, 64, 64)


@pytest.mark.parametrize(
    ("side", "frames", "size"),
    [(64, 32, (4, 2, 4)), (32, 8, (3, 1, 3)), (32, 16, (3, 2, 3)), (32, 10, (3, 5, 1)), (16, 7, (2, 7, 0)),
     (8, 2, (1, 1, 1))],
)  # fmt: skip
@pytest.mark.parametrize("condition", [ConditionSpec(), None])
def test_any_number_of_frames_comes_out(side, frames, size, condition):
    assert Size.of(side, frames) == size
    target = TargetSpec(3, side, side, frames)
    system = small(condition or ConditionSpec(frames=FramesSpec(1, 3, side, side)), target)
    made = sample_rows(system, Condition() if condition else frame(side=side), seed=0, ids=[0, 1])
    assert made.shape == (2, *target.shape)
    assert system.features(made).shape == (2, 4 << (size[0] - 1), size[1], 4, 4)
    assert system.discriminator(made.transpose(1, 2), Condition()).shape == (2,)


def test_weights_start_as_released():
    system = Vgan(condition=ConditionSpec(), target=TargetSpec(3, 32, 32, 8))
    assert abs(system.generator.moving.body[3].weight.std().item() - 0.01) < 2e-4
    assert system.discriminator.judge.bias.abs().max() == 0
    mask = system.eval().streams(Condition(), random=RowRandom(0, [0]))["mask"]
    assert mask.abs().max() < 0.02  # m = 0.5: gradient reaches both streams from the start


# algebra


def test_a_mask_of_one_is_the_foreground_and_of_zero_the_background():
    f, b = torch.rand(2, 3, 4, 8, 8), torch.rand(2, 3, 1, 8, 8)
    assert torch.equal(compose(f, torch.ones(2, 1, 4, 8, 8), b), f)
    still = compose(f, torch.zeros(2, 1, 4, 8, 8), b)
    assert torch.equal(still, b.expand_as(f))


@pytest.mark.parametrize(("bias", "name"), [(40.0, "foreground"), (-40.0, "background")])
def test_the_network_itself_obeys_its_mask(bias, name):
    system = sharpen(small()).eval()
    torch.nn.init.zeros_(system.generator.moving.mask.weight)
    torch.nn.init.constant_(system.generator.moving.mask.bias, bias)
    found = system.streams(Condition(), random=RowRandom(0, [0, 1]))
    torch.testing.assert_close(found["video"], found[name], atol=1e-6, rtol=0)
    if name == "background":
        assert torch.equal(found["video"][:, 1:], found["video"][:, :-1])
    assert not torch.allclose(found["foreground"], found["background"])


def test_the_gradient_of_the_background_is_one_minus_the_mask_over_time():
    f, m = torch.rand(1, 3, 5, 4, 4), torch.rand(1, 1, 5, 4, 4)
    b = torch.rand(1, 3, 1, 4, 4, requires_grad=True)
    compose(f, m, b).sum().backward()
    torch.testing.assert_close(b.grad, (1 - m).sum(2, keepdim=True).expand_as(b))


def test_the_streams_put_together_are_the_sample():
    system = sharpen(small()).eval()
    found = system.streams(Condition(), random=RowRandom(3, [0, 1]))
    mask = (found["mask"] + 1) / 2
    again = mask * found["foreground"] + (1 - mask) * found["background"]
    torch.testing.assert_close(again, found["video"])
    assert torch.equal(found["video"], system.sample(Condition(), random=RowRandom(3, [0, 1])))
    assert found["mask"].shape == (2, 8, 1, 16, 16)


def test_one_stream_is_the_foreground_alone():
    system = small(streams="one")
    assert system.generator.still is None and system.generator.moving.mask is None
    assert set(system.streams(Condition(), random=RowRandom(0, [0]))) == {"video", "foreground"}
    losses = system.generator_loss(Batch(clips()), StepRandom(0, rows=2))
    assert set(losses) == {"loss", "adversarial"}


# losses


def test_two_outputs_are_the_softmax_of_the_release():
    """CE(real) + CE(fake) of a 2-way softmax with real = class 1."""
    system = small().eval()
    real = clips()
    two = system.discriminator.judge(system.discriminator.trunk(real.transpose(1, 2))).flatten(1)
    want = F.cross_entropy(two, torch.ones(2, dtype=torch.int64))
    fake = system.generator(Condition(), StepRandom(0, rows=2).randn(100)).video
    two = system.discriminator.judge(system.discriminator.trunk(fake)).flatten(1)
    losses = system.discriminator_loss(Batch(real), StepRandom(0, rows=2))
    torch.testing.assert_close(losses["real"], want)
    torch.testing.assert_close(losses["fake"], F.cross_entropy(two, torch.zeros(2, dtype=torch.int64)))
    torch.testing.assert_close(losses["loss"], losses["real"] + losses["fake"])
    losses = system.generator_loss(Batch(real), StepRandom(0, rows=2))
    torch.testing.assert_close(losses["adversarial"], F.cross_entropy(two, torch.ones(2, dtype=torch.int64)))


def test_the_mask_pays_its_mean_times_a_tenth():
    system = sharpen(small()).eval()
    losses = system.generator_loss(Batch(clips()), StepRandom(0, rows=2))
    mask = system.generator(Condition(), StepRandom(0, rows=2).randn(100)).mask
    assert system.mask_weight == 0.1
    torch.testing.assert_close(losses["loss"] - losses["adversarial"], 0.1 * mask.mean())
    assert losses["mask_low"] <= losses["mask_mean"] <= losses["mask_high"]


def test_the_model_of_a_frame_has_no_noise_and_no_mask_penalty_but_the_first_frame():
    system = sharpen(small(FRAME)).eval()
    assert (system.noise_dim, system.mask_weight, system.first_weight) == (0, 0.0, 10.0)
    asked = frame()
    one, other = (system.sample(asked, random=RowRandom(seed, [0, 1])) for seed in (0, 1))
    assert torch.equal(one, other)
    target = clips()
    target[:, 0] = asked.frames.pixels[:, 0]  # data.overlap=true
    losses = system.generator_loss(Batch(target, asked), StepRandom(0, rows=2))
    torch.testing.assert_close(losses["first"], (one[:, 0] - asked.frames.pixels[:, 0]).abs().mean())
    torch.testing.assert_close(losses["loss"], losses["adversarial"] + 10 * losses["first"])


def test_the_first_frame_term_covers_as_many_frames_as_asked():
    system, target = small(FRAME, first_frames=3).eval(), clips()
    made = system.sample(frame(), random=RowRandom(0, [0, 1]))
    losses = system.generator_loss(Batch(target, frame()), StepRandom(0, rows=2))
    torch.testing.assert_close(losses["first"], (made[:, :3] - target[:, :3]).abs().mean())


def test_noise_beside_a_frame_makes_many_futures():
    system = sharpen(small(FRAME, noise_dim=8)).eval()
    one, other = (system.sample(frame(), random=RowRandom(seed, [0, 1])) for seed in (0, 1))
    assert not torch.allclose(one, other)


def test_several_past_frames_keep_their_order():
    spec = ConditionSpec(frames=FramesSpec(3, 3, 16, 16))
    system = sharpen(small(spec)).eval()
    pixels = torch.rand(1, 3, 3, 16, 16) * 2 - 1
    known = torch.ones(1, 3, dtype=torch.bool)
    one = system.sample(Condition(frames=Frames(pixels, known)), random=RowRandom(0, [0]))
    other = system.sample(Condition(frames=Frames(pixels.flip(1), known)), random=RowRandom(0, [0]))
    assert not torch.allclose(one, other)
    with pytest.raises(ShapeError, match="this system takes 3 of 16 px"):
        system.sample(Condition(frames=Frames(pixels[:, :2], known[:, :2])), random=RowRandom(0, [0]))


def test_the_critic_weighs_the_clip_against_its_label_and_sentence():
    """Not by a constant for each class: what a class adds must depend on the clip."""
    spec = ConditionSpec(label=LabelSpec(3), text=TextSpec(pooled=6), image=ImageSpec(3, 16, 16))
    system = small(spec, text_width=4).eval()

    def logits(label, clip, seed=0):
        words = Text(pooled=torch.randn(1, 6, generator=torch.Generator().manual_seed(seed)))
        asked = Condition(label=torch.tensor([label]), text=words, image=Image(torch.zeros(1, 3, 16, 16)))
        return system.discriminator(clip, asked)

    one, other = clips(1).transpose(1, 2), -clips(1).transpose(1, 2)
    assert logits(0, one) - logits(1, one) != logits(0, other) - logits(1, other)
    assert logits(0, one, 0) - logits(0, one, 1) != logits(0, other, 0) - logits(0, other, 1)


def test_both_phases_share_one_generated_batch():
    system = small()
    batch = Batch(clips())
    shared = Batch(batch.target, shared=system.shared(batch, StepRandom(0, rows=2)))
    calls = []
    system.generator.register_forward_hook(lambda *_: calls.append(1))
    system.discriminator_loss(shared, StepRandom(1, rows=2))["loss"].backward()
    assert not calls and all(p.grad is None for p in system.generator.parameters())
    system.generator_loss(shared, StepRandom(2, rows=2))["loss"].backward()
    assert not calls and any(p.grad is not None for p in system.generator.parameters())


def test_real_and_generated_clips_never_share_a_batch_norm():
    system, sizes = small(), []
    system.discriminator.trunk.register_forward_hook(lambda module, given, made: sizes.append(len(given[0])))
    system.discriminator_loss(Batch(clips()), StepRandom(0, rows=2))
    assert sizes == [2, 2]


@pytest.mark.parametrize(
    ("target", "options", "error", "message"),
    [
        (TargetSpec(3, 16, 16), {}, ShapeError, "makes clips"),
        (TargetSpec(3, 24, 24, 4), {}, ShapeError, "square clips"),
        (TargetSpec(3, 16, 32, 4), {}, ShapeError, "square clips"),
        (SMALL, {"noise_dim": 0}, ConfigError, "every clip would be the same"),
        (SMALL, {"streams": "one", "mask_weight": 0.1}, ConfigError, "has no mask"),
        (SMALL, {"first_frames": 9}, ConfigError, "8 frames"),
    ],
)
def test_what_cannot_work_is_refused(target, options, error, message):
    with pytest.raises(error, match=message):
        small(target=target, **options)


@pytest.mark.slow
def test_it_learns_to_repeat_the_first_frame_and_to_move():
    """Sixty steps on squares that move one pixel a frame: the first frame is near, the later ones are no copies."""

    def squares(rows, seed):
        clip = torch.full((rows, 8, 3, 16, 16), -0.8)
        for row, at in enumerate(
            torch.randint(0, 5, (rows, 2), generator=torch.Generator().manual_seed(seed)).tolist()
        ):
            for t in range(8):
                clip[row, t, :, at[0] : at[0] + 4, at[1] + t : at[1] + t + 4] = 0.8
        return clip

    system = small(FRAME, generator_width=16)
    optim = {
        p.name: torch.optim.Adam(getattr(system, p.trains[0]).parameters(), 2e-3, (0.5, 0.999)) for p in system.phases()
    }
    for step in range(60):
        target = squares(16, step)
        batch = Batch(target, Condition(frames=Frames(target[:, :1], torch.ones(16, 1, dtype=torch.bool))))
        for phase in system.phases():
            optim[phase.name].zero_grad()
            phase.loss(batch, StepRandom(step, rows=16))["loss"].backward()
            optim[phase.name].step()
    target = squares(16, 99)
    asked = Condition(frames=Frames(target[:, :1], torch.ones(16, 1, dtype=torch.bool)))
    made = sample_rows(system.train(), asked, seed=0, ids=range(16))
    assert (made[:, 0] - target[:, 0]).abs().mean() < 0.15
    assert (made[:, 1:] - made[:, :1]).abs().mean() > 0.02
