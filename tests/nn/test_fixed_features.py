"""Fixed feature networks: the layers are torchvision's, files are checked, and weights stay out of everything."""

import hashlib
import pickle

import pytest
import torch
from safetensors.torch import save_file

from condgen.errors import ConfigError, ShapeError
from condgen.nn.fixed_features import TAPS, FixedFeatures, packaged


def pictures(rows=2, side=32, channels=3):
    return torch.rand(rows, channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def layers(kind):
    """torchvision's `features` with random weights."""
    models = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        made = getattr(models, kind)().features
    made = made.to_empty(device="cpu")
    torch.manual_seed(0)
    for p in made.parameters():
        torch.nn.init.kaiming_normal_(p) if p.dim() > 1 else torch.nn.init.normal_(p, 0, 0.1)
    return made


def file_of(kind, folder, suffix=".safetensors"):
    made = layers(kind)
    state = {f"features.{name}": t.detach() for name, t in made.state_dict().items()}
    state["classifier.6.bias"] = torch.zeros(1000)
    path = folder / f"{kind}{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    return path, made


@pytest.mark.parametrize(("kind", "suffix"), [("vgg16", ".pth"), ("vgg19", ".safetensors"), ("alexnet", ".pth")])
def test_layers_are_those_of_torchvision(kind, suffix, tmp_path):
    path, theirs = file_of(kind, tmp_path, suffix)
    ours, x = FixedFeatures(f"{kind}:{path}"), pictures()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    y, expected = ((x + 1) / 2 - mean) / std, []
    for at, layer in enumerate(theirs[: TAPS[kind][-1] + 1]):
        y = layer(y)
        if at in TAPS[kind]:
            expected.append(y.clone())
    for mine, wanted in zip(ours(x), expected, strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-4)
    assert ours.digest == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.skipif(not packaged(), reason="the packages of efficientnet_lite0 are absent")
def test_efficientnet_stages_end_in_its_published_features():
    from condgen.nn.efficientnet_lite0 import SIDE, EfficientNetLite0

    network, x = EfficientNetLite0(), pictures(1, SIDE)
    *_, last = network.stages(x)
    head = network.network._swish(network.network._bn1(network.network._conv_head(last)))
    torch.testing.assert_close(head.mean((2, 3)), network(x))
    maps = FixedFeatures("efficientnet_lite0")(pictures(side=64))
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 32, 32), (24, 16, 16), (40, 8, 8), (112, 4, 4), (320, 2, 2)]
    assert all(torch.isfinite(m).all() and m.std() > 0.1 for m in maps)


def test_gradient_reaches_pixels_and_no_weight_and_grey_is_repeated(tmp_path):
    features = FixedFeatures(f"alexnet:{file_of('alexnet', tmp_path)[0]}")
    grey = pictures(channels=1).requires_grad_()
    sum(m.sum() for m in features(grey)).backward()
    assert grey.grad.any()
    network = features._loaded[0]
    assert all(p.grad is None and not p.requires_grad for p in network.parameters()) and not network.training
    for a, b in zip(features(grey), features(grey.expand(-1, 3, -1, -1)), strict=True):
        assert torch.equal(a, b)


def test_float32_under_autocast_and_no_random_number_is_drawn(tmp_path):
    features = FixedFeatures(f"alexnet:{file_of('alexnet', tmp_path)[0]}")
    before = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        maps = features(pictures().bfloat16())
    assert {m.dtype for m in maps} == {torch.float32}
    if packaged():
        FixedFeatures("efficientnet_lite0").load()
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_read_before_load(tmp_path):
    features = FixedFeatures("vgg16:absent.pth")
    with pytest.raises(ConfigError, match=r"no file 'absent\.pth'"):
        features.load()


@pytest.mark.parametrize("name", ["vgg61:x", "vgg16", "efficientnet_lite0:x", ""])
def test_unknown_names_list_the_known_ones(name):
    with pytest.raises(ConfigError, match="efficientnet_lite0"):
        FixedFeatures(name)


def test_files_that_do_not_fit_are_refused(tmp_path):
    other, _ = file_of("vgg19", tmp_path)
    with pytest.raises(ConfigError, match="not torchvision's vgg16"):
        FixedFeatures(f"vgg16:{other}").load()
    for content in (b"", b"junk" * 100, pickle.dumps(print, protocol=2)):
        for suffix in (".pth", ".safetensors"):
            bad = tmp_path / f"bad{suffix}"
            bad.write_bytes(content)
            with pytest.raises(ConfigError, match="not a weight file"):
                FixedFeatures(f"vgg16:{bad}").load()
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ConfigError, match="no state_dict"):
        FixedFeatures(f"vgg16:{tmp_path / 'list.pth'}").load()


def test_pictures_that_it_cannot_see_are_refused():
    for x in (pictures(side=16), pictures(channels=2)):
        with pytest.raises(ShapeError, match="at least 32 px"):
            FixedFeatures("efficientnet_lite0")(x)
