"""GAN-INT-CLS against GAN-CLS, GAN-INT and the plain conditional GAN: equal steps, several seeds, one table.

    python benchmarks/ablation.py [--steps 800] [--seeds 0 1 2] [--variants gan gan_int_cls] [--jobs 2] [--json FILE]

Each run is `tools/train.py task=text2image` on the embedded data; the numbers are those it writes to RUN/eval. Every
run is scored with the same evaluator, seed and rows. With --jobs N, N runs go side by side with one thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {
    "gan": ["system.cls_weight=0", "system.interp_weight=0"],
    "gan_cls": ["system.interp_weight=0"],
    "gan_int": ["system.cls_weight=0"],
    "gan_int_cls": [],
}


def run(folder: Path, variant: str, seed: int, steps: int, words: list[str]) -> dict[str, dict[str, float]]:
    """score name -> {value, floor, ceiling}."""
    name = f"{variant}-{seed}"
    command = [
        sys.executable, str(ROOT / "tools/train.py"), "task=text2image", f"run.dir={folder}", f"run.name={name}",
        f"train.seed={seed}", f"train.steps={steps}", "train.sample_every=0", *VARIANTS[variant], *words,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    (scores,) = (folder / name / "eval").glob("*.json")
    return {s["name"]: s for s in json.loads(scores.read_text(encoding="utf-8"))["scores"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=["gan", "gan_int_cls"], choices=list(VARIANTS))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write every score here")
    parser.add_argument("words", nargs="*", help="more options for every run, such as system.preset=small")
    given = parser.parse_args()
    cells = [(variant, seed) for seed in given.seeds for variant in given.variants]
    with tempfile.TemporaryDirectory() as made, ThreadPoolExecutor(given.jobs) as pool:
        # the first run alone: it trains the evaluator that all the others read from the cache
        first = run(Path(made), *cells[0], given.steps, given.words)
        rest = pool.map(lambda cell: run(Path(made), *cell, given.steps, given.words), cells[1:])
        found = dict(zip(cells, [first, *rest], strict=True))
    names = [name for name in first if name.startswith(("rprec", "kid"))]
    print(f"{given.steps} steps, seeds {given.seeds}: mean (each seed)")
    for name in names:
        anchors = first[name]
        print(f"\n{name}  floor {anchors['floor']:.3f}  ceiling {anchors['ceiling']:.3f}")
        for variant in given.variants:
            values = [found[variant, seed][name]["value"] for seed in given.seeds]
            each = ", ".join(f"{value:.3f}" for value in values)
            print(f"  {variant:12s} {statistics.mean(values):.3f}  ({each})")
    if given.json:
        record = {f"{variant}-{seed}": scores for (variant, seed), scores in found.items()}
        text = json.dumps({"steps": given.steps, "options": given.words, "runs": record}, indent=1)
        given.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
