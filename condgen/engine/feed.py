"""Batches for training steps: which batch numbers a step holds, and their way to the device.

A step holds `accumulate` micro-batches for each repeat of its phases, taken from consecutive batch numbers, so
the position of the loader is a function of the step alone. Rows of the global batch lie in the same order
whatever the number of processes and micro-batches.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from condgen.data.base import BatchDataset, Loaded, Quarantined, StreamBatches, batches
from condgen.engine.options import TrainOptions
from condgen.engine.world import World
from condgen.errors import ConfigError, DataError
from condgen.options import timeout_seconds
from condgen.rng import StepRandom
from condgen.systems.base import Phase
from condgen.types import Batch

Prepare = Callable[[Batch], Batch]


@dataclass(frozen=True)
class Place:
    """Where a micro-batch stands: step and repeat, then micro-batch; it decides every random draw."""

    step: int
    repeat: int
    micro: int


class StepData:
    """The batches of one step, moved to the device when first asked for and then shared by all phases."""

    def __init__(self, feed: Feed, step: int, loaded: list[Loaded]) -> None:
        self.feed, self.step, self._loaded = feed, step, loaded
        self._ready: dict[Place, Batch] = {}
        self._shared: set[Place] = set()
        self.quarantined: list[Quarantined] = [row for part in loaded for row in part.quarantined]
        self.keys = [key for part in loaded for key in part.batch.keys]

    def batch(self, repeat: int, micro: int) -> Batch:
        """The micro-batch, ready for a loss method. Kept, so all phases of a step see the same dropped fields."""
        place = Place(self.step, repeat, micro)
        if place not in self._ready:
            index = repeat * self.feed.options.accumulate + micro
            self._ready[place] = self.feed.ready(place, self._loaded[index].batch)
        return self._ready[place]

    def is_shared(self, repeat: int, micro: int) -> bool:
        """Whether `share` was called for this micro-batch."""
        return Place(self.step, repeat, micro) in self._shared

    def share(self, repeat: int, micro: int, value: Any) -> None:
        """Attaches what `Trainable.shared` made; every phase that asks for the batch gets it."""
        place = Place(self.step, repeat, micro)
        self._ready[place] = replace(self.batch(repeat, micro), shared=value)
        self._shared.add(place)

    def release(self, repeat: int) -> None:
        """Forgets the batches of a repeat that no later phase needs, with whatever graph hangs on them."""
        for place in [p for p in self._ready if p.repeat == repeat]:
            del self._ready[place]


@contextmanager
def unheard_children() -> Iterator[None]:
    """torch's SIGCHLD handler, which raises for as long as it knows of a dead worker, rests while workers are ended."""
    heard = signal.getsignal(signal.SIGCHLD) if threading.current_thread() is threading.main_thread() else None
    if heard is None:
        yield
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, heard)


class Feed:
    """Loads the batches of steps `start`, start+1, ... Use as a context manager: it owns the loader's processes.

    waited     seconds that the last step waited for data
    """

    def __init__(
        self,
        data: BatchDataset | StreamBatches,
        prepare: Prepare,
        options: TrainOptions,
        world: World,
        phases: list[Phase],
        start: int,
    ) -> None:
        for name, given, expected in (
            ("batch_size", data.batch_size, options.batch_size),
            ("seed", data.seed, options.seed),
            ("rank", data.rank, world.rank),
            ("world", data.world, world.world),
        ):
            if given != expected:
                raise ConfigError(f"the BatchDataset has {name}={given} and this run {name}={expected}; give both one")
        self.prepare, self.options, self.world = prepare, options, world
        self._data = data
        self.per_step = options.accumulate * max(phase.repeats for phase in phases)
        self.step, self.waited = start, 0.0
        loader = batches(
            data,
            start=start * self.per_step,
            stop=options.steps * self.per_step,
            workers=options.workers,
            pin_memory=world.device.type == "cuda",
        )
        self._loader: Iterator[Loaded] | None = iter(loader)

    def __enter__(self) -> Feed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with unheard_children():
            # an error's traceback keeps the loader alive, so its destructor may come much later
            end: Callable[[], None] | None = getattr(self._loader, "_shutdown_workers", None)
            if end is not None:
                end()
            self._loader = None
        # torch reports a dead worker from a signal handler, so the error can come up anywhere in a step
        if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
            raise self._explained(error, self.step * self.per_step) from error

    def next(self) -> StepData:
        """The data of the next step. DataError when a row, or the process that loads it, cannot go on."""
        assert self._loader is not None
        began = time.perf_counter()
        loaded: list[Loaded] = []
        try:
            for _ in range(self.per_step):
                loaded.append(next(self._loader))
        except RuntimeError as error:
            raise self._explained(error, self.step * self.per_step + len(loaded)) from error
        self.waited = time.perf_counter() - began
        self.step += 1
        return StepData(self, self.step - 1, loaded)

    def _explained(self, error: RuntimeError, number: int) -> Exception:
        """What went wrong with a loader process while batch `number` was awaited, or the error itself."""
        text = str(error)
        rows = ", ".join(self._data.keys(number)[:5]) if isinstance(self._data, BatchDataset) else ""
        where = f"at step {self.step + 1} (batch {number}{': ' + rows + ', ...' if rows else ''})"
        if "DataLoader timed out" in text:
            return DataError(
                f"a process that loads data gave nothing for {timeout_seconds():g} s {where}. A file on a network that "
                "hangs is the usual reason; data.workers=0 shows where, and CONDGEN_TIMEOUT_SECONDS sets the wait"
            )
        if "DataLoader worker" not in text:
            return error
        return DataError(
            f"a process that loads data died {where}, or while it read ahead of that: {text}. "
            "Too little memory is the usual reason; try data.workers=0"
        )

    def span(self, micro: int) -> tuple[int, int]:
        """(first row, rows) of this process's micro-batch in the global batch of a step."""
        rows = self.options.batch_size
        return (micro * self.world.world + self.world.rank) * rows, self.options.accumulate * self.world.world * rows

    def random(self, name: str, place: Place) -> StepRandom:
        """The numbers that phase `name` draws for this micro-batch. Noise sits on the device."""
        offset, total = self.span(place.micro)
        return StepRandom(
            self.options.seed, "step", place.step, name, place.repeat,
            rows=self.options.batch_size, rank=self.world.rank, world=self.world.world,
            offset=offset, total=total, device=self.world.device,
        )  # fmt: skip

    def ready(self, place: Place, batch: Batch) -> Batch:
        """Text embeddings, device, float pixels, dropped fields."""
        batch = self.world.place_batch(self.prepare(batch))
        p = self.options.condition_drop
        if p > 0 and batch.condition.given:
            random = self.random("condition drop", place)
            condition = batch.condition
            for name in condition.given:  # fields fall independently: guidance over several conditions needs that
                condition = condition.drop(random.rand() < p, fields=(name,))
            batch = replace(batch, condition=condition)
        return batch
