"""Keypoint vectors and maps: GAWWN's cells, heatmaps, geometry."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from condgen.conditions.keypoints import KeypointMaps, point_maps, union_map
from condgen.errors import ConfigError, DataError
from condgen.types import Condition, Keypoints, KeypointsSpec

unit = st.floats(0.0, 1.0)


def points(xy, visible):
    return Condition(keypoints=Keypoints(torch.tensor([xy], dtype=torch.float32), torch.tensor([visible])))


def test_vector_is_x_y_visible_of_each_point():
    kind = KeypointMaps(KeypointsSpec(2), "vector")
    out = kind(points([[0.25, 0.5], [0.9, 0.9]], [True, False])).value
    assert torch.allclose(out, torch.tensor([[0.25, 0.5, 1, 0, 0, 0]])) and not list(kind.parameters())


@settings(max_examples=60, deadline=None)
@given(x=unit, y=unit, render=st.sampled_from(["cell", "released"]))
def test_a_visible_point_sets_exactly_one_cell(x, y, render):
    xy, visible = torch.tensor([[[x, y], [x, y]]]), torch.tensor([[True, False]])
    maps = point_maps(xy, visible, (16, 16), render=render)
    assert maps[0, 0].sum() == 1 and not maps[0, 1].any()
    row, column = divmod(int(maps[0, 0].argmax()), 16)
    if render == "cell":
        assert column / 16 <= x <= (column + 1) / 16 and row / 16 <= y <= (row + 1) / 16
    else:  # 1-based clamp(round(16 x), 1, 16) of the released loader
        assert column + 1 == min(max(int(16 * x + 0.5), 1), 16)


def test_heatmap_peaks_at_the_point_and_falls_by_sigma_cells():
    maps = point_maps(
        torch.tensor([[[2.5 / 8, 5.5 / 8]]]), torch.tensor([[True]]), (8, 8), render="gaussian", sigma=2.0
    )
    assert torch.isclose(maps[0, 0, 5, 2], torch.tensor(1.0))
    assert torch.isclose(maps[0, 0, 5, 4], torch.exp(torch.tensor(-0.5)))  # two cells = one sigma


@pytest.mark.parametrize("render", ["cell", "gaussian"])
@settings(max_examples=30, deadline=None)
@given(x=unit, y=unit)
def test_flip_commutes_with_rendering(render, x, y):
    if abs(x * 8 - round(x * 8)) < 1e-3:
        return  # on the line between two cells either is right
    condition = points([[x, y]], [True])
    kind = KeypointMaps(KeypointsSpec(1), "map", render=render)
    torch.testing.assert_close(
        kind(condition.hflip(), (8, 8)).value, kind(condition, (8, 8)).value.flip(-1), atol=1e-4, rtol=0
    )


def test_union_counts_a_shared_cell_once():
    maps = point_maps(torch.tensor([[[0.1, 0.1], [0.12, 0.1], [0.9, 0.9]]]), torch.ones(1, 3, dtype=torch.bool), (4, 4))
    gate = union_map(maps)
    assert gate.shape == (1, 1, 4, 4) and gate.sum() == 2 and gate.max() == 1


def test_options_and_counts_are_checked():
    with pytest.raises(ConfigError, match="released"):
        KeypointMaps(KeypointsSpec(1), "map", render="dots")
    with pytest.raises(DataError, match="keypoints is 1"):
        KeypointMaps(KeypointsSpec(2), "vector")(points([[0.1, 0.1]], [True]))
