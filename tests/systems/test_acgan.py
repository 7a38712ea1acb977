"""What AC-GAN, cGAN and DCGAN publish: shapes, counts, losses, and where the condition goes."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from condgen.errors import ConfigError, ShapeError
from condgen.losses.adversarial import fake_loss, generator_loss, real_loss
from condgen.metrics.classifier import ClassifierOptions, train_classifier
from condgen.rng import RowRandom, StepRandom
from condgen.systems.acgan import AcGan, class_loss
from condgen.types import Batch, Condition, ConditionSpec, LabelSpec, TargetSpec, TextSpec

TEN = ConditionSpec(label=LabelSpec(10))
FIVE = ConditionSpec(label=LabelSpec(5))
NOTHING = ConditionSpec()
SMALL = TargetSpec(3, 16, 16)


def tiny(spec=FIVE, **options):
    torch.manual_seed(0)
    widths = {"generator_width": 0.03, "discriminator_width": 0.2, "noise_dim": 6, "dropout": 0.0}
    return AcGan(condition=spec, target=SMALL, **{**widths, **options})


def batch(rows=6):
    pixels = torch.rand(rows, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return Batch(pixels, Condition(label=torch.arange(rows) % 5))


def draws(rows=6):
    return StepRandom(0, rows=rows)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_dcgan_at_64_px_has_the_published_counts_and_batch_norm_where_it_belongs():
    system = AcGan(condition=NOTHING, target=TargetSpec(3, 64, 64), conditioning="none", architecture="dcgan")
    assert count(system.generator) == 3_576_704
    assert count(system.discriminator) == 2_765_568
    kinds = [type(layer).__name__ for layer in system.generator.body]
    assert kinds[-2:] == ["ConvTranspose2d", "Tanh"] and kinds.count("BatchNorm2d") == 4
    assert [type(layer).__name__ for layer in system.discriminator.trunk[:3]] == ["Conv2d", "LeakyReLU", "Conv2d"]


def test_acgan_at_128_px_has_the_published_shapes():
    system = AcGan(condition=TEN, target=TargetSpec(3, 128, 128)).eval()
    assert count(system.discriminator.trunk) == 1_574_752
    assert count(system.discriminator.head) == 1_441_803  # 16 x 16 x 512 -> 1 + 10
    linear, *rest = system.generator.body
    assert (linear.in_features, linear.out_features) == (110, 768 * 8 * 8)
    assert [m.out_channels for m in rest if isinstance(m, torch.nn.ConvTranspose2d)] == [384, 256, 192, 3]
    with torch.no_grad():
        sides = [x.shape[-1] for x in trail(system.discriminator.trunk, torch.zeros(1, 3, 128, 128))]
        made = system.sample(Condition(label=torch.tensor([3])), random=RowRandom(0, [0]))
    assert list(dict.fromkeys(sides)) == [64, 32, 16] and made.shape == (1, 3, 128, 128)


def trail(layers, x):
    for layer in layers:
        x = layer(x)
        yield x


@pytest.mark.parametrize(
    ("side", "start", "maps"), [(32, 384 * 16, [192, 96, 3]), (64, 768 * 64, [384, 256, 3]), (16, 384 * 16, [192, 3])]
)
def test_acgan_at_other_sizes(side, start, maps):
    system = AcGan(condition=TEN, target=TargetSpec(3, side, side), discriminator_width=0.1).eval()
    linear, *rest = system.generator.body
    assert linear.out_features == start
    assert [m.out_channels for m in rest if isinstance(m, torch.nn.ConvTranspose2d)] == maps
    with torch.no_grad():
        assert system.sample(Condition(label=torch.tensor([0])), random=RowRandom(0, [0])).shape[-1] == side


def test_dcgan_at_32_px_drops_one_stage():
    system = AcGan(condition=NOTHING, target=TargetSpec(3, 32, 32), conditioning="none", architecture="dcgan")
    convolutions = [m for m in system.generator.body if isinstance(m, torch.nn.ConvTranspose2d)]
    assert [m.out_channels for m in convolutions] == [256, 128, 64, 3]


def test_discriminator_loss_is_source_plus_class_on_real_and_fake():
    system, data = tiny(auxiliary_weight=0.5), batch()
    losses = system.discriminator_loss(data, draws())
    noise = draws().randn(6)
    system = tiny(auxiliary_weight=0.5)  # fresh running statistics
    fake = system.generator(noise, data.condition)
    logit, named = system.discriminator(data.target, data.condition)
    fake_logit, fake_named = system.discriminator(fake, data.condition)
    expected = F.softplus(-logit).mean() + F.softplus(fake_logit).mean()
    expected += 0.5 * sum(F.cross_entropy(n, data.condition.label) for n in (named, fake_named))
    torch.testing.assert_close(losses["loss"], expected)


def test_generator_loss_is_non_saturating_plus_class():
    data = batch()
    losses = tiny(generator_auxiliary_weight=0.3).generator_loss(data, draws())
    system = tiny()
    logit, named = system.discriminator(system.generator(draws().randn(6), data.condition), data.condition)
    expected = F.softplus(-logit).mean() + 0.3 * F.cross_entropy(named, data.condition.label)
    torch.testing.assert_close(losses["loss"], expected)


def test_an_untrained_class_head_pays_ln_k_and_an_untrained_d_two_ln_2():
    losses = tiny().discriminator_loss(batch(), draws())
    assert losses["class_real"].item() == pytest.approx(math.log(5), abs=0.1)
    assert (losses["real"] + losses["fake"]).item() == pytest.approx(2 * math.log(2), abs=0.1)


def test_auxiliary_fake_off_takes_the_fakes_out_of_the_class_term():
    losses = tiny(auxiliary_fake=False).discriminator_loss(batch(), draws())
    torch.testing.assert_close(losses["loss"], losses["real"] + losses["fake"] + losses["class_real"])


def test_the_class_term_reaches_both_networks():
    system, data = tiny(), batch()
    system.discriminator_loss(data, draws())["class_fake"].backward()
    assert system.discriminator.head[1].weight.grad[1:].any()
    assert not any(p.grad is not None for p in system.generator.parameters())
    system.zero_grad()
    system.generator_loss(data, draws())["class"].backward()
    assert all(p.grad is not None and p.grad.any() for p in system.generator.parameters() if p.dim() > 1)


def test_rows_without_a_label_stay_out_of_the_class_term():
    logits = torch.randn(4, 5)
    label = torch.tensor([1, -1, 3, -1])
    torch.testing.assert_close(class_loss(logits, label), F.cross_entropy(logits[[0, 2]], label[[0, 2]]))
    soft = F.one_hot(label.clamp(min=0), 5).float() * (label >= 0)[:, None]
    torch.testing.assert_close(class_loss(logits, soft), class_loss(logits, label))
    assert class_loss(logits, torch.full((4,), -1)).item() == 0


def test_a_hundred_steps_on_the_class_term_make_a_fixed_classifier_agree():
    torch.manual_seed(0)
    system = tiny(generator_width=0.05)
    judge = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 5))
    optimizer = torch.optim.Adam(system.generator.parameters(), 1e-2)
    label = torch.arange(10) % 5
    for step in range(100):
        made = system.generator(StepRandom(step, rows=10).randn(6), Condition(label=label))
        optimizer.zero_grad()
        class_loss(judge(made), label).backward()
        optimizer.step()
    made = system.eval().sample(Condition(label=label), random=RowRandom(0, range(10)))
    assert (judge(made).argmax(1) == label).float().mean() > 0.9


def test_the_same_noise_serves_every_class_and_the_class_moves_the_picture():
    """Dossier check 4, as far as an untrained net can show it: z and c enter side by side, so z is kept as c varies."""
    system = tiny().eval()
    z = RowRandom(0, [0, 1]).randn(6)
    seen = []
    system.generator.body[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    made = [system.decode(z, Condition(label=torch.tensor([k, k]))) for k in range(5)]
    assert all(torch.equal(x[:, :6], z) for x in seen)
    assert all(torch.equal(x[:, 6:], F.one_hot(torch.tensor([k, k]), 5).float()) for k, x in enumerate(seen))
    assert all((made[0] - other).abs().amax((1, 2, 3)).min() > 0 for other in made[1:])
    again = system.sample(Condition(label=torch.tensor([3, 3])), random=RowRandom(0, [0, 1]))
    torch.testing.assert_close(again, made[3])  # the sample id decides z, whatever the class


def test_a_judge_of_real_pictures_agrees_after_a_hundred_steps_on_the_class_term():
    """Dossier check 2: L_C alone, against a classifier that was trained on pictures and then fixed."""
    torch.manual_seed(0)
    labels = torch.arange(60) % 5
    pixels = torch.rand(60, 3, 16, 16) - 1
    for row, label in enumerate(labels.tolist()):
        pixels[row, :, :, 3 * label : 3 * label + 3] += 1  # class k has a bright bar
    judge = train_classifier(pixels, labels, 5, options=ClassifierOptions(steps=60, batch_size=16, width=8, size=16))
    assert judge.accuracy(pixels, labels) > 0.95
    judge.requires_grad_(False)
    system = tiny(generator_width=0.05)
    optimizer = torch.optim.Adam(system.generator.parameters(), 5e-3)
    asked = Condition(label=torch.arange(20) % 5)
    for step in range(100):
        optimizer.zero_grad()
        class_loss(judge(system.generator(StepRandom(step, rows=20).randn(6), asked)), asked.label).backward()
        optimizer.step()
    assert judge.accuracy(system.eval().sample(asked, random=RowRandom(0, range(20))), asked.label) > 0.9


def test_a_table_discriminator_learns_p_over_p_plus_q():
    """The optimal D of Goodfellow et al. 2014, from the losses that this system uses; 2 ln 2 where p = q."""
    at = torch.linspace(-2, 2, 21)
    p, q = (torch.softmax(-((at - m) ** 2), 0) for m in (-0.5, 0.5))
    for other in (q, p):
        logits = torch.zeros(21, requires_grad=True)
        optimizer = torch.optim.Adam([logits], 0.1)
        for _ in range(300):
            loss = (p * F.softplus(-logits) + other * F.softplus(logits)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(logits.sigmoid(), p / (p + other), atol=1e-3, rtol=0)
    assert loss.item() == pytest.approx(2 * math.log(2), abs=1e-4)
    uniform = real_loss(logits.detach(), "bce") + fake_loss(logits.detach(), "bce")
    assert uniform.item() == pytest.approx(2 * math.log(2), abs=1e-3)


@pytest.mark.parametrize("logit", [-20.0, 0.0, 3.0])
def test_the_generator_loss_does_not_saturate(logit):
    at = torch.tensor([logit], requires_grad=True)
    generator_loss(at, "bce").backward()
    assert at.grad.item() == pytest.approx(1 / (1 + math.exp(-logit)) - 1, abs=1e-6)  # -1 at -20, where -ln(1-D) has 0


@pytest.mark.parametrize("conditioning", ["concat", "projection"])
def test_a_conditional_d_learns_which_pictures_belong_to_which_class(conditioning):
    """Swapping the classes of real pairs raises D's loss after training: they look like another class's fakes."""
    labels = torch.arange(10) % 5
    pixels = torch.full((10, 3, 16, 16), -1.0)
    for row, label in enumerate(labels.tolist()):
        pixels[row, :, :, 3 * label : 3 * label + 3] = 1
    system = tiny(conditioning=conditioning, batchnorm=False, discriminator_width=0.25)
    optimizer = torch.optim.Adam(system.discriminator.parameters(), 2e-3)
    right, wrong = Condition(label=labels), Condition(label=(labels + 1) % 5)
    for _ in range(60):
        loss = real_loss(system.discriminator(pixels, right)[0], "bce")
        loss = loss + fake_loss(system.discriminator(pixels, wrong)[0], "bce")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    real, swapped = (real_loss(system.discriminator(pixels, c)[0], "bce").item() for c in (right, wrong))
    assert swapped > real + 1


def test_projection_is_an_inner_product_with_summed_features():
    system, data = tiny(conditioning="projection", batchnorm=False).eval(), batch()
    critic, other = system.discriminator, Condition(label=(data.condition.label + 1) % 5)
    torch.nn.init.normal_(critic.match.weight, std=1e4)  # features of fresh weights are tiny
    a, b = (critic(data.target, c)[0] for c in (data.condition, other))
    assert (a - b).abs().min() > 1e-3
    summed = critic.trunk(data.target).sum((2, 3))
    rows = critic.match.weight.T  # one embedding a class
    expected = ((rows[data.condition.label] - rows[other.label]) * summed).sum(1)
    torch.testing.assert_close(a - b, expected, rtol=1e-3, atol=0)
    torch.nn.init.zeros_(critic.match.weight)
    torch.testing.assert_close(critic(data.target, data.condition)[0], critic(data.target, other)[0])


def test_concat_sees_the_condition_and_ignores_it_when_its_weights_are_zero():
    system, data = tiny(conditioning="concat", batchnorm=False).eval(), batch()
    critic, other = system.discriminator, Condition(label=(data.condition.label + 1) % 5)
    a, b = (critic(data.target, c)[0] for c in (data.condition, other))
    assert (a != b).all()
    with torch.no_grad():
        critic.trunk[0].weight[:, 3:] = 0
    torch.testing.assert_close(critic(data.target, data.condition)[0], critic(data.target, other)[0])


def test_auxiliary_does_not_tell_d_the_class():
    system, data = tiny().eval(), batch()
    logit, named = system.discriminator(data.target, Condition())
    assert logit.shape == (6,) and named.shape == (6, 5)
    again, _ = system.discriminator(data.target, data.condition)
    assert torch.equal(logit, again)


def test_uniform_labels_are_asked_of_g_and_held_against_its_fakes():
    system = tiny(fake_labels="uniform")
    one_class = replace(batch(64), condition=Condition(label=torch.zeros(64, dtype=torch.int64)))
    one_class = replace(one_class, target=torch.zeros(64, 3, 16, 16))
    losses = system.generator_loss(one_class, StepRandom(3, rows=64))
    random, system = StepRandom(3, rows=64), tiny(fake_labels="uniform")
    asked = Condition(label=random.randint(5))
    assert set(asked.label.tolist()) == set(range(5))
    _, named = system.discriminator(system.generator(random.randn(6), asked), asked)
    torch.testing.assert_close(losses["class"], F.cross_entropy(named, asked.label))


def test_unconditional_trains_and_samples_without_a_condition():
    system = tiny(NOTHING, conditioning="none", architecture="dcgan", generator_width=0.1)
    data = Batch(batch().target)
    for phase in system.phases():
        assert set(phase.loss(data, draws())) <= {"loss", "real", "fake", "adversarial"}
    made = system.eval().sample(Condition(), random=RowRandom(0, range(3)))
    assert made.shape == (3, 3, 16, 16) and not torch.equal(made[0], made[1])


def test_decode_is_sample_with_the_noise_given():
    system, label = tiny(noise="uniform").eval(), Condition(label=torch.tensor([1, 2]))
    z = RowRandom(4, [0, 1]).rand(6) * 2 - 1
    torch.testing.assert_close(system.decode(z, label), system.sample(label, random=RowRandom(4, [0, 1])))
    with pytest.raises(ShapeError, match=r"\(B, 6\)"):
        system.decode(z[:, :3], label)


def test_spectral_norm_bounds_every_layer_of_d():
    system = tiny(conditioning="projection", spectral_norm=True, batchnorm=False)
    for step in range(12):  # power iterations
        system.discriminator_loss(batch(), StepRandom(step, rows=6))
    system.eval()
    weights = [p.weight for p in system.discriminator.modules() if isinstance(p, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(weights) == 8
    assert all(torch.linalg.matrix_norm(w.flatten(1), 2).item() == pytest.approx(1, abs=0.1) for w in weights)


@pytest.mark.parametrize(
    ("spec", "options", "says"),
    [
        (FIVE, {"conditioning": "none"}, r"data\.ignore=\[label\]"),
        (NOTHING, {"conditioning": "projection"}, "the data carry none"),
        (ConditionSpec(text=TextSpec(pooled=4)), {"conditioning": "auxiliary"}, "needs label"),
        (ConditionSpec(label=LabelSpec(5), text=TextSpec(pooled=4)), {}, r"data\.ignore=\[text\]"),
        (FIVE, {"conditioning": "concat", "fake_labels": "uniform"}, "belongs to conditioning=auxiliary"),
    ],
)
def test_a_condition_is_never_ignored_silently(spec, options, says):
    with pytest.raises(ConfigError, match=says):
        tiny(spec, **options)


def test_sizes_without_shapes_are_refused():
    with pytest.raises(ShapeError, match="28 x 28"):
        AcGan(condition=FIVE, target=TargetSpec(1, 28, 28))
    with pytest.raises(ConfigError, match="architecture=dcgan"):
        AcGan(condition=FIVE, target=TargetSpec(3, 256, 256))
