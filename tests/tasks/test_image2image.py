"""The task from pairs in two folders to scores, with one command and no conversion."""

import json

import numpy as np
import PIL.Image
import pytest

from condgen.cli import main


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
