"""VGAN's training step at 64 x 64 x 32: the engine against a public PyTorch implementation, in one run.

    python benchmarks/video.py [--public DIR] [--batch 4] [--steps 2] [--rounds 3] [--json FILE]

DIR holds model.py and ops.py of batsa003/videogan: the frame-conditioned networks with the published parameters. Only
its networks are used (its loader is Python 2); its step is written out below, float32 with the default Adam: D on real
and generated clips, then G on cross-entropy and 10 times the first frame's L1. "public" does what its main.py does: G
runs for each of the two updates, D's update goes back through G, G's update makes gradients of D. In "public-lean"
these are mended: one generated batch, detached for D. Without --public condgen is timed alone.

"fp32" and "bf16" are `engine.trainer.Trainer` with the paper's preset at that precision, weights and clips in
channels_last_3d, fused Adam; "fp32-contiguous" and "bf16-contiguous" are the same without that layout. Rounds alternate
all sides; ratios are medians of the ratios of each round. Denormals are flushed on every side.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timing import seconds_per_step
from torch import Tensor
from torch.nn import functional as F

from condgen.data.base import BatchDataset, RowDataset
from condgen.engine.optim import OptimOptions
from condgen.engine.world import World
from condgen.systems.vgan import Vgan
from condgen.types import ConditionSpec, FramesSpec, Sample, TargetSpec

SIDE, FRAMES = 64, 32
PUBLIC = ("public", "public-lean")
OURS = ("fp32", "bf16", "fp32-contiguous", "bf16-contiguous")
RESULTS = Path(__file__).parent / "results"


class RandomClips(RowDataset):
    """Eight random clips held in memory, each with its first frame."""

    target = TargetSpec(3, SIDE, SIDE, FRAMES)
    provides = ConditionSpec(frames=FramesSpec(1, 3, SIDE, SIDE))

    def __init__(self) -> None:
        self.pixels = torch.randint(0, 256, (8, *self.target.shape), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def key(self, index: int) -> str:
        return str(index)

    def sample(self, index: int, random: torch.Generator | None) -> Sample:
        return Sample(str(index), self.pixels[index], frames=self.pixels[index, :1])


def our_step(side: str, rows: int, steps: int) -> float:
    precision, _, layout = side.partition("-")
    world = replace(World.start(device="cpu", precision=precision), channels_last=layout != "contiguous")
    torch.manual_seed(0)
    system = Vgan(condition=RandomClips.provides, target=RandomClips.target)
    data = BatchDataset(RandomClips(), RandomClips.provides, batch_size=rows, seed=0)
    return seconds_per_step(system, data, steps, world, {"default": OptimOptions(lr=2e-4, betas=(0.5, 0.999))})


class Public:
    """The public networks and a step like theirs."""

    def __init__(self, folder: Path) -> None:
        sys.path.insert(0, str(folder))
        networks: Any = importlib.import_module("model")
        torch.manual_seed(0)
        self.generator, self.critic = networks.Generator(), networks.Discriminator()
        self.generator_adam = torch.optim.Adam(self.generator.parameters(), 2e-4, (0.5, 0.999))
        self.critic_adam = torch.optim.Adam(self.critic.parameters(), 2e-4, (0.5, 0.999))

    def step(self, clips: Tensor, lean: bool) -> None:
        """clips (B, 3, T, H, W)."""
        ones, zeros = (torch.full((len(clips),), value, dtype=torch.int64) for value in (1, 0))
        first = clips[:, :, :1]
        self._clear()
        fake = self.generator(first)
        seen = fake.detach() if lean else fake
        loss = F.cross_entropy(self.critic(clips), ones) + F.cross_entropy(self.critic(seen), zeros)
        loss.backward()
        self.critic_adam.step()
        self._clear()
        fake = fake if lean else self.generator(first)
        loss = F.cross_entropy(self.critic(fake), ones) + 10 * (fake[:, :, :1] - first).abs().mean()
        loss.backward()
        self.generator_adam.step()

    def _clear(self) -> None:
        self.generator.zero_grad()
        self.critic.zero_grad()


def public_step(folder: Path, rows: int, steps: int, lean: bool) -> float:
    model, clips = Public(folder), torch.rand(rows, 3, FRAMES, SIDE, SIDE) * 2 - 1
    model.step(clips, lean)
    began = time.perf_counter()
    for _ in range(steps):
        model.step(clips, lean)
    return (time.perf_counter() - began) / steps


def measure(rows: int, steps: int, rounds: int, public: Path | None, sides: tuple[str, ...]) -> dict[str, Any]:
    names = (PUBLIC if public else ()) + sides
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            if name in PUBLIC:
                assert public is not None
                times[name].append(public_step(public, rows, steps, name == "public-lean"))
            else:
                times[name].append(our_step(name, rows, steps))
            torch.set_flush_denormal(True)  # closing a world switches it off again
    out: dict[str, Any] = {}
    for name, values in times.items():
        middle = statistics.median(values)
        out[name] = {"seconds": middle, "clips_per_second": rows / middle, "rounds": [round(v, 3) for v in values]}
        for base in (*PUBLIC, "fp32"):
            if base in times and base != name:
                ratios = [a / b for a, b in zip(times[base], values, strict=True)]
                out[name][f"times_{base}"] = statistics.median(ratios)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--public", type=Path, help="folder with model.py and ops.py")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of each side in a round (2)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", default=list(OURS), choices=OURS)
    parser.add_argument("--json", type=Path, default=RESULTS / "video.json", help="where the figures go")
    given = parser.parse_args()
    torch.set_flush_denormal(True)  # all sides: a saturated critic would otherwise slow the public loop down
    found: dict[str, Any] = {
        "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "load_before": os.getloadavg()[0], "rounds": given.rounds, "steps": given.steps, "batch": given.batch,
        "clip": [FRAMES, 3, SIDE, SIDE],
    }  # fmt: skip
    found["training"] = part = measure(given.batch, given.steps, given.rounds, given.public, tuple(given.sides))
    for name, row in part.items():
        ratios = "  ".join(f"{k[6:]} x {v:.2f}" for k, v in row.items() if k.startswith("times_"))
        print(f"{name:16s} {row['seconds']:7.2f} s  {row['clips_per_second']:6.2f} clips/s  {ratios}")
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
