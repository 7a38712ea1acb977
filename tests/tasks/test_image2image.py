"""The task from pairs in two folders to scores, with one command and no conversion."""

import json

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest

from condgen.cli import main
from condgen.metrics.label_recovery import SegmenterOptions


def pairs(root, count, split=""):
    for n in range(count):
        pixels = np.random.default_rng(n).integers(0, 256, (20, 20, 3), np.uint8)
        for side, picture in (("A", pixels), ("B", 255 - pixels)):
            (root / split / side).mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(picture).save(root / split / side / f"{n}.png")
    return root


def words(root, out, *more):
    return [
        "train", "task=image2image", "system.preset=tiny", "data=pairs", f"data.root={root}", "data.size=16",
        "data.workers=0", "train.device=cpu", "train.steps=2", "train.sample_every=1", "eval.extractor=pixels",
        f"run.dir={out}", "run.name=r", *more,
    ]  # fmt: skip


@pytest.mark.parametrize(("count", "kid"), [(4, False), (30, True)])
def test_two_folders_become_a_scored_translator(tmp_path, count, kid):
    assert main(words(pairs(tmp_path / "data", count), tmp_path / "runs", "data.holdout=0.4")) == 0
    run = tmp_path / "runs" / "r"
    (file,) = (run / "eval").glob("*.json")
    scores = {s["name"]: s for s in json.loads(file.read_text())["scores"]}
    assert {"l1", "psnr", "ssim", "l1/mean-image", "input_recovery", "sensitivity/image"} <= set(scores)
    assert ("kid" in scores) is kid
    assert all(scores[name]["floor"] is not None for name in ("l1", "psnr", "ssim", "input_recovery"))
    assert list((run / "samples").glob("*grid.png"))


def test_too_few_held_out_pairs_are_said_before_training(tmp_path, capsys):
    pairs(tmp_path / "data", 3, "train")
    pairs(tmp_path / "data", 1, "test")
    assert main(words(tmp_path / "data", tmp_path / "runs")) == 2
    assert "1 held-out pairs are too few" in capsys.readouterr().out


# a user with folders


def user_pairs(root, count, side=64):
    """Shapes in A as PNG, their photo in B as JPEG or PNG; names as users have them."""
    for n in range(count):
        draws = np.random.default_rng(n)
        mask = PIL.Image.new("RGB", (side, side), "white")
        x, y, r = (int(draws.integers(low, high)) for low, high in ((16, 48), (16, 48), (6, 14)))
        PIL.ImageDraw.Draw(mask).ellipse((x - r, y - r, x + r, y + r), outline="black")
        photo = np.asarray(mask) // 2 + draws.integers(0, 40, (side, side, 3), np.uint8)
        for folder, picture, suffix in (
            ("A", mask, (".png", ".webp")[n % 2]), ("B", PIL.Image.fromarray(photo), (".jpg", ".png")[n % 3 == 0]),
        ):  # fmt: skip
            (root / folder).mkdir(parents=True, exist_ok=True)
            picture.save(root / folder / f"Scan {n:03d}{suffix}")
    return root


def user_words(root, out):
    return [
        "train", "task=image2image", "data=pairs", f"data.root={root}", "data.size=64", "system.preset=tiny",
        "train.device=cpu", "eval.extractor=pixels", f"run.dir={out}", "run.name=r",
    ]  # fmt: skip


@pytest.mark.slow
def test_400_pairs_in_two_folders_become_a_translator_with_one_command(tmp_path, capsys):
    root = user_pairs(tmp_path / "data", 400)
    before = sorted((p.relative_to(root), p.stat().st_mtime_ns) for p in root.rglob("*"))
    assert main(user_words(root, tmp_path / "runs")) == 0
    assert sorted((p.relative_to(root), p.stat().st_mtime_ns) for p in root.rglob("*")) == before  # nothing converted
    run = tmp_path / "runs" / "r"
    assert (run / "export" / "model.safetensors").is_file() and (run / "report.html").is_file()
    capsys.readouterr()
    assert main(["translate", str(run), str(root / "A"), "-o", str(tmp_path / "out")]) == 0
    assert "400 translated, 0 already there, 0 failed" in capsys.readouterr().out
    made = sorted((tmp_path / "out").glob("*.png"))
    assert [p.stem for p in made] == [f"Scan {n:03d}" for n in range(400)]
    assert PIL.Image.open(made[0]).size == (64, 64)


def unpaired(root):
    (root / "A" / "Scan 003.webp").rename(root / "A" / "Scan003.webp")


def other_size(root):
    PIL.Image.new("RGB", (64, 60)).save(root / "B" / "Scan 005.jpg")


def empty_folder(root):
    for file in (root / "B").iterdir():
        file.unlink()


def palette(root):
    for n in (0, 2):
        PIL.Image.open(root / "A" / f"Scan {n:03d}.png").convert("P").save(root / "A" / f"Scan {n:03d}.png")


def truncated(root):
    file = root / "B" / "Scan 004.jpg"
    file.write_bytes(file.read_bytes()[:-200])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (unpaired, ["2 pictures have no partner of the same name", "A/Scan003", "B/Scan 003", "11 pairs are complete",
                    "rename the files, or set data.unpaired=skip"]),
        (other_size, ["pairs cannot be used", "Scan 005: A has 64 x 64 pixels and B 64 x 60", "must have one size",
                      "Repair or remove them, or set data.broken=skip to train on the other"]),
        (empty_folder, ["the folder B holds no picture", "pairs need pictures in A and B"]),
        (palette, ["A/Scan 000.png", "A/Scan 002.png", "a palette picture", "data.palette=colours", "save it as RGB",
                   "data.source_classes=N"]),
        (truncated, ["B/Scan 004.jpg: it cannot be decoded: image file is truncated", "data.broken=skip"]),
    ],
)  # fmt: skip
def test_each_mistake_is_said_before_training(tmp_path, capsys, spoil, says):
    root = user_pairs(tmp_path / "data", 12)
    spoil(root)
    assert main(user_words(root, tmp_path / "runs")) == 3
    said = capsys.readouterr()
    for part in says:
        assert part in said.out + said.err, said
    assert not (tmp_path / "runs").exists()  # no run folder, no step


# label maps


def label_maps(root, count, form):
    """Four blocks of three classes as colours or as numbers, and a texture for each class."""
    colours = np.array([(0, 0, 170), (255, 85, 0), (0, 170, 60)], np.uint8)
    for n in range(count):
        draws = np.random.default_rng(n)
        ids = draws.integers(0, 3, (2, 2)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        (root / "A").mkdir(parents=True, exist_ok=True)
        (root / "B").mkdir(exist_ok=True)
        picture = PIL.Image.fromarray(colours[ids] if form == "colours" else ids)
        if form == "palette":
            picture.putpalette([7, 8, 9] * 256)
        picture.save(root / "A" / f"{n}.png")
        PIL.Image.fromarray((ids * 80)[..., None] + draws.integers(0, 60, (16, 16, 3), np.uint8)).save(
            root / "B" / f"{n}.png"
        )
    return root


@pytest.mark.parametrize(
    ("form", "options", "scored"),
    [
        ("colours", ["data.source_resample=nearest"], True),
        ("colours", ["eval.labels=off"], False),
        ("palette", ["data.source_classes=3"], True),
        ("grey", ["data.source_classes=3", "data.palette=numbers"], True),
    ],
)
def test_label_maps_are_scored_by_their_labels(tmp_path, monkeypatch, form, options, scored):
    monkeypatch.setenv("CONDGEN_CACHE", str(tmp_path / "cache"))
    quick = SegmenterOptions(steps=40, width=6, size=16, lr=1e-2)
    monkeypatch.setattr("condgen.metrics.label_recovery.SegmenterOptions", lambda: quick)
    root = label_maps(tmp_path / "data", 12, form)
    assert main(words(root, tmp_path / "runs", "data.holdout=0.4", *options)) == 0
    run = tmp_path / "runs" / "r"
    (file,) = (run / "eval").glob("*.json")
    scores = {s["name"]: s for s in json.loads(file.read_text())["scores"]}
    names = {"label_pixel_accuracy", "label_class_accuracy", "label_iou"}
    assert names & set(scores) == (names if scored else set())
    if scored:
        assert all(scores[n]["floor"] < scores[n]["ceiling"] for n in names)
        assert scores["input_recovery"]["ceiling"] > 0.2  # classes are drawn as colours, so they have edges
    classes = json.loads((run / "export" / "config.json").read_text())["condition"]["image"].get("classes", 0)
    assert classes == (3 if form != "colours" else 0)
