"""Oxford-102 as published: MATLAB labels and sets, caption folders, splits by class."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from condgen import rng
from condgen.data.base import BatchDataset
from condgen.data.oxford102 import Oxford102
from condgen.errors import ConfigError, DataError

LABELS = [1, 1, 2, 2, 7, 7, 102, 102]


def write(
    root: Path, *, text: str = "text_c10", mat: bool = True, labels=LABELS, sets=([1, 3], [5], [7, 2, 8])
) -> Path:
    (root / "jpg").mkdir()
    for number, label in enumerate(LABELS, 1):
        Image.new("RGB", (30, 20), (number * 20, 0, 0)).save(root / "jpg" / f"image_{number:05d}.jpg")
        folder = root / text / f"class_{label:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"image_{number:05d}.txt").write_text("".join(f"flower {number} line {i}\n" for i in range(10)))
    if mat:
        savemat = pytest.importorskip("scipy.io").savemat
        savemat(root / "imagelabels.mat", {"labels": np.array([labels], np.uint8)})
        savemat(root / "setid.mat", {k: np.array([v], np.uint16) for k, v in zip(("trnid", "valid", "tstid"), sets)})
    for name, classes in (("train", [1]), ("val", [2]), ("trainval", [1, 2]), ("test", [7, 102])):
        (root / f"{name}classes.txt").write_text("".join(f"class_{c:05d}\n" for c in classes))
    return root


def labels_of(**options: object) -> list[int]:
    data = Oxford102(size=8, **options)
    return [data.sample(i, None).label for i in range(len(data))]


@pytest.mark.parametrize("mat", [True, False])
@pytest.mark.parametrize("text", ["text_c10", "text_c10/text", "cvpr2016_flowers/text_c10"])
def test_layouts_and_splits_by_class(tmp_path: Path, mat: bool, text: str) -> None:
    root = str(write(tmp_path, mat=mat, text=text))
    assert (labels_of(root=root), labels_of(root=root, split="test")) == ([0, 0, 1, 1], [6, 6, 101, 101])
    parts = [set(labels_of(root=root, splits="zero_shot_val", split=s)) for s in ("train", "val", "test")]
    assert parts == [{0}, {1}, {6, 101}]
    data = Oxford102(root=root, size=8)
    assert (data.key(2), data.sample(2, None).caption) == ("00003", "flower 3 line 0")
    assert (data.provides.label.num_classes, len(data.captions())) == (102, 40)


def test_official_sets(tmp_path: Path) -> None:
    root = str(write(tmp_path))
    keys = [[d.key(i) for i in range(len(d))] for s in ("train", "val", "test")
            for d in [Oxford102(root=root, splits="official", split=s, size=8)]]  # fmt: skip
    assert keys == [["00001", "00003"], ["00005"], ["00002", "00007", "00008"]]


def test_rows_pixels_and_batches(tmp_path: Path) -> None:
    data = Oxford102(root=str(write(tmp_path)), size=8, captions_per_image=4)
    row = data.sample(3, rng.generator(0))
    assert len(row.caption.split("\n")) == 4
    assert abs(row.target[0].float().mean() - 80) < 4
    loaded = BatchDataset(data, data.provides, batch_size=4, seed=0)[0]
    assert not loaded.quarantined
    assert loaded.batch.condition.given == ("label", "text")
    assert Oxford102(root=str(tmp_path), size=8, annotations="labels").captions() == []


@pytest.mark.parametrize("bad", [0, 103])
def test_labels_out_of_range_name_their_picture(tmp_path: Path, bad: int) -> None:
    write(tmp_path, labels=[*LABELS[:4], bad, *LABELS[5:]])
    with pytest.raises(DataError, match=rf"picture 5 has class {bad}; allowed 1\.\.102"):
        Oxford102(root=str(tmp_path))


def test_without_scipy_the_error_names_it_and_caption_folders_still_work(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(DataError, match="pip install scipy"):
        Oxford102(root=str(tmp_path))
    (tmp_path / "imagelabels.mat").unlink()
    assert len(Oxford102(root=str(tmp_path))) == 4


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="jpg not found"):
        Oxford102(root=str(tmp_path))
    write(tmp_path, sets=([1, 9], [5], [7]))
    with pytest.raises(DataError, match=r"setid\.mat names picture 9"):
        Oxford102(root=str(tmp_path), splits="official")
    whole = (tmp_path / "imagelabels.mat").read_bytes()
    for data in (b"", b"not matlab", whole[:130], whole[:-9]):
        (tmp_path / "imagelabels.mat").write_bytes(data)
        with pytest.raises(DataError, match=r"imagelabels\.mat"):
            Oxford102(root=str(tmp_path))
    (tmp_path / "imagelabels.mat").unlink()
    (tmp_path / "jpg" / "image_00001.jpg").unlink()
    data = Oxford102(root=str(tmp_path), size=8)
    with pytest.raises(DataError, match="missing"):
        data.sample(0, None)
    (tmp_path / "text_c10" / "class_00002" / "image_00001.txt").write_text("x")
    with pytest.raises(DataError, match="two class folders"):
        Oxford102(root=str(tmp_path))
    for options in ({"splits": "x"}, {"split": "x"}, {"annotations": "boxes"}, {"captions_per_image": 0}):
        with pytest.raises(ConfigError):
            Oxford102(root=str(tmp_path), **options)
