"""What every condition kind implements, and the four forms it can produce."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from condgen.types import Condition

FORMS = ("vector", "map", "sequence", "temporal")


@dataclass(frozen=True)
class Forms:
    """Condition features of one network. Forms that it does not consume are None.

    vector (B, V) · map (B, M, h, w) · sequence (B, L, V) with sequence_mask (B, L), True = real ·
    temporal (B, T, M, h, w) with temporal_mask (B, T), True = given
    """

    vector: Tensor | None = None
    map: Tensor | None = None
    sequence: Tensor | None = None
    sequence_mask: Tensor | None = None
    temporal: Tensor | None = None
    temporal_mask: Tensor | None = None


@dataclass(frozen=True)
class Feature:
    """What one kind contributes to one form; `mask` belongs to sequence and temporal."""

    value: Tensor
    mask: Tensor | None = None


class ConditionKind(nn.Module, ABC):
    """Encodes one field of `Condition` into one form.

    The file `conditions/<field>.py` holds one subclass. Rows whose value is absent (`Condition.is_present`
    False, or a null value) become the null of that form: learned where `nullable`, zeros otherwise, and always
    zeros for maps. A kind without parameters is preferred where the paper feeds the raw value.

    field    the field of Condition it reads
    forms    the forms it can produce
    """

    field: ClassVar[str]
    forms: ClassVar[tuple[str, ...]]

    width: int
    """V, M or D of what it produces, known before any data."""

    def __init__(self, spec: Any, form: str, *, width: int | None = None, nullable: bool = False) -> None:
        """`spec` is this field's entry of ConditionSpec; `width` asks for a learned projection to that width."""
        super().__init__()
        if form not in self.forms:
            raise ValueError(f"{self.field} can be given as {', '.join(self.forms)}, not as {form}")
        self.spec, self.form, self.nullable = spec, form, nullable

    @abstractmethod
    def forward(self, condition: Condition, size: tuple[int, int] | None = None) -> Feature:
        """`size` (h, w) is the resolution of a map; required for that form, ignored for the others."""
