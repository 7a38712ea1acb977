"""Reading members of archives that others made, without ever extracting them.

Python's own tar reader ends quietly at a damaged header, so half a shard would go missing without a word.
This one says so. Nothing is written to disk: links, devices, names that leave the folder and members that claim
absurd sizes are reported and skipped.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Self

from condgen.errors import DataError

MAX_MEMBER_BYTES = 64 * 2**20  # one picture or caption file; a header may claim any size


@dataclass(frozen=True)
class Member:
    """A regular file of an archive: its name (forward slashes) and bytes (empty when only names were asked for)."""

    name: str
    data: bytes


@dataclass(frozen=True)
class Damaged:
    """A member that was refused, or the place where an archive stops being readable, and why."""

    name: str
    reason: str


def check_name(name: str) -> str:
    """`name` if it is relative and stays inside its folder. DataError for `..`, absolute paths, drives and NUL."""
    path = PurePosixPath(name.replace("\\", "/"))
    drive = len(name) > 1 and name[1] == ":"
    if not name or "\0" in name or path.is_absolute() or drive or ".." in path.parts:
        raise DataError(f"the name {name[:80]!r} leaves its folder; names must be relative and without '..'")
    return name


class _Strict(tarfile.TarInfo):
    """Headers that are neither valid nor the end marker raise DataError, where tarfile would just stop."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise  # the end marker
            raise DataError(f"the archive breaks off or is damaged ({error}); the rows after this are lost") from error


def tar_members(path: Path, *, max_bytes: int = MAX_MEMBER_BYTES, read: bool = True) -> Iterator[Member | Damaged]:
    """The regular files of an uncompressed tar in their order, and what was wrong with the rest.

    With read=False only headers are read and `data` is empty. After damage that hides where the next member
    starts, one last `Damaged` is yielded. Raises DataError when the file is missing or is not a plain tar.
    """
    try:
        source = path.open("rb")
    except OSError as error:
        raise DataError(f"cannot open {path.name} ({error.strerror}); check that it is there and readable") from error
    with source:
        try:
            archive = tarfile.open(fileobj=source, mode="r:", tarinfo=_Strict)  # noqa: SIM115 - closes with source
        except (tarfile.TarError, DataError, ValueError, OverflowError) as error:
            raise DataError(
                f"{path.name} is not an uncompressed tar ({error}); unpack .tar.gz shards with gunzip: "
                "the pictures inside are compressed already"
            ) from error
        name = path.name
        try:
            while (header := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header; a stream must not grow
                name = header.name
                if header.isdir():
                    continue
                reason = _refused(header, max_bytes)
                if reason:
                    yield Damaged(name, reason)
                    continue
                data = b""
                if read:
                    opened = archive.extractfile(header)
                    data = opened.read() if opened is not None else b""
                    if len(data) != header.size:  # a seekable archive that ends early gives fewer bytes
                        raise DataError(f"the archive breaks off after {len(data)} of {header.size} bytes")
                yield Member(name, data)
        except (tarfile.TarError, DataError, OSError, ValueError, OverflowError) as error:
            yield Damaged(name, str(error))


def _refused(header: tarfile.TarInfo, max_bytes: int) -> str:
    """Why this member must not be used, or ""."""
    try:
        check_name(header.name)
    except DataError as error:
        return str(error)
    if not header.isreg() or header.issparse():
        return "is not a plain file (a link, a device or a sparse file)"
    if header.size > max_bytes:
        return f"claims {header.size} bytes; at most {max_bytes} are read"
    return ""
