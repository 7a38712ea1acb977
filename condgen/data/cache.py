"""Arrays that are worth keeping between runs: made once, written atomically, memory-mapped afterwards."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np


def cache_folder() -> Path:
    """CONDGEN_CACHE, or ~/.cache/condgen."""
    return Path(os.environ.get("CONDGEN_CACHE") or Path.home() / ".cache" / "condgen")


class CachedArray:
    """A uint8 array of a known shape, read through a memory map so that processes share its pages.

    `make` runs when the file is missing, cut short or of another shape. Pickling keeps the path alone, so
    loader workers that start by spawning open the file again instead of receiving a copy of it.
    """

    def __init__(self, name: str, shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> None:
        self.path, self.shape = cache_folder() / f"{name}.npy", shape
        self._array = self._open()
        if self._array is None:
            self._array = self._write(make())

    def __getitem__(self, row: int) -> np.ndarray:
        return self.array[row]

    @property
    def array(self) -> np.ndarray:
        if self._array is None:
            self._array = self._open()
            if self._array is None:
                raise FileNotFoundError(f"{self.path} was removed or changed while it was in use")
        return self._array

    def _open(self) -> np.ndarray | None:
        try:
            # copy-on-write: torch.from_numpy wants a writable array, and the file must never change
            found = np.load(self.path, mmap_mode="c", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return found if found.shape == self.shape and found.dtype == np.uint8 else None

    def _write(self, made: np.ndarray) -> np.ndarray:
        if made.shape != self.shape or made.dtype != np.uint8:
            raise ValueError(f"{self.path.name}: made {made.dtype} {made.shape}, expected uint8 {self.shape}")
        temporary = ""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
            with os.fdopen(handle, "wb") as file:
                np.save(file, made, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except OSError as error:
            # a full or read-only disk costs speed at the next start, not this run
            if temporary:
                Path(temporary).unlink(missing_ok=True)
            warnings.warn(
                f"could not keep {self.path.name} in {self.path.parent} ({error}); it will be made again next time. "
                "Set CONDGEN_CACHE to a folder with free space",
                stacklevel=2,
            )
            return made
        opened = self._open()
        return made if opened is None else opened

    def __getstate__(self) -> dict[str, object]:
        kept = self._array if not self.path.is_file() else None
        return {"path": self.path, "shape": self.shape, "_array": kept}
