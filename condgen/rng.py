"""Randomness as a function of names, never of history.

A generator is derived from the things that identify a draw (seed, step, phase, row), so resuming a run
needs no saved generator state, and a sample does not depend on what was drawn before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derive(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on their order."""
    text = "\x1f".join(str(part) for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator seeded by `derive(*parts)`."""
    return torch.Generator(device=device).manual_seed(derive(*parts))


class StepRandom:
    """The random numbers of one phase of one step, for this rank's rows of the global batch.

    The global batch of a step has `total` rows and this process keeps rows offset .. offset+rows. Without
    gradient accumulation that is rank*rows out of world*rows, the defaults; micro-batch m of A sits at
    (m*world + rank)*rows out of A*world*rows. Every process draws the noise of the whole global batch from
    the same generator and keeps its own rows, so that 2 processes at batch B, or 2 micro-batches of B, see
    the same noise as 1 process at batch 2B.
    """

    def __init__(
        self,
        *parts: int | str,
        rows: int,
        rank: int = 0,
        world: int = 1,
        offset: int | None = None,
        total: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.rows, self.rank, self.world, self.device = rows, rank, world, torch.device(device)
        self.offset = rank * rows if offset is None else offset
        self.total = world * rows if total is None else total
        self.shared = generator(*parts)  # same stream on every rank: per-row draws
        self.local = generator(*parts, "rank", self.offset // max(rows, 1))  # this block's own stream: permutations

    def _rows(self, drawn: Tensor) -> Tensor:
        mine = drawn[self.offset : self.offset + self.rows]
        return mine.to(self.device, non_blocking=True)

    def randn(self, *shape: int) -> Tensor:
        """Standard normal (rows, *shape)."""
        return self._rows(torch.randn(self.total, *shape, generator=self.shared))

    def rand(self, *shape: int) -> Tensor:
        """Uniform [0, 1) (rows, *shape)."""
        return self._rows(torch.rand(self.total, *shape, generator=self.shared))

    def randint(self, high: int, *shape: int) -> Tensor:
        """Integers in [0, high), (rows, *shape)."""
        drawn = torch.randint(high, (self.total, *shape), generator=self.shared)
        return self._rows(drawn)


class RowRandom:
    """Random numbers for sampling: row i is a function of (seed, ids[i]) alone.

    So sample i is the same picture in every batch size, in every order and on every number of processes.
    Successive calls continue each row's own stream.
    """

    def __init__(self, seed: int, ids: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.seed, self.ids, self.device = seed, list(ids), torch.device(device)
        self.streams = [generator(seed, "sample", i) for i in self.ids]

    def __len__(self) -> int:
        return len(self.streams)

    @property
    def rows(self) -> int:
        return len(self.streams)

    def _stack(self, draws: list[Tensor]) -> Tensor:
        return torch.stack(draws).to(self.device)

    def randn(self, *shape: int) -> Tensor:
        """Standard normal (rows, *shape)."""
        return self._stack([torch.randn(shape, generator=stream) for stream in self.streams])

    def rand(self, *shape: int) -> Tensor:
        """Uniform [0, 1) (rows, *shape)."""
        return self._stack([torch.rand(shape, generator=stream) for stream in self.streams])

    def randint(self, high: int, *shape: int) -> Tensor:
        """Integers in [0, high), (rows, *shape)."""
        return self._stack([torch.randint(high, shape, generator=s) for s in self.streams])


Random = StepRandom | RowRandom
"""What a system draws from: `randn(*shape)`, `rand(*shape)`, `randint(high, *shape)`, each (rows, *shape)."""


def permutation(size: int, *parts: int | str) -> Tensor:
    """A permutation of range(size) that is a function of `parts` (int64)."""
    return torch.randperm(size, generator=generator(*parts, "permutation"))
