"""Clips that are no videos: folders of frames, arrays, and frames below each other in one picture."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from condgen.data.decode import SUFFIXES, decode_image, read_header
from condgen.errors import DataError
from condgen.pixels import pixels_to_uint8


def natural(name: str) -> list[tuple[int, int | str]]:
    """Sorting key: numbers inside names count as numbers."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"([0-9]+)", name) if part]


def pictures(folder: Path) -> list[Path]:
    names = [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
    if not names:
        raise DataError(f"the folder holds no picture ({', '.join(SUFFIXES)})")
    return sorted(names, key=lambda p: natural(p.name))


def folder_frames(files: list[Path], wanted: Sequence[int], max_pixels: int) -> Iterator[Tensor]:
    shape: torch.Size | None = None
    for path in (files[number] for number in _below(wanted, len(files))):
        try:
            frame = pixels_to_uint8(decode_image(path, channels=3, max_pixels=max_pixels))
        except DataError as error:
            raise DataError(f"frame {path.name}: {error}") from error
        shape = shape or frame.shape
        if frame.shape != shape:
            raise DataError(f"frame {path.name} has size {_size(frame.shape)}, the first one {_size(shape)}")
        yield frame


def _below(wanted: Sequence[int], count: int) -> Iterator[int]:
    return takewhile(lambda number: number < count, wanted)


def _size(shape: torch.Size) -> str:
    return f"{shape[-1]} x {shape[-2]}"


def array(path: Path | str) -> np.ndarray:
    """(N, T, H, W) or (N, T, H, W, 3), mapped and not read."""
    found = np.load(path, mmap_mode="r", allow_pickle=False)
    if found.dtype != np.uint8 or found.ndim not in (3, 4) or 0 in found.shape:
        raise DataError(f"the array is {found.dtype} {found.shape}; give uint8 (T, H, W), (T, H, W, 3) or (T, N, H, W)")
    if found.ndim == 4 and found.shape[3] != 3:
        return found.transpose(1, 0, 2, 3)
    return found[None]


def array_frames(clips: np.ndarray, wanted: Sequence[int], clip: int) -> Iterator[Tensor]:
    if not 0 <= clip < len(clips):
        raise DataError(f"it has clips 0..{len(clips) - 1}, not {clip}")
    for at in _below(wanted, clips.shape[1]):
        frame = torch.from_numpy(np.array(clips[clip, at]))
        yield frame.expand(3, -1, -1).contiguous() if frame.dim() == 2 else frame.permute(2, 0, 1).contiguous()


def stacked(width: int, height: int) -> int:
    if height % width:
        raise DataError(
            f"a picture of {width} x {height} pixels is not a column of square frames; "
            "for a folder of frames name the folder"
        )
    return height // width


def stacked_frames(path: Path | str, wanted: Sequence[int], max_pixels: int) -> Iterator[Tensor]:
    header = read_header(path, max_pixels=max_pixels)
    count = stacked(header.width, header.height)
    column = pixels_to_uint8(decode_image(path, channels=3, max_pixels=max_pixels))
    side = column.shape[-1]
    for at in _below(wanted, count):
        yield column[:, at * side : (at + 1) * side].contiguous()
