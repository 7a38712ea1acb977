"""What the engine adds to a training step: a tiny linear system with two phases, against a loop written by hand.

    python benchmarks/dispatch.py [--rounds 9] [--steps 300]

Both sides read the same loader, draw noise, compute the same two losses, run fused Adam twice and average the
generator's weights. Rounds alternate, so that a change of the machine's speed hits both; medians are compared.
Run it with OMP_NUM_THREADS=1. The engine should add at most 0.5 ms per step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from timing import seconds_per_step
from torch import Tensor, nn

from condgen.data.base import BatchDataset, RowDataset, batches
from condgen.engine.world import World
from condgen.rng import Random, StepRandom
from condgen.systems.base import Losses, Phase, System
from condgen.types import Batch, Condition, ConditionSpec, Sample, TargetSpec

SPEC, TARGET = ConditionSpec(), TargetSpec(1, 4, 4)


class Pixels(RowDataset):
    """64 grey pictures held in memory."""

    provides, target = SPEC, TARGET

    def __init__(self) -> None:
        self.pixels = torch.rand(64, 1, 4, 4) * 2 - 1

    def __len__(self) -> int:
        return 64

    def key(self, index: int) -> str:
        return str(index)

    def sample(self, index: int, random: torch.Generator | None) -> Sample:
        return Sample(str(index), self.pixels[index])


class Tiny(System):
    """One linear layer against another."""

    generates = ("generator",)

    def __init__(self, *, condition: ConditionSpec, target: TargetSpec) -> None:
        super().__init__(condition=condition, target=target)
        self.generator, self.discriminator = nn.Linear(8, 16), nn.Linear(16, 1)

    def phases(self) -> Sequence[Phase]:
        return [
            Phase("discriminator", self.discriminator_loss, ("discriminator",)),
            Phase("generator", self.generator_loss, ("generator",)),
        ]

    def discriminator_loss(self, batch: Batch, random: StepRandom) -> Losses:
        with torch.no_grad():
            fake = self.generator(random.randn(8))
        real = nn.functional.softplus(-self.discriminator(batch.target.flatten(1)))
        return {"loss": (real + nn.functional.softplus(self.discriminator(fake))).mean()}

    def generator_loss(self, batch: Batch, random: StepRandom) -> Losses:
        return {"loss": nn.functional.softplus(-self.discriminator(self.generator(random.randn(8)))).mean()}

    def sample(self, condition: Condition, *, random: Random) -> Tensor:
        return self.generator(random.randn(8)).view(-1, 1, 4, 4)


def bare(data: BatchDataset, steps: int) -> float:
    """Seconds per step of a loop written by hand."""
    generator, discriminator = nn.Linear(8, 16), nn.Linear(16, 1)
    adams = [torch.optim.Adam(m.parameters(), lr=1e-3, fused=True) for m in (discriminator, generator)]
    average = [p.detach().clone() for p in generator.parameters()]
    softplus, rows = nn.functional.softplus, data.batch_size
    began = time.perf_counter()
    for loaded in batches(data, start=0, stop=steps):
        real = loaded.batch.target.flatten(1)
        adams[0].zero_grad()
        with torch.no_grad():
            fake = generator(torch.randn(rows, 8))
        (softplus(-discriminator(real)) + softplus(discriminator(fake))).mean().backward()
        adams[0].step()
        adams[1].zero_grad()
        discriminator.requires_grad_(False)
        softplus(-discriminator(generator(torch.randn(rows, 8)))).mean().backward()
        discriminator.requires_grad_(True)
        adams[1].step()
        torch._foreach_lerp_(average, [p.detach() for p in generator.parameters()], 1e-3)
    return (time.perf_counter() - began) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    data = BatchDataset(Pixels(), SPEC, batch_size=16, seed=0)
    found: dict[str, list[float]] = {"bare": [], "engine": []}
    for number in range(given.rounds + 1):  # the first round warms up
        engine = seconds_per_step(Tiny(condition=SPEC, target=TARGET), data, given.steps, World())
        pair = bare(data, given.steps), engine
        if number:
            for name, seconds in zip(found, pair, strict=True):
                found[name].append(seconds * 1e3)
    middle = {name: statistics.median(values) for name, values in found.items()}
    added = statistics.median(e - b for b, e in zip(found["bare"], found["engine"], strict=True))
    for name, value in middle.items():
        print(f"{name:8s} {value:.3f} ms per step  ({min(found[name]):.3f} .. {max(found[name]):.3f})")
    print(f"added    {added:.3f} ms per step, ratio {middle['engine'] / middle['bare']:.2f} (allowed: 0.5 ms)")


if __name__ == "__main__":
    main()
