"""Where was it drawn: exact on pictures whose place is known, and between floor and ceiling."""

import pytest
import torch

from condgen.metrics.layout import THRESHOLD, box_hits, drawn, foreground, iou, layout_scores, point_hits
from condgen.types import Boxes, Condition, Keypoints

CORNERS = torch.tensor([[4, 8, 20, 16], [0, 0, 32, 32], [10, 2, 14, 30], [16, 16, 31, 31]])


def pictures(corners=CORNERS, colour=-0.8, behind=1.0, side=32):
    out = torch.full((len(corners), 3, side, side), behind)
    for row, (x0, y0, x1, y1) in enumerate(corners.tolist()):
        out[row, :, y0:y1, x0:x1] = colour
    return out


def boxes(corners=CORNERS, side=32):
    return Boxes((corners.float() / side)[:, None], torch.ones(len(corners), 1, dtype=torch.bool))


@pytest.mark.parametrize("behind", [1.0, 0.9, -0.2])
def test_the_box_of_a_rectangle_is_the_rectangle(behind):
    rows = torch.tensor([0, 2, 3])
    shown = drawn(pictures(CORNERS[rows], behind=behind))
    torch.testing.assert_close(shown.boxes, CORNERS[rows] / 32, atol=1 / 16, rtol=0)
    assert shown.found.all() and box_hits(shown, boxes(CORNERS[rows])).min() > 0.8


def test_specks_and_shades_below_the_threshold_are_no_foreground_and_thin_lines_are():
    picture = torch.ones(1, 3, 32, 32)
    picture[..., 3, 3] = -1
    picture[..., 20, 25:27] = -1
    picture[..., 10:20, 10:20] = 1 - THRESHOLD * 0.9
    assert not foreground(picture).any()
    picture[..., 5:25, 16] = -1
    assert foreground(picture)[0, 6:24, 16].all()


def test_iou_against_hand_counts():
    a = torch.tensor([[0, 0, 2, 2], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 2, 1]]).float()
    b = torch.tensor([[1, 1, 3, 3], [0, 0, 1, 1], [0, 0, 0, 0], [5, 5, 6, 6]]).float()
    torch.testing.assert_close(iou(a, b), torch.tensor([1 / 7, 1.0, 0.0, 0.0]))


def test_an_empty_picture_scores_zero_and_a_row_without_a_box_does_not_count():
    asked = boxes(CORNERS[:2])
    assert box_hits(drawn(torch.ones(2, 3, 32, 32)), asked).tolist() == [0, 0]
    asked.valid[0] = False
    assert len(box_hits(drawn(pictures(CORNERS[:2])), asked)) == 1


def test_several_boxes_count_as_their_hull():
    picture = torch.ones(1, 3, 32, 32)
    picture[..., 4:8, 4:8], picture[..., 20:28, 20:28] = -1, -1
    asked = Boxes(
        torch.tensor([[[4, 4, 8, 8], [20, 20, 28, 28], [0, 0, 0, 0]]]) / 32, torch.tensor([[True, True, False]])
    )
    assert box_hits(drawn(picture), asked).item() > 0.8


def test_points_within_reach_count_and_invisible_ones_do_not():
    shown = drawn(pictures(CORNERS[:1]))  # 4..20 x 8..16: top at (12, 8), left at (4, 12)
    xy = torch.tensor([[[12, 8], [20, 30], [4, 12]]]) / 32
    names = ("top", "right", "left")
    assert point_hits(shown, Keypoints(xy, torch.ones(1, 3, dtype=torch.bool)), names).item() == pytest.approx(2 / 3)
    assert point_hits(shown, Keypoints(xy, torch.tensor([[True, False, True]])), names).item() == 1
    assert len(point_hits(shown, Keypoints(xy, torch.zeros(1, 3, dtype=torch.bool)), names)) == 0


def test_scores_lie_between_floor_and_ceiling():
    real = pictures()
    fake = pictures(torch.tensor([[5, 9, 19, 17], [0, 0, 32, 32], [10, 8, 14, 30], [12, 12, 28, 28]]))
    xy = torch.stack([(CORNERS[:, 0] + CORNERS[:, 2]) / 2, (CORNERS[:, 1] + CORNERS[:, 3]) / 2], dim=1)[:, None] / 32
    asked = Condition(boxes=boxes(), keypoints=Keypoints(xy, torch.ones(4, 1, dtype=torch.bool)))
    keep = torch.tensor([0, 2, 3])  # a thing that fills the frame has no rim to tell it from
    scores = {
        s.name: s
        for s in layout_scores(fake[keep], real[keep], asked.index(keep), names=("centre",), about={"data": "toy"})
    }
    assert set(scores) == {"box_iou", "pck@0.1"}
    one = scores["box_iou"]
    assert one.floor < one.value < one.ceiling and one.ceiling > 0.85 and "data=toy" in one.signature
    assert scores["pck@0.1"].ceiling == 1 and scores["pck@0.1"].floor < 1


def test_parts_that_no_foreground_has_are_not_scored():
    asked = Condition(keypoints=Keypoints(torch.rand(4, 1, 2), torch.ones(4, 1, dtype=torch.bool)))
    assert layout_scores(pictures(), pictures(), asked, names=("left_eye",), about={}) == []
