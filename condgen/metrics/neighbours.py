"""Nearest neighbours in blocks, and what they say about copying: are samples nearer to training pictures than new ones?

The share counts how many samples are nearer to their nearest training picture than held-out real pictures are to
theirs: a rank test on the two sets of distances, after the check that Theis et al. (2016, arXiv:1511.01844) ask for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from condgen import rng
from condgen.errors import DataError, ShapeError
from condgen.metrics.score import Score
from condgen.metrics.signature import signature
from condgen.metrics.statistics import to_float64
from condgen.pixels import pixels_to_uint8

if TYPE_CHECKING:
    from PIL import Image

ROWS, COLUMNS = 1024, 4096  # of a tile of the distance matrix; 32 MB in float64
SAME = 1e-12  # squared distance over squared lengths, below which two rows are one: rounding leaves less
TAIL = 0.01  # share of held-out pictures that set the bar of `memorised`
SHOWN = 8  # rows of the picture


def tiles(a: Tensor, b: Tensor, *, upper: bool = False) -> Iterator[tuple[slice, slice, Tensor]]:
    """Squared Euclidean distances of rows (N, d), (M, d) in float64, tile by tile: (rows of a, rows of b, tile).

    upper: each tile's rows of b begin no earlier than its rows of a, as is enough where b is a.
    Memory: one tile and two blocks of rows in float64, about 0.2 GB at d = 2048, whatever N and M are.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ShapeError(f"features of shape {tuple(a.shape)} and {tuple(b.shape)}; give (N, d) and (M, d)")
    for top in range(0, len(a), ROWS):
        rows = slice(top, min(top + ROWS, len(a)))
        x = to_float64(a[rows])
        x_length = x.square().sum(1, keepdim=True)
        for left in range(top if upper else 0, len(b), COLUMNS):
            columns = slice(left, min(left + COLUMNS, len(b)))
            y = to_float64(b[columns]).to(x.device)
            lengths = x_length + y.square().sum(1)
            square = torch.addmm(lengths, x, y.T, alpha=-2)
            yield rows, columns, square.masked_fill_(square <= SAME * lengths, 0)


def nearest(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Distance (N,) float64 of each row of a (N, d) to its nearest row of b (M, d), and which one it is (N,)."""
    if not len(b):
        raise DataError("there is no picture to be near to")
    best = torch.full((len(a),), torch.inf, dtype=torch.float64)
    which = torch.zeros(len(a), dtype=torch.int64)
    for rows, columns, square in tiles(a, b):
        low, at = (x.cpu() for x in square.min(1))
        better = low < best[rows]
        best[rows] = torch.where(better, low, best[rows])
        which[rows] = torch.where(better, at + columns.start, which[rows])
    return best.sqrt(), which


def radii(rows: Tensor, *ks: int) -> list[Tensor]:
    """For each of `ks`: squared distance (N,) float64 of each row (N, d) to its k-th nearest other row."""
    most = max(ks)
    if not 1 <= min(ks) <= most < len(rows):
        raise DataError(f"the {most}th neighbour needs more than {most} rows; there are {len(rows)}")
    best = torch.full((len(rows), most), torch.inf, dtype=torch.float64)

    def seen(of: slice, square: Tensor) -> None:
        best[of] = torch.cat([best[of], square.cpu()], dim=1).topk(most, dim=1, largest=False).values

    for mine, others, square in tiles(rows, rows, upper=True):
        own = torch.arange(others.start, max(others.start, min(mine.stop, others.stop)), device=square.device)
        square[own - mine.start, own - others.start] = torch.inf  # a row is no neighbour of itself
        seen(mine, square)
        after = slice(max(mine.stop, others.start), others.stop)  # which do not meet these rows again
        if after.start < after.stop:
            seen(after, square[:, after.start - others.start :].T)
    return [best[:, :k].amax(1) for k in ks]


@dataclass(frozen=True)
class Memory:
    """share: chance that a sample is nearer to a training picture than a held-out one is, ties half.
    tail: share of samples that are nearer than the nearest TAIL of the held-out pictures."""

    share: float
    tail: float


def memory(samples: Tensor, held_out: Tensor) -> Memory:
    """From distances to the nearest training picture: of samples (N,), of held-out pictures (M,)."""
    order = held_out.sort().values
    below, upto = (torch.searchsorted(order, samples, right=right).double() for right in (False, True))
    share = 1 - float((below + upto).mean()) / (2 * len(order))
    return Memory(share, float((samples < torch.quantile(order, TAIL)).double().mean()))


def memorisation_scores(
    fake: Tensor,
    real: Tensor,
    train: Tensor,
    noise: Tensor,
    *,
    fields: Mapping[str, object],
    seed: int = 0,
    suffix: str = "",
    shown: Image.Image | None = None,
) -> list[Score]:
    """`nearer_than_real` and `memorised` of features (N, d): real ones held out, and those of training pictures.

    Floor: training pictures handed in as samples, 1. Ceiling: one half of the held-out pictures against the other.
    A value below the ceiling means farther from the training pictures than real ones are (what noise gets is in the
    note), not better than real.
    """
    if len(real) < 4:
        raise DataError(f"memorisation needs at least 4 held-out pictures; got {len(real)}")
    to_fake, to_real, to_noise = (nearest(x, train)[0] for x in (fake, real, noise))
    order = rng.permutation(len(real), seed, "halves of the held-out pictures")
    half = len(real) // 2
    found, best = memory(to_fake, to_real), memory(to_real[order[:half]], to_real[order[half:]])
    worst, far = memory(torch.zeros(len(train), dtype=torch.float64), to_real), memory(to_noise, to_real)
    given = {**fields, "n": len(fake), "ref": len(real), "train": len(train), "seed": seed}
    out = []
    for name, extra in (("nearer_than_real", {}), ("memorised", {"tail": TAIL})):
        share, floor, ceiling, noise_gets = (
            of.share if name == "nearer_than_real" else of.tail for of in (found, worst, best, far)
        )
        out.append(Score(
            f"{name}{suffix}", share, floor=floor, ceiling=ceiling, error=(share * (1 - share) / len(fake)) ** 0.5,
            signature=signature(f"{name}{suffix}", **given, **extra), higher_is_better=False,
            note=f"noise gets {noise_gets:.3g}: low values are good only beside a good FID or KID; "
            f"copies of training pictures other than these {len(train)} are not seen",
            picture=shown if name == "memorised" else None,
        ))  # fmt: skip
    return out


def neighbour_picture(
    fake: Tensor, train: Tensor, fake_features: Tensor, train_features: Tensor, *, attribution: str = ""
) -> Image.Image:
    """The SHOWN samples (N, C, H, W) that are nearest to a training picture, each beside that picture."""
    from condgen.show.drawing import draw_grid

    distance, which = nearest(fake_features, train_features)
    rows = distance.argsort(stable=True)[:SHOWN]
    pairs = torch.stack([pixels_to_uint8(fake[rows]), pixels_to_uint8(train[which[rows]])], dim=1)
    return draw_grid(
        pairs, column_names=["sample", "nearest training picture"], attribution=attribution,
        title=f"the {len(rows)} of {len(fake)} samples that are nearest to a training picture",
    )  # fmt: skip
