"""What completing keypoints through the pipeline returns: named points, ready to be asked of a system that draws."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PilImage

from condgen.show.asked import asked_cells
from condgen.show.drawing import draw_grid
from condgen.types import Condition, Keypoints

TILE = 128  # px of a drawn layout


@dataclass(frozen=True)
class Completed:
    """All points, prompt by prompt: every completion of the first prompt comes first.

    points      one row per completion
    conditions  one row per completion: what was asked, with the points that were given
    prompts     number of different conditions; rows = prompts * completions of each
    names       of the points, or () where the data name none
    """

    points: Keypoints
    conditions: Condition
    prompts: int
    names: tuple[str, ...] = ()
    attribution: str = ""

    def __len__(self) -> int:
        return len(self.points)

    @property
    def rows(self) -> list[dict[str, list[float] | None] | list[list[float] | None]]:
        """Per completion {name: [x, y]}, None for a point that is not visible; a list where points have no names.
        As JSON it is what `keypoints=` and `--keypoints FILE` take."""
        made: list[dict[str, list[float] | None] | list[list[float] | None]] = []
        for xy, visible in zip(self.points.xy.tolist(), self.points.visible.tolist(), strict=True):
            row = [[round(v, 4) for v in point] if seen else None for point, seen in zip(xy, visible, strict=True)]
            made.append(dict(zip(self.names, row, strict=True)) if self.names else row)
        return made

    def grid(self) -> PilImage.Image:
        """The sentence and the given points on the left, the completed layouts beside them."""
        cells = asked_cells(Condition(keypoints=self.points), (TILE, TILE))
        tiles = [torch.from_numpy(np.array(cell.pictures[0][1])).permute(2, 0, 1) for cell in cells]
        each = len(self) // self.prompts
        return draw_grid(
            torch.stack(tiles).view(self.prompts, each, 3, TILE, TILE),
            self.conditions.index(slice(0, len(self), each)),
            column_names=["completed"],
            attribution=self.attribution,
        )

    def save(self, path: Path | str) -> Path:
        """Writes `rows` as JSON."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")
        return path
