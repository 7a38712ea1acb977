"""A toy: one-colour pictures with the colour's name and number."""

from __future__ import annotations

import torch

from condgen.data.base import RowDataset
from condgen.errors import DataError
from condgen.types import ConditionSpec, LabelSpec, Sample, TargetSpec, TextSpec

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


class ToyColours(RowDataset):
    """rows of each split; `root` is not read."""

    attribution = "Toy colours, made for tests"

    def __init__(self, *, root: str | None = None, size: int = 8, split: str = "train", rows: int = 12) -> None:
        if root == "missing":
            raise DataError("there is nothing in the folder 'missing'; give data.root")
        self.rows, self.size, self.split = rows, size, split
        self.provides = ConditionSpec(label=LabelSpec(len(COLOURS), tuple(COLOURS)), text=TextSpec())
        self.target = TargetSpec(3, size, size)

    def __len__(self) -> int:
        return self.rows

    def key(self, index: int) -> str:
        return f"{self.split}-{index}"

    def sample(self, index: int, random: torch.Generator | None) -> Sample:
        label = index % len(COLOURS)
        name = list(COLOURS)[label]
        pixels = torch.tensor(COLOURS[name], dtype=torch.uint8)[:, None, None].expand(3, self.size, self.size)
        return Sample(key=self.key(index), target=pixels.clone(), label=label, caption=f"a {name} square")

    def captions(self) -> list[str]:
        return [f"a {name} square" for name in COLOURS]
