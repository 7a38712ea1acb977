"""What the pix2pix paper claims, and that the networks are the published ones."""

from dataclasses import replace

import pytest
import torch

from condgen.errors import ConfigError, ShapeError
from condgen.nn.patchgan import PatchGan
from condgen.nn.unet import ResNet, UNet
from condgen.rng import RowRandom, StepRandom
from condgen.systems.pix2pix import Pix2Pix
from condgen.types import Batch, Condition, ConditionSpec, Image, ImageSpec, TargetSpec


def tiny(side=16, **options):
    torch.manual_seed(0)
    options = {"generator_width": 4, "discriminator_width": 4, "patch": 16, **options}
    return Pix2Pix(condition=ConditionSpec(image=ImageSpec(1, side, side)), target=TargetSpec(3, side, side), **options)


def batch(rows=4, side=16):
    generator = torch.Generator().manual_seed(1)
    source, target = torch.rand(2, rows, 3, side, side, generator=generator) * 2 - 1
    return Batch(target, Condition(image=Image(source[:, :1])))


def draws(rows=4, seed=0):
    return StepRandom(seed, rows=rows)


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("made", "parameters"),
    [
        (lambda: UNet(3, 3), 54_413_955),
        (lambda: UNet(3, 3, levels=7), 41_828_995),
        (lambda: ResNet(3, 3, norm="instance"), 11_378_179),
        (lambda: ResNet(3, 3, blocks=6, norm="instance"), 7_837_699),
        (lambda: PatchGan(6, patch=1), 9_153),
        (lambda: PatchGan(6, patch=16), 139_585),
        (lambda: PatchGan(6, patch=34), 666_433),
        (lambda: PatchGan(6, patch=70), 2_768_705),
        (lambda: PatchGan(6, patch=142), 6_964_033),
        (lambda: PatchGan(6, patch=286), 11_159_361),
    ],
)
def test_published_parameter_counts(made, parameters):
    with torch.device("meta"):
        assert count(made()) == parameters


def test_the_system_at_256_px_is_the_published_pair():
    with torch.device("meta"):
        system = Pix2Pix(condition=ConditionSpec(image=ImageSpec(3, 256, 256)), target=TargetSpec(3, 256, 256))
    assert (count(system.generator), count(system.discriminator)) == (54_413_955, 2_768_705)


@pytest.mark.parametrize("patch", [1, 16, 34, 70, 142, 286])
def test_receptive_field_by_gradient(patch):
    """One logit in the middle depends on exactly patch x patch pixels."""
    torch.manual_seed(0)
    net = PatchGan(2, patch=patch, width=2).eval()
    for module in net.modules():  # every weight positive, so that nothing cancels
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data.abs_().mul_(10)
    for block in net.blocks:
        for layer in block:
            if hasattr(layer, "statistics"):
                layer.statistics = "running"  # statistics of the picture would reach all of it
    pixels = torch.ones(1, 2, patch + 64, patch + 64, requires_grad=True)
    logits = net(pixels)
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle].backward()
    touched = pixels.grad[0].abs().amax(0) > 0
    rows, columns = touched.any(1).nonzero().flatten(), touched.any(0).nonzero().flatten()
    assert rows[-1] - rows[0] + 1 == patch == columns[-1] - columns[0] + 1
    assert int(touched.sum()) == patch**2


def test_the_published_patches_at_256_px():
    with torch.device("meta"):
        sides = {p: PatchGan(6, patch=p, width=1)(torch.empty(1, 6, 256, 256)).shape[-1] for p in (1, 16, 70, 286)}
    assert sides == {1: 256, 16: 126, 70: 30, 286: 6}


def test_the_fake_is_computed_once_and_shared():
    system, data = tiny(), batch()
    calls = []
    system.generator.register_forward_hook(lambda *_: calls.append(1))
    ready = replace(data, shared=system.shared(data, draws()))
    for phase in system.phases():
        phase.loss(ready, draws())["loss"].backward()
    assert len(calls) == 1


def test_the_discriminator_phase_sends_nothing_to_the_generator():
    system, data = tiny(), batch()
    ready = replace(data, shared=system.shared(data, draws()))
    system.discriminator_loss(ready, draws())["loss"].backward()
    assert all(p.grad is None for p in system.generator.parameters())
    assert any(p.grad is not None for p in system.discriminator.parameters())


def test_lambda_zero_removes_l1():
    full, without = (tiny(l1_weight=w).generator_loss(batch(), draws()) for w in (100.0, 0.0))
    torch.testing.assert_close(without["loss"], without["adversarial"])
    torch.testing.assert_close(full["loss"], full["adversarial"] + 100 * full["l1"])


def test_adversarial_weight_zero_is_l1_alone_and_needs_no_discriminator():
    system = tiny(adversarial_weight=0.0)
    assert system.discriminator is None and [p.name for p in system.phases()] == ["generator"]
    losses = system.generator_loss(batch(), draws())
    torch.testing.assert_close(losses["loss"], 100 * losses["l1"])


def test_dropout_noise_is_a_function_of_the_seed_and_not_of_mode_or_batch():
    system, asked = tiny(statistics="image"), batch().condition
    one = asked.index(torch.tensor([0, 0, 0]))

    def drawn(seed, ids, rows=one):
        with torch.no_grad():
            return system.eval().sample(rows, random=RowRandom(seed, ids))

    same = drawn(0, [5, 6, 5])
    torch.testing.assert_close(same[0], same[2])
    assert not torch.allclose(same[0], same[1]) and not torch.allclose(same[0], drawn(1, [5, 6, 5])[0])
    torch.testing.assert_close(drawn(0, [6], one.index([0]))[0], same[1], atol=1e-5, rtol=0)
    torch.manual_seed(1)
    again = drawn(0, [5, 6, 5])
    assert torch.equal(again, same)  # torch's own state has no part in it


@pytest.mark.parametrize("generator", ["unet", "encoder_decoder", "resnet_6"])
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_at_batch_one_training_and_sampling_make_the_same_picture(generator, norm):
    system, asked = tiny(generator=generator, norm=norm).train(), batch(1).condition
    with torch.no_grad():
        trained = system.translate(asked, RowRandom(0, [3]), (16, 16))
        sampled = system.sample(asked, random=RowRandom(0, [3]))
    torch.testing.assert_close(trained, sampled, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("statistics", ["image", "running"])
@pytest.mark.parametrize("generator", ["unet", "resnet_6"])
def test_train_and_eval_mode_sample_the_same_pictures(generator, statistics):
    system, asked = tiny(generator=generator, statistics=statistics), batch().condition
    state = {name: t.clone() for name, t in system.state_dict().items()}
    with torch.no_grad():
        drawn = [system.train(mode).sample(asked, random=RowRandom(0, range(4))) for mode in (True, False)]
    assert torch.equal(*drawn)
    assert all(torch.equal(t, state[name]) for name, t in system.state_dict().items())


def test_sampling_leaves_the_mode_as_it_was():
    system = tiny().train()
    with torch.no_grad():
        system.sample(batch().condition, random=RowRandom(0, range(4)))
    assert all(module.training for module in system.modules())


def test_running_statistics_are_the_other_named_choice():
    asked = batch(1).condition
    with torch.no_grad():
        image, running = (tiny(statistics=s).sample(asked, random=RowRandom(0, [3])) for s in ("image", "running"))
    assert not torch.allclose(image, running, atol=1e-3)


def test_without_noise_seeds_agree():
    system, asked = tiny(noise="none").eval(), batch().condition
    with torch.no_grad():
        a, b = (system.sample(asked, random=RowRandom(seed, range(4))) for seed in (0, 1))
    assert torch.equal(a, b)


def test_noise_rate_is_the_share_of_zeros_and_keeps_the_mean():
    mask = tiny(noise_rate=0.25)._mask(RowRandom(0, range(4)), (8, 16, 16))
    assert abs(float((mask == 0).float().mean()) - 0.25) < 0.02 and abs(float(mask.mean()) - 1) < 0.03


def test_an_encoder_decoder_has_no_skips():
    """Information reaches its output through the bottleneck alone; a U-Net goes round it."""
    for generator, passes in (("unet", True), ("encoder_decoder", False)):
        system, data = tiny(generator=generator, noise="none").eval(), batch()
        system.generator.net.down[-1].register_forward_hook(lambda *args: torch.zeros_like(args[2]))
        with torch.no_grad():
            out = system.sample(data.condition, random=RowRandom(0, range(4)))
        assert bool((out - out[:1]).abs().max() > 0) is passes


def test_another_size_and_a_side_that_does_not_fit():
    system, asked = tiny().eval(), batch(2, side=32).condition
    with torch.no_grad():
        assert system.sample(asked, random=RowRandom(0, [0, 1]), height=32, width=48).shape == (2, 3, 32, 48)
    with pytest.raises(ShapeError, match="multiples of 16"):
        system.sample(asked, random=RowRandom(0, [0, 1]), height=24, width=32)


@pytest.mark.parametrize("loss", ["bce", "lsgan", "hinge"])
@pytest.mark.parametrize(
    "options",
    [{"r1_weight": 1.0, "r1_every": 1}, {"spectral_norm": True}, {"feature_matching": 10.0}, {"conditional": False}],
)
def test_every_option_gives_finite_losses_and_gradients(loss, options):
    system, data = tiny(loss=loss, **options), batch()
    for phase in system.phases():
        losses = phase.loss(data, draws())
        losses["loss"].backward()
        assert torch.isfinite(losses["loss"])
    assert {"r1_weight": "r1" in system.discriminator_loss(data, draws())}.get(next(iter(options)), True)
    if "feature_matching" in options:
        parts = system.generator_loss(data, draws())
        expected = parts["adversarial"] + 100 * parts["l1"] + 10 * parts["features"]
        torch.testing.assert_close(parts["loss"], expected)


def test_only_a_conditional_discriminator_sees_the_source():
    data = batch()
    other = data.condition.index([1, 2, 3, 0])
    for conditional in (True, False):
        judge = tiny(conditional=conditional).eval().discriminator
        assert torch.equal(judge(data.target, data.condition), judge(data.target, other)) is not conditional


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"patch": 70}, "Choose system.patch of 1, 16"),
        ({"levels": 5}, "multiples of 32"),
        ({"noise_blocks": [0]}, "numbered from 1"),
        ({"l1_weight": 0.0, "adversarial_weight": 0.0}, "nothing to learn"),
    ],
)
def test_what_cannot_work_is_said_before_training(options, says):
    with pytest.raises((ConfigError, ShapeError), match=says):
        tiny(**options)
