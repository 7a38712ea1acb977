"""Moving through noise: walks, sums and the noise of a given picture, for systems with a decoder.

Arithmetic: Radford, Metz, Chintala 2015, arXiv:1511.06434, section 6.3.2. Projection: Lipton, Tripathi 2017,
arXiv:1702.04782.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from condgen import rng
from condgen.errors import ConfigError, ShapeError
from condgen.inference.sample import sampling
from condgen.systems.base import HasDecoder, System
from condgen.types import Condition

NEIGHBOUR = 0.25  # half width of the uniform noise around a sum
PROJECTION_STEPS = 300
RESTARTS = 4
PRIOR = 1e-3  # weight of mean z^2 beside the mean squared pixel error


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Rows on the way from a (Z,) to b (Z,) at t (T,) in [0, 1] -> (T, Z), at constant angular speed.

    The direction follows the great circle and the length goes linearly from |a| to |b|, so between two draws of
    N(0, I) every point is as long as a draw; a straight line would pass through the centre, which G never saw.
    Both ends are exact. Opposite ends take one of the shortest ways; a zero vector has no direction: a line then.
    """
    lengths = a.norm(), b.norm()
    if not bool(lengths[0] > 0) or not bool(lengths[1] > 0):
        return lerp(a, b, t)
    u, v = a / lengths[0], b / lengths[1]
    across = v - (u @ v) * u
    angle = torch.atan2(across.norm(), u @ v)
    if float(across.norm()) < 1e-6:  # parallel: any perpendicular will do, and counts only for opposite ends
        axis = F.one_hot(u.abs().argmin(), len(u)).to(u.dtype)
        across = axis - (u @ axis) * u
    w = across / across.norm()
    at = (t * angle)[:, None]
    made = (at.cos() * u + at.sin() * w) * torch.lerp(lengths[0], lengths[1], t)[:, None]
    return _exact_ends(made, a, b, t)


def lerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Rows on the straight line from a (Z,) to b (Z,) at t (T,) -> (T, Z); the way for uniform noise and labels."""
    return _exact_ends(torch.lerp(a[None], b[None], t[:, None]), a, b, t)


def path(stops: Tensor, frames: int, *, noise: str = "normal") -> Tensor:
    """Stops (S, Z) -> (1 + (S - 1) * frames, Z): `frames` steps from each stop to the next, stops included once.

    noise   "normal" walks by `slerp`, "uniform" (and anything that is no noise) by `lerp`
    Raises ConfigError for fewer than 2 stops or no frame.
    """
    if len(stops) < 2 or frames < 1:
        raise ConfigError(f"a walk needs 2 stops and 1 frame between them; got {len(stops)} and {frames}")
    t = torch.arange(1, frames + 1, dtype=stops.dtype, device=stops.device) / frames
    move = slerp if noise == "normal" else lerp
    return torch.cat([stops[:1], *(move(a, b, t) for a, b in itertools.pairwise(stops))])


def weighted_sum(values: Tensor, signs: Sequence[int]) -> Tensor:
    """sum_i signs[i] values[i] / sum(signs) of rows (S, ...) -> (...).

    A - B + C, with signs that add up to 1, is the plain sum of Radford et al.; A + B is half of each.
    Raises ConfigError where the signs add up to nothing: A - B is a direction and not a place.
    """
    total = sum(signs)
    if total < 1:
        raise ConfigError("a sum needs more terms with + than with -, such as 'A - B + C': A - B alone is a direction")
    weights = torch.tensor(signs, dtype=values.dtype, device=values.device) / total
    return torch.tensordot(weights, values, dims=1)


def neighbours(z: Tensor, count: int, *, seed: int) -> Tensor:
    """(Z,) -> (count, Z): z itself, then z + U(-0.25, 0.25) noise, as Radford et al. show their sums."""
    if count < 1:
        raise ConfigError(f"{count} pictures of a sum; give at least 1")
    moved = torch.rand(count, *z.shape, generator=rng.generator(seed, "neighbours")).to(z.device) * 2 - 1
    moved[0] = 0
    return z + NEIGHBOUR * moved


def draw(system: HasDecoder, ids: Sequence[int], *, seed: int) -> Tensor:
    """The noise (len(ids), Z) that `sample` decodes for these ids, on the CPU."""
    return system.draw(rng.RowRandom(seed, ids)).cpu()


class Projected(NamedTuple):
    """latent (N, Z) and the root mean square pixel error (N,) in [0, 2] of what it decodes to."""

    latent: Tensor
    error: Tensor


def project(
    system: System, pictures: Tensor, condition: Condition, *, seed: int = 0, steps: int = PROJECTION_STEPS,
    lr: float = 0.05,
) -> Projected:  # fmt: skip
    """The noise whose picture is nearest to each of `pictures` (N, C, H, W) in [-1, 1], for systems that only decode.

    Adam on the mean squared pixel error from 4 draws a picture, the best of which is kept; it finds a near picture
    of the generator, never a new one. Normal noise is held by 0.001 of its mean square; uniform noise that leaves
    [-1, 1] is drawn afresh ("stochastic clipping"). condition has N rows or none. Weights stay as they are.
    """
    assert isinstance(system, HasDecoder)
    if steps < 1:
        raise ConfigError(f"projection in {steps} steps; give at least 1")
    if pictures.shape[1:] != system.target_spec.shape:
        raise ShapeError(
            f"pictures of shape {tuple(pictures.shape[1:])} for a system that makes {system.target_spec.shape}"
        )
    asked = condition.repeat(RESTARTS) if len(condition) else condition
    redrawn = rng.generator(seed, "stochastic clipping")
    with sampling(system) as device, torch.enable_grad():
        asked = asked.to(device)
        wanted = pictures.to(device).float().repeat_interleave(RESTARTS, dim=0)
        z = draw(system, range(len(wanted)), seed=rng.derive(seed, "projection")).to(device).requires_grad_()
        optimizer = torch.optim.Adam([z], lr=lr)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            error = (system.decode(z, asked) - wanted).square().flatten(1).mean(1)
            (z.grad,) = torch.autograd.grad((error + PRIOR * z.square().mean(1)).sum(), [z])
            optimizer.step()
            if system.noise == "uniform":
                with torch.no_grad():
                    fresh = (torch.rand(z.shape, generator=redrawn) * 2 - 1).to(device)
                    z.copy_(torch.where(z.abs() > 1, fresh, z))
        with torch.no_grad():
            error = (system.decode(z, asked) - wanted).square().flatten(1).mean(1).view(-1, RESTARTS)
            best = error.argmin(1)
            rows = torch.arange(len(pictures), device=device)
            latent = z.detach().view(len(pictures), RESTARTS, *z.shape[1:])[rows, best]
    return Projected(latent.cpu(), error[rows, best].sqrt().cpu())


def _exact_ends(made: Tensor, a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    made = torch.where((t == 0)[:, None], a, made)
    return torch.where((t == 1)[:, None], b, made)
