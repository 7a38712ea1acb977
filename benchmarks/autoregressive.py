"""Cached sampling of PixelCNN++ against the plain loop that runs the whole network for every pixel, in one process.

    python benchmarks/autoregressive.py                            # presets small and paper, batch 1 and 16
    python benchmarks/autoregressive.py --preset paper --batch 1 --rows 32 --precision float64
    python benchmarks/autoregressive.py --train                    # one training step instead: seconds, peak memory
    python benchmarks/autoregressive.py --json FILE                # also writes the figures; about a minute, two cores

32 x 32 RGB, untrained. The plain loop is timed over a few pixel steps and multiplied by 1,024. The cached sampler is
timed over whole rows (a multiple of 4, the period of its coarsest scale; --rows 32 draws the whole picture), with
folding and allocation, drawing included. Plain steps and cached rows alternate; the ratio is that of the medians.
`logit error` is the largest difference between the parameters of both, given the same pixels.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from condgen import registry
from condgen.losses.logistic_mixture import mixture_noise, mixture_sample
from condgen.nn.incremental import PlainSteps
from condgen.rng import StepRandom
from condgen.systems.pixelcnn import PixelCnn
from condgen.types import Batch, ConditionSpec, TargetSpec

SIDE = 32


def build(preset: str, **options: object) -> PixelCnn:
    file = OmegaConf.to_container(OmegaConf.load(registry.path("configs/system", "pixelcnn", ".yaml")))
    assert isinstance(file, dict)
    torch.manual_seed(0)
    given = {**file.get("system", {}), **file["presets"][preset]["system"], **options}
    return PixelCnn(condition=ConditionSpec(), target=TargetSpec(3, SIDE, SIDE), **given)


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def peak() -> float:
    """MiB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@torch.inference_mode()
def measure(system: PixelCnn, batch: int, rows: int, plain_steps: int, rounds: int) -> dict[str, float]:
    net = system.network.net
    kind = next(net.parameters()).dtype
    noise = mixture_noise(torch.rand(batch, system.mixtures + 3).to(kind), system.mixtures)
    canvas = torch.zeros(batch, 3, SIDE, SIDE, dtype=kind)
    plain = PlainSteps(net, canvas, 1, None, [])
    found: list[Tensor] = []

    def plain_step() -> None:
        plain.put(0, 0, mixture_sample(plain.parameters(0, 0), *noise))

    def cached_rows() -> None:
        steps = net.steps(batch, (SIDE, SIDE), None, [])
        started = time.perf_counter()
        found.clear()
        for row in range(rows):
            steps.start_row(row)
            for column in range(SIDE):
                found.append(steps.parameters(column, 0).clone())
                value = mixture_sample(found[-1], *noise)
                canvas[:, :, row, column] = value
                steps.put(column, 0, value)
        pixels.append((time.perf_counter() - started) * SIDE / rows)

    pixels: list[float] = []
    plain_step()  # not counted
    times: dict[str, list[float]] = {"plain": [], "cached": []}
    for _ in range(rounds):
        times["plain"].append(seconds(lambda: [plain_step() for _ in range(plain_steps)]) / plain_steps)
        whole = seconds(cached_rows)
        times["cached"].append(whole - pixels[-1] * rows / SIDE + pixels[-1])
    known = torch.stack(found, 2).unflatten(2, (rows, SIDE))
    error = (net(canvas, None, [])[:, :, :rows] - known).abs().max().item()
    step, picture = (statistics.median(times[name]) for name in ("plain", "cached"))
    return {"step": step, "plain": step * SIDE**2, "cached": picture, "ratio": step * SIDE**2 / picture, "error": error}


def train_step(preset: str, batch: int, checkpoint: bool) -> tuple[float, float]:
    """Seconds of the second training step, and peak MiB of the process."""
    system = build(preset, checkpoint_activations=checkpoint, data_init=False).train()
    optimizer = torch.optim.Adam(system.parameters(), 1e-3, fused=True)
    data = Batch(torch.randint(0, 256, (batch, 3, SIDE, SIDE)) / 127.5 - 1)

    def step() -> None:
        optimizer.zero_grad()
        system.nll_loss(data, StepRandom(0, rows=batch))["loss"].backward()
        optimizer.step()

    step()
    return seconds(step), peak()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["small", "paper"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--plain-steps", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=["float32", "float64"], default="float32")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--checkpoint", action="store_true", help="with --train: checkpoint_activations")
    parser.add_argument("--threads", type=int, help="torch's threads; the default is torch's")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.set_flush_denormal(True)
    out: dict[str, object] = {"torch": torch.__version__, "threads": torch.get_num_threads(), **vars(given)}
    out = {name: value for name, value in out.items() if name != "json" and value is not None}
    kind = torch.float64 if given.precision == "float64" else torch.float32
    print(f"{torch.get_num_threads()} CPU threads, {given.precision}, torch {torch.__version__}")
    print(
        f"{'preset':<8}{'batch':>6}{'plain step':>12}{'plain':>10}{'cached':>10}{'ratio':>8}"
        f"{'logit error':>13}{'peak':>10}"
    )
    for preset in given.preset:
        for batch in given.batch:
            if given.train:
                took, held = train_step(preset, batch, given.checkpoint)
                out[f"{preset} batch {batch}"] = {"train_step_s": took, "peak_mib": held}
                print(f"{preset:<8}{batch:>6}   training step {took:.2f} s, peak {held:.0f} MiB", flush=True)
                continue
            got = measure(build(preset).to(kind).eval(), batch, given.rows, given.plain_steps, given.rounds)
            out[f"{preset} batch {batch}"] = {**got, "peak_mib": peak()}
            print(
                f"{preset:<8}{batch:>6}{got['step'] * 1000:>9.0f} ms{got['plain']:>8.1f} s{got['cached']:>8.2f} s"
                f"{got['ratio']:>8.0f}{got['error']:>13.1e}{peak():>6.0f} MiB",
                flush=True,
            )
    if given.json:
        given.json.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
