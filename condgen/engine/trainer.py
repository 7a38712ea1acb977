"""The training loop, the same for every system: `Trainer`.

Per step: stop signals agreed over processes, next batches, then for each due phase: seed, freeze the rest,
loss, synchronised backward pass, finite check agreed over processes, clip, update; then averaged weights,
log, hooks and a checkpoint when due. Everything random is a function of (seed, rank, step, phase, repeat,
micro-batch), so a run that stops and goes on equals one that never stopped, bit by bit on the same machine
with the same number of threads and processes. More than two processes sum gradients in an order that may
differ in the first step after a resume.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from condgen.data.base import BatchDataset, StreamBatches, too_many_bad
from condgen.engine import state
from condgen.engine.checkpoint import Checkpoint, CheckpointStore
from condgen.engine.clock import Clock
from condgen.engine.ema import Ema
from condgen.engine.failures import is_out_of_memory, not_finite, out_of_memory, plain
from condgen.engine.feed import Feed, Place, StepData
from condgen.engine.log import Log
from condgen.engine.optim import OptimOptions
from condgen.engine.options import Hook, Outcome, TrainOptions
from condgen.engine.phases import Result, Runner, options_for, owned
from condgen.engine.resume import Snapshot
from condgen.engine.run import RunFolder
from condgen.engine.scoring import averaged_statistics, scoring
from condgen.engine.signals import StopSignals
from condgen.engine.world import World
from condgen.errors import CheckpointError, ConfigError, DataError, Stopped
from condgen.nn import sync_norm
from condgen.systems.base import Trainable
from condgen.types import Batch

__all__ = ["Hook", "OptimOptions", "Outcome", "TrainOptions", "Trainer"]

logger = logging.getLogger(__name__)

SKIPS_IN_A_ROW = 10  # on_nonfinite=skip gives up after this many


class Stop(Protocol):
    """What asks a training to end: `signals.StopSignals`, or anything with `requested`."""

    @property
    def requested(self) -> bool: ...


class Trainer:
    """Trains one system.

    data       gives batch number g for this process; its batch size, seed, rank and world match the options
    prepare    runs on each batch on the CPU before it moves: attaches text embeddings
    optim      phase name -> options, with "default" for phases that are not named
    run, log   the run folder and its log
    store      where checkpoints go; the default keeps the newest two in the run folder
    hooks      sample pictures and scores on the way

    The system is moved to the world's device, its batch norm is replaced where it must be synchronised, and
    every process starts from rank 0's weights. Raises ConfigError when phases and parameters do not fit.
    """

    def __init__(
        self,
        system: Trainable,
        data: BatchDataset | StreamBatches,
        prepare: Callable[[Batch], Batch],
        optim: Mapping[str, OptimOptions],
        options: TrainOptions,
        world: World,
        run: RunFolder,
        log: Log,
        hooks: Sequence[Hook] = (),
        store: CheckpointStore | None = None,
    ) -> None:
        self.system, self.data, self.prepare, self.options, self.world = system, data, prepare, options, world
        self.run, self.log, self.hooks = run, log, tuple(hooks)
        self.store = store if store is not None else CheckpointStore(run.checkpoints)
        self.phases = list(system.phases())
        if data.data.target != system.target_spec:
            raise ConfigError(f"the data give {data.data.target} and the system was built for {system.target_spec}")
        parameters = owned(system, self.phases)
        chosen = options_for(self.phases, optim)
        self._place_system()
        self.runners = [Runner(system, p, parameters[p.name], chosen[p.name], options, world) for p in self.phases]
        self.ema = Ema(system, system.generates, options.ema_decay)
        self._shares = type(system).shared is not Trainable.shared
        self._latest: dict[str, Tensor | float] = {}  # newest scalars of every phase, for the log
        self._skips: dict[str, int] = {}  # phase -> updates refused in a row
        self._bad_rows: set[str] = set()
        self._saved: int | None = None
        self._measured: tuple[int, dict[str, float]] = (0, {})  # step, and what hooks returned there

    def _place_system(self) -> None:
        world, system = self.world, self.system
        if self.options.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        if world.world > 1 and self.options.sync_batchnorm:
            on_gpu = world.device.type == "cuda"
            changed = nn.SyncBatchNorm.convert_sync_batchnorm(system) if on_gpu else sync_norm.convert(system)
            assert changed is system
        world.place(system)
        world.copy_from_main(state.system_tensors(system))
        if self.options.compile:
            for name in getattr(system, "compilable", ()):
                system.get_submodule(name).compile()

    # the loop

    def train(self, resume: Checkpoint | None = None, stop: Stop | None = None) -> Outcome:
        """Runs until options.steps, the time limit, or a stop request, and leaves a checkpoint behind.

        resume   where to go on; None = from the start
        stop     asks to end; the default listens to signals while training

        Raises Stopped after the checkpoint when asked to stop, DivergedError, DataError, CheckpointError, and
        ConfigError when memory runs out.
        """
        if stop is None:
            with StopSignals() as signals:
                return self.train(resume, signals)
        step = self._begin(resume)
        requires = {p: p.requires_grad for p in self.system.parameters()}
        try:
            for runner in self.runners:
                runner.freeze(True)
            self.system.train()
            step, reason = self._loop(step, stop)
        finally:
            for parameter, flag in requires.items():
                parameter.requires_grad_(flag)
        if reason == "stopped":
            raise Stopped(f"stopped at step {step} of {self.options.steps}; go on with train.resume=latest")
        return Outcome(step, reason)

    def _begin(self, resume: Checkpoint | None) -> int:
        """Restores, and returns the number of steps that are done."""
        snapshot = Snapshot(self.system, self.ema, self.runners, self.options, self.world)
        self._snapshot = snapshot
        self._fingerprint = self.data.data.fingerprint
        if self.world.is_main:
            self.store.prepare()
        if resume is None:
            return 0
        snapshot.expect_data(resume.state, self._fingerprint)
        kept = snapshot.restore(resume)
        self._latest = {name: float(value) for name, value in kept["latest"].items()}
        self._skips = dict(kept["skips"])
        if self.world.is_main:
            self.store.rewind(resume.step)
        self.log.rewind(resume.step)
        self._saved = resume.step if resume.path.parent == self.store.folder else None
        self._bad_rows = self._read_quarantine()
        return resume.step

    def _loop(self, step: int, stop: Stop) -> tuple[int, str]:
        options, reason = self.options, "done"
        clock = Clock()
        feed = Feed(self.data, self.prepare, options, self.world, self.phases, step)
        with feed, self.log.progress(options.steps, step) as progress:
            while step < options.steps:
                ending = self._interrupted(step, stop, clock)
                if ending is not None:
                    reason = ending
                    break
                data = feed.next()
                self._note_quarantine(data)
                finite = self._step(data)
                if finite:  # a refused update leaves the averaged weights alone as well
                    self.ema.update()
                step += 1
                clock.tick(feed.waited, len(data.keys) * self.world.world)
                line = None
                if step % options.log_every == 0 or step in (1, options.steps):
                    line = self._write_line(step, clock)
                with clock.paused():
                    for hook in self.hooks:
                        if hook.due(step, options.steps):
                            self._call(hook, step)
                    if options.checkpoint_every and step % options.checkpoint_every == 0:
                        self._save(step, clock)
                progress.advance(step, line, feed.waited)
            self._save(step, clock)
        return step, reason

    def _interrupted(self, step: int, stop: Stop, clock: Clock) -> str | None:
        """Why to end before this step, or None; agreed over processes with one reduction."""
        options = self.options
        limit, often = options.time_limit_seconds, options.checkpoint_seconds
        stopped, late, save, bad = self.world.agree(
            bool(stop.requested),
            limit is not None and clock.since_start() > limit,
            bool(often) and clock.since_save() > often,
            too_many_bad(len(self._bad_rows), len(self.data.data)),
        )
        if bad:
            reasons = f"see {self.run.path / 'quarantine.jsonl'}"
            raise DataError(
                f"{len(self._bad_rows)} of {len(self.data.data)} rows cannot be used ({reasons}). "
                "Run `condgen check-data`, and repair or remove them"
            )
        if save and not stopped:
            self._save(step, clock)
        return "stopped" if stopped else "time limit" if late else None

    # one step

    def _step(self, data: StepData) -> bool:
        """Every due phase; False if an update was refused."""
        due = [runner for runner in self.runners if runner.phase.due(data.step)]
        finite = True
        for at, runner in enumerate(due):
            later = max((other.phase.repeats for other in due[at + 1 :]), default=0)
            for repeat in range(runner.phase.repeats):
                result = self._update(runner, data, repeat)
                if result.status == "updated":
                    name = runner.phase.name
                    self._latest.update((f"{name}/{key}", value) for key, value in result.values.items())
                    self._skips.pop(name, None)
                elif result.status == "nonfinite":
                    self._refused(runner, data, repeat, result)
                    finite = False
                if repeat >= later:
                    data.release(repeat)
        return finite

    def _update(self, runner: Runner, data: StepData, repeat: int) -> Result:
        skip = self.options.on_nonfinite == "skip"
        # a forward pass writes running statistics before anyone can see that the batch was bad
        held = {n: b.clone() for n, b in self.system.named_buffers()} if skip else {}
        runner.freeze(False)
        try:
            result = runner.update(data, repeat, lambda r, m: self._shared_batch(runner, data, r, m))
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(runner, data, error) from error
        finally:
            runner.freeze(True)
        if skip and result.status == "nonfinite":
            for name, buffer in self.system.named_buffers():
                buffer.copy_(held[name])
        return result

    def _shared_batch(self, runner: Runner, data: StepData, repeat: int, micro: int) -> Batch:
        """The batch with what the system shares between phases, computed when the first phase asks."""
        if self._shares and not data.is_shared(repeat, micro):
            for other in self.runners:
                other.freeze(False)
            self.world.seed(self.options.seed, self.world.rank, data.step, "shared", repeat, micro)
            random = data.feed.random("shared", Place(data.step, repeat, micro))
            with self.world.autocast():
                data.share(repeat, micro, self.system.shared(data.batch(repeat, micro), random))
            for other in self.runners:
                other.freeze(other is not runner)
        return data.batch(repeat, micro)

    def _refused(self, runner: Runner, data: StepData, repeat: int, result: Result) -> None:
        """Writes the crash file and raises, or counts the skipped update."""
        phase = runner.phase.name
        self._skips[phase] = count = self._skips.get(phase, 0) + 1
        error = not_finite(runner, data, repeat, result, self.run)
        if self.options.on_nonfinite == "raise" or count >= SKIPS_IN_A_ROW:
            raise error
        logger.warning("skipped an update (%d in a row): %s", count, error)

    # log, hooks, checkpoints

    def _write_line(self, step: int, clock: Clock) -> dict[str, float]:
        """One line of metrics, averaged over processes; what depends on the clock lies under time/."""
        values = self.world.mean(self._latest)
        self.log.scalars(step, {**values, **clock.rates()})
        return {name: value for name, value in values.items() if name.endswith("/loss")}

    def _call(self, hook: Hook, step: int) -> None:
        with scoring(self.system, self.ema, self.world):
            values = hook.run(self.system, step)
        if values:
            self.log.scalars(step, values)
            earlier = self._measured[1] if self._measured[0] == step else {}
            self._measured = step, {**earlier, **values}

    def _save(self, step: int, clock: Clock) -> None:
        if self._saved == step:
            return
        with clock.paused():
            extra = {
                "latest": plain(self.world.mean(self._latest)),
                "skips": self._skips,
                "config": self._config_hash(),
                "data": self._fingerprint,
            }
            own = self._snapshot.buffers_per_rank()
            with averaged_statistics(self.system, self.world):
                tensors, facts = self._snapshot.capture()
                failure = None
                if self.world.is_main:
                    try:
                        self.store.save(step, {**tensors, **own}, {**facts, **extra, "step": step})
                        self.run.status("running", 0, "training", step)
                        self._mark_best(step)
                    except Exception as error:  # every process must learn of it, whatever it was
                        failure = error
            if self.world.any(failure is not None):
                raise failure or CheckpointError(f"rank 0 could not write the checkpoint of step {step}")
        self._saved = step
        clock.saved()

    def _mark_best(self, step: int) -> None:
        name, (measured, values) = self.options.best, self._measured
        if name is not None and measured == step and name in values:
            self.store.mark_best(step, name, float(values[name]), self.options.best_is == "max")

    def _config_hash(self) -> str:
        path = self.run.path / "config.yaml"
        return state.digest(path.read_bytes()) if path.is_file() else ""

    # rows that could not be used

    def _note_quarantine(self, data: StepData) -> None:
        for row in data.quarantined:
            if row.key not in self._bad_rows:
                self._bad_rows.add(row.key)
                self.run.quarantine(row.key, row.reason)
                logger.warning("row %s cannot be used and was replaced: %s", row.key, row.reason)

    def _read_quarantine(self) -> set[str]:
        path = self.run.path / "quarantine.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return {json.loads(line)["id"] for line in lines if line.startswith("{") and line.endswith("}")}
