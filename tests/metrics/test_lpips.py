"""LPIPS-type distance: equal to torchmetrics' for VGG-16 and AlexNet, with ends and a name that says what it is."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from condgen.errors import ConfigError
from condgen.metrics.paired import Lpips, paired_scores
from condgen.metrics.signature import comparable, parse
from condgen.nn.fixed_features import FixedFeatures, _Plain, packaged

CHANNELS = {"vgg16": (64, 128, 256, 512, 512), "alexnet": (64, 192, 384, 256, 256)}
needs_efficientnet = pytest.mark.skipif(not packaged(), reason="the packages of efficientnet_lite0 are absent")


@pytest.fixture(scope="module", params=["vgg16", "alexnet"])
def files(request, tmp_path_factory):
    """(kind, network file, file of linear weights), random."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    shapes = _Plain(kind).features.state_dict(prefix="features.")
    network = {k: torch.randn(t.shape) * (2 / max(t[0].numel(), 1)) ** 0.5 for k, t in shapes.items()}
    save_file(network, folder / "net.safetensors")
    torch.save(
        {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(CHANNELS[kind])}, folder / "lin.pth"
    )
    return kind, folder / "net.safetensors", folder / "lin.pth"


def pictures(rows=3, side=48, seed=0):
    return torch.rand(rows, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("linear", [True, False])
def test_equals_its_definition(files, linear):
    kind, network, weights = files
    a, b, total = pictures(), pictures(seed=1), 0.0
    given = torch.load(weights, weights_only=True)
    features = FixedFeatures(f"{kind}:{network}")
    for i, (x, y) in enumerate(zip(features(a), features(b), strict=True)):
        apart = (x / x.square().sum(1, keepdim=True).sqrt() - y / y.square().sum(1, keepdim=True).sqrt()) ** 2
        w = given[f"lin{i}.model.1.weight"].flatten() if linear else torch.ones(x.shape[1])
        total = total + torch.einsum("nchw,c->n", apart, w) / (x.shape[2] * x.shape[3])
    ours = Lpips(f"{kind}:{network}", weights if linear else None)(a, b)
    torch.testing.assert_close(ours, total, atol=1e-5, rtol=1e-4)


@pytest.mark.slow  # importing torchmetrics takes seconds
@pytest.mark.parametrize("linear", [True, False])
def test_equals_torchmetrics_under_the_same_weights(files, linear, monkeypatch):
    theirs = pytest.importorskip("torchmetrics.functional.image.lpips")
    models = pytest.importorskip("torchvision").models
    kind, network, weights = files

    def features(net, pretrained=False):  # as theirs, without the classifier's hundred million random numbers
        with torch.device("meta"):
            made = getattr(models, net)().features
        return made.to_empty(device="cpu")

    monkeypatch.setattr(theirs, "_get_tv_model_features", features)
    reference = theirs._LPIPS(pretrained=False, net={"vgg16": "vgg", "alexnet": "alex"}[kind], pnet_rand=True)
    state = load_file(network)
    for name, parameter in reference.net.named_parameters():  # slice<n>.<position in torchvision's features>.weight
        parameter.data.copy_(state["features." + name.split(".", 1)[1]])
    given = torch.load(weights, weights_only=True)
    for i in range(5):
        layer = getattr(reference, f"lin{i}").model[-1]
        layer.weight.data.copy_(given[f"lin{i}.model.1.weight"] if linear else torch.ones_like(layer.weight))
    a, b = pictures(), pictures(seed=1)
    with torch.no_grad():
        expected = reference.eval()(a, b).flatten()
    ours = Lpips(f"{kind}:{network}", weights if linear else None)(a, b)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    assert ours.min() > 0.01


def test_a_distance_is_zero_for_equals_symmetric_and_grows_with_noise(files):
    kind, network, weights = files
    distance, a = Lpips(f"{kind}:{network}", weights), pictures(4)
    noise = pictures(4, seed=2)
    assert (distance(a, a) == 0).all()
    near, far = distance(a, a + 0.1 * noise), distance(a, a + noise)
    assert (near > 0).all() and (near < far).all()
    torch.testing.assert_close(distance(noise, a), distance(a, noise))


def test_pictures_are_measured_one_by_one(files):
    kind, network, _ = files
    distance, a, b = Lpips(f"{kind}:{network}"), pictures(17, 32), pictures(17, 32, seed=1)  # 17: more than one chunk
    torch.testing.assert_close(distance(a, b)[16:], distance(a[16:], b[16:]))
    assert distance(a, b).shape == (17,)


def test_the_name_and_the_signature_say_which_lpips(files):
    kind, network, weights = files
    plain, linear = Lpips(f"{kind}:{network}"), Lpips(f"{kind}:{network}", weights)
    assert (plain.name, linear.name) == (f"lpips-{kind}", f"lpips-{kind}-linear")
    assert plain.fields["linear"] == "none" and len(linear.fields["linear"]) == 12
    assert linear.fields["literature"] == "no"  # weights of this test are not the published ones


def test_linear_weights_of_another_network_are_refused(files):
    kind, network, weights = files
    other = {"vgg16": "alexnet", "alexnet": "vgg16"}[kind]
    torch.save(
        dict.fromkeys([f"lin{i}.model.1.weight" for i in range(5)], torch.ones(1, 7, 1, 1)), weights.parent / "x.pth"
    )
    with pytest.raises(ConfigError, match=f"linear weights of {kind}"):
        Lpips(f"{kind}:{network}", weights.parent / "x.pth")
    with pytest.raises(ConfigError, match=f"not torchvision's {other}"):
        Lpips(f"{other}:{network}", weights)


@needs_efficientnet
def test_linear_weights_do_not_exist_for_efficientnet(files):
    with pytest.raises(ConfigError, match="vgg16 and alexnet"):
        Lpips("efficientnet_lite0", files[2])


@needs_efficientnet
def test_paired_scores_have_it_with_floor_and_ceiling():
    real, source = pictures(4, 32) * 0.5, pictures(4, 32, seed=3)
    found = {s.name: s for s in paired_scores(real, real, source, real, about={"data": "x", "split": "test"})}
    score, mean = found["lpips-efficientnet_lite0"], found["lpips-efficientnet_lite0/mean-image"]
    distance = Lpips()
    copied = min(float(distance(source, real).mean()), float(distance(-source, real).mean()))
    assert score.value == score.ceiling == 0 < score.floor == pytest.approx(copied) and not score.higher_is_better
    assert mean.value == pytest.approx(float(distance(real.mean(0, keepdim=True).expand_as(real), real).mean()))
    fields = parse(score.signature).fields
    assert (
        fields["literature"] == "no" and fields["linear"] == "none" and fields["net"].startswith("efficientnet_lite0#")
    )
    assert parse(score.signature).metric == "lpips-efficientnet_lite0"
    assert "net" not in parse(found["l1"].signature).fields


def test_paired_scores_take_another_distance_or_none(files):
    kind, network, weights = files
    real, source = pictures(2, 32), pictures(2, 32, seed=3)

    def scores(distance):
        about = {"data": "x", "split": "test"}
        return {s.name: s.signature for s in paired_scores(real, real, source, real, about=about, distance=distance)}

    assert not any(name.startswith("lpips") for name in scores(None))
    one, two = scores(Lpips(f"{kind}:{network}")), scores(Lpips(f"{kind}:{network}", weights))
    assert {"linear", "metric"} <= set(comparable(one[f"lpips-{kind}"], two[f"lpips-{kind}-linear"]))


def test_pictures_too_small_for_the_network_have_no_automatic_lpips():
    real = pictures(2, 16)
    names = [s.name for s in paired_scores(real, real, real, real, about={"data": "x", "split": "test"})]
    assert names and not any(name.startswith("lpips") for name in names)
