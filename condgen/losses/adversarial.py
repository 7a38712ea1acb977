"""Adversarial losses, the R1 and the gradient penalty. Pure functions of logits: tensors in, scalar out, float32.

"bce"    non-saturating GAN, Goodfellow et al. 2014, arXiv:1406.2661
"hinge"  Lim & Ye 2017, arXiv:1705.02894
"lsgan"  least squares, Mao et al. 2016, arXiv:1611.04076
"wgan"   Wasserstein, Arjovsky et al. 2017, arXiv:1701.07875: without bound, so it needs `gradient_penalty` beside it
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from condgen.errors import ShapeError

AdversarialLoss = Literal["bce", "hinge", "lsgan"]
CriticLoss = Literal["bce", "hinge", "lsgan", "wgan"]
"""For systems that also have a gradient penalty."""


def real_loss(logits: Tensor, kind: CriticLoss = "bce") -> Tensor:
    """What D pays for logits (any shape) of real, matching pairs."""
    logits = logits.float()
    if kind == "bce":
        return F.softplus(-logits).mean()
    if kind == "hinge":
        return F.relu(1 - logits).mean()
    if kind == "wgan":
        return -logits.mean()
    return (logits - 1).square().mean()


def fake_loss(logits: Tensor, kind: CriticLoss = "bce") -> Tensor:
    """What D pays for logits (any shape) of fakes or of mismatched pairs."""
    logits = logits.float()
    if kind == "bce":
        return F.softplus(logits).mean()
    if kind == "hinge":
        return F.relu(1 + logits).mean()
    if kind == "wgan":
        return logits.mean()
    return logits.square().mean()


def generator_loss(logits: Tensor, kind: CriticLoss = "bce", weight: Tensor | None = None) -> Tensor:
    """What G pays for D's logits (B, ...) on its samples. `weight` (B,) multiplies rows before the mean over B.

    Raises ShapeError for a weight that would only broadcast, such as (B, 1) against (B,).
    """
    logits = logits.float()
    if kind == "bce":
        each = F.softplus(-logits)
    elif kind in ("hinge", "wgan"):
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


def interpolates(real: Tensor, fake: Tensor, share: Tensor) -> Tensor:
    """share real + (1 - share) fake, row by row: float32 and a leaf that requires grad, for `gradient_penalty`.

    real, fake (B, ...) of one shape; share (B,) in [0, 1). Raises ShapeError.
    """
    if real.shape != fake.shape or share.shape != real.shape[:1]:
        raise ShapeError(f"cannot mix {tuple(real.shape)} and {tuple(fake.shape)} by shares {tuple(share.shape)}")
    share = share.float().view(-1, *[1] * (real.dim() - 1))
    return (share * real.detach().float() + (1 - share) * fake.detach().float()).requires_grad_()


def gradient_penalty(scores: Tensor, pixels: Tensor) -> Tensor:
    """E (||d scores / d pixels||_2 - 1)^2 (Gulrajani et al. 2017, arXiv:1704.00028), without its weight, usually 10.

    scores (B,), one a row, from `pixels` (B, ...) = `interpolates(...)`, in float32, outside autocast and
    torch.compile: a second backward runs through this gradient. No row of the critic may see another one, so it
    has no batch norm. A conditional critic gets the condition of the real row beside the mixture.
    """
    if scores.shape != pixels.shape[:1]:
        raise ShapeError(f"scores have shape {tuple(scores.shape)}; {len(pixels)} pictures need one score each")
    (gradient,) = torch.autograd.grad(scores.float().sum(), pixels, create_graph=True)
    # vector_norm has gradient 0 at 0, where sqrt(sum of squares) would give NaN
    norms = torch.linalg.vector_norm(gradient.float().flatten(1), dim=1)
    return (norms - 1).square().mean()
