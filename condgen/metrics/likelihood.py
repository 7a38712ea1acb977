"""Bits per dimension of held-out pictures and clips, by one function for every system that has a likelihood."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from condgen import rng
from condgen.errors import ConfigError, DataError, DivergedError, ShapeError
from condgen.inference.sample import Gathering, rows_of_rank, sampling
from condgen.metrics.score import Score
from condgen.metrics.signature import signature
from condgen.pixels import PIXEL_TOLERANCE
from condgen.rng import RowRandom
from condgen.systems.base import HasLikelihood
from condgen.types import Condition

Binarise = Literal["none", "threshold", "dynamic"]
LEVELS = 256


def binarised(system: object) -> Binarise:
    """How a model of black and white pixels wants its pictures: its own `binarise`."""
    how: Binarise = getattr(system, "binarise", "none")
    return how


def has_bits(system: object) -> bool:
    """Whether `bits_per_dim` can be asked of this system; its `likelihood` begins with "none" where not."""
    return isinstance(system, HasLikelihood) and not system.likelihood.startswith("none")


def bits_per_dim(
    system: HasLikelihood,
    target: Tensor,
    condition: Condition | None = None,
    *,
    seed: int = 0,
    ids: Sequence[int] | None = None,
    batch_size: int = 16,
    importance: int = 1,
    binarise: Binarise = "none",
    reference: Tensor | None = None,
    about: Mapping[str, str] | None = None,
    world: Gathering | None = None,
) -> Score:
    """-log2 p(picture) / (C H W), the mean over the rows of `target`, with its standard error; of clips / (T C H W).

    target      (N, C, H, W) or (N, T, C, H, W), exact 8 bits: uint8, or float k / 127.5 - 1 with integer k
    condition   N rows, or none for an unconditional system
    ids         names of the rows' noise streams: row i depends on (seed, ids[i]) alone; default 0 .. N - 1
    importance  K: log of the mean of K importance weights a row, in float64 (Burda et al. 2016, arXiv:1509.00519).
                A system without noise is asked once
    binarise    the pictures are made black and white first: "threshold" at the middle, or "dynamic", white with the
                probability of the grey level, drawn once a row; what a model of binary pixels is judged on
    reference   pictures of the training split: the floor is then the code of their histogram of each channel (one
                count added to each level). Without them it is the uniform code: 8 bits, 1 for black and white
    about       signature fields that the caller knows: data, split
    world       processes that share the rows; each returns the same score. Every rank must call it

    One batch at a time is on the device. Raises ShapeError for pictures that are not 8-bit, ConfigError for a system
    without a likelihood, DivergedError for one that gives NaN.
    """
    if not has_bits(system):
        raise ConfigError(
            f"{type(system).__name__} gives no likelihood: {getattr(system, 'likelihood', 'it has no log_prob')}"
        )
    if importance < 1 or batch_size < 1:
        raise ConfigError(f"importance={importance} and batch_size={batch_size}: both must be at least 1")
    if not len(target):
        raise DataError("bits per dimension need at least one picture")
    names = list(range(len(target))) if ids is None else list(ids)
    rows = Condition() if condition is None else condition
    if len(names) != len(target) or len(rows) not in (0, len(target)):
        raise ShapeError(f"{len(target)} pictures, {len(names)} ids, {len(rows)} conditions; give as many of each")
    draws = 1 if system.likelihood == "exact" and system.dequantisation in ("none", "interval") else importance
    mine = list(rows_of_rank(len(names), world.rank, world.world)) if world is not None else list(range(len(names)))
    nats = torch.full((len(mine),), math.nan, dtype=torch.float64)
    for start in range(0, len(mine), batch_size):
        at = mine[start : start + batch_size]
        named = [names[i] for i in at]
        pixels = as_binary(exact_pixels(target[at]), binarise, seed, named)
        asked = rows.index(at) if len(rows) else rows
        nats[start : start + len(at)] = log_prob_rows(system, pixels, asked, seed=seed, ids=named, draws=draws)
    if world is not None:
        nats = _gathered(nats, len(names), world)
    if bool(nats.isnan().any()):
        raise DivergedError("the log-likelihood of some pictures is NaN; the weights have diverged")
    return bits_score(
        nats, system, target[0].numel(), draws=draws, binarise=binarise, seed=seed, about=about,
        floor=histogram_bits(target, reference, binarise=binarise, seed=seed, ids=names),
    )  # fmt: skip


def bits_score(
    nats: Tensor, system: HasLikelihood, dimensions: int, *, floor: float, draws: int = 1, binarise: Binarise = "none",
    seed: int = 0, about: Mapping[str, str] | None = None,
) -> Score:  # fmt: skip
    """`bpd` of the log-likelihoods (N,) in nats of rows of `dimensions` numbers each."""
    bits = -nats / (dimensions * math.log(2))
    n = len(bits)
    protocol = {
        **(about or {}), "likelihood": system.likelihood, "dequantisation": system.dequantisation,
        "draws": str(draws), "pixels": "8 bit" if binarise == "none" else f"binarised by {binarise}",
        "dims": str(dimensions), "n": str(n), "seed": str(seed),
    }  # fmt: skip
    return Score(
        name="bpd",
        value=float(bits.mean()),
        floor=floor,
        error=float(bits.std()) / math.sqrt(n) if n > 1 else None,
        signature=signature("bpd", **protocol),
        higher_is_better=False,
    )


@torch.no_grad()
def log_prob_rows(
    system: HasLikelihood, pixels: Tensor, condition: Condition, *, seed: int, ids: Sequence[int], draws: int = 1
) -> Tensor:
    """ln of the mean of `draws` importance weights of each row of one batch: float64 (B,), on the CPU."""
    assert isinstance(system, torch.nn.Module)
    total = torch.full((len(pixels),), -math.inf, dtype=torch.float64)
    with sampling(system, stray=rng.derive(seed, "likelihood")) as device:
        random = RowRandom(rng.derive(seed, "likelihood"), ids, device=device)
        placed, asked = pixels.to(device), condition.to(device)
        for _ in range(draws):  # successive draws continue each row's own stream
            weights = system.log_prob(placed, asked, random=random)
            if weights.shape != (len(pixels),):
                raise ShapeError(f"log_prob returned shape {tuple(weights.shape)}; one number a row is needed")
            total = torch.logaddexp(total, weights.double().cpu())
    return total - math.log(draws)


def exact_pixels(pixels: Tensor) -> Tensor:
    """8-bit pictures as float32 k / 127.5 - 1 with k rounded away from its float error. ShapeError for others: bits
    of pixels between the 256 levels (resized as floats, noisy, scaled otherwise) mean nothing."""
    if pixels.dtype == torch.uint8:
        return pixels.to(torch.float32) / 127.5 - 1
    levels = (pixels.float() + 1) * 127.5
    whole = levels.round()
    if not bool(((levels - whole).abs() <= 127.5 * PIXEL_TOLERANCE / 2).all()):
        raise ShapeError("these pictures lie between the 256 grey levels; give uint8, or k / 127.5 - 1 with integer k")
    if not bool(((whole >= 0) & (whole < LEVELS)).all()):
        raise ShapeError(f"these pictures span {pixels.min():.3g} to {pixels.max():.3g}; float pixels lie in [-1, 1]")
    return whole / 127.5 - 1


def as_binary(pixels: Tensor, how: Binarise, seed: int, ids: Sequence[int]) -> Tensor:
    """Black (-1) and white (1) pictures, or the same pictures for "none". "dynamic" draws from (seed, ids[i])."""
    if how == "none":
        return pixels
    share = (pixels + 1) / 2
    bar = RowRandom(rng.derive(seed, "binarise"), ids).rand(*pixels.shape[1:]) if how == "dynamic" else 0.5
    return (share > bar).float() * 2 - 1


def histogram_bits(
    target: Tensor,
    reference: Tensor | None = None,
    *,
    binarise: Binarise = "none",
    seed: int = 0,
    ids: Sequence[int] | None = None,
) -> float:
    """Bits per dimension of `target` under the histogram of each channel of `reference`, one count added to each
    level; without a reference, of the uniform code."""
    names = list(range(len(target))) if ids is None else list(ids)
    if reference is None:
        return math.log2(2 if binarise != "none" else LEVELS)
    fitted = level_counts(reference, binarise, seed, list(range(len(reference))))
    return code_bits(level_counts(target, binarise, seed, names), fitted)


def code_bits(seen: Tensor, fitted: Tensor) -> float:
    """Bits per dimension of levels that occur `seen` times under the code of the counts `fitted`, one added to each;
    both (C, levels)."""
    bits = -torch.log2((fitted + 1) / (fitted + 1).sum(1, keepdim=True))
    return float((seen * bits).sum() / seen.sum())


def level_counts(pixels: Tensor, binarise: Binarise, seed: int, ids: Sequence[int], block: int = 256) -> Tensor:
    """How often each level occurs in each channel of (N, C, H, W) or (N, T, C, H, W): (C, levels) float64."""
    levels = 2 if binarise != "none" else LEVELS
    out = torch.zeros(pixels.shape[-3], levels, dtype=torch.float64)
    for start in range(0, len(pixels), block):
        part = as_binary(exact_pixels(pixels[start : start + block].cpu()), binarise, seed, ids[start : start + block])
        held = ((part + 1) / 2 * (levels - 1)).round().long().movedim(-3, 0)
        out += torch.stack([torch.bincount(channel.flatten(), minlength=levels) for channel in held])
    return out


def _gathered(mine: Tensor, count: int, world: Gathering) -> Tensor:
    """The values of all rows in their own order, on every process; rank r holds rows r, r + world, ..."""
    per_rank = -(-count // world.world)
    padded = torch.zeros(per_rank, dtype=mine.dtype)  # collectives need equal sizes
    padded[: len(mine)] = mine
    everything = world.gather(padded.to(world.device)).cpu()
    return everything.view(world.world, per_rank).T.flatten()[:count].contiguous()
