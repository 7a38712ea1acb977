"""Clips of samples as files that play everywhere, and grids of clips with the condition beside them.

    .mp4     H.264, yuv420p; odd sizes repeat their last row or column. lossless: RGB, exact, not for every player
    .webm    VP9; lossless: RGB, exact
    .gif     at most 256 colours, loops for ever; times are whole hundredths of a second
    .avi     FFV1, exact
    folder   no suffix: PNG files 000000.png, 000001.png, ..., exact

The file appears whole or not at all. Nothing is written beside pixels but the title and the comment that are given.
"""

from __future__ import annotations

import io
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from condgen.disk import replace_file, sync_folder
from condgen.errors import CondgenError, ConfigError, ShapeError
from condgen.pixels import pixels_to_uint8
from condgen.show.drawing import draw_grid
from condgen.show.pictures import MIN_TILE, to_rgb
from condgen.types import Condition

SUFFIXES = (".mp4", ".webm", ".gif", ".avi")
# suffix -> (container, encoder, pixel format, options), for looking at and without loss
CODECS: dict[tuple[str, bool], tuple[str, str, str, dict[str, str]]] = {
    (".mp4", False): ("mp4", "libx264", "yuv420p", {"crf": "16", "preset": "medium"}),
    (".mp4", True): ("mp4", "libx264rgb", "rgb24", {"qp": "0", "preset": "medium"}),
    (".webm", False): ("webm", "libvpx-vp9", "yuv420p", {"crf": "20", "b": "0", "deadline": "good", "cpu-used": "4"}),
    (".webm", True): ("webm", "libvpx-vp9", "gbrp", {"lossless": "1", "deadline": "good", "cpu-used": "4"}),
    (".avi", False): ("avi", "ffv1", "bgr0", {"level": "3", "slicecrc": "1"}),
    (".avi", True): ("avi", "ffv1", "bgr0", {"level": "3", "slicecrc": "1"}),
}
BT601 = 6  # SMPTE 170M, the number of FFmpeg's colour tables; players assume it for small pictures
TALLEST_JPEG = 65_500
PALETTE_PIXELS = 1 << 20  # looked at to choose the 256 colours of a GIF


def write_clip(
    path: Path | str,
    frames: Iterable[Tensor],
    *,
    fps: float = 8,
    lossless: bool = False,
    title: str = "",
    comment: str = "",
) -> Path:
    """Writes frames, each (C, H, W) of one size, float in [-1, 1] or uint8, C = 1, 3 or 4; see the head of the file.

    fps       frames per second, above 0 and at most 240 (a GIF: at most 50, which is what players show)
    lossless  every pixel comes back; a GIF cannot
    title, comment   kept in the file, such as the prompt and the licence line of the data

    Replaces a file of that name, never a folder. Raises ConfigError (suffix, fps, no frames) and ShapeError.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix and suffix not in SUFFIXES:
        raise ConfigError(f"{path.name}: clips are written as {', '.join(SUFFIXES)}, or as a folder of PNG: no suffix")
    fastest = 50 if suffix == ".gif" else 240
    if not (isinstance(fps, int | float) and 0 < fps <= fastest):
        raise ConfigError(f"fps={fps!r}; give a number above 0 and at most {fastest} for {suffix or 'a folder'}")
    if lossless and suffix == ".gif":
        raise ConfigError(f"{path.name}: a GIF holds 256 colours; for every pixel use .avi, .mp4, .webm or a folder")
    arrays = _arrays(frames)
    first = next(arrays, None)
    if first is None:
        raise ConfigError(f"{path.name}: there are no frames to write")
    taken = os.path.lexists(path) and (not suffix or path.is_symlink() or not path.is_file())
    if taken:
        raise CondgenError(f"{path} exists and will not be replaced; remove it or choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    notes = {name: text for name, text in (("title", title), ("comment", comment)) if text}
    _remove(temp)
    try:
        pictures = chain([first], arrays)
        if not suffix:
            _write_folder(temp, pictures, notes)
        elif suffix == ".gif":
            _write_gif(temp, list(pictures), fps, "\n".join(notes.values()))
        else:
            _write_video(temp, pictures, fps, CODECS[suffix, lossless], notes)
        for file in [temp] if suffix else sorted(temp.iterdir()):
            _sync(file)
        os.replace(temp, path)
    except BaseException:
        _remove(temp)
        raise
    sync_folder(path.parent)
    return path


def write_column(path: Path, frames: Sequence[Tensor], *, quality: int = 95) -> Path:
    """Square frames below each other in one JPEG, as VGAN's data were published: data=clips reads it back.

    Replaces a file of that name. Raises ConfigError for fewer than two frames, frames that are not square, and more
    than a JPEG can be high.
    """
    arrays = list(_arrays(frames))
    if len(arrays) < 2 or arrays[0].shape[0] != arrays[0].shape[1]:
        raise ConfigError(f"{path.name}: a column needs two square frames or more; got {len(arrays)}")
    height = len(arrays) * arrays[0].shape[0]
    if height > TALLEST_JPEG:
        raise ConfigError(f"{path.name}: {height} pixels is above the {TALLEST_JPEG} of a JPEG; write fewer frames")
    data = io.BytesIO()
    Image.fromarray(np.concatenate(arrays)).save(data, "JPEG", quality=quality)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, data.getvalue())
    return path


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _arrays(frames: Iterable[Tensor]) -> Iterator[np.ndarray]:
    """uint8 (H, W, 3), all of one size."""
    shape: tuple[int, ...] | None = None
    for number, frame in enumerate(frames):
        if frame.dim() != 3 or frame.shape[0] not in (1, 3, 4) or 0 in frame.shape:
            raise ShapeError(f"frame {number} has shape {tuple(frame.shape)}; give (C, H, W) with C = 1, 3 or 4")
        array = np.asarray(to_rgb(pixels_to_uint8(frame.detach().cpu())))
        shape = shape or array.shape
        if array.shape != shape:
            raise ShapeError(f"frame {number} has {array.shape[:2]} (H, W) pixels, frame 0 has {shape[:2]}")
        yield array


def _write_folder(folder: Path, pictures: Iterable[np.ndarray], notes: dict[str, str]) -> None:
    folder.mkdir()
    info = PngImagePlugin.PngInfo()
    for name, text in notes.items():
        info.add_itxt(name.capitalize(), text)
    for number, array in enumerate(pictures):
        Image.fromarray(array).save(folder / f"{number:06d}.png", format="PNG", pnginfo=info)


def _write_video(
    path: Path,
    pictures: Iterable[np.ndarray],
    fps: float,
    codec: tuple[str, str, str, dict[str, str]],
    notes: dict[str, str],
) -> None:
    import av

    container_name, encoder, pixel_format, options = codec
    flags = {"fflags": "+bitexact", "movflags": "+faststart"} if container_name == "mp4" else {"fflags": "+bitexact"}
    with av.open(str(path), "w", format=container_name, options=flags) as container:
        container.metadata.update(notes)
        rate = Fraction(fps).limit_denominator(1001)
        stream: Any = None
        for number, array in enumerate(pictures):
            if pixel_format == "yuv420p":  # chroma has half the size, so sizes must be even
                array = np.pad(array, ((0, array.shape[0] % 2), (0, array.shape[1] % 2), (0, 0)), "edge")
            if stream is None:
                stream = container.add_stream(encoder, rate=rate, options=options)
                stream.height, stream.width = array.shape[:2]
                stream.pix_fmt = pixel_format
                # one thread: with more, the bytes depend on the machine
                stream.codec_context.thread_count = 1
                if pixel_format == "yuv420p":
                    stream.codec_context.colorspace, stream.codec_context.color_range = BT601, 1
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            if pixel_format == "yuv420p":
                frame = frame.reformat(format=pixel_format, dst_colorspace="ITU601", dst_color_range="MPEG", threads=1)
            elif pixel_format != "rgb24":
                frame = frame.reformat(format=pixel_format, threads=1)
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _write_gif(path: Path, pictures: Sequence[np.ndarray], fps: float, comment: str) -> None:
    """One palette for the whole clip, so that still parts stay still."""
    import av

    every = math.ceil(len(pictures) * pictures[0].shape[0] * pictures[0].shape[1] / PALETTE_PIXELS)
    looked_at = np.concatenate([p.reshape(-1, 3)[i % every :: every] for i, p in enumerate(pictures)])
    palette = Image.fromarray(looked_at[None]).quantize(256, Image.Quantize.MEDIANCUT)
    colours = np.zeros((256, 4), np.uint8)
    given = np.array(palette.getpalette() or [], np.uint8).reshape(-1, 3)
    colours[: len(given), 1:], colours[:, 0] = given[:256], 255  # A, R, G, B
    ticks = Fraction(1, 100)
    ends = [round(number * 100 / fps) for number in range(len(pictures) + 1)]  # hundredths of a second
    flags = {"loop": "0", "final_delay": str(ends[-1] - ends[-2]), "fflags": "+bitexact"}
    with av.open(str(path), "w", format="gif", options=flags) as container:
        stream: Any = container.add_stream("gif", rate=Fraction(100))
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "pal8"
        for number, array in enumerate(pictures):
            numbers = Image.fromarray(array).quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
            both: Any = (np.asarray(numbers), colours)  # PyAV's annotation does not know the pair that pal8 needs
            frame = av.VideoFrame.from_ndarray(both, format="pal8")
            frame.pts, frame.time_base = ends[number], ticks
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if comment:
        _comment_gif(path, comment)


def _comment_gif(path: Path, comment: str) -> None:
    """Adds a comment block behind the global colour table, which FFmpeg does not write."""
    data = path.read_bytes()
    at = 13 + (3 << ((data[10] & 7) + 1) if data[10] & 0x80 else 0)
    text = comment.encode("utf-8")
    blocks = b"".join(bytes([len(part)]) + part for part in (text[i : i + 255] for i in range(0, len(text), 255)))
    path.write_bytes(data[:at] + b"\x21\xfe" + blocks + b"\x00" + data[at:])


# grids


def grid_clip(
    clips: Tensor,
    conditions: Condition | None = None,
    *,
    real: Tensor | None = None,
    label_names: Sequence[str] = (),
    title: str = "",
    column_names: Sequence[str] = (),
    attribution: str = "",
    tile: int = MIN_TILE,
) -> Iterator[Tensor]:
    """Frames of a grid of clips, uint8 (3, H, W): rows are conditions, drawn on the left; columns are samples.

    clips   (rows, columns, T, C, H, W) or (rows, T, C, H, W)
    real    (rows, T, C, H, W) of the data set, in a column of its own

    Past frames of the condition are played before the samples: the columns of samples hold the condition's frames
    then, and the title says so, so that a join that jumps is seen.
    """
    if clips.dim() == 5:
        clips = clips[:, None]
    if clips.dim() != 6 or not clips.numel():
        raise ShapeError(f"clips have shape (rows, columns, T, C, H, W); got {tuple(clips.shape)}")
    past = conditions.frames.pixels if conditions is not None and conditions.frames is not None else clips[:, 0, :0]
    before = past.shape[1] if past.shape[2:] == clips.shape[3:] else 0
    for t in range(-before, clips.shape[2]):
        now = clips[:, :, t] if t >= 0 else _as(past[:, t], clips)[:, None].expand(-1, clips.shape[1], -1, -1, -1)
        truth = None
        if real is not None:
            truth = real[:, min(t, real.shape[1] - 1)] if t >= 0 else _as(past[:, t], real)
        head = f"t = {t}, given" if t < 0 else f"t = {t}"
        page = draw_grid(
            now,
            conditions,
            real=truth,
            label_names=label_names,
            title=f"{title}   {head}" if title else head,
            column_names=column_names,
            attribution=attribution,
            tile=tile,
        )
        yield torch.from_numpy(np.array(page)).permute(2, 0, 1).contiguous()


def _as(pixels: Tensor, model: Tensor) -> Tensor:
    """The same pixels in the model's convention, uint8 or float."""
    if model.dtype == torch.uint8:
        return pixels_to_uint8(pixels)
    return pixels.float().mul(2 / 255).sub(1) if pixels.dtype == torch.uint8 else pixels
