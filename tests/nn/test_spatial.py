"""Boxes as affine maps: what is pasted can be cut out again, and nothing else is touched."""

import pytest
import torch
import torch.nn.functional as F

from condgen.nn.spatial import crop, crop_transform, mean_of_valid, paste, paste_transform

ON = torch.ones(1, 1, dtype=torch.bool)


def box(*corners):
    return torch.tensor([[list(corners)]], dtype=torch.float32)


def cells(corners, side=16):
    x0, y0, x1, y1 = (round(c * side) for c in corners)
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


@pytest.mark.parametrize(
    "corners", [(0.25, 0.5, 0.75, 1.0), (0, 0, 1, 1), (0.125, 0, 0.1875, 0.5), (0.5, 0.25, 1, 0.5)]
)
def test_a_pasted_map_of_ones_fills_exactly_the_cells_of_its_box(corners):
    drawn = paste(torch.ones(1, 1, 1, 16, 16), box(*corners), ON)[0, 0, 0]
    assert torch.equal(drawn, cells(corners).float())


def test_paste_then_crop_is_identity_inside_the_box():
    """Of ramps, which bilinear sampling reproduces; the outer ring blends with the zeros outside."""
    ramp = torch.linspace(-1, 1, 16)
    maps = torch.stack([ramp.expand(16, 16), ramp[:, None].expand(16, 16), torch.ones(16, 16)])[None, None]
    for corners in [(0.25, 0.5, 0.75, 1.0), (0.0, 0.125, 0.5, 0.625)]:
        back = crop(paste(maps, box(*corners), ON)[:, 0], box(*corners), ON)
        torch.testing.assert_close(back[..., 2:-2, 2:-2], maps[..., 2:-2, 2:-2], atol=1e-5, rtol=0)
    whole = box(0.0, 0.0, 1.0, 1.0)
    noise = torch.randn(1, 1, 3, 16, 16)
    torch.testing.assert_close(crop(paste(noise, whole, ON)[:, 0], whole, ON), noise, atol=1e-5, rtol=0)


def test_x_is_to_the_right_and_y_down():
    maps = torch.zeros(1, 1, 8, 8)
    maps[..., 1, 6] = 1  # top right
    assert crop(maps, box(0.5, 0, 1, 0.5), ON).sum() > 0
    for corners in [(0, 0, 0.5, 0.5), (0, 0.5, 0.5, 1), (0.5, 0.5, 1, 1)]:
        assert crop(maps, box(*corners), ON).sum() == 0


def test_crop_is_the_resized_region():
    maps = torch.randn(1, 2, 16, 16)
    cut = crop(maps, box(0.25, 0.25, 0.75, 0.75), ON)[:, 0]
    want = F.interpolate(maps[..., 4:12, 4:12], size=(16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(cut[..., 1:-1, 1:-1], want[..., 1:-1, 1:-1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("corners", [(0.5, 0.5, 0.5, 0.9), (0.7, 0.2, 0.3, 0.8), (0, 0, 0, 0)])
def test_empty_and_invalid_boxes_give_zeros_and_finite_gradients(corners):
    maps = torch.randn(1, 1, 2, 8, 8, requires_grad=True)
    for boxes, valid in ((box(*corners), ON), (box(0.1, 0.1, 0.9, 0.9), ~ON), (box(*corners), ~ON)):
        boxes.requires_grad_()
        out = paste(maps, boxes, valid).sum() + crop(maps[:, 0], boxes, valid).sum()
        assert out == 0
        out.backward()
        assert torch.isfinite(boxes.grad).all() and torch.isfinite(maps.grad).all()


def test_a_thin_box_still_shows_something():
    assert paste(torch.ones(1, 1, 1, 16, 16), box(0.5, 0.5, 0.501, 0.501), ON).sum() > 0.2


def test_the_two_transforms_undo_each_other():
    boxes = torch.rand(5, 2) * 0.4
    boxes = torch.cat([boxes, boxes + 0.1 + torch.rand(5, 2) * 0.4], dim=1)
    points = torch.cat([torch.rand(5, 2) * 2 - 1, torch.ones(5, 1)], dim=1)
    there = torch.einsum("bij,bj->bi", crop_transform(boxes), points)
    back = torch.einsum("bij,bj->bi", paste_transform(boxes), torch.cat([there, torch.ones(5, 1)], dim=1))
    torch.testing.assert_close(back, points[:, :2], atol=1e-5, rtol=1e-5)


def test_the_box_gets_a_gradient_through_the_crop():
    boxes = box(0.2, 0.3, 0.7, 0.8).requires_grad_()
    crop(torch.randn(1, 1, 16, 16), boxes, ON).square().sum().backward()
    assert (boxes.grad != 0).all()


def test_mean_leaves_invalid_items_out():
    values, valid = (
        torch.tensor([[[2.0], [4.0]], [[2.0], [9.0]], [[5.0], [5.0]]]),
        torch.tensor([[1, 1], [1, 0], [0, 0]]),
    )
    assert mean_of_valid(values, valid.bool()).flatten().tolist() == [3.0, 2.0, 0.0]
