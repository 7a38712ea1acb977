"""Boxes as affine maps (Jaderberg et al. 2015, arXiv:1506.02025): cut a region out of a feature map, or draw a map
into a region. Pure tensors; corners in [0, 1], x right and y down.

One convention throughout: a map covers its square edge to edge (align_corners=False) and is zero outside of it. The
released GAWWN code puts the corners at the centres of the corner cells instead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_transform(boxes: Tensor) -> Tensor:
    """xyxy (..., 4) -> theta (..., 2, 3), rows x, y: where in the whole map each point of the region lies."""
    low, high = boxes[..., :2].float(), boxes[..., 2:].float()
    size, shift = high - low, low + high - 1
    return torch.cat([torch.diag_embed(size), shift[..., None]], dim=-1)


def paste_transform(boxes: Tensor) -> Tensor:
    """The inverse of `crop_transform`: where in the region each point of the whole map lies. Sides must not be 0."""
    low, high = boxes[..., :2].float(), boxes[..., 2:].float()
    size, shift = high - low, low + high - 1
    return torch.cat([torch.diag_embed(1 / size), (-shift / size)[..., None]], dim=-1)


def crop(maps: Tensor, boxes: Tensor, valid: Tensor) -> Tensor:
    """maps (B, C, h, w), boxes (B, N, 4), valid (B, N) -> (B, N, C, h, w): each region, stretched to the whole map.

    What lies outside the map is 0, and so is the whole crop of an invalid or empty box.
    """
    count = boxes.shape[1]
    each = maps[:, None].expand(-1, count, -1, -1, -1)
    return _sample(each, boxes, valid, crop_transform)


def paste(maps: Tensor, boxes: Tensor, valid: Tensor) -> Tensor:
    """maps (B, N, C, h, w), boxes (B, N, 4), valid (B, N) -> (B, N, C, h, w): each map shrunk into its box.

    Zeros outside the box (up to the half cell that bilinear sampling blends) and for an invalid or empty box.
    """
    return _sample(maps, boxes, valid, paste_transform)


def mean_of_valid(values: Tensor, valid: Tensor) -> Tensor:
    """values (B, N, ...), valid (B, N) -> (B, ...): the mean over valid items, 0 where there is none."""
    weight = valid.view(*valid.shape, *[1] * (values.dim() - 2)).to(values.dtype)
    return (values * weight).sum(1) / weight.sum(1).clamp(min=1)


def usable(boxes: Tensor, valid: Tensor) -> Tensor:
    """bool (B, N): valid boxes that have an area."""
    return valid & (boxes[..., 2:] > boxes[..., :2]).all(-1)


def _sample(maps: Tensor, boxes: Tensor, valid: Tensor, transform: Callable[[Tensor], Tensor]) -> Tensor:
    rows, count, channels, height, width = maps.shape
    valid = usable(boxes, valid)
    whole = boxes.new_tensor([0.0, 0.0, 1.0, 1.0])
    boxes = at_least_a_cell(torch.where(valid[..., None], boxes, whole), (height, width))
    theta = transform(boxes).flatten(0, 1)
    grid = F.affine_grid(theta, [rows * count, channels, height, width], align_corners=False)
    # coordinates need float32: bfloat16 has 8 bits for where things are
    flat = maps.reshape(rows * count, channels, height, width).float()
    out = F.grid_sample(flat, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    out = out.view(rows, count, channels, height, width) * valid[:, :, None, None, None]
    return out.to(maps.dtype)


def at_least_a_cell(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (..., 4) widened about their centre to one cell of an (h, w) map, below which nothing is sampled."""
    centre, span = (boxes[..., 2:] + boxes[..., :2]) / 2, boxes[..., 2:] - boxes[..., :2]
    least = boxes.new_tensor([1 / size[1], 1 / size[0]])
    half = torch.maximum(span, least) / 2
    return torch.cat([centre - half, centre + half], dim=-1)
