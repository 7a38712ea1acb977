"""pix2pix at 256 px: training step and inference of the engine against the public PyTorch networks, in one run.

    python benchmarks/pix2pix.py [--public DIR] [--batch 1 4] [--steps 4] [--rounds 7] [--json FILE]

DIR holds models/networks.py of taesungp/contrastive-unpaired-translation (also the networks of the PyTorch pix2pix;
built here with no_antialias and no_antialias_up, which is the published form). The public step is written out below:
forward, D, G, as `optimize_parameters` of the PyTorch pix2pix, float32 with the default Adam. Without --public condgen
is timed alone. "fp32" and "bf16" are `engine.trainer.Trainer` with the paper's preset at that precision, channels
last, fused Adam; "fp32" inference is `sample_rows`. Rounds alternate all sides, so that a change of the machine's speed
hits them alike; ratios are medians of the ratios of each round. Peak memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from timing import seconds_per_step
from torch import Tensor, nn
from torch.nn import functional as F

from condgen import registry
from condgen.data.base import BatchDataset, RowDataset
from condgen.engine.optim import OptimOptions
from condgen.engine.sample import sample_rows
from condgen.engine.world import World
from condgen.systems.pix2pix import Pix2Pix
from condgen.types import Condition, ConditionSpec, Image, ImageSpec, Sample, TargetSpec

SIDE = 256
OURS = ("fp32", "bf16")
RESULTS = Path(__file__).parent / "results"


class RandomPairs(RowDataset):
    """16 random pairs held in memory."""

    target = TargetSpec(3, SIDE, SIDE)
    provides = ConditionSpec(image=ImageSpec(3, SIDE, SIDE))

    def __init__(self) -> None:
        self.pixels = torch.randint(0, 256, (17, 3, SIDE, SIDE), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.pixels) - 1

    def key(self, index: int) -> str:
        return str(index)

    def sample(self, index: int, random: torch.Generator | None) -> Sample:
        return Sample(str(index), self.pixels[index], image=self.pixels[index + 1])


# condgen


def preset() -> Any:
    """The published setting."""
    file: Any = OmegaConf.to_container(OmegaConf.load(registry.path("configs/system", "pix2pix", ".yaml")))
    return file["presets"]["paper"]


def system() -> Pix2Pix:
    torch.manual_seed(0)
    return Pix2Pix(condition=RandomPairs.provides, target=RandomPairs.target, **preset()["system"])


def our_step(precision: str, rows: int, steps: int) -> float:
    """Seconds per training step of the engine's own loop."""
    world = World.start(precision=precision)
    data = BatchDataset(RandomPairs(), RandomPairs.provides, batch_size=rows, seed=0)
    optim = {"default": OptimOptions(lr=2e-4, betas=(0.5, 0.999))}
    decay = preset()["train"]["ema_decay"]
    return seconds_per_step(system(), data, steps, world, optim, ema_decay=decay)


def our_inference(precision: str, rows: int, steps: int) -> float:
    """Seconds per batch."""
    world = World.start(precision=precision)
    net = system()
    world.place(net)
    asked = Condition(image=Image(torch.rand(rows, 3, SIDE, SIDE) * 2 - 1))

    def once() -> None:
        sample_rows(net, asked, seed=0, ids=range(rows), batch_size=rows, precision=precision)

    return timed(once, steps)


# the public networks


def public_networks(folder: Path) -> types.ModuleType:
    """models/networks.py as a module. Its StyleGAN2 parts, which pix2pix does not use, are left out."""
    package = types.ModuleType("public_models")
    package.__path__ = [str(folder / "models")]
    absent: Any = types.ModuleType("public_models.stylegan_networks")
    for name in ("StyleGAN2Discriminator", "StyleGAN2Generator", "TileStyleGAN2Discriminator"):
        setattr(absent, name, nn.Module)
    sys.modules |= {"public_models": package, "public_models.stylegan_networks": absent}
    spec = importlib.util.spec_from_file_location("public_models.networks", folder / "models" / "networks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Public:
    """The networks of the PyTorch pix2pix and its step."""

    def __init__(self, folder: Path) -> None:
        networks = public_networks(folder)
        torch.manual_seed(0)
        norm = partial(nn.BatchNorm2d, affine=True, track_running_stats=True)
        self.generator = networks.UnetGenerator(3, 3, 8, 64, norm_layer=norm, use_dropout=True)
        self.critic = networks.NLayerDiscriminator(6, 64, n_layers=3, norm_layer=norm, no_antialias=True)
        for part in (self.generator, self.critic):
            networks.init_weights(part, "normal", 0.02)
        make = partial(torch.optim.Adam, lr=2e-4, betas=(0.5, 0.999))
        self.generator_adam, self.critic_adam = (make(p.parameters()) for p in (self.generator, self.critic))

    def step(self, source: Tensor, real: Tensor) -> None:
        """forward, backward_D, backward_G."""
        fake = self.generator(source)
        self.critic.requires_grad_(True)
        self.critic_adam.zero_grad()
        loss_fake = self._vanilla(torch.cat((source, fake), 1).detach(), 0.0)
        loss_real = self._vanilla(torch.cat((source, real), 1), 1.0)
        (0.5 * (loss_fake + loss_real)).backward()
        self.critic_adam.step()
        self.critic.requires_grad_(False)
        self.generator_adam.zero_grad()
        loss_gan = self._vanilla(torch.cat((source, fake), 1), 1.0)
        loss_l1 = 100 * F.l1_loss(fake, real)
        (loss_gan + loss_l1).backward()
        self.generator_adam.step()

    def _vanilla(self, pictures: Tensor, wanted: float) -> Tensor:
        logits = self.critic(pictures)
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, wanted))


def public_step(folder: Path, rows: int, steps: int) -> float:
    model = Public(folder)
    source, real = (torch.rand(rows, 3, SIDE, SIDE) * 2 - 1 for _ in range(2))
    return timed(lambda: model.step(source, real), steps)


def public_inference(folder: Path, rows: int, steps: int) -> float:
    model, source = Public(folder), torch.rand(rows, 3, SIDE, SIDE) * 2 - 1
    with torch.no_grad():
        return timed(lambda: model.generator(source), steps)


def timed(act: Callable[[], Any], steps: int) -> float:
    """Seconds per call, the first one left out."""
    act()
    began = time.perf_counter()
    for _ in range(steps):
        act()
    return (time.perf_counter() - began) / steps


# measuring


def run(work: str, side: str, rows: int, steps: int, public: Path | None) -> float:
    if side == "public":
        assert public is not None
        return (public_step if work == "training" else public_inference)(public, rows, steps)
    return (our_step if work == "training" else our_inference)(side, rows, steps)


def peak_mib(work: str, side: str, rows: int, public: Path | None) -> float:
    """Peak memory of a process that does nothing else."""
    words = [sys.executable, __file__, "--alone", work, side, "--batch", str(rows), "--steps", "2"]
    words += ["--public", str(public)] if public else []
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def own_peak_mib() -> float:
    """VmHWM: ru_maxrss would start from what the parent had in memory when it forked."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def measure(work: str, rows: int, steps: int, rounds: int, public: Path | None) -> dict[str, Any]:
    sides = (("public",) if public else ()) + OURS
    times: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in sides if number % 2 == 0 else sides[::-1]:
            times[side].append(run(work, side, rows, steps, public))
    out: dict[str, Any] = {}
    for side, values in times.items():
        middle = statistics.median(values)
        out[side] = {
            "ms": 1e3 * middle, "images_per_second": rows / middle, "peak_mib": peak_mib(work, side, rows, public),
            "rounds_ms": [round(1e3 * value, 1) for value in values],
        }  # fmt: skip
        for base in ("public", "fp32"):
            if base in times and base != side:
                pairs = zip(times[base], values, strict=True)
                out[side][f"times_{base}"] = statistics.median(one / two for one, two in pairs)
    return out


def machine() -> str:
    """The processor's name."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--public", type=Path, help="folder with models/networks.py")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=4, help="timed calls of each side in a round (4)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--work", nargs="+", default=["training", "inference"], choices=["training", "inference"])
    parser.add_argument("--json", type=Path, default=RESULTS / "pix2pix.json", help="where the figures go")
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_flush_denormal(True)  # all sides: a saturated critic would otherwise slow the public loop down
    if given.alone:
        run(*given.alone, given.batch[0], given.steps, given.public)
        print(own_peak_mib())
        return
    found: dict[str, Any] = {
        "machine": machine(), "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "load_before": os.getloadavg()[0], "rounds": given.rounds, "steps": given.steps, "side": SIDE,
    }  # fmt: skip
    for work in given.work:
        for rows in given.batch:
            found[f"{work}_batch_{rows}"] = part = measure(work, rows, given.steps, given.rounds, given.public)
            print(f"\n{work}, batch {rows}")
            for side, row in part.items():
                ratios = "  ".join(f"{k[6:]} x {v:.2f}" for k, v in row.items() if k.startswith("times_"))
                print(
                    f"  {side:7s} {row['ms']:8.1f} ms  {row['images_per_second']:6.2f} images/s  "
                    f"peak {row['peak_mib']:6.0f} MiB  {ratios}"
                )
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
