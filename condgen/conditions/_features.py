"""What several condition kinds need: null rows, masked means, checks of sizes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgen.errors import ShapeError


def expect_size(name: str, got: int, built_for: int) -> None:
    """Raises ShapeError unless a condition has the size that the system was built for."""
    if got != built_for:
        raise ShapeError(f"{name} is {got} in this condition; the system was built for {built_for}")


def expect_map_size(size: tuple[int, int] | None) -> tuple[int, int]:
    """The resolution (h, w) of a map; ShapeError when the caller gave none."""
    if size is None:
        raise ShapeError("a map needs its resolution: call the stack with size=(h, w)")
    return size


def null_vector(value: Tensor, given: Tensor, null: Tensor | None) -> Tensor:
    """(B, V): rows that are not given (B,) become the learned null, or zeros where there is none."""
    filler = torch.zeros_like(value[:1]) if null is None else null[None].to(value.dtype)
    return torch.where(given[:, None], value, filler)


def null_sequence(value: Tensor, mask: Tensor, null: nn.Parameter | None) -> tuple[Tensor, Tensor]:
    """(B, L, V) and mask (B, L): masked tokens become zeros, and a row without tokens gets one learned null token.

    So attention over an empty row stays defined where the kind is nullable.
    """
    value = torch.where(mask[..., None], value, torch.zeros_like(value))
    if null is None:
        return value, mask
    if value.shape[1] == 0:
        value, mask = F.pad(value, (0, 0, 0, 1)), F.pad(mask, (0, 1))
    empty = ~mask.any(1)
    first = torch.where(empty[:, None], null.to(value.dtype), value[:, 0])
    value = torch.cat([first[:, None], value[:, 1:]], dim=1)
    return value, torch.cat([(mask[:, 0] | empty)[:, None], mask[:, 1:]], dim=1)


def masked_mean(value: Tensor, mask: Tensor) -> Tensor:
    """(B, L, V) -> (B, V): the mean over the entries that mask (B, L) allows; zeros where it allows none."""
    kept = torch.where(mask[..., None], value, torch.zeros_like(value))
    return kept.sum(1) / mask.sum(1, keepdim=True).clamp(min=1).to(value.dtype)


def zero_rows(value: Tensor, given: Tensor) -> Tensor:
    """(B, ...): rows that are not given become zeros, even where they held NaN."""
    return torch.where(given.view(-1, *[1] * (value.dim() - 1)), value, torch.zeros_like(value))
