"""Arrays as data sets: one .npz file, and torchvision's own files."""

import gzip
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from condgen.data._arrays import held_out
from condgen.data.npz import Npz
from condgen.data.torchvision_sets import TorchvisionSets
from condgen.errors import ConfigError, DataError

SHARED = Path(os.environ.get("CONDGEN_DATA", Path(__file__).resolve().parents[3] / "shared/data"))


@pytest.fixture
def file(tmp_path):
    draw = np.random.default_rng(0)
    x = draw.integers(0, 256, (40, 12, 12, 3), dtype=np.uint8)
    path = tmp_path / "mine.npz"
    np.savez(path, x_train=x[:30], y_train=np.arange(30) % 5, x_test=x[30:], y_test=np.arange(10) % 5)
    return path


def test_rows_are_the_arrays(file):
    data = Npz(root=str(file))
    with np.load(file) as held:
        expected = torch.from_numpy(held["x_train"][7]).permute(2, 0, 1)
    row = data.sample(7, None)
    assert len(data) == 30 and torch.equal(row.target, expected) and row.label == 2
    assert data.target.shape == (3, 12, 12) and data.provides.label.num_classes == 5
    assert len(Npz(root=str(file), split="test")) == 10


def test_pad_keeps_the_pixels_and_resize_fills_the_frame(file):
    own = Npz(root=str(file)).sample(0, None).target
    padded = Npz(root=str(file), size=16, fit="pad").sample(0, None).target
    assert torch.equal(padded[:, 2:14, 2:14], own) and int(padded.sum()) == int(own.sum())
    assert Npz(root=str(file), size=16).sample(0, None).target[:, 0].any()
    with pytest.raises(ConfigError, match="no smaller"):
        Npz(root=str(file), size=8, fit="pad")


def test_a_group_of_classes_is_renumbered_in_the_order_given(file):
    data = Npz(root=str(file), classes=[3, 1], names=["a", "b", "c", "d", "e"])
    assert data.provides.label.names == ("d", "b")
    assert [data.sample(i, None).label for i in range(4)] == [1, 0, 1, 0]  # rows 1, 3, 6, 8
    assert data.key(1).endswith("-000003")
    named = Npz(root=str(file), classes=["d", "0-1"], names=["a", "b", "c", "d", "e"])
    assert named.provides.label.names == ("d", "a", "b")
    with pytest.raises(ConfigError, match=r"0\.\.4"):
        Npz(root=str(file), classes=[5])


def test_val_comes_out_of_train_and_overlaps_with_nothing(file):
    parts = {s: Npz(root=str(file), split=s, val_share=0.2) for s in ("train", "val")}
    pixels = {s: {d.sample(i, None).target.numpy().tobytes() for i in range(len(d))} for s, d in parts.items()}
    assert (len(parts["train"]), len(parts["val"])) == (24, 6)
    assert not pixels["train"] & pixels["val"] and len(pixels["train"] | pixels["val"]) == 30
    with pytest.raises(ConfigError, match="val_share"):
        held_out(10, 0.0, "val")


def test_flip_is_drawn_and_never_in_scored_rows(file):
    data = Npz(root=str(file), flip=True)
    own = Npz(root=str(file)).sample(0, None).target
    seen = [data.sample(0, torch.Generator().manual_seed(s)).target for s in range(12)]
    assert torch.equal(data.sample(0, None).target, own)
    assert any(torch.equal(s, own) for s in seen) and any(torch.equal(s, own.flip(-1)) for s in seen)


def test_the_fingerprint_follows_pixels_and_labels(file, tmp_path):
    with np.load(file) as held:
        arrays = dict(held)
    first = Npz(root=str(file)).fingerprint
    for name in ("x_train", "y_train"):
        changed = {k: v.copy() for k, v in arrays.items()}
        changed[name][0] = (changed[name][0] + 1) % 5
        np.savez(tmp_path / f"{name}.npz", **changed)
        assert Npz(root=str(tmp_path / f"{name}.npz")).fingerprint != first


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x_train": np.zeros((3, 4, 4))}, "uint8"),
        ({"y_train": np.zeros(2, dtype=np.int64)}, r"\(3,\)"),
        ({"y_train": np.zeros(3)}, "integers"),
        ({"y_train": np.array([0, -1, 0])}, "-1"),
        ({"x_train": None}, "no array 'x_train'"),
        ({"x_train": np.array([None, 1, 2], dtype=object)}, "without pickles"),
    ],
)
def test_unfit_files_say_what_is_wrong(tmp_path, arrays, says):
    full = {"x_train": np.zeros((3, 4, 4), dtype=np.uint8), "y_train": np.zeros(3, dtype=np.int64), **arrays}
    np.savez(tmp_path / "bad.npz", **{k: v for k, v in full.items() if v is not None})
    with pytest.raises(DataError, match=says):
        Npz(root=str(tmp_path / "bad.npz"))


def test_no_file_and_no_zip(tmp_path):
    with pytest.raises(ConfigError, match="is not a file"):
        Npz(root=str(tmp_path / "absent.npz"))
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(DataError, match=r"not a readable \.npz"):
        Npz(root=str(tmp_path / "text.npz"))


def idx(array):
    return struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def test_idx_files_of_fashion_mnist(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    x = np.random.default_rng(1).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    y = np.array([0, 9, 2, 3, 9, 5], dtype=np.uint8)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(x))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(y))
        with gzip.open(raw / f"{part}-images-idx3-ubyte.gz", "wb") as stream:
            stream.write(idx(x))
    data = TorchvisionSets(root=str(tmp_path), fit="pad")
    assert data.target.shape == (1, 32, 32) and data.provides.label.names[9] == "Ankle boot"
    row = data.sample(1, None)
    assert row.label == 9 and torch.equal(row.target[0, 2:30, 2:30], torch.from_numpy(x[1]))
    assert len(TorchvisionSets(root=str(tmp_path), split="test", classes=[9])) == 2


def test_missing_files_are_not_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: pytest.fail("the network was asked"))
    with pytest.raises(DataError, match=r"data\.download=true"):
        TorchvisionSets(root=str(tmp_path), dataset="cifar10")
    with pytest.raises(ConfigError, match="kmnist"):
        TorchvisionSets(root=str(tmp_path), dataset="imagenet")


def test_cifar_batches(tmp_path, monkeypatch):
    from torchvision import datasets

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    x = np.random.default_rng(2).integers(0, 256, (4, 3072), dtype=np.uint8)
    for name, _ in datasets.CIFAR10.train_list + datasets.CIFAR10.test_list:
        (folder / name).write_bytes(pickle.dumps({"data": x, "labels": [0, 1, 2, 3]}))
    names = [f"class {i}" for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    with pytest.raises(DataError, match="cifar10 could not be read"):  # made-up bytes do not have the published MD5
        TorchvisionSets(root=str(tmp_path), dataset="cifar10")
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *a: True)
    data = TorchvisionSets(root=str(tmp_path), dataset="cifar10")
    row = data.sample(5, None)
    assert len(data) == 20 and row.label == 1
    assert torch.equal(row.target, torch.from_numpy(x[1]).view(3, 32, 32))


@pytest.mark.skipif(not (SHARED / "fashion_mnist/fashion_mnist.npz").is_file(), reason="no shared data")
@pytest.mark.slow
def test_real_fashion_mnist():
    data = Npz(root=str(SHARED / "fashion_mnist/fashion_mnist.npz"), split="test", size=32, fit="pad")
    assert len(data) == 10_000 and data.provides.label.num_classes == 10
    assert data.sample(0, None).target.float().mean() > 20


@pytest.mark.skipif(not (SHARED / "cifar10/cifar10_subset_1000_300.npz").is_file(), reason="no shared data")
def test_real_cifar_subset():
    data = Npz(root=str(SHARED / "cifar10/cifar10_subset_1000_300.npz"))
    labels = [data.sample(i, None).label for i in range(len(data))]
    assert len(data) == 1000 and [labels.count(k) for k in range(10)] == [100] * 10
    assert data.target.shape == (3, 32, 32)
