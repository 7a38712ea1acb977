"""What a clip's file is, read from its own bytes: the container, and whether its end is there.

Suffixes are not believed. FFmpeg decides by content too, and its list of formats holds playlists that make it open
other files and URLs; so the content is named here, and FFmpeg gets the one demuxer that was found.
"""

from __future__ import annotations

import os
import struct
from typing import BinaryIO

from condgen.errors import DataError

HEAD = 4096  # bytes that are enough to know a container
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp", b"moof")
EBML, SEGMENT = 0x1A45DFA3, 0x18538067
PLAYLISTS = {
    b"#EXTM3U": "an HLS playlist",
    b"ffconcat": "a list of files to join",
    b"[playlist]": "a playlist",
    b"<?xml": "an XML document",
    b"<MPD": "a DASH playlist",
    b"v=0": "a session description",
    b"[Reference]": "a playlist",
    b"http": "a list of addresses",
    b"file ": "a list of files to join",
    b"file:": "a list of files",
}
ACCEPTED = "mp4, mov, webm, mkv, avi, gif, apng, a JPEG, PNG or WEBP of stacked frames, .npy"


def container_of(head: bytes) -> str:
    """ "mov", "matroska", "avi", "gif", "apng" (FFmpeg's names), "picture" or "npy". Raises DataError."""
    if head[:3] == b"\xff\xd8\xff" or (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
        return "picture"
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return "apng" if b"acTL" in head.split(b"IDAT")[0] else "picture"
    if head[:6] == b"\x93NUMPY":
        return "npy"
    if head[4:8] in MP4_BOXES:
        return "mov"
    if head[:4] == EBML.to_bytes(4, "big"):
        return "matroska"
    if head[:4] == b"RIFF" and head[8:11] == b"AVI":
        return "avi"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:16].lower()
    for magic, what in PLAYLISTS.items():
        if start.startswith(magic.lower()):
            raise DataError(f"it is {what}; a file that names other files or addresses is never opened")
    raise DataError(f"its content is none of {ACCEPTED}")


def missing_bytes(file: BinaryIO, kind: str) -> int:
    """How many bytes the file is shorter than its own structure says; 0 where it is whole or does not say."""
    size = file.seek(0, os.SEEK_END)
    end = {"mov": _mp4_end, "matroska": _matroska_end, "avi": _avi_end, "gif": _gif_end}.get(kind)
    return max(0, end(file, size) - size) if end is not None else 0


def _mp4_end(file: BinaryIO, size: int) -> int:
    """Where the last top-level box ends."""
    at = 0
    while at + 8 <= size:
        file.seek(at)
        length = struct.unpack(">I", file.read(8)[:4])[0]
        if length == 1:
            wide = file.read(8)
            length = struct.unpack(">Q", wide)[0] if len(wide) == 8 else 16
        if length == 0:  # to the end of the file, wherever that is
            return size
        if length < 8:
            return at
        at += length
    return at


def _matroska_end(file: BinaryIO, size: int) -> int:
    file.seek(0)
    head = file.read(HEAD)
    at = 4
    length, used = _ebml_size(head, at)
    at += used + length
    if length < 0 or head[at : at + 4] != SEGMENT.to_bytes(4, "big"):
        return 0
    length, used = _ebml_size(head, at + 4)
    return at + 4 + used + length if length >= 0 else 0


def _ebml_size(data: bytes, at: int) -> tuple[int, int]:
    """(value, bytes it takes) of a variable-length integer; -1 = unknown, as live streams write."""
    if at >= len(data) or data[at] == 0:
        return -1, 1
    width = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + width], "big") & ((1 << 7 * width) - 1)
    return (-1 if value == (1 << 7 * width) - 1 else value), width


def _avi_end(file: BinaryIO, size: int) -> int:
    """Where the last RIFF list ends; OpenDML files hold several."""
    at = 0
    while at + 12 <= size:
        file.seek(at)
        name, length = struct.unpack("<4sI", file.read(8))
        if name != b"RIFF" or length == 0:  # 0: the writer never came back to fill it in
            break
        at += 8 + length + length % 2
    return at if at <= size + 1 else at - (at % 2)


def _gif_end(file: BinaryIO, size: int) -> int:
    """Size when the trailer is reached; one byte more when the blocks end before it."""
    file.seek(0)
    head = file.read(13)
    if len(head) < 13:
        return size + 1
    at = 13 + _table(head[10])
    while at < size:
        file.seek(at)
        block = file.read(10)
        if block[:1] == b"\x3b":
            return size
        if block[:1] == b"\x21":
            at += 2
        elif block[:1] == b"\x2c" and len(block) == 10:
            at += 11 + _table(block[9])
        else:
            return size + 1
        while at < size:  # sub-blocks, ended by an empty one
            file.seek(at)
            length = file.read(1)[0]
            at += 1 + length
            if length == 0:
                break
    return size + 1


def _table(flags: int) -> int:
    """Bytes of a colour table."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0
