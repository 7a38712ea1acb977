"""Bytes -> pixels, and geometry that moves with them: the one place of condgen that opens pictures.

Files are hostile until proved otherwise: formats are named at every open, sizes are read from the header
before any pixel is decoded, and whatever a decoder raises becomes a DataError with the reason.

What comes out, for every kind of file (C, H, W):

    bilevel, grey            uint8, 1 channel            grey or RGB with alpha   composited on `background`
    RGB, palette             uint8, 3 channels           CMYK, YCbCr, LAB         converted to RGB
    16-bit grey or RGB PNG   float32 in [-1, 1]          animation                its first frame
    EXIF orientation         applied                     32-bit and float TIFF    see `_deep`
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from condgen.errors import ConfigError, DataError
from condgen.records import Boxes, Keypoints

if TYPE_CHECKING:
    import PIL.Image

FORMATS = ("PNG", "JPEG", "WEBP")  # accepted under any name
NAMED_FORMATS = {".gif": "GIF", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}  # only under their own suffix
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", *NAMED_FORMATS)
MAX_PIXELS = 50_000_000  # of one picture; 7,000 x 7,000 and a little
MAX_BYTES = 256 * 2**20  # of one file
RESIZE = ("stretch", "crop", "pad")
ORIENTATION = 0x0112  # the EXIF tag
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's convert("L")


@dataclass(frozen=True)
class Header:
    """What a file says about itself before its pixels are decoded. Sizes are after EXIF orientation."""

    width: int
    height: int
    channels: int  # 1 or 3; alpha is not counted
    deep: bool  # more than 8 bits: decodes to float32
    palette: bool = False  # pixels are numbers of colours in a table


def read_header(source: Path | str | bytes, *, max_pixels: int = MAX_PIXELS) -> Header:
    """Size and kind of a picture without decoding it. Raises DataError."""
    with _Opened(source, max_pixels) as image:
        width, height = image.size
        # getexif of a PNG decodes its pixels, to find a block after them; only one before them counts here
        turned = not (image.format == "PNG" and "exif" not in image.info) and _orientation(image.getexif) >= 5
        grey = image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I") or "LA;16B" in _raw_modes(image)
        size = (height, width) if turned else (width, height)
        return Header(*size, 1 if grey else 3, _is_deep(image), image.mode in ("P", "PA"))


def decode_image(
    source: Path | str | bytes,
    *,
    channels: int | None = None,
    background: int | tuple[int, int, int] = 255,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """A picture as (C, H, W): uint8, or float32 in [-1, 1] where the file holds more than 8 bits.

    channels    None = as many as the file has (1 or 3, alpha composited on `background`); 1 = luma;
                3 = grey repeated; 4 = colour and straight alpha
    background  0..255, one number or (R, G, B)
    Raises DataError: missing, unreadable, not one of the accepted formats, too large, damaged.
    """
    if channels not in (None, 1, 3, 4):
        raise ConfigError(f"channels={channels!r}: choose 1, 3, 4 or leave it out to keep the file's own")
    with _Opened(source, max_pixels) as image:
        deep, raw_modes = _is_deep(image), _raw_modes(image)  # before load, which forgets what the file held
        image.load()
        turn = _orientation(image.getexif)
        array = _deep(image, raw_modes[0], _Opened(source, max_pixels)) if deep else _shallow(image)
    pixels = torch.from_numpy(np.array(_upright(array, turn).transpose(2, 0, 1), order="C"))
    return _with_channels(pixels, channels, background)


def has_end_mark(path: Path) -> bool:
    """Whether a JPEG or PNG ends as its format says; True for other formats. Reads a few bytes.

    False for most files that break off, and for good ones with something appended.
    """
    try:
        with path.open("rb") as file:
            start, size = file.read(3), file.seek(0, io.SEEK_END)
            file.seek(max(0, size - 12))
            end = file.read(12)
    except OSError:
        return False
    if start.startswith(b"\xff\xd8"):
        return end.endswith(b"\xff\xd9")
    return end[4:8] == b"IEND" if start == b"\x89PN" else True


def decode_classes(source: Path | str | bytes, classes: int, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """A picture whose pixels are class numbers, as `one_hot` of them: (classes, H, W) uint8.

    Numbers are the indices of a palette picture, or the values of one channel of 1, 8 or 16 bits as they are stored.
    Raises DataError for what holds no numbers (colour, alpha, JPEG, which changes them) and for one >= classes.
    """
    return one_hot(read_numbers(source, max_pixels=max_pixels), classes)


def one_hot(numbers: Tensor, classes: int) -> Tensor:
    """Class numbers (H, W) -> uint8 (classes, H, W): 255 in the channel of the pixel's class, 0 in the others, which
    are +1 and -1 as float. Raises DataError for a number outside 0..classes-1."""
    high = int(numbers.max())
    if high >= classes or int(numbers.min()) < 0:
        bad = numbers[(numbers >= classes) | (numbers < 0)]
        void = " 255 often marks pixels without a class (void);" if high == 255 else ""
        raise DataError(
            f"{len(bad)} of {numbers.numel()} pixels hold no class: there is {int(bad.max())}, and the classes are "
            f"0..{classes - 1} (data.source_classes={classes} in training);{void} give such pixels a class of their own"
        )
    return (numbers[None] == torch.arange(classes)[:, None, None]).to(torch.uint8) * 255


def read_numbers(source: Path | str | bytes, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """The numbers (H, W) int64 that a palette picture or a picture of one channel stores; see `decode_classes`."""
    with _Opened(source, max_pixels) as image:
        kind, mode = image.format, image.mode
        image.load()
        turn = _orientation(image.getexif)
        if kind == "JPEG" or not (mode in ("1", "L", "P") or mode.startswith("I")):
            what = "a JPEG, whose compression changes them" if kind == "JPEG" else f"{kind} of kind {mode}"
            raise DataError(
                f"class numbers need a palette picture or one channel without alpha; it is {what}. Save the numbers "
                "as PNG, or leave data.source_classes out to use the colours"
            )
        array = np.asarray(image).astype(np.int64)[..., None]
    return torch.from_numpy(np.array(_upright(array, turn)[..., 0], order="C"))


class _Opened:
    """Opens a picture lazily after checking its size; turns every failure inside the block into DataError."""

    def __init__(self, source: Path | str | bytes, max_pixels: int) -> None:
        self.source, self.max_pixels = source, max_pixels
        self.file: io.BufferedIOBase | None = None

    def __enter__(self) -> PIL.Image.Image:
        import PIL.Image

        try:
            formats: tuple[str, ...] = FORMATS
            if isinstance(self.source, bytes):
                size, self.file = len(self.source), io.BytesIO(self.source)
            else:
                path = Path(self.source)
                if not path.is_file():  # a folder, a device or a pipe is not a picture
                    lost = (
                        "it is a link that leads nowhere or in a circle" if path.is_symlink() else "the file is missing"
                    )
                    raise DataError(lost if not path.exists() else "it is not a regular file")
                size, self.file = path.stat().st_size, path.open("rb")
                own = NAMED_FORMATS.get(path.suffix.lower())
                formats = (*FORMATS, own) if own else FORMATS
            if size == 0 or size > MAX_BYTES:
                raise DataError("the file is empty" if size == 0 else f"the file has {size} bytes; at most {MAX_BYTES}")
            image = PIL.Image.open(self.file, formats=formats)
            width, height = image.size
            if width * height > self.max_pixels or min(width, height) < 1:
                raise DataError(f"the header says {width} x {height} pixels; at most {self.max_pixels} are decoded")
            return image
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self.file is not None:
            self.file.close()
        # decoders raise SyntaxError, struct.error, IndexError, MemoryError and more on damaged files: all of it is
        # the file's fault, and the row must be quarantined rather than end the run
        if isinstance(error, Exception) and not isinstance(error, DataError):
            raise DataError(_reason(error)) from error


def _reason(error: Exception) -> str:
    import PIL.Image

    if isinstance(error, PIL.UnidentifiedImageError):
        return f"it is not a picture in an accepted format ({', '.join(FORMATS)}; {', '.join(NAMED_FORMATS)} by name)"
    if isinstance(error, PIL.Image.DecompressionBombError):
        return f"the header says {str(error).partition('(')[2].split(')')[0]}; at most {MAX_PIXELS} are decoded"
    if isinstance(error, PermissionError):
        return "the file may not be read (permission denied)"
    return f"it cannot be decoded: {str(error).split(chr(10))[0][:200] or type(error).__name__}"


def _orientation(getexif: Callable[[], PIL.Image.Exif]) -> int:
    try:
        turn: object = getexif().get(ORIENTATION, 1)
    except (OSError, ValueError, SyntaxError, KeyError, TypeError, struct.error):
        return 1  # damaged metadata; the pixels can still be good
    return turn if isinstance(turn, int) and 1 <= turn <= 8 else 1


def _upright(array: np.ndarray, turn: int) -> np.ndarray:
    """Undoes an EXIF orientation of (H, W, C)."""
    if turn >= 5:
        array = array.transpose(1, 0, 2)
    if turn in (2, 3, 6, 7):
        array = array[:, ::-1]
    if turn in (3, 4, 7, 8):
        array = array[::-1]
    return array


def _is_deep(image: PIL.Image.Image) -> bool:
    if image.mode.startswith("I") or image.mode == "F":
        return True
    # Pillow opens 16-bit colour PNG as 8-bit; only the raw mode of its tile still shows what the file holds
    return image.format == "PNG" and any("16" in mode for mode in _raw_modes(image))


def _raw_modes(image: PIL.Image.Image) -> list[str]:
    return [str(tile[3]) for tile in getattr(image, "tile", ())] or [""]


def _shallow(image: PIL.Image.Image) -> np.ndarray:
    """uint8 (H, W, 1 | 2 | 3 | 4)."""
    transparent = "transparency" in image.info
    if image.mode in ("1", "L"):
        mode = "LA" if transparent and image.mode == "L" else "L"
    elif image.mode in ("LA", "La"):
        mode = "LA"
    elif image.mode in ("RGBA", "RGBa", "PA") or transparent:
        mode = "RGBA"
    else:
        mode = "RGB"
    array = np.asarray(image if image.mode == mode else image.convert(mode))
    return array[..., None] if array.ndim == 2 else array


def _deep(image: PIL.Image.Image, raw_mode: str, again: _Opened) -> np.ndarray:
    """float32 (H, W, C) in [-1, 1] from 16 bits a channel, or from float pixels that already lie there.

    `image` is loaded; `again` opens the same picture once more.
    """
    if image.mode == "F":
        values = np.asarray(image, np.float32)
        if not (values.min() >= -1 and values.max() <= 1):  # also refuses NaN
            raise DataError("float pixels outside [-1, 1] have no known range; scale them before saving")
        return values[..., None]
    if image.mode.startswith("I"):
        numbers = np.asarray(image).astype(np.int64)
        if numbers.min() < 0 or numbers.max() > 65535:
            raise DataError("32-bit pixels outside 0..65535 have no known range; save 16-bit PNG or TIFF")
        return (numbers / 32767.5 - 1).astype(np.float32)[..., None]
    # Pillow keeps one byte of each 16-bit colour. Which one is the raw mode's choice: "16B" takes the first, the
    # high one, "16L" the second. Two passes give both. (torchvision's decoder would give them at once, but it
    # crashes the process on damaged files.) Grey with alpha has four bytes a pixel, just like 8-bit RGBA.
    with again as twin:
        other = "RGBA" if raw_mode == "LA;16B" else raw_mode.replace("16B", "16L")
        twin.tile = [tile._replace(args=other) for tile in twin.tile]  # type: ignore[attr-defined]
        second = np.asarray(twin).astype(np.int64)
    if raw_mode == "LA;16B":
        numbers = second[..., 0::2] * 256 + second[..., 1::2]
    else:
        numbers = np.asarray(image).astype(np.int64) * 256 + second
    return (numbers / 32767.5 - 1).astype(np.float32)


def _with_channels(pixels: Tensor, channels: int | None, background: int | tuple[int, int, int]) -> Tensor:
    """1 to 4 channels -> the channels asked for; see decode_image."""
    whole = 255.0 if pixels.dtype == torch.uint8 else 1.0
    alpha = None
    if len(pixels) in (2, 4):
        pixels, alpha = pixels[:-1], pixels[-1:]
    if channels == 4:
        colour = pixels.expand(3, -1, -1)
        return torch.cat([colour, torch.full_like(colour[:1], whole) if alpha is None else alpha])
    if alpha is not None:
        shade = torch.tensor([background] * 3 if isinstance(background, int) else background, dtype=torch.float32)
        behind = shade if len(pixels) == 3 else (shade * torch.tensor(LUMA)).sum(0, keepdim=True)
        behind = behind[:, None, None] if whole == 255.0 else behind[:, None, None] / 127.5 - 1
        share = alpha.float() / 255 if whole == 255.0 else (alpha + 1) / 2
        pixels = _like(torch.lerp(behind.expand(pixels.shape), pixels.float(), share), pixels)
    if channels == 1 and len(pixels) == 3:
        pixels = _like((pixels.float() * torch.tensor(LUMA)[:, None, None]).sum(0, keepdim=True), pixels)
    elif channels == 3 and len(pixels) == 1:
        pixels = pixels.repeat(3, 1, 1)
    return pixels


def _like(value: Tensor, model: Tensor) -> Tensor:
    return value if model.is_floating_point() else value.round().clamp(0, 255).to(model.dtype)


# size and geometry

Window = tuple[float, float, float, float]
WHOLE: Window = (0.0, 0.0, 1.0, 1.0)


def resize(
    pixels: Tensor, size: tuple[int, int], policy: str = "crop", *, background: int = 255
) -> tuple[Tensor, Window]:
    """Brings (C, H, W) to a frame for `size` (height, width), anti-aliased.

    stretch  exactly size, aspect ratio ignored
    crop     aspect ratio kept, the smallest frame that covers size: `cut` takes size out of it
    pad      aspect ratio kept, centred in exactly size, the rest `background` (0..255)

    Returns the frame and where it lies in the source: xyxy in the source's [0, 1], beyond them for pad.
    """
    if policy not in RESIZE:
        raise ConfigError(f"resize={policy!r}: choose one of {', '.join(RESIZE)}")
    (height, width), (tall, wide) = pixels.shape[-2:], size
    if policy == "stretch":
        return _scaled(pixels, tall, wide), WHOLE
    ratio = (max if policy == "crop" else min)(tall / height, wide / width)
    h, w = max(1, round(height * ratio)), max(1, round(width * ratio))
    if policy == "crop":
        return _scaled(pixels, max(h, tall), max(w, wide)), WHOLE
    inner = _scaled(pixels, min(h, tall), min(w, wide))
    h, w = inner.shape[-2:]
    top, left = (tall - h) // 2, (wide - w) // 2
    fill = background if pixels.dtype == torch.uint8 else background / 127.5 - 1
    frame = torch.full((len(pixels), tall, wide), fill, dtype=pixels.dtype)
    frame[:, top : top + h, left : left + w] = inner
    return frame, (-left / w, -top / h, (wide - left) / w, (tall - top) / h)


def cut(frame: Tensor, size: tuple[int, int], at: tuple[float, float] = (0.5, 0.5)) -> tuple[Tensor, Window]:
    """Takes size (height, width) out of a frame; at = (x, y) in [0, 1]: 0 = left or top, 0.5 = centre.

    Returns the pixels and the window xyxy in the frame's [0, 1].
    """
    (height, width), (tall, wide) = frame.shape[-2:], size
    if tall > height or wide > width:
        raise ConfigError(f"cannot cut {tall} x {wide} out of a frame of {height} x {width}; use a larger load_size")
    top, left = round((height - tall) * at[1]), round((width - wide) * at[0])
    window = (left / width, top / height, (left + wide) / width, (top + tall) / height)
    return frame[..., top : top + tall, left : left + wide], window


def move_boxes(xyxy: Tensor, windows: Sequence[Window], flip: bool = False) -> tuple[Tensor, Tensor]:
    """Boxes (n, 4) in [0, 1] under crops (in order) and a mirror -> (boxes, valid (n,)).

    Clipped to the picture; invalid (and 0) where less than 25 % of the area is left.
    """
    boxes = Boxes(xyxy[None].float(), torch.ones(1, len(xyxy), dtype=torch.bool))
    for window in windows:
        if window != WHOLE:
            boxes = boxes.crop(torch.tensor([window]), None)
    boxes = boxes.hflip() if flip else boxes
    return boxes.xyxy[0], boxes.valid[0]


def move_points(
    xy: Tensor,
    visible: Tensor,
    windows: Sequence[Window],
    flip: bool = False,
    flip_pairs: Sequence[tuple[int, int]] = (),
) -> tuple[Tensor, Tensor]:
    """Keypoints (K, 2) in [0, 1] under crops (in order) and a mirror; points outside become invisible."""
    points = Keypoints(xy[None].float(), visible[None])
    for window in windows:
        if window != WHOLE:
            points = points.crop(torch.tensor([window]), None)
    points = points.hflip(flip_pairs) if flip else points
    return points.xy[0], points.visible[0]


def _scaled(pixels: Tensor, height: int, width: int) -> Tensor:
    if pixels.shape[-2:] == (height, width):
        return pixels
    return F.interpolate(pixels[None], size=(height, width), mode="bilinear", antialias=True, align_corners=False)[0]
