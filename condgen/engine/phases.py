"""Phases at work: which parameters each one owns, and one update of one phase."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from condgen import registry
from condgen.engine.feed import Place, StepData
from condgen.engine.optim import OptimOptions, learning_rate, make_optimizer, state_keys
from condgen.engine.options import TrainOptions
from condgen.engine.state import NAMED
from condgen.engine.world import World
from condgen.errors import ConfigError
from condgen.rng import StepRandom
from condgen.systems.base import Losses, LossMethod, Phase, Trainable
from condgen.types import Batch

logger = logging.getLogger(__name__)

BatchAt = Callable[[int, int], Batch]
"""(repeat, micro-batch) -> the batch, with what the system shares attached."""

OVERFLOWS_IN_A_ROW = 25  # halvings of an fp16 loss scale from 2**16 to below 2**-8: more means divergence
ZEROS_IN_A_ROW = 50  # losses of exactly 0: a critic that saturated, or a batch without negatives


class PhaseLoss(nn.Module):
    """A phase as a module: its parameters are the trained ones, its forward is the loss method.

    This is what DDP wraps. Its parameters are disjoint from those of other phases, so alternation and
    accumulation stay correct; a loss called past the wrapper would not be synchronised at all.
    """

    def __init__(self, system: Trainable, phase: Phase) -> None:
        super().__init__()
        for name in phase.trains:
            self.add_module(name.replace(".", "__"), system.get_submodule(name))
        self.loss: LossMethod = phase.loss

    def forward(self, batch: Batch, random: StepRandom) -> Losses | None:
        return self.loss(batch, random)


def owned(system: Trainable, phases: Sequence[Phase]) -> dict[str, dict[str, nn.Parameter]]:
    """Phase name -> its trainable parameters by name in the system.

    Parameters with requires_grad False belong to nobody and stay frozen. ConfigError for names that are not
    submodules, phases that share parameters or have none, and trainable parameters in no phase.
    """
    if not phases:
        raise ConfigError(f"{type(system).__name__}.phases() is empty; a system needs at least one phase")
    names = {id(p): name for name, p in system.named_parameters()}
    owner: dict[int, str] = {}
    out: dict[str, dict[str, nn.Parameter]] = {}
    for phase in phases:
        if phase.name in out:
            raise ConfigError(f"two phases are called {phase.name!r}; give each its own name")
        if phase.every < 1 or phase.repeats < 1 or phase.start < 0:
            raise ConfigError(f"phase {phase.name!r}: every and repeats must be at least 1, and start at least 0")
        out[phase.name] = {}
        for parameter in _trained(system, phase):
            if not parameter.requires_grad:
                continue
            other = owner.setdefault(id(parameter), phase.name)
            if other != phase.name:
                raise ConfigError(
                    f"phases {other!r} and {phase.name!r} both train {names[id(parameter)]}; "
                    "phases train disjoint parameters, so give each network its own copy or one phase both losses"
                )
            out[phase.name][names[id(parameter)]] = parameter
        if not out[phase.name]:
            raise ConfigError(f"phase {phase.name!r} has nothing to train in {', '.join(phase.trains) or 'nothing'}")
    idle = [name for name, p in system.named_parameters() if p.requires_grad and id(p) not in owner]
    if idle:
        more = f" and {len(idle) - NAMED} more" if len(idle) > NAMED else ""
        raise ConfigError(
            f"no phase trains {', '.join(idle[:NAMED])}{more}. Name their submodule in a phase's `trains`, "
            "or freeze them with requires_grad_(False)"
        )
    return out


def _trained(system: Trainable, phase: Phase) -> Iterable[nn.Parameter]:
    for name in phase.trains:
        try:
            child = system.get_submodule(name)
        except AttributeError:
            allowed = [n for n, _ in system.named_children()]
            raise ConfigError(f"phase {phase.name!r}: {registry.unknown('submodule', name, allowed)}") from None
        yield from child.parameters()


def options_for(phases: Sequence[Phase], optim: Mapping[str, OptimOptions]) -> dict[str, OptimOptions]:
    """Phase name -> its options, or the "default" ones. ConfigError for keys that are no phase."""
    allowed = ["default", *(phase.name for phase in phases)]
    for name in optim:
        if name not in allowed:
            raise ConfigError(registry.unknown("phase", name, allowed))
    fallback = optim.get("default", OptimOptions())
    return {phase.name: optim.get(phase.name, fallback) for phase in phases}


@dataclass
class Result:
    """What one update did.

    status   "updated"; "skipped": some process's loss method returned None; "nonfinite": nothing was changed
    values   scalars by name, "loss" and "grad_norm" among them
    facts    for nonfinite: this process's loss, norm and first bad parameter
    """

    status: str
    values: dict[str, Tensor | float] = field(default_factory=dict)
    facts: dict[str, object] = field(default_factory=dict)


class Runner:
    """One phase with its optimiser: computes, agrees, clips, updates.

    parameters   name in the system -> trained parameter
    overflows    fp16 updates in a row whose gradients overflowed; the scale adapts, so a few are normal
    zeros        updates in a row whose loss was exactly 0
    """

    def __init__(
        self,
        system: Trainable,
        phase: Phase,
        parameters: dict[str, nn.Parameter],
        optim: OptimOptions,
        options: TrainOptions,
        world: World,
    ) -> None:
        self.phase, self.parameters, self.optim, self.options, self.world = phase, parameters, optim, options, world
        self.module = world.wrap(PhaseLoss(system, phase))
        self.optimizer = make_optimizer(parameters.values(), optim)
        self.state_keys = state_keys(optim)
        self.scaler = world.scaler()
        self.overflows = self.zeros = 0
        self._trained = list(parameters.values())

    def freeze(self, frozen: bool) -> None:
        for parameter in self._trained:
            parameter.requires_grad_(not frozen)

    def update(self, data: StepData, repeat: int, batch: BatchAt) -> Result:
        """One update from the micro-batches of `repeat`, which `batch` gives; leaves no gradients behind."""
        try:
            values = self._backward(data, repeat, batch)
            return Result("skipped") if values is None else self._apply(values, data.step)
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    def _backward(self, data: StepData, repeat: int, batch_at: BatchAt) -> dict[str, Tensor] | None:
        """Sums gradients over micro-batches; returns averaged scalars, or None to skip this update."""
        count = self.options.accumulate
        total: dict[str, Tensor] = {}
        for micro in range(count):
            place = Place(data.step, repeat, micro)
            batch = batch_at(repeat, micro)
            random = data.feed.random(self.phase.name, place)
            self.world.seed(self.options.seed, self.world.rank, data.step, self.phase.name, repeat, micro)
            with self._held(micro < count - 1):
                with self.world.autocast():
                    losses = self.module(batch, random)
                # before the backward pass: its collectives need every process
                if self.world.any(losses is None):
                    return None
                loss = self._checked(losses)
                scaled = loss if count == 1 else loss / count
                (self.scaler.scale(scaled) if self.scaler is not None else scaled).backward()
            for name, value in losses.items():
                part = torch.as_tensor(value).detach() / count
                total[name] = total[name] + part if name in total else part
        return total

    def _held(self, held: bool) -> AbstractContextManager[None]:
        """Keeps gradients on this process inside the block: only the last micro-batch is synchronised."""
        if held and isinstance(self.module, nn.parallel.DistributedDataParallel):
            return self.module.no_sync()
        return nullcontext()

    def _checked(self, losses: Losses) -> Tensor:
        loss = losses.get("loss")
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ConfigError(f"phase {self.phase.name!r} must return {{'loss': scalar tensor, ...}}; got {losses}")
        if not loss.requires_grad:
            raise ConfigError(
                f"the loss of phase {self.phase.name!r} does not depend on what it trains "
                f"({', '.join(self.phase.trains)}); was it computed under no_grad or from detached values?"
            )
        return loss.reshape(())

    def _apply(self, values: dict[str, Tensor], step: int) -> Result:
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self._trained if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        loss = values["loss"]
        # the one wait for the device in this update
        held = torch.stack([loss.reshape(()).float(), norm.to(loss.device, torch.float32)]).tolist()
        bad_loss = not math.isfinite(held[0])
        lost, bad = self.world.agree(bad_loss, bad_loss or not math.isfinite(held[1]))
        if bad:
            overflow = self.scaler is not None and not lost
            return self._refuse(held, overflow)
        self.overflows = 0
        self._watch(held[0], step)
        if self.optim.clip_norm is not None and held[1] > self.optim.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self._trained, self.optim.clip_norm, norm)
        rate = self._rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        return Result("updated", {**values, "grad_norm": held[1], "lr": rate})

    def _rate(self, step: int) -> float:
        """The schedule runs over the phase's own steps, so that what rests or begins later has all of it."""
        start, stop = self.phase.start, self.options.steps
        if self.phase.stop is not None:
            stop = min(stop, self.phase.stop)
        return learning_rate(step - start, stop - start, self.optim)

    def _watch(self, loss: float, step: int) -> None:
        """Warns, once for each stretch, when nothing is learned any more."""
        self.zeros = self.zeros + 1 if loss == 0 else 0
        if self.zeros == ZEROS_IN_A_ROW:
            logger.warning(
                "phase %r at step %d: its loss has been exactly 0 for %d updates, so it learns nothing; it may have "
                "collapsed. Compare sample pictures, and lower optim.%s.lr or regularise it",
                self.phase.name, step + 1, self.zeros, self.phase.name,
            )  # fmt: skip

    def _refuse(self, held: list[float], overflow: bool) -> Result:
        """A loss or gradient that is not finite on some process. fp16 overflow only lowers the loss scale."""
        if self.scaler is not None:
            self.scaler.update()
        if overflow:
            self.overflows += 1
            if self.overflows < OVERFLOWS_IN_A_ROW:
                return Result("skipped")
        first = next((n for n, p in self.parameters.items() if p.grad is not None and not _finite(p.grad)), None)
        return Result("nonfinite", facts={"loss": held[0], "grad_norm": held[1], "parameter": first})


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
