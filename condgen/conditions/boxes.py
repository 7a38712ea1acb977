"""Boxes: regions with optional classes -> pooled vector, painted map, or one token per box."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from condgen.conditions._features import expect_map_size, masked_mean, null_sequence, null_vector
from condgen.conditions.base import ConditionKind, Feature
from condgen.errors import ShapeError
from condgen.nn.fourier import fourier_features, fourier_width
from condgen.types import Boxes as BoxesRecord
from condgen.types import BoxesSpec, Condition

DEFAULT_WIDTH = 64


class BoxRegions(ConditionKind):
    """boxes -> vector (B, width): masked mean over boxes of an MLP of corners and class, 64 wide by default;
    map (B, 1 + K, h, w): an indicator and one channel per class, painted in each box, or (B, width, h, w) where a
    linear map of those is painted; sequence (B, N, width): one token per box, 64 wide by default.

    hard    a map cell is painted when its centre lies in the box; otherwise by the share of it that the box covers,
            which keeps thin boxes and passes gradients to the corners
    bands   octaves of the Fourier features of the sequence form
    """

    field: ClassVar[str] = "boxes"
    forms: ClassVar[tuple[str, ...]] = ("vector", "map", "sequence")

    def __init__(
        self,
        spec: BoxesSpec,
        form: str,
        *,
        width: int | None = None,
        nullable: bool = False,
        hard: bool = False,
        bands: int = 6,
    ) -> None:
        super().__init__(spec, form, width=width, nullable=nullable)
        self.classes, self.hard, self.bands = spec.num_classes, hard, bands
        if form == "map":
            self.width = width or 1 + self.classes
            self.project = nn.Linear(1 + self.classes, width, bias=False) if width else None
            self.null = None
            return
        self.width = width or DEFAULT_WIDTH
        if form == "vector":
            self.encode = nn.Sequential(
                nn.Linear(4 + self.classes, self.width), nn.LeakyReLU(0.2), nn.Linear(self.width, self.width)
            )
        else:
            self.token = nn.Linear(fourier_width(4, bands) + self.classes, self.width)
        self.null = nn.Parameter(torch.zeros(self.width)) if nullable else None

    def forward(self, condition: Condition, size: tuple[int, int] | None = None) -> Feature:
        boxes = condition.boxes
        assert boxes is not None
        valid = boxes.valid & condition.is_present("boxes")[:, None]
        xyxy = torch.where(valid[..., None], boxes.xyxy, torch.zeros_like(boxes.xyxy)).to(torch.float32)
        classes = self._classes(boxes, valid)
        if self.form == "map":
            return Feature(self._map(xyxy, valid, classes, expect_map_size(size)))
        if self.form == "vector":
            encoded = self.encode(torch.cat([xyxy, classes], dim=-1))
            return Feature(null_vector(masked_mean(encoded, valid), valid.any(1), self.null))
        tokens = self.token(torch.cat([fourier_features(xyxy, self.bands), classes], dim=-1))
        return Feature(*null_sequence(tokens, valid, self.null))

    def _map(self, xyxy: Tensor, valid: Tensor, classes: Tensor, size: tuple[int, int]) -> Tensor:
        values = torch.cat([torch.ones_like(xyxy[..., :1]), classes], dim=-1)
        if self.project is not None:
            values = self.project(values)
        return paint_boxes(xyxy, valid, values, size, hard=self.hard)

    def _classes(self, boxes: BoxesRecord, valid: Tensor) -> Tensor:
        """One-hot float (B, N, K), zeros for invalid boxes and for a class of -1."""
        if not self.classes:
            return boxes.xyxy.new_zeros((*valid.shape, 0), dtype=torch.float32)
        if boxes.label is None:
            raise ShapeError(
                f"this system was built for boxes of {self.classes} classes; the condition's have no label"
            )
        label = torch.where(valid, boxes.label, -1)
        # on an accelerator this check would stall the queue; there a class out of range paints nothing
        if label.device.type == "cpu" and label.numel() and int(label.max()) >= self.classes:
            raise ShapeError(f"boxes.label {int(label.max())} is out of range; the system knows 0..{self.classes - 1}")
        return (label[..., None] == torch.arange(self.classes, device=label.device)).to(torch.float32)


def coverage(xyxy: Tensor, size: tuple[int, int], *, hard: bool = False) -> Tensor:
    """Boxes (B, N, 4) in [0, 1] -> float32 (B, N, h, w): the share of each cell inside each box.

    hard: 1 where the cell's centre is inside, else 0.
    """
    x0, y0, x1, y1 = xyxy.to(torch.float32).unbind(-1)
    rows, columns = _overlap(y0, y1, size[0], hard), _overlap(x0, x1, size[1], hard)
    return rows[..., :, None] * columns[..., None, :]


def paint_boxes(xyxy: Tensor, valid: Tensor, values: Tensor, size: tuple[int, int], *, hard: bool = False) -> Tensor:
    """Paints values (B, N, M) into boxes (B, N, 4) -> map (B, M, h, w).

    Zeros outside of every valid box. Where boxes overlap, the mean over them weighted by coverage: the masked mean
    of GAWWN (Reed et al. 2016, arXiv:1610.02454), in which null boxes count for nothing.
    """
    weight = coverage(xyxy, size, hard=hard) * valid[:, :, None, None]
    total = weight.sum(1).clamp(min=1)  # partly covered cells keep their share
    painted = torch.einsum("bnhw,bnm->bmhw", weight, values.to(weight.dtype))
    return painted / total[:, None]


def _overlap(low: Tensor, high: Tensor, cells: int, hard: bool) -> Tensor:
    """(B, N) ends of intervals in [0, 1] -> (B, N, cells): the share of each cell inside."""
    edge = torch.arange(cells + 1, device=low.device, dtype=low.dtype)
    low, high = low[..., None] * cells, high[..., None] * cells
    if hard:
        centre = edge[:-1] + 0.5
        return ((centre >= low) & (centre < high)).to(low.dtype)
    return (torch.minimum(high, edge[1:]) - torch.maximum(low, edge[:-1])).clamp(0, 1)
