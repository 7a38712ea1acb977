"""Nats a frame of held-out clips, all before each pixel known: what is reported for Moving MNIST.

With grey levels as targets of a sigmoid it is a cross-entropy H(z, y) = -sum z ln y + (1 - z) ln(1 - y), no likelihood,
and H(z, z), 86.3 nats a frame on the published test file, is its least value: the ceiling of the score. Published
figures of open-loop predictors (ConvLSTM 367.2 and others) do not know the true frames before the one they are asked
for; VPN's (87.6, its baseline 110.1) do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from condgen.errors import ConfigError, DataError, DivergedError, ShapeError
from condgen.inference.sample import Gathering, sampling
from condgen.losses.likelihood import grey_entropy
from condgen.metrics.likelihood import as_binary, binarised, bits_score, code_bits, exact_pixels, has_bits, level_counts
from condgen.metrics.score import Score
from condgen.metrics.signature import signature
from condgen.metrics.video import shown_steps
from condgen.systems.base import HasLikelihood
from condgen.types import Batch, Condition

ROUNDING = 1e-6  # share of the least value by which float64 sums of float32 logits may miss it


@runtime_checkable
class HasFrameNats(Protocol):
    """Clips scored frame by frame; see `condgen.systems.vpn`."""

    def frame_nats(self, target: Tensor, condition: Condition) -> Tensor:
        """Clips (B, T, C, H, W) -> nats (B, T), each frame given all that comes before it."""
        ...

    def frame_floor(self, target: Tensor) -> Tensor | None:
        """(B, T): the least that `frame_nats` can be where that is not 0; None where it is a likelihood."""
        ...


def nats_per_frame(
    system: HasFrameNats, target: Tensor, condition: Condition | None = None, *, batch_size: int = 16, **options: Any
) -> list[Score]:
    """`frame_scores` of clips in memory.

    target      (N, T, C, H, W) exact 8-bit clips: uint8, or float k / 127.5 - 1 with integer k
    condition   N rows, or none for an unconditional system
    options     of `frame_scores`
    """
    asked = Condition() if condition is None else condition
    if target.dim() != 5 or len(asked) not in (0, len(target)):
        raise ShapeError(f"clips {tuple(target.shape)} and {len(asked)} conditions; give (N, T, C, H, W) and N rows")
    if batch_size < 1:
        raise DataError(f"{len(target)} clips in batches of {batch_size}: both must be at least 1")
    parts = [slice(start, start + batch_size) for start in range(0, len(target), batch_size)]
    blocks = (Batch(target[part], asked.index(part) if len(asked) else asked) for part in parts)
    return frame_scores(system, blocks, **options)


def frame_scores(
    system: HasFrameNats,
    blocks: Iterable[Batch],
    *,
    given: int = 0,
    reference: Tensor | None = None,
    about: Mapping[str, str] | None = None,
    seed: int = 0,
    world: Gathering | None = None,
) -> list[Score]:
    """`nats_per_frame`, the mean over clips and frames with its standard error over clips; `nats_per_frame/t=<step>`
    for at most 16 time steps; and, of a system with a likelihood, `bpd`, the same in bits per dimension.

    blocks      clips of one length with their conditions, as many at a time as the device holds; nothing of a block is
                kept but a few numbers a frame
    given       frames at the start of the clips that are the condition itself: they are left out of the means and bits
    reference   clips of the training split, for the floor of a likelihood
    about       signature fields that the caller knows: data, split
    seed        stated in the signature; nothing is drawn
    world       processes that score other blocks each; every one returns the score of all

    The floor is what one constant costs: the mean grey level of these clips as every pixel's probability (a sigmoid),
    or the histogram of each channel of the reference (a likelihood; uniform without one). The ceiling is the clips' own
    entropy, of a sigmoid. A value below it is refused: DivergedError, as for NaN. Raises ConfigError for a system that
    does not score frames, ShapeError for clips that are not 8-bit, DataError without any clip.
    """
    if not isinstance(system, HasFrameNats):
        raise ConfigError(f"{type(system).__name__} does not score frames; it has no frame_nats")
    found = _measured(system, blocks, seed, world)
    nats, least, frames = found.nats, found.least, found.nats.shape[1]
    if not 0 <= given < frames:
        raise ShapeError(f"{given} given frames of clips of {frames}: at least one must be left to score")
    if bool(nats.isnan().any()):
        raise DivergedError("the cost of some frames is NaN; the weights have diverged")
    if least is not None and bool((nats < least * (1 - ROUNDING)).any()):
        short = float((least - nats).max())
        raise DivergedError(
            f"some frames cost {short:.3g} nats less than their own entropy, which is impossible: the system sees what "
            "it is asked for"
        )
    how, n = binarised(system), len(nats)
    code = None if reference is None else level_counts(reference, how, seed, list(range(len(reference))))
    fields = {
        **(about or {}), "kind": "likelihood" if least is None else "cross-entropy of grey levels",
        "known": "all before", "frames": str(frames), "given": str(given), "dims": str(found.dims), "n": str(n),
        "pixels": "8 bit" if how == "none" else f"binarised by {how}", "floor": found.naive(code),
    }  # fmt: skip
    parts = {"nats_per_frame": slice(given, None)}
    parts |= {f"nats_per_frame/t={t}": slice(t, t + 1) for t in shown_steps(frames)}
    scores = []
    for name, part in parts.items():
        each = nats[:, part].mean(1)
        scores.append(
            Score(
                name=name,
                value=float(each.mean()),
                floor=found.constant(part, code),
                ceiling=None if least is None else float(least[:, part].mean()),
                error=float(each.std()) / math.sqrt(n) if n > 1 else None,
                signature=signature(name, **fields),
                higher_is_better=False,
            )
        )
    if has_bits(system):
        assert isinstance(system, HasLikelihood)
        floor = scores[0].floor
        assert floor is not None
        scores.append(
            bits_score(
                -nats[:, given:].sum(1), system, found.dims * (frames - given), binarise=how, seed=seed,
                floor=floor / found.dims / math.log(2), about=about,
            )
        )  # fmt: skip
    return scores


@dataclass(frozen=True)
class _Found:
    """Of n clips of T frames with `dims` numbers each, float64 on the CPU: nats and the least they can be (n, T), the
    mean grey level (n, T) in [-1, 1], and how often each level occurs (T, C, levels)."""

    nats: Tensor
    least: Tensor | None
    grey: Tensor
    seen: Tensor
    dims: int

    def naive(self, code: Tensor | None) -> str:
        return "mean-grey-level" if self.least is not None else "uniform" if code is None else "training-histogram"

    def constant(self, part: slice, code: Tensor | None) -> float:
        """Nats a frame without looking: the best single grey level for every pixel of these frames, or a code."""
        if self.least is not None:
            return float(grey_entropy(self.grey[:, part].mean())) * self.dims
        if code is None:
            return self.dims * math.log(self.seen.shape[-1])
        return code_bits(self.seen[part].sum(0), code) * self.dims * math.log(2)


@torch.no_grad()
def _measured(system: HasFrameNats, blocks: Iterable[Batch], seed: int, world: Gathering | None) -> _Found:
    assert isinstance(system, torch.nn.Module)
    how, rows, seen, dims = binarised(system), list[Tensor](), None, 0
    with sampling(system) as device:
        for block in blocks:
            pixels = exact_pixels(block.target)
            ids = list(range(len(pixels)))
            counts = torch.stack([level_counts(pixels[:, t], how, seed, ids) for t in range(pixels.shape[1])])
            seen, dims = counts if seen is None else seen + counts, pixels[0, 0].numel()
            clips = as_binary(pixels, how, seed, ids).to(device)
            nats = system.frame_nats(clips, block.condition.to(device))
            bound = system.frame_floor(clips)
            grey = clips.double().mean((2, 3, 4))
            rows.append(torch.stack([x.double().cpu() for x in (nats, grey, *([] if bound is None else [bound]))], 2))
    if world is not None:
        rows, seen, dims = _shared(rows, seen, dims, world)
    if not rows or seen is None:
        raise DataError("there are no clips to score; run `condgen check-data`")
    every = torch.cat(rows)  # (n, T, 2 or 3)
    return _Found(every[..., 0], every[..., 2] if every.shape[2] == 3 else None, every[..., 1], seen, dims)


def _shared(
    rows: list[Tensor], seen: Tensor | None, dims: int, world: Gathering
) -> tuple[list[Tensor], Tensor | None, int]:
    """What all processes have measured; one without any clip learns the shapes from the others."""
    own = [0] * 6 if seen is None else [*rows[0].shape[1:], *seen.shape, dims]
    frames, kinds, _, channels, levels, dims = _gathered(torch.tensor([own]), world).amax(0).tolist()
    if not dims:
        return [], None, 0
    mine = torch.cat([torch.zeros(0, frames, kinds, dtype=torch.float64), *rows])
    counts = torch.zeros(frames, channels, levels, dtype=torch.float64) if seen is None else seen
    return [_gathered(mine, world)], _gathered(counts[None], world).sum(0), dims


def _gathered(values: Tensor, world: Gathering) -> Tensor:
    return world.gather(values.to(world.device)).cpu()
