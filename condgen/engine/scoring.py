"""Looking at a system in mid-training without changing the training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from condgen.engine.ema import Ema
from condgen.engine.world import World


@contextlib.contextmanager
def scoring(system: nn.Module, ema: Ema, world: World) -> Iterator[None]:
    """Averaged weights, eval mode, a random state of its own; everything as before afterwards."""
    modes = [(module, module.training) for module in system.modules()]
    devices = [world.device] if world.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), ema.applied(system), averaged_statistics(system, world):
        system.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextlib.contextmanager
def averaged_statistics(system: nn.Module, world: World) -> Iterator[None]:
    """Running statistics of batch norm are the mean over processes inside this block."""
    held: list[tuple[Tensor, Tensor]] = []
    if world.world > 1:
        for module in system.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for buffer in (module.running_mean, module.running_var):
                    if buffer is not None:
                        held.append((buffer, buffer.clone()))
                        buffer.copy_(world.average(buffer))
    try:
        yield
    finally:
        for buffer, own in held:
            buffer.copy_(own)
