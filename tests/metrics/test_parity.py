"""FID, KID, IS, precision and recall equal torch-fidelity's and torchmetrics' on the same pictures and weights."""

import numpy as np
import pytest
import torch

from condgen.metrics.extractors import extractor
from condgen.metrics.frechet import fid
from condgen.metrics.inception_score import inception_score
from condgen.metrics.kernel import polynomial_mmd2
from condgen.metrics.manifold import manifold
from condgen.metrics.statistics import gaussian_of
from condgen.nn.inception import InceptionV3


def features(count, dim, seed, shift=0.0):
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99)) / dim**0.5
    return (torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) @ mixing + shift).relu()


def test_inception_score_of_the_same_logits():
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = features(503, 40, 1) * 3
    theirs = isc_features_to_metric(logits, splits=10, shuffle=False)
    ours = inception_score(logits, splits=10, seed=None)
    assert ours.value == pytest.approx(theirs["inception_score_mean"], rel=1e-9) and ours.value > 2
    assert ours.error == pytest.approx(theirs["inception_score_std"], rel=1e-7)
    order = np.random.RandomState(2020).permutation(503)  # how it shuffles
    theirs = isc_features_to_metric(logits, splits=10)
    ours = inception_score(logits[order], splits=10, seed=None)
    assert ours.value == pytest.approx(theirs["inception_score_mean"], rel=1e-9)


def test_precision_and_recall_of_the_same_features():
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    real, fake = features(300, 12, 1), features(250, 12, 2, shift=0.3)
    # it takes the samples' neighbourhoods for its first set: its input 1 is what is judged, its input 2 is real
    precision, recall = calculate_precision_recall_full(fake.double(), real.double())
    ours = manifold(real, fake)
    assert (ours.precision, ours.recall) == pytest.approx((precision, recall), abs=1e-6)
    assert 0.2 < ours.precision < 1 and ours.precision != ours.recall


def test_density_and_coverage_of_the_same_features():
    prdc = pytest.importorskip("prdc")
    real, fake = features(300, 12, 1), features(300, 12, 2, shift=0.3)
    theirs = prdc.compute_prdc(real.double().numpy(), fake.double().numpy(), nearest_k=5)
    ours = manifold(real, fake, k=5)
    assert (ours.density, ours.coverage) == pytest.approx((theirs["density"], theirs["coverage"]), abs=1e-9)


def weights(file):
    torch.manual_seed(0)
    net = InceptionV3().eval()
    for parameter in net.parameters():  # of trained size, so that the depth neither dies nor explodes
        torch.nn.init.normal_(parameter, std=(2 / max(1, parameter[0].numel())) ** 0.5)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.8, 1.2)
            torch.nn.init.normal_(module.running_mean, std=0.05)
            torch.nn.init.uniform_(module.running_var, 0.8, 1.2)
    for name, parameter in net.Mixed_7c.named_parameters():
        if ".bn." in name:  # features as large as real ones: its KID is float32 and cancels otherwise
            parameter.data *= 0.1
    torch.nn.init.normal_(net.fc.weight, std=1.0)
    torch.save(net.state_dict(), file)


def images(count, seed, low):
    draw = torch.Generator().manual_seed(seed)
    small = torch.randint(low, 256, (count, 3, 5, 5), generator=draw).float()
    return torch.nn.functional.interpolate(small, size=32, mode="bicubic").clamp(0, 255).to(torch.uint8)


class Pictures(torch.utils.data.Dataset):
    def __init__(self, held):
        self.held = held

    def __len__(self):
        return len(self.held)

    def __getitem__(self, index):
        return self.held[index]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_score_of_the_same_pictures_and_weights(tmp_path):
    fidelity = pytest.importorskip("torch_fidelity")
    count = 48
    weights(tmp_path / "inception.pth")
    fake, real = images(count, 1, 0), images(count, 2, 60)
    theirs = fidelity.calculate_metrics(
        input1=Pictures(fake), input2=Pictures(real), cuda=False, isc=True, fid=True, kid=True, prc=True, verbose=False,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(tmp_path / "inception.pth"),
        feature_layer_isc="logits_unbiased", feature_layer_fid="2048", feature_layer_kid="2048",
        feature_layer_prc="2048", cache=False, kid_subsets=1, kid_subset_size=count, isc_splits=4, batch_size=16,
    )  # fmt: skip
    made = extractor(f"inception:{tmp_path}/inception.pth")
    a, b = made.features(fake, batch_size=16), made.features(real, batch_size=16)
    assert fid(b, a, force=True) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    scale = max(1.0, abs(theirs["kernel_inception_distance_mean"]))
    assert polynomial_mmd2(b, a) / scale == pytest.approx(theirs["kernel_inception_distance_mean"] / scale, abs=1e-5)
    order = np.random.RandomState(2020).permutation(count)
    ours = inception_score(made.logits(a)[order], splits=4, seed=None)
    assert ours.value == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    near = manifold(b, a)
    assert (near.precision, near.recall) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)


def test_fid_of_torchmetrics_from_features():
    pytest.importorskip("torchmetrics")
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Pooled(torch.nn.Module):
        num_features = 12

        def forward(self, x):
            return torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)

    theirs = FrechetInceptionDistance(feature=Pooled(), normalize=False, input_img_size=(3, 32, 32))
    fake, real = images(80, 1, 0), images(70, 2, 60)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    ours = fid(Pooled()(real), Pooled()(fake), force=True)
    assert ours == pytest.approx(float(theirs.compute()), rel=1e-3) and gaussian_of(Pooled()(real)).count == 70
