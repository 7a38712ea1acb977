"""What the text-to-image paper claims, and that the networks are the published ones."""

import math

import pytest
import torch

from condgen.errors import ConfigError, ShapeError
from condgen.losses.adversarial import fake_loss, generator_loss, r1_penalty, real_loss
from condgen.rng import RowRandom, StepRandom
from condgen.systems.gan_cls import GanCls
from condgen.types import Batch, Condition, ConditionSpec, LabelSpec, TargetSpec, Text, TextSpec

TEXT = ConditionSpec(text=TextSpec(pooled=1024))
IMAGE = TargetSpec(3, 64, 64)
SMALL = TargetSpec(3, 16, 16)


def tiny(**options):
    torch.manual_seed(0)
    options = {"generator_width": 4, "discriminator_width": 4, "noise_dim": 5, "condition_dim": 6, **options}
    spec = options.pop("condition", ConditionSpec(text=TextSpec(pooled=7)))
    return GanCls(condition=spec, target=SMALL, **options)


def batch(rows=6):
    generator = torch.Generator().manual_seed(1)
    strings = tuple(f"caption {i}" for i in range(rows))
    text = Text(pooled=torch.randn(rows, 7, generator=generator), strings=strings)
    return Batch(torch.rand(rows, 3, 16, 16, generator=generator) * 2 - 1, Condition(text=text))


def draws(rows=6):
    return StepRandom(0, rows=rows)


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("options", "generator", "discriminator"),
    [
        ({}, 18_909_699, 4_032_321),  # CUB and flowers
        (
            {"generator_width": 196, "discriminator_width": 196, "text_batchnorm": False, "trunk_activation": True},
            41_107_551,
            36_190_301,
        ),  # COCO
    ],
)
def test_published_parameter_counts(options, generator, discriminator):
    system = GanCls(condition=TEXT, target=IMAGE, **options)
    assert count(system.generator) == generator
    assert count(system.discriminator) == discriminator


def test_cub_discriminator_has_no_activation_after_its_third_convolution():
    def kinds(system):
        return [type(layer).__name__ for layer in system.discriminator.net.trunk]

    cub = GanCls(condition=TEXT, target=IMAGE)
    coco = GanCls(condition=TEXT, target=IMAGE, text_batchnorm=False, trunk_activation=True)
    assert kinds(cub) == [
        "Conv2d", "LeakyReLU", "Conv2d", "BatchNorm2d", "LeakyReLU", "Conv2d", "BatchNorm2d",
        "Conv2d", "BatchNorm2d", "Bottleneck",
    ]  # fmt: skip
    assert kinds(coco).count("LeakyReLU") == 3


def test_cls_weight_zero_is_the_plain_conditional_gan():
    system, data = tiny(cls_weight=0.0, interp_weight=0.0, architecture="reed"), batch()
    losses = system.discriminator_loss(data, draws())
    assert "wrong" not in losses
    torch.testing.assert_close(losses["loss"], losses["real"] + losses["fake"])


def test_cls_splits_the_fake_weight_between_wrong_and_fake():
    system = tiny(cls_weight=0.25)
    losses = system.discriminator_loss(batch(), draws())
    expected = losses["real"] + 0.25 * losses["wrong"] + 0.75 * losses["fake"]
    torch.testing.assert_close(losses["loss"], expected)


def test_wrong_pairs_are_real_images_with_somebody_elses_text():
    system, data = tiny(cls_weight=0.5), batch()
    seen = []
    judge = system.discriminator.forward
    system.discriminator.forward = lambda pixels, condition: (
        seen.append((pixels, condition)) or judge(pixels, condition)
    )
    system.discriminator_loss(data, draws())
    (real, text), _, (wrong, wrong_text) = seen
    assert text is wrong_text is data.condition
    order = [next(i for i in range(6) if torch.equal(row, real[i])) for row in wrong]
    assert sorted(order) == list(range(6)) and all(i != at for i, at in enumerate(order))


def test_interp_weight_zero_leaves_the_gan_term_scaled_by_two_thirds():
    """The released loss averages over 1.5 B rows and weighs the interpolated ones, so weight 0 keeps B / 1.5 B."""
    gradients = []
    for weight in (0.0, 1e-12):  # 0 takes the short path, 1e-12 the long one with vanishing interpolation
        system = tiny(interp_weight=weight, architecture="compact").eval()
        system.generator_loss(batch(), draws())["loss"].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in system.generator.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0] / 1.5, atol=1e-7, rtol=1e-4)


def test_interpolated_text_is_what_the_discriminator_sees():
    system, data = tiny(interp_weight=1.0, interp_beta=0.25), batch()
    seen = []
    judge = system.discriminator.forward
    system.discriminator.forward = lambda pixels, condition: seen.append(condition) or judge(pixels, condition)
    system.generator_loss(data, draws())
    pooled, text = seen[0].text.pooled, data.condition.text.pooled
    assert len(pooled) == 9
    torch.testing.assert_close(pooled[:6], text)
    torch.testing.assert_close(pooled[6:], 0.25 * text[:3] + 0.75 * text[3:])


def test_labels_interpolate_as_soft_labels():
    spec = ConditionSpec(label=LabelSpec(3))
    system = tiny(condition=spec)
    data = Batch(batch().target, Condition(label=torch.tensor([0, 1, 2, 2, 0, -1])))
    system.generator_loss(data, draws())["loss"].backward()
    mixed = system._interpolated(data.condition, 3)
    torch.testing.assert_close(mixed.label, torch.tensor([[0.5, 0, 0.5], [0.5, 0.5, 0], [0, 0, 0.5]]))


@pytest.mark.parametrize("kind", ["bce", "hinge", "lsgan"])
def test_adversarial_losses_against_their_formulas(kind):
    logits = torch.tensor([-2.0, -0.5, 0.0, 3.0], dtype=torch.float64)
    p = torch.sigmoid(logits)
    formulas = {
        "bce": (-p.log(), -(1 - p).log(), -p.log()),
        "hinge": ((1 - logits).clamp(min=0), (1 + logits).clamp(min=0), -logits),
        "lsgan": ((logits - 1) ** 2, logits**2, (logits - 1) ** 2),
    }
    for loss, formula in zip((real_loss, fake_loss, generator_loss), formulas[kind], strict=True):
        torch.testing.assert_close(loss(logits, kind).double(), formula.mean(), atol=1e-6, rtol=1e-6)
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0])
    torch.testing.assert_close(
        generator_loss(logits, kind, weight).double(), (formulas[kind][2] * weight).mean(), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("shape", [(4, 1), (1,), (1, 4)])
def test_weights_that_would_broadcast_are_refused(shape):
    with pytest.raises(ShapeError, match="one weight a row"):
        generator_loss(torch.zeros(4), "bce", torch.ones(shape))


def test_one_row_cannot_be_mismatched():
    with pytest.raises(ShapeError, match="at least 2 rows"):
        tiny(architecture="compact").discriminator_loss(batch(1), draws(1))


def test_r1_of_a_linear_critic_is_half_its_squared_weight():
    weight = torch.randn(12, generator=torch.Generator().manual_seed(0))
    pixels = torch.randn(5, 3, 2, 2).requires_grad_()
    logits = pixels.flatten(1) @ weight
    torch.testing.assert_close(r1_penalty(logits, pixels), 0.5 * weight.square().sum())


def test_r1_is_lazy_and_reaches_the_discriminator():
    system, data = tiny(r1_weight=2.0, r1_every=2, architecture="compact"), batch()
    first, second = (system.discriminator_loss(data, draws()) for _ in range(2))
    assert "r1" in first and "r1" not in second
    torch.testing.assert_close(
        first["loss"] - second["loss"], 2.0 * 2 * first["r1"], atol=1e-4, rtol=1e-4
    )  # the compact D has no batch norm, so the other terms repeat
    first["r1"].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in system.discriminator.parameters())


def test_spectral_norm_bounds_every_layer_but_not_the_condition():
    system = tiny(spectral_norm=True, projection=True, architecture="reed")
    for _ in range(30):
        system.discriminator(batch().target, batch().condition)
    system.eval()
    layers = [m for m in system.discriminator.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) >= 6
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight.detach().flatten(1), ord=2).item() == pytest.approx(1, abs=0.05)


def test_projection_adds_the_inner_product_of_condition_and_features():
    system = tiny(projection=True, architecture="reed").eval()
    data, critic = batch(), system.discriminator.net
    vector = data.condition.text.pooled
    with_it = critic(data.target, vector)
    inner = (critic.match(vector) * critic.trunk(data.target).mean((2, 3))).sum(1)
    critic.match = None
    torch.testing.assert_close(with_it - critic(data.target, vector), inner, atol=1e-5, rtol=1e-4)


def test_style_phase_trains_only_the_style_encoder_and_leaves_running_statistics_alone():
    system = tiny(style_start=3)
    phases = {phase.name: phase for phase in system.phases()}
    assert phases["style"].trains == ("style_encoder",) and phases["style"].start == 3
    before = {name: value.clone() for name, value in system.generator.named_buffers()}
    loss = phases["style"].loss(batch(), draws())["loss"]
    loss.backward()
    assert all(torch.equal(value, before[name]) for name, value in system.generator.named_buffers())
    assert all(p.grad is None for p in system.generator.parameters())
    assert system.encode(batch().target, batch().condition).shape == (6, 5)


def test_style_encoder_recovers_the_noise_of_a_fixed_generator():
    system = tiny(style_start=0, architecture="compact", generator_width=16, discriminator_width=16, noise_dim=2)
    optimizer = torch.optim.Adam(system.style_encoder.parameters(), 1e-3)
    data = batch(32)
    for step in range(150):
        loss = system.style_loss(data, StepRandom(step, rows=32))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    system.eval()
    noise = torch.randn(32, 2, generator=torch.Generator().manual_seed(5))
    guess = system.encode(system.decode(noise, data.condition), data.condition)
    correlation = torch.corrcoef(torch.stack([noise.flatten(), guess.flatten()]))[0, 1]
    assert correlation > 0.7


def test_no_style_encoder_says_how_to_get_one():
    with pytest.raises(ConfigError, match="style_start"):
        tiny().encode(batch().target, batch().condition)


def test_sample_i_does_not_depend_on_the_batch():
    system, condition = tiny().eval(), batch().condition
    together = system.sample(condition, random=RowRandom(3, range(6)))
    alone = torch.cat([system.sample(condition.index([i]), random=RowRandom(3, [i])) for i in range(6)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert together.abs().max() <= 1


@pytest.mark.parametrize("target", [TargetSpec(3, 48, 48), TargetSpec(3, 64, 32), TargetSpec(3, 64, 64, frames=4)])
def test_impossible_targets_are_refused(target):
    with pytest.raises(ShapeError, match="square images of 16, 32, 64"):
        GanCls(condition=TEXT, target=target)


def test_a_condition_is_needed():
    with pytest.raises(ConfigError, match="needs a condition"):
        GanCls(condition=ConditionSpec(), target=IMAGE)


@pytest.mark.slow
def test_matching_aware_training_makes_the_critic_hear_the_text():
    """Check (g5): with mismatched pairs D tells right from wrong text; without them it does not."""
    colours = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1]])
    gaps = {}
    for cls_weight in (0.0, 0.5):
        system = tiny(
            cls_weight=cls_weight, interp_weight=0.0, architecture="reed", generator_width=8, discriminator_width=8,
            condition=ConditionSpec(text=TextSpec(pooled=4)),
        )  # fmt: skip
        optimizers = {
            name: torch.optim.Adam(getattr(system, name).parameters(), 2e-3, (0.5, 0.999))
            for name in ("discriminator", "generator")
        }
        for step in range(120):
            random = StepRandom("colours", step, rows=16)
            which = torch.randint(4, (16,), generator=random.local)
            text = Text(pooled=torch.eye(4)[which], strings=tuple(str(int(i)) for i in which))
            data = Batch(colours[which][:, :, None, None].expand(-1, -1, 16, 16).contiguous(), Condition(text=text))
            for phase in system.phases():
                system.requires_grad_(False)
                getattr(system, phase.name).requires_grad_(True)
                loss = phase.loss(data, random)["loss"]
                optimizers[phase.name].zero_grad()
                loss.backward()
                optimizers[phase.name].step()
        with torch.no_grad():
            which = torch.arange(4).repeat(8)
            pixels = colours[which][:, :, None, None].expand(-1, -1, 16, 16).contiguous()
            right = system.discriminator(pixels, Condition(text=Text(pooled=torch.eye(4)[which])))
            wrong = system.discriminator(pixels, Condition(text=Text(pooled=torch.eye(4)[(which + 1) % 4])))
        gaps[cls_weight] = (right - wrong).mean().item()
    assert gaps[0.5] > 2.0
    assert gaps[0.5] > gaps[0.0] + 1.0
    assert math.isfinite(gaps[0.0])
