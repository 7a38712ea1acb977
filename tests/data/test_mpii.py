"""MPII Human Pose as published, on a made-up tree: who is a row, the crop, the joints, the splits, what is guarded."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from condgen import rng
from condgen.data.mpii import FLIP_PAIRS, HEAD, JOINTS, Mpii
from condgen.errors import ConfigError, DataError

W, H = 300, 240
ACTS = [("skiing, downhill", "winter activities"), ("yoga, Power", "conditioning exercise")]


def cell(items):
    out = np.empty(len(items), dtype=object)
    out[:] = items
    return out


def rect(**changed):
    points = [{"id": 9, "x": 160.0, "y": 60.0, "is_visible": 1}, {"id": 0, "x": 130.0, "y": 170.0, "is_visible": 0},
              {"id": 5, "x": 190.0, "y": 170.0, "is_visible": "1"}]  # fmt: skip
    full = {"x1": 150.0, "y1": 50.0, "x2": 170.0, "y2": 80.0, "scale": 0.8, "objpos": {"x": 160.0, "y": 120.0},
            "annopoints": {"point": cell(points)}}  # fmt: skip
    return {k: v for k, v in {**full, **changed}.items() if v is not None}


@pytest.fixture
def root(tmp_path):
    savemat = pytest.importorskip("scipy.io").savemat
    none = np.empty(0)
    rows = [(rect(), 1, 1)] * 10 + [
        (cell([rect(), rect()]), np.array([1, 2]), 1),  # two people
        (rect(), none, 1),  # nobody alone
        (none, 1, 1),  # an empty annorect
        (rect(annopoints=none), 1, 1),
        (rect(scale=None), 1, 1),
        (rect(), 1, 0),  # a test picture
        (cell([rect(scale=0.5), rect()]), 2, 1),  # the second one stands alone
    ]
    release = {
        "annolist": cell([{"image": {"name": f"{i:03}.jpg"}, "annorect": r, "vididx": float(i // 2)}
                          for i, (r, _, _) in enumerate(rows)]),
        "single_person": cell([alone for _, alone, _ in rows]),
        "img_train": np.array([train for *_, train in rows]),
        "act": cell([{"act_name": ACTS[i % 2][0], "cat_name": ACTS[i % 2][1]} for i in range(len(rows))]),
    }  # fmt: skip
    savemat(tmp_path / "mpii_human_pose_v1_u12_1.mat", {"RELEASE": release})
    pixels = np.zeros((H, W, 3), np.uint8)
    pixels[165:176, 125:136, 0], pixels[165:176, 185:196, 1] = 255, 255  # right ankle red, left ankle green
    (tmp_path / "images").mkdir()
    for i in range(len(rows)):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i:03}.jpg", quality=95)
    return tmp_path


def test_rows_are_single_people_with_joints_and_videos_stay_together(root):
    train, test = (Mpii(root=str(root), size=32, split=s, holdout=0.4) for s in ("train", "test"))
    keys = [[data.key(i) for i in range(len(data))] for data in (train, test)]
    assert sorted(keys[0] + keys[1]) == [*(f"{i:03}.jpg" for i in range(10)), "016.jpg"] and keys[1]
    second = [person for data in (train, test) for person in data.rows if person.picture == "016.jpg"]
    assert [person.scale for person in second] == [0.8]  # the one of two who stands alone
    videos = [{int(k[:3]) // 2 for k in part} for part in keys]
    assert not videos[0] & videos[1]


def test_the_crop_is_220_scales_around_the_person_and_points_follow(root):
    data = Mpii(root=str(root), size=64, load_size=64, flip=False, holdout=0)
    row = data.sample(0, None)
    # side ceil(0.8 * 220) = 176 around (160, 120): x 72..248, y 32..208
    expected = {0: (130, 170), 5: (190, 170), 9: (160, 60), HEAD: (160, 65)}
    assert row.visible.nonzero().flatten().tolist() == sorted(expected)
    for k, (x, y) in expected.items():
        torch.testing.assert_close(row.keypoints[k], torch.tensor([(x - 72) / 176, (y - 32) / 176]))
    x, y = (row.keypoints[0] * 64).long().tolist()
    assert row.target[0, y, x] > 128 and row.caption == "skiing, downhill"


@pytest.mark.parametrize("swap", [True, False])
def test_a_mirror_keeps_the_right_ankle_right_unless_as_released(root, swap):
    data, mirrored = Mpii(root=str(root), size=64, load_size=64, swap_on_flip=swap, holdout=0), 0
    for epoch in range(16):
        row = data.sample(0, rng.generator(epoch))
        x, y = (row.keypoints[0] * 64).long().tolist()
        flipped = bool(row.target[1].float().mean(0).argmax() < 32)
        mirrored += flipped
        assert bool(row.target[1, y, x] > 128) == (flipped and swap)
    assert 3 < mirrored < 13


def test_hidden_joints_activities_labels_and_captions(root):
    seen = Mpii(root=str(root), size=16, hidden=False, holdout=0).sample(0, None)
    assert seen.visible.nonzero().flatten().tolist() == [5, 9, HEAD]
    yoga = Mpii(root=str(root), size=16, activities=("yoga",), annotations="captions+labels", holdout=0,
                caption="someone at {category}")  # fmt: skip
    assert len(yoga) == 5 and yoga.captions() == ["someone at conditioning exercise"]
    assert (yoga.sample(0, None).label, yoga.provides.label.num_classes) == (0, 2)
    assert len(Mpii(root=str(root), size=16, activities=("winter activities", "yoga, Power"), holdout=0)) == 11
    with pytest.raises(ConfigError, match="skiing"):
        Mpii(root=str(root), activities=("sking",))
    with pytest.raises(ConfigError, match="no other braces"):
        Mpii(root=str(root), caption="{name}")


def test_names_and_pairs():
    assert len(JOINTS) == 17
    assert all(JOINTS[a].replace("right", "left") == JOINTS[b] for a, b in FLIP_PAIRS)


def test_without_the_file_or_scipy_the_error_says_what_to_do(root, tmp_path_factory, monkeypatch):
    with pytest.raises(DataError, match="mpii_human_pose_v1_u12_1.mat"):
        Mpii(root=str(tmp_path_factory.mktemp("empty")))
    (root / "mpii_human_pose_v1_u12_1.mat").write_bytes(b"MATLAB 5.0 MAT-file, cut off")
    with pytest.raises(DataError, match="cannot be read as a MATLAB file"):
        Mpii(root=str(root))
    monkeypatch.setitem(__import__("sys").modules, "scipy.io", SimpleNamespace())
    with pytest.raises(DataError, match="pip install scipy"):
        Mpii(root=str(root))
