"""Cached sampling of video pixel networks against the plain loop that runs the decoder for every pixel, in one process.

    python benchmarks/video_sampling.py --json benchmarks/results/video_sampling.json  # small preset, 32 x 32
    python benchmarks/video_sampling.py --batch 32 --precision float64 --channels 3
    python benchmarks/video_sampling.py --preset paper --side 64 --rows 4 --rounds 1

One frame, untrained, its context known to both: the plain loop runs no encoder and no LSTM again. It is timed over a
few pixel steps and multiplied by the draws of a frame. The cached sampler is timed over whole rows, with folding of the
weights and allocation; --rows 0 draws the whole frame. Plain steps and cached rows alternate; the ratio is that of the
medians. `error` is the largest difference between the parameters of both, given the same pixels.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from condgen import registry
from condgen.nn.incremental import PlainSteps
from condgen.systems.vpn import Vpn
from condgen.types import ConditionSpec, FramesSpec, TargetSpec


def build(preset: str, side: int, channels: int, **options: object) -> Vpn:
    file = OmegaConf.to_container(OmegaConf.load(registry.path("configs/system", "vpn", ".yaml")))
    assert isinstance(file, dict)
    torch.manual_seed(0)
    given = {**file.get("system", {}), **file["presets"][preset]["system"], **options}
    spec = ConditionSpec(frames=FramesSpec(5, channels, side, side))
    return Vpn(condition=spec, target=TargetSpec(channels, side, side, 5), **given)


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


@torch.inference_mode()
def measure(system: Vpn, batch: int, rows: int, plain_steps: int, rounds: int) -> dict[str, float]:
    decoder, draws = system.network.decoder, system.draws
    like = next(decoder.parameters())
    _, height, width = system.target_spec.shape[1:]
    rows = rows or height
    context = torch.randn(batch, system.network.lstm.hidden, height, width).to(like)
    uniform = torch.rand(width, draws, batch, 1).to(like)
    canvas = like.new_zeros(batch, draws, height, width)
    plain = PlainSteps(decoder, canvas, draws, None, [context])  # type: ignore[arg-type]
    heat = 1.0
    found: list[Tensor] = []
    starts: list[float] = []

    def plain_step() -> None:
        plain.put(0, 0, system._value(plain.parameters(0, 0), uniform[0, 0], heat))

    def cached_rows() -> None:
        begin = time.perf_counter()
        steps = decoder.steps(batch, (height, width), None, [context])  # type: ignore[operator, union-attr]
        starts.append(time.perf_counter() - begin)
        found.clear()
        for row in range(rows):
            steps.start_row(row)
            for column in range(width):
                for draw in range(draws):
                    found.append(steps.parameters(column, draw).clone())
                    value = system._value(found[-1], uniform[column, draw], heat)
                    canvas[:, draw : draw + 1, row, column] = value
                    steps.put(column, draw, value)

    plain_step()  # not counted
    times: dict[str, list[float]] = {"plain": [], "cached": []}
    for _ in range(rounds):
        times["plain"].append(seconds(lambda: [plain_step() for _ in range(plain_steps)]) / plain_steps)
        whole = seconds(cached_rows)
        times["cached"].append(starts[-1] + (whole - starts[-1]) * height / rows)
    known = torch.stack(found, -1).unflatten(-1, (rows, width, draws))  # (B, P, rows, W, C)
    there = decoder(canvas, None, [context])[:, :, :rows].unflatten(1, (-1, draws))
    error = (there.permute(0, 1, 3, 4, 2) - known).abs().max().item()
    step, frame = statistics.median(times["plain"]), statistics.median(times["cached"])
    whole = step * height * width * draws
    return {"step": step, "plain": whole, "cached": frame, "ratio": whole / frame, "error": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--decoder", nargs="+", default=["masked", "two-stack"])
    parser.add_argument("--output", choices=["sigmoid", "softmax"], default=None)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--width", type=int, default=0, help="0 = the preset's; RGB needs a multiple of 3")
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--plain-steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=["float32", "float64"], default="float32")
    parser.add_argument("--json", type=Path, default=None, help="where the figures go")
    given = parser.parse_args()
    found: dict[str, Any] = {
        "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "load_before": os.getloadavg()[0], "precision": given.precision, "preset": given.preset, "rounds": given.rounds,
        "frame": [given.channels, given.side, given.side], "decoders": {},
    }  # fmt: skip
    kind = torch.float64 if given.precision == "float64" else torch.float32
    options = {"width": given.width} if given.width else {}
    options |= {"output": given.output} if given.output else {}
    print(f"{torch.get_num_threads()} CPU threads, {given.precision}, torch {torch.__version__}, preset {given.preset}")
    print(f"{'decoder':<12}{'batch':>6}{'plain step':>13}{'plain frame':>13}{'cached':>10}{'ratio':>8}{'error':>10}")
    for decoder in given.decoder:
        system = build(given.preset, given.side, given.channels, decoder=decoder, **options).to(kind).eval()
        for batch in given.batch:
            got = measure(system, batch, given.rows, given.plain_steps, given.rounds)
            found["decoders"].setdefault(decoder, {})[f"batch {batch}"] = {
                **{f"{name}_seconds": got[name] for name in ("step", "plain", "cached")},
                "ratio": got["ratio"], "largest_difference": got["error"],
            }  # fmt: skip
            print(
                f"{decoder:<12}{batch:>6}{got['step'] * 1000:>10.1f} ms{got['plain']:>11.1f} s{got['cached']:>8.2f} s"
                f"{got['ratio']:>8.0f}{got['error']:>10.1e}",
                flush=True,
            )
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
