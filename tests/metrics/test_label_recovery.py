"""Label recovery: which sources are label maps, what their classes are, and scores between their ends."""

import PIL.Image
import pytest
import torch

from condgen.data.base import RowDataset
from condgen.data.decode import decode_image, one_hot
from condgen.errors import DataError
from condgen.metrics.label_recovery import (
    IGNORED,
    Labels,
    SegmenterOptions,
    cached_segmenter,
    figures,
    find_labels,
    find_palette,
    histograms,
    label_scores,
    load_mapped,
    train_segmenter,
)
from condgen.types import ConditionSpec, ImageSpec, Sample, TargetSpec

SIDE = 32
PALETTE = torch.tensor([(0, 0, 170), (0, 85, 255), (255, 85, 0), (170, 0, 0)], dtype=torch.uint8)
TEXTURE = torch.tensor([(60, 60, 60), (120, 140, 110), (200, 190, 180), (30, 110, 40)], dtype=torch.uint8)
QUICK = SegmenterOptions(steps=60, width=6, size=SIDE, batch_size=8, lr=1e-2)


def numbers(row: int) -> torch.Tensor:
    """Blocks of class numbers (SIDE, SIDE)."""
    blocks = torch.randint(0, 4, (4, 4), generator=torch.Generator().manual_seed(row))
    return blocks.repeat_interleave(SIDE // 4, 0).repeat_interleave(SIDE // 4, 1)


def painted(ids: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    return colours[ids].permute(2, 0, 1)


class Maps(RowDataset):
    """Label maps and pictures in which every class has a colour of its own, with noise."""

    target = TargetSpec(3, SIDE, SIDE)

    def __init__(self, rows: int = 24, start: int = 0, source=lambda ids: painted(ids, PALETTE), classes: int = 0):
        self.rows, self.start, self.source = rows, start, source
        self.provides = ConditionSpec(image=ImageSpec(len(source(numbers(0))), SIDE, SIDE, classes=classes))

    def __len__(self):
        return self.rows

    def key(self, index):
        return str(self.start + index)

    def sample(self, index, random):
        ids = numbers(self.start + index)
        noise = torch.randint(-30, 31, (3, SIDE, SIDE), generator=torch.Generator().manual_seed(1000 + index))
        picture = (painted(ids, TEXTURE).int() + noise).clamp(0, 255).to(torch.uint8)
        return Sample(self.key(index), picture, image=self.source(ids))


def stacked(data):
    rows = [data.sample(i, None) for i in range(len(data))]
    return torch.stack([r.image for r in rows]), torch.stack([r.target for r in rows])


def test_colours_that_jpeg_scattered_are_merged_and_found(tmp_path):
    """The palette comes back within a few levels, in order of frequency, from maps that went through JPEG."""

    def through_jpeg(ids):
        PIL.Image.fromarray(PALETTE[ids].numpy()).save(tmp_path / "m.jpg", quality=75)
        return decode_image(tmp_path / "m.jpg")

    data = Maps(source=through_jpeg)
    labels = find_labels(data)
    assert labels is not None and labels.count == 4
    gaps = torch.cdist(PALETTE.float(), labels.palette.float())
    assert (gaps.min(1).values < 12).all() and len(set(gaps.argmin(1).tolist())) == 4
    maps, _ = stacked(data)
    found, truth = labels.of(maps), torch.stack([numbers(i) for i in range(24)])
    order = gaps.argmin(1)  # class of PALETTE -> class found
    good = found != IGNORED
    assert float(good.double().mean()) > 0.75  # the rest lies on borders, between two colours
    assert float((found == order[truth])[good].double().mean()) > 0.99


def ramp(ids):
    return (torch.arange(SIDE) * 8)[None, :].expand(SIDE, SIDE)[None].expand(3, -1, -1).to(torch.uint8).clone()


def drawing(ids):
    """Black lines on white."""
    out = torch.full((3, SIDE, SIDE), 255, dtype=torch.uint8)
    out[:, 8:12] = 0
    return out


def photo(ids):
    big = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(int(ids.sum())))
    smooth = torch.nn.functional.interpolate(big, (SIDE, SIDE), mode="bilinear")[0]
    return (smooth * 255).to(torch.uint8)


@pytest.mark.parametrize("source", [ramp, drawing, photo])
def test_what_is_no_label_map_is_not_taken_for_one(source):
    assert find_labels(Maps(source=source)) is None


def test_sure_takes_what_there_is_and_says_when_there_is_nothing():
    assert find_labels(Maps(source=drawing), sure=True).count == 2
    with pytest.raises(DataError, match=r"eval.labels=on, but the sources hold 1 flat"):
        find_labels(Maps(source=lambda ids: torch.zeros(3, SIDE, SIDE, dtype=torch.uint8)), sure=True)


def test_rare_colours_and_mixtures_are_no_classes():
    colours = torch.cat([PALETTE.repeat_interleave(2000, 0), torch.tensor([[9, 250, 9]] * 3, dtype=torch.uint8)])
    palette, covered = find_palette(colours)
    assert {tuple(c) for c in palette.tolist()} == {tuple(c) for c in PALETTE.tolist()}
    assert covered == pytest.approx(8000 / 8003)
    labels = Labels(4, PALETTE)
    between = torch.tensor([85, 42, 128], dtype=torch.uint8)[None, :, None, None]  # of two classes
    assert labels.of(between).item() == IGNORED


def test_class_maps_bring_their_classes():
    data = Maps(source=lambda ids: one_hot(ids, 6), classes=6)
    labels = find_labels(data)
    assert labels == Labels(6)
    maps, _ = stacked(data)
    assert torch.equal(labels.of(maps), torch.stack([numbers(i) for i in range(24)]))


def test_figures_are_those_of_one_global_histogram():
    """Two rows by hand: a mean over rows would give another class accuracy. Class 3, which is nowhere, counts not."""
    truth = torch.tensor([[[0, 0, 1, IGNORED]], [[1, 1, 1, 2]]])
    named = torch.tensor([[[0, 1, 1, 0]], [[1, 1, 0, 2]]])
    histogram = histograms(truth, named, 4).sum(0)
    assert histogram.sum() == 7
    pixel, each, iou = figures(histogram)
    assert pixel == pytest.approx(5 / 7)
    assert each == pytest.approx((1 / 2 + 3 / 4 + 1) / 3)
    assert iou == pytest.approx((1 / 3 + 3 / 5 + 1) / 3)


def test_outputs_that_keep_their_labels_score_and_shuffled_ones_do_not():
    train, test = Maps(), Maps(16, start=500)
    labels = find_labels(train)
    judge = train_segmenter(*load_mapped(train, labels, SIDE), labels.count, options=QUICK)
    source, real = stacked(test)
    flat = torch.full_like(real, 128)
    good, bad = (label_scores(judge, labels, x, real, source, about={"data": "toy"}) for x in (real, flat))
    assert [s.name for s in good] == ["label_pixel_accuracy", "label_class_accuracy", "label_iou"]
    for kept, lost in zip(good, bad, strict=True):
        assert kept.value == kept.ceiling > 0.85 and kept.floor < 0.45 and kept.error < 0.1
        assert lost.ceiling == kept.ceiling and lost.value < 0.45
    wrong = label_scores(judge, labels, real.roll(1, 0), real, source, about={"data": "toy"})[0]
    assert wrong.value < 0.45 and abs(wrong.floor - wrong.value) < 0.3


def test_a_segmenter_is_kept_and_a_damaged_one_trained_again(tmp_path):
    data, said = Maps(8), []
    labels = find_labels(data)

    def get(**more):
        options = SegmenterOptions(steps=2, width=4, size=16, batch_size=2)
        return cached_segmenter(data, labels, tmp_path, about={"data": "toy"}, options=options, say=said.append, **more)

    first = get()
    assert len(said) == 1 and "4 classes on 8 real pairs" in said[0]
    assert get().fingerprint == first.fingerprint and len(said) == 1
    assert get(seed=1).fingerprint != first.fingerprint and len(said) == 2
    for file in tmp_path.glob("*/*.safetensors"):
        file.write_bytes(b"damaged")
    assert get().fingerprint == first.fingerprint and "training it again" in said[2]
