"""Nats a frame of held-out clips, all before each pixel known: what is reported for Moving MNIST.

With grey levels as targets of a sigmoid it is a cross-entropy H(z, y) = -sum z ln y + (1 - z) ln(1 - y), no likelihood,
and H(z, z), 86.3 nats a frame on the published test file, is its least value: the ceiling of the score. Published
figures of open-loop predictors (ConvLSTM 367.2 and others) do not know the true frames before the one they are asked
for; VPN's (87.6, its baseline 110.1) do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from condgen.engine.sample import sampling
from condgen.errors import ConfigError, DataError, DivergedError, ShapeError
from condgen.losses.likelihood import grey_entropy
from condgen.metrics.likelihood import exact_pixels
from condgen.metrics.score import Score
from condgen.metrics.signature import signature
from condgen.types import Condition

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
    system: HasFrameNats,
    target: Tensor,
    condition: Condition | None = None,
    *,
    batch_size: int = 16,
    about: Mapping[str, str] | None = None,
) -> list[Score]:
    """`nats_per_frame`, the mean over clips and frames with its standard error over clips, then `nats_per_frame@1` and
    `@T` of the first and the last frame.

    target      (N, T, C, H, W) exact 8-bit clips: uint8, or float k / 127.5 - 1 with integer k
    condition   N rows, or none for an unconditional system
    about       signature fields that the caller knows: data, split

    The floor is what one constant costs: the mean grey level of these clips as every pixel's probability (a sigmoid),
    or uniform values (a likelihood). The ceiling is the clips' own entropy, of a sigmoid. A value below it is refused:
    DivergedError, as for NaN. Raises ConfigError for a system that does not score frames, ShapeError for clips that are
    not 8-bit or not as many as conditions.
    """
    if not isinstance(system, HasFrameNats):
        raise ConfigError(f"{type(system).__name__} does not score frames; it has no frame_nats")
    asked = Condition() if condition is None else condition
    if target.dim() != 5 or len(asked) not in (0, len(target)):
        raise ShapeError(f"clips {tuple(target.shape)} and {len(asked)} conditions; give (N, T, C, H, W) and N rows")
    if not len(target) or batch_size < 1:
        raise DataError(f"{len(target)} clips in batches of {batch_size}: both must be at least 1")
    nats, least = _measured(system, target, asked, batch_size)
    if bool(nats.isnan().any()):
        raise DivergedError("the cost of some frames is NaN; the weights have diverged")
    if least is not None and bool((nats < least * (1 - ROUNDING)).any()):
        short = float((least - nats).max())
        raise DivergedError(
            f"some frames cost {short:.3g} nats less than their own entropy, which is impossible: the system sees what "
            "it is asked for"
        )
    frames, dims = target.shape[1], target[0, 0].numel()
    kind = "likelihood" if least is None else "cross-entropy of grey levels"
    n = len(nats)
    named = {
        "nats_per_frame": slice(None),
        "nats_per_frame@1": slice(0, 1),
        f"nats_per_frame@{frames}": slice(-1, None),
    }
    scores = []
    for name, part in named.items():
        each = nats[:, part].mean(1)
        scores.append(
            Score(
                name=name,
                value=float(each.mean()),
                floor=_constant(target[:, part]) if least is not None else dims * math.log(256),
                ceiling=None if least is None else float(least[:, part].mean()),
                error=float(each.std()) / math.sqrt(n) if n > 1 else None,
                signature=signature(
                    name.partition("@")[0], **(about or {}), kind=kind, known="all before", frames=str(frames),
                    dims=str(dims), n=str(n),
                ),
                higher_is_better=False,
            )
        )  # fmt: skip
    return scores


@torch.no_grad()
def _measured(
    system: HasFrameNats, target: Tensor, condition: Condition, batch_size: int
) -> tuple[Tensor, Tensor | None]:
    """float64 (N, T) on the CPU: nats, and the least they can be."""
    assert isinstance(system, torch.nn.Module)
    nats, least = [], list[Tensor]()
    with sampling(system) as device:
        for start in range(0, len(target), batch_size):
            at = slice(start, min(start + batch_size, len(target)))
            clips = exact_pixels(target[at]).to(device)
            asked = condition.index(at).to(device) if len(condition) else condition
            nats.append(system.frame_nats(clips, asked).double().cpu())
            bound = system.frame_floor(clips)
            least += [] if bound is None else [bound.double().cpu()]
    return torch.cat(nats), torch.cat(least) if least else None


def _constant(target: Tensor) -> float:
    """Nats a frame of the best single grey level for every pixel of these clips."""
    mean = exact_pixels(target).double().mean()
    return float(grey_entropy(mean)) * target[0, 0].numel()
