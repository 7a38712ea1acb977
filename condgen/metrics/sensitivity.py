"""Does the output depend on its condition at all? Same noise, another condition, and how far the picture moves.

A generator that has learned to ignore its condition keeps a good FID; this is the number that notices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from condgen import rng
from condgen.errors import DivergedError, ShapeError
from condgen.metrics.score import Score
from condgen.metrics.signature import signature
from condgen.records import Record
from condgen.systems.base import System
from condgen.types import Condition


@dataclass(frozen=True)
class Sensitivity:
    """How the output of one system moves with one field of its condition; root mean square pixel differences.

    swap       the field replaced by another row's value, same noise; None when no row had another value to take
    null       the field replaced by null, same noise
    noise      the condition kept, other noise: the yardstick. 0 for a system without noise
    rows       rows whose value the swap changed; only they count for `swap`
    """

    field: str
    swap: float | None
    null: float
    noise: float
    rows: int

    @property
    def relative_swap(self) -> float | None:
        """swap / noise: 0 = ignores the field, 1 = moves as much as new noise would; None where undefined."""
        return self.swap / self.noise if self.swap is not None and self.noise > 0 else None

    @property
    def relative_null(self) -> float | None:
        return self.null / self.noise if self.noise > 0 else None

    def scores(self, *, seed: int, rows: int, about: dict[str, str] | None = None) -> list[Score]:
        """`sensitivity/<field>` (swap) and `sensitivity/<field>/null`: relative to noise, absolute without noise."""
        made = []
        for name, absolute, relative in (
            (f"sensitivity/{self.field}", self.swap, self.relative_swap),
            (f"sensitivity/{self.field}/null", self.null, self.relative_null),
        ):
            value = absolute if relative is None else relative
            if value is not None:
                unit = "rms" if relative is None else "swap-per-noise"
                text = signature(name, unit=unit, n=rows, seed=seed, **(about or {}))
                made.append(Score(name, value, floor=0.0, signature=text))
        return made


def condition_sensitivity(
    system: System,
    condition: Condition,
    *,
    seed: int = 0,
    fields: Sequence[str] | None = None,
    batch_size: int = 16,
) -> list[Sensitivity]:
    """The sensitivity of `system` to each field of `condition` (default: every given field).

    Samples 2 + 2 * fields times in eval mode under no_grad; row i uses the noise of sample i of `seed`
    throughout. Mode and global randomness are left as they were. Raises ShapeError below 2 rows.
    """
    if len(condition) < 2:
        raise ShapeError(f"swapping conditions needs at least 2 rows; got {len(condition)}")
    was_training = system.training
    system.eval()
    try:
        base = _draw(system, condition, seed, batch_size)
        noise = _distance(base, _draw(system, condition, rng.derive(seed, "other noise"), batch_size))
        everyone = torch.ones(len(condition), dtype=torch.bool)  # a mask: drop by probability draws random numbers
        measured = []
        for name in condition.given if fields is None else fields:
            swapped, changed = swap_field(condition, name, seed=seed)
            moved = _distance(base, _draw(system, swapped, seed, batch_size))
            nulled = _distance(base, _draw(system, condition.drop(everyone, [name]), seed, batch_size))
            rows = int(changed.sum())
            measured.append(
                Sensitivity(
                    field=name,
                    swap=float(moved[changed].mean()) if rows else None,
                    null=float(nulled.mean()),
                    noise=float(noise.mean()),
                    rows=rows,
                )
            )
        return measured
    finally:
        system.train(was_training)


def require_sensitive(measured: Iterable[Sensitivity]) -> None:
    """Raises DivergedError when swapping a field moved no pixel of any row, although its value was another one.

    A field whose value is the same in every row of the batch proves nothing and is passed over.
    """
    dead = [m.field for m in measured if m.swap == 0]
    if dead:
        raise DivergedError(
            f"the output does not depend on {', '.join(dead)}: with the same noise, swapping it changes no pixel. "
            "Check that the encoder tells rows apart and that the condition reaches the generator; if the system "
            f"should not use it, set data.ignore=[{','.join(dead)}]"
        )


def swap_field(condition: Condition, name: str, *, seed: int = 0) -> tuple[Condition, Tensor]:
    """The condition with one field taken from other rows, and bool (B,): rows where the value is now another one.

    Labels are taken from rows of another class and sentences from rows with another string, where the batch has
    any. Raises ShapeError for a field that the condition lacks.
    """
    value = getattr(condition, name, None)
    if value is None:
        raise ShapeError(f"the condition has no {name}; it holds {', '.join(condition.given) or 'nothing'}")
    alone = Condition(**{name: value})
    order = alone.mismatch(rng.generator(seed, "swap", name), different_by="label")
    taken: Any = value.index(order) if isinstance(value, Record) else value[order.to(value.device)]
    present = dict(condition.present)
    changed = _differs(value, taken)
    if name in present:
        here = present[name]
        present[name] = here[order.to(here.device)]
        changed = (changed & (here | present[name]).cpu()) | (here != present[name]).cpu()
    swapped: dict[str, Any] = {name: taken}
    return replace(condition, **swapped, present=present), changed


def _differs(a: Any, b: Any) -> Tensor:
    """bool (B,) on the CPU: rows in which any tensor differs."""
    pairs: Iterator[tuple[Tensor, Tensor]]
    if isinstance(a, Record):
        theirs = dict(b.tensors())
        pairs = iter([(tensor, theirs[name]) for name, tensor in a.tensors()])
    else:
        pairs = iter([(a, b)])
    out = torch.zeros(len(a), dtype=torch.bool)
    for mine, other in pairs:
        out |= (mine != other).flatten(1).any(1).cpu() if mine.dim() > 1 else (mine != other).cpu()
    return out


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """(B,) root mean square difference of each row, float64."""
    return (a.double() - b.double()).flatten(1).square().mean(1).sqrt().cpu()


@torch.no_grad()
def _draw(system: System, condition: Condition, seed: int, batch_size: int) -> Tensor:
    sample: Callable[..., Tensor] = system.sample
    device = next(system.parameters(), torch.empty(0)).device
    parts = []
    for start in range(0, len(condition), batch_size):
        ids = range(start, min(start + batch_size, len(condition)))
        part = condition.index(list(ids)).to(device)
        parts.append(sample(part, random=rng.RowRandom(seed, ids, device)))
    return torch.cat(parts)
