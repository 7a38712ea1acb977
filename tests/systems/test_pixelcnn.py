"""What the PixelCNN papers claim: exact likelihood, and pictures drawn from it, cached or not."""

import itertools
import math
import os
from pathlib import Path

import pytest
import torch

from benchmarks import public_pixelcnnpp
from condgen.errors import ConfigError, ShapeError
from condgen.losses.logistic_mixture import logistic_log_mass, mixture_log_prob
from condgen.nn.incremental import PlainSteps, softmax_sample
from condgen.nn.pixelcnnpp import PixelCnnPp
from condgen.pixels import pixels_to_float, pixels_to_uint8
from condgen.rng import RowRandom, StepRandom
from condgen.systems.base import HasLikelihood
from condgen.systems.pixelcnn import PixelCnn
from condgen.types import Batch, Condition, ConditionSpec, Image, ImageSpec, LabelSpec, TargetSpec

ARCHITECTURES = (
    "pixelcnn", "gated", "pixelcnn++", "row_lstm", "diagonal_bilstm", "row_lstm skip", "diagonal_bilstm skip"
)  # fmt: skip
FORMS = list(itertools.product(ARCHITECTURES, ("softmax", "mixture")))
each_form = pytest.mark.parametrize(("architecture", "likelihood"), FORMS)
RANDOM = RowRandom(0, range(1))


def tiny(architecture="pixelcnn++", likelihood="mixture", side=4, channels=3, told=False, **options):
    torch.manual_seed(0)
    options = {"width": 6, "blocks": 2, "scales": 2, "kernel": 3, "mixtures": 2, "dropout": 0.0, **options}
    architecture, _, skip = architecture.partition(" ")
    options |= {"skip": True} if skip else {}
    spec = ConditionSpec(label=LabelSpec(3), image=ImageSpec(1, side, side)) if told else ConditionSpec()
    system = PixelCnn(
        condition=spec, target=TargetSpec(channels, side, side), architecture=architecture, likelihood=likelihood,
        **options,
    )  # fmt: skip
    for parameter in system.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return system.eval()


def asked(rows, side=4):
    random = torch.Generator().manual_seed(2)
    return Condition(label=torch.arange(rows) % 3, image=Image(torch.rand(rows, 1, side, side, generator=random)))


def pictures(rows=2, channels=3, side=4, seed=1):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, channels, side, side), generator=random).double() / 127.5 - 1


@each_form
@pytest.mark.parametrize("channels", [1, 3])
def test_the_probabilities_of_all_binary_pictures_sum_to_one(architecture, likelihood, channels):
    system = tiny(architecture, likelihood, side=2, channels=channels, values=2).double()
    every = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4 * channels))).double().view(-1, channels, 2, 2)
    with torch.no_grad():
        chances = system.log_prob(every, Condition(), random=RANDOM).exp()
    assert chances.sum().item() == pytest.approx(1, abs=1e-9) and chances.std() > 0
    assert isinstance(system, HasLikelihood)
    assert (system.likelihood, system.dequantisation) == ("exact", "binary")


@each_form
def test_so_they_do_under_every_condition_as_a_vector_and_as_a_map(architecture, likelihood):
    """Over all 16 pictures, and for each of three conditions, of which no two give the same probabilities."""
    system = tiny(architecture, likelihood, side=2, channels=1, values=2, told=True).double()
    every = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4))).double().view(16, 1, 2, 2)
    one, two = asked(2, side=2).index([0]), asked(2, side=2).index([1])
    found = []
    for told in (one, Condition(label=two.label, image=one.image), Condition(label=one.label, image=two.image)):
        with torch.no_grad():
            chances = system.log_prob(every, told.index([0] * 16), random=RANDOM).exp()
        assert chances.sum().item() == pytest.approx(1, abs=1e-9)
        found.append(chances)
    assert all((a - b).abs().max() > 1e-6 for a, b in itertools.combinations(found, 2))


@each_form
def test_every_form_draws_rows_apart_and_teaches_every_parameter(architecture, likelihood):
    """What tests/test_contract.py asks of the tiny preset."""
    system = tiny(architecture, likelihood, told=True)
    together = system.sample(asked(3), random=RowRandom(5, range(3)))
    apart = [system.sample(asked(3).index([i]), random=RowRandom(5, [i])) for i in range(3)]
    assert torch.equal(together, torch.cat(apart)) and together.dtype == torch.float32
    system.train().nll_loss(Batch(pictures(3).float(), asked(3)), StepRandom(0, rows=3))["loss"].backward()
    silent = [name for name, p in system.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent
    other = tiny(architecture, likelihood, told=True, width=6)
    for parameter in other.parameters():
        parameter.data.add_(1)
    other.load_state_dict(system.state_dict())
    found, held = (s.eval().log_prob(pictures(3), asked(3), random=RANDOM) for s in (other, system))
    assert torch.equal(found, held)


@each_form
def test_the_256_probabilities_of_a_pixel_sum_to_one(architecture, likelihood):
    """Over the last pixel of a grey picture, the others held: their own probability cancels."""
    system = tiny(architecture, likelihood, channels=1).double()
    every = pictures(1, channels=1).repeat(256, 1, 1, 1)
    every[:, 0, 3, 3] = torch.arange(256).double() / 127.5 - 1
    with torch.no_grad():
        chances = system.log_prob(every, Condition(), random=RANDOM)
        rest = sum(step_log_probs(system, every[:1])[:-1])
    assert (torch.logsumexp(chances, 0) - rest).abs() < 1e-9
    assert system.dequantisation == "none"


def step_log_probs(system, target):
    """log p of each draw of `target`, from the plain step-by-step form."""
    canvas = torch.zeros_like(target)
    steps, found = PlainSteps(system.network.net, canvas, system.draws, None, []), []
    for row, column, draw in itertools.product(*map(range, (*target.shape[2:], system.draws))):
        steps.start_row(row)
        parameters = steps.parameters(column, draw)
        if system.mixture:
            value = target[:, :, row, column]
            found.append(mixture_log_prob(parameters[..., None], value[..., None], values=system.values)[:, 0])
        else:
            value = target[:, draw : draw + 1, row, column]
            index = ((value[:, 0] + 1) / 2 * (system.values - 1)).round().long()
            found.append(torch.log_softmax(parameters, 1).gather(1, index[:, None])[:, 0])
        steps.put(column, draw, value)
    return found


@each_form
def test_the_likelihood_is_the_sum_over_the_steps_that_sampling_takes(architecture, likelihood):
    system, target = tiny(architecture, likelihood).double(), pictures()
    with torch.no_grad():
        whole = system.log_prob(target, Condition(), random=RANDOM)
        torch.testing.assert_close(whole, sum(step_log_probs(system, target)), atol=1e-9, rtol=1e-12)


@each_form
def test_cached_and_plain_sampling_draw_the_same_pictures(architecture, likelihood):
    system = tiny(architecture, likelihood, told=True)
    cached, plain = (
        system.sample(asked(3), random=RowRandom(4, range(3)), cached=how, temperature=0.9) for how in (True, False)
    )
    assert torch.equal(cached, plain) and cached.std() > 0.05
    in_float32 = system.sample(asked(3), random=RowRandom(4, range(3)), exact=False, temperature=0.9)
    assert torch.equal(in_float32, cached)  # at this seed: about 1 of 10,000 pictures of this size would differ
    assert torch.equal(pixels_to_float(pixels_to_uint8(cached)), cached)


@each_form
def test_samples_follow_the_likelihood(architecture, likelihood):
    """All 16 binary pictures of 2 x 2, drawn as often as their probability says."""
    system = tiny(architecture, likelihood, side=2, channels=1, values=2)
    every = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4))).view(-1, 1, 2, 2)
    drawn = system.sample(Condition(), random=StepRandom(3, rows=8_000))
    code = ((drawn.flatten(1) > 0).long() * torch.tensor([8, 4, 2, 1])).sum(1)
    share = torch.bincount(code, minlength=16) / len(drawn)
    with torch.no_grad():
        expected = system.log_prob(every, Condition(), random=RANDOM).exp()
    assert (share - expected).abs().max() < 0.011 and expected.max() - expected.min() > 0.015


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "pixelcnn++"])
def test_without_a_head_the_likelihood_is_that_of_uniform_pixels(architecture):
    system = tiny(architecture, "softmax")
    last = system.network.net.head.layers[-1]
    last.weight.data.zero_(), last.bias.data.zero_()
    bits = -system.log_prob(pictures(), Condition(), random=RANDOM) / (48 * math.log(2))
    torch.testing.assert_close(bits, torch.full_like(bits, 8.0), atol=1e-5, rtol=0)


def test_without_a_head_the_likelihood_is_that_of_one_standard_logistic():
    system, target = tiny(), pictures()
    system.network.net.head.out.g.data.zero_(), system.network.net.head.out.b.data.zero_()
    zero = torch.zeros((), dtype=torch.float64)
    expected = logistic_log_mass(target, zero, zero).sum((1, 2, 3)).float()
    torch.testing.assert_close(system.log_prob(target.float(), Condition(), random=RANDOM), expected)


@each_form
def test_a_condition_moves_the_likelihood_as_a_vector_and_as_a_map(architecture, likelihood):
    system, target = tiny(architecture, likelihood, told=True), pictures(3).float()
    base = system.log_prob(target, asked(3), random=RANDOM)
    for other in (Condition(label=asked(3).label.flip(0), image=asked(3).image), Condition(
        label=asked(3).label, image=Image(-asked(3).image.pixels))):  # fmt: skip
        assert ((system.log_prob(target, other, random=RANDOM) - base).abs() > 1e-6).sum() >= 2


def test_a_lower_temperature_draws_likelier_pictures():
    system = tiny("gated", "softmax", channels=1)
    for layer in system.network.net.head.layers:
        layer.weight.data.mul_(4)
    chances = [
        system.log_prob(
            system.sample(Condition(), random=RowRandom(1, range(32)), temperature=t), Condition(), random=RANDOM
        ).mean()
        for t in (0.5, 1.0, 2.0)
    ]
    assert chances[0] > chances[1] > chances[2]
    with pytest.raises(ShapeError, match="above 0"):
        system.sample(Condition(), random=RowRandom(1, [0]), temperature=0)


def test_inverse_sums_reach_every_value_and_never_leave_them():
    logits = torch.tensor([[0.0, 1.0, -1.0, 0.5]]).expand(1001, -1)
    drawn = softmax_sample(logits, torch.linspace(0, 1, 1001)[:, None])
    share = torch.stack([(drawn == v).float().mean() for v in (torch.arange(4) * (2 / 3) - 1)])
    torch.testing.assert_close(share, torch.softmax(logits[0], 0), atol=2e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "likelihood"), [
    ("gated", "softmax"), ("pixelcnn", "softmax"), ("pixelcnn++", "softmax"), ("row_lstm skip", "softmax"),
    ("diagonal_bilstm skip", "softmax"),
])  # fmt: skip
def test_one_batch_is_learned_by_heart(architecture, likelihood):
    """Four grey pictures of random values: below half a bit, where a model of single pixels needs 8."""
    system = tiny(architecture, likelihood, channels=1, width=32).train()
    adam, data = torch.optim.Adam(system.parameters(), 5e-3), Batch(pictures(4, channels=1).float())
    for step in range(400):
        adam.zero_grad()
        losses = system.nll_loss(data, StepRandom(step, rows=4))
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(system.parameters(), 1.0)
        adam.step()
    assert float(losses["bits_per_dim"]) < 0.5


def gradients(**options):
    system = tiny(dropout=0.5, data_init=False, **options).train()
    torch.manual_seed(5)
    system.nll_loss(Batch(pictures().float()), StepRandom(0, rows=2))["loss"].backward()
    return [p.grad for p in system.parameters()]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_checkpointed_activations_change_no_gradient_and_no_dropout_mask(architecture):
    once, again = (gradients(architecture=architecture, checkpoint_activations=on) for on in (False, True))
    for mine, theirs in zip(once, again, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


def test_the_first_batch_initialises_once_and_a_checkpoint_remembers_it():
    system = tiny().train()
    batch = Batch(pictures(4).float())
    before = system.nll_loss(batch, StepRandom(0, rows=4))["loss"].item()
    state = {name: value.clone() for name, value in system.state_dict().items()}
    assert state["network.net.calibrated"]
    other = tiny().train()
    other.load_state_dict(state)
    other.nll_loss(Batch(pictures(4, seed=9).float()), StepRandom(0, rows=4))
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    assert other.nll_loss(batch, StepRandom(0, rows=4))["loss"].item() == before


def test_evaluation_neither_initialises_nor_drops():
    system = tiny(dropout=0.9)
    chances = [system.log_prob(pictures(), Condition(), random=RANDOM) for _ in range(2)]
    assert torch.equal(*chances) and not system.network.net.calibrated


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"side": 5}, "multiples of 2"),
        ({"channels": 2}, "likelihood=softmax"),
        ({"kernel": 4}, "odd number"),
        ({"skip": True}, "for row_lstm and diagonal_bilstm"),
        ({"architecture": "gated", "likelihood": "softmax", "width": 8}, "multiples of 3"),
    ],
)
def test_what_cannot_work_is_said_before_training(options, says):
    with pytest.raises((ConfigError, ShapeError), match=says):
        tiny(**options)


def public():
    folder = os.environ.get("CONDGEN_PIXEL_CNN_PP")
    if not folder or not (Path(folder) / "model.py").is_file():
        pytest.skip("set CONDGEN_PIXEL_CNN_PP to a checkout of github.com/pclucas14/pixel-cnn-pp")
    return public_pixelcnnpp.load(Path(folder))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_mixture_equals_the_public_implementation(channels):
    theirs = public()
    loss = theirs.discretized_mix_logistic_loss if channels == 3 else theirs.discretized_mix_logistic_loss_1d
    parameters = torch.randn(2, 100 if channels == 3 else 30, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    expected = loss(pictures(channels=channels), parameters).item()
    for released in (True, False):  # these masses are large enough for both formulas
        ours = -mixture_log_prob(parameters, pictures(channels=channels), released=released).sum().item()
        assert ours == pytest.approx(expected, rel=1e-5)


def test_the_network_equals_the_public_implementation_under_copied_weights():
    theirs = public().PixelCNN(nr_resnet=2, nr_filters=6, nr_logistic_mix=2, input_channels=3).double().eval()
    torch.manual_seed(0)
    ours = PixelCnnPp(3, 20, width=6, blocks=2, scales=3, dropout=0.5, colours=1, head_width=6).double().eval()
    public_pixelcnnpp.copy_weights(theirs, ours)
    x = pictures(side=8)
    torch.testing.assert_close(ours(x, None, []), theirs(x), atol=1e-10, rtol=1e-10)
