"""One video file through PyAV: opening it safely, its decoded frames, and where its frames are without decoding.

`video.py` reads clips of every kind with it; `_containers.py` says from the bytes what a file is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from condgen.data._containers import missing_bytes
from condgen.data.decode import MAX_PIXELS
from condgen.errors import DataError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

MAX_FRAMES = 1_000_000  # of one clip; ten hours at 25 a second
# one packet, one frame, and pts in every packet: what an index made without decoding needs
INDEXED = frozenset({"h264", "hevc", "vp9", "av1", "ffv1", "mjpeg", "png", "apng", "rawvideo", "huffyuv", "utvideo"})
TIMED = INDEXED | {"gif"}  # one packet, one frame, but no keyframe to start from
INDEX_MEMORY = 4_000_000  # frame times kept in memory, of all clips


class Opened:
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
            check_size(coder.width, coder.height, self.max_pixels)
            # one thread: loader processes are the parallel part, and damaged frames are reported where they are
            stream.thread_type, coder.thread_count = "NONE", 1
            return cast("InputContainer", self.container), stream
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self.container.close()
        self.file.close()


def check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels or min(width, height) < 1:
        raise DataError(f"the header says {width} x {height} pixels; at most {max_pixels} are decoded")


def decoded(
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
        check_size(frame.width, frame.height, max_pixels)
        count += 1
        yield frame


def to_pixels(frame: VideoFrame) -> Tensor:
    """uint8 (3, H, W), turned as the file asks, transparency on white."""
    # threads=1: by default FFmpeg starts a pool of threads for every frame, which takes longer than the frame
    if any(c.is_alpha for c in frame.format.components) or frame.format.has_palette:
        rgba = frame.to_ndarray(format="rgba", threads=1).astype(np.uint16)
        alpha = rgba[..., 3:]
        rgb: np.ndarray = ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    else:
        rgb = cast(np.ndarray, frame.to_ndarray(format="rgb24", threads=1))
    if frame.rotation:
        rgb = np.rot90(rgb, round(frame.rotation / 90))
    return torch.from_numpy(np.ascontiguousarray(rgb.transpose(2, 0, 1)))


def refuse_short(path: Path | str, kind: str, max_pixels: int) -> None:
    """Raises DataError for a file that ends before its own structure does, with the number of frames in it."""
    with Path(path).open("rb") as file:
        missing = missing_bytes(file, kind)
    if not missing:
        return
    count = 0
    try:
        with Opened(path, kind, max_pixels) as (container, stream):
            for _ in decoded(container, stream, max_pixels):
                count += 1
    except Exception:  # this is the count up to wherever it breaks; the reason is known
        pass
    raise DataError(f"cut short: the end of the file is missing; {count} frames can be read")


def edited(path: Path | str, kind: str) -> bool:
    """Whether an edit list hides some of the frames, so that fewer are shown than stored."""
    with Opened(path, kind, MAX_PIXELS) as (container, stream):
        return any(packet.is_discard for packet in container.demux(stream))


# where frames are


class Index:
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


_indices: OrderedDict[tuple[str, int, int], Index | None] = OrderedDict()


def index_of(path: Path | str, kind: str, max_pixels: int) -> Index | None:
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


def _make_index(path: Path | str, kind: str, max_pixels: int) -> Index | None:
    shown: list[int] = []
    keys: list[int] = []
    with Opened(path, kind, max_pixels) as (container, stream):
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
    return Index(times, starts, base)
