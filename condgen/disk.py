"""Writing that survives a crash: every byte is on the disk before a name points at it."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from condgen.errors import CondgenError

logger = logging.getLogger(__name__)

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors that mean "no room": device full, quota, file size limit."""


def write_file(path: Path, data: bytes) -> None:
    """Writes a new file and forces it to the disk. The mode follows the umask; an existing path is an error."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Forces the names in a folder to the disk; without it a rename can be lost in a power cut."""
    if os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: Path, data: bytes) -> None:
    """Replaces a file in one step: readers see the old bytes or the new ones, never a part.

    Refuses a path that is a link, a folder or a device, so nothing outside the folder can be changed.
    """
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
        raise CondgenError(f"{path} is not a plain file and will not be replaced; remove it or choose another folder")
    temp = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temp.unlink(missing_ok=True)
    try:
        write_file(temp, data)
        os.replace(temp, path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def is_alive(pid: int) -> bool:
    """Whether a process with this number runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def to_json(value: Any, *, indent: int | None = None) -> bytes:
    """JSON bytes of plain values. Floats come back exactly; nan and inf, which JSON lacks, are {"$float": "nan"}.

    Raises ValueError that names the place of anything that is not None, bool, int, float, str, list or dict.
    """
    plain = _plain(value, "")
    text = json.dumps(plain, allow_nan=False, ensure_ascii=False, indent=indent)
    return (text + "\n").encode("utf-8", errors="strict")


def from_json(data: bytes) -> Any:
    """The inverse of `to_json`, except that tuples come back as lists. Raises ValueError."""

    def number(found: dict[str, Any]) -> Any:
        return float(found["$float"]) if set(found) == {"$float"} else found

    return json.loads(data.decode("utf-8"), object_hook=number, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | str) or type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"the key {key!r} at {where or 'the top'} is not text; write it as a string")
        return {key: _plain(item, f"{where}.{key}" if where else key) for key, item in value.items()}
    raise ValueError(
        f"{where or 'the value'} is a {type(value).__name__}; allowed are None, bool, int, float, str, list and dict"
    )


class Appender:
    """Appends whole lines to a text file, each handed to the system at once.

    A full disk must not end a training: the first failure warns, later ones are counted in `lost`.
    """

    def __init__(self, path: Path, warn: Callable[[str], None] = logger.warning) -> None:
        self.path, self.lost = path, 0
        self._warn = warn
        self._torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")

    def line(self, text: str) -> bool:
        """Appends one line; False if it could not be written."""
        data = (text + "\n").encode("utf-8", errors="replace")
        if self._torn:  # an earlier write stopped half way; do not glue this line to its remains
            data = b"\n" + data
        try:
            with open(self.path, "ab", buffering=0) as file:
                written = file.write(data)
                if written != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._torn = True
            if not self.lost:
                self._warn(f"cannot write {self.path.name} ({error.strerror}); the run goes on without its new lines")
            self.lost += 1
            return False
        self._torn = False
        return True
