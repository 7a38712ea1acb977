"""The task end to end on a few icons: hooks, pictures and scores, for both layouts."""

import pytest
import torch

from condgen import build, config
from condgen.data.base import RowDataset
from condgen.errors import ConfigError
from condgen.registry import load
from condgen.task import Task
from condgen.types import Boxes, Condition, Text

WORDS = [
    "task=layout2image", "system.preset=tiny", "data.size=16", "text.encoder=hash_bow", "text.cache=memory",
    "data.groups=[food-drink]",
]  # fmt: skip
POINTS = "data.ignore=[label,boxes,image,frames]"


class Media:
    def __init__(self):
        self.shown = {}

    def media(self, step, name, picture):
        self.shown[name] = picture


@pytest.mark.parametrize(("more", "names"), [((), {"grid", "moved"}), ((POINTS,), {"grid"})])
def test_hooks_draw_and_measure(more, names):
    pytest.importorskip("resvg_py")
    built = build.build(config.load([*WORDS, *more]))
    log = Media()
    logged = {}
    with torch.no_grad():
        for hook in built.task.hooks(built, None, log):
            logged |= hook.run(built.system.eval(), 3) or {}
    assert set(log.shown) == names and isinstance(built.train_data, RowDataset)
    place = "keypoints" if more else "boxes"
    assert built.system.layout == ("keypoints" if more else "box")
    assert logged[f"sensitivity/{place}"] > 0 and logged["sensitivity/text"] > 0


def test_without_a_place_the_task_says_what_to_do():
    pytest.importorskip("resvg_py")
    with pytest.raises(ConfigError, match="needs boxes or keypoints"):
        build.build(config.load([*WORDS, "data.ignore=[label,boxes,keypoints,image,frames]"]))


def test_the_strip_moves_one_box_and_takes_the_others_away():
    task = load("tasks", "layout2image", Task)
    places = __import__(task.__module__, fromlist=["places"]).places
    asked = Condition(
        text=Text(torch.zeros(2, 3)), boxes=Boxes(torch.rand(2, 3, 4), torch.ones(2, 3, dtype=torch.bool))
    )
    moved = places(asked)
    assert len(moved) == 10 and moved.boxes.valid.sum(1).tolist() == [1] * 10
    sides = moved.boxes.xyxy[:, 0, 2:] - moved.boxes.xyxy[:, 0, :2]
    torch.testing.assert_close(sides, torch.full((10, 2), 0.5))
    assert len(moved.boxes.xyxy[:5, 0].unique(dim=0)) == 5
