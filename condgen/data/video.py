"""Clips -> frames: the one place of condgen that opens videos.

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
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from condgen.data._containers import HEAD, container_of, missing_bytes
from condgen.data._stills import array, array_frames, folder_frames, pictures, stacked, stacked_frames
from condgen.data.decode import MAX_PIXELS, read_header
from condgen.errors import ConfigError, DataError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

MAX_FRAMES = 1_000_000  # of one clip; ten hours at 25 a second
CLIP_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif", ".apng", ".npy")
# one packet, one frame, and pts in every packet: what an index made without decoding needs
INDEXED = frozenset({"h264", "hevc", "vp9", "av1", "ffv1", "mjpeg", "png", "apng", "rawvideo", "huffyuv", "utvideo"})
TIMED = INDEXED | {"gif"}  # one packet, one frame, but no keyframe to start from
INDEX_MEMORY = 4_000_000  # frame times kept in memory, of all clips


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
        _refuse_short(path, kind, max_pixels)
        with _Opened(path, kind, max_pixels) as (container, stream):
            first = next(_decoded(container, stream, max_pixels), None)
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
        found = _index(path, kind, MAX_PIXELS)
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


# containers


class _Opened:
    """The container and its first video stream, after the checks that need no decoding."""

    def __init__(self, path: Path | str, kind: str, max_pixels: int) -> None:
        self.path, self.kind, self.max_pixels = Path(path), kind, max_pixels

    def __enter__(self) -> tuple[InputContainer, VideoStream]:
        import av

        self.file = self.path.open("rb")
        try:
            # a file object, so FFmpeg opens nothing by name; the demuxer is given, so it does not guess a playlist
            self.container = av.open(
                self.file,
                format=self.kind,
                options={"protocol_whitelist": "file", "max_pixels": str(self.max_pixels)},
                buffer_size=1 << 18,
                metadata_errors="replace",
            )
        except BaseException:
            self.file.close()
            raise
        try:
            if not self.container.streams.video:
                raise DataError("there is no video stream in it")
            stream = self.container.streams.video[0]
            coder = stream.codec_context
            if coder.width < 1 or coder.height < 1:  # also what FFmpeg makes of a size above its limit
                raise DataError(f"it has no size that can be decoded (at most {self.max_pixels} pixels)")
            _check_size(coder.width, coder.height, self.max_pixels)
            # one thread: loader processes are the parallel part, and damaged frames are reported where they are
            stream.thread_type, coder.thread_count = "NONE", 1
            return cast("InputContainer", self.container), stream
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self.container.close()
        self.file.close()


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels or min(width, height) < 1:
        raise DataError(f"the header says {width} x {height} pixels; at most {max_pixels} are decoded")


def _decoded(
    container: InputContainer, stream: VideoStream, max_pixels: int, since: int | None = None
) -> Iterator[VideoFrame]:
    """Frames in the order they are shown, those before `since` (pts) left out.

    Raises DataError with the number read before the damage.
    """
    import av

    count = 0
    frames = container.decode(stream)
    while True:
        try:
            frame = next(frames, None)
        except (av.error.FFmpegError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise DataError(f"damaged after {count} frames ({reason})") from error
        if frame is None:
            return
        # after a seek come frames that are shown before the keyframe and refer to what was not decoded
        if since is not None and (frame.pts is None or frame.pts < since):
            continue
        if frame.is_corrupt:
            raise DataError(f"damaged after {count} frames (the decoder had to guess frame {count})")
        _check_size(frame.width, frame.height, max_pixels)
        count += 1
        yield frame


def _video_frames(path: Path | str, kind: str, wanted: Sequence[int], max_pixels: int) -> Iterator[Tensor]:
    _refuse_short(path, kind, max_pixels)
    index = _index(path, kind, max_pixels) if wanted[0] > 0 else None
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
    with _Opened(path, kind, max_pixels) as (container, stream):
        frames = _decoded(container, stream, max_pixels)
        count = yield from _chosen(frames, 0, wanted)
        if count < min(wanted[-1] + 1, stream.frames) and not _edited(path, kind):
            raise DataError(f"cut short: {count} of {stream.frames} frames can be read")


def _chosen(frames: Iterator[VideoFrame], number: int, wanted: Sequence[int]) -> Generator[Tensor, None, int]:
    """Pixels of the wanted frames, where `frames` begins with frame `number`; returns the frames read up to there."""
    rest = iter(wanted)
    target = next(rest)
    for frame in frames:
        if number == target:
            yield _pixels(frame)
            target = next(rest, -1)
        number += 1
        if target < 0:
            break
    return number


def _from_key(
    path: Path | str, kind: str, wanted: Sequence[int], max_pixels: int, key: int, target: int
) -> Iterator[Tensor]:
    """Frames from the one shown at `target` (pts) on, decoded from the keyframe at `key`; none if it never comes."""
    with _Opened(path, kind, max_pixels) as (container, stream):
        container.seek(key, stream=stream, backward=True, any_frame=False)
        frames = _decoded(container, stream, max_pixels, since=key)
        first = next((frame for frame in frames if frame.pts is None or frame.pts >= target), None)
        if first is not None and first.pts == target:  # otherwise the decoder left it out
            yield from _chosen(chain([first], frames), wanted[0], wanted)


def _pixels(frame: VideoFrame) -> Tensor:
    """uint8 (3, H, W), turned as the file asks, transparency on white."""
    if any(c.is_alpha for c in frame.format.components) or frame.format.has_palette:
        rgba = frame.to_ndarray(format="rgba").astype(np.uint16)
        alpha = rgba[..., 3:]
        rgb: np.ndarray = ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    else:
        rgb = cast(np.ndarray, frame.to_ndarray(format="rgb24"))
    if frame.rotation:
        rgb = np.rot90(rgb, round(frame.rotation / 90))
    return torch.from_numpy(np.ascontiguousarray(rgb.transpose(2, 0, 1)))


def _refuse_short(path: Path | str, kind: str, max_pixels: int) -> None:
    """Raises DataError for a file that ends before its own structure does, with the number of frames in it."""
    with Path(path).open("rb") as file:
        missing = missing_bytes(file, kind)
    if not missing:
        return
    count = 0
    try:
        with _Opened(path, kind, max_pixels) as (container, stream):
            for _ in _decoded(container, stream, max_pixels):
                count += 1
    except Exception:  # this is the count up to wherever it breaks; the reason is known
        pass
    raise DataError(f"cut short: the end of the file is missing; {count} frames can be read")


def _edited(path: Path | str, kind: str) -> bool:
    """Whether an edit list hides some of the frames, so that fewer are shown than stored."""
    with _Opened(path, kind, MAX_PIXELS) as (container, stream):
        return any(packet.is_discard for packet in container.demux(stream))


# where frames are


class _Index:
    """Times of the frames in the order they are shown, and those of the keyframes, in units of `base` seconds."""

    def __init__(self, shown: np.ndarray, keys: np.ndarray, base: float) -> None:
        self.shown, self.keys, self.base = shown, keys, base

    def times(self) -> np.ndarray:
        return self.shown * self.base

    def before(self, frame: int) -> tuple[int, int] | None:
        """(pts of the last keyframe at or before `frame`, pts of `frame`); None where there is none or no gain."""
        if frame >= len(self.shown):
            return None
        target = self.shown[frame]
        at = int(np.searchsorted(self.keys, target, side="right")) - 1
        return (int(self.keys[at]), int(target)) if at > 0 else None


_indices: OrderedDict[tuple[str, int, int], _Index | None] = OrderedDict()


def _index(path: Path | str, kind: str, max_pixels: int) -> _Index | None:
    """The index of a clip, made by reading its packets once; None where packets and frames need not agree."""
    place = Path(path)
    status = place.stat()
    key = (str(place.absolute()), status.st_size, status.st_mtime_ns)
    if key not in _indices:
        _indices[key] = _make_index(path, kind, max_pixels)
        held = sum(len(i.shown) if i is not None else 1 for i in _indices.values())
        while held > INDEX_MEMORY and len(_indices) > 1:
            _, old = _indices.popitem(last=False)
            held -= len(old.shown) if old is not None else 1
    _indices.move_to_end(key)
    return _indices[key]


def _make_index(path: Path | str, kind: str, max_pixels: int) -> _Index | None:
    shown: list[int] = []
    keys: list[int] = []
    with _Opened(path, kind, max_pixels) as (container, stream):
        codec = stream.codec_context.name
        if codec not in TIMED or not stream.time_base:
            return None
        for packet in container.demux(stream):
            if packet.size == 0 or packet.is_discard:
                continue
            if packet.pts is None or packet.is_corrupt or len(shown) >= MAX_FRAMES:
                return None
            shown.append(packet.pts)
            if packet.is_keyframe and (codec in INDEXED or not keys):
                keys.append(packet.pts)
        base, declared = float(stream.time_base), stream.frames
    if codec == "gif" and 0 < declared < len(shown):  # a comment at the end is a packet without a frame
        del shown[declared:]
    times, starts = np.array(sorted(shown), dtype=np.int64), np.array(sorted(keys), dtype=np.int64)
    # frames that lead the first keyframe may or may not be decoded; equal times cannot be told apart
    if not len(starts) or times[0] < keys[0] or bool((np.diff(times) <= 0).any()):
        return None
    return _Index(times, starts, base)
