"""Was the thing drawn where it was asked for? Box IoU and PCK of the drawn foreground on a plain background.

The foreground is what differs from the colour of the picture's rim; nothing is learned, so the number cannot be
gamed by what a detector likes, and the ceiling (the same on real pictures) says how far the rule can be trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from condgen import rng
from condgen.data._placement import POINTS, measure
from condgen.metrics.score import Score
from condgen.metrics.signature import signature
from condgen.records import Boxes, Keypoints
from condgen.types import Condition

THRESHOLD = 0.3  # of a colour difference in [-1, 1] pixels, largest channel
REACH = 0.1  # of the picture's side: a point this near counts as correct


@dataclass(frozen=True)
class Drawn:
    """What pictures show: boxes (B, 4) and extreme points (B, 5, 2) of the foreground in [0, 1], found (B,)."""

    boxes: Tensor
    points: Tensor
    found: Tensor


def foreground(pixels: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """pixels (B, C, H, W) in [-1, 1] -> bool (B, H, W): differs from the median colour of the rim.

    Specks of one or two pixels are left out: a pixel counts with at least two neighbours that differ too.
    """
    pixels = pixels.float().cpu()
    top, bottom, left, right = pixels[:, :, 0], pixels[:, :, -1], pixels[:, :, :, 0], pixels[:, :, :, -1]
    colour = torch.cat([top, bottom, left, right], dim=2).median(dim=2).values
    differs = ((pixels - colour[:, :, None, None]).abs().amax(1) > threshold).float()
    crowd = F.avg_pool2d(differs[:, None], 3, stride=1, padding=1)[:, 0] * 9
    return (differs > 0) & (crowd > 2.5)


def drawn(pixels: Tensor) -> Drawn:
    """The box and the extreme points of each picture's foreground, by the rule of the data's own boxes and points."""
    masks = foreground(pixels)
    boxes, points = torch.zeros(len(masks), 4), torch.zeros(len(masks), len(POINTS), 2)
    found = masks.flatten(1).any(1)
    for row in found.nonzero().flatten().tolist():
        box, points[row] = measure(masks[row].to(torch.uint8) * 255)
        boxes[row] = box[0]
    return Drawn(boxes, points, found)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of xyxy (B, 4) pairs -> (B,); 0 where both are empty."""
    low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    both = (high - low).clamp(min=0).prod(1)
    union = (a[:, 2:] - a[:, :2]).clamp(min=0).prod(1) + (b[:, 2:] - b[:, :2]).clamp(min=0).prod(1) - both
    return torch.where(union > 0, both / union.clamp(min=1e-12), torch.zeros_like(both))


def box_hits(shown: Drawn, asked: Boxes) -> Tensor:
    """(n,) IoU of the drawn box and the hull of the asked ones, over rows with a valid box; 0 for nothing drawn."""
    valid, xyxy = asked.valid.cpu(), asked.xyxy.float().cpu()
    low = torch.where(valid[..., None], xyxy[..., :2], torch.ones(())).amin(1)
    high = torch.where(valid[..., None], xyxy[..., 2:], torch.zeros(())).amax(1)
    return (iou(shown.boxes, torch.cat([low, high], dim=1)) * shown.found)[valid.any(1)]


def point_hits(shown: Drawn, asked: Keypoints, names: Sequence[str]) -> Tensor:
    """(n,) share of each row's visible points that were drawn within REACH, over rows with any; see `drawn`."""
    visible = asked.visible.cpu()
    points = shown.points[:, [POINTS.index(name) for name in names]]
    near = ((points - asked.xy.float().cpu()).norm(dim=-1) <= REACH) & visible & shown.found[:, None]
    return (near.sum(1) / visible.sum(1).clamp(min=1))[visible.any(1)]


def layout_scores(
    fake: Tensor,
    real: Tensor,
    condition: Condition,
    *,
    names: Sequence[str] = (),
    about: Mapping[str, str],
    seed: int = 0,
) -> list[Score]:
    """`box_iou` and `pck@0.1` of pictures (N, C, H, W) against the boxes and keypoints they were asked for.

    names    of the keypoints. PCK is measured for the extreme points of data=openmoji (top, bottom, left, right,
             centre), which a foreground has; other parts need a detector and are left out
    about    signature fields that the caller knows: data, split
    Floor: the same pictures against somebody else's place. Ceiling: the real pictures.
    """
    of_fake, of_real = drawn(fake), drawn(real)
    made = []
    for name, hits in measures(condition, names):
        place = "boxes" if name == "box_iou" else "keypoints"
        alone = Condition(**{place: getattr(condition, place)})
        other = alone.index(alone.mismatch(rng.generator(seed, "another place", name)))
        values = hits(of_fake, alone)
        if not len(values):
            continue
        made.append(
            Score(
                name=name,
                value=float(values.mean()),
                floor=float(hits(of_fake, other).mean()),
                ceiling=float(hits(of_real, alone).mean()),
                error=float(values.std(correction=0)) / len(values) ** 0.5,
                signature=signature(name, n=len(values), foreground=f"rim{THRESHOLD}", **about, seed=seed),
            )
        )
    return made


def measures(condition: Condition, names: Sequence[str]) -> list[tuple[str, Callable[[Drawn, Condition], Tensor]]]:
    """The scores that this condition allows, with their hits per row."""
    found: list[tuple[str, Callable[[Drawn, Condition], Tensor]]] = []
    if condition.boxes is not None:
        found.append(("box_iou", lambda shown, asked: box_hits(shown, asked.boxes)))  # type: ignore[arg-type]
    if condition.keypoints is not None and names and set(names) <= set(POINTS):
        found.append((f"pck@{REACH}", lambda shown, asked: point_hits(shown, asked.keypoints, names)))  # type: ignore[arg-type]
    return found
