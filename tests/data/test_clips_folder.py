"""data=clips: layouts, windows in count and time, conditions, cache, quarantine."""

import hashlib
import json
import os
import pickle
import zipfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import torch

from condgen import registry, rng
from condgen.data import video
from condgen.data.base import BatchDataset, RowDataset, batches, collate
from condgen.data.checks import check
from condgen.data.clips import Clips
from condgen.errors import ConfigError, DataError
from condgen.show.clips import write_clip


def numbered(frames: int, size: tuple[int, int] = (12, 16), first: int = 0) -> torch.Tensor:
    """Frame t is grey level first + t, with the left half brighter so that a mirror shows."""
    clip = torch.arange(first, first + frames, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, *size)
    clip[..., : size[1] // 2] += 100
    return clip


def clips(root: Path, **options: object) -> Clips:
    return Clips(**{"root": str(root), "size": 8, "split": "all", "frames": 4, **options})


def levels(pixels: torch.Tensor) -> list[int]:
    """The number of each frame, read from its right edge."""
    return pixels[:, 0, -1, -1].tolist()


@pytest.fixture
def one(tmp_path) -> Path:
    write_clip(tmp_path / "a.avi", numbered(20), fps=10)
    return tmp_path


def test_layouts_classes_and_captions(tmp_path):
    write_clip(tmp_path / "run" / "a.avi", numbered(6))
    write_clip(tmp_path / "run" / "frames", numbered(6))
    (tmp_path / "walk").mkdir()
    np.save(tmp_path / "walk" / "m.npy", np.zeros((6, 2, 8, 8), np.uint8))
    column = np.concatenate(list(numbered(5, (8, 8)).permute(0, 2, 3, 1).numpy()))
    PIL.Image.fromarray(column).save(tmp_path / "walk" / "s.png")
    (tmp_path / "run" / "a.txt").write_text("a fox runs\nrunning\n")
    (tmp_path / "walk" / ".hidden.mp4").write_text("x")
    data = clips(tmp_path)
    assert [data.key(i) for i in range(len(data))] == [
        "run/a.avi", "run/frames", "walk/m.npy#0", "walk/m.npy#1", "walk/s.png",
    ]  # fmt: skip
    assert data.label_names == ("run", "walk") and data.provides.given == ("label", "text")
    assert [data.sample(i, None).label for i in range(5)] == [0, 0, 1, 1, 1]
    assert data.sample(0, None).caption == "a fox runs" and data.sample(1, None).caption is None
    assert data.captions() == ["a fox runs", "running"]
    assert clips(tmp_path, captions="mean").sample(0, None).caption == "a fox runs\nrunning"
    assert data.sample(4, None).target.shape == (4, 3, 8, 8) == data.target.shape
    assert issubclass(registry.load("data", "clips", RowDataset), Clips) and "video" not in registry.names("data")


def test_manifest_with_hash_and_split_folders(tmp_path):
    good = write_clip(tmp_path / "train" / "a.avi", numbered(6)).read_bytes()
    write_clip(tmp_path / "train" / "b.avi", numbered(6))
    write_clip(tmp_path / "test" / "c.avi", numbered(6))
    rows = [
        {"file_name": "a.avi", "text": "one", "label": "x", "sha256": hashlib.sha256(good).hexdigest()},
        {"file_name": "b.avi", "text": "two", "label": "y", "sha256": "0" * 64},
    ]
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = clips(tmp_path, split="train")
    assert data.sample(0, None).caption == "one"
    with pytest.raises(DataError, match="sha256"):
        data.sample(1, None)
    assert [clips(tmp_path, split=s).key(0) for s in ("test", "val")] == ["test/c.avi"] * 2
    outside = {"file_name": "../a.avi"}
    (tmp_path / "train" / "metadata.jsonl").write_text(json.dumps(outside))
    with pytest.raises(DataError, match="line 1"):
        clips(tmp_path)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    write_clip(tmp_path / "secret", numbered(3))
    (tmp_path / "root" / "f").mkdir(parents=True)
    (tmp_path / "root" / "f" / "1.png").symlink_to(tmp_path / "secret" / "000001.png")
    with pytest.raises(DataError, match="leads out of the data folder"):
        clips(tmp_path / "root")


# windows


def test_windows_by_count(one):
    assert levels(clips(one).sample(0, None).target) == [8, 9, 10, 11]  # the centre of 20
    assert levels(clips(one, window="first").sample(0, rng.generator(3)).target) == [0, 1, 2, 3]
    assert levels(clips(one, stride=5).sample(0, None).target) == [2, 7, 12, 17]
    data = clips(one)
    counts = [0] * 17
    for place in range(1700):
        counts[data._picks(0, place / 1700)[0]] += 1
    assert set(counts) == {100} and data._picks(0, 1.0)[0] == 16  # every place, and equally often
    assert len({levels(data.sample(0, rng.generator(i)).target)[0] for i in range(8)}) > 2
    row = clips(one, past=3).sample(0, None)
    assert levels(row.frames) == [7, 8, 9] and levels(row.target) == [10, 11, 12, 13]
    row = clips(one, past=1, overlap=True).sample(0, None)
    assert torch.equal(row.frames[0], row.target[0]) and levels(row.target) == [8, 9, 10, 11]
    assert clips(one, past=1).provides.frames.frames == 1 and clips(one).provides.frames is None


def test_windows_by_time(one):
    assert levels(clips(one, fps=5, window="first").sample(0, None).target) == [0, 2, 4, 6]
    assert levels(clips(one, fps=20, window="first").sample(0, None).target) == [0, 0, 1, 1]
    assert levels(clips(one, fps=2, window="first").sample(0, None).target) == [0, 5, 10, 15]
    with pytest.raises(DataError, match=r"a\.avi: it lasts 2\.00 s; 4 frames at 1 a second need 3\.00"):
        clips(one, fps=1).sample(0, None)
    assert levels(clips(one, fps=1, short="repeat").sample(0, None).target) == [0, 10, 19, 19]
    write_clip(one / "sub" / "f", numbered(9))
    with pytest.raises(DataError, match="it has no times"):
        clips(one / "sub", fps=5).sample(0, None)


def test_a_short_clip_is_refused_or_its_last_frame_repeated(one):
    with pytest.raises(DataError, match=r"a\.avi: it has 20 frames; 21 frames by 1 need 21"):
        clips(one, frames=21).sample(0, None)
    assert levels(clips(one, frames=22, short="repeat").sample(0, None).target)[-4:] == [18, 19, 19, 19]


def test_a_variable_rate_needs_times(tmp_path):
    with av.open(str(tmp_path / "v.mkv"), "w") as out:
        stream = out.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 12, "bgr0"
        for t, frame in enumerate(numbered(10)):
            picture = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
            picture = picture.reformat(format="bgr0")
            picture.pts, picture.time_base = t if t < 5 else t + 5, Fraction(1, 10)  # half a second is missing
            out.mux(stream.encode(picture))
        out.mux(stream.encode())
    with pytest.raises(DataError, match=r"its rate varies \(100 to 600 ms between frames\); set data\.fps"):
        clips(tmp_path).sample(0, None)
    row = clips(tmp_path, fps=10, frames=12, window="first").sample(0, None)
    assert levels(row.target) == [0, 1, 2, 3, 4, 4, 4, 4, 4, 4, 5, 6]  # the frame stays on the screen


# pixels


def test_augmentation_moves_all_frames_together(one):
    data = clips(one, past=2, flip=True, load_size=10)
    mirrored = set()
    for i in range(30):
        row = data.sample(0, rng.generator(i))
        both = torch.cat([row.frames, row.target])
        edges = [(f[0, 0, 0] > f[0, 0, -1]).item() for f in both]
        assert len(set(edges)) == 1 and both.shape == (6, 3, 8, 8)
        mirrored.add(edges[0])
        again = data.sample(0, rng.generator(i))
        assert torch.equal(again.target, row.target)
    assert mirrored == {True, False}
    assert all(data.sample(0, None).target[0, 0, 0, 0] > data.sample(0, None).target[0, 0, 0, -1] for _ in range(3))


def test_framing_and_grey(one):
    assert clips(one, channels=1).sample(0, None).target.shape == (4, 1, 8, 8)
    assert levels(clips(one, channels=1).sample(0, None).target) == [8, 9, 10, 11]
    padded = clips(one, resize="pad", background=7).sample(0, None).target
    assert padded[:, :, 0].unique().tolist() == [7] and padded[:, :, 4].unique().tolist() != [7]


# cache


def test_the_cache_decodes_once_and_changes_nothing(one, monkeypatch):
    monkeypatch.setenv("CONDGEN_CACHE", str(one.parent / "kept"))
    options = {"past": 2, "load_size": 10, "flip": True}
    plain, cached = clips(one, **options), clips(one, cache=True, **options)
    assert cached.cache_bytes() == 20 * 3 * 10 * 13  # 12 x 16 becomes 10 x 13
    reads = []
    read = video.read_frames
    monkeypatch.setattr(video, "read_frames", lambda *a, **k: reads.append(a) or read(*a, **k))
    for i in range(5):
        a, b = plain.sample(0, rng.generator(i)), cached.sample(0, rng.generator(i))
        assert torch.equal(a.target, b.target) and torch.equal(a.frames, b.frames)
    assert len(reads) == 5 + 1
    assert torch.equal(clips(one, cache=True, **options).sample(0, rng.generator(0)).target,
                       plain.sample(0, rng.generator(0)).target)  # fmt: skip
    assert len(reads) == 7  # only the plain one
    kept = list((one.parent / "kept" / "clips").iterdir())
    assert len(kept) == 1 and kept[0].stat().st_size == cached.cache_bytes() + 128
    pickle.loads(pickle.dumps(cached)).sample(0, None)
    row = cached.sample(0, rng.generator(0))
    row.target.zero_()
    assert not torch.equal(cached.sample(0, rng.generator(0)).target, row.target)
    write_clip(one / "a.avi", numbered(20, first=50))  # another clip under the old name
    assert levels(clips(one, cache=True, window="first").sample(0, None).target) == [50, 51, 52, 53]


def test_a_cache_that_is_too_large_is_refused_with_its_size(one):
    with pytest.raises(ConfigError, match=r"about 0\.0 GiB .*data\.cache_gib=1e-09"):
        clips(one, cache=True, cache_gib=1e-9)


# bad clips and the loader


def bad_folder(root: Path) -> Path:
    for i in range(6):
        write_clip(root / f"good{i}.avi", numbered(8, first=i * 10))
    whole = (root / "good0.avi").read_bytes()
    (root / "cut.avi").write_bytes(whole[: len(whole) // 2])
    (root / "empty.mp4").write_bytes(b"")
    (root / "list.mp4").write_text("#EXTM3U\nfile:///etc/passwd\n")
    write_clip(root / "short.avi", numbered(2))
    return root


def test_check_data_names_every_bad_clip(tmp_path):
    report = check(clips(bad_folder(tmp_path)))
    assert set(report.bad) == {"cut.avi", "empty.mp4", "list.mp4", "short.avi"}
    assert "frames can be read" in report.bad["cut.avi"] and "playlist" in report.bad["list.mp4"]
    assert report.good == 6 and report.sizes == {"uint8 4x3x8x8": 6}


def test_check_data_reads_beyond_the_window(tmp_path):
    write_clip(tmp_path / "f", numbered(20))
    (tmp_path / "f" / "000019.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    data = clips(tmp_path)
    data.sample(0, None)  # the window in the middle is whole
    assert "000019.png" in check(data).bad["f"]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_quarantines_and_carries_clips(tmp_path, workers):
    data = clips(bad_folder(tmp_path), past=2)
    feed = BatchDataset(data, data.provides, batch_size=5, seed=0)
    loaded = list(batches(feed, start=0, stop=2, workers=workers))
    assert {q.key for part in loaded for q in part.quarantined} == {"cut.avi", "empty.mp4", "list.mp4", "short.avi"}
    batch = loaded[0].batch.as_float()
    assert batch.target.shape == (5, 4, 3, 8, 8) and batch.condition.frames.pixels.shape == (5, 2, 3, 8, 8)
    expected = [feed[g].batch.target for g in range(2)]
    assert all(torch.equal(a.batch.target, b) for a, b in zip(loaded, expected, strict=True))


def test_wrong_options_say_what_is_allowed(one):
    for wrong in (
        {"window": "last"}, {"short": "loop"}, {"channels": 2}, {"resize": "fit"}, {"frames": 0}, {"load_size": 4},
        {"overlap": True}, {"overlap": True, "past": 9}, {"fps": 5, "stride": 2}, {"fps": float("nan")},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=r"data\."):
            clips(one, **wrong)
    with pytest.raises(DataError, match="is not a folder"):
        clips(one / "a.avi")


# real clips


def test_shared_stacked_strips(tmp_path):
    root = Path(os.environ.get("CONDGEN_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
    archive = root / "human_actions" / "actions64.zip"
    if not archive.is_file():
        pytest.skip("shared clips are not beside this checkout")
    with zipfile.ZipFile(archive) as held:
        lengths = {row["file"]: row["frames"] for row in json.loads(held.read("meta.json"))}
        names = [name for name in held.namelist() if name.startswith("test/") and name.endswith(".jpg")]
        for name in names:
            held.extract(name, tmp_path)
    data = Clips(root=str(tmp_path), size=64, split="test", frames=16, past=1, overlap=True, stride=2)
    assert len(data) == 7 and check(data).exit_code == 0
    for index in range(7):
        assert data._learn(index).frames == lengths[data.key(index)]
    row = data.sample(0, None)
    moved = (row.target[1:].float() - row.target[:-1].float()).abs().mean()
    assert row.target.shape == (16, 3, 64, 64) and 0.2 < moved < 20


# lists


def listed(root: Path, **lists: str) -> list[str]:
    for name, text in lists.items():
        (root / f"{name}.txt").write_text(text)
    named = {"list": "train.txt"} if "train" in lists else {}
    named |= {"test_list": "test.txt"} if "test" in lists else {}
    return [clips(root, **named, split=split).key(i) for split in ("train", "test")
            for i in range(len(clips(root, **named, split=split)))]  # fmt: skip


@pytest.fixture
def tree(tmp_path) -> Path:
    for name in ("run/a b", "run/c", "walk/d", "walk/e"):
        write_clip(tmp_path / f"{name}.avi", numbered(6))
    return tmp_path


def test_lists_choose_the_clips_of_each_split(tree):
    both = {"train": "walk/d.avi\n\n# a note\nrun/a b.avi 1\n", "test": "run/c.avi\r\n"}
    assert listed(tree, **both) == ["walk/d.avi", "run/a b.avi", "run/c.avi"]  # in the order of the list
    data = clips(tree, list="train.txt", test_list="test.txt", split="train")
    assert data.label_names == ("run", "walk") and [data.sample(i, None).label for i in range(2)] == [1, 0]
    assert [clips(tree, list="train.txt", test_list="test.txt", split=s).key(0) for s in ("val", "test")] == [
        "run/c.avi"
    ] * 2
    (tree / "elsewhere").mkdir()
    (tree / "train.txt").rename(tree / "elsewhere" / "mine.txt")
    away = clips(tree, list=str(tree / "elsewhere" / "mine.txt"))
    assert [away.key(i) for i in range(2)] == ["walk/d.avi", "run/a b.avi"]


def test_one_list_alone(tree):
    rest = listed(tree, test="run/c.avi\n")
    assert rest == ["run/a b.avi", "walk/d.avi", "walk/e.avi", "run/c.avi"]
    (tree / "test.txt").unlink()
    halves = listed(tree, train="walk/d.avi\nrun/c.avi\n")
    assert sorted(halves) == ["run/c.avi", "walk/d.avi"]  # a hash divides the listed ones, one on each side


def test_a_listed_clip_keeps_what_its_manifest_says_and_a_missing_one_is_quarantined(tree):
    rows = [{"file_name": "run/c.avi", "text": "hello", "label": "x"}, {"file_name": "walk/d.avi", "label": "y"}]
    (tree / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tree / "t.txt").write_text("run/c.avi\nrun/gone.avi\n")
    data = clips(tree, list="t.txt")
    assert len(data) == 2 and data.sample(0, None).caption == "hello" and data.label_names == ("x",)
    assert set(check(data).bad) == {"run/gone.avi"} and "missing" in check(data).bad["run/gone.avi"]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("/etc/passwd", "must be relative"), ("../outside.avi", "must be relative"),
        ("run/../../x.avi", "must be relative"), ("~/x.avi\0", "NUL"),
        ("http://example.com/a.mp4", "is an address"), ("file:///etc/passwd", "is an address"),
        ("concat:/etc/passwd", "is an address"), ("run\\c.avi", "must be relative"), ("run/c.avi\0", "NUL"),
        ("run/c.avi 7\nrun/c.avi", "twice"),
    ],
)  # fmt: skip
def test_hostile_lines_of_a_list_are_refused(tree, line, why):
    (tree / "list.txt").write_bytes(b"# one\n" + line.encode() + b"\n")
    with pytest.raises(DataError, match=r"list\.txt has 1 bad lines") as caught:
        clips(tree, list="list.txt")
    assert why in str(caught.value) and "line " in str(caught.value)


def test_lists_that_are_missing_empty_or_overlap(tree):
    with pytest.raises(DataError, match="there is no list no.txt"):
        clips(tree, list="no.txt")
    (tree / "a.txt").write_text("# nothing\n")
    with pytest.raises(DataError, match=r"a\.txt names no clip"):
        clips(tree, list="a.txt")
    (tree / "a.txt").write_text("run/c.avi\nwalk/d.avi\n")
    (tree / "b.txt").write_text("run/c.avi\n")
    with pytest.raises(DataError, match=r"1 clips are in both a\.txt and b\.txt, such as run/c\.avi"):
        clips(tree, list="a.txt", test_list="b.txt")


# actions


@pytest.fixture
def told(tmp_path) -> Path:
    write_clip(tmp_path / "a.avi", numbered(20), fps=10)
    write_clip(tmp_path / "folder", numbered(12))
    for name, frames in (("a", 20), ("folder", 12)):
        np.save(tmp_path / f"{name}.actions.npy", np.stack([np.arange(frames), -np.arange(frames)], 1) * 0.5)
    return tmp_path


def test_actions_go_with_their_frames(told):
    data = clips(told, past=3, actions="past", stride=2)
    assert len(data) == 2  # the arrays beside the clips are no clips
    assert (data.provides.frames.frames, data.provides.frames.actions) == (3, 2)
    for window in ("first", "random"):
        data = clips(told, past=3, actions="past", stride=2, frames=2, window=window)
        for index in range(2):
            sample = data.sample(index, rng.generator(7))
            assert sample.actions.dtype == torch.float32 and sample.actions[:, 0].tolist() == [
                0.5 * n for n in levels(sample.frames)
            ]
    data = clips(told, past=3, actions="future")
    sample = data.sample(0, None)
    assert data.provides.frames.frames == 7 and sample.frames.shape[0] == 7 == len(sample.actions)
    assert (sample.actions[:, 0] * 2).tolist() == levels(sample.frames[:3]) + levels(sample.target)
    assert torch.equal(sample.actions[:, 1], -sample.actions[:, 0])
    assert all(torch.equal(frame, sample.frames[2]) for frame in sample.frames[3:])  # the future is not shown
    batch = collate([data.sample(0, None), data.sample(1, None)], data.provides)
    assert batch.condition.frames.actions.shape == (2, 7, 2)
    plain, other = clips(told, past=3).fingerprint, data.fingerprint
    assert plain != other and clips(told, past=3).sample(0, None).actions is None


def test_many_clips_of_one_array_have_actions_each(tmp_path):
    np.save(tmp_path / "m.npy", np.zeros((6, 3, 8, 8), np.uint8))
    np.save(tmp_path / "m.actions.npy", np.arange(18).reshape(6, 3, 1))
    data = clips(tmp_path, past=2, actions="past", window="first")
    assert len(data) == 3 and data.sample(1, None).actions.flatten().tolist() == [1, 4]


def test_actions_that_do_not_fit_are_said(told):
    for more, says in (({}, "needs data.past"), ({"past": 2, "flip": True}, "data.flip"),
                       ({"past": 2, "overlap": True}, "overlap=false")):  # fmt: skip
        with pytest.raises(ConfigError, match=says):
            clips(told, actions="future", **more)
    for wrong, says in ((np.zeros((19, 2)), r"\(20, 2\): a row for each frame"), (np.zeros((20, 3)), "a row for each"),
                        (np.full((20, 2), np.nan), "NaN"), (np.array([["x"] * 2] * 20), "no array of numbers"),
                        (np.array([[None] * 2] * 20), "cannot be read")):  # fmt: skip
        np.save(told / "a.actions.npy", wrong, allow_pickle=True)
        np.save(told / "folder.actions.npy", np.zeros((12, 2)))
        data = clips(told, past=2, actions="past", window="first")
        data.provides = replace(data.provides, frames=replace(data.provides.frames, actions=2))
        with pytest.raises(DataError, match=says):
            data.sample(0, None)
    (told / "a.actions.npy").unlink()
    with pytest.raises(DataError, match=r"there is no a.actions.npy"):
        clips(told, past=2, actions="past").sample(0, None)
    (told / "folder.actions.npy").unlink()
    with pytest.raises(DataError, match=r"needs NAME.actions.npy beside each clip"):
        clips(told, past=2, actions="past")
