"""Drawing from a trained system: row i is a function of (seed, ids[i], its condition) and of nothing else.

Not of the batch size, of the other rows, of their order or of the number of processes. Kernels may round
differently for another batch size, so float rows agree to about 1e-6, not bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from condgen.errors import ConfigError, DivergedError, ShapeError
from condgen.rng import RowRandom, derive
from condgen.systems.base import HasStreams, System
from condgen.types import Condition

PRECISIONS = ("fp32", "bf16", "fp16")


class Gathering(Protocol):
    """What `sample_over` needs of `engine.world.World`."""

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def gather(self, tensor: Tensor) -> Tensor: ...


def sample_rows(
    system: System,
    condition: Condition,
    *,
    seed: int,
    ids: Sequence[int],
    batch_size: int = 16,
    precision: str = "fp32",
    **options: Any,
) -> Tensor:
    """One sample per id: (len(ids), *target shape), float32 in [-1, 1], on the CPU.

    condition   len(ids) rows, or no field at all for an unconditional system
    ids         any integers; row i depends on (seed, ids[i]) and on row i of the condition
    precision   "fp32" also inside an autocast region, so that samples are reproducible; "bf16" and, on a GPU, "fp16"
                = autocast
    options     keyword options of this system's `sample`; with length=n, of a system that `rolls`, clips have n frames

    Training mode, global random state and gradients of the caller are left as they were.
    Raises ShapeError, ConfigError, and DivergedError when a sample is not finite.
    """
    chunks = [c for _, c in sample_chunks(
        system, condition, seed=seed, ids=ids, batch_size=batch_size, precision=precision, **options
    )]  # fmt: skip
    return torch.cat(chunks) if chunks else torch.empty(0, *shape_of_sample(system, options))


def shape_of_sample(system: System, options: Mapping[str, Any]) -> tuple[int, ...]:
    """The target's shape, with as many frames as the option `length` says. ConfigError for a system without it."""
    shape, length = system.target_spec.shape, options.get("length") or 0
    if not length:
        return shape
    if not system.rolls:
        raise ConfigError(
            f"length={length}: {type(system).__name__} cannot; systems that go on frame by frame can (vpn)"
        )
    return (length, *shape[1:])


def sample_chunks(
    system: System,
    condition: Condition,
    *,
    seed: int,
    ids: Sequence[int],
    batch_size: int = 16,
    precision: str = "fp32",
    **options: Any,
) -> Iterator[tuple[slice, Tensor]]:
    """`sample_rows` piece by piece, for more samples than memory holds: (rows, their pixels) in order."""
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
    if len(condition) not in (0, len(ids)):
        raise ShapeError(
            f"the condition has {len(condition)} rows and there are {len(ids)} ids; give one id per row "
            "(Condition.repeat(n) makes n rows of each)"
        )
    shape = shape_of_sample(system, options)
    for start in range(0, len(ids), batch_size):
        rows = slice(start, min(start + batch_size, len(ids)))
        part = condition.index(rows) if len(condition) else condition
        # a context per chunk: between two chunks the caller may train, or sample something else
        with sampling(system, precision, stray=derive(seed, "stray", start)) as device:
            random = RowRandom(seed, ids[rows], device=device)
            pixels = system.sample(part.to(device), random=random, **options)
        yield rows, checked(pixels, (rows.stop - start, *shape))


def sample_streams(
    system: HasStreams,
    condition: Condition,
    *,
    seed: int,
    ids: Sequence[int],
    batch_size: int = 16,
    precision: str = "fp32",
) -> dict[str, Tensor]:
    """The parts of the samples that `sample_rows` gives for the same arguments, by name, float32 on the CPU."""
    assert isinstance(system, System)
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(ids), batch_size):
        rows = slice(start, min(start + batch_size, len(ids)))
        part = condition.index(rows) if len(condition) else condition
        with sampling(system, precision, stray=derive(seed, "stray", start)) as device:
            made = system.streams(part.to(device), random=RowRandom(seed, ids[rows], device=device))
        for name, pixels in made.items():
            parts.setdefault(name, []).append(checked(pixels, (rows.stop - start, *pixels.shape[1:])))
    return {name: torch.cat(found) for name, found in parts.items()}


@contextmanager
def sampling(system: nn.Module, precision: str = "fp32", stray: int = 0) -> Iterator[torch.device]:
    """Eval mode, no gradients, full precision and an isolated random state; everything is restored.

    `no_grad` and not `inference_mode`, because samplers that optimise at test time switch gradients on again.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}; sampling knows {', '.join(PRECISIONS)}")
    device = device_of_module(system)
    if precision == "fp16" and device.type != "cuda":
        raise ConfigError(f"precision fp16 needs a GPU, and the system is on {device}; use bf16 or fp32")
    modes = [(module, module.training) for module in system.modules()]
    cuda = [device] if device.type == "cuda" else []
    kind = torch.float16 if precision == "fp16" else torch.bfloat16
    with (
        torch.random.fork_rng(devices=cuda),
        torch.no_grad(),
        torch.autocast(device.type, dtype=kind, enabled=precision != "fp32"),
        # TF32 convolutions, the default on CUDA, keep 10 bits: enough to make samples depend on the batch size
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
    ):
        # a system must draw from `random`; should a layer draw from torch's own state, it at least repeats
        torch.manual_seed(stray)
        system.eval()
        try:
            yield device
        finally:
            for module, was_training in modes:
                module.training = was_training


def device_of_module(system: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; CPU without any."""
    return next((t.device for t in chain(system.parameters(), system.buffers())), torch.device("cpu"))


def checked(pixels: Tensor, expected: tuple[int, ...]) -> Tensor:
    """float32 on the CPU. Raises ShapeError for another shape and DivergedError for NaN or inf."""
    if tuple(pixels.shape) != expected:
        raise ShapeError(f"the system sampled shape {tuple(pixels.shape)}; its target asks for {expected}")
    out = pixels.float().cpu()
    if not bool(torch.isfinite(out).all()):
        raise DivergedError("the samples hold NaN or inf; the weights have diverged, use an earlier checkpoint")
    return out


def rows_of_rank(count: int, rank: int, world: int) -> range:
    """Positions that rank `rank` of `world` processes samples: rank, rank + world, ..."""
    return range(rank, count, world)


def sample_over(
    world: Gathering, system: System, condition: Condition, *, seed: int, ids: Sequence[int], **options: Any
) -> Tensor:
    """`sample_rows` shared out over all processes; every process returns all rows, in the order of `ids`.

    Rank r samples ids[r::world]. All ranks must call it with the same arguments, also those that get no row.
    """
    mine = list(rows_of_rank(len(ids), world.rank, world.world))
    part = condition.index(torch.tensor(mine, dtype=torch.int64)) if len(condition) else condition
    pixels = sample_rows(system, part, seed=seed, ids=[ids[i] for i in mine], **options)
    per_rank = -(-len(ids) // world.world)
    shape = pixels.shape[1:]
    padded = torch.zeros(per_rank, *shape)  # collectives need equal sizes
    padded[: len(pixels)] = pixels
    everything = world.gather(padded.to(world.device)).cpu()  # rank 0's rows, rank 1's rows, ...
    by_rank = everything.view(world.world, per_rank, *shape)
    return by_rank.transpose(0, 1).flatten(0, 1)[: len(ids)].contiguous()
