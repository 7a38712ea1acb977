"""Class labels: index or soft label -> one-hot or learned embedding."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgen.conditions.base import ConditionKind, Feature
from condgen.errors import ShapeError
from condgen.types import Condition, LabelSpec


class Label(ConditionKind):
    """label (B,) or soft (B, K) -> vector (B, K) one-hot, or (B, width) embedding; map and sequence likewise.

    A map replicates the vector; a sequence is one token.
    """

    field: ClassVar[str] = "label"
    forms: ClassVar[tuple[str, ...]] = ("vector", "map", "sequence")

    def __init__(self, spec: LabelSpec, form: str, *, width: int | None = None, nullable: bool = False) -> None:
        super().__init__(spec, form, width=width, nullable=nullable)
        self.classes = spec.num_classes
        self.embed = nn.Linear(self.classes, width, bias=False) if width else None
        self.width = width or self.classes
        self.null = nn.Parameter(torch.zeros(self.width)) if nullable and form != "map" else None

    def forward(self, condition: Condition, size: tuple[int, int] | None = None) -> Feature:
        label = condition.label
        assert label is not None
        vector, given = self.one_hot(label)
        given = given & condition.is_present("label")
        if self.embed is not None:
            vector = self.embed(vector)
        null = self.null if self.null is not None else torch.zeros((), device=vector.device)
        vector = torch.where(given[:, None], vector, null.to(vector.dtype))
        if self.form == "map":
            return Feature(replicate(vector, size))
        if self.form == "sequence":
            mask = given[:, None] if self.null is None else torch.ones_like(given)[:, None]
            return Feature(vector[:, None], mask)
        return Feature(vector)

    def one_hot(self, label: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K) float and which rows are given; -1 means unknown."""
        if label.is_floating_point():
            if label.shape[1] != self.classes:
                raise ShapeError(f"label has {label.shape[1]} soft classes; this system was built for {self.classes}")
            return label, label.abs().sum(1) > 0
        if label.numel() and int(label.max()) >= self.classes:
            raise ShapeError(f"label {int(label.max())} is out of range; this system knows 0..{self.classes - 1}")
        given = label >= 0
        return F.one_hot(label.clamp(min=0), self.classes).to(torch.float32) * given[:, None], given


def replicate(vector: Tensor, size: tuple[int, int] | None) -> Tensor:
    """(B, V) -> (B, V, h, w)."""
    if size is None:
        raise ShapeError("a map needs its resolution: call the stack with size=(h, w)")
    return vector[:, :, None, None].expand(-1, -1, *size)
