"""The last check of the VGAN dossier on real people: what D's features are worth for recognising what they do.

The 36 strips of shared data have no labels in their files, but an order: actor by actor, each waving both arms, one
arm, jumping and bending. The last two actors are held out.
"""

import io
import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from condgen.cli import main

STRIPS = Path(os.environ.get("CONDGEN_DATA", Path(__file__).resolve().parents[3] / "shared/data"))
STRIPS /= "human_actions/actions64.zip"
ACTIONS = ("wave-both", "wave-one", "jump", "bend")
SIDE, FRAMES, HELD_OUT = 64, 16, 28


@pytest.fixture
def folder(tmp_path):
    """Class folders of columns of 16 frames, every 8 frames a new one."""
    if not STRIPS.is_file():
        pytest.skip("needs human_actions/actions64.zip under CONDGEN_DATA")
    with zipfile.ZipFile(STRIPS) as held:
        for name in (one for one in held.namelist() if one.endswith(".jpg")):
            number, strip = int(Path(name).stem), Image.open(io.BytesIO(held.read(name)))
            place = tmp_path / "clips" / ("test" if number >= HELD_OUT else "train") / ACTIONS[number % 4]
            place.mkdir(parents=True, exist_ok=True)
            for part, start in enumerate(range(0, strip.height // SIDE - FRAMES + 1, 8)):
                window = strip.crop((0, SIDE * start, SIDE, SIDE * (start + FRAMES)))
                window.save(place / f"{number:02d}-{part}.png")
    return tmp_path / "clips"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_features_of_a_discriminator_recognise_what_people_do(folder, tmp_path, monkeypatch):
    """What is sure after half a minute of training without labels: both networks know unseen people's actions far above
    chance. Whether the trained one is ahead is printed and stays open: after four minutes it was not reliably."""
    monkeypatch.setenv("CONDGEN_CACHE", str(tmp_path / "cache"))
    words = [
        "task=video", "system=vgan", "system.preset=small", "data=clips", f"data.root={folder}", "data.size=32",
        f"data.frames={FRAMES}", "data.workers=0", "data.cache=true", "data.ignore=[label]",
        "train.device=cpu", "train.steps=80",
        "train.batch_size=16", "train.sample_every=1000", "eval.num_samples=4", "eval.extractor=pixels",
        f"run.dir={tmp_path}", "run.name=people",
    ]  # fmt: skip
    try:
        assert main(["train", *words]) == 0
    finally:
        torch.set_flush_denormal(False)  # training on a CPU switches it on; other tests want exact floats
    run = tmp_path / "people"
    assert main(["actions", str(run), "data.ignore=[]", "--steps", "80", "--batch-size", "16"]) == 0
    (file,) = (run / "eval").glob("actions-*.json")
    tuned, chance = json.loads(file.read_text())["scores"]
    assert chance["value"] < 0.35
    assert tuned["value"] > chance["value"] + 0.25 and tuned["floor"] > chance["value"] + 0.25
    assert "floor=random-weights" in tuned["signature"] and "classes=4" in tuned["signature"]
