"""Training throughput of a text-to-image preset: the engine against a plain float32 eager loop of the same networks.

    python benchmarks/train.py [--preset paper small] [--batch 16] [--steps 6] [--rounds 5] [--json FILE]

"plain" is what a first version of such a loop looks like: float32, contiguous memory, Adam without fusing, and the
discriminator's gradients computed and thrown away in the generator's step. "engine" is condgen with
train.precision=auto. Rounds alternate, so that a change of the machine's speed hits both; the ratio is the median of
the ratios of each round. Peak memory is that of a process of its own for each side. The share of the peak counts the
FLOPs of one plain step (2 per multiply-add; the engine's step needs fewer, so its rate is an upper bound) against a
2048 x 2048 matrix product and a 3x3 convolution in the same number format, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import OmegaConf
from timing import seconds_per_step
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from condgen import registry
from condgen.data.base import BatchDataset, RowDataset
from condgen.engine.optim import OptimOptions
from condgen.engine.world import World
from condgen.rng import StepRandom
from condgen.systems.gan_cls import GanCls
from condgen.types import Batch, Condition, ConditionSpec, Sample, TargetSpec, Text, TextSpec

WIDTHS = {"paper": 1024, "small": 384}  # of the sentence vectors: char-CNN-RNN and MiniLM
TARGET = TargetSpec(3, 64, 64)


class Pictures(RowDataset):
    """256 random pictures held in memory."""

    target = TARGET

    def __init__(self) -> None:
        self.provides = ConditionSpec()
        self.pixels = torch.randint(0, 256, (256, 3, 64, 64), dtype=torch.uint8)

    def __len__(self) -> int:
        return 256

    def key(self, index: int) -> str:
        return str(index)

    def sample(self, index: int, random: torch.Generator | None) -> Sample:
        return Sample(str(index), self.pixels[index])


def make(preset: str) -> tuple[GanCls, OptimOptions]:
    file = OmegaConf.to_container(OmegaConf.load(registry.path("configs/system", "gan_cls", ".yaml")))
    chosen = file["presets"][preset]  # type: ignore[index,call-overload]
    adam = chosen["optim"]["default"]
    torch.manual_seed(0)
    system = GanCls(condition=ConditionSpec(text=TextSpec(pooled=WIDTHS[preset])), target=TARGET, **chosen["system"])
    return system, OptimOptions(lr=adam["lr"], betas=tuple(adam["betas"]))


def batch(preset: str, rows: int) -> Batch:
    draws = torch.Generator().manual_seed(1)
    text = Text(pooled=torch.randn(rows, WIDTHS[preset], generator=draws))
    return Batch(torch.rand(rows, 3, 64, 64, generator=draws) * 2 - 1, Condition(text=text))


def plain_step(system: GanCls, adams: list[torch.optim.Optimizer], data: Batch, number: int) -> None:
    random = StepRandom(0, number, rows=len(data))
    for adam, loss in zip(adams, (system.discriminator_loss, system.generator_loss), strict=True):
        for each in adams:
            each.zero_grad()
        loss(data, random)["loss"].backward()
        adam.step()


def plain(preset: str, rows: int, steps: int) -> float:
    """Seconds per step."""
    system, options = make(preset)
    adams: list[torch.optim.Optimizer] = [
        torch.optim.Adam(part.parameters(), lr=options.lr, betas=options.betas, foreach=False, fused=False)
        for part in (system.discriminator, system.generator)
    ]
    data = batch(preset, rows)
    plain_step(system, adams, data, 0)
    began = time.perf_counter()
    for number in range(steps):
        plain_step(system, adams, data, number)
    return (time.perf_counter() - began) / steps


def engine(preset: str, rows: int, steps: int) -> float:
    """Seconds per step."""
    system, options = make(preset)
    text = batch(preset, rows).condition.text
    assert text is not None
    data = BatchDataset(Pictures(), ConditionSpec(), batch_size=rows, seed=0)
    world = World.start()
    return seconds_per_step(
        system, data, steps, world, {"default": options},
        prepare=lambda b: Batch(b.target, Condition(text=text), b.keys),
    )  # fmt: skip


def flops(preset: str, rows: int) -> float:
    """GFLOP of one plain step."""
    system, _ = make(preset)
    data = batch(preset, rows)
    adams: list[torch.optim.Optimizer] = [
        torch.optim.SGD(part.parameters(), lr=0.0) for part in (system.discriminator, system.generator)
    ]
    with FlopCounterMode(display=False) as counter:
        plain_step(system, adams, data, 0)
    return counter.get_total_flops() / 1e9


def peak_rate(dtype: torch.dtype) -> dict[str, float]:
    """GFLOP/s of a 2048 x 2048 matrix product and of a 3x3 convolution (16, 256, 32, 32), channels last."""
    a = torch.randn(2048, 2048).to(dtype)
    x = torch.randn(16, 256, 32, 32).to(dtype).contiguous(memory_format=torch.channels_last)
    w = torch.randn(256, 256, 3, 3).to(dtype).contiguous(memory_format=torch.channels_last)

    def best(work: Callable[[], Tensor]) -> float:
        times = []
        for _ in range(8):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        return min(times)

    gemm = 2 * 2048**3 / best(lambda: a @ a) / 1e9
    conv = 2 * 16 * 32 * 32 * 256 * 256 * 9 / best(lambda: torch.nn.functional.conv2d(x, w, padding=1)) / 1e9
    return {"gemm": gemm, "conv": conv}


def peak_mib(side: str, preset: str, rows: int) -> float:
    """Peak memory of a process that does nothing else."""
    words = [sys.executable, __file__, "--side", side, "--preset", preset, "--batch", str(rows), "--steps", "2"]
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def own_peak_mib() -> float:
    """VmHWM: ru_maxrss would start from what the parent had in memory when it forked."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def measure(preset: str, rows: int, steps: int, rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {"plain": [], "engine": []}
    for number in range(rounds + 1):  # the first round warms up
        pair = {"plain": plain(preset, rows, steps), "engine": engine(preset, rows, steps)}
        for name, seconds in pair.items():
            times[name] += [seconds] if number else []
    work = flops(preset, rows)
    out = {"batch": rows, "gflop_per_step": work}
    for name, values in times.items():
        middle = statistics.median(values)
        peak = peak_rate(torch.float32 if name == "plain" else dtype_of_engine())
        out |= {
            f"{name}_ms": 1e3 * middle,
            f"{name}_images_per_second": rows / middle,
            f"{name}_peak_mib": peak_mib(name, preset, rows),
            f"{name}_gflops": work / middle,
            f"{name}_share_of_gemm": work / middle / peak["gemm"],
            f"{name}_share_of_conv": work / middle / peak["conv"],
        }
    out["speedup"] = statistics.median(p / e for p, e in zip(times["plain"], times["engine"], strict=True))
    return out


def dtype_of_engine() -> torch.dtype:
    return torch.bfloat16 if World.start().precision == "bf16" else torch.float32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["paper", "small"], choices=list(WIDTHS))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--side", choices=["plain", "engine"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_flush_denormal(True)  # both sides: a saturated critic would otherwise slow the plain loop down
    if given.side:
        {"plain": plain, "engine": engine}[given.side](given.preset[0], given.batch, given.steps)
        print(own_peak_mib())
        return
    found: dict[str, object] = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": World.start().precision,
    }
    for preset in given.preset:
        found[preset] = row = measure(preset, given.batch, given.steps, given.rounds)
        print(f"\n{preset}: batch {given.batch}, {row['gflop_per_step']:.0f} GFLOP a step")
        for name in ("plain", "engine"):
            print(
                f"  {name:7s} {row[f'{name}_ms']:8.1f} ms  {row[f'{name}_images_per_second']:7.1f} images/s  "
                f"peak {row[f'{name}_peak_mib']:6.0f} MiB  {row[f'{name}_gflops']:5.0f} GFLOP/s = "
                f"{100 * row[f'{name}_share_of_gemm']:3.0f} % of GEMM, {100 * row[f'{name}_share_of_conv']:3.0f} % of conv"  # noqa: E501
            )
        print(f"  speed-up {row['speedup']:.2f}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
