"""Label recovery: are the labels that were asked for still in the output? After FCN-score, Isola et al. 2017, 5.1.

A small segmenter is trained on real pairs, picture -> label map, and asked about outputs: per-pixel accuracy, per-class
accuracy and class IoU of one global histogram. Kept on disk like the evaluator. Numbers of another segmenter, FCN-8s
for one, cannot be compared; the position between floor and ceiling can.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgen import rng
from condgen.data.base import RowDataset
from condgen.errors import CheckpointError, DataError, ShapeError
from condgen.metrics import fit, kept
from condgen.metrics.fit import MAX_ROWS
from condgen.metrics.paired import shuffled
from condgen.metrics.score import Score
from condgen.metrics.signature import signature
from condgen.nn.image_tower import resize
from condgen.pixels import pixels_to_float, pixels_to_uint8

RECIPE = 1  # part of every cache key: a changed recipe is another segmenter
STEM = "segmenter"
IGNORED = -1  # pixels between two colours
# the rule by which a source looks like a label map
LOOKED_AT = 64  # maps
MAX_COLOURS = 40
NEAR = 24.0  # RGB distance to a palette colour: what JPEG does to flat areas
APART = 48.0  # least RGB distance of two palette colours
FLAT = 24  # largest difference between a pixel and its neighbours, in 0..255, in a flat area
LEAST_SHARE = 0.001  # of the flat pixels, for a colour to be a class
COVERED = 0.97  # of the flat pixels, by the palette
FLAT_SHARE = 0.2  # of all pixels
RESAMPLES = 200  # of the rows, for the standard error


@dataclass(frozen=True)
class Labels:
    """What the classes of a source are: `palette` (K, 3) RGB 0..255, or None for one-hot sources of `count` classes."""

    count: int
    palette: Tensor | None = None

    def of(self, source: Tensor) -> Tensor:
        """Sources (N, C, H, W), uint8 or float in [-1, 1], -> class numbers (N, H, W) int64, IGNORED where a colour
        is nearer to no class than `APART`."""
        if self.palette is None:
            return source.argmax(1)
        colours = _rgb(source).float()
        out = []
        for row in colours:  # one by one: distances take K times the memory of a picture
            gaps = torch.cdist(row.flatten(1).T, self.palette.float())
            near, which = gaps.min(1)
            out.append(torch.where(near < APART, which, IGNORED).view(row.shape[1:]))
        return torch.stack(out)

    @property
    def text(self) -> str:
        """For cache keys."""
        return f"{self.count} {None if self.palette is None else self.palette.tolist()}"


def find_labels(dataset: RowDataset, *, sure: bool = False, seed: int = 0) -> Labels | None:
    """The classes of the sources of `dataset`, or None where they do not look like label maps.

    One-hot sources (ImageSpec.classes) are label maps. Others are when, of the flat pixels (no neighbour differs by
    more than 24 of 255) of the first 64 maps drawn by seed, 97 % lie within an RGB distance of 24 of at most 40
    colours; these are at least 48 apart and cover 0.1 % each; there are 3 or more (a line drawing has 2); and 20 % of
    all pixels are flat. `sure`: without these limits, DataError where there are not even 2 colours.
    """
    spec = dataset.provides.image
    if spec is None:
        return None
    if spec.classes:
        return Labels(spec.classes)
    if spec.channels not in (1, 3):
        return None
    found = []
    for row in rng.permutation(len(dataset), seed, "label maps")[:LOOKED_AT].tolist():
        try:
            image = dataset.sample(row, None).image
        except DataError:
            continue
        if image is not None:
            found.append(pixels_to_uint8(image))
    flat, share = _flat_pixels(torch.stack(found)) if found else (torch.empty(0, 3), 0.0)
    palette, covered = find_palette(flat)
    if sure and len(palette) < 2:
        raise DataError(f"eval.labels=on, but the sources hold {len(palette)} flat colours; use eval.labels=off")
    looks = len(palette) >= 3 and covered >= COVERED and share >= FLAT_SHARE
    return Labels(len(palette), palette) if looks or sure else None


def find_palette(colours: Tensor) -> tuple[Tensor, float]:
    """Colours (n, 3) uint8 -> the palette (K, 3), most frequent first, and the share that lies near it.

    The most frequent colour takes everything within `APART` with it, and so on: what JPEG scatters round a colour is
    merged into it.
    """
    total = len(colours)
    if not total:
        return torch.empty(0, 3, dtype=torch.uint8), 0.0
    values, counts = (colours.long() * torch.tensor([65536, 256, 1])).sum(1).unique(return_counts=True)
    points = torch.stack([values // 65536, values // 256 % 256, values % 256], dim=1).float()
    weights, left = counts.double(), torch.ones(len(points), dtype=torch.bool)
    chosen: list[Tensor] = []
    while left.any() and len(chosen) < MAX_COLOURS:
        seed = points[int(torch.where(left, weights, 0.0).argmax())]
        member = left & ((points - seed).norm(dim=1) < NEAR)
        if weights[member].sum() < LEAST_SHARE * total:
            left[member] = False  # noise: a rare colour that nothing lies near
            continue
        centre = (points[member] * weights[member, None]).sum(0).div(weights[member].sum()).round().float()
        left &= (points - centre).norm(dim=1) >= APART
        left &= ~member
        chosen.append(centre)
    if not chosen:
        return torch.empty(0, 3, dtype=torch.uint8), 0.0
    palette = torch.stack(chosen)
    near = torch.cdist(points, palette).min(1).values < NEAR
    return palette.to(torch.uint8), float(weights[near].sum() / total)


def _flat_pixels(maps: Tensor) -> tuple[Tensor, float]:
    """Colours (n, 3) of the pixels of uint8 maps (N, C, H, W) in flat areas, and their share of all."""
    values = _rgb(maps).float()
    high, low = F.max_pool2d(values, 3, 1, 1), -F.max_pool2d(-values, 3, 1, 1)
    flat = ((high - values).amax(1) <= FLAT) & ((values - low).amax(1) <= FLAT)
    return values.permute(0, 2, 3, 1)[flat].to(torch.uint8), float(flat.double().mean())


def _rgb(maps: Tensor) -> Tensor:
    return pixels_to_uint8(maps).expand(-1, 3, -1, -1)


# the segmenter


@dataclass(frozen=True)
class SegmenterOptions:
    """The shape of a segmenter and how it is trained. size: side of the pictures it sees, in pixels."""

    steps: int = 300
    batch_size: int = 16
    lr: float = 3e-3
    weight_decay: float = 0.01
    width: int = 12
    size: int = 64


class Segmenter(nn.Module):
    """Pictures of any size -> logits of `classes` at `options.size`: a U-Net of three halvings."""

    def __init__(self, options: SegmenterOptions, *, channels: int, classes: int) -> None:
        super().__init__()
        self.options, self.channels, self.classes = options, channels, classes
        self.about: dict[str, Any] = {}
        w = options.width
        widths = (w, 2 * w, 4 * w, 4 * w)
        self.down = nn.ModuleList(_block(i, o) for i, o in zip((channels, *widths), widths, strict=False))
        self.up = nn.ModuleList(_block(a + b, b) for a, b in zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.head = nn.Conv2d(w, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """float (B, channels, H, W) in [-1, 1] -> logits (B, classes, size, size)."""
        x = resize(images, self.options.size)
        kept_maps = []
        for at, block in enumerate(self.down):
            x = block(x if at == 0 else F.max_pool2d(x, 2))
            kept_maps.append(x)
        for block, beside in zip(self.up, kept_maps[-2::-1], strict=True):
            x = block(torch.cat([F.interpolate(x, scale_factor=2, mode="nearest"), beside], dim=1))
        return self.head(x)

    @torch.no_grad()
    def predict(self, images: Tensor, *, batch_size: int = 64) -> Tensor:
        """uint8 or float [-1, 1] (N, C, H, W) -> class numbers (N, size, size) on the CPU, of 8-bit pictures."""
        if images.dim() != 4 or images.shape[1] != self.channels:
            raise ShapeError(
                f"pictures of shape {tuple(images.shape)}; this segmenter takes (N, {self.channels}, H, W)"
            )
        was, device = self.training, next(self.parameters()).device
        self.eval()
        parts = [self(pixels_to_float(pixels_to_uint8(x)).to(device)).argmax(1).cpu() for x in images.split(batch_size)]
        self.train(was)
        return torch.cat(parts)

    @property
    def fingerprint(self) -> str:
        return kept.fingerprint(self)


def _block(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for wide in (inputs, outputs):
        layers += [nn.Conv2d(wide, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def train_segmenter(
    images: Tensor,
    labels: Tensor,
    classes: int,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    options: SegmenterOptions | None = None,
) -> Segmenter:
    """A segmenter of uint8 pictures (N, C, size, size) with class numbers (N, size, size), IGNORED counting nothing.

    A function of the arguments; the global random state is left as it was.
    """
    chosen = options or SegmenterOptions()
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(rng.derive(seed, STEM))
        made = Segmenter(chosen, channels=images.shape[1], classes=classes).to(device)
        _fit(made, images, labels, rng.generator(seed, "segmenter batches"))
    return made.eval()


def _fit(made: Segmenter, images: Tensor, labels: Tensor, draws: torch.Generator) -> None:
    options, device = made.options, next(made.parameters()).device
    optimizer = torch.optim.AdamW(made.parameters(), lr=options.lr, weight_decay=options.weight_decay)

    def loss(rows: Tensor) -> Tensor:
        turned = torch.rand(len(rows), generator=draws) < 0.5
        pixels = pixels_to_float(images[rows])
        pixels = torch.where(turned[:, None, None, None], pixels.flip(-1), pixels)
        # brightness and contrast: outputs must be judged by what they show, not by their exposure
        contrast, light = (torch.rand(2, len(rows), 1, 1, 1, generator=draws) - 0.5) * 0.4
        truth = torch.where(turned[:, None, None], labels[rows].flip(-1), labels[rows])
        logits = made((pixels * (1 + contrast) + light).clamp(-1, 1).to(device))
        total = F.cross_entropy(logits, truth.to(device), ignore_index=IGNORED, reduction="sum")
        return total / (truth != IGNORED).sum().clamp_min(1).to(device)

    fit.fit(
        made, len(images), loss, optimizer=optimizer, schedule=fit.cosine(optimizer, options.steps),
        steps=options.steps, batch_size=options.batch_size, draws=draws, replacement=True,
    )  # fmt: skip


def cached_segmenter(
    dataset: RowDataset,
    labels: Labels,
    folder: Path,
    *,
    about: Mapping[str, str],
    seed: int = 0,
    device: torch.device | str = "cpu",
    options: SegmenterOptions | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Segmenter:
    """The segmenter under `folder` for this data, split, classes and recipe; trained when there is none.

    dataset must not be the split that is scored. about: name and split of the data; part of the key. A damaged cache
    entry is trained again, with a line to `say`.
    """
    chosen = options or SegmenterOptions()
    spec = dataset.provides.image
    key: dict[str, Any] = {
        **about, "data_fingerprint": dataset.fingerprint, "rows": len(dataset), "channels": dataset.target.channels,
        "pixels": dataset.target.height, "source": str(spec), "labels": labels.text, "seed": seed, "recipe": RECIPE,
        "options": asdict(chosen),
    }  # fmt: skip
    place = folder / f"{STEM}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}"
    if place.exists():
        try:
            return load_segmenter(place).to(device)
        except CheckpointError as error:
            say(f"{error}; training it again")
    say(
        f"training the segmenter of {labels.count} classes on {len(dataset)} real pairs ({chosen.steps} steps); "
        f"it will be kept in {place}"
    )
    images, truth = load_mapped(dataset, labels, chosen.size, seed=seed)
    made = train_segmenter(images, truth, labels.count, seed=seed, device=device, options=chosen)
    made.about = key
    kept.write(
        place, STEM, made,
        {"options": asdict(chosen), "channels": made.channels, "classes": made.classes, "about": key},
    )  # fmt: skip
    return made


def load_segmenter(folder: Path) -> Segmenter:
    """Reads what `cached_segmenter` wrote. Raises CheckpointError for missing, damaged or unfit files."""

    def make(about: Mapping[str, Any]) -> Segmenter:
        return Segmenter(
            SegmenterOptions(**about["options"]), channels=int(about["channels"]), classes=int(about["classes"])
        )

    made, about = kept.read(folder, STEM, make)
    made.about = about["about"]
    return made.eval()


def load_mapped(
    dataset: RowDataset, labels: Labels, size: int, *, seed: int = 0, most: int = MAX_ROWS
) -> tuple[Tensor, Tensor]:
    """uint8 pictures (N, C, size, size) and class numbers (N, size, size); rows that cannot be read are left out."""
    images, truth = [], []
    for row in rng.permutation(len(dataset), seed, "segmenter rows")[:most].tolist():
        try:
            sample = dataset.sample(row, None)
        except DataError:
            continue
        if sample.image is not None and sample.target.dim() == 3:
            images.append(pixels_to_uint8(resize(pixels_to_float(sample.target)[None], size))[0])
            truth.append(at_size(labels.of(sample.image[None]), size)[0])
    if len(images) < 2:
        raise DataError(f"a segmenter needs pairs; {len(images)} of {len(dataset)} rows can be read")
    return torch.stack(images), torch.stack(truth)


def at_size(numbers: Tensor, size: int) -> Tensor:
    """Class numbers (N, H, W) at another size, by the nearest pixel."""
    return F.interpolate(numbers[:, None].float(), size=(size, size), mode="nearest-exact")[:, 0].long()


# scores


def histograms(truth: Tensor, named: Tensor, classes: int) -> Tensor:
    """(N, H, W) twice -> (N, K, K) float64: pixels of true class i that were named j; IGNORED truth is left out."""
    out = torch.zeros(len(truth), classes * classes, dtype=torch.float64)
    for row, (true, said) in enumerate(zip(truth.flatten(1), named.flatten(1), strict=True)):
        good = true != IGNORED
        out[row] = torch.bincount(true[good] * classes + said[good], minlength=classes * classes).double()
    return out.view(-1, classes, classes)


def figures(histogram: Tensor) -> tuple[float, float, float]:
    """(per-pixel accuracy, per-class accuracy, class IoU) of (K, K); classes that nowhere occur do not count."""
    hit, true, named = histogram.diagonal(), histogram.sum(1), histogram.sum(0)
    pixel = hit.sum() / histogram.sum().clamp_min(1)
    each = (hit / true)[true > 0].mean()
    union = true + named - hit
    return float(pixel), float(each), float((hit / union)[union > 0].mean())


def label_scores(
    judge: Segmenter, labels: Labels, fake: Tensor, real: Tensor, source: Tensor, *, about: Mapping[str, str],
    seed: int = 0,
) -> list[Score]:  # fmt: skip
    """`label_pixel_accuracy`, `label_class_accuracy`, `label_iou` of outputs (N, C, H, W) against their sources.

    Floor: the same outputs against the sources of other rows. Ceiling: the real pictures of these sources. Error: over
    200 resamples of the rows.
    """
    size = judge.options.size
    truth = at_size(labels.of(source), size)
    if len(truth) < 2 or not bool((truth != IGNORED).any()):
        raise DataError("label scores need at least 2 sources with labels")
    named = judge.predict(fake)
    each = histograms(truth, named, judge.classes)
    value = figures(each.sum(0))
    floor = figures(histograms(truth[shuffled(len(truth), seed)], named, judge.classes).sum(0))
    ceiling = figures(histograms(truth, judge.predict(real), judge.classes).sum(0))
    draws = torch.randint(len(each), (RESAMPLES, len(each)), generator=rng.generator(seed, "label resamples"))
    spread = torch.tensor([figures(each[rows].sum(0)) for rows in draws]).std(0).tolist()
    names = ("label_pixel_accuracy", "label_class_accuracy", "label_iou")
    return [
        Score(
            name, value[at], floor=floor[at], ceiling=ceiling[at], error=spread[at],
            signature=signature(
                name, **about, judge=judge.fingerprint, n=len(fake), classes=judge.classes, resize=f"area-{size}",
                seed=seed,
            ),
        )
        for at, name in enumerate(names)
    ]  # fmt: skip
