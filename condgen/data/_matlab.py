"""MATLAB files, read by scipy: an optional package that only the data sets published in this form need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from condgen.errors import DataError


def read_variable(path: Path, key: str, *, instead: str = "", **options: Any) -> Any:
    """The variable `key` of a .mat file (up to version 7). Raises DataError without scipy and for anything unreadable.

    instead   what can be done without scipy, for the message
    options   of scipy.io.loadmat
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError(
            f"{path.name} is a MATLAB file and reading it needs the package scipy: pip install scipy{instead}"
        ) from error
    try:
        return loadmat(str(path), variable_names=[key], **options)[key]
    except Exception as error:  # scipy raises many kinds for damaged files, among them TypeError and zlib.error
        raise DataError(f"{path.name} cannot be read as a MATLAB file with {key!r} ({error!r})") from error
