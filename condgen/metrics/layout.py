"""Was the thing drawn where it was asked for, and does it go where the place goes?

On a plain background the foreground answers: what differs from the colour of the picture's rim. Nothing is learned, so
the number cannot be gamed by what a detector likes. Elsewhere a network answers that was trained on real pictures
(`condgen.metrics.pose`). The ceiling, the same on real pictures, says how far either can be trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from condgen import rng
from condgen.data._placement import POINTS, measure
from condgen.metrics.pose import OTHER_SIGMA, REACH, Finder, hull, near, sigmas_of, similarity
from condgen.metrics.score import Score
from condgen.metrics.signature import signature
from condgen.records import Boxes, Keypoints
from condgen.types import Condition

THRESHOLD = 0.3  # of a colour difference in [-1, 1] pixels, largest channel
PLAIN = 0.8  # least share of right places by the foreground rule on real pictures, for it to be used
MARGIN = 0.1  # of the picture's side: how far a box is widened for `inside`
MOVED = 0.25  # of the picture's side, for `moves`


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
    around, valid = hull(asked)
    return (iou(shown.boxes, around) * shown.found)[valid]


def point_hits(shown: Drawn, asked: Keypoints, names: Sequence[str]) -> Tensor:
    """(n,) share of each row's visible points that were drawn within REACH, over rows with any; see `drawn`."""
    points = shown.points[:, [POINTS.index(name) for name in names]]
    return near(torch.where(shown.found[:, None, None], points, torch.full((), torch.inf)), asked)


def plain(real: Tensor, condition: Condition, names: Sequence[str] = ()) -> bool:
    """Whether the foreground rule can be trusted on these real pictures: it finds what they show, see PLAIN."""
    shown = drawn(real)
    found = [
        float(hits(shown, getattr(condition, place)).mean()) for _, place, hits in _of_foreground(condition, names)
    ]
    return bool(found) and min(found) >= PLAIN


def layout_scores(
    fake: Tensor,
    real: Tensor,
    condition: Condition,
    *,
    names: Sequence[str] = (),
    finders: Mapping[str, Finder] | None = None,
    about: Mapping[str, str],
    seed: int = 0,
) -> list[Score]:
    """`box_iou`, and `pck@0.1` (and `oks`), of pictures (N, C, H, W) against the boxes and keypoints they were asked
    for. Floor: the same pictures against somebody else's place. Ceiling: the real pictures.

    names     of the keypoints
    finders   "boxes" and "keypoints" -> the trained network that is asked (`condgen.metrics.pose`). Without one the
              foreground says what was drawn; of points it has only the extremes of data=openmoji (top, bottom, left,
              right, centre), so that others are left out
    about     signature fields that the caller knows: data, split
    """
    made = []
    for name, place, shown_by, hits, fields in _measures(condition, names, finders or {}):
        of_fake, of_real = shown_by(fake), shown_by(real)
        alone = Condition(**{place: getattr(condition, place)})
        other = alone.index(alone.mismatch(rng.generator(seed, "another place", place)))
        mine, theirs = getattr(alone, place), getattr(other, place)
        values = hits(of_fake, mine)
        if not len(values):
            continue
        made.append(
            Score(
                name=name,
                value=float(values.mean()),
                floor=float(hits(of_fake, theirs).mean()),
                ceiling=float(hits(of_real, mine).mean()),
                error=float(values.std(correction=0)) / len(values) ** 0.5,
                signature=signature(name, n=len(values), **fields, **about, seed=seed),
            )
        )
    return made


Hits = Callable[[Any, Any], Tensor]
Measure = tuple[str, str, Callable[[Tensor], Any], Hits, dict[str, object]]


def _measures(condition: Condition, names: Sequence[str], finders: Mapping[str, Finder]) -> list[Measure]:
    """(score, field, what a picture shows, hits per row, signature fields) of everything that can be measured."""
    rule: dict[str, object] = {"foreground": f"rim{THRESHOLD}"}
    found: list[Measure] = [
        (name, place, drawn, hits, rule)
        for name, place, hits in _of_foreground(condition, names)
        if place not in finders
    ]
    for place, finder in finders.items():
        fields: dict[str, object] = {"finder": finder.fingerprint}
        if place == "boxes":
            found.append(("box_iou", place, finder.find, _found_box_hits, fields))
        else:
            alike = partial(similarity, sigmas=sigmas_of(names, finder.points))
            found.append((f"pck@{REACH}", place, finder.find, near, fields))
            found.append(("oks", place, finder.find, alike, {**fields, "sigma": f"coco,else{OTHER_SIGMA}"}))
    return found


def _of_foreground(condition: Condition, names: Sequence[str]) -> list[tuple[str, str, Hits]]:
    """(score, field, hits per row) of what the foreground rule can measure."""
    found: list[tuple[str, str, Hits]] = []
    if condition.boxes is not None:
        found.append(("box_iou", "boxes", box_hits))
    if condition.keypoints is not None and names and set(names) <= set(POINTS):
        found.append((f"pck@{REACH}", "keypoints", partial(point_hits, names=names)))
    return found


def _found_box_hits(corners: Tensor, asked: Boxes) -> Tensor:
    around, valid = hull(asked)
    return iou(corners.flatten(1), around)[valid]


def inside_score(fake: Tensor, real: Tensor, boxes: Boxes, *, about: Mapping[str, str], seed: int = 0) -> list[Score]:
    """`inside`: share of the foreground's pixels that lie in the hull of the asked boxes, widened by MARGIN.

    For plain backgrounds. Floor: somebody else's boxes. Ceiling: real pictures. A picture without foreground gets 0.
    """
    asked = Condition(boxes=boxes)
    other = asked.index(asked.mismatch(rng.generator(seed, "another place", "boxes"))).boxes
    assert other is not None
    of_fake, of_real = foreground(fake), foreground(real)
    values = _inside(of_fake, boxes)
    if not len(values):
        return []
    return [
        Score(
            "inside",
            float(values.mean()),
            floor=float(_inside(of_fake, other).mean()),
            ceiling=float(_inside(of_real, boxes).mean()),
            error=float(values.std(correction=0)) / len(values) ** 0.5,
            signature=signature(
                "inside", n=len(values), margin=MARGIN, foreground=f"rim{THRESHOLD}", **about, seed=seed
            ),
        )
    ]


def _inside(masks: Tensor, boxes: Boxes) -> Tensor:
    """(n,) over rows with a valid box."""
    around, valid = hull(boxes)
    widened = torch.cat([around[:, :2] - MARGIN, around[:, 2:] + MARGIN], dim=1)
    kept = (masks & region(widened, masks.shape[-2], masks.shape[-1])).flatten(1).sum(1)
    return (kept / masks.flatten(1).sum(1).clamp(min=1))[valid]


def region(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes (B, 4) in [0, 1] -> bool (B, height, width): pixels whose middle is inside."""
    x, y = (torch.arange(width) + 0.5) / width, (torch.arange(height) + 0.5) / height
    across = (x >= boxes[:, 0, None]) & (x < boxes[:, 2, None])
    down = (y >= boxes[:, 1, None]) & (y < boxes[:, 3, None])
    return down[:, :, None] & across[:, None, :]


@dataclass(frozen=True)
class Move:
    """Rows whose place can be moved by MOVED of the picture and stays inside it.

    rows (n,) are row numbers of the condition they come from; condition has n rows with the place moved by shift
    (n, 2), which is -MOVED, 0 or MOVED for x and y; there (n, 4) is the hull of the moved place.
    """

    rows: Tensor
    condition: Condition
    shift: Tensor
    there: Tensor


def moves(condition: Condition) -> Move:
    """Every box and point of a row moves alike, along each axis that has room, towards the side with more room."""
    place = condition.boxes if condition.boxes is not None else condition.keypoints
    assert place is not None
    around, known = hull(place)
    ahead, behind = 1 - around[:, 2:], around[:, :2]
    shift = torch.where(ahead >= behind, MOVED, -MOVED) * (torch.maximum(ahead, behind) >= MOVED)
    rows = (known & (shift != 0).any(1)).nonzero().flatten()
    shift, asked = shift[rows], condition.index(rows)
    moved: dict[str, Any] = {}
    if asked.boxes is not None:
        boxes = asked.boxes
        xyxy = (boxes.xyxy + shift.repeat(1, 2)[:, None].to(boxes.xyxy)).clamp(0, 1)
        moved["boxes"] = replace(boxes, xyxy=torch.where(boxes.valid[..., None], xyxy, boxes.xyxy))
    if asked.keypoints is not None:
        points = asked.keypoints
        xy = (points.xy + shift[:, None].to(points.xy)).clamp(0, 1)
        moved["keypoints"] = replace(points, xy=torch.where(points.visible[..., None], xy, points.xy))
    return Move(rows, replace(asked, **moved), shift, around[rows] + shift.repeat(1, 2))


def moves_score(before: Tensor, after: Tensor, move: Move, *, about: Mapping[str, str], seed: int = 0) -> list[Score]:
    """`moves`: correlation, inside the moved place, of the picture drawn there and the first picture moved there.

    before, after   pictures (n, C, H, W) of the rows of `move`, with the same noise
    Floor: correlation with the first picture as it was. Ceiling: 1, the thing moved and nothing else did.
    """
    if not len(move.rows):
        return []
    height, width = before.shape[-2:]
    steps = (move.shift * torch.tensor([width, height])).round().long()
    shifted = torch.stack(
        [one.roll((int(y), int(x)), dims=(-2, -1)) for one, (x, y) in zip(before, steps, strict=True)]
    )
    place = region(widened(move.there), height, width)
    values, floor = correlation(after, shifted, place), correlation(after, before, place)
    return [
        Score(
            "moves",
            float(values.mean()),
            floor=float(floor.mean()),
            ceiling=1.0,
            error=float(values.std(correction=0)) / len(values) ** 0.5,
            signature=signature("moves", n=len(values), by=MOVED, **about, seed=seed),
        )
    ]


def widened(boxes: Tensor, least: float = 0.125) -> Tensor:
    """Boxes (B, 4) with sides of at least `least`: one point has a neighbourhood."""
    middle, half = (boxes[:, :2] + boxes[:, 2:]) / 2, ((boxes[:, 2:] - boxes[:, :2]) / 2).clamp(min=least / 2)
    return torch.cat([middle - half, middle + half], dim=1)


def correlation(a: Tensor, b: Tensor, where: Tensor) -> Tensor:
    """(B,) Pearson's, of the pixels and channels of (B, C, H, W) in where (B, H, W); 0 for a picture of one colour."""
    weight = where[:, None].expand(a.shape).double().flatten(1)
    total = weight.sum(1, keepdim=True).clamp(min=1)

    def centred(x: Tensor) -> Tensor:
        flat = x.double().cpu().flatten(1)
        return (flat - (flat * weight).sum(1, keepdim=True) / total) * weight

    one, two = centred(a), centred(b)
    scale = (one.square().sum(1) * two.square().sum(1)).sqrt()
    return torch.where(scale > 1e-9, (one * two).sum(1) / scale.clamp(min=1e-9), torch.zeros_like(scale))
