"""What a run is asked to do: `TrainOptions`, and the hooks that look at it on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from condgen import registry
from condgen.errors import ConfigError

NonFinite = Literal["raise", "skip"]


@dataclass(frozen=True)
class TrainOptions:
    """Options of a run; `train.*` in the configuration.

    steps                training steps, >= 1; each runs every due phase once (or `repeats` times)
    batch_size           rows per process and micro-batch, >= 1
    seed                 of data order, noise, dropout and weights
    accumulate           micro-batches per update, >= 1; 2 at batch B is 1 at batch 2B
    checkpoint_every     steps between checkpoints; 0 = only at the end and on a signal
    checkpoint_seconds   also after this much time; 0 = never
    sample_every         steps between sample pictures; 0 = never. Read by whoever builds the hooks
    log_every            steps between lines of metrics.jsonl, >= 1
    workers              processes that load data; 0 = this one
    ema_decay            of the averaged weights that sampling uses, in [0, 1)
    condition_drop       probability that a row's field is replaced by null (for guidance), in [0, 1]
    sync_batchnorm       with several processes, batch norm takes statistics over all of them
    compile              torch.compile for the modules that the system lists in `compilable`
    on_nonfinite         a loss or gradient that is NaN or inf: "raise", or "skip" that update (10 in a row raise)
    deterministic        only deterministic kernels; an operation that has none is an error
    best                 a number that a hook logs, such as rprec@10: the checkpoint with the best one is kept and
                         pointed to by checkpoints/best.json; null = none. It counts at steps that also save
    best_is              whether the best is the "max" or the "min"
    allow_data_change    resume although the data are no longer those that the run was started with
    time_limit_seconds   stop with a checkpoint after this much time; null = no limit
    """

    steps: int = 1000
    batch_size: int = 16
    seed: int = 0
    accumulate: int = 1
    checkpoint_every: int = 500
    checkpoint_seconds: float = 600
    sample_every: int = 200
    log_every: int = 10
    workers: int = 0
    ema_decay: float = 0.999
    condition_drop: float = 0.0
    sync_batchnorm: bool = True
    compile: bool = False
    on_nonfinite: NonFinite = "raise"
    deterministic: bool = False
    best: str | None = None
    best_is: Literal["max", "min"] = "max"
    allow_data_change: bool = False
    time_limit_seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every"):
            self._expect(name, getattr(self, name) >= 1, "1 or more")
        for name in ("checkpoint_every", "checkpoint_seconds", "sample_every", "workers"):
            self._expect(name, getattr(self, name) >= 0, "0 or more")
        self._expect("ema_decay", 0 <= self.ema_decay < 1, "a number in [0, 1)")
        self._expect("condition_drop", 0 <= self.condition_drop <= 1, "a number in [0, 1]")
        limit = self.time_limit_seconds
        self._expect("time_limit_seconds", limit is None or limit > 0, "null or a number above 0")
        if self.on_nonfinite not in get_args(NonFinite):
            raise ConfigError(registry.unknown("on_nonfinite", str(self.on_nonfinite), list(get_args(NonFinite))))

    def _expect(self, name: str, good: bool, allowed: str) -> None:
        if not good:
            raise ConfigError(f"train.{name} is {getattr(self, name)}; allowed: {allowed}")


@dataclass(frozen=True)
class Hook:
    """Something that looks at the system while it trains: sample pictures, scores.

    It runs after steps that are multiples of `every` (0 = never) and after the last one, on every process,
    with averaged weights applied, in eval mode, and with the random state put back afterwards, so that it
    never changes training. Numbers that it returns are logged.
    """

    name: str
    every: int
    run: Callable[[Any, int], Mapping[str, float] | None]

    def due(self, step: int, steps: int) -> bool:
        return self.every > 0 and (step % self.every == 0 or step == steps)


@dataclass(frozen=True)
class Outcome:
    """How training ended: the number of steps done, and "done" or "time limit"."""

    step: int
    reason: str
