"""Class accuracy, CAS and diversity: what moves them, and that floors and ceilings are where they belong."""

import importlib.util

import pytest
import torch

from condgen.data.base import RowDataset
from condgen.errors import CheckpointError, DataError, ShapeError
from condgen.metrics import quality
from condgen.metrics.classifier import (
    ClassifierOptions,
    cached_classifier,
    cas_scores,
    class_scores,
    load_classifier,
    train_classifier,
)
from condgen.metrics.diversity import diversity_scores, ms_ssim, scales_for
from condgen.types import ConditionSpec, LabelSpec, Sample, TargetSpec

QUICK = ClassifierOptions(steps=40, batch_size=16, width=8, size=16, dropout=0.0)
ABOUT = {"data": "colours", "split": "test"}


def colours(rows, seed=0, classes=3):
    """Class k has channel k bright, under noise."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    pixels = torch.randint(0, 120, (rows, 3, 16, 16), generator=draw)
    pixels[torch.arange(rows), labels] += 120
    return pixels.to(torch.uint8), labels


class Colours(RowDataset):
    def __init__(self, rows=60):
        self.pixels, self.labels = colours(rows)
        self.provides, self.target = ConditionSpec(label=LabelSpec(3)), TargetSpec(3, 16, 16)

    def __len__(self):
        return len(self.pixels)

    def key(self, index):
        return str(index)

    def sample(self, index, random):
        return Sample(str(index), self.pixels[index], label=int(self.labels[index]))


@pytest.fixture(scope="module")
def judge():
    return train_classifier(*colours(60), 3, options=QUICK)


def test_good_samples_reach_the_ceiling_and_others_the_floor(judge):
    real, truth = colours(30, seed=1)
    fake, asked = colours(60, seed=2)
    (good,) = class_scores(judge, fake, asked, real, truth, about=ABOUT)
    assert good.value > 0.9 and good.ceiling > 0.9 and good.floor < 0.6
    (bad,) = class_scores(judge, fake, asked.roll(1), real, truth, about=ABOUT)
    assert bad.value < 0.1 and bad.ceiling == good.ceiling
    assert f"judge={judge.fingerprint}" in good.signature


def test_detail_that_shrinking_removes_is_seen_by_a_judge_of_large_pictures():
    """The class is a checkerboard's phase along x or along y: gone in pictures of half the side."""
    labels = torch.arange(80) % 2
    stripes = (torch.arange(32) % 2).float() * 2 - 1
    of = torch.stack([stripes[None].expand(32, 32), stripes[:, None].expand(32, 32)])
    noise = torch.randn(80, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.2
    pixels = (of[labels][:, None] * 0.5 + noise).clamp(-1, 1)
    large = train_classifier(pixels, labels, 2, options=ClassifierOptions(**{**QUICK.__dict__, "size": 32}))
    full, half = class_scores(large, pixels, labels, pixels, labels, about=ABOUT, shrink=(64, 32, 16))
    assert (full.name, half.name) == ("class_accuracy", "class_accuracy@16px")
    assert full.value > 0.95 and half.value < 0.8 and half.ceiling == half.value
    assert "class_accuracy@16px|" in half.signature


def test_kid_of_each_class_sees_the_class_that_is_wrong():
    (fake, asked), (real, truth), (other, others) = (colours(180, seed=s) for s in (1, 2, 3))
    fake[asked == 1] = 255 - fake[asked == 1]
    labels = quality.Labels(asked, truth, others, ("a", "b"))
    plain = quality.quality_scores(fake, real, other, name="pixels", about=ABOUT)
    scores = quality.quality_scores(fake, real, other, name="pixels", about=ABOUT, labels=labels)
    assert [s.name for s in scores] == ["kid", "kid/a", "kid/b", "kid/2"] and scores[0] == plain[0]
    by = {s.name: s for s in scores}
    assert by["kid/b"].value > 10 * abs(by["kid/a"].value) and abs(by["kid/b"].ceiling) < by["kid/b"].value / 10
    assert by["kid/a"].floor > 10 * abs(by["kid/a"].value) and "n=60" in by["kid/a"].signature
    few = quality.Labels(asked[:149], truth, others)
    scores = quality.quality_scores(fake[:149], real, other, name="pixels", about=ABOUT, labels=few)
    assert [s.name for s in scores] == ["kid", "kid/0", "kid/1"]  # class 2 has 49 samples


def test_cas_needs_samples_that_teach(judge):
    real, truth = colours(30, seed=1)
    train, train_labels = colours(60, seed=3)
    fake, asked = colours(60, seed=2)
    rest = {"classes": 3, "about": ABOUT, "options": QUICK}
    (good,) = cas_scores(fake, asked, train, train_labels, real, truth, **rest)
    assert good.value > 0.9 and good.ceiling > 0.9 and good.floor < good.value - 0.2
    noise = torch.randint(0, 256, fake.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (bad,) = cas_scores(noise, asked, train, train_labels, real, truth, **rest)
    assert bad.value < 0.7 and bad.ceiling == good.ceiling


def test_the_classifier_is_kept_and_a_damaged_one_is_trained_again(tmp_path, monkeypatch):
    data, said = Colours(), []
    first = cached_classifier(data, tmp_path, about=ABOUT, options=QUICK, say=said.append)
    second = cached_classifier(data, tmp_path, about=ABOUT, options=QUICK, say=said.append)
    assert first.fingerprint == second.fingerprint and len(said) == 1
    (folder,) = tmp_path.iterdir()
    weights = folder / "classifier.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(CheckpointError, match="sha256"):
        load_classifier(folder)
    third = cached_classifier(data, tmp_path, about=ABOUT, options=QUICK, say=said.append)
    assert third.fingerprint == first.fingerprint and "training it again" in said[1]
    cached_classifier(data, tmp_path, about=ABOUT, options=ClassifierOptions(**{**QUICK.__dict__, "steps": 2}))
    assert len(list(tmp_path.iterdir())) == 2


def test_training_leaves_the_global_random_state(judge):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    train_classifier(*colours(8), 3, options=ClassifierOptions(steps=1, size=16, width=4))
    assert torch.equal(torch.rand(1), expected)


def test_unfit_pictures_are_refused(judge):
    with pytest.raises(ShapeError, match="takes"):
        judge.predict(torch.zeros(2, 1, 16, 16))
    with pytest.raises(DataError, match="at least 2"):
        train_classifier(torch.zeros(1, 3, 16, 16), torch.zeros(1, dtype=torch.int64), 2)


@pytest.mark.parametrize(
    ("side", "scales"), [(11, 1), (16, 1), (32, 2), (64, 3), (128, 4), (175, 4), (176, 5), (256, 5)]
)
def test_scales_keep_a_full_window(side, scales):
    assert scales_for(side) == scales


def test_ms_ssim_of_the_same_picture_is_one_and_falls_with_noise():
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(1))
    values = [float(ms_ssim(picture, (picture + s * noise).clamp(-1, 1))) for s in (0, 0.1, 0.5, 2)]
    assert values[0] == pytest.approx(1, abs=1e-9) and values == sorted(values, reverse=True)
    with pytest.raises(ShapeError, match="11 px"):
        ms_ssim(picture[..., :8, :8], picture[..., :8, :8])


def pair(side):
    draw = torch.Generator().manual_seed(0)
    a = torch.randint(0, 256, (2, 1, side, side), generator=draw, dtype=torch.uint8)
    return a, (a.float() * 0.7 + torch.rand(a.shape, generator=draw) * 60).round().to(torch.uint8)


def test_one_scale_equals_kornia():
    from kornia.metrics import ssim

    a, b = pair(21)
    theirs = ssim(a.double() / 255, b.double() / 255, 11, padding="valid").mean((1, 2, 3))
    torch.testing.assert_close(ms_ssim(a, b), theirs, atol=1e-6, rtol=0)


@pytest.mark.skipif(importlib.util.find_spec("torchmetrics") is None, reason="torchmetrics is not installed")
def test_scales_are_composed_of_torchmetrics_contrasts_and_kornias_last_similarity():
    """Not torchmetrics' own product: its coarsest scale also takes windows that reach over a reflected border."""
    from kornia.metrics import ssim
    from torchmetrics.functional.image import structural_similarity_index_measure

    from condgen.metrics.diversity import WEIGHTS

    a, b = pair(64)
    x, y, expected = a.double() / 255, b.double() / 255, 1
    for weight in WEIGHTS[:2]:
        _, contrast = structural_similarity_index_measure(
            x, y, data_range=1.0, reduction="none", return_contrast_sensitivity=True
        )
        expected = expected * contrast ** (weight / sum(WEIGHTS[:3]))
        x, y = torch.nn.functional.avg_pool2d(x, 2), torch.nn.functional.avg_pool2d(y, 2)
    last = ssim(x, y, 11, padding="valid").mean((1, 2, 3))
    torch.testing.assert_close(ms_ssim(a, b), expected * last ** (WEIGHTS[2] / sum(WEIGHTS[:3])), atol=1e-5, rtol=0)


def test_a_collapsed_class_is_seen_where_it_is():
    fake, asked = colours(18, seed=2)
    real, truth = colours(18, seed=1)
    fake[asked == 1] = fake[1].clone()  # one picture for the whole class
    scores = {s.name: s for s in diversity_scores(fake, asked, real, truth, names="abc", about=ABOUT)}
    assert scores["ms_ssim/b"].value == pytest.approx(1)
    assert scores["ms_ssim/a"].value < 0.9 and scores["ms_ssim/a"].floor == 1
    mean = sum(scores[f"ms_ssim/{n}"].value for n in "abc") / 3
    assert scores["ms_ssim"].value == pytest.approx(mean) and not scores["ms_ssim"].higher_is_better
    assert "scales=1" in scores["ms_ssim"].signature
    with pytest.raises(DataError, match="num_samples"):
        diversity_scores(fake[:1], asked[:1], real, truth, about=ABOUT)
