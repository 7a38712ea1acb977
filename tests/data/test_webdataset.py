"""WebDataset shards: order, epochs and resume as the guarantee says, and shards that are damaged or hostile."""

import copy
import io
import json
import pickle
import tarfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from condgen.data import base
from condgen.data.base import StreamBatches
from condgen.data.webdataset_shards import WebdatasetShards, shuffled
from condgen.errors import ConfigError, DataError

pytest.importorskip("webdataset")


def picture(value: int, kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    pixels = np.full((6, 5, 3), value, np.uint8)
    pixels[..., 2] = np.arange(30).reshape(6, 5) * 8  # so that crops and mirrors differ
    Image.fromarray(pixels).save(data, kind)
    return data.getvalue()


def tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def row(number: int) -> dict[str, bytes]:
    return {
        f"{number:03d}.png": picture(number),
        f"{number:03d}.txt": f"picture {number}".encode(),
        f"{number:03d}.cls": str(number % 5).encode(),
    }


def write(root: Path, sizes=(7, 5, 6, 6), split: str = "train") -> Path:
    first = 0
    for shard, count in enumerate(sizes):
        files = {name: data for n in range(first, first + count) for name, data in row(n).items()}
        tar(root / split / f"part-{shard:03d}.tar", files)
        first += count
    return root


def make(root: Path, **options: object) -> WebdatasetShards:
    return WebdatasetShards(**{"root": str(root), "size": 4, "num_classes": 5, "shuffle": 4, **options})


def read(data: WebdatasetShards, start: int, stop: int, step: int = 1, *, seed=0, rank=0, world=1, batch_size=3):
    found = list(
        data.batches(start, stop, step, spec=data.provides, batch_size=batch_size, seed=seed, rank=rank, world=world)
    )
    return found


def keys(loaded) -> list[str]:
    return [key for item in loaded for key in item.batch.keys]


def same(a, b) -> bool:
    return (
        a.quarantined == b.quarantined
        and a.batch.keys == b.batch.keys
        and bool((a.batch.target == b.batch.target).all())
        and a.batch.condition.text.strings == b.batch.condition.text.strings
    )


def test_rows_carry_their_own_picture_caption_and_label(tmp_path: Path) -> None:
    data = make(write(tmp_path))
    assert (len(data), data.steps_per_epoch(3), data.steps_per_epoch(3, 2)) == (24, 8, 4)
    for item in read(data, 0, 8):
        for at, key in enumerate(item.batch.keys):
            number = int(key.split("/")[1])
            assert (item.batch.target[at, :2] == number).all()
            assert item.batch.condition.text.strings[at] == f"picture {number}"
            assert item.batch.condition.label[at] == number % 5


def test_an_epoch_is_every_row_once_in_an_order_of_the_seed_and_epoch(tmp_path: Path) -> None:
    data = make(write(tmp_path))
    epochs = [keys(read(data, 8 * e, 8 * e + 8)) for e in range(3)]
    assert all(len(set(epoch)) == 24 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert keys(read(data, 0, 8)) == epochs[0] != keys(read(data, 0, 8, seed=1))
    assert keys(read(make(tmp_path, shuffle=1), 0, 8)) != sorted(epochs[0])  # shards still change places


def test_augmentation_changes_between_epochs_and_not_between_readings(tmp_path: Path) -> None:
    tar(tmp_path / "train.tar", row(7))
    data = make(tmp_path)
    first, again = read(data, 0, 8, batch_size=1), read(data, 0, 8, batch_size=1)
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    longer = read(make(tmp_path, rows=8), 0, 8, batch_size=1)  # one epoch that reads the row eight times
    for found in (first, longer):
        assert len({tuple(item.batch.target.flatten().tolist()) for item in found}) > 2


@pytest.mark.parametrize("start", [1, 5, 7, 8, 13, 16])
def test_resume_gives_the_same_batches(tmp_path: Path, start: int) -> None:
    root = write(tmp_path)
    (root / "train" / "part-001.tar").write_bytes((root / "train" / "part-001.tar").read_bytes()[:5000])
    tar(root / "train" / "part-002.tar", {**row(12), "013.png": b"broken", "013.txt": b"x", **row(14), **row(15)})
    data = make(root)
    whole, rest = read(data, 0, 20), read(make(root), start, 20)
    assert any(item.quarantined for item in whole)
    assert all(same(a, b) for a, b in zip(whole[start:], rest, strict=True))


def test_skipping_does_not_decode(tmp_path: Path, monkeypatch) -> None:
    data, decoded = make(write(tmp_path)), []
    sample = data.sample
    monkeypatch.setattr(data, "sample", lambda raw, random: decoded.append(raw.key) or sample(raw, random))
    read(data, 6, 7)
    assert len(decoded) == 3


def test_ranks_share_no_row_and_always_have_the_same_number_of_steps(tmp_path: Path) -> None:
    data = make(write(tmp_path, sizes=(9, 1, 8, 6)))
    for epoch in range(4):
        steps = data.steps_per_epoch(3, 2)
        parts = [keys(read(data, epoch * steps, (epoch + 1) * steps, rank=r, world=2)) for r in range(2)]
        assert [len(p) for p in parts] == [12, 12]  # one rank repeats rows, the other leaves some for later
        shards = [{key.split("/")[0] for key in p} for p in parts]
        assert not shards[0] & shards[1]
        assert all(max(Counter(p).values()) <= 2 for p in parts)
    with pytest.raises(ConfigError, match="4 shards for 5 processes"):
        read(data, 0, 1, world=5)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_is_the_same_with_workers_and_after_a_restart(tmp_path: Path, workers: int) -> None:
    data = make(write(tmp_path))
    expected = read(data, 0, 11)
    stream = StreamBatches(data, data.provides, batch_size=3, seed=0)
    for start in (0, 4):
        found = list(base.batches(stream, start=start, stop=11, workers=workers))
        assert all(same(a, b) for a, b in zip(expected[start:], found, strict=True))
    assert same(stream[9], expected[9]) and same(stream[2], expected[2])  # any order is right, only slow
    assert same(copy.copy(stream)[3], expected[3])


def test_reading_on_never_starts_again(tmp_path: Path, monkeypatch) -> None:
    data, starts = make(write(tmp_path)), []
    batches = data.batches
    monkeypatch.setattr(
        data, "batches", lambda start, *rest, **named: starts.append(start) or batches(start, *rest, **named)
    )
    stream = StreamBatches(data, data.provides, batch_size=3, seed=0)
    for number in range(10):
        stream[number]
    assert starts == [0]
    monkeypatch.setattr(base, "get_worker_info", lambda: SimpleNamespace(num_workers=3))
    for number in (1, 4, 7):  # what worker 1 of 3 is asked for
        stream[number]
    assert starts == [0, 1]


def test_a_bad_row_is_replaced_by_the_next_usable_one_and_named(tmp_path: Path) -> None:
    files = {**row(0), **row(1), **row(2), **row(3), **row(4), **row(5)}
    files["001.cls"], files["002.png"], files["004.txt"] = b"5", b"not a picture", b" \n"
    tar(tmp_path / "train.tar", files)
    data = make(tmp_path, shuffle=1)
    loaded = read(data, 0, 1, batch_size=6)[0]
    assert keys([loaded])[:4] == ["train/000", "train/003", "train/003", "train/003"]
    reasons = {q.key: q.reason for q in loaded.quarantined}
    assert set(reasons) == {"train/001", "train/002", "train/004"}
    assert "0..4" in reasons["train/001"] and "caption" in reasons["train/004"]


def test_an_unexpected_error_names_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(write(tmp_path))
    monkeypatch.setattr(type(data), "sample", lambda self, raw, random: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        read(data, 0, 1)
    assert "while reading row " in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"001.cls": b"1.5"}, "label '1.5'"),
        ({"001.cls": None, "001.json": b"{}"}, "label None"),
        ({"001.cls": None, "001.json": b'{"label": true}'}, "label True"),
        ({"001.txt": None}, "no caption"),
        ({"001.txt": None, "001.json": b'{"caption": 3}'}, "no caption"),
        ({"001.json": b"[1]"}, "not an object"),
        ({"001.json": b"{"}, "cannot be read"),
        ({"001.json": b"[" * 5000}, "cannot be read"),
        ({"001.png": None}, "no picture"),
        ({"001.PNG": b"x"}, "duplicate"),
        ({"../001.txt": b"x"}, "leaves its folder"),
    ],
)
def test_reasons(tmp_path: Path, change: dict, reason: str) -> None:
    files = {name: data for name, data in {**row(0), **row(1), **change, **row(2)}.items() if data is not None}
    files = dict(sorted(files.items(), key=lambda item: item[0].replace("../", "")))
    tar(tmp_path / "train.tar", files)
    bad = [q for item in read(make(tmp_path, shuffle=1), 0, 1) for q in item.quarantined]
    assert any(reason in q.reason for q in bad), bad


def test_captions_and_labels_from_json(tmp_path: Path) -> None:
    extra = json.dumps({"caption": " a  red\nfox ", "label": 3}).encode()
    tar(tmp_path / "train.tar", {"a/0.webp": picture(9, "WEBP"), "a/0.json": extra})
    batch = read(make(tmp_path), 0, 1, batch_size=2)[0].batch
    assert (batch.condition.text.strings, batch.condition.label.tolist()) == (("a red fox",) * 2, [3, 3])
    plain = make(tmp_path, captions=False, num_classes=0)
    assert plain.provides.given == ()
    assert read(plain, 0, 1, batch_size=1)[0].batch.target.shape == (1, 3, 4, 4)


def test_a_shard_that_breaks_off_costs_only_its_own_rows(tmp_path: Path) -> None:
    root = write(tmp_path)
    whole = (root / "train" / "part-000.tar").read_bytes()
    (root / "train" / "part-000.tar").write_bytes(whole[: len(whole) // 3])
    (root / "train" / "part-003.tar").write_bytes(b"")
    data = make(root)
    found = read(data, 0, 2 * data.steps_per_epoch(3))
    bad = [(q.key.split("/")[0], q.reason) for item in found for q in item.quarantined]
    assert {shard for shard, _ in bad} == {"part-000", "part-003"}
    assert any(shard == "part-000" and "breaks off" in reason for shard, reason in bad)
    assert {f"part-{s:03d}/{n:03d}" for s, low, high in ((1, 7, 12), (2, 12, 18)) for n in range(low, high)} <= set(
        keys(found)
    )


def test_shards_cannot_run_code(tmp_path: Path, monkeypatch) -> None:
    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "attacked",))

    evil = pickle.dumps(Attack())
    names = ("000.pyd", "000.pickle", "000.pkl", "000.pth", "000.npy", "000.tensor")
    tar(tmp_path / "train.tar", {**row(0), **dict.fromkeys(names, evil)})
    read(make(tmp_path), 0, 2)
    assert not (tmp_path / "attacked").exists()
    for options in ({"shards": f"pipe:touch {tmp_path}/attacked"}, {"root": "http://host/x"}, {"root": "pipe:touch x"}):
        with pytest.raises(ConfigError, match="local folders only"):
            WebdatasetShards(**{"root": str(tmp_path), **options})
    monkeypatch.setenv("WDS_SECRET", "train")
    with pytest.raises(DataError, match="no shards"):
        make(tmp_path, shards="${WDS_SECRET}.tar")
    assert not (tmp_path / "attacked").exists()


def test_finding_shards(tmp_path: Path) -> None:
    write(tmp_path, sizes=(2, 2, 2))
    assert [p.name for p in make(tmp_path, shards="train/part-{000..001}.tar").shards] == [
        "part-000.tar",
        "part-001.tar",
    ]
    assert len(make(tmp_path, shards="*/*.tar").shards) == 3
    tar(tmp_path / "val-0.tar", row(1))
    assert [p.name for p in make(tmp_path, split="val").shards] == ["val-0.tar"]
    with pytest.raises(DataError, match="no shards"):
        make(tmp_path, split="test")
    with pytest.raises(DataError, match="leaves its folder"):
        make(tmp_path, shards="../*.tar")
    tar(tmp_path / "none" / "a.tar", {"a.txt": b"x"})
    with pytest.raises(DataError, match="no picture"):
        make(tmp_path, split="none")
    for options in ({"shuffle": 0}, {"rows": -1}, {"num_classes": -1}):
        with pytest.raises(ConfigError):
            make(tmp_path, **options)


def test_rows_option_fixes_the_steps_and_the_fingerprint_follows_the_shards(tmp_path: Path) -> None:
    data = make(write(tmp_path), rows=6)
    assert data.steps_per_epoch(3) == 2
    assert len(keys(read(data, 0, 4))) == 12
    before = data.fingerprint
    write(tmp_path, sizes=(9, 5, 6, 6))
    assert make(tmp_path).fingerprint != before


def test_the_buffer_keeps_every_row_and_moves_them() -> None:
    numbers = list(range(200))
    moved = list(shuffled(iter(numbers), 20, seed=3))
    assert sorted(moved) == numbers != moved
    assert list(shuffled(iter(numbers), 20, seed=3)) == moved != list(shuffled(iter(numbers), 20, seed=4))
    assert list(shuffled(iter(numbers), 1, seed=3)) == numbers
