"""`condgen train --dry-run`: sizes, memory and time of a run, from one real step of each phase. Keeps nothing."""

from __future__ import annotations

import resource
import sys
import time
from typing import TYPE_CHECKING

from condgen.commands.tables import table

if TYPE_CHECKING:
    from torch import Tensor

    from condgen.build import Built
    from condgen.config import Config
    from condgen.engine.world import World
    from condgen.systems.base import Phase
    from condgen.types import Batch

MIB = 2**20


def dry_run(config: Config) -> int:
    """Prints the tables. Several processes each do it alone; only the first prints."""
    from condgen.build import build
    from condgen.engine.world import World

    world = World.start(device=config.launch.device, precision=config.launch.precision, seed=config.train.seed)
    try:
        built = build(config)
        data = built.batches()
        batch = built.prepare(data[0].batch)  # the first one opens files and loads the text encoder
        started = time.perf_counter()
        data[1]
        loading = time.perf_counter() - started
        world.place(built.system)
        placed = world.place_batch(batch)
        lines = [f"task {config.task}, system {config.system_name}, preset {config.preset}, data {config.data_name}"]
        lines += [f"rows: {len(built.train_data)} to train, {len(built.test_data)} to score"]
        lines += [
            f"conditions: {', '.join(built.spec.given) or 'none'}   target: {built.target.shape}",
            "",
            sizes(built),
        ]
        lines += ["", timings(built, placed, world, loading)]
        if world.is_main:
            print("\n".join(lines))
    finally:
        world.close()
    return 0


def sizes(built: Built) -> str:
    """Parameters of each submodule, and the memory that weights, gradients, moments and the average take."""
    rows, total, size = [], 0, 0
    for name, module in built.system.named_children():
        parameters = list(module.parameters())
        count = sum(p.numel() for p in parameters)
        total, size = total + count, size + sum(p.numel() * p.element_size() for p in parameters)
        rows.append((name, f"{count:,}"))
    own = list(built.system.parameters(recurse=False))
    total, size = total + sum(p.numel() for p in own), size + sum(p.numel() * p.element_size() for p in own)
    memory = f"{5 * size / MIB:.1f} MiB for weights, gradients, two moments and the running average"
    return table(("module", "parameters"), [*rows, ("all", f"{total:,}")]) + f"\n{memory}"


def timings(built: Built, batch: Batch, world: World, loading: float) -> str:
    """One real update of each phase, timed after a first one that warms up."""
    rows, step_seconds = [], 0.0
    for phase in built.system.phases():
        for attempt in range(2):
            seconds, losses = _update(built, phase, batch, world, attempt)
        share = phase.repeats / phase.every
        step_seconds += seconds * share * built.options.accumulate
        shown = ", ".join(f"{name} {float(value):.4g}" for name, value in losses.items())
        rows.append((phase.name, f"{seconds * 1e3:.1f}", f"{share:g}", shown or "skipped"))
    left = built.options.steps * max(step_seconds, loading if built.options.workers else 0)
    left += 0 if built.options.workers else built.options.steps * loading
    return "\n".join(
        [
            table(("phase", "ms", "per step", "losses"), rows),
            f"loading a batch: {loading * 1e3:.1f} ms",
            f"highest memory: {_highest(world):.0f} MiB",
            f"{built.options.steps} steps: about {_spoken(left)} without samples, scores and checkpoints",
        ]
    )


def _update(built: Built, phase: Phase, batch: Batch, world: World, attempt: int) -> tuple[float, dict[str, Tensor]]:
    import dataclasses

    import torch

    from condgen.engine.optim import make_optimizer
    from condgen.rng import StepRandom

    system = built.system.train()
    trained = [p for name in phase.trains for p in system.get_submodule(name).parameters()]
    for parameter in system.parameters():
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = make_optimizer(trained, built.optim.get(phase.name, built.optim["default"]))
    random = StepRandom(built.options.seed, "dry run", attempt, phase.name, rows=len(batch), device=world.device)
    started = time.perf_counter()
    with world.autocast():
        ready = dataclasses.replace(batch, shared=system.shared(batch, random))
        losses = phase.loss(ready, random)
    if losses is not None:
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, {name: value.detach() for name, value in (losses or {}).items()}


def _highest(world: World) -> float:
    import torch

    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def _spoken(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
