"""COCO as published: counts, captions, boxes and points that stay on their pixels, and every kind of bad file."""

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from condgen import rng
from condgen.data.base import BatchDataset, collate
from condgen.data.coco import FLIP_PAIRS, POINTS, Coco
from condgen.errors import ConfigError, DataError

W, H = 96, 80
SHARED = Path(os.environ.get("CONDGEN_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")


def write(root: Path, *, year: str = "2014", part: str = "train", ids=(9, 25, 30), edit=None, folder: str = "") -> Path:
    """A data set of three pictures in the published layout; `edit` changes the three JSON trees before writing."""
    name = f"{part}{year}"
    images, captions, boxes, people = [], [], [], []
    for at, i in enumerate(ids):
        file = f"COCO_{name}_{i:012d}.jpg" if year == "2014" else f"{i:012d}.jpg"
        pixels = np.zeros((H, W, 3), np.uint8)
        pixels[30:50, 40:70, 0] = 255  # a red block that box 1 covers exactly
        for colour, (x, y) in ((1, (20, 16)), (2, (80, 16))):  # green = left eye, blue = right eye
            pixels[y - 4 : y + 5, x - 4 : x + 5, colour] = 255
        where = root / folder / name
        where.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(where / file, quality=95, subsampling=0)
        images.append({"id": i, "file_name": file, "width": W, "height": H, "license": 1})
        captions += [{"id": 10 * i + c, "image_id": i, "caption": f"caption {c} of {i}\n"} for c in range(5)]
        square = {"image_id": i, "iscrowd": 0, "segmentation": [[1, 2, 3, 4]]}
        boxes.append({**square, "id": i, "bbox": [40, 30, 30, 20], "category_id": 90, "area": 600})
        boxes.append({**square, "id": i + 1, "bbox": [0, 0, 90, 70], "category_id": 1, "area": 6300})
        boxes.append({**square, "id": i + 2, "bbox": [5, 5, 3, 3], "category_id": 3, "area": 9})  # below min_area
        boxes.append({**square, "id": i + 3, "bbox": [0, 0, 96, 80], "category_id": 1, "area": 1, "iscrowd": 1})
        points = [0.0] * 51
        points[3:9] = [20, 16, 2, 80, 16, 1]
        if at < 2:
            people.append({**square, "id": i, "category_id": 1, "keypoints": points, "area": 500, "bbox": [0, 0, 9, 9]})
            people.append({**square, "id": i + 1, "category_id": 1, "keypoints": [1, 1, 2] * 17, "area": 3})
    categories = [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 3, "name": "car"}]
    trees = {
        "captions": {"images": images, "annotations": captions},
        "instances": {"images": images, "annotations": boxes, "categories": categories},
        "person_keypoints": {"images": images, "annotations": people},
    }
    if edit is not None:
        edit(trees)
    (root / "annotations").mkdir(exist_ok=True)
    for kind, tree in trees.items():
        (root / "annotations" / f"{kind}_{name}.json").write_text(json.dumps(tree))
    return root


def centre(mask: torch.Tensor) -> tuple[float, float]:
    """Centre of a bool (H, W) mask in [0, 1] coordinates, x first."""
    y, x = mask.nonzero(as_tuple=True)
    return (x.float().mean().item() + 0.5) / mask.shape[1], (y.float().mean().item() + 0.5) / mask.shape[0]


@pytest.mark.parametrize(("year", "folder"), [("2014", ""), ("2017", ""), ("2017", "images"), ("", "")])
def test_published_layouts(tmp_path: Path, year: str, folder: str) -> None:
    data = Coco(root=str(write(tmp_path, year=year, folder=folder)), size=32)
    assert [data.key(i) for i in range(len(data))] == ["9", "25", "30"]
    row = data.sample(0, None)
    assert row.target.shape == (3, 32, 32)
    assert row.target.dtype == torch.uint8
    assert row.caption == "caption 0 of 9"  # the first, cleaned of its newline
    assert data.provides.given == ("text",)
    assert len(data.captions()) == 15


def test_test_reads_val_and_two_releases_must_be_chosen_from(tmp_path: Path) -> None:
    write(tmp_path, part="val", ids=(1, 2))
    assert len(Coco(root=str(tmp_path), split="test")) == len(Coco(root=str(tmp_path), split="val")) == 2
    write(tmp_path, part="val", year="2017", ids=(1,))
    with pytest.raises(ConfigError, match=r"data\.year"):
        Coco(root=str(tmp_path), split="val")
    assert len(Coco(root=str(tmp_path), split="val", year="2017")) == 1


def test_captions_are_drawn_without_replacement_and_known_beforehand(tmp_path: Path) -> None:
    data = Coco(root=str(write(tmp_path)), size=16, captions_per_image=3)
    seen = set()
    for epoch in range(40):
        lines = data.sample(1, rng.generator(epoch)).caption.split("\n")
        assert len(lines) == len(set(lines)) == 3
        assert set(lines) <= set(data.captions())
        seen.update(lines)
    assert seen == {f"caption {c} of 25" for c in range(5)}
    assert data.sample(1, None).caption.split("\n") == [f"caption {c} of 25" for c in range(3)]


def test_boxes_and_points_stay_on_their_pixels_under_crop_and_mirror(tmp_path: Path) -> None:
    data = Coco(root=str(write(tmp_path)), size=64, annotations="captions+instances+keypoints", load_size=90)
    assert (data.classes, len(data)) == (("person", "car", "toothbrush"), 2)
    flips = 0
    for epoch in range(24):
        row = data.sample(0, rng.generator(epoch))
        red, green, blue = (row.target[c] > 128 for c in range(3))
        assert row.box_labels.tolist() == [0, 2]  # the largest first; the tiny box and the crowd are gone
        box = row.boxes[1]
        rows, columns = red.any(1).nonzero()[:, 0], red.any(0).nonzero()[:, 0]
        found = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / 64
        assert (box - found).abs().max() < 1.6 / 64
        for point, mask, other in ((1, green, blue), (2, blue, green)):
            if not row.visible[point]:
                assert row.keypoints[point].tolist() == [0, 0]
                continue
            at = (row.keypoints[point] * 64).long().clamp(0, 63)
            on, off = mask[at[1], at[0]], other[at[1], at[0]]
            assert bool(on) != bool(off)
            if bool(off):
                flips += 1  # mirrored: the left eye is now where the right eye was painted
                assert row.keypoints[1, 0] > row.keypoints[2, 0] or not row.visible.all()
        assert not row.visible[[0, *range(3, 17)]].any()
    assert flips > 5


def test_the_fingerprint_follows_the_annotations(tmp_path: Path) -> None:
    before = Coco(root=str(write(tmp_path))).fingerprint
    assert Coco(root=str(tmp_path)).fingerprint == before

    def edit(trees: dict) -> None:
        trees["captions"]["annotations"][0]["caption"] = "edited"

    assert Coco(root=str(write(tmp_path, edit=edit))).fingerprint != before


def test_points_follow_the_published_order() -> None:
    assert (len(POINTS), POINTS[0], POINTS[9], POINTS[16]) == (17, "nose", "left wrist", "right ankle")
    for left, right in FLIP_PAIRS:
        assert POINTS[left].replace("left", "right") == POINTS[right]


def test_the_plain_row_is_the_centre_crop_and_batches_collate(tmp_path: Path) -> None:
    data = Coco(root=str(write(tmp_path)), size=32, annotations="captions+instances+keypoints", max_boxes=3)
    assert data.framing.load_size == 38  # 76 / 64 of the size
    row = data.sample(0, None)
    x, y = centre(row.target[1] > 128)
    expected = ((20.5 / W * 38 - 3) / 32, (16.5 / H * 38 - 3) / 32)
    assert abs(x - expected[0]) < 0.03 and abs(y - expected[1]) < 0.03
    batch = BatchDataset(data, data.provides, batch_size=2, seed=0)[0].batch
    batch.condition.check_values()
    assert batch.condition.boxes.valid.tolist() == [[True, True, False]] * 2
    assert collate([row], data.provides).condition.keypoints.visible.sum() == 2


def test_a_picture_without_boxes_is_a_legal_row(tmp_path: Path) -> None:
    def edit(trees: dict) -> None:
        trees["instances"]["annotations"] = trees["instances"]["annotations"][:4]

    data = Coco(root=str(write(tmp_path, edit=edit)), size=16, annotations="captions+instances")
    assert data.sample(2, None).boxes.shape == (0, 4)


@pytest.mark.parametrize(
    ("bbox", "reason"),
    [([1, 1, -5, 5], "negative"), (None, "malformed"), ([1, 2, 3], "malformed"), (["a", 1, 2, 3], "malformed")],
)
def test_bad_boxes_quarantine_their_row(tmp_path: Path, bbox: object, reason: str) -> None:
    def edit(trees: dict) -> None:
        trees["instances"]["annotations"][0]["bbox"] = bbox

    data = Coco(root=str(write(tmp_path, edit=edit)), size=16, annotations="captions+instances")
    with pytest.raises(DataError, match=reason):
        data.sample(0, None)
    loaded = BatchDataset(data, data.provides, batch_size=3, seed=0)[0]
    assert [q.key for q in loaded.quarantined] == ["9"]
    assert len(loaded.batch) == 3


def test_boxes_are_clipped_and_those_outside_vanish(tmp_path: Path) -> None:
    def edit(trees: dict) -> None:
        rows = trees["instances"]["annotations"]
        rows[0]["bbox"], rows[1]["bbox"] = [-10, -10, 60, 60], [200, 200, 50, 50]

    data = Coco(root=str(write(tmp_path, edit=edit)), size=16, load_size=16, annotations="instances")
    row = data.sample(0, None)
    assert torch.allclose(row.boxes, torch.tensor([[0, 0, 50 / W, 50 / H]]))


def test_pictures_that_are_missing_damaged_or_turned_are_quarantined(tmp_path: Path) -> None:
    root = write(tmp_path)
    folder = root / "train2014"
    (folder / "COCO_train2014_000000000009.jpg").unlink()
    (folder / "COCO_train2014_000000000025.jpg").write_bytes(b"\xff\xd8 not a picture")
    Image.new("RGB", (H, W)).save(folder / "COCO_train2014_000000000030.jpg")
    data = Coco(root=str(root), size=16)
    for index, reason in ((0, "missing"), (1, "decode|format"), (2, "turned")):
        with pytest.raises(DataError, match=reason):
            data.sample(index, None)


def drop_images(trees: dict) -> None:
    trees["captions"]["images"] = []


def set_image(**changed: object):
    def edit(trees: dict) -> None:
        trees["captions"]["images"][0] = {**trees["captions"]["images"][0], **changed}

    return edit


def orphan(trees: dict) -> None:
    trees["captions"]["annotations"][3]["image_id"] = 77


def silent(trees: dict) -> None:
    for row in trees["captions"]["annotations"]:
        row["caption"] = " \u0000\n"


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (drop_images, "0 images"),
        (set_image(file_name="../secret.jpg"), "leaves its folder"),
        (set_image(file_name="/etc/passwd"), "leaves its folder"),
        (set_image(id=25), "there twice"),
        (set_image(width=0), "at least 1"),
        (set_image(height=float("nan")), "not a number"),
        (set_image(width="wide"), r"images\[0\] needs"),
        (orphan, r"annotations\[3\].*77"),
        (silent, "no image has captions"),
    ],
)
def test_bad_manifests_are_refused_with_their_place(tmp_path: Path, edit, reason: str) -> None:
    write(tmp_path, edit=edit)
    with pytest.raises(DataError, match=reason):
        Coco(root=str(tmp_path))


def test_missing_files_and_wrong_options(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"captions_train2014\.json"):
        Coco(root=str(tmp_path))
    write(tmp_path)
    (tmp_path / "annotations" / "person_keypoints_train2014.json").unlink()
    with pytest.raises(DataError, match=r"person_keypoints_train2014\.json"):
        Coco(root=str(tmp_path), annotations="captions+keypoints")
    for options in ({"annotations": "caption"}, {"split": "all"}, {"load_size": 10}, {"resize": "x"}, {"max_boxes": 0}):
        with pytest.raises(ConfigError):
            Coco(root=str(tmp_path), **options)
    for text in ("", "[]", "{", '{"images": 1}'):
        (tmp_path / "annotations" / "captions_train2014.json").write_text(text)
        with pytest.raises(DataError, match=r"captions_train2014\.json"):
            Coco(root=str(tmp_path))


def test_keypoints_of_the_wrong_length_name_their_row(tmp_path: Path) -> None:
    def edit(trees: dict) -> None:
        trees["person_keypoints"]["annotations"][1]["keypoints"] = [1, 2, 2]

    write(tmp_path, edit=edit)
    with pytest.raises(DataError, match=r"annotations\[1\]: keypoints must be 17"):
        Coco(root=str(tmp_path), annotations="keypoints")


@pytest.mark.skipif(not (SHARED / "coco_captions" / "coco_captions.zip").is_file(), reason="no shared data")
def test_real_photographs(tmp_path: Path) -> None:
    """The shared subset of COCO 2017, put back into the published form."""
    with zipfile.ZipFile(SHARED / "coco_captions" / "coco_captions.zip") as archive:
        meta = json.loads(archive.read("meta.json"))["images"]
        rows = [m for m in meta if m["split"] == "val"]
        (tmp_path / "val2017").mkdir()
        for m in rows:
            (tmp_path / "val2017" / f"{m['id']:012d}.jpg").write_bytes(archive.read(m["file"]))
    names = sorted({b[0] for m in rows for b in m["boxes"]})
    images = [
        {"id": m["id"], "file_name": f"{m['id']:012d}.jpg", **{k: m[k] for k in ("width", "height")}} for m in rows
    ]
    trees = {
        "captions": [{"image_id": m["id"], "caption": c} for m in rows for c in m["captions"]],
        "instances": [
            {"image_id": m["id"], "bbox": b[1:], "category_id": names.index(b[0]) + 1} for m in rows for b in m["boxes"]
        ],
        "person_keypoints": [
            {"image_id": m["id"], "keypoints": [v for p in k for v in p], "area": 1}
            for m in rows
            for k in m["keypoints"]
        ],
    }
    (tmp_path / "annotations").mkdir()
    for kind, found in trees.items():
        tree = {
            "images": images,
            "annotations": found,
            "categories": [{"id": i + 1, "name": n} for i, n in enumerate(names)],
        }
        (tmp_path / "annotations" / f"{kind}_val2017.json").write_text(json.dumps(tree))
    data = Coco(root=str(tmp_path), split="val", size=32, annotations="captions+instances")
    assert len(data) == len(rows) > 100
    assert len(data.captions()) > 4 * len(data)
    batch = BatchDataset(data, data.provides, batch_size=16, seed=0)[0]
    assert not batch.quarantined
    batch.batch.condition.check_values()
    assert 1 <= batch.batch.condition.boxes.valid.float().sum(1).mean() <= 8
    people = Coco(root=str(tmp_path), split="val", size=32, annotations="keypoints")
    assert 10 < len(people) < len(data)
    assert sum(int(people.sample(i, None).visible.sum()) for i in range(10)) > 30
