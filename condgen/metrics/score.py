"""`Score`: a number together with what makes it readable: its floor, its ceiling, its error and its signature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Score:
    """One measured number.

    floor      what an output without any merit gets under the same protocol (captions shuffled, noise), measured
    ceiling    what real data get under the same protocol, measured
    error      standard error of the value, or the standard deviation over subsets where the docs say so
    signature  everything that has to be equal before two values may be compared; see `condgen.metrics.signature`
    note       what has to be read with the number; printed below the table
    picture    what shows it; saved beside the numbers, and no part of `to_dict` or of equality

    Floor is the bad end and ceiling the good end, also where lower is better (FID of noise, FID of held-out
    real pictures). None = not measured.
    """

    name: str
    value: float
    floor: float | None = None
    ceiling: float | None = None
    error: float | None = None
    signature: str = ""
    higher_is_better: bool = True
    note: str = ""
    picture: Image.Image | None = field(default=None, compare=False, repr=False)

    @property
    def position(self) -> float | None:
        """Where the value lies between floor (0) and ceiling (1); None where an end is unknown or they coincide."""
        if self.floor is None or self.ceiling is None or self.floor == self.ceiling:
            return None
        return (self.value - self.floor) / (self.ceiling - self.floor)

    def better_than(self, other: float) -> bool:
        """Whether this value beats `other`, in the direction of the metric."""
        return self.value > other if self.higher_is_better else self.value < other

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; `from_dict` reads it back."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "picture"}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Score:
        known = {name: data[name] for name in Score.__dataclass_fields__ if name in data and name != "picture"}
        return Score(**known)

    def __str__(self) -> str:
        error = "" if self.error is None else f" +- {self.error:.3g}"
        ends = [(n, v) for n, v in (("floor", self.floor), ("ceiling", self.ceiling)) if v is not None]
        anchors = ", ".join(f"{name} {value:.4g}" for name, value in ends)
        return f"{self.name} {self.value:.4g}{error}" + (f"  ({anchors})" if anchors else "")
