"""Moving MNIST and moving OpenMoji: the published motion, its entropy, splits, masks that are true."""

import gzip
import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from condgen import rng
from condgen.data.base import BatchDataset, expect_row
from condgen.data.checks import check
from condgen.data.moving_mnist import MovingMnist, trajectory
from condgen.data.moving_openmoji import MovingOpenMoji
from condgen.errors import ConfigError, DataError


@pytest.fixture
def digits(tmp_path) -> Path:
    """Two training and two test digits: squares of 255 in the middle of 28 x 28, the test ones grey."""
    train = np.zeros((2, 28, 28), np.uint8)
    train[0, 4:24, 4:24], train[1, 10:18, 10:18] = 255, 255
    np.savez(tmp_path / "mnist.npz", x_train=train, x_test=train // 2)
    return tmp_path / "mnist.npz"


def published(x: float, y: float, theta: float, length: int) -> list[tuple[int, int]]:
    """GetRandomTrajectory of the released code, for one digit."""
    start_y, start_x, canvas, step = np.zeros(length), np.zeros(length), 64 - 28, 0.1
    v_y, v_x = np.sin(theta), np.cos(theta)
    for i in range(length):
        y += v_y * step
        x += v_x * step
        if x <= 0:
            x, v_x = 0, -v_x
        if x >= 1.0:
            x, v_x = 1.0, -v_x
        if y <= 0:
            y, v_y = 0, -v_y
        if y >= 1.0:
            y, v_y = 1.0, -v_y
        start_y[i], start_x[i] = y, x
    tops, lefts = (canvas * start_y).astype(np.int32), (canvas * start_x).astype(np.int32)
    return list(zip(lefts.tolist(), tops.tolist(), strict=True))


def test_digits_move_as_published():
    draw = np.random.default_rng(0)
    for _ in range(50):
        x, y, angle = draw.random(), draw.random(), draw.random() * 2 * math.pi
        path = trajectory(x, y, angle, 60, 36)
        assert path == published(x, y, angle, 60)
        assert {0, 36} & {v for place in path for v in place} and all(0 <= v <= 36 for p in path for v in p)


def test_shapes_and_the_same_row_again(digits):
    data = MovingMnist(root=str(digits), rows=5)
    row = data.sample(3, rng.generator(1))
    expect_row(data, row)
    assert row.target.shape == (10, 1, 64, 64) and row.frames.shape == (10, 1, 64, 64)
    assert torch.equal(row.target, data.sample(3, rng.generator(1)).target)
    assert not torch.equal(row.target, data.sample(3, rng.generator(2)).target)
    assert torch.equal(data.sample(2, None).target, data.sample(2, None).target)
    joined = MovingMnist(root=str(digits), rows=5, past=1, overlap=True).sample(0, None)
    assert torch.equal(joined.frames[0], joined.target[0])
    assert MovingMnist(root=str(digits), past=0).provides.given == ()
    assert check(MovingMnist(root=str(digits), rows=5)).good == 5


def test_past_and_target_are_one_motion(digits):
    whole = MovingMnist(root=str(digits), rows=3, past=0, frames=20, digits=1)
    parted = MovingMnist(root=str(digits), rows=3, past=12, frames=8, digits=1)
    for index in range(3):
        one, two = whole.sample(index, rng.generator(index)), parted.sample(index, rng.generator(index))
        assert torch.equal(one.target, torch.cat([two.frames, two.target]))
    mass = whole.sample(0, None).target.float().sum((1, 2, 3))
    assert mass.unique().numel() == 1  # one digit never leaves the frame


def test_digits_overlap_by_the_brighter_pixel(digits):
    data = MovingMnist(root=str(digits), rows=40, digits=8, past=0)
    assert all(data.sample(i, None).target.unique().tolist() == [0, 255] for i in range(40))


def test_test_clips_are_fixed_and_show_test_digits(digits):
    test = MovingMnist(root=str(digits), split="test", rows=4)
    assert torch.equal(test.sample(1, rng.generator(1)).target, test.sample(1, rng.generator(2)).target)
    assert test.sample(1, None).target.max() == 127
    val = MovingMnist(root=str(digits), split="val", rows=4)
    assert val.sample(1, None).target.max() == 255
    assert not torch.equal(val.sample(1, None).target, MovingMnist(root=str(digits), rows=4).sample(1, None).target)
    assert len({MovingMnist(root=str(digits), split=s, rows=4).fingerprint for s in ("train", "val", "test")}) == 3
    a, b = (
        BatchDataset(test, test.provides, batch_size=2, seed=0),
        BatchDataset(test, test.provides, batch_size=2, seed=1),
    )
    rows = [dict(zip(x[g].batch.keys, x[g].batch.target, strict=True)) for x in (a, b) for g in (0, 1)]
    seen = [{**rows[0], **rows[1]}, {**rows[2], **rows[3]}]
    assert all(torch.equal(seen[0][key], seen[1][key]) for key in seen[0])


def test_a_small_frame_has_small_digits(digits):
    row = MovingMnist(root=str(digits), size=32, rows=2, digits=1, past=0).sample(0, None)
    assert row.target.shape == (10, 1, 32, 32)
    lit = row.target[0, 0].nonzero()
    assert (lit.max(0).values - lit.min(0).values).max() <= 13


def test_the_published_test_file(digits, tmp_path):
    clips = np.random.default_rng(0).integers(0, 255, (20, 3, 64, 64), dtype=np.uint8)
    file = tmp_path / "mnist_test_seq.npy"
    np.save(file, clips)
    data = MovingMnist(root=str(file), split="test")
    row = data.sample(2, None)
    assert len(data) == 3
    assert torch.equal(torch.cat([row.frames, row.target])[:, 0], torch.from_numpy(clips[:, 2]))
    for wrong in ({"split": "train"}, {"size": 32}, {"frames": 11}, {"digits": 3}):
        with pytest.raises(ConfigError, match="holds"):
            MovingMnist(**{"root": str(file), "split": "test", **wrong})


def test_digits_of_scikit_learn(monkeypatch):
    pytest.importorskip("sklearn")
    train, test = (MovingMnist(split=split, rows=2) for split in ("train", "test"))
    assert (len(train._digits), len(test._digits)) == (1438, 359)
    flat = {d.tobytes() for d in train._digits} & {d.tobytes() for d in test._digits}
    assert not flat and train.sample(0, None).target.max() > 200
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r"set data\.root to MNIST .* or install scikit-learn"):
        MovingMnist()


def test_wrong_options_and_files(tmp_path, digits):
    for wrong in ({"split": "all"}, {"frames": 0}, {"overlap": True, "past": 0}, {"digits": 0}, {"size": 4}):
        with pytest.raises(ConfigError, match=r"data\."):
            MovingMnist(**{"root": str(digits), **wrong})
    np.savez(tmp_path / "bad.npz", x_train=np.zeros((2, 28, 28)))
    with pytest.raises(DataError, match="uint8"):
        MovingMnist(root=str(tmp_path / "bad.npz"))
    with pytest.raises(ConfigError, match="is not a file"):
        MovingMnist(root=str(tmp_path / "no.npz"))
    assert len(MovingMnist(root=str(tmp_path))) == 10_000  # a folder with mnist.npz in it


def idx(pixels: np.ndarray, magic: int = 0x803) -> bytes:
    return struct.pack(">4I", magic, *pixels.shape) + pixels.tobytes()


@pytest.mark.parametrize("place", ["MNIST/raw", "raw", "."])
@pytest.mark.parametrize("packed", [True, False])
def test_the_published_idx_files_as_torchvision_keeps_them(tmp_path, digits, place, packed):
    root = tmp_path / "root"
    (root / place).mkdir(parents=True)
    with np.load(digits) as held:
        for name, part in (("train", "x_train"), ("t10k", "x_test")):
            data = idx(held[part])
            file = root / place / f"{name}-images-idx3-ubyte"
            (file.with_name(file.name + ".gz") if packed else file).write_bytes(gzip.compress(data) if packed else data)
    for split in ("train", "test"):
        one, two = (MovingMnist(root=str(r), split=split, rows=2).sample(1, None) for r in (root, digits))
        assert torch.equal(one.target, two.target) and torch.equal(one.frames, two.frames)


def test_idx_files_equal_torchvision(tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    for name in ("train", "t10k"):
        (raw / f"{name}-images-idx3-ubyte").write_bytes(idx(pixels))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 5) + bytes(5))
    theirs = datasets.MNIST(str(tmp_path), train=True).data.numpy()
    assert np.array_equal(MovingMnist(root=str(tmp_path), rows=2)._digits, theirs)


def test_broken_idx_files_are_refused(tmp_path):
    file = tmp_path / "train-images-idx3-ubyte.gz"
    pixels = np.zeros((2, 28, 28), np.uint8)
    for data, why in (
        (gzip.compress(idx(pixels)[:-5]), "cut short"), (gzip.compress(idx(pixels) + b"x"), "too long"),
        (gzip.compress(idx(pixels, 0x801)), "head"), (gzip.compress(idx(pixels))[:-12], "cannot be read"),
        (b"", "cannot be read"),
        (gzip.compress(struct.pack(">4I", 0x803, 2**31, 2**15, 2**15)), "head"), (b"not packed", "cannot be read"),
    ):  # fmt: skip
        file.write_bytes(data)
        with pytest.raises(DataError, match=why):
            MovingMnist(root=str(tmp_path))
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte"):
        MovingMnist(root=str(tmp_path), split="test")


def test_the_entropy_of_real_digits_is_the_published_floor():
    root = Path(os.environ.get("CONDGEN_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
    file = root / "mnist" / "mnist.npz"
    if not file.is_file():
        pytest.skip("shared MNIST is not beside this checkout")
    data = MovingMnist(root=str(file), split="test", rows=600)
    z = torch.stack([data.sample(i, None).target for i in range(600)]).double() / 255
    nats = (torch.special.entr(z) + torch.special.entr(1 - z)).sum((2, 3, 4)).mean()
    assert 84.5 < nats < 88.5  # all 10,000: 86.18 +- 0.15; the published file: 86.3


# moving OpenMoji


def emoji(**options: object) -> MovingOpenMoji:
    return MovingOpenMoji(**{"size": 24, "frames": 6, "groups": ("food-drink",), **options})


def test_the_mask_is_the_foreground():
    data = emoji(past=2, frames=24)
    assert data.provides.given == ("label", "text", "frames") and data.target.shape == (24, 3, 24, 24)
    for index in range(0, 40, 10):
        row = data.sample(index, rng.generator(index))
        expect_row(data, row)
        assert row.boxes is None and row.keypoints is None and row.frames.shape == (2, 3, 24, 24)
        mask = row.truth["mask"]
        assert mask.shape == (24, 1, 24, 24) and 0 < mask.mean() < 0.5
        # where no frame has foreground, the pictures never change; where one has, they do
        never = (mask.max(0).values == 0).expand(3, -1, -1)
        spread = row.target.max(0).values.int() - row.target.min(0).values.int()
        assert spread[never].max() == 0
        often = ((mask.max(0).values == 1) & (mask.min(0).values == 0)).expand(3, -1, -1)
        assert (spread[often] > 0).float().mean() > 0.5


def test_overlap_gives_the_first_frame_as_the_condition():
    row = emoji(past=1, overlap=True).sample(0, None)
    assert torch.equal(row.frames[0], row.target[0]) and len(row.target) == 6
    assert emoji(past=1, overlap=True).provides.frames.frames == 1
    for wrong in ({"frames": 0}, {"overlap": True}, {"overlap": True, "past": 7}):
        with pytest.raises(ConfigError, match=r"data\."):
            emoji(**wrong)


def test_icons_bounce_and_stay_inside():
    row = emoji(frames=60, background="white").sample(3, None)
    ink = row.truth["mask"][:, 0] > 0
    across = [frame.any(0).nonzero().float().mean().item() for frame in ink]
    steps = np.sign(np.diff(across))
    assert (steps > 0).any() and (steps < 0).any()
    mass = ink.flatten(1).sum(1)
    assert mass.max() - mass.min() <= 2  # faint edges


def test_masks_reach_the_batch_for_scores():
    data = emoji()
    batch = BatchDataset(data, data.provides, batch_size=3, seed=0)[0].batch
    assert batch.truth["mask"].shape == (3, 6, 1, 24, 24) and batch.target.shape == (3, 6, 3, 24, 24)
    other = emoji(split="test")
    assert not {data.key(i) for i in range(len(data))} & {other.key(i) for i in range(len(other))}
