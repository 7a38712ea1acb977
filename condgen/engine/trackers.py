"""Experiment trackers, imported only when asked for: "csv", "tensorboard", "wandb", "trackio".

metrics.jsonl, log.txt and samples/ are always written; a tracker is a second place. Nothing here runs by default,
so a default run makes no network call and needs no account.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from condgen import registry
from condgen.disk import Appender, replace_file
from condgen.engine.run import RunFolder
from condgen.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image


class Tracker(ABC):
    """A place that scalars and pictures go to besides the run folder."""

    name: str

    @abstractmethod
    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def image(self, step: int, name: str, image: Image.Image) -> None:  # noqa: B027  (not every place takes pictures)
        """Takes a picture, if it can."""

    def rewind(self, step: int) -> None:  # noqa: B027
        """Forgets what came after `step`, if it can."""

    def close(self) -> None:  # noqa: B027
        """Sends what is left."""


class CsvTracker(Tracker):
    """metrics.csv with one row per value: step,name,value. Spreadsheets pivot it; new metrics need no new column."""

    name = "csv"

    def __init__(self, run: RunFolder) -> None:
        self._path = run.path / "metrics.csv"
        if not self._path.exists():
            replace_file(self._path, b"step,name,value\n")
        self._lines = Appender(self._path)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._lines.line("\n".join(f"{step},{_csv_cell(name)},{value!r}" for name, value in values.items()))

    def rewind(self, step: int) -> None:
        header, *rows = self._path.read_text(encoding="utf-8").splitlines()
        kept = [row for row in rows if row.partition(",")[0].isdigit() and int(row.partition(",")[0]) <= step]
        replace_file(self._path, ("\n".join([header, *kept]) + "\n").encode())


class TensorboardTracker(Tracker):
    """Event files in tensorboard/ of the run folder."""

    name = "tensorboard"

    def __init__(self, run: RunFolder) -> None:
        _need("tensorboard", "tensorboard", 'pip install "condgen[track]"')
        self._module = _need("tensorboard", "torch.utils.tensorboard", 'pip install "condgen[track]"')
        self._folder = str(run.path / "tensorboard")
        self._writer: Any = self._module.SummaryWriter(self._folder)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        import numpy

        self._writer.add_image(name, numpy.asarray(image.convert("RGB")), step, dataformats="HWC")

    def rewind(self, step: int) -> None:
        self._writer.close()
        self._writer = self._module.SummaryWriter(self._folder, purge_step=step + 1)

    def close(self) -> None:
        self._writer.close()


class WandbTracker(Tracker):
    """Weights & Biases: sends to their server unless WANDB_MODE=offline."""

    name = "wandb"

    def __init__(self, run: RunFolder) -> None:
        self._module = _need(self.name, "wandb", "pip install wandb")
        self._run: Any = self._module.init(project="condgen", name=run.name, dir=str(run.path))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def image(self, step: int, name: str, image: Image.Image) -> None:
        self._run.log({name: self._module.Image(image), "step": step})

    def close(self) -> None:
        self._run.finish()


class TrackioTracker(Tracker):
    """trackio: the same calls as wandb, kept on this machine unless told otherwise."""

    name = "trackio"

    def __init__(self, run: RunFolder) -> None:
        self._module = _need(self.name, "trackio", "pip install trackio")
        self._run: Any = self._module.init(project="condgen", name=run.name)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._module.log(dict(values), step=step)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        self._module.log({name: self._module.Image(image)}, step=step)

    def close(self) -> None:
        self._module.finish()


KINDS: dict[str, type[Tracker]] = {
    kind.name: kind for kind in (CsvTracker, TensorboardTracker, WandbTracker, TrackioTracker)
}


def make_trackers(names: Sequence[str], run: RunFolder) -> list[Tracker]:
    """Trackers by name, in order. Raises ConfigError for an unknown name, or for a package that is not installed."""
    unknown = [name for name in names if name not in KINDS]
    if unknown:
        raise ConfigError(registry.unknown("tracker", unknown[0], sorted(KINDS)))
    return [KINDS[name](run) for name in names]  # type: ignore[call-arg]  # the base has no constructor of its own


def _need(tracker: str, module: str, install: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"the tracker {tracker!r} needs a package that is not installed ({error.name or error}): {install}, "
            "or leave it out of train.trackers; metrics.jsonl is written in any case"
        ) from error


def _csv_cell(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if set(text) & set(',"\n') else text
