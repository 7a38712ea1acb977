"""The networks compute what the public PyTorch code computes, given the same weights.

CONDGEN_PIX2PIX_PUBLIC names a folder with models/networks.py of taesungp/contrastive-unpaired-translation, which holds
the networks of junyanz/pytorch-CycleGAN-and-pix2pix; without it these tests skip. docs/parity.md has what was measured.
"""

import functools
import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from condgen.nn.patchgan import PatchGan
from condgen.nn.unet import ResNet, UNet

PUBLIC = os.environ.get("CONDGEN_PIX2PIX_PUBLIC", "")
FILE = Path(PUBLIC) / "models" / "networks.py"
pytestmark = pytest.mark.skipif(not PUBLIC or not FILE.is_file(), reason="CONDGEN_PIX2PIX_PUBLIC is not set")
TOLERANCE = 1e-5
NORMS = {"batch": nn.BatchNorm2d, "instance": functools.partial(nn.InstanceNorm2d, affine=False)}


@pytest.fixture(scope="module")
def public():
    """Its networks.py, as part of a package without the rest."""
    package = importlib.util.module_from_spec(importlib.machinery.ModuleSpec("public_models", None, is_package=True))
    package.__path__ = [str(FILE.parent)]
    sys.modules["public_models"] = package
    yield importlib.import_module("public_models.networks")
    for name in [n for n in sys.modules if n.startswith("public_models")]:
        del sys.modules[name]


def random_weights(network):
    """Larger than at the start of training, so that the output is not nearly 0."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn_like(p) * (1 / p[0].numel() ** 0.5) if p.dim() > 1 else 1 + 0.2 * torch.randn_like(p))


def adopt(ours, theirs):
    """Weights layer by layer, in order. A bias that only we have becomes 0; returns how many values those are."""
    layers = [
        [m for m in net.modules() if next(m.parameters(recurse=False), None) is not None] for net in (ours, theirs)
    ]
    alone = 0
    for mine, given in zip(*layers, strict=True):
        assert type(mine) is type(given) and mine.weight.shape == given.weight.shape
        mine.weight.data.copy_(given.weight)
        if given.bias is not None:
            mine.bias.data.copy_(given.bias)
        elif mine.bias is not None:
            mine.bias.data.zero_()
            alone += mine.bias.numel()
    return alone


def adopt_unet(ours, theirs):
    """Their decoder sees (skip, decoder) and ours, like the Lua release, (decoder, skip): the inputs change places."""
    alone = adopt(ours, theirs)
    for up in ours.up[1:]:
        weight = up[0].weight.data
        weight.copy_(weight.roll(weight.shape[0] // 2, 0))
    return alone


def compare(ours, theirs, pixels, record_property, name, masks=(), tolerance=TOLERANCE):
    with torch.no_grad():
        mine = ours.train()(pixels, masks) if masks else ours.train()(pixels)
        wanted = theirs.train()(pixels)
    assert mine.shape == wanted.shape and wanted.std() > 0.01
    gap = (mine - wanted).abs().max().item()
    record_property("gap", gap)
    print(f"parity {name}: largest difference {gap:.1e}, output std {wanted.std().item():.2f}")
    assert gap <= tolerance


def pixels(side, channels=3, rows=2):
    return torch.rand(rows, channels, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize(("levels", "side"), [(8, 256), (7, 128)])
def test_unet(public, levels, side, norm, record_property):
    theirs = public.UnetGenerator(3, 3, levels, 64, norm_layer=NORMS[norm])
    random_weights(theirs)
    ours = UNet(3, 3, levels=levels, norm=norm)
    assert adopt_unet(ours, theirs) == 0
    compare(ours, theirs, pixels(side), record_property, f"unet_{side} {norm}")


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_unet_in_float64(public, norm, record_property):
    """What float32 leaves is the order of a sum, since the decoder's inputs change places."""
    theirs = public.UnetGenerator(3, 3, 8, 16, norm_layer=NORMS[norm])
    random_weights(theirs)
    ours = UNet(3, 3, levels=8, width=16, norm=norm)
    adopt_unet(ours, theirs)
    name = f"unet_256 {norm}, width 16, float64"
    compare(ours.double(), theirs.double(), pixels(256).double(), record_property, name, tolerance=1e-12)


def masked(network, masks):
    """Each dropout layer multiplies by the next mask instead, in the order in which the layers run."""
    left = iter(masks)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
            module.register_forward_hook(lambda module, given, out: out * next(left))


def test_unet_dropout_stands_where_the_option_says(public, record_property):
    """noise_blocks 2, 3, 4 are the public code's three dropout layers."""
    theirs = public.UnetGenerator(3, 3, 8, 16, norm_layer=nn.BatchNorm2d, use_dropout=True)
    random_weights(theirs)
    ours = UNet(3, 3, levels=8, width=16, noise_blocks=(2, 3, 4))
    adopt_unet(ours, theirs)
    generator = torch.Generator().manual_seed(3)
    masks = [(torch.rand(2, *s, generator=generator) < 0.5) * 2.0 for s in ours.noise_shapes(256, 256)]
    masked(theirs, masks)
    compare(ours, theirs, pixels(256), record_property, "unet_256 with dropout masks", masks)


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("blocks", [6, 9])
def test_resnet(public, blocks, norm, record_property):
    options = {"n_blocks": blocks, "no_antialias": True, "no_antialias_up": True}
    theirs = public.ResnetGenerator(3, 3, 64, norm_layer=NORMS[norm], **options)
    random_weights(theirs)
    ours = ResNet(3, 3, blocks=blocks, norm=norm, noise=False)
    assert adopt(ours, theirs) == 0
    compare(ours, theirs, pixels(64), record_property, f"resnet_{blocks} {norm}")


def test_resnet_dropout_stands_where_the_masks_go(public, record_property):
    options = {"n_blocks": 6, "no_antialias": True, "no_antialias_up": True, "use_dropout": True}
    theirs = public.ResnetGenerator(3, 3, 16, norm_layer=nn.BatchNorm2d, **options)
    random_weights(theirs)
    ours = ResNet(3, 3, blocks=6, width=16)
    adopt(ours, theirs)
    generator = torch.Generator().manual_seed(3)
    masks = [(torch.rand(2, *s, generator=generator) < 0.5) * 2.0 for s in ours.noise_shapes(64, 64)]
    masked(theirs, masks)
    compare(ours, theirs, pixels(64), record_property, "resnet_6 with dropout masks", masks)


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize(("layers", "patch", "side"), [(1, 16, 256), (3, 70, 256), (5, 286, 256)])
def test_patchgan(public, layers, patch, side, norm, record_property):
    theirs = public.NLayerDiscriminator(6, 64, n_layers=layers, norm_layer=NORMS[norm], no_antialias=True)
    random_weights(theirs)
    ours = PatchGan(6, patch=patch, norm=norm)
    assert adopt(ours, theirs) == 0
    compare(ours, theirs, pixels(side, 6), record_property, f"PatchGAN n_layers {layers} {norm}")


@pytest.mark.parametrize(("norm", "alone"), [("batch", 129), ("instance", 0)])
def test_pixelgan(public, norm, alone, record_property):
    """With batch norm the first release has biases everywhere, as we have; this code leaves 129 out."""
    theirs = public.PixelDiscriminator(6, 64, norm_layer=NORMS[norm])
    random_weights(theirs)
    ours = PatchGan(6, patch=1, norm=norm)
    assert adopt(ours, theirs) == alone
    compare(ours, theirs, pixels(64, 6), record_property, f"PixelGAN {norm}")
