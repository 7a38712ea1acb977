"""Perceptual loss of pix2pix: a fixed network that pulls at the generator and is found nowhere else."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from condgen.engine.ema import Ema
from condgen.engine.state import system_tensors
from condgen.errors import ConfigError, ShapeError
from condgen.inference.export import ExportInfo, exported, make_system
from condgen.losses.features import feature_distance
from condgen.nn.fixed_features import FixedFeatures, _Plain, packaged
from condgen.rng import RowRandom, StepRandom
from condgen.systems.pix2pix import Pix2Pix
from condgen.types import Batch, Condition, ConditionSpec, Image, ImageSpec, TargetSpec

SIDE = 32
SPEC = {"condition": ConditionSpec(image=ImageSpec(1, SIDE, SIDE)), "target": TargetSpec(3, SIDE, SIDE)}
ALONE = {"l1_weight": 0.0, "adversarial_weight": 0.0, "perceptual_weight": 1.0}


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """An AlexNet with random weights, by its name."""
    torch.manual_seed(0)
    shapes = _Plain("alexnet").features.state_dict(prefix="features.")
    file = tmp_path_factory.mktemp("alexnet") / "alexnet.safetensors"
    save_file({k: torch.randn(t.shape) * (2 / max(t[0].numel(), 1)) ** 0.5 for k, t in shapes.items()}, file)
    return f"alexnet:{file}"


def tiny(network, **options):
    torch.manual_seed(0)
    options = {"generator_width": 4, "discriminator_width": 4, "patch": 16, **options}
    return Pix2Pix(**SPEC, perceptual_network=network, **options)


def batch(rows=4):
    source, target = torch.rand(2, rows, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return Batch(target, Condition(image=Image(source[:, :1])))


def draws(rows=4, seed=0):
    return StepRandom(seed, rows=rows)


def test_it_is_the_distance_of_features_and_adds_to_the_rest(network):
    system, data = tiny(network, perceptual_weight=3.0), batch()
    losses = system.generator_loss(data, draws())
    fake, features = system.translate(data.condition, draws(), (SIDE, SIDE)), FixedFeatures(network)
    gaps = [(a - b).abs().mean() for a, b in zip(features(fake), features(data.target), strict=True)]
    torch.testing.assert_close(losses["perceptual"], sum(gaps) / 5)
    torch.testing.assert_close(losses["loss"], losses["adversarial"] + 100 * losses["l1"] + 3 * losses["perceptual"])
    equal = system.generator_loss(replace(data, shared=data.target.clone()), draws())
    assert equal["perceptual"] == 0 < losses["perceptual"]


def test_gradient_flows_to_the_generator_only(network):
    system, data = tiny(network, **ALONE), batch()
    data.target.requires_grad_()
    system.generator_loss(data, draws())["perceptual"].backward()
    silent = [n for n, p in system.generator.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == [] and data.target.grad is None
    fixed = list(system.perceptual._loaded[0].parameters())
    assert fixed and all(p.grad is None and not p.requires_grad for p in fixed)


def test_training_on_it_alone_brings_the_features_nearer_and_leaves_the_network_as_it_was(network):
    system, data = tiny(network, **ALONE, noise="none"), batch()
    before = [p.clone() for p in system.perceptual.load()._loaded[0].parameters()]
    (phase,) = system.phases()
    optimizer = torch.optim.Adam(system.get_submodule(phase.trains[0]).parameters(), 5e-3)
    values = []
    for step in range(25):
        loss = phase.loss(data, draws(seed=step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.8 * values[0]
    assert all(torch.equal(a, b) for a, b in zip(system.perceptual._loaded[0].parameters(), before, strict=True))


def test_it_is_in_no_checkpoint_export_average_or_phase(network):
    system, plain = tiny(network, perceptual_weight=1.0), tiny(network)
    system.phases()
    names = list(plain.state_dict())
    assert list(system.state_dict()) == names and set(system_tensors(system)) == set(system_tensors(plain))
    assert set(exported(system)) == set(exported(plain)) and all(n.startswith("generator.") for n in exported(system))
    assert set(Ema(system).tensors()) == set(Ema(plain).tensors())
    assert all("perceptual" not in n for n, _ in system.named_modules())


def test_train_does_not_reach_it(network):
    name = "efficientnet_lite0" if packaged() else network  # batch norm would tell
    system, pixels = tiny(name, perceptual_weight=1.0), batch().target
    for a, b in zip(system.train().perceptual(pixels), system.eval().perceptual(pixels), strict=True):
        assert torch.equal(a, b)


def test_a_missing_file_is_said_before_training_and_a_trained_system_needs_none():
    options = {"generator_width": 4, "discriminator_width": 4, "patch": 16, "perceptual_weight": 1.0}
    options["perceptual_network"] = "vgg19:absent.pth"
    system = Pix2Pix(**SPEC, **options)
    with pytest.raises(ConfigError, match=r"no file 'absent\.pth'"):
        system.phases()
    info = ExportInfo(
        system="pix2pix",
        options=options,
        **SPEC,
        text=None,
        task="image2image",
        data={},
        step=1,
        version="0",
        modules=(),
    )
    loaded, asked = make_system(info, exported(system), "memory"), batch(1).condition
    with torch.no_grad():
        a, b = (s.sample(asked, random=RowRandom(0, [0])) for s in (loaded, system))
    assert torch.equal(a, b)


def test_what_the_network_cannot_see_is_said_when_the_system_is_made():
    spec = {"condition": ConditionSpec(image=ImageSpec(1, 16, 16)), "target": TargetSpec(3, 16, 16)}
    with pytest.raises(ShapeError, match="at least 32 px"):
        Pix2Pix(**spec, patch=16, perceptual_weight=1.0)
    with pytest.raises(ConfigError, match="vgg19:<file>"):
        Pix2Pix(**SPEC, patch=16, perceptual_weight=1.0, perceptual_network="vgg")


def test_distances_need_the_same_layers():
    with pytest.raises(ValueError, match="zip"):
        feature_distance([torch.zeros(1)], [])
