"""What sampling through the pipeline returns: pixels with what they were made from."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image as PilImage
from torch import Tensor

from condgen.engine.clips import grid_clip
from condgen.engine.drawing import draw_clip_strip, draw_grid
from condgen.engine.pictures import save_clip_png, to_pil
from condgen.types import Condition


@dataclass(frozen=True)
class Samples:
    """What a pipeline made, prompt by prompt: all samples of the first prompt come first.

    pixels      (rows, C, H, W) or, for clips, (rows, T, C, H, W); float32 in [-1, 1], on the CPU
    conditions  one row per sample
    seeds, ids  what each row was drawn from: the same pair with the same condition gives the same picture
    prompts     number of different conditions; rows = prompts * samples of each
    """

    pixels: Tensor
    conditions: Condition
    seeds: tuple[int, ...]
    ids: tuple[int, ...]
    prompts: int
    label_names: tuple[str, ...] = ()
    attribution: str = ""

    def __len__(self) -> int:
        return len(self.pixels)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.pixels.shape[1:]))
        return f"<condgen samples: {len(self)} of {size}, {self.prompts} prompts; .images, .grid(), .save(folder)>"

    @property
    def is_video(self) -> bool:
        return self.pixels.dim() == 5

    @property
    def clips(self) -> list[list[PilImage.Image]]:
        """The frames of each row; one frame for a picture."""
        frames = self.pixels if self.is_video else self.pixels[:, None]
        return [[to_pil(f) for f in clip] for clip in frames]

    @property
    def images(self) -> list[PilImage.Image]:
        """One picture per row; of a clip, its frames side by side."""
        if self.is_video:
            return [to_pil(torch.cat(list(clip), dim=-1)) for clip in self.pixels]
        return [to_pil(p) for p in self.pixels]

    def grid(self, **options: Any) -> PilImage.Image:
        """One row per prompt with what was asked on the left; options of `draw_grid`."""
        first = torch.arange(0, len(self), len(self) // self.prompts)
        asked = self.conditions.index(first) if len(self.conditions) else None
        shared: dict[str, Any] = {"label_names": self.label_names, "attribution": self.attribution, **options}
        if self.is_video:
            return draw_clip_strip(self.pixels, self.conditions if len(self.conditions) else None, **shared)
        if asked is None:
            return draw_grid(self.pixels, **shared)
        return draw_grid(self.pixels.unflatten(0, (self.prompts, -1)), asked, **shared)

    def clip_grid(self, **options: Any) -> Iterator[Tensor]:
        """Frames of the grid that plays, uint8 (3, H, W), for `write_clip`: one row per prompt. Clips only."""
        first = torch.arange(0, len(self), len(self) // self.prompts)
        asked = self.conditions.index(first) if len(self.conditions) else None
        shared: dict[str, Any] = {"label_names": self.label_names, "attribution": self.attribution, **options}
        return grid_clip(self.pixels.unflatten(0, (self.prompts, -1)), asked, **shared)

    def save(self, folder: Path | str) -> list[Path]:
        """One PNG per row (animated for clips) and `samples.jsonl` with what each was made from."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths, lines = [], []
        for row, clip in enumerate(self.clips):
            about = self._about(row)
            path = folder / f"{row:05d}-{slug(about.get('text') or str(about.get('label', '')))}.png"
            paths.append(save_clip_png(clip, path))
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            lines.append(json.dumps({"file": path.name, **about, "sha256": digest}, ensure_ascii=False))
        (folder / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return paths

    def _about(self, row: int) -> dict[str, Any]:
        out: dict[str, Any] = {"seed": self.seeds[row], "id": self.ids[row]}
        one = self.conditions
        for name in one.given:
            if not bool(one.is_present(name)[row]):
                continue
            if name == "text" and one.text is not None and one.text.strings is not None:
                out["text"] = one.text.strings[row]
            elif name == "label" and one.label is not None and not one.label.is_floating_point():
                index = int(one.label[row])
                out["label"] = self.label_names[index] if index < len(self.label_names) else index
            elif name == "boxes" and one.boxes is not None:
                out["boxes"] = one.boxes.xyxy[row][one.boxes.valid[row]].tolist()
            elif name == "keypoints" and one.keypoints is not None:
                pairs = zip(one.keypoints.xy[row].tolist(), one.keypoints.visible[row].tolist(), strict=True)
                out["keypoints"] = [xy if seen else None for xy, seen in pairs]
        return out


def slug(text: str) -> str:
    """A file name from any text: short, plain, different for different texts, unable to leave its folder."""
    plain = "-".join(re.findall(r"[a-z0-9]+", text.lower()))[:40].strip("-")
    digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:6]
    return f"{plain or 'sample'}-{digest}"
