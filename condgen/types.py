"""The records that every part of condgen speaks: `Condition`, `Batch`, `Sample` and their specs.

Letters in shapes mean the same in every file:

    B rows   T frames   C channels   H, W pixels   L tokens   D text width   N boxes   K keypoints or classes
    V width of a vector   M channels of a map   A width of an action

Pixels are float in [-1, 1]. Coordinates are normalised to [0, 1], x to the right and y down. Boxes are
xyxy corners. Everything is batch-first. Records are frozen and every operation returns a new one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from condgen.errors import ShapeError
from condgen.pixels import pixels_to_float
from condgen.records import Boxes, Frames, Image, Keypoints, Record, Text
from condgen.specs import (
    FIELDS,
    BoxesSpec,
    ConditionSpec,
    FramesSpec,
    ImageSpec,
    KeypointsSpec,
    LabelSpec,
    TargetSpec,
    TextSpec,
)

__all__ = [
    "FIELDS", "Batch", "Boxes", "BoxesSpec", "Condition", "ConditionSpec", "Frames", "FramesSpec", "Image", "ImageSpec",
    "Keypoints", "KeypointsSpec", "LabelSpec", "Record", "Sample", "TargetSpec", "Text", "TextSpec", "device_of",
]  # fmt: skip


@dataclass(frozen=True)
class Condition:
    """What a generator is asked for. Every field is optional; all given fields share B.

    label     int64 (B,), -1 = unknown; or soft float (B, K)
    present   field name -> bool (B,): False where that row's value was dropped (null), for guidance
    """

    label: Tensor | None = None
    text: Text | None = None
    boxes: Boxes | None = None
    keypoints: Keypoints | None = None
    image: Image | None = None
    frames: Frames | None = None
    present: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = {name: len(value) for name, value in self.items()}
        if len(set(sizes.values())) > 1:
            raise ShapeError(f"every field of a Condition needs the same number of rows; got {sizes}")
        if self.label is not None and not (
            (self.label.dtype == torch.int64 and self.label.dim() == 1)
            or (self.label.is_floating_point() and self.label.dim() == 2)
        ):
            raise ShapeError(
                f"label has dtype {self.label.dtype} and shape {tuple(self.label.shape)}; "
                "give int64 (B,) class indices or float (B, K) soft labels"
            )
        for _, value in self.items():
            if isinstance(value, Record):
                value.check()
        unknown = set(self.present) - set(FIELDS)
        if unknown:
            raise ShapeError(f"present names unknown fields {sorted(unknown)}; fields are {', '.join(FIELDS)}")
        for name, flags in self.present.items():
            if sizes and (flags.dtype != torch.bool or flags.shape != (len(self),)):
                found = f"dtype {flags.dtype} and shape {tuple(flags.shape)}"
                raise ShapeError(f"present[{name!r}] has {found}; give bool ({len(self)},)")

    # reading

    def items(self) -> Iterator[tuple[str, Any]]:
        """(name, value) of each field that is given, in the order of FIELDS."""
        for name in FIELDS:
            value = getattr(self, name)
            if value is not None:
                yield name, value

    @property
    def given(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.items())

    def __len__(self) -> int:
        """B, or 0 for a condition without any field."""
        for _, value in self.items():
            return len(value)
        return 0

    def is_present(self, name: str) -> Tensor:
        """bool (B,): rows whose field `name` was given and not dropped."""
        value = getattr(self, name)
        if value is None:
            raise ShapeError(f"the condition has no {name}; it holds {', '.join(self.given) or 'nothing'}")
        if name in self.present:
            return self.present[name]
        return torch.ones(len(value), dtype=torch.bool, device=device_of(value))

    def check_values(self) -> None:
        """Ranges of coordinates and pixels. Raises ShapeError; reads every tensor."""
        for _, value in self.items():
            if isinstance(value, Record):
                value.check_values()

    # moving and joining

    def _map(self, fn: Callable[[Tensor], Tensor]) -> Condition:
        changed: dict[str, Any] = {n: v.map(fn) if isinstance(v, Record) else fn(v) for n, v in self.items()}
        return replace(self, **changed, present={n: fn(t) for n, t in self.present.items()})

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None, non_blocking: bool = False) -> Condition:
        """Moves every tensor; `dtype` applies to floating tensors only."""

        def move(t: Tensor) -> Tensor:
            kind = dtype if dtype is not None and t.is_floating_point() else t.dtype
            return t.to(device=device, dtype=kind, non_blocking=non_blocking)

        return self._map(move)

    def pin_memory(self) -> Condition:
        return self._map(lambda t: t.pin_memory())

    def index(self, rows: Tensor | Sequence[int] | slice) -> Condition:
        """Rows by int64 indices, a bool tensor (B,) or a slice."""
        if isinstance(rows, slice):
            rows = torch.arange(len(self))[rows]
        at = rows if isinstance(rows, Tensor) else torch.tensor(rows, dtype=torch.int64)
        changed: dict[str, Any] = {
            n: v.index(at) if isinstance(v, Record) else v[at.to(v.device)] for n, v in self.items()
        }
        return replace(self, **changed, present={n: t[at.to(t.device)] for n, t in self.present.items()})

    def repeat(self, times: int) -> Condition:
        """Each row `times` times in a row: samples per condition."""
        return self.index(torch.arange(len(self)).repeat_interleave(times))

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """Joins rows. A field that only some parts have is null (present False) in the others' rows."""
        if not parts:
            raise ShapeError("Condition.cat needs at least one part")
        out: dict[str, Any] = {}
        present: dict[str, Tensor] = {}
        for name in FIELDS:
            values = [getattr(part, name) for part in parts]
            model = next((v for v in values if v is not None), None)
            if model is None:
                continue
            filled = [_null_rows(model, len(p)) if v is None else v for p, v in zip(parts, values, strict=True)]
            out[name] = _cat(filled)
            if any(v is None or name in p.present for p, v in zip(parts, values, strict=True)):
                device = device_of(model)
                present[name] = torch.cat(
                    [
                        torch.zeros(len(p), dtype=torch.bool, device=device) if v is None else p.is_present(name)
                        for p, v in zip(parts, values, strict=True)
                    ]
                )
        return Condition(**out, present=present)

    # nulls and guidance

    def null_like(self) -> Condition:
        """The same fields with every row null and present False."""
        return self.drop(torch.ones(len(self), dtype=torch.bool))

    def drop(
        self,
        p: float | Tensor,
        fields: Sequence[str] | None = None,
        generator: torch.Generator | None = None,
    ) -> Condition:
        """Replaces rows by null: with probability p, or where the bool tensor p (B,) is True.

        With a probability each field is dropped independently, which is what guidance over several
        conditions needs. `fields` limits it; the default is every given field.
        """
        changed: dict[str, Any] = {}
        present = dict(self.present)
        for name in self.given if fields is None else fields:
            value = getattr(self, name)
            if value is None:
                raise ShapeError(f"cannot drop {name}: the condition holds {', '.join(self.given) or 'nothing'}")
            size = len(value)
            gone = p if isinstance(p, Tensor) else torch.rand(size, generator=generator) < p
            keep = ~gone.to(device_of(value))
            if isinstance(value, Record):
                changed[name] = value.where(keep, value.null_like())
            elif value.is_floating_point():
                changed[name] = value * keep[:, None]
            else:
                changed[name] = torch.where(keep, value, torch.full_like(value, -1))
            present[name] = self.is_present(name) & keep
        return replace(self, **changed, present=present)

    # the operations of text-to-image training

    def interpolate(self, other: Condition, beta: float | Tensor, fields: Sequence[str]) -> Condition:
        """beta * self + (1 - beta) * other on soft labels, pooled text and keypoints (GAN-INT, Reed et al. 2016).

        beta is a number or (B,). Class indices, token sequences and pixels have no midpoint: asking for
        them is an error, and text loses its tokens and strings. A row that either side lacks (not present) keeps
        its own value: there is no midpoint between a sentence and nothing.
        """
        weight = torch.as_tensor(beta, dtype=torch.float32)

        def mix(a: Tensor, b: Tensor) -> Tensor:
            w = weight.to(a.device)
            return torch.lerp(b, a, (w.view(-1, *[1] * (a.dim() - 1)) if w.dim() else w).to(a.dtype))

        if len(self) != len(other):
            raise ShapeError(f"cannot interpolate {len(self)} rows with {len(other)}; give as many of each")
        changed: dict[str, Any] = {}
        for name in fields:
            a, b = getattr(self, name), getattr(other, name)
            if a is None or b is None:
                raise ShapeError(f"cannot interpolate {name}: both conditions must hold it")
            kept = self.is_present(name) & other.is_present(name)
            if name == "text" and a.pooled is not None and b.pooled is not None:
                changed[name] = Text(pooled=torch.where(kept[:, None], mix(a.pooled, b.pooled), a.pooled))
            elif name == "label" and a.is_floating_point() and b.is_floating_point():
                changed[name] = torch.where(kept[:, None], mix(a, b), a)
            elif name == "keypoints":
                both = a.visible & b.visible & kept[:, None]
                changed[name] = Keypoints(torch.where(both[..., None], mix(a.xy, b.xy), a.xy), a.visible)
            else:
                raise ShapeError(
                    f"{name} cannot be interpolated; pooled text, soft labels (B, K) and keypoints can. "
                    "For class indices use torch.nn.functional.one_hot(label, K).float() first"
                )
        return replace(self, **changed)

    def mismatch(self, generator: torch.Generator | None = None, different_by: str | None = "label") -> Tensor:
        """A permutation (B,) int64 without fixed points, for wrong pairs (GAN-CLS).

        With `different_by="label"` and class indices given, row i is sent to a row of another class wherever
        the batch allows it. Identical sentences count as the same row where `text.strings` is known.
        """
        size = len(self)
        if size < 2:
            raise ShapeError(f"a mismatch needs at least 2 rows; this condition has {size}")
        same = torch.eye(size, dtype=torch.bool)
        soft = torch.zeros(size, size, dtype=torch.bool)
        if self.text is not None and self.text.strings is not None:
            codes = {s: i for i, s in enumerate(dict.fromkeys(self.text.strings))}
            ids = torch.tensor([codes[s] for s in self.text.strings])
            soft |= ids[:, None] == ids[None, :]
        if different_by == "label" and self.label is not None and not self.label.is_floating_point():
            ids = self.label.cpu()
            soft |= (ids[:, None] == ids[None, :]) & (ids >= 0)[:, None]
        return _derangement(same, soft, generator)

    # geometry: always moves with the pixels

    def hflip(self, flip_pairs: Sequence[tuple[int, int]] = ()) -> Condition:
        """Mirrors every spatial field. `flip_pairs` are the (left, right) keypoint indices."""
        changed: dict[str, Any] = {n: v.hflip(flip_pairs) for n, v in self.items() if isinstance(v, Record)}
        return replace(self, **changed)

    def crop_resize(self, windows: Tensor, size: tuple[int, int] | None = None) -> Condition:
        """Cuts windows (B, 4) (xyxy in [0, 1]) out of every spatial field and resizes pixels to `size` (H, W)."""
        changed: dict[str, Any] = {
            n: v.crop(windows.to(device_of(v)), size) for n, v in self.items() if isinstance(v, Record)
        }
        return replace(self, **changed)


@dataclass(frozen=True)
class Batch:
    """One training batch.

    target (B, C, H, W) or (B, T, C, H, W): float in [-1, 1], or uint8 straight from the loader until
    `as_float`. keys: B row ids. truth: tensors that only scores may use, such as a foreground mask.
    shared: what `System.shared` computed once for every phase of this step.
    """

    target: Tensor
    condition: Condition = field(default_factory=Condition)
    keys: tuple[str, ...] = ()
    truth: Mapping[str, Tensor] = field(default_factory=dict)
    shared: Any = None

    def __len__(self) -> int:
        return self.target.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return replace(
            self,
            target=self.target.to(device, non_blocking=non_blocking),
            condition=self.condition.to(device, non_blocking=non_blocking),
            truth={n: t.to(device, non_blocking=non_blocking) for n, t in self.truth.items()},
        )

    def pin_memory(self) -> Batch:
        return replace(self, target=self.target.pin_memory(), condition=self.condition.pin_memory())

    def as_float(self) -> Batch:
        """uint8 pixels (target, image, frames) become float in [-1, 1]; float pixels stay."""
        image, frames = self.condition.image, self.condition.frames
        if image is not None:
            image = replace(image, pixels=pixels_to_float(image.pixels))
        if frames is not None:
            frames = replace(frames, pixels=pixels_to_float(frames.pixels))
        condition = replace(self.condition, image=image, frames=frames)
        return replace(self, target=pixels_to_float(self.target), condition=condition)


@dataclass(frozen=True)
class Sample:
    """One row of a data set before batching: the fields of `Batch` without B.

    Pixels may be uint8 (0..255) or float in [-1, 1]. Fields that this row lacks are None.
    """

    key: str
    target: Tensor  # (C, H, W) or (T, C, H, W)
    label: int | None = None
    caption: str | None = None
    boxes: Tensor | None = None  # (n, 4) xyxy in [0, 1]
    box_labels: Tensor | None = None  # (n,) int64
    keypoints: Tensor | None = None  # (K, 2) in [0, 1]
    visible: Tensor | None = None  # (K,) bool
    image: Tensor | None = None  # (C, H, W)
    image_mask: Tensor | None = None  # (1, H, W)
    frames: Tensor | None = None  # (T, C, H, W)
    actions: Tensor | None = None  # (T, A)
    truth: Mapping[str, Tensor] = field(default_factory=dict)


def device_of(value: Tensor | Record) -> torch.device:
    """The device of a label or of a record's first tensor (CPU for bare strings)."""
    if isinstance(value, Tensor):
        return value.device
    return next((t.device for _, t in value.tensors()), torch.device("cpu"))


def _null_rows(model: Any, rows: int) -> Any:
    if isinstance(model, Tensor):
        shape = (rows, *model.shape[1:])
        return torch.full(shape, 0 if model.is_floating_point() else -1, dtype=model.dtype, device=model.device)
    out = model.map(lambda t: t.new_zeros((rows, *t.shape[1:])))
    return replace(out, strings=("",) * rows) if isinstance(out, Text) and out.strings is not None else out


def _cat(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(list(values))
    names = [name for name, _ in first.tensors()]
    if any([n for n, _ in v.tensors()] != names for v in values):
        raise ShapeError(f"cannot join {type(first).__name__} records that hold different tensors")
    if isinstance(first, Text) and first.tokens is not None:
        values = _pad_tokens(values)
    joined: dict[str, Any] = {name: torch.cat([getattr(v, name) for v in values]) for name in names}
    if isinstance(first, Text) and first.strings is not None:
        joined["strings"] = sum((v.strings or ("",) * len(v) for v in values), ())
    return replace(first, **joined)


def _pad_tokens(values: Sequence[Text]) -> list[Text]:
    length = max(v.tokens.shape[1] for v in values if v.tokens is not None)
    out = []
    for v in values:
        assert v.tokens is not None and v.mask is not None
        more = length - v.tokens.shape[1]
        out.append(replace(v, tokens=F.pad(v.tokens, (0, 0, 0, more)), mask=F.pad(v.mask, (0, more))))
    return out


def _derangement(never: Tensor, avoid: Tensor, generator: torch.Generator | None) -> Tensor:
    """A random permutation p with no never[i, p[i]] and as few avoid[i, p[i]] as random repair finds."""
    size = len(never)
    order = torch.randperm(size, generator=generator)
    perm = torch.empty_like(order)
    perm[order] = order.roll(1)  # one cycle through all rows: no fixed point by construction
    bad = avoid[torch.arange(size), perm].nonzero().flatten().tolist()
    for i in bad:
        if not avoid[i, perm[i]]:
            continue
        # swap targets with a row j such that both ends are allowed afterwards
        at = torch.arange(size)
        fits = ~never[i, perm] & ~never[at, perm[i]] & ~avoid[i, perm] & ~avoid[at, perm[i]]
        choices = fits.nonzero().flatten()
        if len(choices):
            j = choices[torch.randint(len(choices), (1,), generator=generator)]
            perm[[i, int(j)]] = perm[[int(j), i]]
    return perm
