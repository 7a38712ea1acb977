"""CUB-200-2011 as published: splits by class, captions, box and parts on their pixels, and what is refused."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from condgen import rng
from condgen.data.base import BatchDataset
from condgen.data.cub import FLIP_PAIRS, PARTS, Cub
from condgen.errors import ConfigError, DataError

W, H = 100, 80
CLASSES = [f"{i:03d}.{name}" for i, name in enumerate(["Red_Bird", "Sooty_Tern", "Wren", "Jay"], 1)]
BEAK, LEFT_EYE, RIGHT_EYE = (60, 30), (20, 20), (80, 20)
ALL = "captions+labels+boxes+parts"


def write(root: Path, *, text: str = "cvpr2016_cub/text_c10", lists: str = "cvpr2016_cub", bare: bool = False) -> Path:
    """Four classes of two pictures; the boxes cover a red block, the eyes are green and blue."""
    top = root if bare else root / "CUB_200_2011"
    (top / "parts").mkdir(parents=True)
    (top / "classes.txt").write_text("".join(f"{i} {c}\n" for i, c in enumerate(CLASSES, 1)))
    images, labels, boxes, split, parts = [], [], [], [], []
    for at in range(8):
        ident, name = at + 1, f"{CLASSES[at // 2]}/{CLASSES[at // 2][4:]}_{at:04d}_{at * 7}.jpg"
        pixels = np.zeros((H, W, 3), np.uint8)
        pixels[24:60, 44:70, 0] = 255
        for colour, (x, y) in ((1, LEFT_EYE), (2, RIGHT_EYE)):
            pixels[y - 4 : y + 5, x - 4 : x + 5, colour] = 255
        picture = Image.fromarray(pixels)
        (top / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        picture = picture.convert("L") if at == 3 else picture  # some real ones are greyscale
        picture.save(top / "images" / name, quality=95, **({} if at == 3 else {"subsampling": 0}))
        picture.save(top / "images" / name.replace(".jpg", "_rgb.jpg"))  # not in images.txt: must be ignored
        folder = root / text / CLASSES[at // 2]
        folder.mkdir(parents=True, exist_ok=True)
        lines = b"".join(b"bird %d line %d\n" % (ident, i) for i in range(10))
        (folder / (Path(name).stem + ".txt")).write_bytes(b"\n" + lines.replace(b"line 9", b"caf\xe9"))
        images.append(f"{ident} {name}\n")
        labels.append(f"{ident} {at // 2 + 1}\n")
        boxes.append(f"{ident} 44.0 24.0 26.0 36.0\n")
        split.append(f"{ident} {at % 2}\n")
        for part in range(1, 16):
            x, y, seen = {2: (*BEAK, 1), 7: (*LEFT_EYE, 1), 11: (*RIGHT_EYE, 1)}.get(part, (0.0, 0.0, 0))
            parts.append(f"{ident} {part} {x} {y} {seen}\n")
    for name, lines in (
        ("images", images), ("image_class_labels", labels), ("bounding_boxes", boxes), ("train_test_split", split)
    ):  # fmt: skip
        (top / f"{name}.txt").write_text("".join(lines))
    (top / "parts" / "part_locs.txt").write_text("".join(parts))
    for name, at in (("train", [0]), ("val", [1]), ("trainval", [0, 1]), ("test", [2, 3])):
        (root / lists / f"{name}classes.txt").write_text("".join(CLASSES[i] + "\n" for i in at))
    return root


@pytest.mark.parametrize(
    ("text", "lists", "bare"),
    [
        ("cvpr2016_cub/text_c10", "cvpr2016_cub", False),
        ("text_c10", ".", False),
        ("text_c10/text", ".", True),
        ("birds/text_c10", "birds", False),
    ],
)
def test_layouts(tmp_path: Path, text: str, lists: str, bare: bool) -> None:
    data = Cub(root=str(write(tmp_path, text=text, lists=lists, bare=bare)), size=24)
    assert (len(data), data.key(0)) == (4, "1")
    row = data.sample(2, None)
    assert (row.caption, row.label, row.target.shape) == ("bird 3 line 0", 1, (3, 24, 24))
    assert data.provides.label.names == ("Red Bird", "Sooty Tern", "Wren", "Jay")
    assert len(data.captions()) == 40


def test_splits_are_disjoint_by_class_and_cover_what_they_say(tmp_path: Path) -> None:
    root = str(write(tmp_path))

    def labels(**options: str) -> list[int]:
        data = Cub(root=root, size=8, annotations="labels", **options)
        return [data.sample(i, None).label for i in range(len(data))]

    assert (labels(), labels(split="test")) == ([0, 0, 1, 1], [2, 2, 3, 3])
    parts = [set(labels(split=s, splits="zero_shot_val")) for s in ("train", "val", "test")]
    assert parts == [{0}, {1}, {2, 3}]
    assert labels(splits="official") == labels(splits="official", split="test") == [0, 1, 2, 3]
    for splits in ("zero_shot", "official"):
        with pytest.raises(ConfigError, match="zero_shot_val"):
            labels(splits=splits, split="val")


def test_captions_are_averaged_in_fours_with_replacement(tmp_path: Path) -> None:
    data = Cub(root=str(write(tmp_path)), size=8, captions_per_image=4)
    drawn = [data.sample(0, rng.generator(e)).caption.split("\n") for e in range(60)]
    assert {len(lines) for lines in drawn} == {4}
    assert any(len(set(lines)) < 4 for lines in drawn)  # with replacement, as Reed et al.
    assert {line for lines in drawn for line in lines} == {f"bird 1 line {i}" for i in range(9)} | {"bird 1 caf\ufffd"}
    assert set(data.captions()) >= {line for lines in drawn for line in lines}


@pytest.mark.parametrize("options", [{}, {"crop": "box"}, {"resize": "crop"}, {"resize": "pad"}])
def test_box_and_parts_stay_on_their_pixels(tmp_path: Path, options: dict) -> None:
    data = Cub(root=str(write(tmp_path)), size=64, annotations=ALL, **options)
    mirrored = 0
    for epoch in range(20):
        row = data.sample(0, rng.generator(epoch))
        red, green, blue = (row.target[c] > 128 for c in range(3))
        if row.target.float().mean(0).max() > 200:  # padding is white
            white = row.target.amin(0) > 128
            red, green, blue = red & ~white, green & ~white, blue & ~white
        rows, columns = red.any(1).nonzero()[:, 0], red.any(0).nonzero()[:, 0]
        found = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / 64
        assert (row.boxes[0] - found).abs().max() < 2.1 / 64
        for part, mask, other in ((6, green, blue), (10, blue, green)):
            if row.visible[part]:
                x, y = (row.keypoints[part] * 64).long().clamp(0, 63).tolist()
                assert bool(mask[y, x]) != bool(other[y, x])
                mirrored += bool(other[y, x])
        assert row.visible[1]
        x, y = (row.keypoints[1] * 64).long().clamp(0, 63).tolist()
        assert red[y, x]
        assert not row.visible[[0, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 14]].any()
    assert mirrored > 5 or options.get("crop") == "box"


def test_as_released_a_mirror_leaves_the_left_eye_where_it_was_painted(tmp_path: Path) -> None:
    data = Cub(root=str(write(tmp_path)), size=64, annotations=ALL, swap_on_flip=False)
    right = 0
    for epoch in range(20):
        row = data.sample(0, rng.generator(epoch))
        if row.visible[6]:
            x, y = (row.keypoints[6] * 64).long().clamp(0, 63).tolist()
            assert row.target[1, y, x] > 128  # the green eye, on whichever side it is now
            right += x > 32
    assert right > 4


def test_the_crop_is_a_square_of_one_and_a_half_boxes(tmp_path: Path) -> None:
    data = Cub(root=str(write(tmp_path)), size=60, load_size=60, annotations="boxes", crop="box", flip=False)
    box = data.sample(0, None).boxes[0]
    # box 44..70 x 24..60: the square is 57 +- 27 by 42 +- 27, inside the picture
    assert torch.allclose(box, torch.tensor([14 / 54, 9 / 54, 40 / 54, 45 / 54]), atol=1e-5)


def test_parts_have_the_published_order() -> None:
    assert (len(PARTS), PARTS[0], PARTS[14]) == (15, "back", "throat")
    assert all(PARTS[a].replace("left", "right") == PARTS[b] for a, b in FLIP_PAIRS)


def test_the_fingerprint_follows_captions_and_tables(tmp_path: Path) -> None:
    root = write(tmp_path)
    before = Cub(root=str(root)).fingerprint
    assert Cub(root=str(root)).fingerprint == before
    next((root / "cvpr2016_cub" / "text_c10").glob("001*/*.txt")).write_text("edited\n")
    assert Cub(root=str(root)).fingerprint != before


def test_greyscale_pictures_and_batches(tmp_path: Path) -> None:
    data = Cub(root=str(write(tmp_path)), size=16, annotations=ALL)
    assert data.sample(3, None).target.shape == (3, 16, 16)
    loaded = BatchDataset(data, data.provides, batch_size=4, seed=0)[0]
    assert not loaded.quarantined
    loaded.batch.condition.check_values()
    assert loaded.batch.condition.given == ("label", "text", "boxes", "keypoints")


@pytest.mark.parametrize("name", ["x.t7", "char-CNN-RNN-embeddings.pickle", "x.h5"])
def test_torch_files_and_pickles_are_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    shutil.rmtree(tmp_path / "cvpr2016_cub" / "text_c10")
    (tmp_path / "cvpr2016_cub" / "text_c10").mkdir()
    (tmp_path / "cvpr2016_cub" / "text_c10" / name).write_bytes(b"x")
    with pytest.raises(DataError, match=rf"(?s){re.escape(name)}.*Use the text files"):
        Cub(root=str(tmp_path))


def test_one_missing_or_empty_caption_file_is_one_bad_row(tmp_path: Path) -> None:
    files = sorted((write(tmp_path) / "cvpr2016_cub" / "text_c10").glob("*/*.txt"))
    files[0].unlink()
    files[1].write_text("\n \n")
    data = Cub(root=str(tmp_path), size=8)
    for index, reason in ((0, "every picture needs"), (1, "no sentence")):
        with pytest.raises(DataError, match=reason):
            data.sample(index, None)
    loaded = BatchDataset(data, data.provides, batch_size=4, seed=0)[0]
    assert {q.key for q in loaded.quarantined} == {"1", "2"}
    assert len(data.captions()) == 20


@pytest.mark.parametrize(
    ("file", "old", "new", "reason"),
    [
        ("image_class_labels.txt", "1 1\n", "1 5\n", r"image 1: class 5 .* 1\.\.4"),
        ("image_class_labels.txt", "1 1\n", "1 0\n", r"class 0"),
        ("image_class_labels.txt", "1 1\n", "", r"image 1"),
        ("image_class_labels.txt", "1 1\n", "1 x\n", r"line 1"),
        ("images.txt", "1 001", "1 ../001", r"line 1.*leaves its folder"),
        ("images.txt", "2 ", "two ", r"line 2"),
        ("bounding_boxes.txt", "26.0 36.0\n2", "26.0\n2", r"line 1.*4 numbers"),
        ("parts/part_locs.txt", "1 2 60", "1 16 60", r"line 2.*1\.\.15"),
        ("classes.txt", "1 001", "one 001", r"classes.txt line 1"),
    ],
)
def test_bad_tables_name_their_line(tmp_path: Path, file: str, old: str, new: str, reason: str) -> None:
    path = write(tmp_path) / "CUB_200_2011" / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=reason):
        Cub(root=str(tmp_path), annotations=ALL)


@pytest.mark.parametrize(
    ("table", "line", "reason"),
    [
        ("bounding_boxes.txt", "1 nan 2 3 4", "not finite"),
        ("bounding_boxes.txt", "1 1 2 -3 4", "negative"),
        ("parts/part_locs.txt", "1 2 nan 5 1", "not finite"),
    ],
)
def test_bad_numbers_are_bad_rows(tmp_path: Path, table: str, line: str, reason: str) -> None:
    path = write(tmp_path) / "CUB_200_2011" / table
    with path.open("a") as file:
        file.write(line + "\n")
    data = Cub(root=str(tmp_path), size=8, annotations=ALL)
    with pytest.raises(DataError, match=reason):
        data.sample(0, None)


def test_folders_may_be_links_but_files_may_not_lead_out(tmp_path: Path) -> None:
    top = write(tmp_path / "data") / "CUB_200_2011"
    (top / "images").rename(tmp_path / "disk")
    (top / "images").symlink_to(tmp_path / "disk")
    data = Cub(root=str(tmp_path / "data"), size=8)
    data.sample(0, None)
    picture = next((tmp_path / "disk" / CLASSES[0]).glob("*_0000_0.jpg"))
    picture.rename(tmp_path / "secret.jpg")
    picture.symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(DataError, match="leads out"):
        data.sample(0, None)


def test_class_lists_must_exist_be_known_and_share_nothing(tmp_path: Path) -> None:
    lists = write(tmp_path) / "cvpr2016_cub"
    (lists / "trainvalclasses.txt").unlink()
    assert len(Cub(root=str(tmp_path))) == 4  # train + val
    (lists / "testclasses.txt").write_text(CLASSES[0] + "\n")
    with pytest.raises(DataError, match="in both the train and the test list"):
        Cub(root=str(tmp_path))
    (lists / "testclasses.txt").write_text("009.Dodo\n")
    with pytest.raises(DataError, match="Dodo"):
        Cub(root=str(tmp_path), split="test")
    (lists / "testclasses.txt").unlink()
    with pytest.raises(DataError, match=r"testclasses\.txt not found"):
        Cub(root=str(tmp_path))


def test_wrong_options_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"images\.txt"):
        Cub(root=str(tmp_path))
    write(tmp_path)
    for options in ({"splits": "x"}, {"split": "x"}, {"crop": "x"}, {"annotations": "x"}, {"captions_per_image": 0}):
        with pytest.raises(ConfigError):
            Cub(root=str(tmp_path), **options)
