"""Losses that pull an image and its own caption together: structured joint embedding and InfoNCE.

Pure tensors. Row i of `images` belongs to row i of `texts`; every other row is a negative.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from condgen.errors import ShapeError


def structured_joint_embedding(
    images: Tensor, texts: Tensor, *, margin: float = 1.0, ignore: Tensor | None = None
) -> Tensor:
    """Deep symmetric structured joint embedding (Reed et al., CVPR 2016, arXiv:1605.05395).

    With s_ij = v_i . t_j:  1/B^2 sum_i sum_{j != i} max(0, margin + s_ij - s_ii)  (an image and wrong texts)
    plus the same with s_ji (a text and wrong images).

    images, texts (B, D); ignore bool (B, B), True = the pair is not a negative (same caption or same class).
    Raises ShapeError for unequal shapes. Returns a scalar.
    """
    scores = _scores(images, texts)
    own = scores.diagonal()
    negative = _negatives(scores, ignore)
    by_image = F.relu(margin + scores - own[:, None])
    by_text = F.relu(margin + scores - own[None, :])
    return ((by_image + by_text) * negative).sum() / scores.numel()


def info_nce(images: Tensor, texts: Tensor, *, scale: Tensor | float = 14.3, ignore: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE on cosine similarities (Radford et al., ICML 2021, arXiv:2103.00020).

    images, texts (B, D), normalised here; scale = 1 / temperature; ignore as above. Returns a scalar, the mean
    of the image-to-text and the text-to-image cross entropy in nats; log B for embeddings without information.
    """
    scores = _scores(F.normalize(images, dim=1), F.normalize(texts, dim=1)) * scale
    own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    logits = scores.masked_fill(~(_negatives(scores, ignore) | own), -torch.inf)
    target = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def in_batch_accuracy(images: Tensor, texts: Tensor) -> Tensor:
    """Share of images whose best-scoring text of the batch is their own; a scalar without gradient."""
    with torch.no_grad():
        best = _scores(images, texts).argmax(1)
        return (best == torch.arange(len(best), device=best.device)).float().mean()


def _scores(images: Tensor, texts: Tensor) -> Tensor:
    if images.shape != texts.shape or images.dim() != 2:
        raise ShapeError(
            f"images have shape {tuple(images.shape)} and texts {tuple(texts.shape)}; "
            "a joint embedding needs two equal (B, D)"
        )
    return images @ texts.T  # (B, B), row = image, column = text


def _negatives(scores: Tensor, ignore: Tensor | None) -> Tensor:
    negative = ~torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    return negative if ignore is None else negative & ~ignore.to(scores.device)
