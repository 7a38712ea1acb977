"""The finder learns places on real pictures, is kept, and its scores are between floor and ceiling; moves, inside."""

import pytest
import torch

from condgen.data.base import RowDataset
from condgen.errors import DataError, ShapeError
from condgen.metrics import fit
from condgen.metrics.layout import correlation, inside_score, layout_scores, moves, moves_score, plain
from condgen.metrics.pose import (
    COCO_SIGMAS,
    OTHER_SIGMA,
    Finder,
    FinderOptions,
    cached_finder,
    hull,
    load_finder,
    near,
    sigmas_of,
    similarity,
)
from condgen.types import Boxes, BoxesSpec, Condition, ConditionSpec, Keypoints, KeypointsSpec, Sample, TargetSpec

QUICK = FinderOptions(steps=120, batch_size=16, width=4, size=32)


def scenes(rows, seed=0):
    """A bright red square, with a blue dot at its middle, in front of noise: no plain background."""
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 160, (rows, 3, 32, 32), generator=draw).to(torch.uint8)
    corners = torch.randint(0, 20, (rows, 2), generator=draw)
    for picture, (x, y) in zip(pixels, corners.tolist(), strict=True):
        picture[:, y : y + 12, x : x + 12] = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None]
        picture[:, y + 4 : y + 8, x + 4 : x + 8] = torch.tensor([0, 0, 255], dtype=torch.uint8)[:, None, None]
    low = corners.float() / 32
    return pixels, torch.cat([low, low + 12 / 32], dim=1), (low + 6 / 32)[:, None]


class Scenes(RowDataset):
    def __init__(self, rows=120):
        self.pixels, self.corners, self.points = scenes(rows)
        self.provides = ConditionSpec(boxes=BoxesSpec(1), keypoints=KeypointsSpec(1))
        self.target = TargetSpec(3, 32, 32)

    def __len__(self):
        return len(self.pixels)

    def key(self, index):
        return str(index)

    def sample(self, index, random):
        return Sample(str(index), self.pixels[index], boxes=self.corners[index, None], keypoints=self.points[index],
                      visible=torch.ones(1, dtype=torch.bool))  # fmt: skip


def asked(corners, points):
    count = len(corners)
    return Condition(
        boxes=Boxes(corners[:, None], torch.ones(count, 1, dtype=torch.bool)),
        keypoints=Keypoints(points, torch.ones(count, 1, dtype=torch.bool)),
    )


@pytest.fixture(scope="module")
def finders(tmp_path_factory):
    folder, data = tmp_path_factory.mktemp("kept"), Scenes()
    return {
        name: cached_finder(data, folder, boxes=name == "boxes", about={"data": "s"}, options=QUICK)
        for name in ("boxes", "keypoints")
    }


def test_real_pictures_give_the_ceiling_and_pictures_of_other_places_the_floor(finders):
    real, corners, points = scenes(40, seed=1)
    condition = asked(corners, points)
    as_float = fit.pixels_to_float(real)
    assert not plain(as_float, condition)
    rest = {"names": ("nose",), "finders": finders, "about": {"data": "s"}}
    good = {s.name: s for s in layout_scores(as_float, as_float, condition, **rest)}
    bad = {s.name: s for s in layout_scores(as_float.roll(1, 0), as_float, condition, **rest)}
    assert set(good) == {"box_iou", "pck@0.1", "oks"}
    assert good["oks"].ceiling > 0 and good["oks"].floor < 0.1  # one point has next to no hull, which is strict
    for name, least in (("box_iou", 0.5), ("pck@0.1", 0.9)):
        assert good[name].value == good[name].ceiling == bad[name].ceiling > least
        assert good[name].floor < good[name].value - 0.2 and bad[name].value < good[name].value - 0.2
        assert "finder=" in good[name].signature and "foreground" not in good[name].signature


def test_the_finder_is_kept_and_a_damaged_one_is_trained_again(tmp_path):
    data, said = Scenes(12), []
    options = FinderOptions(steps=3, batch_size=4, width=2, size=32)
    first, second = (
        cached_finder(data, tmp_path, boxes=True, about={}, options=options, say=said.append) for _ in range(2)
    )
    assert first.fingerprint == second.fingerprint and len(said) == 1
    (place,) = tmp_path.iterdir()
    assert load_finder(place).points == 0
    (place / "finder.json").write_text("{}")
    third = cached_finder(data, tmp_path, boxes=True, about={}, options=options, say=said.append)
    assert third.fingerprint == first.fingerprint and len(said) == 3
    data.sample = lambda index, random: Sample("a", data.pixels[index])
    with pytest.raises(DataError, match="needs pictures with keypoints"):
        cached_finder(data, tmp_path, boxes=False, about={}, options=options)
    with pytest.raises(ShapeError, match="takes"):
        first.find(torch.zeros(2, 1, 32, 32))


def test_points_move_with_the_augmented_pixels():
    picture = torch.full((8, 1, 64, 64), -1.0)
    picture[:, :, 38:42, 18:22] = 1
    motion = fit.motions(8, torch.Generator().manual_seed(0))
    mask = (fit.moved(picture, motion) > 0).float()[:, 0]
    at = (torch.arange(64) + 0.5) / 64
    middle = torch.stack([(mask.sum(1) * at).sum(1), (mask.sum(2) * at).sum(1)], dim=1) / mask.sum((1, 2))[:, None]
    points = torch.tensor([[20 / 64, 40 / 64]]).expand(8, 1, 2)
    torch.testing.assert_close(fit.moved_points(points, motion)[:, 0], middle, atol=0.01, rtol=0)
    assert (middle - points[:, 0]).abs().max() > 0.05


def test_an_untrained_finder_has_the_promised_shapes():
    for points, shape in ((0, (3, 2, 2)), (5, (3, 5, 2))):
        found = Finder(QUICK, channels=3, points=points).find(torch.rand(3, 3, 48, 48))
        assert found.shape == shape and torch.isfinite(found).all()


def test_oks_and_pck_against_hand_counts():
    """COCO's formula for a box of sides 0.5 x 0.4: two points, one 0.1 away, one exact, a third not visible."""
    points = Keypoints(torch.tensor([[[0.2, 0.2], [0.7, 0.6], [0.0, 0.0]]]), torch.tensor([[True, True, False]]))
    found = points.xy + torch.tensor([[[0.0, 0.1], [0.0, 0.0], [0.5, 0.5]]])
    sigmas = sigmas_of(("l_knee", "nose", "tail"), 3)
    assert sigmas.tolist() == pytest.approx([COCO_SIGMAS[13], COCO_SIGMAS[0], OTHER_SIGMA])
    area = 0.53 * 0.5 * 0.4
    expected = (torch.tensor(-0.01 / (2 * area * (2 * COCO_SIGMAS[13]) ** 2)).exp() + 1) / 2
    torch.testing.assert_close(similarity(found, points, sigmas), expected[None])
    assert near(found + torch.tensor([0.0, 0.001]), points).item() == 0.5
    assert hull(points)[0].tolist()[0] == pytest.approx([0.2, 0.2, 0.7, 0.6])
    assert sigmas_of((), 2).tolist() == pytest.approx([OTHER_SIGMA] * 2)


def squares(corners, side=32):
    out = torch.ones(len(corners), 3, side, side)
    draw = torch.Generator().manual_seed(0)
    texture = torch.rand(3, 8, 8, generator=draw) - 0.9
    for picture, (x, y) in zip(out, (corners[:, :2] * side).round().long().tolist(), strict=True):
        picture[:, y : y + 8, x : x + 8] = texture
    return out


def test_a_thing_that_moves_with_its_box_scores_one_and_one_that_stays_the_floor():
    low = torch.tensor([[0.0, 0.0], [0.5, 0.5], [0.375, 0.125]])
    corners = torch.cat([low, low + 0.25], dim=1)
    move = moves(asked(corners, low[:, None] + 0.1))
    assert move.rows.tolist() == [0, 1, 2] and move.shift.tolist() == [[0.25, 0.25], [-0.25, -0.25], [0.25, 0.25]]
    torch.testing.assert_close(move.condition.boxes.xyxy[:, 0], corners + move.shift.repeat(1, 2))
    torch.testing.assert_close(move.condition.keypoints.xy[:, 0], low + 0.1 + move.shift)
    before = squares(corners)
    (obeys,) = moves_score(before, squares(move.there), move, about={})
    (stays,) = moves_score(before, before, move, about={})
    assert obeys.value == pytest.approx(1, abs=1e-6) == obeys.ceiling and obeys.floor < 0.3
    assert stays.value < 0.3 and stays.value <= stays.floor


def test_what_has_no_room_or_no_place_is_not_moved():
    corners = torch.tensor([[0.1, 0.1, 0.9, 0.9], [0.1, 0.0, 0.9, 0.5], [0.0, 0.0, 0.1, 0.1]])
    boxes = Boxes(corners[:, None], torch.tensor([[True], [True], [False]]))
    move = moves(Condition(boxes=boxes))
    assert move.rows.tolist() == [1] and move.shift.tolist() == [[0.0, 0.25]]
    assert moves_score(torch.zeros(0, 3, 8, 8), torch.zeros(0, 3, 8, 8), moves(Condition(boxes=boxes).index([0])),
                       about={}) == []  # fmt: skip
    points = Keypoints(torch.tensor([[[0.1, 0.2], [0.0, 0.0]]]), torch.tensor([[True, False]]))
    alone = moves(Condition(keypoints=points))
    assert alone.condition.keypoints.xy[0, 1].tolist() == [0, 0]  # what is not visible stays zeros


def test_correlation_looks_only_where_it_is_told():
    draw = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 3, 8, 8, generator=draw), torch.rand(2, 3, 8, 8, generator=draw)
    where = torch.zeros(2, 8, 8, dtype=torch.bool)
    where[:, :4] = True
    b[:, :, :4] = 0.5 - 0.2 * a[:, :, :4]
    torch.testing.assert_close(correlation(a, b, where), torch.full((2,), -1.0, dtype=torch.float64))
    assert correlation(a, torch.zeros_like(b), where).tolist() == [0, 0]


def test_inside_counts_the_foreground_in_the_widened_box():
    corners = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.5, 0.5, 0.75, 0.75]])
    pictures = squares(corners)
    boxes = Boxes(corners[:, None], torch.ones(2, 1, dtype=torch.bool))
    (right,) = inside_score(pictures, pictures, boxes, about={})
    assert right.value == right.ceiling == 1 and right.floor < 0.5
    pictures[:, :, 1:5, 1:9] = -1.0  # half as much again, far from both boxes
    (half,) = inside_score(pictures, pictures, boxes, about={})
    assert 0.55 < half.value < 0.75
