"""Whether a `frames2video` run keeps digits that cross: clips in which one hides the other before samples begin.

    python benchmarks/occlusion.py RUN [--clips 4000] [--kept 64] [--temperature 0] [--picture FILE] [--json FILE]

Three groups of the held-out clips, those with the most hidden ink first (the ink of a frame over the most of the clip):

passed   hidden in a given frame before the last, apart in the last one and after: do both digits come out of it?
hidden   hidden in the last given frame, apart in the last frame of the target: what was hidden must be remembered
clear    never hidden

For each frame the share of ink that sample and truth have in common (IoU of pixels above half) is printed, beside that
of copies of the last given frame and of samples of other clips. The truth follows from the past but for the rounding of
positions.
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

APART = 0.95  # of the most ink: the digits do not hide each other


def ink(frames: Tensor) -> Tensor:
    """(..., C, H, W) in [-1, 1] -> pixels above half."""
    return (frames > 0).flatten(-3).sum(-1).double()


def groups(past: Tensor, real: Tensor, kept: int) -> dict[str, list[int]]:
    """Rows of each group, at most `kept`."""
    amount = ink(torch.cat([past, real], 1))
    share = amount / amount.amax(1, keepdim=True)
    given, last, after = share.split([past.shape[1] - 1, 1, real.shape[1]], 1)
    ends = after[:, -1] > APART
    stays = ends & (last[:, 0] > APART) & (after > APART).all(1)
    keys = {"passed": (stays, given.amin(1)), "hidden": (ends, last[:, 0]), "clear": (ends, -share.amin(1))}
    return {
        name: torch.where(fits, key, torch.inf).argsort()[: min(kept, int(fits.sum()))].tolist()
        for name, (fits, key) in keys.items()
    }


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
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = the likeliest pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--group", default="passed", choices=("passed", "hidden", "clear"), help="of the picture")
    parser.add_argument("--picture", type=Path, help="write truth and sample of some of them, row under row")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = parser.parse_args()
    built = build(load_run(given.run))
    condition, real, _ = rows_of(built, built.test_data, given.clips, seed=given.seed)
    assert condition.frames is not None
    past = condition.frames.pixels.float()
    system = condgen.load(given.run).system
    found: dict[str, object] = {"clips": given.clips, "kept": given.kept, "temperature": given.temperature}
    for name, rows in groups(past, real, given.kept).items():
        made = sample_rows(
            system, condition.index(rows), seed=given.seed, ids=range(len(rows)), temperature=given.temperature
        )
        truth, last = real[rows], past[rows, -1:].expand_as(real[rows])
        scores = {
            "samples": overlap(made, truth),
            "copies of the last given frame": overlap(last, truth),
            "samples of other clips": overlap(made.roll(1, 0), truth),
        }
        found[name] = {"rows": len(rows), **scores}
        print(f"{name}, {len(rows)} clips")
        for what, values in scores.items():
            print(f"  {what:32s}" + " ".join(f"{v:.2f}" for v in values))
        if given.picture and name == given.group:
            pairs = [
                torch.cat([past[row], one])
                for at, row in enumerate(rows[: given.shown])
                for one in (real[row], made[at])
            ]
            names = [f"given {t + 1}" for t in range(past.shape[1])] + [f"t={t}" for t in range(real.shape[1])]
            page = draw_grid(torch.stack(pairs), title="truth above, sample below", column_names=names)
            save_png(page, given.picture)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
