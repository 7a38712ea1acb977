"""What a trained pix2pix must show: a U-Net passes its input through, and D knows which source belongs to a picture."""

import pytest
import torch

from condgen.rng import RowRandom, StepRandom
from condgen.systems.pix2pix import Pix2Pix
from condgen.types import Batch, Condition, ConditionSpec, Image, ImageSpec, TargetSpec

SIDE = 16


def make(**options):
    torch.manual_seed(0)
    spec = {"condition": ConditionSpec(image=ImageSpec(3, SIDE, SIDE)), "target": TargetSpec(3, SIDE, SIDE)}
    return Pix2Pix(**spec, patch=16, **options)


def scenes(rows, seed):
    """Coloured boxes on coloured ground (rows, 3, SIDE, SIDE)."""
    g = torch.Generator().manual_seed(seed)
    out = (torch.rand(rows, 3, 1, 1, generator=g) * 2 - 1).repeat(1, 1, SIDE, SIDE)
    for i in range(rows):
        top, left, h, w = (int(v) for v in torch.randint(2, 9, (4,), generator=g))
        out[i, :, top : top + h, left : left + w] = (torch.rand(3, generator=g) * 2 - 1)[:, None, None]
    return out


def train(system, steps, lr, batch):
    optimizers = {
        p.name: torch.optim.Adam(system.get_submodule(p.trains[0]).parameters(), lr, betas=(0.5, 0.999))
        for p in system.phases()
    }
    for step in range(steps):
        data = batch(step)
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - step / steps))
        for phase in system.phases():
            for parameters in optimizers.values():
                parameters.zero_grad()
            phase.loss(data, StepRandom(0, step, phase.name, rows=len(data.target)))["loss"].backward()
            optimizers[phase.name].step()


def identity_error(generator):
    """Mean |G(x) - x| on held-out scenes after 700 steps of L1 alone, half contrast (tanh bends colours near 1)."""
    system = make(adversarial_weight=0.0, noise="none", generator_width=32, levels=2, generator=generator)

    def batch(step):
        pixels = 0.5 * scenes(8, step)
        return Batch(pixels, Condition(image=Image(pixels)))

    train(system, 700, 1e-2, batch)
    held = 0.5 * scenes(32, 10_000)
    with torch.no_grad():
        out = system.sample(Condition(image=Image(held)), random=RowRandom(0, range(32)))
    return (out - held).abs().mean().item()


@pytest.mark.slow
def test_a_unet_with_l1_alone_learns_the_identity_which_takes_its_skips():
    through, bottleneck = identity_error("unet"), identity_error("encoder_decoder")
    print(f"unet {through:.4f}, encoder_decoder {bottleneck:.4f}")
    assert through < 0.02 < 0.08 < bottleneck


def negative(step, rows=16):
    pixels = scenes(rows, step)
    return Batch(-pixels, Condition(image=Image(pixels)))


@pytest.mark.slow
@pytest.mark.parametrize("conditional", [True, False])
def test_a_trained_discriminator_tells_shuffled_real_pairs_apart(conditional):
    """More than 50 % of held-out real pairs score above the same picture with another source; without it, none can."""
    system = make(conditional=conditional, generator_width=8, discriminator_width=16, norm="instance")
    train(system, 200, 5e-4, negative)
    held, judge = negative(10_000, 64), system.eval().discriminator
    with torch.no_grad():
        own = judge(held.target, held.condition).flatten(1).mean(1)
        other = judge(held.target, held.condition.index([*range(1, 64), 0])).flatten(1).mean(1)
    share = (own > other).float().mean().item()
    print(f"conditional {conditional}: {share:.2f}")
    assert share > 0.7 if conditional else share == 0
