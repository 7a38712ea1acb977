"""Asking a training to stop: the handler only counts, and the trainer looks at the count between steps."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

logger = logging.getLogger(__name__)

GRACE_SECONDS = 1.0
"""Launchers forward what the terminal already sent to every process; copies within this time are one request."""


class StopSignals:
    """While entered, SIGTERM, SIGINT and SIGUSR1 set `requested`; a second request ends the process with 128 + n.

    SIGHUP is ignored meanwhile: a closed terminal does not end a training. The previous handlers come back on
    exit. Only the main thread can receive signals; elsewhere this does nothing, and `note` says so.
    """

    def __init__(self) -> None:
        self.count = 0
        self.number = 0
        self.note = ""
        self._first = 0.0
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether to stop after this step."""
        return self.count > 0

    @property
    def reason(self) -> str:
        """Name of the signal that asked, such as "SIGTERM"; "" without one."""
        return signal.Signals(self.number).name if self.number else ""

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            self.note = "not in the main thread: signals keep their handlers and will not write a checkpoint"
            logger.info(self.note)
            return self
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._install(number, self._count)
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
            self._install(signal.SIGHUP, signal.SIG_IGN)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _install(self, number: int, handler: Any) -> None:
        previous = signal.getsignal(number)
        if previous is None:  # set by C code: Python could not put it back
            return
        self._previous[number] = previous
        signal.signal(number, handler)

    def _count(self, number: int, frame: FrameType | None) -> None:
        # No collective, no lock, no file here: the main thread may be inside any of them.
        now = time.monotonic()
        if self.count and now - self._first >= GRACE_SECONDS:
            os._exit(128 + number)
        if not self.count:
            self.number, self._first = number, now
        self.count += 1
