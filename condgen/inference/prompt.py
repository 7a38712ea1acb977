"""What a user asks for, as plain Python values, -> a `Condition` that a trained system understands.

Each field takes one value or a list of values; lists give several rows. `None` inside a list leaves that row's
field open, where the system was trained for it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image as PilImage
from PIL import ImageOps
from torch import Tensor

from condgen.data.decode import decode_classes, decode_image, one_hot, resize
from condgen.errors import ConfigError, DataError
from condgen.pixels import pixels_to_float
from condgen.registry import unknown
from condgen.specs import BoxesSpec, ConditionSpec, FramesSpec, ImageSpec, KeypointsSpec, LabelSpec, TextSpec
from condgen.types import FIELDS, Boxes, Condition, Frames, Image, Keypoints, Text

HOW = {
    "label": 'label="name" or label=3',
    "text": 'text="a sentence"',
    "boxes": "boxes=[(x0, y0, x1, y1)] in [0, 1]",
    "keypoints": 'keypoints={"name": (x, y)} in [0, 1]',
    "image": 'image="file.png"',
    "frames": 'frames=["0.png", "1.png"]',
}


def check_fields(spec: ConditionSpec, given: Sequence[str], requires: Sequence[str], system: str) -> None:
    """Raises ConfigError for a field that the system would not use, or lacks and needs."""
    unused = [name for name in given if name not in spec.given]
    if unused:
        raise ConfigError(
            f"{system} was trained with {', '.join(spec.given) or 'no condition'} and would ignore "
            f"{', '.join(unused)}; leave it out, or load a run trained with it"
        )
    needed = [name for name in spec.given if not spec.nullable or name in requires]
    missing = [name for name in needed if name not in given]
    if missing:
        raise ConfigError(f"{system} needs {' and '.join(missing)}: pass " + ", ".join(HOW[name] for name in missing))


def build_condition(
    spec: ConditionSpec,
    values: Mapping[str, Any],
    *,
    label_names: Sequence[str] = (),
    required: Sequence[str] = (),
) -> Condition:
    """One row per prompt from `values` (field -> one value, or a list of them).

    Fields with one value serve every row. Fields of `spec` that are not in `values` are null and not present.
    Text holds strings only; encode it afterwards. Raises ConfigError and DataError.
    """
    rows = {name: split_rows(name, value, spec) for name, value in values.items()}
    count = max((len(r) for r in rows.values()), default=1)
    for name, found in rows.items():
        if len(found) not in (1, count):
            sizes = ", ".join(f"{n}: {len(r)}" for n, r in rows.items())
            raise ConfigError(f"give every field one value or the same number of values; got {sizes}")
        rows[name] = found * count if len(found) == 1 else found
        if any(v is None for v in found) and (not spec.nullable or name in required):
            raise ConfigError(f"{name} is None in a row, but this system was not trained with missing {name}")
    out: dict[str, Any] = {}
    present: dict[str, Tensor] = {}
    for name, field_spec in spec.items():
        column = rows.get(name, [None] * count)
        names = label_names if name == "label" else ()
        out[name] = MAKERS[name](column, field_spec, names)
        if any(v is None for v in column):
            present[name] = torch.tensor([v is not None for v in column])
    return Condition(**out, present=present)


def split_rows(name: str, value: Any, spec: ConditionSpec) -> list[Any]:
    """One value or many -> a list of single rows, told apart by type and depth of nesting."""
    if isinstance(value, Tensor | np.ndarray):
        single = {"label": 0, "boxes": 2, "keypoints": 2, "image": 3, "frames": 4}.get(name, 0)
        if name == "boxes" and value.ndim == 1:
            return [value.tolist()]
        return list(value) if value.ndim > single else [value]
    if not isinstance(value, list | tuple):
        return [value]
    if value and all(v is None for v in value):
        return list(value)
    if not value:
        raise ConfigError(f"{name} is an empty list; leave it out, or pass {HOW[name]}")
    if name in ("label", "text", "image"):
        return list(value)
    if name == "frames":  # one clip is a list of pictures
        return list(value) if _depth(value, _is_picture) > 1 else [value]
    depth = _depth(value, _is_number)  # 1 = one box, 2 = one row of coordinates, 3 = many rows
    if name == "boxes" and depth == 1:
        return [[value]]
    return list(value) if depth > 2 else [value]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _is_picture(value: Any) -> bool:
    if isinstance(value, Tensor | np.ndarray):
        return bool(value.ndim == 3)
    return not isinstance(value, list | tuple)


def _depth(value: Any, is_leaf: Callable[[Any], bool]) -> int:
    """Levels of lists above the leaves; None and empty lists do not count."""
    if isinstance(value, Mapping):  # named points: a row of coordinates
        return 2
    if isinstance(value, Tensor | np.ndarray) and not is_leaf(value):
        return int(value.ndim)
    if not isinstance(value, list | tuple) or is_leaf(value):
        return 0
    return 1 + max((_depth(v, is_leaf) for v in value if v is not None), default=0)


# one maker per field: rows -> the record


def _labels(rows: Sequence[Any], spec: LabelSpec, names: Sequence[str]) -> Tensor:
    return torch.tensor([-1 if v is None else class_index(v, spec.num_classes, names) for v in rows])


def class_index(value: Any, classes: int, names: Sequence[str]) -> int:
    """A class number, or a class name whatever its case and its spaces. Raises ConfigError with suggestions."""
    if isinstance(value, str):
        plain = [_plain(n) for n in names]
        if _plain(value) in plain:
            return plain.index(_plain(value))
        if not names:
            raise ConfigError(f"label={value!r}: this system has no label names; pass a number in 0..{classes - 1}")
        raise ConfigError(unknown("label", value, list(names)))
    try:
        index = int(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"label={value!r}; pass a class name or a number in 0..{classes - 1}") from error
    if index != value or isinstance(value, bool) or not 0 <= index < classes:
        raise ConfigError(f"label={value!r} is out of range; this system knows 0..{classes - 1}")
    return index


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", " ").replace("-", " ")


def _texts(rows: Sequence[Any], spec: TextSpec, names: Sequence[str]) -> Text:
    for row in rows:
        if row is not None and not (isinstance(row, str) and row.strip()):
            raise ConfigError(f'text is {row!r}; pass a sentence, such as text="a red fox"')
    return Text(strings=tuple(row or "" for row in rows))


def _boxes(rows: Sequence[Any], spec: BoxesSpec, names: Sequence[str]) -> Boxes:
    """A row is a list of (x0, y0, x1, y1) or, where boxes have classes, (x0, y0, x1, y1, class)."""
    xyxy = torch.zeros(len(rows), spec.max_boxes, 4)
    valid = torch.zeros(len(rows), spec.max_boxes, dtype=torch.bool)
    label = torch.zeros(len(rows), spec.max_boxes, dtype=torch.int64)
    width = 5 if spec.num_classes else 4
    for i, row in enumerate(rows):
        boxes = _numbers("boxes", row)
        if len(boxes) > spec.max_boxes:
            raise ConfigError(f"{len(boxes)} boxes in a row; this system takes at most {spec.max_boxes}")
        for n, box in enumerate(boxes):
            if len(box) != width:
                form = "(x0, y0, x1, y1, class)" if width == 5 else "(x0, y0, x1, y1)"
                raise ConfigError(f"a box has {len(box)} numbers; this system takes {form} with corners in [0, 1]")
            xyxy[i, n], valid[i, n] = torch.tensor(box[:4]), True
            if width == 5:
                label[i, n] = class_index(box[4], spec.num_classes, ())
    made = Boxes(xyxy, valid, label if spec.num_classes else None)
    made.check_values()
    return made


def _keypoints(rows: Sequence[Any], spec: KeypointsSpec, names: Sequence[str]) -> Keypoints:
    """A row maps names to (x, y), or lists all K points in order; a point that is None or left out is not given."""
    xy = torch.zeros(len(rows), spec.num_points, 2)
    visible = torch.zeros(len(rows), spec.num_points, dtype=torch.bool)
    for i, row in enumerate(rows):
        for k, point in _named_points(row, spec):
            if len(point) != 2:
                raise ConfigError(f"keypoint {k} has {len(point)} numbers; pass (x, y) in [0, 1]")
            xy[i, k], visible[i, k] = torch.tensor(point), True
    made = Keypoints(xy, visible)
    made.check_values()
    return made


def _named_points(row: Any, spec: KeypointsSpec) -> list[tuple[int, list[float]]]:
    if isinstance(row, Mapping):
        known = {_plain(n): k for k, n in enumerate(spec.names)}
        strange = [n for n in row if _plain(str(n)) not in known]
        if strange:
            raise ConfigError(unknown("keypoint", str(strange[0]), list(spec.names)))
        return [(known[_plain(n)], _numbers("keypoints", [p])[0]) for n, p in row.items() if p is not None]
    points = list(row) if row is not None else []
    if points and len(points) != spec.num_points:
        raise ConfigError(
            f"{len(points)} keypoints in a row; this system takes {spec.num_points} "
            f"({', '.join(spec.names) or 'unnamed'}), None for one that is not given"
        )
    return [(k, _numbers("keypoints", [p])[0]) for k, p in enumerate(points) if p is not None]


def _numbers(name: str, row: Any) -> list[list[float]]:
    """A row of coordinates as lists of numbers, from lists, arrays or tensors; None = no coordinates."""
    try:
        items = row.tolist() if hasattr(row, "tolist") else row or ()
        return [[float(v) for v in (item.tolist() if hasattr(item, "tolist") else item)] for item in items]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} cannot be read from {row!r}; pass {HOW[name]}") from error


def _images(rows: Sequence[Any], spec: ImageSpec, names: Sequence[str]) -> Image:
    zero = torch.zeros(spec.channels, spec.height, spec.width)
    size = (spec.height, spec.width)
    read = read_class_map if spec.classes else read_picture
    pixels = torch.stack([zero if v is None else read(v, spec.channels, size) for v in rows])
    given = torch.tensor([float(v is not None) for v in rows]).view(-1, 1, 1, 1)
    return Image(pixels, given.expand(-1, 1, *size).clone() if spec.mask else None)


def _frames(rows: Sequence[Any], spec: FramesSpec, names: Sequence[str]) -> Frames:
    """Fewer frames than the system looks at are the most recent ones; of more, the last are used.

    With actions a row is {"pixels": pictures, "actions": (entries, A)}: a row of numbers for each picture, and then for
    each frame to come where the system knows those too. The newest picture stands for them, as in data=clips.
    """
    if spec.actions:
        return _acted(rows, spec)
    size = (spec.height, spec.width)
    pixels = torch.zeros(len(rows), spec.frames, spec.channels, *size)
    mask = torch.zeros(len(rows), spec.frames, dtype=torch.bool)
    for i, row in enumerate(rows):
        clip = [] if row is None else list(row) if isinstance(row, list | tuple | Tensor | np.ndarray) else [row]
        for t, picture in enumerate(clip[-spec.frames :][::-1], start=1):
            pixels[i, -t], mask[i, -t] = read_picture(picture, spec.channels, size), True
    return Frames(pixels, mask)


def _acted(rows: Sequence[Any], spec: FramesSpec) -> Frames:
    size = (spec.height, spec.width)
    pixels = torch.zeros(len(rows), spec.frames, spec.channels, *size)
    mask = torch.zeros(len(rows), spec.frames, dtype=torch.bool)
    actions = torch.zeros(len(rows), spec.frames, spec.actions)
    for i, row in enumerate(rows):
        if row is None:
            continue
        if not isinstance(row, Mapping) or set(row) != {"pixels", "actions"}:
            raise ConfigError('this system also needs actions: frames={"pixels": ["0.png", "1.png"], "actions": rows}')
        told = torch.as_tensor(np.asarray(row["actions"], dtype=np.float32))
        shown = [read_picture(one, spec.channels, size) for one in row["pixels"]]
        if told.shape != (spec.frames, spec.actions) or not 0 < len(shown) <= spec.frames:
            raise ConfigError(
                f"{len(shown)} frames with actions of shape {tuple(told.shape)}; this system takes "
                f"({spec.frames}, {spec.actions}), a row for each of at most {spec.frames} frames"
            )
        pixels[i], mask[i], actions[i] = torch.stack(shown + shown[-1:] * (spec.frames - len(shown))), True, told
    return Frames(pixels, mask, actions)


MAKERS: dict[str, Callable[[Sequence[Any], Any, Sequence[str]], Any]] = {
    "label": _labels, "text": _texts, "boxes": _boxes,
    "keypoints": _keypoints, "image": _images, "frames": _frames,
}  # fmt: skip
assert tuple(MAKERS) == FIELDS


def read_picture(value: Any, channels: int, size: tuple[int, int]) -> Tensor:
    """A file, PIL picture, uint8 array (H, W, C) or tensor (C, H, W) -> float (channels, *size) in [-1, 1].

    Another size is stretched smoothly to `size` (H, W). Alpha is laid on white. Raises DataError.
    """
    if isinstance(value, Tensor):
        return _fit_tensor(value, channels, size)
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 or value.ndim not in (2, 3):
            raise DataError(f"an array must be uint8 (H, W) or (H, W, C); got {value.dtype} {value.shape}")
        pixels = torch.from_numpy(np.ascontiguousarray(value)).reshape(*value.shape[:2], -1)
        return _fit_tensor(pixels.permute(2, 0, 1), channels, size)
    if channels not in (1, 3, 4):
        raise DataError(
            f"this system takes {channels} channels, which no picture has; pass a tensor ({channels}, H, W)"
        )
    if isinstance(value, str | Path):
        try:
            return _fit_tensor(decode_image(value, channels=channels), channels, size)
        except DataError as error:
            raise DataError(f"{value}: {error}") from error
    if isinstance(value, PilImage.Image):
        return _fit_tensor(decode_image(_as_png(value), channels=channels), channels, size)
    raise DataError(f"a picture cannot be read from {type(value).__name__}; pass a file, PIL picture or tensor")


def read_class_map(value: Any, classes: int, size: tuple[int, int]) -> Tensor:
    """A file, PIL picture or array of class numbers (H, W), or a tensor (classes, H, W) of -1 and +1 -> float
    (classes, *size); another size takes the nearest pixel. Raises DataError."""
    if isinstance(value, Tensor) and value.dim() == 3 and len(value) == classes:
        pixels = pixels_to_float(value.detach().cpu()).float()
    elif isinstance(value, Tensor | np.ndarray):
        pixels = pixels_to_float(one_hot(torch.as_tensor(value).cpu().long().squeeze(), classes))
    elif isinstance(value, str | Path):
        try:
            pixels = pixels_to_float(decode_classes(value, classes))
        except DataError as error:
            raise DataError(f"{value}: {error}") from error
    elif isinstance(value, PilImage.Image):
        held = io.BytesIO()
        value.save(held, format="PNG")
        pixels = pixels_to_float(decode_classes(held.getvalue(), classes))
    else:
        raise DataError(f"a class map cannot be read from {type(value).__name__}; pass a file, PIL picture or tensor")
    return F.interpolate(pixels[None], size=size, mode="nearest-exact")[0]


def _as_png(picture: PilImage.Image) -> bytes:
    """As a file in memory, so that one decoder decides what palettes, alpha and 16 bits mean."""
    if picture.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        picture = picture.convert("RGBA" if picture.mode in ("PA", "RGBa", "La") else "RGB")
    held = io.BytesIO()
    ImageOps.exif_transpose(picture).save(held, format="PNG")
    return held.getvalue()


def _fit_tensor(pixels: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    if pixels.dim() != 3 or pixels.shape[0] not in (channels, 1):
        raise DataError(f"a picture tensor must be ({channels}, H, W); got {tuple(pixels.shape)}")
    pixels = pixels_to_float(pixels.detach().cpu()).float()
    if not bool(pixels.abs().max() <= 1.001):
        raise DataError("float pixels must lie in [-1, 1]; pass uint8 0..255, or scale with x / 127.5 - 1")
    return resize(pixels, size, "stretch")[0].clamp(-1, 1).expand(channels, *size).contiguous()
