"""What the VPN paper claims: exact likelihood, clips drawn from it, grey levels with a floor, actions."""

import itertools
import math

import pytest
import torch

from condgen.errors import ConfigError, ShapeError
from condgen.losses.likelihood import bernoulli_log_prob, grey_entropy
from condgen.pixels import pixels_to_float, pixels_to_uint8
from condgen.rng import RowRandom, StepRandom
from condgen.systems.base import HasLikelihood
from condgen.systems.vpn import Vpn
from condgen.types import Batch, Condition, ConditionSpec, Frames, FramesSpec, LabelSpec, TargetSpec

DECODERS = ("masked", "two-stack", "independent")
each_decoder = pytest.mark.parametrize("decoder", DECODERS)
RANDOM = RowRandom(0, range(1))


def tiny(decoder="masked", side=4, channels=3, length=2, past=2, label=False, actions=0, nullable=False, **options):
    torch.manual_seed(0)
    options = {"width": 6, "encoder_blocks": 1, "decoder_blocks": 2, "hidden": 3, **options}
    spec = ConditionSpec(
        label=LabelSpec(3) if label else None,
        frames=FramesSpec(past, channels, side, side, actions) if past else None,
        nullable=nullable,
    )
    system = Vpn(condition=spec, target=TargetSpec(channels, side, side, length), decoder=decoder, **options)
    for parameter in system.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return system.eval()


def clips(rows=2, length=2, channels=3, side=4, seed=1):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, length, channels, side, side), generator=random).double() / 127.5 - 1


def history(rows=2, length=2, channels=3, side=4, seed=2, actions=0):
    random = torch.Generator().manual_seed(seed + 100)
    given = torch.randn(rows, length, actions, generator=random) if actions else None
    pixels = clips(rows, length, channels, side, seed).float()
    return Condition(frames=Frames(pixels, torch.ones(rows, length, dtype=torch.bool), given))


def told(rows=2, **sizes):
    return Condition(label=torch.arange(rows) % 3, frames=history(rows, **sizes).frames)


def every_binary(length, channels, side):
    count = length * channels * side * side
    table = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=count))).double()
    return table.view(-1, length, channels, side, side)


# likelihood


@each_decoder
@pytest.mark.parametrize(("length", "channels"), [(1, 1), (1, 2), (2, 1)])
def test_the_probabilities_of_all_binary_clips_sum_to_one(decoder, length, channels):
    system = tiny(decoder, side=2, channels=channels, length=length, values=2).double()
    every = every_binary(length, channels, 2)
    with torch.no_grad():
        past = history(1, channels=channels, side=2).repeat(len(every))
        chances = system.log_prob(every, past, random=RANDOM).exp()
    assert chances.sum().item() == pytest.approx(1, abs=1e-9) and chances.std() > 0
    assert isinstance(system, HasLikelihood)
    assert (system.likelihood, system.dequantisation) == ("exact", "binary")


def step_log_probs(system, clip, condition):
    """(B, T) log p of each frame from the very steps that sampling takes."""
    network, found = system.network, []
    seen = network.told(condition, len(clip), clip.dtype)
    state = network.start(seen)
    for t in range(clip.shape[1]):
        if t:
            state = network.follow(clip[:, t - 1], seen, t - 1, state)
        steps = network.decoder.steps(len(clip), clip.shape[3:], seen.vector, [network.context(seen, state)])
        total = 0
        for row in range(clip.shape[3]):
            steps.start_row(row)
            for column, draw in itertools.product(range(clip.shape[4]), range(clip.shape[2])):
                parameters = steps.parameters(column, draw)
                value = clip[:, t, draw : draw + 1, row, column]
                if system.grey:
                    total = total + bernoulli_log_prob(parameters, value)[:, 0]
                else:
                    index = ((value + 1) / 2 * (system.values - 1)).round().long()
                    total = total + torch.log_softmax(parameters, 1).gather(1, index)[:, 0]
                steps.put(column, draw, value)
        found.append(total)
    return torch.stack(found, 1)


@pytest.mark.parametrize("output", ["softmax", "sigmoid"])
@pytest.mark.parametrize("past", [0, 2])
@pytest.mark.parametrize("decoder", ["masked", "two-stack"])
def test_the_score_is_the_sum_over_the_steps_that_sampling_takes(decoder, past, output):
    system, clip = tiny(decoder, past=past, label=True, output=output).double(), clips()
    condition = told() if past else Condition(label=torch.tensor([0, 2]))
    with torch.no_grad():
        whole, parts = system.frame_nats(clip, condition), step_log_probs(system, clip, condition)
        torch.testing.assert_close(whole, -parts, atol=1e-9, rtol=1e-12)
        if output == "softmax":
            chance = system.log_prob(clip, condition, random=RANDOM)
            torch.testing.assert_close(chance, parts.sum(1), atol=1e-9, rtol=1e-12)


@each_decoder
def test_an_untrained_network_costs_as_much_as_uniform_pixels(decoder):
    torch.manual_seed(0)
    sizes = {"width": 6, "encoder_blocks": 1, "decoder_blocks": 2, "hidden": 3, "decoder": decoder}
    rgb = Vpn(condition=ConditionSpec(), target=TargetSpec(3, 8, 8, 2), **sizes)
    grey = Vpn(condition=ConditionSpec(), target=TargetSpec(1, 8, 8, 2), output="sigmoid", **sizes)
    a, b = clips(side=8).float(), clips(side=8, channels=1).float()
    with torch.no_grad():
        for exact in (False, True):
            tolerance = 1e-6 if exact else 0.005
            nats = rgb.frame_nats(a, Condition()).mean().item() / 192
            assert nats == pytest.approx(math.log(256), rel=tolerance)
            assert grey.frame_nats(b, Condition()).mean().item() == pytest.approx(64 * math.log(2), rel=tolerance)
            for system in (rgb, grey):  # without a head it is the closed form itself
                head = system.network.decoder.blocks[-1]
                head = (head.left if decoder == "two-stack" else head).widen
                head.weight.data.zero_(), head.bias.data.zero_()


def test_the_loss_is_the_likelihood_per_colour_and_per_frame():
    system, clip = tiny(), clips().float()
    losses = system.nll_loss(Batch(clip, history()), StepRandom(0, rows=2))
    nats = -system.log_prob(clip, history(), random=RANDOM).mean().item()
    assert losses["loss"].item() == pytest.approx(nats / 96, rel=1e-5)
    assert losses["nats_per_frame"].item() == pytest.approx(nats / 2, rel=1e-5)
    assert losses["bits_per_dim"].item() == pytest.approx(nats / 96 / math.log(2), rel=1e-5)


# grey levels


def test_the_cross_entropy_of_grey_levels_is_never_below_their_entropy_and_reaches_it():
    system, clip = tiny(output="sigmoid", channels=1).double(), clips(channels=1)
    floor = system.frame_floor(clip)
    white = (clip + 1) / 2
    expected = -(white * white.clamp(min=1e-300).log() + (1 - white) * (1 - white).clamp(min=1e-300).log())
    torch.testing.assert_close(floor, expected.sum((2, 3, 4)))
    with torch.no_grad():
        assert (system.frame_nats(clip, history(channels=1)) > floor).all()
        losses = system.nll_loss(Batch(clip, history(channels=1)), StepRandom(0, rows=2))
        assert losses["above_floor"].item() == pytest.approx(
            losses["nats_per_frame"].item() - floor.mean().item(), rel=1e-9
        )
    perfect = -bernoulli_log_prob(torch.logit(white), clip)
    inside = white * (1 - white) > 0
    torch.testing.assert_close(perfect[inside], grey_entropy(clip)[inside])
    assert not grey_entropy(torch.tensor([-1.0, 1.0])).any()
    assert system.likelihood.startswith("none")
    with pytest.raises(ConfigError, match="nats a frame"):
        system.log_prob(clip, history(channels=1), random=RANDOM)
    assert tiny().frame_floor(clips()) is None


def test_a_sigmoid_gives_its_mean_without_noise_and_black_or_white_with_it():
    system = tiny(output="sigmoid", channels=1)
    one, two = (system.sample(history(channels=1), random=RowRandom(s, range(2))) for s in (0, 1))
    assert torch.equal(one, two) and len(one.unique()) > 4
    drawn = system.sample(history(channels=1), random=RowRandom(0, range(2)), temperature=1.0)
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}


# drawing


@each_decoder
@pytest.mark.parametrize("unit", ["multiplicative", "relu"])
@pytest.mark.parametrize(("channels", "output"), [(3, "softmax"), (1, "softmax"), (1, "sigmoid")])
def test_cached_and_plain_sampling_draw_the_same_clips(decoder, unit, channels, output):
    system = tiny(decoder, channels=channels, output=output, unit=unit, label=True)
    asked = told(3, channels=channels)
    cached, plain = (
        system.sample(asked, random=RowRandom(4, range(3)), cached=how, temperature=0.9) for how in (True, False)
    )
    assert torch.equal(cached, plain) and cached.std() > 0.05
    assert torch.equal(pixels_to_float(pixels_to_uint8(cached)), cached)
    alone = system.sample(asked.index([1]), random=RowRandom(4, [1]), temperature=0.9)
    assert torch.equal(alone[0], cached[1])


@each_decoder
def test_samples_follow_the_likelihood(decoder):
    """All 256 binary clips of 2 frames of 2 x 2, drawn as often as their probability says."""
    system = tiny(decoder, side=2, channels=1, past=1, values=2)
    every = every_binary(2, 1, 2)
    past = history(1, 1, channels=1, side=2)
    drawn = system.sample(past.repeat(8_000), random=StepRandom(3, rows=8_000))
    weights = 2 ** torch.arange(7, -1, -1)
    share = torch.bincount(((drawn.flatten(1) > 0).long() * weights).sum(1), minlength=256) / len(drawn)
    with torch.no_grad():
        expected = system.log_prob(every, past.repeat(256), random=RANDOM).exp().float()
    assert (share - expected).abs().sum() < 0.2 and expected.max() > 1.5 * expected.min()
    frame = (drawn[:, :1] > 0).flatten(1).long().mul(weights[4:]).sum(1)  # the first frame's own 16 alone
    assert (torch.bincount(frame, minlength=16) / len(drawn) - expected.view(16, 16).sum(1)).abs().max() < 0.015


def test_temperature_makes_likelier_clips_and_zero_takes_the_likeliest_value():
    system = tiny(channels=1)
    system.network.decoder.blocks[-1].widen.weight.data.mul_(4)
    past = history(16, channels=1)
    chances = [
        system.log_prob(system.sample(past, random=RowRandom(1, range(16)), temperature=t), past, random=RANDOM).mean()
        for t in (0.0, 0.5, 1.0, 2.0)
    ]
    assert chances[0] > chances[1] > chances[2] > chances[3]
    one, two = (system.sample(past, random=RowRandom(s, range(16)), temperature=0) for s in (0, 1))
    assert torch.equal(one, two)
    with torch.no_grad():
        logits = system._law(one, past).unflatten(2, (256, 1))
    assert torch.equal(pixels_to_float(logits.argmax(2).to(torch.uint8)), one)
    for wrong in ({"temperature": -1.0}, {"length": -1}):
        with pytest.raises(ShapeError, match="negative"):
            system.sample(past, random=RowRandom(1, range(16)), **wrong)


def test_a_longer_clip_begins_with_the_shorter_one():
    system = tiny()
    short, long = (system.sample(history(), random=RowRandom(1, range(2)), length=n) for n in (0, 4))
    assert long.shape[1] == 4 and torch.equal(long[:, :2], short)


# conditions


@each_decoder
def test_labels_move_every_frame_also_the_first_without_a_past(decoder):
    system, clip = tiny(decoder, past=0, label=True).double(), clips()
    with torch.no_grad():
        one, two = (system.frame_nats(clip, Condition(label=torch.full((2,), k))) for k in (0, 1))
    assert ((one - two).abs() > 1e-6).all()


def test_a_frame_that_is_not_given_leaves_the_state_as_it_was():
    system = tiny().double()
    frames = history().frames
    mask = torch.tensor([[True, False], [False, True]])
    holes = Condition(frames=Frames(frames.pixels, mask))
    other = Condition(frames=Frames(torch.where(mask[..., None, None, None], frames.pixels, 0.3), mask))
    with torch.no_grad():
        base = system.frame_nats(clips(), holes)
        assert torch.equal(system.frame_nats(clips(), other), base)
        single = system.network.told(Condition(frames=Frames(frames.pixels[:1, :1], mask[:1, :1])), 1, torch.float64)
        full = system.network.told(holes.index([0]), 1, torch.float64)
        for mine, theirs in zip(system.network.start(full), system.network.start(single), strict=True):
            torch.testing.assert_close(mine, theirs)
        assert not torch.allclose(base, system.frame_nats(clips(), history()))


def test_a_dropped_history_is_one_learned_null():
    system = tiny(nullable=True).double()
    system.network.stack.kinds["frames"].null.data.normal_()
    gone = [history(seed=s).drop(1.0) for s in (3, 4)]
    with torch.no_grad():
        one, two = (system.frame_nats(clips(), c) for c in gone)
        assert torch.equal(one, two) and not torch.allclose(one, system.frame_nats(clips(), history()))
        system.network.stack.kinds["frames"].null.data.zero_()
        assert not torch.allclose(system.frame_nats(clips(), gone[0]), one)


@pytest.mark.parametrize("future", [False, True])
def test_an_action_moves_the_frames_after_its_own_and_no_other(future):
    past, length = 2, 3
    given = past + length if future else past
    system = tiny(length=length, actions=4, past=given, channels=1, future_actions=future).double()
    frames = history(1, given, 1, actions=4).frames
    actions = frames.actions.double().requires_grad_()
    told = Condition(frames=Frames(frames.pixels.double(), frames.mask, actions))
    nats = system.frame_nats(clips(1, length, 1), told)[0]
    for t in range(length):
        (slope,) = torch.autograd.grad(nats[t], actions, retain_graph=True)
        moved = (slope[0] != 0).any(1)
        assert moved.tolist() == [n < past + t for n in range(given)]
    if future:
        drawn = [
            system.sample(Condition(frames=Frames(frames.pixels * k, frames.mask, frames.actions * k)),
                          random=RowRandom(0, [0]))
            for k in (1, 2)
        ]  # fmt: skip
        assert not torch.equal(*drawn)
        with pytest.raises(ShapeError, match="actions for 3 frames"):
            system.sample(told, random=RowRandom(0, [0]), length=4)
        with pytest.raises(ShapeError, match="actions for 3 only"):
            system.frame_nats(clips(1, 4, 1), told)


def test_pixels_of_the_future_are_not_read():
    system = tiny(length=2, actions=1, past=4, channels=1, future_actions=True).double()
    frames = history(1, 4, 1, actions=1).frames
    other = frames.pixels.clone()
    other[:, 2:] = 0.5
    with torch.no_grad():
        one, two = (
            system.frame_nats(clips(1, 2, 1), Condition(frames=Frames(p, frames.mask, frames.actions)))
            for p in (frames.pixels, other)
        )
    assert torch.equal(one, two)


# training


@each_decoder
def test_checkpointed_activations_change_no_gradient(decoder):
    def gradients(on):
        system = tiny(decoder, checkpoint_activations=on).train()
        system.nll_loss(Batch(clips().float(), history()), StepRandom(0, rows=2))["loss"].backward()
        return [p.grad for p in system.parameters()]

    for mine, theirs in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"output": "sigmoid", "values": 2}, "same law"),
        ({"width": 8}, "multiples of 3"),
        ({"length": 0}, "system=pixelcnn"),
        ({"length": 1, "past": 0}, "is a picture"),
        ({"future_actions": True}, "give none"),
        ({"future_actions": True, "actions": 1}, "give 2"),
    ],
)
def test_what_cannot_work_is_said_before_training(options, says):
    with pytest.raises((ConfigError, ShapeError), match=says):
        tiny(**options)
    with pytest.raises(ShapeError, match="keeps one resolution"):
        Vpn(condition=ConditionSpec(frames=FramesSpec(2, 3, 8, 8)), target=TargetSpec(3, 4, 4, 2), width=6)
    with pytest.raises(ShapeError, match="built for"):
        tiny().frame_nats(clips(side=5), history())
