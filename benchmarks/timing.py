"""Timing a training from inside: seconds per step of the engine's loop, without its start and its last checkpoint."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from condgen.data.base import BatchDataset
from condgen.engine.log import Log
from condgen.engine.optim import OptimOptions
from condgen.engine.run import RunFolder
from condgen.engine.trainer import Trainer, TrainOptions
from condgen.engine.world import World
from condgen.systems.base import Trainable
from condgen.types import Batch


def seconds_per_step(
    system: Trainable,
    data: BatchDataset,
    steps: int,
    world: World,
    optim: Mapping[str, OptimOptions] | None = None,
    prepare: Callable[[Batch], Batch] = lambda batch: batch,
    ema_decay: float = 0.999,
) -> float:
    """Trains `system` for `steps` steps in a temporary run folder."""
    options = TrainOptions(
        steps=steps, batch_size=data.batch_size, checkpoint_every=0, log_every=10, ema_decay=ema_decay
    )
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))
        log = Log(run, quiet=True)
        trainer = Trainer(system, data, prepare, optim or {"default": OptimOptions()}, options, world, run, log)
        times: list[float] = []
        loop: Any = trainer._loop

        def timed(step: int, stop: Any) -> Any:
            times.append(time.perf_counter())
            return loop(step, stop)

        trainer._loop = timed  # type: ignore[method-assign]
        trainer._save = lambda step, clock: times.append(time.perf_counter())  # type: ignore[method-assign]
        trainer.train()
        log.close()
    return (times[1] - times[0]) / steps
