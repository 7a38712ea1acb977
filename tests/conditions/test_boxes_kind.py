"""Painting boxes: coverage, overlaps, and that cropping and painting commute."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from condgen.conditions.boxes import BoxRegions, coverage, paint_boxes
from condgen.errors import DataError
from condgen.pixels import crop_pixels
from condgen.types import Boxes, BoxesSpec, Condition

unit = st.floats(0.02, 0.98)


def boxes(rows, valid=None, label=None):
    xyxy = torch.tensor(rows, dtype=torch.float32)
    valid = torch.ones(xyxy.shape[:2], dtype=torch.bool) if valid is None else torch.tensor(valid)
    return Condition(boxes=Boxes(xyxy, valid, label))


def test_coverage_by_hand():
    share = coverage(torch.tensor([[[0.25, 0.0, 0.625, 0.5]]]), (2, 4))[0, 0]
    assert torch.allclose(share, torch.tensor([[0, 1, 0.5, 0], [0, 0, 0, 0]]))
    hard = coverage(torch.tensor([[[0.25, 0.0, 0.65, 0.5]]]), (2, 4), hard=True)[0, 0]
    assert torch.equal(hard, torch.tensor([[0, 1, 1.0, 0], [0, 0, 0, 0]]))


@settings(max_examples=50, deadline=None)
@given(x=st.tuples(unit, unit), y=st.tuples(unit, unit), h=st.integers(1, 9), w=st.integers(1, 9))
def test_coverage_conserves_area(x, y, h, w):
    (x0, x1), (y0, y1) = sorted(x), sorted(y)
    share = coverage(torch.tensor([[[x0, y0, x1, y1]]]), (h, w))
    assert share.min() >= 0 and share.max() <= 1 + 1e-6
    assert abs(float(share.mean()) - (x1 - x0) * (y1 - y0)) < 1e-5


def test_a_box_narrower_than_a_cell_is_not_lost():
    thin = torch.tensor([[[0.01, 0.01, 0.03, 0.99]]])
    assert coverage(thin, (4, 4)).sum() > 0 and not coverage(thin, (4, 4), hard=True).any()


def test_overlap_is_the_mean_and_invalid_boxes_count_for_nothing():
    xyxy = torch.tensor([[[0.0, 0.0, 0.75, 1.0], [0.25, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]])
    values = torch.tensor([[[2.0], [4.0], [100.0]]])
    painted = paint_boxes(xyxy, torch.tensor([[True, True, False]]), values, (1, 4))
    assert torch.allclose(painted[0, 0, 0], torch.tensor([2.0, 3.0, 3.0, 4.0]))


def test_a_partly_covered_cell_keeps_its_share_and_hard_cells_follow_their_centres():
    xyxy, valid, value = torch.tensor([[[0.3, 0.0, 0.8, 1.0]]]), torch.tensor([[True]]), torch.tensor([[[10.0]]])
    assert torch.allclose(paint_boxes(xyxy, valid, value, (1, 4))[0, 0, 0], torch.tensor([0.0, 8.0, 10.0, 2.0]))
    assert paint_boxes(xyxy, valid, value, (1, 4), hard=True)[0, 0, 0].tolist() == [0, 10, 10, 0]


def test_map_channels_are_indicator_and_classes():
    kind = BoxRegions(BoxesSpec(2, num_classes=3), "map")
    condition = boxes([[[0, 0, 0.5, 1], [0.5, 0, 1, 1]]], label=torch.tensor([[2, -1]]))
    out = kind(condition, (1, 2)).value[0, :, 0]
    assert torch.allclose(out, torch.tensor([[1.0, 1], [0, 0], [0, 0], [1, 0]]))  # class -1: the indicator alone
    assert BoxRegions(BoxesSpec(2), "map").width == 1


@pytest.mark.parametrize("form", ["vector", "map"])
def test_order_of_boxes_does_not_matter(form):
    torch.manual_seed(0)
    kind = BoxRegions(BoxesSpec(2, num_classes=3), form, width=5)
    a, b = [0.1, 0.2, 0.6, 0.7], [0.3, 0.1, 0.9, 0.5]
    one = kind(boxes([[a, b]], label=torch.tensor([[0, 2]])), (4, 4)).value
    two = kind(boxes([[b, a]], label=torch.tensor([[2, 0]])), (4, 4)).value
    torch.testing.assert_close(one, two)


def test_a_class_out_of_range_raises():
    kind = BoxRegions(BoxesSpec(1, num_classes=3), "vector")
    with pytest.raises(DataError, match=r"boxes\.label 3"):
        kind(boxes([[[0, 0, 1, 1]]], label=torch.tensor([[3]])))


@settings(max_examples=60, deadline=None)
@given(
    x=st.tuples(unit, unit), y=st.tuples(unit, unit),
    window=st.tuples(st.integers(0, 7), st.integers(0, 7), st.integers(1, 16), st.integers(1, 16)),
)  # fmt: skip
def test_crop_commutes_with_painting_on_the_cell_grid(x, y, window):
    """A window of whole cells, kept at cell size: crop(paint(box)) == paint(crop(box)) within 1e-4 everywhere."""
    cells = 16
    (x0, x1), (y0, y1) = sorted(x), sorted(y)
    left, top = window[:2]
    right, bottom = min(cells, left + window[2]), min(cells, top + window[3])
    at = torch.tensor([[left, top, right, bottom]]) / cells
    condition = boxes([[[x0, y0, x1, y1]]])
    kind = BoxRegions(BoxesSpec(1), "map")
    size = (bottom - top, right - left)
    cut = condition.crop_resize(at)
    painted = kind(cut, size).value
    if not bool(cut.boxes.valid.any()):  # too little of the box is left: it is gone by rule
        assert not painted.any()
        return
    torch.testing.assert_close(crop_pixels(kind(condition, (cells, cells)).value, at, size), painted, atol=1e-4, rtol=0)


@settings(max_examples=60, deadline=None)
@given(x=st.tuples(unit, unit), y=st.tuples(unit, unit), corner=st.tuples(unit, unit), span=st.floats(0.2, 0.9))
def test_crop_commutes_with_painting_away_from_edges(x, y, corner, span):
    """Any window: the two agree within 1e-4 in every cell farther than one source cell from the box's edge."""
    cells, out = 16, 12
    (x0, x1), (y0, y1) = sorted(x), sorted(y)
    left, top = corner[0] * (1 - span), corner[1] * (1 - span)
    at = torch.tensor([[left, top, left + span, top + span]])
    condition = boxes([[[x0, y0, x1, y1]]])
    cut = condition.crop_resize(at)
    if not bool(cut.boxes.valid.any()):
        return
    kind = BoxRegions(BoxesSpec(1), "map")
    difference = (
        crop_pixels(kind(condition, (cells, cells)).value, at, (out, out)) - kind(cut, (out, out)).value
    ).abs()
    centre = (torch.arange(out) + 0.5) / out * span
    reach = 1 / cells + span / out  # a source cell, and the output cell's own size
    near_x = ((left + centre - x0).abs() < reach) | ((left + centre - x1).abs() < reach)
    near_y = ((top + centre - y0).abs() < reach) | ((top + centre - y1).abs() < reach)
    far = ~(near_x[None, :] | near_y[:, None])
    assert not far.any() or float(difference[0, 0][far].max()) < 1e-4


@settings(max_examples=30, deadline=None)
@given(x=st.tuples(unit, unit), y=st.tuples(unit, unit))
def test_flip_commutes_with_painting(x, y):
    (x0, x1), (y0, y1) = sorted(x), sorted(y)
    condition, kind = boxes([[[x0, y0, x1, y1]]]), BoxRegions(BoxesSpec(1), "map")
    mirrored = kind(condition.hflip(), (6, 6)).value
    torch.testing.assert_close(mirrored, kind(condition, (6, 6)).value.flip(-1), atol=1e-5, rtol=0)
