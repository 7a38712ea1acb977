"""What a person sees while a training runs: a bar on a terminal, plain lines elsewhere, nothing if nobody listens."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TextIO

LOADER_BOUND = 0.3
"""Above this share of time spent waiting for data, the loader is what limits the speed."""


class Console:
    """Prints lines to a stream that may close at any time: the training outlives its terminal."""

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self.stream: TextIO | None = stream if stream is not None else sys.stdout
        self.quiet = quiet
        self._bar: Any = None  # rich.progress.Progress while a bar is on the screen

    @property
    def is_terminal(self) -> bool:
        try:
            return not self.quiet and self.stream is not None and self.stream.isatty()
        except (OSError, ValueError):
            return False

    def line(self, text: str) -> None:
        """Prints one line, above the bar if there is one."""
        if self.quiet or self.stream is None:
            return
        try:
            if self._bar is not None:
                self._bar.console.print(text, markup=False, highlight=False)
            else:
                print(text, file=self.stream, flush=True)
        except (OSError, ValueError):  # closed pipe, hung-up terminal, closed file
            self.abandon()

    def abandon(self) -> None:
        """Gives the stream up for good, and keeps Python from failing on it when it flushes at exit."""
        stream, self.stream = self.stream, None
        with contextlib.suppress(OSError, ValueError):
            if stream is None or stream.fileno() != 1:
                return
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.close(nowhere)


class Progress:
    """The progress of `total` steps, of which `done` are behind us. Use as a context manager.

    every_seconds: on anything but a terminal a line is printed at most this often, and at the end.
    """

    def __init__(
        self,
        console: Console,
        total: int,
        done: int = 0,
        every_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console, self.total, self.every_seconds = console, total, every_seconds
        self._clock, self._start, self._began = clock, done, clock()
        self._waited, self._shown_at = 0.0, self._began
        self._step, self._shown, self._values = done, done, dict[str, float]()
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self._open_bar()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        bar, self.console._bar = self.console._bar, None
        if bar is not None:
            with contextlib.suppress(OSError, ValueError):
                bar.stop()
        elif self._step > self._shown:
            self.console.line(self.summary())

    def advance(self, step: int, values: Mapping[str, float] | None = None, data_wait: float = 0.0) -> None:
        """`step` steps are done in all. values: the newest losses. data_wait: seconds waited for data since last."""
        self._step = step
        self._waited += data_wait
        self._values.update(values or {})
        if self.console._bar is not None:
            self._update_bar()
        elif self._clock() - self._shown_at >= self.every_seconds or (step >= self.total and self._shown < step):
            self._shown_at, self._shown = self._clock(), step
            self.console.line(self.summary())

    def summary(self) -> str:
        """One line: steps, share, speed, time left, share of time spent waiting for data, newest losses."""
        parts = [f"step {self._step}/{self.total}", *self._rates(), *self._losses()]
        return "  ".join(parts)

    def _rates(self) -> list[str]:
        seconds = max(self._clock() - self._began, 1e-9)
        speed = (self._step - self._start) / seconds
        left = duration((self.total - self._step) / speed) if speed else "?"
        share = min(self._waited / seconds, 1.0)
        bound = " (loader-bound)" if share > LOADER_BOUND else ""
        percent = 100 * self._step // max(self.total, 1)
        return [f"{percent}%", f"{speed:.3g} steps/s", f"left {left}", f"data {share:.0%}{bound}"]

    def _losses(self) -> list[str]:
        return [f"{name} {value:.4g}" for name, value in self._values.items()]

    def _open_bar(self) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        bar = Bar(
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[rates]}"),
            TextColumn("{task.fields[losses]}", markup=False),
            console=RichConsole(file=self.console.stream),
            refresh_per_second=4,
        )
        self._task = bar.add_task("train", total=self.total, completed=self._start, rates="", losses="")
        try:
            bar.start()
        except (OSError, ValueError):
            self.console.abandon()
            return
        self.console._bar = bar

    def _update_bar(self) -> None:
        bar = self.console._bar
        try:
            bar.update(
                self._task, completed=self._step, rates="  ".join(self._rates()[1:]), losses="  ".join(self._losses())
            )
        except (OSError, ValueError):
            self.console._bar = None
            self.console.abandon()


def duration(seconds: float) -> str:
    """3725 -> "1h02m", 65 -> "1m05s", 5 -> "5s"."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
