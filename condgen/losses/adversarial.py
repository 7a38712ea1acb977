"""Adversarial losses and the R1 penalty. Pure functions of logits: tensors in, scalar out, float32.

"bce"    non-saturating GAN, Goodfellow et al. 2014, arXiv:1406.2661
"hinge"  Lim & Ye 2017, arXiv:1705.02894
"lsgan"  least squares, Mao et al. 2016, arXiv:1611.04076
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from condgen.errors import ShapeError

AdversarialLoss = Literal["bce", "hinge", "lsgan"]


def real_loss(logits: Tensor, kind: AdversarialLoss = "bce") -> Tensor:
    """What D pays for logits (any shape) of real, matching pairs."""
    logits = logits.float()
    if kind == "bce":
        return F.softplus(-logits).mean()
    if kind == "hinge":
        return F.relu(1 - logits).mean()
    return (logits - 1).square().mean()


def fake_loss(logits: Tensor, kind: AdversarialLoss = "bce") -> Tensor:
    """What D pays for logits (any shape) of fakes or of mismatched pairs."""
    logits = logits.float()
    if kind == "bce":
        return F.softplus(logits).mean()
    if kind == "hinge":
        return F.relu(1 + logits).mean()
    return logits.square().mean()


def generator_loss(logits: Tensor, kind: AdversarialLoss = "bce", weight: Tensor | None = None) -> Tensor:
    """What G pays for D's logits (B, ...) on its samples. `weight` (B,) multiplies rows before the mean over B.

    Raises ShapeError for a weight that would only broadcast, such as (B, 1) against (B,).
    """
    logits = logits.float()
    if kind == "bce":
        each = F.softplus(-logits)
    elif kind == "hinge":
        each = -logits
    else:
        each = (logits - 1).square()
    if weight is None:
        return each.mean()
    if weight.shape != logits.shape[:1]:
        raise ShapeError(f"weight has shape {tuple(weight.shape)}; {tuple(logits.shape)} logits need one weight a row")
    return (each.flatten(1).mean(1) if each.dim() > 1 else each).mul(weight).mean()


def r1_penalty(logits: Tensor, pixels: Tensor) -> Tensor:
    """0.5 E ||d logits / d pixels||^2 on real pixels (Mescheder et al. 2018, arXiv:1801.04406), without its weight.

    `pixels` must require grad and `logits` must come from it in float32, outside autocast and torch.compile:
    a second backward runs through this gradient.
    """
    (gradient,) = torch.autograd.grad(logits.float().sum(), pixels, create_graph=True)
    return 0.5 * gradient.float().square().flatten(1).sum(1).mean()
