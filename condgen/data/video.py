"""Clips -> frames: what reads a clip of any kind; `_demux.py` opens video files, `_stills.py` the other kinds.

What can be read, whatever the file is called:

    mp4, mov, webm, mkv, avi, gif, apng    through PyAV; rotated as the file asks, transparency laid on white
    a folder of pictures                   one frame each, in natural order (2 before 10)
    .npy, uint8                            (T, H, W), (T, H, W, 3), or Moving MNIST's (T, N, H, W): `clip` chooses of N
    a JPEG, PNG or WEBP                    square frames below each other, as VGAN's data were published

Clips are hostile until proved otherwise. A path must be a regular local file; its content chooses the demuxer out of a
short list, so playlists and addresses are refused and nothing that a file names is ever opened. FFmpeg decodes short
files without an error, so their structure is checked and the frames are counted. Flipped bits in a whole file mostly
decode to other pixels, in every codec: only a hash tells, such as sha256 in metadata.jsonl. Every call opens and
closes the file itself: nothing stays open in a loader process, and a forked one inherits nothing.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from condgen.data._containers import HEAD, container_of
from condgen.data._demux import MAX_FRAMES, Opened, decoded, edited, index_of, refuse_short, to_pixels
from condgen.data._stills import array, array_frames, folder_frames, pictures, stacked, stacked_frames
from condgen.data.decode import MAX_PIXELS, read_header
from condgen.errors import ConfigError, DataError

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

CLIP_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif", ".apng", ".npy")


@dataclass(frozen=True)
class ClipInfo:
    """What a clip's header says. Sizes are as shown, after rotation.

    frames   as the container declares; None where it does not. It may be wrong: only reading is proof
    fps      frames per second on average; 0 where there is no time (folders, .npy, stacked frames)
    seconds  None where unknown
    clips    clips in the file; more than 1 only in a Moving MNIST .npy
    """

    frames: int | None
    fps: float
    width: int
    height: int
    seconds: float | None
    clips: int = 1


def probe(path: Path | str, *, max_pixels: int = MAX_PIXELS) -> ClipInfo:
    """Size, rate and length of a clip; one frame is decoded. Raises DataError as `read_frames` does."""
    with _naming(path):
        kind = _kind(path)
        if kind == "folder":
            files = pictures(Path(path))
            head = read_header(files[0], max_pixels=max_pixels)
            return ClipInfo(len(files), 0.0, head.width, head.height, None)
        if kind == "npy":
            held = array(path)
            return ClipInfo(held.shape[1], 0.0, held.shape[3], held.shape[2], None, held.shape[0])
        if kind == "picture":
            head = read_header(path, max_pixels=max_pixels)
            return ClipInfo(stacked(head.width, head.height), 0.0, head.width, head.width, None)
        refuse_short(path, kind, max_pixels)
        with Opened(path, kind, max_pixels) as (container, stream):
            first = next(decoded(container, stream, max_pixels), None)
            if first is None:
                raise DataError("it holds no frame")
            turned = first.rotation % 180 != 0
            size = (first.height, first.width) if turned else (first.width, first.height)
            fps = float(stream.average_rate or stream.guessed_rate or 0)
            seconds = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else None
            if seconds is None and container.duration:
                seconds = container.duration / 1e6
            return ClipInfo(stream.frames or None, fps, *size, seconds)


def read_frames(
    path: Path | str,
    *,
    start: int = 0,
    stop: int | None = None,
    stride: int = 1,
    at: Sequence[int] | None = None,
    clip: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Tensor]:
    """Frames start, start + stride, ... below stop, each uint8 (3, H, W).

    stop   None = to the end. A stop beyond the end is not an error; a clip without frame `start` is
    at     numbers of the frames instead, ascending
    clip   which one of a Moving MNIST .npy

    From start > 0 on, reading begins at the last keyframe before it and gives exactly the frames that reading from
    the beginning gives; where that cannot be known from the packets, it does read from the beginning.
    Raises DataError, naming the file: missing, no regular file, a playlist or an address, no accepted container, no
    video in it, damaged, cut short (with the number of frames that can be read), too large, without frames.
    """
    if start < 0 or stride < 1 or (stop is not None and stop <= start):
        raise ConfigError(f"frames {start}..{stop} by {stride}: start must be >= 0, stop above it and stride >= 1")
    if at is not None and (not at or at[0] < 0 or any(b <= a for a, b in pairwise(at))):
        raise ConfigError(f"at={list(at)[:8]}: give frame numbers >= 0, each above the one before it")
    got = 0
    with _naming(path):
        kind = _kind(path)
        wanted = range(start, MAX_FRAMES if stop is None else min(stop, MAX_FRAMES), stride) if at is None else at
        if kind == "folder":
            frames = folder_frames(pictures(Path(path)), wanted, max_pixels)
        elif kind == "npy":
            frames = array_frames(array(path), wanted, clip)
        elif kind == "picture":
            frames = stacked_frames(path, wanted, max_pixels)
        else:
            frames = _video_frames(path, kind, wanted, max_pixels)
        for frame in frames:
            yield frame
            got += 1
        if not got:
            raise DataError(f"it has no frame {wanted[0]}" if wanted[0] else "it holds no frame")
        if at is None and stop is None and start + got * stride >= MAX_FRAMES:
            raise DataError(f"it has more than {MAX_FRAMES} frames; name a stop")


def frame_times(path: Path | str) -> np.ndarray | None:
    """Seconds at which each frame is shown, float64 ascending, without decoding; None where packets do not tell.

    The numbers are kept in memory for the next call, those of the clips used last.
    """
    with _naming(path):
        kind = _kind(path)
        if kind in ("folder", "npy", "picture"):
            return None
        found = index_of(path, kind, MAX_PIXELS)
        return None if found is None else found.times()


# which reader


def _kind(path: Path | str) -> str:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise DataError("it is an address; only local files are read")
    place = Path(path)
    if place.is_dir():
        return "folder"
    if not place.is_file():  # a device or a pipe has no end
        raise DataError("it is not a regular file" if place.exists() else "the file is missing")
    with place.open("rb") as file:
        head = file.read(HEAD)
    if not head:
        raise DataError("the file is empty")
    return container_of(head)


@contextmanager
def _naming(path: Path | str) -> Iterator[None]:
    """Puts the file's name before every reason; whatever a decoder raises is the file's fault."""
    name = Path(path).name or str(path)
    try:
        yield
    except (ConfigError, GeneratorExit):
        raise
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    except Exception as error:
        # FFmpeg's own words, without the number and the whole path
        reason = str(getattr(error, "strerror", None) or error).split("\n")[0][:200] or type(error).__name__
        raise DataError(f"{name}: it cannot be decoded: {reason}") from error


def _video_frames(path: Path | str, kind: str, wanted: Sequence[int], max_pixels: int) -> Iterator[Tensor]:
    refuse_short(path, kind, max_pixels)
    index = index_of(path, kind, max_pixels) if wanted[0] > 0 else None
    key = index.before(wanted[0]) if index is not None else None
    if key is not None:
        rest = _from_key(path, kind, wanted, max_pixels, *key)
        try:
            first = next(rest, None)
        except DataError:  # damage is told with its place, which a linear read knows
            first = None
        if first is not None:
            yield first
            yield from rest
            return
    with Opened(path, kind, max_pixels) as (container, stream):
        frames = decoded(container, stream, max_pixels)
        count = yield from _chosen(frames, 0, wanted)
        if count < min(wanted[-1] + 1, stream.frames) and not edited(path, kind):
            raise DataError(f"cut short: {count} of {stream.frames} frames can be read")


def _chosen(frames: Iterator[VideoFrame], number: int, wanted: Sequence[int]) -> Generator[Tensor, None, int]:
    """Pixels of the wanted frames, where `frames` begins with frame `number`; returns the frames read up to there."""
    rest = iter(wanted)
    target = next(rest)
    for frame in frames:
        if number == target:
            yield to_pixels(frame)
            target = next(rest, -1)
        number += 1
        if target < 0:
            break
    return number


def _from_key(
    path: Path | str, kind: str, wanted: Sequence[int], max_pixels: int, key: int, target: int
) -> Iterator[Tensor]:
    """Frames from the one shown at `target` (pts) on, decoded from the keyframe at `key`; none if it never comes."""
    with Opened(path, kind, max_pixels) as (container, stream):
        container.seek(key, stream=stream, backward=True, any_frame=False)
        frames = decoded(container, stream, max_pixels, since=key)
        first = next((frame for frame in frames if frame.pts is None or frame.pts >= target), None)
        if first is not None and first.pts == target:  # otherwise the decoder left it out
            yield from _chosen(chain([first], frames), wanted[0], wanted)
