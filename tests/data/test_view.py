"""Boxes and points from strangers: clipped by rule or refused, whatever the numbers (RELIABILITY D12)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from condgen import rng
from condgen.data._view import Framing, corner_boxes, pixel_points
from condgen.errors import DataError
from condgen.records import Boxes, Keypoints

NUMBER = st.floats(width=32) | st.floats(-50, 150, width=32)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(NUMBER, NUMBER, NUMBER, NUMBER), max_size=6),
    st.lists(st.tuples(NUMBER, NUMBER, NUMBER), min_size=4, max_size=4),
    st.integers(0, 1000),
    st.sampled_from(["stretch", "crop", "pad"]),
)
def test_what_comes_out_is_always_legal(boxes: list, points: list, seed: int, resize: str) -> None:
    framing = Framing(12, 15, resize)
    view = framing.view(torch.zeros(3, 20, 31, dtype=torch.uint8), rng.generator(seed), (3, 1, 29, 18))
    assert view.pixels.shape == (3, 12, 12)
    try:
        xyxy, kept = corner_boxes(torch.tensor(boxes, dtype=torch.float32).view(-1, 4), 31, 20)
        xyxy, left = view.boxes(xyxy)
        Boxes(xyxy[None], torch.ones(1, len(xyxy), dtype=torch.bool)).check_values()
        assert len(left) == len(xyxy) <= len(kept) <= len(boxes)
    except DataError as error:
        assert "negative" in str(error)
    try:
        xy, visible = view.points(*pixel_points(torch.tensor(points, dtype=torch.float32), 31, 20), ((0, 1),))
        Keypoints(xy[None], visible[None]).check_values()
        assert not xy[~visible].any()
    except DataError as error:
        assert "finite" in str(error)


def test_every_offset_is_drawn_equally_often() -> None:
    framing = Framing(4, 6, flip=False)
    picture = torch.arange(36, dtype=torch.uint8).view(1, 6, 6)
    corners = [int(framing.view(picture, rng.generator(i)).pixels[0, 0, 0]) for i in range(900)]
    counts = torch.bincount(torch.tensor(corners))
    assert counts.nonzero()[:, 0].tolist() == [0, 1, 2, 6, 7, 8, 12, 13, 14]
    assert counts[counts > 0].min() > 60  # 100 expected, standard deviation 9.4
    assert framing.view(picture, None).pixels[0, 0, 0] == 7


def test_a_region_must_lie_inside() -> None:
    with pytest.raises(DataError, match="not inside"):
        Framing(4).view(torch.zeros(3, 5, 5, dtype=torch.uint8), None, (0, 0, 6, 5))


@pytest.mark.parametrize("swap", [True, False])
def test_a_mirror_exchanges_pairs_unless_as_released(swap: bool) -> None:
    framing = Framing(4, 4, flip=True, swap_on_flip=swap)
    xy, visible = torch.tensor([[0.25, 0.5], [0.5, 0.5]]), torch.tensor([True, False])
    for epoch in range(20):
        view = framing.view(torch.zeros(3, 4, 4, dtype=torch.uint8), rng.generator(epoch))
        moved, seen = view.points(xy, visible, ((0, 1),))
        at = 1 if view.flipped and swap else 0
        assert seen.tolist() == [at == 0, at == 1]
        assert moved[at].tolist() == [0.75 if view.flipped else 0.25, 0.5]
