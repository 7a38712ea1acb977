"""Where is the thing, and where are its points? A small network that was trained on real pictures only, and the scores
that ask it about samples: box IoU, PCK and OKS.

Kept on disk like the evaluator. It learns the conditions of the data set itself: the hull of a row's boxes, or its
named points as heatmaps (softmax over cells, mean place), both in [0, 1] of the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgen import rng
from condgen.data.base import RowDataset
from condgen.data.coco import POINTS as COCO_POINTS
from condgen.errors import DataError, ShapeError
from condgen.metrics import fit, kept
from condgen.nn.image_tower import ImageTower, resize
from condgen.pixels import pixels_to_float, pixels_to_uint8
from condgen.records import Boxes, Keypoints
from condgen.types import Sample

RECIPE = 1  # part of every cache key: a changed recipe is another finder
STEM = "finder"
REACH = 0.1  # of the picture's side: a point this near counts as correct
# COCO keypoint evaluation (cocodataset.org, cocoapi): standard deviations of people who mark a point
COCO_SIGMAS = (
    0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089,
    0.089,
)  # fmt: skip
OTHER_SIGMA = 0.05  # of points that COCO does not have
AREA_OF_HULL = 0.53  # COCO's area is that of the segment; this share of the points' hull is customary without one
LEAST_SIDE = 0.1  # of the picture: a hull of a single point has no area
SIDES = {"l": "left", "r": "right"}


@dataclass(frozen=True)
class FinderOptions:
    """The shape of a finder and how it is trained. size: side of the pictures it sees, in pixels.

    spread   width of the heatmaps it is shown, in cells of the map (size / 4 of them on a side)
    """

    steps: int = 800
    batch_size: int = 32
    lr: float = 3e-3
    weight_decay: float = 0.01
    width: int = 16
    size: int = 64
    spread: float = 1.0


class Finder(nn.Module):
    """Pictures of any size -> places in [0, 1]: points (B, K, 2), or corners (B, 2, 2) of one box where points = 0."""

    def __init__(self, options: FinderOptions, *, channels: int, points: int) -> None:
        super().__init__()
        self.options, self.channels, self.points = options, channels, points
        self.about: dict[str, Any] = {}
        w = options.width
        if not points:
            self.tower = ImageTower(channels=channels, dim=4, width=w, size=options.size)
            return
        self.fine = nn.Sequential(_step(channels, w, 2), _step(w, 2 * w, 2))  # to size / 4
        self.middle, self.coarse = _step(2 * w, 4 * w, 2), nn.Sequential(_step(4 * w, 8 * w, 2), _step(8 * w, 8 * w))
        self.widest = nn.Sequential(_step(8 * w, 8 * w, 2), _step(8 * w, 8 * w))
        self.join = nn.ModuleList([_step(16 * w, 4 * w), _step(8 * w, 2 * w), _step(4 * w, 2 * w)])
        self.maps = nn.Conv2d(2 * w, points, 1)

    def forward(self, images: Tensor) -> Tensor:
        """float (B, channels, H, W) in [-1, 1] -> places; see the class."""
        return self.places(images)[0]

    def places(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The places, and log-probabilities of the cells (B, K, cells) for points."""
        small = resize(images, self.options.size)
        if not self.points:
            middle, side = self.tower(small).view(-1, 2, 2).unbind(1)
            half = F.softplus(side) / 2
            return torch.stack([middle + 0.5 - half, middle + 0.5 + half], dim=1), None
        fine = self.fine(small)
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        up = self.widest(coarse)
        for join, other in zip(self.join, (coarse, middle, fine), strict=True):
            up = join(torch.cat([F.interpolate(up, size=other.shape[-2:], mode="nearest"), other], dim=1))
        maps = self.maps(up).flatten(2).log_softmax(-1)
        return maps.exp() @ cells(self.options.size // 4).to(maps), maps

    @torch.no_grad()
    def find(self, images: Tensor, *, batch_size: int = 128) -> Tensor:
        """uint8 or float [-1, 1] (N, C, H, W) -> places on the CPU, of pictures rounded to 8 bits."""
        if images.dim() != 4 or images.shape[1] != self.channels:
            raise ShapeError(f"pictures of shape {tuple(images.shape)}; this finder takes (N, {self.channels}, H, W)")
        was, device = self.training, next(self.parameters()).device
        self.eval()
        parts = [self(pixels_to_float(pixels_to_uint8(x)).to(device)).cpu() for x in images.split(batch_size)]
        self.train(was)
        return torch.cat(parts) if parts else torch.empty(0, self.points or 2, 2)

    @property
    def fingerprint(self) -> str:
        return kept.fingerprint(self)


def cells(side: int) -> Tensor:
    """(side * side, 2): middles of the cells of a map, x before y, in [0, 1]."""
    at = (torch.arange(side) + 0.5) / side
    return torch.stack([at.repeat(side), at.repeat_interleave(side)], dim=1)


def _step(before: int, after: int, stride: int = 1) -> nn.Sequential:
    kernel = 4 if stride == 2 else 3
    return nn.Sequential(nn.Conv2d(before, after, kernel, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())


def train_finder(
    images: Tensor,
    places: Tensor,
    seen: Tensor,
    *,
    boxes: bool,
    seed: int = 0,
    device: torch.device | str = "cpu",
    options: FinderOptions | None = None,
) -> Finder:
    """A finder of uint8 pictures (N, C, H, W); a function of the arguments.

    places (N, K, 2) in [0, 1] with seen (N, K); boxes: K = 2, the corners of a box. The global random state is left
    as it was.
    """
    chosen = options or FinderOptions()
    if len(images) < 2 or not bool(seen.any()):
        raise DataError(f"a finder needs at least 2 pictures with places; got {len(images)} pictures")
    small = pixels_to_uint8(resize(pixels_to_float(pixels_to_uint8(images)), chosen.size))
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(rng.derive(seed, STEM))
        made = Finder(chosen, channels=images.shape[1], points=0 if boxes else places.shape[1]).to(device)
        _fit(made, small, places.float(), seen, rng.generator(seed, "finder batches"))
    return made.eval()


def _fit(made: Finder, images: Tensor, places: Tensor, seen: Tensor, draws: torch.Generator) -> None:
    options, device = made.options, next(made.parameters()).device
    optimizer = torch.optim.AdamW(made.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    side = options.size // 4

    def loss(rows: Tensor) -> Tensor:
        motion = fit.motions(len(rows), draws, turn=fit.TURN if made.points else 0.0)
        pixels = fit.shade(fit.moved(pixels_to_float(images[rows]), motion), draws).to(device)
        asked = fit.moved_points(places[rows], motion)
        inside = seen[rows] & ((asked >= 0) & (asked <= 1)).all(-1) if made.points else seen[rows]
        asked, weight = asked.clamp(0, 1).to(device), inside.to(device).float()
        found, maps = made.places(pixels)
        away = (found - asked).abs().sum(-1)
        if maps is not None:
            gap = (cells(side).to(device)[None, None] - asked[:, :, None]).square().sum(-1) * side**2
            heat = (-gap / (2 * options.spread**2)).softmax(-1)
            away = away - (heat * maps).sum(-1)
        return (away * weight).sum() / weight.sum().clamp(min=1)

    fit.fit(
        made, len(images), loss, optimizer=optimizer, schedule=fit.cosine(optimizer, options.steps),
        steps=options.steps, batch_size=options.batch_size, draws=draws,
    )  # fmt: skip


def cached_finder(
    dataset: RowDataset,
    folder: Path,
    *,
    boxes: bool,
    about: Mapping[str, str],
    seed: int = 0,
    device: torch.device | str = "cpu",
    options: FinderOptions | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Finder:
    """The finder under `folder` for this data, split and recipe; trained when there is none.

    boxes   of the hull of a row's boxes, else of its keypoints
    about   name and split of the data; part of the key
    """
    chosen = options or FinderOptions()
    needs = "boxes" if boxes else "keypoints"
    key: dict[str, Any] = {
        **about, "data_fingerprint": dataset.fingerprint, "rows": len(dataset), "channels": dataset.target.channels,
        "pixels": dataset.target.height, "finds": needs, "seed": seed, "recipe": RECIPE, "options": asdict(chosen),
    }  # fmt: skip

    def train() -> Finder:
        images, rows = fit.readable(
            dataset, chosen.size, _hull_of if boxes else _points_of, judge=STEM, needs=needs, seed=seed
        )
        places, seen = (torch.stack([row[i] for row in rows]) for i in (0, 1))
        made = train_finder(images, places, seen, boxes=boxes, seed=seed, device=device, options=chosen)
        made.about = key
        return made

    def save(made: Finder, place: Path) -> None:
        sizes = {"options": asdict(chosen), "channels": made.channels, "points": made.points}
        kept.write(place, STEM, made, {**sizes, "about": key})

    return fit.cached(
        folder, STEM, key, load=lambda place: load_finder(place).to(device), train=train, save=save, say=say,
        what=f"{needs} of {len(dataset)} real pictures ({chosen.steps} steps)",
    )  # fmt: skip


def load_finder(folder: Path) -> Finder:
    """Reads what `cached_finder` wrote. Raises CheckpointError for missing, damaged or unfit files."""

    def make(about: Mapping[str, Any]) -> Finder:
        return Finder(FinderOptions(**about["options"]), channels=about["channels"], points=about["points"])

    made, about = kept.read(folder, STEM, make)
    made.about = about["about"]
    return made.eval()


def _hull_of(row: Sample) -> tuple[Tensor, Tensor] | None:
    if row.boxes is None or not len(row.boxes):
        return None
    return torch.stack([row.boxes[:, :2].amin(0), row.boxes[:, 2:].amax(0)]), torch.ones(2, dtype=torch.bool)


def _points_of(row: Sample) -> tuple[Tensor, Tensor] | None:
    if row.keypoints is None or row.visible is None or not bool(row.visible.any()):
        return None
    return row.keypoints, row.visible


# what is measured


def hull(condition: Boxes | Keypoints) -> tuple[Tensor, Tensor]:
    """The least box (B, 4) around each row's valid boxes or visible points, and whether there are any (B,)."""
    if isinstance(condition, Boxes):
        low, high, valid = condition.xyxy[..., :2], condition.xyxy[..., 2:], condition.valid
    else:
        low, high, valid = condition.xy, condition.xy, condition.visible
    low, high, valid = low.float().cpu(), high.float().cpu(), valid.cpu()
    low = torch.where(valid[..., None], low, torch.ones(())).amin(1)
    high = torch.where(valid[..., None], high, torch.zeros(())).amax(1)
    return torch.cat([low, high], dim=1), valid.any(1)


def near(found: Tensor, asked: Keypoints) -> Tensor:
    """PCK: (n,) share of each row's visible points that were found within REACH, over rows with any."""
    visible = asked.visible.cpu()
    close = ((found - asked.xy.float().cpu()).norm(dim=-1) <= REACH) & visible
    return (close.sum(1) / visible.sum(1).clamp(min=1))[visible.any(1)]


def similarity(found: Tensor, asked: Keypoints, sigmas: Tensor) -> Tensor:
    """OKS: (n,) mean over a row's visible points of exp(-d^2 / (2 s^2 (2 sigma)^2)), over rows with any.

    s^2 is AREA_OF_HULL of the area of the visible points' hull, whose sides are taken as at least LEAST_SIDE.
    """
    visible = asked.visible.cpu()
    box, any_visible = hull(asked)
    area = (box[:, 2:] - box[:, :2]).clamp(min=LEAST_SIDE).prod(1) * AREA_OF_HULL
    away = (found - asked.xy.float().cpu()).square().sum(-1)
    alike = torch.exp(-away / (2 * area[:, None] * (2 * sigmas) ** 2)) * visible
    return (alike.sum(1) / visible.sum(1).clamp(min=1))[any_visible]


def sigmas_of(names: Sequence[str], count: int) -> Tensor:
    """(K,) COCO's sigma for points that COCO names ("l_knee" is "left knee"), OTHER_SIGMA for others."""
    known = dict(zip(COCO_POINTS, COCO_SIGMAS, strict=True))
    plain = [" ".join(SIDES.get(w, w) for w in name.lower().replace("_", " ").split()) for name in names]
    return torch.tensor([known.get(name, OTHER_SIGMA) for name in plain] or [OTHER_SIGMA] * count)
