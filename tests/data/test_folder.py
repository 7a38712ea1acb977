"""Folders: every layout, values that cannot be used, paths that leave, geometry under augmentation."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from condgen import registry
from condgen.data.base import BatchDataset, RowDataset, collate
from condgen.data.folder import Folder
from condgen.errors import ConfigError, DataError


def paint(path: Path, colour: object = (10, 20, 30), size: tuple[int, int] = (20, 16), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new(mode, size, colour).save(path)
    return path


def manifest(folder: Path, *rows: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines))


def folder(root: Path, **options: object) -> Folder:
    return Folder(**{"root": str(root), "size": 8, "split": "all", **options})


def one(root: Path, **fields: object) -> Folder:
    """A folder of one picture of 20 x 16 pixels with these manifest fields."""
    paint(root / "a.png")
    manifest(root, {"file_name": "a.png", **fields})
    return folder(root)


# layouts


def test_plain_folder_with_text_beside(tmp_path):
    paint(tmp_path / "a.png")
    paint(tmp_path / "b.jpg")
    (tmp_path / "a.txt").write_text("a red  fox\n\nthe second caption\n")
    (tmp_path / "notes.md").write_text("no picture")
    data = folder(tmp_path)
    assert [data.key(i) for i in range(2)] == ["a.png", "b.jpg"]
    assert data.provides.given == ("text",)
    assert data.sample(0, None).caption == "a red fox" and data.sample(1, None).caption is None
    assert data.captions() == ["a red fox", "the second caption"]
    drawn = {data.sample(0, torch.Generator().manual_seed(i)).caption for i in range(20)}
    assert drawn == set(data.captions())
    mean = folder(tmp_path, captions="mean")
    assert mean.sample(0, None).caption == "a red fox\nthe second caption" == mean.captions()[0]


def test_class_folders_and_split_folders(tmp_path):
    for name in ("train/cat/1.png", "train/dog/1.png", "train/dog/2.png", "test/dog/9.png"):
        paint(tmp_path / name)
    train, test = folder(tmp_path, split="train"), folder(tmp_path, split="test")
    assert train.provides.label.names == test.provides.label.names == ("cat", "dog")
    assert [train.sample(i, None).label for i in range(3)] == [0, 1, 1] and test.sample(0, None).label == 1
    assert [test.key(0), len(folder(tmp_path))] == ["test/dog/9.png", 4]
    assert folder(tmp_path, split="val").key(0) == "test/dog/9.png"


def test_split_that_does_not_exist(tmp_path):
    paint(tmp_path / "train/1.png")
    with pytest.raises(DataError, match="only train"):
        folder(tmp_path, split="test")


def test_hash_split_is_a_partition(tmp_path):
    for i in range(60):
        paint(tmp_path / f"{i}.png", size=(1, 1))
    keys = {s: {r.key for r in folder(tmp_path, split=s, holdout=0.3).rows} for s in ("train", "test", "all")}
    assert keys["train"] | keys["test"] == keys["all"] and not keys["train"] & keys["test"]
    assert 5 < len(keys["test"]) < 35


def test_manifest_with_every_field(tmp_path):
    paint(tmp_path / "train/x/a.png")
    paint(tmp_path / "train/x/line.png", (200, 200, 200))
    row = {
        "file_name": "x/a.png",
        "captions": ["one", "two"],
        "label": "bird",
        "boxes": [[0, 0, 10, 8], [5, 4, 20, 16]],
        "box_labels": ["head", "body"],
        "keypoints": [[10, 8, 2], [0, 0, 0]],
        "image": "x/line.png",
        "frames": ["x/line.png", "x/a.png"],
    }
    manifest(tmp_path / "train", row)
    data = folder(tmp_path, split="train", resize="stretch")
    assert data.provides.given == ("label", "text", "boxes", "keypoints", "image", "frames")
    sample = data.sample(0, None)
    torch.testing.assert_close(sample.boxes, torch.tensor([[0, 0, 0.5, 0.5], [0.25, 0.25, 1, 1]]))
    assert sample.box_labels.tolist() == [1, 0]  # sorted: body, head
    assert sample.keypoints[0].tolist() == [0.5, 0.5] and sample.visible.tolist() == [True, False]
    assert sample.image.unique().tolist() == [200] and sample.frames.shape == (2, 3, 8, 8)
    batch = collate([sample, sample], data.provides).as_float()
    batch.condition.check_values()
    assert registry.load("data", "folder", RowDataset) is Folder


def test_normalised_coordinates(tmp_path):
    data = one(tmp_path, boxes=[[0.1, 0.2, 0.5, 0.6]], normalised=True)
    data = folder(tmp_path, resize="stretch")
    torch.testing.assert_close(data.sample(0, None).boxes, torch.tensor([[0.1, 0.2, 0.5, 0.6]]))


def test_coordinates_are_of_the_picture_as_shown(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.new("RGB", (20, 16)).save(tmp_path / "a.png", exif=exif)  # shown as 16 wide, 20 high
    manifest(tmp_path, {"file_name": "a.png", "boxes": [[0, 0, 8, 10]]})
    box = folder(tmp_path, resize="stretch").sample(0, None).boxes
    torch.testing.assert_close(box, torch.tensor([[0, 0, 0.5, 0.5]]))


# channels and depth


def test_channels_come_from_the_files(tmp_path):
    paint(tmp_path / "grey/a.png", 9, mode="L")
    assert folder(tmp_path / "grey").target.channels == 1
    assert folder(tmp_path / "grey", channels=3).sample(0, None).target.shape == (3, 8, 8)
    paint(tmp_path / "both/a.png", 9, mode="L")
    paint(tmp_path / "both/b.png")
    both = folder(tmp_path / "both")
    assert both.target.channels == 3 and both.sample(0, None).target.shape == (3, 8, 8)
    assert folder(tmp_path / "both", channels=1).sample(1, None).target.shape == (1, 8, 8)


def test_colour_is_never_dropped_silently(tmp_path, monkeypatch):
    monkeypatch.setattr("condgen.data.folder.PROBED", 1)
    paint(tmp_path / "a.png", 9, mode="L")
    paint(tmp_path / "b.png")
    with pytest.raises(DataError, match=r"b.png: it has colour in a grey data set; set data.channels=3"):
        folder(tmp_path).sample(1, None)


def test_sixteen_bits_stay_float(tmp_path, monkeypatch):
    PIL.Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "a.png")
    paint(tmp_path / "b.png", 255, mode="L")
    data = folder(tmp_path)
    assert data.sample(0, None).target[0, 0, 0].item() == pytest.approx(40_000 / 32767.5 - 1)
    assert data.sample(1, None).target.unique().tolist() == [1.0]  # 8 bits join as float
    (tmp_path / "a.png").rename(tmp_path / "c.png")
    monkeypatch.setattr("condgen.data.folder.PROBED", 1)
    with pytest.raises(DataError, match="16 bits"):
        folder(tmp_path).sample(1, None)


# D10: captions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\0b\tc\r", "a b c"),
        ("  spaced   out ", "spaced out"),
        ("e\u0301", "\u00e9"),
        ("שלום עולם", "שלום עולם"),
        ("a 🦊 fox", "a 🦊 fox"),
        ("\ud800x", "x"),  # half a surrogate pair: JSON can say it, no tokenizer can take it
        ("x" * 2000, "x" * 2000),
    ],
)
def test_captions_are_normalised(tmp_path, text, expected):
    caption = one(tmp_path, text=text).sample(0, None).caption
    assert caption == expected and caption.encode()


@pytest.mark.parametrize(
    ("text", "reason"), [("", "empty"), ("  \n", "empty"), ("\0", "empty"), ("x" * 100_000, "2000")]
)
def test_unusable_captions_are_quarantined(tmp_path, text, reason):
    with pytest.raises(DataError, match=f"a.png.*{reason}"):
        one(tmp_path, text=text).sample(0, None)


def test_text_file_with_stray_bytes(tmp_path):
    paint(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9\n\xff\xfe ok")
    assert folder(tmp_path).captions() == ["caf\ufffd", "\ufffd\ufffd ok"]


# D11 - D14: rows of the manifest


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"text": "x"}', "file_name"),
        (b'{"file_name": 3}', "give a string"),
        (b'{"file_name": "a.png", "label": 1.5}', "label is 1.5"),
        (b'{"file_name": "a.png", "label": -1}', "label is -1"),
        (b'{"file_name": "a.png", "label": true}', "label is True"),
        (b'{"file_name": "a.png", "text": 3}', "strings"),
        (b'{"file_name": "a.png", "boxes": [[1, 2, 3]]}', "lists of 4 numbers"),
        (b'{"file_name": "a.png", "boxes": [[1, 2, "3", 4]]}', "lists of 4 numbers"),
        (b'{"file_name": "a.png", "boxes": [[1, 2, NaN, 4]]}', "NaN"),
        (b'{"file_name": "a.png", "boxes": [[1, 2, 3, 4]], "box_labels": []}', "0 entries for 1 boxes"),
        (b'{"file_name": "a.png", "keypoints": [1, 2, 3]}', "lists of 3 numbers"),
        (b'{"file_name": "a.png", "normalised": 1}', "true or false"),
        (b'{"file_name": "a.png", "text": "\xff"}', "UTF-8"),
        (b'{"file_name": "ok.png"}', "also on line 1"),
        (b"[" * 100_000, "not JSON"),
        (b'{"file_name": "../x.png"}', "stay inside"),
        (b'{"file_name": "/etc/passwd"}', "stay inside"),
        (b'{"file_name": "a/../../x.png"}', "stay inside"),
        (b'{"file_name": "a\\u0000.png"}', "NUL"),
        (b'{"file_name": "a.png", "image": "../x.png"}', "stay inside"),
        (b'{"file_name": "a.png", "frames": ["/x.png"]}', "stay inside"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, reason):
    paint(tmp_path / "ok.png")
    manifest(tmp_path, {"file_name": "ok.png"}, b"", line)
    with pytest.raises(DataError, match=r"metadata.jsonl has 1 bad lines:\nline 3: ") as caught:
        folder(tmp_path)
    assert reason in str(caught.value)


def test_many_bad_lines_are_counted(tmp_path):
    manifest(tmp_path, *[b"{"] * 30)
    with pytest.raises(DataError, match=r"30 bad lines(.|\n)*line 5(.|\n)*and 25 more"):
        folder(tmp_path)


@pytest.mark.parametrize("where", ["file", "folder"])
def test_links_out_of_the_root_are_an_error(tmp_path, where):
    paint(tmp_path / "secret/x.png")
    root = tmp_path / "root"
    root.mkdir()
    if where == "file":
        os.symlink(tmp_path / "secret/x.png", root / "x.png")
        with pytest.raises(DataError, match="through a link"):
            folder(root)
        manifest(root, {"file_name": "x.png"})
    else:
        os.symlink(tmp_path / "secret", root / "in")
        manifest(root, {"file_name": "in/x.png"})
    with pytest.raises(DataError, match="through a link"):
        folder(root)


def test_text_file_may_not_be_a_link_out(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    paint(tmp_path / "root/a.png")
    os.symlink(tmp_path / "secret.txt", tmp_path / "root/a.txt")
    with pytest.raises(DataError, match="through a link"):
        folder(tmp_path / "root")


def test_root_itself_may_be_a_link(tmp_path):
    paint(tmp_path / "real/a.png")
    os.symlink(tmp_path / "real", tmp_path / "linked")
    assert folder(tmp_path / "linked").sample(0, None).key == "a.png"


def test_mixed_labels_and_uneven_points(tmp_path):
    manifest(tmp_path, {"file_name": "a.png", "label": 1}, {"file_name": "b.png", "label": "cat"})
    with pytest.raises(DataError, match="mixes"):
        folder(tmp_path)
    manifest(tmp_path, {"file_name": "a.png", "keypoints": [[1, 1, 1]]}, {"file_name": "b.png", "keypoints": []})
    with pytest.raises(DataError, match="same number of keypoints"):
        folder(tmp_path)
    manifest(tmp_path, {"file_name": "a.png", "label": 10**12})
    with pytest.raises(DataError, match="indices"):
        folder(tmp_path)


def test_a_row_without_a_field_is_null(tmp_path):
    paint(tmp_path / "a.png")
    paint(tmp_path / "b.png")
    manifest(tmp_path, {"file_name": "a.png", "label": 2, "boxes": [], "text": "x"}, {"file_name": "b.png"})
    data = folder(tmp_path)
    assert data.provides.label.num_classes == 3
    batch = collate([data.sample(0, None), data.sample(1, None)], data.provides)
    assert batch.condition.label.tolist() == [2, -1]
    for name in ("label", "boxes", "text"):
        assert batch.condition.is_present(name).tolist() == [True, False]
    assert batch.condition.boxes.valid.sum() == 0  # no box is legal


@pytest.mark.parametrize(
    "boxes",
    [[[5, 5, 5, 9]], [[9, 5, 5, 9]], [[30, 0, 40, 8]], [[-9, -9, -1, -1]], [[1e40, 0, 1, 1]], [[0, 0, 10**40, 1]]],
)
def test_unusable_boxes_are_quarantined(tmp_path, boxes):
    with pytest.raises(DataError, match=r"a\.png"):
        one(tmp_path, boxes=boxes).sample(0, None)


def test_boxes_are_clipped_and_capped(tmp_path):
    paint(tmp_path / "a.png")
    manifest(tmp_path, {"file_name": "a.png", "boxes": [[-5, -5, 10, 8]] + [[0, 0, 9, 9]] * 999})
    data = folder(tmp_path, resize="stretch")
    assert data.provides.boxes.max_boxes == 16
    boxes = data.sample(0, None).boxes
    assert boxes.shape == (16, 4) and boxes[0].tolist() == [0, 0, 0.5, 0.5]


def test_points_outside_or_invisible(tmp_path):
    data = one(tmp_path, keypoints=[[10, 8, 2], [25, 8, 2], [1e40, 0, 0], [0, 0, 0]])
    sample = data.sample(0, None)
    assert sample.visible.tolist() == [True, False, False, False]
    assert sample.keypoints[1:].tolist() == [[0, 0]] * 3
    paint(tmp_path / "b/a.png")
    with pytest.raises(DataError, match="visible keypoint"):
        one(tmp_path / "b", keypoints=[[1e40, 0, 1]]).sample(0, None)


def test_missing_and_damaged_files_are_quarantined(tmp_path):
    for name in "abcdef":
        paint(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:50])
    (tmp_path / "d.png").write_bytes(b"garbage")
    manifest(tmp_path, *[{"file_name": f"{n}.png", "text": n} for n in "abcdefg"])  # g does not exist
    data = folder(tmp_path)
    loaded = BatchDataset(data, data.provides, batch_size=7, seed=0)[0]
    assert {q.key for q in loaded.quarantined} == {"b.png", "d.png", "g.png"}
    assert len(loaded.batch) == 7 and all(q.reason.startswith(q.key) for q in loaded.quarantined)
    again = BatchDataset(data, data.provides, batch_size=7, seed=0)[0]
    assert again.batch.keys == loaded.batch.keys


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_quarantined(tmp_path):
    paint(tmp_path / "a.png").chmod(0)
    with pytest.raises(DataError, match="permission"):
        folder(tmp_path).sample(0, None)


def test_flipped_bit_is_caught_by_its_hash(tmp_path):
    """D2: a JPEG with a flipped byte still decodes; the hash of the manifest tells."""
    import hashlib

    path = paint(tmp_path / "a.jpg", size=(64, 64))
    good = path.read_bytes()
    manifest(tmp_path, {"file_name": "a.jpg", "sha256": hashlib.sha256(good).hexdigest()})
    folder(tmp_path).sample(0, None)
    path.write_bytes(good[:-30] + bytes([good[-30] ^ 1]) + good[-29:])
    with pytest.raises(DataError, match="sha256"):
        folder(tmp_path).sample(0, None)


def test_no_rows_and_one_row(tmp_path):
    manifest(tmp_path)
    with pytest.raises(DataError, match="empty"):
        BatchDataset(folder(tmp_path), folder(tmp_path).provides, batch_size=1, seed=0)
    single = one(tmp_path)
    assert len(BatchDataset(single, single.provides, batch_size=5, seed=0)[3].batch) == 5
    with pytest.raises(DataError, match="is not a folder"):
        folder(tmp_path / "nowhere")


def test_fingerprint_follows_the_rows(tmp_path):
    """D16: an edited caption, label or file changes it; reading again does not."""
    first = one(tmp_path, text="x").fingerprint
    assert one(tmp_path, text="x").fingerprint == first
    assert one(tmp_path, text="y").fingerprint != first
    one(tmp_path, text="x")
    paint(tmp_path / "a.png", size=(33, 17))
    assert folder(tmp_path).fingerprint != first


# augmentation


def _marked(root: Path) -> tuple[Path, dict[str, object]]:
    """A bright block in a dark picture, with its box and its left and right edge as points."""
    pixels = np.zeros((60, 80, 3), np.uint8)
    pixels[20:40, 30:55] = 255
    PIL.Image.fromarray(pixels).save(root / "a.png")
    row = {"file_name": "a.png", "boxes": [[30, 20, 55, 40]], "keypoints": [[31, 30, 2], [54, 30, 2]]}
    manifest(root, {**row, "image": "a.png", "frames": ["a.png"]})
    return root, row


@pytest.mark.parametrize("policy", ["crop", "stretch", "pad"])
def test_geometry_and_sources_move_with_the_pixels(tmp_path, policy):
    data = folder(
        _marked(tmp_path)[0], size=32, load_size=40, resize=policy, flip=True, flip_pairs=((0, 1),), background=0
    )
    flips = set()
    for seed in range(30):
        sample = data.sample(0, torch.Generator().manual_seed(seed))
        assert torch.equal(sample.target, sample.image) and torch.equal(sample.target, sample.frames[0])
        ink = sample.target[0] >= 128
        if len(sample.boxes):
            xs, ys = torch.nonzero(ink.any(0)).flatten(), torch.nonzero(ink.any(1)).flatten()
            found = torch.tensor([[xs[0], ys[0], xs[-1] + 1, ys[-1] + 1]]) / 32
            assert (sample.boxes - found).abs().max() <= 1.01 / 32
        if sample.visible.all():
            assert sample.keypoints[0, 0] < sample.keypoints[1, 0]  # left stays left after the swap
        flips.add(round(sample.boxes[0, 0].item(), 3) if len(sample.boxes) else None)
    assert len(flips) > 3  # it did move


def test_row_as_it_is_uses_the_whole_frame(tmp_path):
    data = folder(_marked(tmp_path)[0], size=32, load_size=64, resize="stretch", flip=True)
    torch.testing.assert_close(data.sample(0, None).boxes, torch.tensor([[30 / 80, 20 / 60, 55 / 80, 40 / 60]]))


def test_pairs_must_match(tmp_path):
    paint(tmp_path / "a.png")
    paint(tmp_path / "b.png", size=(40, 16))
    manifest(tmp_path, {"file_name": "a.png", "image": "b.png"})
    with pytest.raises(DataError, match="pairs must match"):
        folder(tmp_path).sample(0, None)


def test_cache_is_bounded_and_changes_nothing(tmp_path):
    for i in range(12):
        paint(tmp_path / f"{i:02}.png", (i, i, i), size=(512, 512))
    small, large = folder(tmp_path, size=256, cache_mib=1), folder(tmp_path, size=256, cache_mib=64)
    none = folder(tmp_path, size=256, cache_mib=0)
    for _ in range(2):
        for i in range(12):
            rows = [d.sample(i, None).target for d in (small, large, none)]
            assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])
    assert 0 < small._cache.used <= 2**20 and none._cache.used == 0
    assert small._cache.used == sum(f[0].nbytes for f in small._cache.frames.values())
    assert large._cache.used == 12 * 3 * 256 * 256
    assert pickle.loads(pickle.dumps(large))._cache.used == 0


def test_samples_do_not_share_memory_with_the_cache(tmp_path):
    paint(tmp_path / "a.png", (1, 1, 1), size=(8, 8))
    data = folder(tmp_path)
    data.sample(0, None).target.fill_(99)
    assert data.sample(0, None).target.unique().tolist() == [1]


@pytest.mark.parametrize(
    "options",
    [{"split": "dev"}, {"resize": "fit"}, {"channels": 2}, {"captions": "all"}, {"size": 0}, {"load_size": 4},
     {"background": 300}, {"flip_pairs": ((0, 1),)}, {"cache_mib": -1}],
)  # fmt: skip
def test_wrong_options_are_named(tmp_path, options):
    paint(tmp_path / "a.png")
    with pytest.raises(ConfigError, match=next(iter(options))):
        folder(tmp_path, **options)


# groups of classes


def twenty(root: Path) -> Path:
    for k in range(20):
        for name in ("train/{}/a.png", "train/{}/b.png", "test/{}/c.png"):
            paint(root / name.format(f"n{k:04d}"), (k, 0, 0))
    return root


@pytest.mark.parametrize(
    ("classes", "kept"),
    [(["10-19"], range(10, 20)), (["n0003", 0, "5-6"], (3, 0, 5, 6)), (["7"], (7,)), ([], range(20))],
)
def test_a_group_of_an_imagenet_like_tree_is_renumbered_from_zero(tmp_path, classes, kept):
    data = [folder(twenty(tmp_path), split=split, classes=classes) for split in ("train", "test")]
    for part, rows in zip(data, (2, 1), strict=True):
        assert part.provides.label.names == tuple(f"n{k:04d}" for k in kept)
        samples = [part.sample(i, None) for i in range(len(part))]
        assert len(samples) == rows * len(kept)
        # the red of a picture is the number of its class in the whole tree
        assert all(int(s.target[0, 0, 0]) == list(kept)[s.label] for s in samples)


def test_groups_have_fingerprints_of_their_own(tmp_path):
    twenty(tmp_path)
    prints = {folder(tmp_path, classes=c).fingerprint for c in ([], ["0-1"], ["1-2"], [1, 0])}
    assert (
        len(prints) == 4
        and folder(tmp_path, classes=["0-1"]).fingerprint == folder(tmp_path, classes=[0, 1]).fingerprint
    )


@pytest.mark.parametrize(
    ("classes", "says"),
    [(["15-20"], r"0\.\.19"), (["5-3"], "3-5"), ([-1], r"0\.\.19"), (["n0001", 1], "twice"), (["n00001"], "n0001")],
)
def test_classes_that_are_not_there_are_named(tmp_path, classes, says):
    with pytest.raises(ConfigError, match=says):
        folder(twenty(tmp_path), classes=classes)


def test_a_group_leaves_rows_without_a_label_out(tmp_path):
    for i, label in enumerate(("cat", "dog", None)):
        paint(tmp_path / f"{i}.png")
    manifest(tmp_path, *({"file_name": f"{i}.png", "label": v} for i, v in enumerate(("cat", "dog", None))))
    assert [folder(tmp_path, classes=["dog"]).key(i) for i in range(1)] == ["1.png"]
    assert len(folder(tmp_path, classes=["dog"])) == 1
