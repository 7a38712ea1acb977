"""What a data set provides and what a system is built for, in sizes alone. See `condgen.types` for the letters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

FIELDS = ("label", "text", "boxes", "keypoints", "image", "frames")


@dataclass(frozen=True)
class LabelSpec:
    num_classes: int
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextSpec:
    """`pooled` and `tokens` are widths D, 0 = the encoder does not give that form; `length` is L."""

    pooled: int = 0
    tokens: int = 0
    length: int = 0
    encoder: str = ""


@dataclass(frozen=True)
class BoxesSpec:
    max_boxes: int
    num_classes: int = 0


@dataclass(frozen=True)
class KeypointsSpec:
    num_points: int
    names: tuple[str, ...] = ()
    flip_pairs: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class ImageSpec:
    """`classes` above 0: a map of class numbers, one channel each: +1 in the channel of the pixel's class, else -1."""

    channels: int
    height: int
    width: int
    mask: bool = False
    classes: int = 0


@dataclass(frozen=True)
class FramesSpec:
    frames: int
    channels: int
    height: int
    width: int
    actions: int = 0


@dataclass(frozen=True)
class TargetSpec:
    """What is generated: frames 0 = a picture (C, H, W), otherwise a clip (T, C, H, W)."""

    channels: int
    height: int
    width: int
    frames: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        image = (self.channels, self.height, self.width)
        return (self.frames, *image) if self.frames else image


@dataclass(frozen=True)
class ConditionSpec:
    """The fields that a data set provides or a system is built for; None = absent.

    nullable: rows may be dropped in training, so encoders need a learned null.
    """

    label: LabelSpec | None = None
    text: TextSpec | None = None
    boxes: BoxesSpec | None = None
    keypoints: KeypointsSpec | None = None
    image: ImageSpec | None = None
    frames: FramesSpec | None = None
    nullable: bool = False

    def items(self) -> Iterator[tuple[str, Any]]:
        for name in FIELDS:
            value = getattr(self, name)
            if value is not None:
                yield name, value

    @property
    def given(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.items())

    def only(self, names: Sequence[str]) -> ConditionSpec:
        gone: dict[str, Any] = {name: None for name in self.given if name not in names}
        return replace(self, **gone)

    def without(self, names: Sequence[str]) -> ConditionSpec:
        gone: dict[str, Any] = dict.fromkeys(names)
        return replace(self, **gone)

    @property
    def flip_pairs(self) -> tuple[tuple[int, int], ...]:
        return self.keypoints.flip_pairs if self.keypoints is not None else ()

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> ConditionSpec:
        kinds: dict[str, Any] = {
            "label": LabelSpec, "text": TextSpec, "boxes": BoxesSpec,
            "keypoints": KeypointsSpec, "image": ImageSpec, "frames": FramesSpec,
        }  # fmt: skip
        made = {name: kinds[name](**_tuples(data[name])) for name in FIELDS if data.get(name)}
        return ConditionSpec(**made, nullable=bool(data.get("nullable", False)))


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    """JSON turned tuples into lists; specs are hashable records, so turn them back."""

    def freeze(value: Any) -> Any:
        return tuple(freeze(v) for v in value) if isinstance(value, list | tuple) else value

    return {name: freeze(value) for name, value in data.items()}
