"""Pairs: every layout, what is wrong with a folder and how it is said, one geometry for both pictures."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from condgen.data.base import BatchDataset, collate
from condgen.data.pairs import Pairs
from condgen.errors import ConfigError, DataError
from condgen.types import ImageSpec

RED, BLUE = (200, 10, 20), (10, 20, 200)


def paint(path: Path, colour: object = RED, size: tuple[int, int] = (20, 16), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new(mode, size, colour).save(path)
    return path


def joined(path: Path, size: tuple[int, int] = (20, 16)) -> Path:
    whole = PIL.Image.new("RGB", (2 * size[0], size[1]), BLUE)
    whole.paste(RED, (0, 0, *size))
    path.parent.mkdir(parents=True, exist_ok=True)
    whole.save(path)
    return path


def two_folders(root: Path, names=("1", "2", "3")) -> Path:
    for name in names:
        paint(root / "A" / f"{name}.png")
        paint(root / "B" / f"{name}.jpg", BLUE)
    return root


def pairs(root: Path, **options) -> Pairs:
    return Pairs(**{"root": str(root), "size": 8, "split": "all", **options})


def colours(sample) -> tuple[str, str]:
    return tuple("red" if x[0].float().mean() > x[2].float().mean() else "blue" for x in (sample.image, sample.target))


# layouts


def test_two_folders_whose_suffixes_differ(tmp_path):
    data = pairs(two_folders(tmp_path))
    assert [data.key(i) for i in range(len(data))] == ["1", "2", "3"]
    row = data.sample(0, None)
    assert row.image.shape == row.target.shape == (3, 8, 8) and row.image.dtype == torch.uint8
    assert colours(row) == ("red", "blue")
    assert colours(pairs(tmp_path, direction="BtoA").sample(0, None)) == ("blue", "red")
    assert data.fingerprint != pairs(tmp_path, direction="BtoA").fingerprint


@pytest.mark.parametrize("form", ["A/{s}/{n}.png", "{s}/A/{n}.png", "{s}A/{n}.png"])
def test_split_folders_inside_outside_and_as_one_word(tmp_path, form):
    for split, count in (("train", 3), ("val", 2)):
        for n in range(count):
            paint(tmp_path / form.format(s=split, n=n))
            paint(tmp_path / form.replace("A", "B").format(s=split, n=n), BLUE)
    assert [len(pairs(tmp_path, split=s)) for s in ("train", "val", "test", "all")] == [3, 2, 2, 5]
    assert pairs(tmp_path, split="train").key(0) == "train/0"
    assert colours(pairs(tmp_path).sample(4, None)) == ("red", "blue")


@pytest.mark.parametrize("split", ["", "train/"])
def test_joined_pictures(tmp_path, split):
    for n in range(3):
        joined(tmp_path / f"{split}{n}.png")
    assert colours(pairs(tmp_path).sample(0, None)) == ("red", "blue")
    assert colours(pairs(tmp_path, direction="BtoA").sample(0, None)) == ("blue", "red")
    row = pairs(tmp_path, source_channels=1).sample(0, None)
    assert row.image.shape == (1, 8, 8) and row.target.shape == (3, 8, 8)


def test_without_split_folders_a_hash_splits_and_no_pair_is_in_both(tmp_path):
    two_folders(tmp_path, [str(n) for n in range(40)])
    train, test = (pairs(tmp_path, split=s) for s in ("train", "test"))
    keys = [{d.key(i) for i in range(len(d))} for d in (train, test)]
    assert not keys[0] & keys[1] and len(keys[0] | keys[1]) == 40 and 1 <= len(test) <= 12
    few = two_folders(tmp_path / "few", ["w", "x", "y", "z"])
    assert len(pairs(few, split="test")) == 2 == len(pairs(few, split="train"))  # a small folder can be scored


def test_grey_source_and_16_bits(tmp_path):
    paint(tmp_path / "A/1.png", 90, mode="L")
    deep = np.full((16, 20), 40_000, np.uint16)
    (tmp_path / "B").mkdir()
    PIL.Image.fromarray(deep).save(tmp_path / "B/1.png")
    data = pairs(tmp_path)
    row = data.sample(0, None)
    assert data.provides.image.channels == data.target.channels == 1
    assert row.target.dtype == torch.float32 and row.image.dtype == torch.uint8
    torch.testing.assert_close(row.target, torch.full((1, 8, 8), 40_000 / 32767.5 - 1))


# what is wrong, said


def test_unpaired_names(tmp_path):
    two_folders(tmp_path)
    paint(tmp_path / "A/only_here.png")
    with pytest.raises(DataError, match=r"1 pictures have no partner.*A/only_here.*data.unpaired=skip"):
        pairs(tmp_path)
    assert len(pairs(tmp_path, unpaired="skip")) == 3
    paint(tmp_path / "A/1.jpg")
    with pytest.raises(DataError, match=r"A has two pictures named 1: 1\.jpg and 1\.png"):
        pairs(tmp_path, unpaired="skip")


def test_different_sizes(tmp_path):
    two_folders(tmp_path)
    paint(tmp_path / "B/2.jpg", BLUE, (30, 16))
    with pytest.raises(DataError, match=r"1 of 3 pairs .* 2: A has 20 x 16 pixels and B 30 x 16; .*data.broken=skip"):
        pairs(tmp_path)
    data = pairs(tmp_path, broken="skip")
    with pytest.raises(DataError, match="2: A has 20 x 16 pixels and B 30 x 16; .* one size"):
        data.sample(1, None)
    data.sample(0, None)  # the other rows are used
    for name in "13":
        paint(tmp_path / f"B/{name}.jpg", BLUE, (30, 16))
    with pytest.raises(DataError, match=r"3 of 3 pairs cannot be used. 1, 2, 3: A has 20 x 16.*place$"):
        pairs(tmp_path)
    with pytest.raises(DataError, match="none of the first 3 pairs can be used. 1: A has 20 x 16"):
        pairs(tmp_path, broken="skip")


def test_one_empty_or_missing_folder_and_nothing_at_all(tmp_path):
    paint(tmp_path / "A/1.png")
    with pytest.raises(DataError, match="the folder B is missing"):
        pairs(tmp_path)
    (tmp_path / "B").mkdir()
    with pytest.raises(DataError, match="the folder B holds no picture"):
        pairs(tmp_path)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="holds no pairs; give joined pictures"):
        pairs(tmp_path / "nothing")
    with pytest.raises(DataError, match="is not a folder"):
        pairs(tmp_path / "typo")


def test_a_palette_png(tmp_path):
    for n in "12":
        paint(tmp_path / f"A/{n}.png").unlink()
        PIL.Image.new("RGB", (20, 16), RED).convert("P").save(tmp_path / f"A/{n}.png")
        paint(tmp_path / f"B/{n}.png", BLUE)
    with pytest.raises(DataError, match=r"A/1.png, A/2.png: a palette picture.*data.palette=colours"):
        pairs(tmp_path)
    assert colours(pairs(tmp_path, palette="colours").sample(0, None)) == ("red", "blue")


def test_a_truncated_jpeg_is_quarantined_with_its_reason(tmp_path):
    two_folders(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (16, 20, 3), np.uint8)
    PIL.Image.fromarray(noise).save(tmp_path / "B/2.jpg")
    whole = (tmp_path / "B/2.jpg").read_bytes()
    (tmp_path / "B/2.jpg").write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(DataError, match=r"B/2.jpg: it cannot be decoded: .*truncated.*broken=skip"):
        pairs(tmp_path)
    data = pairs(tmp_path, broken="skip")
    with pytest.raises(DataError, match=r"B/2.jpg: it cannot be decoded: .*truncated"):
        data.sample(1, None)
    loaded = BatchDataset(data, data.provides, batch_size=3, seed=0)[0]
    assert [q.key for q in loaded.quarantined] == ["2"] and len(loaded.batch) == 3


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_bytes_behind_the_end_of_a_picture_are_no_damage(tmp_path, suffix):
    two_folders(tmp_path, ["1"])
    (tmp_path / "A/1.png").unlink()
    file = paint(tmp_path / f"A/1.{suffix}")
    file.write_bytes(file.read_bytes() + b"appended by a camera")
    assert len(pairs(tmp_path)) == 1
    file.write_bytes(file.read_bytes()[:-60])
    with pytest.raises(DataError, match=f"A/1.{suffix}: it cannot be decoded"):
        pairs(tmp_path)


def test_a_joined_picture_of_odd_width(tmp_path):
    paint(tmp_path / "1.png", size=(41, 16))
    with pytest.raises(DataError, match="41 pixels wide; a joined pair"):
        pairs(tmp_path)


@pytest.mark.parametrize("options", [{"split": "dev"}, {"load_size": 4}])
def test_options_that_cannot_be(tmp_path, options):
    with pytest.raises(ConfigError):
        pairs(two_folders(tmp_path), **options)


# geometry


def test_jitter_and_mirror_move_both(tmp_path):
    """B is A's negative, pixel by pixel: it stays so under every augmentation."""
    (tmp_path / "A").mkdir()
    (tmp_path / "B").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "A/1.png")
    PIL.Image.fromarray(255 - pixels).save(tmp_path / "B/1.png")
    data = pairs(tmp_path, size=16)
    assert data.load_size == 18  # 16 * 286 / 256
    views = [data.sample(0, torch.Generator().manual_seed(seed)) for seed in range(12)]
    for view in views:
        gap = view.image.int() + view.target.int() - 255
        assert gap.abs().max() <= 2  # the resize rounds each axis; another place would be off by hundreds
    assert len({view.image.numpy().tobytes() for view in views}) > 4
    plain = pairs(tmp_path, size=24, jitter=False)
    seen = [plain.sample(0, torch.Generator().manual_seed(seed)).image.flip(-1) for seed in range(12)]
    assert 2 < sum(np.array_equal(x.permute(1, 2, 0).numpy(), pixels) for x in seen) < 10  # about half are mirrored
    assert torch.equal(data.sample(0, None).image, data.sample(0, None).image)


def test_label_maps_keep_their_colours(tmp_path):
    (tmp_path / "A").mkdir()
    palette = np.array([(0, 0, 170), (0, 85, 255), (255, 85, 0)], np.uint8)
    ids = np.random.default_rng(0).integers(0, 3, (20, 20))
    PIL.Image.fromarray(palette[ids]).save(tmp_path / "A/1.png")
    paint(tmp_path / "B/1.png", BLUE, (20, 20))
    known = {tuple(c) for c in palette.tolist()}

    def found(how):
        data = pairs(tmp_path, size=16, source_resample=how)
        return {tuple(c) for c in data.sample(0, torch.Generator().manual_seed(0)).image.flatten(1).T.tolist()}

    assert found("nearest") == known and found("area") - known


# class numbers


def numbered(root: Path, numbers: np.ndarray, form: str = "P", name: str = "A/1.png") -> Path:
    """Numbers as a palette picture (P), 8-bit grey (L) or 16-bit grey (I;16), and a picture beside them."""
    (root / "A").mkdir(exist_ok=True)
    paint(root / "B/1.jpg", BLUE, numbers.shape[::-1])
    if form == "I;16":
        picture = PIL.Image.fromarray(numbers.astype(np.uint16))
    else:
        picture = PIL.Image.fromarray(numbers.astype(np.uint8))
    if form == "P":
        picture.putpalette([(7 * i) % 256 for i in range(768)])
    picture.save(root / name)
    return root


@pytest.mark.parametrize("form", ["P", "L", "I;16"])
def test_class_numbers_become_one_channel_each_and_never_mix(tmp_path, form):
    ids = np.random.default_rng(0).integers(0, 5, (20, 24))
    data = pairs(numbered(tmp_path, ids, form), source_classes=5, size=24, resize="stretch")
    assert data.provides.image == ImageSpec(5, 24, 24, classes=5) and data.target.channels == 3
    whole = data.sample(0, None).image
    assert whole.dtype == torch.uint8 and whole.shape == (5, 24, 24)
    back = pairs(tmp_path, source_classes=5, size=20, resize="crop", jitter=False).sample(0, None).image.argmax(0)
    assert np.array_equal(back.numpy(), ids[:, 2:22])  # the numbers themselves, in their places
    for seed in range(4):  # under jitter and mirror every pixel still has exactly one class
        image = data.sample(0, torch.Generator().manual_seed(seed)).image
        assert ((image == 0) | (image == 255)).all() and ((image == 255).sum(0) == 1).all()


def test_numbers_that_are_no_class_are_said(tmp_path):
    ids = np.zeros((8, 8))
    ids[0, :3], ids[1, 1] = 255, 9
    with pytest.raises(DataError, match=r"A/1.png: 4 of 64 pixels hold no class: there is 255, .*0\.\.8 .*void"):
        pairs(numbered(tmp_path, ids), source_classes=9).sample(0, None)
    with pytest.raises(ConfigError, match=r"source_classes=N.*the first 1 hold numbers up to 255"):
        pairs(tmp_path, palette="numbers")
    for options in ({"source_classes": 1}, {"source_classes": 4, "source_channels": 3}):
        with pytest.raises(ConfigError, match="2 classes or more"):
            pairs(tmp_path, **options)


def test_pictures_that_hold_no_numbers_are_said(tmp_path):
    numbered(tmp_path, np.zeros((16, 20)), "L", "A/1.jpg")
    with pytest.raises(DataError, match="JPEG, whose compression changes them"):
        pairs(tmp_path, source_classes=3).sample(0, None)
    (tmp_path / "A/1.jpg").unlink()
    paint(tmp_path / "A/1.png")
    with pytest.raises(DataError, match="PNG of kind RGB"):
        pairs(tmp_path, source_classes=3).sample(0, None)
    joined(tmp_path / "joined/1.png")
    with pytest.raises(DataError, match="folders A and B"):
        pairs(tmp_path / "joined", source_classes=3)


def test_palette_means_numbers_in_sources_and_colours_in_targets(tmp_path):
    numbered(tmp_path, np.ones((16, 20)))
    (tmp_path / "B/1.jpg").unlink()
    PIL.Image.new("RGB", (20, 16), BLUE).convert("P").save(tmp_path / "B/1.png")
    with pytest.raises(DataError, match=r"B/1.png: a palette picture"):
        pairs(tmp_path, source_classes=3)
    row = pairs(tmp_path, source_classes=3, palette="colours").sample(0, None)
    assert bool((row.image[1] == 255).all()) and row.target.shape[0] == 3
    turned = pairs(tmp_path, source_classes=256, palette="colours", direction="BtoA").sample(0, None)
    assert turned.image.shape[0] == 256  # B is the source now


def test_16_bit_grey_is_scaled_from_0_to_65535(tmp_path):
    (tmp_path / "A").mkdir()
    deep = np.array([[0, 65535], [32768, 1]], np.uint16).repeat(8, 0).repeat(8, 1)
    PIL.Image.fromarray(deep).save(tmp_path / "A/1.png")
    paint(tmp_path / "B/1.png", BLUE, (16, 16))
    image = pairs(tmp_path, size=16, jitter=False).sample(0, None).image
    assert image.dtype == torch.float32 and image.shape == (1, 16, 16)
    expected = torch.tensor([[-1.0, 1.0], [32768 / 32767.5 - 1, 1 / 32767.5 - 1]])
    torch.testing.assert_close(image[0, ::8, ::8], expected, atol=1e-7, rtol=0)


def test_rows_make_a_batch(tmp_path):
    data = pairs(two_folders(tmp_path))
    batch = collate([data.sample(i, None) for i in range(3)], data.provides)
    assert batch.condition.image.pixels.shape == batch.target.shape == (3, 3, 8, 8)
