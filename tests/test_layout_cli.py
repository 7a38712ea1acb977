"""From a sentence and a place to pictures, and from a sentence and a few points to all of them, as a user types it."""

import functools
import json
import sys

import pytest
import torch
from PIL import Image

import condgen
from condgen import cli
from condgen.commands import launcher
from condgen.errors import ConfigError
from condgen.metrics import evaluator

COMMON = [
    "system.preset=tiny", "data.size=16", "data.groups=[food-drink]", "text.encoder=hash_bow", "train.steps=2",
    "train.sample_every=100", "eval.num_samples=6", "--quiet",
]  # fmt: skip
POINTS = "data.ignore=[label,boxes,image,frames]"


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["condgen"])
    monkeypatch.setattr(launcher, "_tool", lambda name, module: [name])
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    pytest.importorskip("resvg_py")
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["condgen"])
        quick = functools.partial(evaluator.EvaluatorOptions, steps=2, batch_size=8, width=2)
        patch.setattr(evaluator, "EvaluatorOptions", quick)  # the judge of the captions is not what is tested here
        patch.setenv("CONDGEN_CACHE", str(root / "cache"))
        for name, words in {
            "box": ["task=layout2image"],
            "points": ["task=layout2image", POINTS],
            "complete": ["task=text2keypoints"],
        }.items():
            assert cli.main(["train", *words, *COMMON, f"run.dir={root}", f"run.name={name}", "eval.finder=foreground"][
                : None if name != "complete" else -1]) == 0  # fmt: skip
    torch.set_flush_denormal(False)
    return root


def sample(*words):
    assert cli.main(["sample", *map(str, words)]) == 0


def test_boxes_are_drawn_into_and_beside_the_grid(runs, tmp_path):
    ask = ["--boxes", "0.1,0.2,0.5,0.6", "--text", "a red apple", "--num", 2]
    sample(runs / "box", *ask, "-o", "one.png")
    sample(runs / "box", "--boxes", "0.5,0.4,0.9,0.8", *ask[2:], "-o", "two.png")
    one, two = (Image.open(tmp_path / f"{name}.png").convert("RGB") for name in ("one", "two"))
    assert one.size == two.size and one.tobytes() != two.tobytes()
    blue = (0, 114, 178)  # the outline of the first box: in the layout column
    found = [[at for at in range(one.width) if grid.getpixel((at, row)) == blue] for grid in (one, two)
             for row in range(one.height)]  # fmt: skip
    assert any(found[: one.height]) and any(found[one.height :])


def test_partial_keypoints_are_completed_and_then_drawn(runs, tmp_path, capsys):
    (tmp_path / "some.json").write_text(json.dumps({"top": [0.5, 0.125], "left": None}))
    sample(runs / "complete", "--text", "a red apple", "--keypoints", "some.json", "--num", 3, "-o", "all.png",
           "threshold=0")  # fmt: skip
    assert Image.open(tmp_path / "all.png").width > 3 * 96
    made = json.loads((tmp_path / "all.json").read_text())
    assert len(made) == 3 and all(list(row) == ["top", "bottom", "left", "right", "centre"] for row in made)
    assert all(row["top"] == [0.5, 0.125] for row in made)  # what was given stays
    assert all(point is not None for row in made for point in row.values())
    assert len({json.dumps(row["left"]) for row in made}) == 3
    sample(runs / "points", "--text", "a red apple", "--keypoints", "all.json", "--num", 1, "-o", "drawn.png")
    assert Image.open(tmp_path / "drawn.png").height > 3 * 90  # a row for each completion


def test_nothing_given_means_every_point_and_a_completion_depends_on_its_seed_alone(runs):
    pipe = condgen.load(runs / "complete")
    few = pipe.complete(text="a lemon", num=2, threshold=0.0, batch_size=1)
    many = pipe.complete(text=["a lemon", "a car"], num=3, threshold=0.0)
    assert few.rows == [many.rows[0], many.rows[1]] and many.rows[0] != many.rows[3]
    hidden = pipe.complete(text="a lemon", keypoints={"left": [0.2, 0.4]}, threshold=1.0).rows[0]
    assert hidden["left"] == [0.2, 0.4] and hidden["top"] is None
    with pytest.raises(ConfigError, match=r"makes no pictures; call .complete"):
        pipe(text="a lemon", keypoints={})
    with pytest.raises(ConfigError, match="does not complete keypoints"):
        condgen.load(runs / "box").complete(text="a lemon")


def test_scores_of_place_have_floors_and_ceilings(runs):
    files = sorted((runs / "box" / "eval").glob("*.json"))
    scores = {one["name"]: one for one in json.loads(files[-1].read_text())["scores"]}
    for name in ("box_iou", "inside", "moves"):
        assert scores[name]["floor"] is not None and scores[name]["ceiling"] > 0.8, name


def test_points_files_are_for_points(runs):
    assert cli.main(["sample", str(runs / "box"), "--text", "a", "--boxes", "0,0,1,1", "-o", "x.json"]) == 2
