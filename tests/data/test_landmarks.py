"""Pictures with points as people have them: .npz, .json, .csv; splits, names, pairs, captions, mirrors and refusals."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from condgen import rng
from condgen.data._skeletons import FACE68, LSP14, flip_pairs_of, paired
from condgen.data.landmarks import Landmarks
from condgen.errors import ConfigError, DataError

W, H = 40, 32
NAMES = ("nose", "l_eye", "rightEye")
XY = np.array([[20, 24], [8, 8], [32, 8]], np.float32)  # red, green, blue blocks
SHARED = Path(os.environ.get("CONDGEN_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def picture(path):
    pixels = np.zeros((H, W, 3), np.uint8)
    for channel, (x, y) in enumerate(XY.astype(int)):
        pixels[y - 3 : y + 4, x - 3 : x + 4, channel] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write(root, split=False, rows=6):
    names = [f"{'test' if i > 3 else 'train'}/{i}.png" if split else f"images/{i}.png" for i in range(rows)]
    for name in names:
        picture(root / name)
    return names


def as_npz(root, names):
    np.savez(root / "p.npz", xy=np.repeat(XY[None], len(names), 0), joint_names=np.array(NAMES))


def as_json(root, names):
    listed = {name.split("/")[1]: dict(zip(NAMES, XY.tolist())) for name in names}
    (root / "p.json").write_text(json.dumps({"names": NAMES, "points": listed}))


def as_csv(root, names):
    head = "file," + ",".join(f"{n}_{c}" for n in NAMES for c in "xy")
    body = [f"{name}," + ",".join(str(v) for v in XY.flatten()) for name in names]
    (root / "p.csv").write_text("\n".join([head, *body]) + "\n")


@pytest.mark.parametrize("form", [as_npz, as_json, as_csv])
def test_every_form_gives_the_same_points_on_their_pixels(tmp_path, form):
    form(tmp_path, write(tmp_path))
    kinds = [Landmarks(root=str(tmp_path), size=32, split=split) for split in ("train", "test")]
    assert sorted(data.key(i) for data in kinds for i in range(len(data))) == [f"images/{i}.png" for i in range(6)]
    assert kinds[0].provides.keypoints.names == NAMES and kinds[0].provides.text is None
    row = Landmarks(root=str(tmp_path), size=32, load_size=32).sample(0, None)
    torch.testing.assert_close(row.keypoints, torch.tensor(XY / [W, H]).float())
    for k, (x, y) in enumerate((row.keypoints * 32).long().tolist()):
        assert row.target[k, y, x] > 128


@pytest.mark.parametrize("swap", [True, False])
def test_a_mirror_keeps_sides_unless_as_released(tmp_path, swap):
    as_npz(tmp_path, write(tmp_path))
    pairs = Landmarks(root=str(tmp_path), size=32, names=("nose", "left eye", "right eye"), swap_on_flip=swap)
    assert pairs.provides.flip_pairs == ((1, 2),)
    mirrored = 0
    for epoch in range(20):
        row = pairs.sample(0, rng.generator(epoch))
        x, y = (row.keypoints[1] * 32).long().clamp(0, 31).tolist()
        green, blue = row.target[1, y, x] > 128, row.target[2, y, x] > 128
        flipped = row.target[1].float().mean(0).argmax() > 16  # the green block was on the left
        mirrored += bool(flipped)
        # swapped: the point called left stays on the left, where a mirror puts the blue block
        assert bool(blue) == bool(flipped and swap) and bool(green) != bool(blue)
    assert 5 < mirrored < 15


def test_split_folders_are_the_splits_and_arrays_follow_them(tmp_path):
    write(tmp_path, split=True)
    np.savez(tmp_path / "p.npz", train_xy=np.repeat(XY[None], 4, 0), test_xy=np.repeat(XY[None] + 1, 2, 0))
    train, test = (Landmarks(root=str(tmp_path), size=32, split=s) for s in ("train", "test"))
    assert [train.key(0), len(train), test.key(0), len(test)] == ["train/0.png", 4, "test/4.png", 2]
    assert not torch.equal(train.table.rows["train/0.png"], test.table.rows["test/4.png"])
    assert train.provides.flip_pairs == ()  # three points without names


def test_points_that_are_missing_or_outside_are_not_visible(tmp_path):
    names = write(tmp_path, rows=2)
    points = {names[0]: [[20, 24], None, [8, 8, 0]], names[1]: [[500, 2], [1, 1], [2, 2, 1]]}
    (tmp_path / "p.json").write_text(json.dumps(points))
    rows = [Landmarks(root=str(tmp_path), size=32, load_size=32, split=s).sample(0, None) for s in ("train", "test")]
    seen = {row.key: row.visible.tolist() for row in rows}
    assert seen == {names[0]: [True, False, False], names[1]: [False, True, True]}
    assert all((row.keypoints[~row.visible] == 0).all() for row in rows)


def test_captions_are_one_sentence_or_a_file(tmp_path):
    names = write(tmp_path)
    as_npz(tmp_path, names)
    one = Landmarks(root=str(tmp_path), size=32, caption="a photo of a face")
    assert one.captions() == ["a photo of a face"] == [one.sample(0, None).caption]
    (tmp_path / "said.json").write_text(json.dumps({n: [f"face {n[-5]}", "other"] for n in names[:-1]}))
    parts = [
        Landmarks(root=str(tmp_path), size=32, points="p.npz", captions="said.json", split=s) for s in ("train", "test")
    ]
    assert sum(map(len, parts)) == 5
    drawn = {parts[0].sample(0, rng.generator(i)).caption for i in range(20)}
    assert len(drawn) == 2 and parts[0].sample(0, None).caption == f"face {parts[0].key(0)[-5]}"
    before = parts[0].fingerprint
    (tmp_path / "said.json").write_text(json.dumps({n: "edited" for n in names}))
    after = Landmarks(root=str(tmp_path), size=32, points="p.npz", captions="said.json")
    assert after.fingerprint != before


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"points": "none.npz"}, DataError, "data.points"),
        ({"names": ("a",)}, ConfigError, "1 names for 3 points"),
        ({"skeleton": "face68"}, ConfigError, "has 68 points and the data have 3"),
        ({"skeleton": "dog"}, ConfigError, "choose auto"),
        ({"flip_pairs": ((0, 9),)}, ConfigError, "indices in 0..2"),
        ({"caption": "a", "captions": "b.json"}, ConfigError, "choose one"),
        ({"split": "all"}, ConfigError, "allowed: train, val, test"),
        ({"points": "../p.npz"}, DataError, "must be relative"),
    ],
)
def test_refusals(tmp_path, options, error, says):
    as_npz(tmp_path, write(tmp_path))
    with pytest.raises(error, match=says):
        Landmarks(root=str(tmp_path), size=32, **options)


def test_a_file_that_does_not_fit_the_pictures_is_refused(tmp_path):
    names = write(tmp_path)
    as_npz(tmp_path, names[:-1])
    with pytest.raises(DataError, match=r"\(5, 3, 2\).*for 6 pictures"):
        Landmarks(root=str(tmp_path), size=32)
    (tmp_path / "p.csv").write_text("file,a_x,a_y\n0.png,1\n")
    with pytest.raises(DataError, match="found p.csv, p.npz"):
        Landmarks(root=str(tmp_path), size=32)
    with pytest.raises(DataError, match="line 2 has 2 cells"):
        Landmarks(root=str(tmp_path), size=32, points="p.csv")
    np.savez(tmp_path / "p.npz", xy=np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read"):
        Landmarks(root=str(tmp_path), size=32, points="p.npz")


def test_known_skeletons():
    assert len(FACE68) == 29 and len({i for pair in FACE68 for i in pair}) == 58  # ten lie on the middle line
    assert flip_pairs_of("auto", (), 68) == FACE68 and flip_pairs_of("auto", (), 17) == ()
    lsp = ["r_ankle", "r_knee", "r_hip", "l_hip", "l_knee", "l_ankle", "r_wrist", "r_elbow", "r_shoulder",
           "l_shoulder", "l_elbow", "l_wrist", "neck", "head_top"]  # fmt: skip
    assert {frozenset(p) for p in paired(lsp)} == {frozenset(p) for p in LSP14} == {
        frozenset(p) for p in flip_pairs_of("lsp14", (), 14)
    }  # fmt: skip
    assert paired(["LEye", "REye", "left", "right", "leftover"]) == ((0, 1), (2, 3))


@pytest.mark.skipif(not (SHARED / "face_landmarks68" / "faces96.zip").is_file(), reason="shared data not present")
def test_shared_faces_are_symmetric_under_their_pairs(tmp_path):
    import zipfile

    with zipfile.ZipFile(SHARED / "face_landmarks68" / "faces96.zip") as held:
        held.extractall(tmp_path, [n for n in held.namelist() if n.startswith("test/") or n.endswith(".npz")])
    data = Landmarks(root=str(tmp_path), split="test")
    assert len(data) == 770
    mean = torch.stack(list(data.table.rows.values())[:770])[..., :2].mean(0) / 96
    other = mean.clone()
    for a, b in data.pairs:
        other[a], other[b] = mean[b], mean[a]
    mirrored = torch.stack([2 * mean[:, 0].mean() - other[:, 0], other[:, 1]], 1)
    assert (mirrored - mean).norm(dim=1).max() < 0.03


def test_a_point_with_nan_is_not_visible(tmp_path):
    names = write(tmp_path, rows=2)
    xy = np.repeat(XY[None], 2, 0)
    xy[:, 1, 0] = np.nan
    np.savez(tmp_path / "p.npz", xy=xy, files=np.array(names))
    row = Landmarks(root=str(tmp_path), size=32, load_size=32).sample(0, None)
    assert row.visible.tolist() == [True, False, True] and torch.isfinite(row.keypoints).all()
