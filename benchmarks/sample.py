"""Images per second of sampling, for each batch size and precision.

    python benchmarks/sample.py runs/NAME                     # a trained run, an export or owner/name on the Hub
    python benchmarks/sample.py --system gan_cls --size 64    # untrained, default options, text of 384 numbers
    python benchmarks/sample.py runs/NAME --batch 1 16 64 --precision fp32 bf16 --device cuda

Conditions are random values of the right shape: text encoding, drawing and writing are not timed.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from condgen import registry
from condgen.inference import prompt
from condgen.inference.export import keep_generating
from condgen.inference.sample import device_of_module, sample_rows
from condgen.pipeline import choose_device, load
from condgen.systems.base import System
from condgen.types import Condition, ConditionSpec, TargetSpec, TextSpec


def random_condition(spec: ConditionSpec, rows: int) -> Condition:
    """Every field of `spec` with random values in range."""
    random = torch.Generator().manual_seed(0)
    values = {}
    if spec.label is not None:
        values["label"] = torch.randint(spec.label.num_classes, (rows,), generator=random)
    if spec.text is not None:
        values["text"] = "a benchmark"
    if spec.boxes is not None:
        box = [0.2, 0.2, 0.8, 0.8] + ([0] if spec.boxes.num_classes else [])
        values["boxes"] = torch.tensor(box).expand(rows, 1, -1)
    if spec.keypoints is not None:
        values["keypoints"] = torch.rand(rows, spec.keypoints.num_points, 2, generator=random)
    for name in ("image", "frames"):
        field = getattr(spec, name)
        if field is not None:
            shape = (field.channels, field.height, field.width)
            shape = (field.frames, *shape) if name == "frames" else shape
            values[name] = torch.rand(rows, *shape, generator=random) * 2 - 1
    made = prompt.build_condition(spec, values) if values else Condition()
    made = made.repeat(rows) if len(made) == 1 else made
    if spec.text is None:
        return made
    text = type(made.text)(
        pooled=torch.randn(rows, spec.text.pooled, generator=random) if spec.text.pooled else None,
        tokens=torch.randn(rows, spec.text.length, spec.text.tokens, generator=random) if spec.text.tokens else None,
        mask=torch.ones(rows, spec.text.length, dtype=torch.bool) if spec.text.tokens else None,
    )
    return Condition(**{**dict(made.items()), "text": text})


def untrained(name: str, size: int) -> System:
    """A system with its default options, made for pictures from pooled text."""
    torch.manual_seed(0)
    cls = registry.load("systems", name, System)
    system: System = cls(condition=ConditionSpec(text=TextSpec(pooled=384)), target=TargetSpec(3, size, size))
    keep_generating(system)
    return system.eval()


def measure(system: System, batch: int, precision: str, seconds: float) -> float:
    """Images per second: the median over repeats that fill about `seconds`, after one that is not counted."""
    rows = max(batch, 16)
    condition = random_condition(system.condition_spec, rows)
    rates: list[float] = []
    started = time.perf_counter()
    while len(rates) < 4 or time.perf_counter() - started < seconds:
        begin = time.perf_counter()
        # ends on the CPU, so the device has finished
        sample_rows(system, condition, seed=0, ids=range(rows), batch_size=batch, precision=precision)
        rates.append(rows / (time.perf_counter() - begin))
    return statistics.median(rates[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?")
    parser.add_argument("--system", default="gan_cls")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--precision", nargs="+", default=["fp32"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=2.0)
    given = parser.parse_args()
    if given.run:
        system = load(given.run, device=given.device).system
    else:
        system = untrained(given.system, given.size).to(choose_device(given.device))
    device = device_of_module(system)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    count = sum(p.numel() for p in system.parameters())
    print(f"{given.run or given.system}: {count:,} parameters, {system.target_spec.shape}, {where}")
    print(f"{'precision':<10}{'batch':>6}{'images/s':>12}")
    for precision in given.precision:
        for batch in given.batch:
            print(f"{precision:<10}{batch:>6}{measure(system, batch, precision, given.seconds):>12.1f}", flush=True)


if __name__ == "__main__":
    main()
