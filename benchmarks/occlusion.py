"""Whether a `frames2video` run keeps digits that cross: clips whose digits hide each other where the past ends.

    python benchmarks/occlusion.py RUN [--clips 4000] [--kept 64] [--temperature 1] [--picture FILE] [--json FILE]

Of the held-out clips, those are taken whose ink has shrunk most in the last given frame while all of it is back in the
last frame of the target: the digits lie on each other where samples begin, and apart where they end. For each frame the
share of ink that sample and truth have in common (IoU of pixels above half) is printed, beside that of copies of the
last given frame, of samples of other clips, and of clips whose digits never touch. The truth follows from the past but
for the rounding of positions.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

import condgen
from condgen.build import build
from condgen.commands.arguments import load_run
from condgen.inference.sample import sample_rows
from condgen.show.drawing import draw_grid
from condgen.show.pictures import save_png
from condgen.task import rows_of


def ink(frames: Tensor) -> Tensor:
    """(..., C, H, W) in [-1, 1] -> pixels above half."""
    return (frames > 0).flatten(-3).sum(-1).double()


def crossed(past: Tensor, real: Tensor, kept: int) -> tuple[list[int], list[int]]:
    """Rows whose digits hide each other most where the past ends, and as many whose digits never do."""
    amount = ink(torch.cat([past, real], 1))
    share = amount / amount.amax(1, keepdim=True)
    apart = share[:, -1] > 0.97
    hidden = torch.where(apart, share[:, past.shape[1] - 1], torch.inf).argsort()[:kept]
    clear = torch.where(apart, share.amin(1), -torch.inf).argsort(descending=True)[:kept]
    return hidden.tolist(), clear.tolist()


def overlap(made: Tensor, real: Tensor) -> list[float]:
    """IoU of the ink, frame by frame, mean over clips."""
    one, two = made > 0, real > 0
    both, either = (one & two).flatten(2).sum(2), (one | two).flatten(2).sum(2)
    return (both / either.clamp_min(1)).double().mean(0).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--clips", type=int, default=4000, help="held-out clips that are looked through")
    parser.add_argument("--kept", type=int, default=64, help="of them, those that are sampled")
    parser.add_argument("--shown", type=int, default=6, help="clips of the picture, the most hidden first")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="write truth and sample of some of them, row under row")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = parser.parse_args()
    built = build(load_run(given.run))
    condition, real, _ = rows_of(built, built.test_data, given.clips, seed=given.seed)
    assert condition.frames is not None
    past = condition.frames.pixels.float()
    system = condgen.load(given.run).system
    found: dict[str, object] = {"clips": given.clips, "kept": given.kept, "temperature": given.temperature}
    made: dict[str, Tensor] = {}
    for name, rows in zip(("hidden", "clear"), crossed(past, real, given.kept), strict=True):
        made[name] = sample_rows(
            system, condition.index(rows), seed=given.seed, ids=range(len(rows)), temperature=given.temperature
        )
        truth, last = real[rows], past[rows, -1:].expand_as(real[rows])
        found[name] = {
            "ink of the last given frame": float((ink(past[rows, -1]) / ink(truth[:, -1])).mean()),
            "samples": overlap(made[name], truth),
            "copies of the last given frame": overlap(last, truth),
            "samples of other clips": overlap(made[name].roll(1, 0), truth),
        }
        print(f"{name}: {found[name]['ink of the last given frame']:.2f} of the ink is seen where the past ends")  # type: ignore[index]
        for what in ("samples", "copies of the last given frame", "samples of other clips"):
            print(f"  {what:32s}" + " ".join(f"{v:.2f}" for v in found[name][what]))  # type: ignore[index]
    if given.picture:
        rows = crossed(past, real, given.kept)[0][: given.shown]
        pairs = [
            torch.cat([past[row], after]) for at, row in enumerate(rows) for after in (real[row], made["hidden"][at])
        ]
        names = [f"given {t + 1}" for t in range(past.shape[1])] + [f"t={t}" for t in range(real.shape[1])]
        save_png(draw_grid(torch.stack(pairs), title="truth above, sample below", column_names=names), given.picture)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
