"""What a run says when an update cannot be made: numbers that are not finite, memory that runs out."""

from __future__ import annotations

import math
from typing import Any

import torch

from condgen.engine.feed import StepData
from condgen.engine.phases import Result, Runner
from condgen.engine.run import RunFolder
from condgen.errors import ConfigError, DivergedError


def not_finite(runner: Runner, data: StepData, repeat: int, result: Result, run: RunFolder) -> DivergedError:
    """The error for an update that was refused; writes crash/step-*.json. Every process must call it."""
    world, phase, step = runner.world, runner.phase.name, data.step + 1
    parts = world.objects({"rank": world.rank, "keys": data.keys, **result.facts})
    first = next((part["parameter"] for part in parts if part["parameter"]), None)
    what = f"the gradient of {first} is" if first else "the loss is"
    if world.is_main:
        facts = {"step": step, "phase": phase, "repeat": repeat, "seed": runner.options.seed}
        run.write_crash(step, {**facts, "processes": plain(parts)})
    losses = ", ".join(f"{part['loss']:.4g}" for part in parts)
    source = next((part for part in parts if not math.isfinite(part["loss"])), parts[0])  # the same everywhere
    keys = ", ".join(source["keys"][:3])
    return DivergedError(
        f"phase {phase!r} at step {step}: {what} not finite (loss {losses}; batch {keys}, ...). "
        f"Weights are as before this update; {run.path / 'crash'} holds the batch. Lower optim.{phase}.lr, set its "
        "clip_norm, or use train.precision=fp32"
    )


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch ran out of memory; on CPU that is a plain RuntimeError."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in text or "can't allocate memory" in text


def out_of_memory(runner: Runner, data: StepData, error: RuntimeError) -> ConfigError:
    """The error for a step that does not fit into memory."""
    shape = tuple(data.batch(0, 0).target.shape)
    return ConfigError(
        f"out of memory in phase {runner.phase.name!r} at step {data.step + 1} with batches of shape {shape} "
        f"({str(error).splitlines()[0]}). Lower train.batch_size and raise train.accumulate by the same factor, "
        "or choose a smaller system.preset or data.size"
    )


def plain(value: Any) -> Any:
    """NaN and inf as strings, which float() reads back: JSON has none."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    return repr(value) if isinstance(value, float) and value - value != 0 else value
