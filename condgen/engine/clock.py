"""Times of a run: rates between log lines, and what hooks and checkpoints do not count towards."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Times of the current window between log lines, less what hooks and checkpoints took."""

    def __init__(self) -> None:
        self._start = self._save = self._window = time.perf_counter()
        self._waited, self._images = 0.0, 0

    def since_start(self) -> float:
        return time.perf_counter() - self._start

    def since_save(self) -> float:
        return time.perf_counter() - self._save

    def saved(self) -> None:
        self._save = time.perf_counter()

    def tick(self, waited: float, images: int) -> None:
        self._waited += waited
        self._images += images

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._window += time.perf_counter() - began

    def rates(self) -> dict[str, float]:
        """Rates since the last call."""
        now = time.perf_counter()
        seconds = max(now - self._window, 1e-9)
        out = {"time/images_per_second": self._images / seconds, "time/data_share": min(self._waited / seconds, 1.0)}
        self._window, self._waited, self._images = now, 0.0, 0
        return out
