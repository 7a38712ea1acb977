"""Exponential moving average of the weights that sampling uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from condgen.engine.state import load_tensors, parameters_of, persistent_buffers
from condgen.errors import ConfigError


class Ema:
    """Average of the parameters of some submodules.

    names     submodules to average; () = the whole system
    decay     in [0, 1); 0 = the weights as they are, and no copy of them
    warmup    use min(decay, (1+n)/(10+n)) for update n, so that the first average is not the random start

    Only parameters are averaged. Buffers are taken from the system as they are: running statistics of batch
    norm are averages already, and a mean of pools, counters or masks has no meaning.
    """

    def __init__(
        self, system: nn.Module, names: Sequence[str] = (), decay: float = 0.999, *, warmup: bool = True
    ) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"ema_decay is {decay}; give a number in [0, 1), such as 0.999")
        self.system, self.names, self.decay, self.warmup = system, tuple(names), decay, warmup
        self.updates = 0
        self._live = list(parameters_of(system, self.names).values())
        self._average = [p.detach().clone() for p in self._live] if decay else []
        place = {parameter: at for at, parameter in enumerate(self._live)}
        self._named = {n: place[p] for n, p in parameters_of(system, self.names, tied=True).items()}

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the current weights; once per training step."""
        n = self.updates
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        if self._average:
            torch._foreach_lerp_(self._average, [p.detach() for p in self._live], 1 - decay)
        self.updates += 1

    def tensors(self) -> dict[str, Tensor]:
        """Averaged parameters and current buffers by their names in the system. Not copies."""
        return {**self._averages(), **persistent_buffers(self.system, self.names)}

    def _averages(self) -> dict[str, Tensor]:
        held = self._average or [p.detach() for p in self._live]
        return {name: held[at] for name, at in self._named.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores what `tensors` gave. CheckpointError names keys that are missing, unknown or misshapen.

        Buffers are not touched: they belong to the system.
        """
        buffers = persistent_buffers(self.system, self.names)
        given = {name: value for name, value in tensors.items() if name not in buffers}
        # without an average of its own the weights are the system's, which it has loaded already
        own = self._averages() if self.decay else {n: t.clone() for n, t in self._averages().items()}
        load_tensors("the averaged weights", own, given)

    @contextmanager
    def applied(self, system: nn.Module | None = None) -> Iterator[None]:
        """The system carries the averaged weights inside this block. Storage is exchanged, nothing is copied."""
        if system is not None and system is not self.system:
            raise ValueError("this average belongs to another system")
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for at, average in enumerate(self._average):
            parameter = self._live[at]
            parameter.data, self._average[at] = average, parameter.data
