"""Actions and states beside clips: NAME.actions.npy, (frames of the file, A); of an array of N clips (T, N, A)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from condgen.errors import DataError

SUFFIX = ".actions.npy"


def beside(clip: Path) -> Path:
    """The file of the actions of a clip file, or of a folder of frames."""
    return clip.with_name((clip.name if clip.is_dir() else clip.stem) + SUFFIX)


def width_of(clips: Sequence[Path]) -> int:
    """A, by the first clip whose actions can be read. Raises DataError where none can."""
    reasons = []
    for clip in clips[:32]:
        try:
            return int(_opened(beside(clip)).shape[-1])
        except DataError as error:
            reasons.append(str(error))
    raise DataError(f"data.actions needs NAME{SUFFIX} beside each clip: {reasons[0] if reasons else 'no clips'}")


def read_actions(clip: Path, number: int, picks: Sequence[int], *, frames: int, width: int) -> Tensor:
    """float32 (len(picks), A) of these frames. Raises DataError for a file that does not fit its clip."""
    file, held = beside(clip), _of_clip(clip, number)
    if held.shape != (frames, width):
        raise DataError(f"{file.name} has shape {held.shape}; its clip needs ({frames}, {width}): a row for each frame")
    taken = np.ascontiguousarray(held[list(picks)], dtype=np.float32)
    if not np.isfinite(taken).all():
        raise DataError(f"{file.name} holds NaN or inf")
    return torch.from_numpy(taken)


def rows_of(clip: Path, number: int, start: int, count: int) -> np.ndarray | None:
    """(count, A) from frame `start` on, as they lie in the file; None where there is none. Raises DataError."""
    if not beside(clip).exists():
        return None
    held = _of_clip(clip, number)
    if start + count > len(held):
        raise DataError(f"{beside(clip).name} has {len(held)} rows; its clip has {start + count} frames or more")
    return np.array(held[start : start + count])


def _of_clip(clip: Path, number: int) -> np.ndarray:
    """(frames, A) of one clip of the file."""
    file = beside(clip)
    held = _opened(file)
    if held.ndim == 2:
        return held
    if number >= held.shape[1]:
        raise DataError(f"{file.name} has actions of {held.shape[1]} clips; there is a clip number {number}")
    return held[:, number]


def _opened(file: Path) -> np.ndarray:
    try:
        held = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"there is no {file.name}") from None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file.name} cannot be read: {error}") from None
    if not isinstance(held, np.ndarray) or held.ndim not in (2, 3) or held.dtype.kind not in "fiub":
        raise DataError(f"{file.name} is no array of numbers (frames, A)")
    return held
