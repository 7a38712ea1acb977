"""The record of a run: metrics.jsonl, log.txt and samples/ always, trackers on request, progress on the screen."""

from __future__ import annotations

import datetime
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from condgen.engine.console import Console, Progress
from condgen.engine.disk import Appender, replace_file, to_json
from condgen.engine.run import RunFolder, png_bytes, slug
from condgen.engine.trackers import Tracker, make_trackers
from condgen.errors import CondgenError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

logger = logging.getLogger(__name__)

_PLAIN_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


class Log:
    """Writes what happens. Only the main process writes: with main=False every method does nothing.

    trackers: names from `condgen.engine.trackers`. quiet: nothing on the screen; files are written all the same.
    Warnings of the "condgen" loggers go to the screen and to log.txt while this is open.

    Nothing that is written here can end a training: a full disk, a closed terminal or a tracker that fails
    is reported once, and the run goes on.
    """

    def __init__(
        self,
        run: RunFolder,
        *,
        trackers: Sequence[str] = (),
        quiet: bool = False,
        main: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        self.run, self.main = run, main
        self.console = Console(stream, quiet=quiet or not main)
        self._trackers: list[Tracker] = make_trackers(trackers, run) if main else []
        self._warned: set[str] = set()
        self._metrics = Appender(run.metrics, self._warn)
        self._text = Appender(run.path / "log.txt", self.console.line)
        self._handler = _Forward(self)
        if main:
            logging.getLogger("condgen").addHandler(self._handler)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl: {"step": step, name: value, ...}.

        Values are numbers or 0-d tensors; nan and inf are written as the strings "nan", "inf", "-inf". Give only
        what a resumed run would repeat exactly: speeds and times belong to `progress`.
        """
        if not self.main or not values:
            return
        numbers = {name: float(value) for name, value in values.items()}
        plain = {name: value if abs(value) < float("inf") else repr(value) for name, value in numbers.items()}
        self._metrics.line(to_json({"step": int(step), **plain}).decode().rstrip("\n"))
        for tracker in list(self._trackers):
            self._forward(tracker, "scalars", int(step), numbers)

    def media(self, step: int, name: str, image: Image.Image) -> Path | None:
        """Saves samples/step-00001200-name.png without any metadata, and shows it to the trackers.

        Returns the file, or None on other processes and when the disk is full.
        """
        if not self.main:
            return None
        plain = name if _PLAIN_NAME.fullmatch(name) else slug(name)
        path = self.run.samples / f"step-{step:08d}-{plain}.png"
        try:
            replace_file(path, png_bytes(image))
        except OSError as error:
            self._warn(f"cannot write pictures to samples/ ({error.strerror}); the run goes on without them")
            return None
        for tracker in list(self._trackers):
            self._forward(tracker, "image", int(step), plain, image)
        return path

    def clip(self, step: int, name: str, frames: Iterable[Tensor], *, fps: float = 8) -> Path | None:
        """Saves samples/step-00001200-name.gif of frames (C, H, W); beside a picture of the same name the report plays
        it. Returns the file, or None on other processes and when it cannot be written."""
        if not self.main:
            return None
        from condgen.engine.clips import write_clip

        plain = name if _PLAIN_NAME.fullmatch(name) else slug(name)
        try:
            return write_clip(self.run.samples / f"step-{step:08d}-{plain}.gif", frames, fps=fps)
        except (OSError, CondgenError) as error:
            self._warn(f"cannot write clips to samples/ ({error}); the run goes on without them")
            return None

    def text(self, message: str) -> None:
        """One message on the screen and, with the time, in log.txt."""
        if not self.main:
            return
        self.console.line(message)
        self._record(message)

    def progress(self, total: int, done: int = 0, every_seconds: float = 10.0) -> Progress:
        """A progress display to be used as a context manager; see `Progress.advance`."""
        return Progress(self.console, total, done, every_seconds)

    def rewind(self, step: int) -> None:
        """Forgets metrics after `step`, before a run goes on from there: 9 + 11 steps give the lines of 20."""
        if not self.main:
            return
        if self.run.metrics.exists():
            rows = self.run.metrics.read_bytes().split(b"\n")
            kept = [row for row in rows if (at := _step_of(row)) is not None and at <= step]
            replace_file(self.run.metrics, b"".join(row + b"\n" for row in kept))
            self._metrics = Appender(self.run.metrics, self._warn)
        for tracker in list(self._trackers):
            self._forward(tracker, "rewind", step)

    def close(self) -> None:
        """Sends what trackers still hold. Nothing may be logged afterwards."""
        logging.getLogger("condgen").removeHandler(self._handler)
        for tracker in list(self._trackers):
            self._forward(tracker, "close")
        self._trackers.clear()

    def _forward(self, tracker: Tracker, method: str, *arguments: Any) -> None:
        try:
            getattr(tracker, method)(*arguments)
        except Exception as error:  # somebody else's code and network: losing a chart must not lose the run
            self._trackers.remove(tracker)
            self._warn(f"the tracker {tracker.name} failed and is off from now on: {error!r}")

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)

    def _record(self, message: str) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._text.line(f"{now} {message}")


class _Forward(logging.Handler):
    """Sends warnings of condgen's loggers to the run's log."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.text(f"{record.levelname.lower()}: {record.getMessage()}")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a line torn by a crash is left out. "nan" and "inf" come back as floats."""
    if not path.is_file():
        return []
    found = []
    for row in path.read_bytes().split(b"\n"):
        if _step_of(row) is not None:
            line = json.loads(row)
            found.append({name: float(value) if isinstance(value, str) else value for name, value in line.items()})
    return found


def _step_of(row: bytes) -> int | None:
    try:
        step = json.loads(row)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if type(step) is int else None
