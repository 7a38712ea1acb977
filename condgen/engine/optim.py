"""Optimisers by name, and learning rates as pure functions of the step, so that schedules have no state."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from condgen import registry
from condgen.errors import ConfigError

OptimizerName = Literal["adam", "adamw", "rmsprop", "sgd"]
ScheduleName = Literal["constant", "linear", "cosine", "step", "exponential"]


@dataclass(frozen=True)
class OptimOptions:
    """Options of one phase's optimiser.

    name            adam | adamw | rmsprop | sgd
    lr              peak learning rate, > 0
    betas, eps      of Adam; the default betas are the usual ones for GANs (Radford et al., arXiv:1511.06434)
    alpha           smoothing constant of RMSprop
    momentum        of SGD and RMSprop
    weight_decay    L2 penalty; decoupled for adamw (Loshchilov & Hutter, arXiv:1711.05101)
    clip_norm       largest norm of the phase's whole gradient; None = not clipped
    schedule        constant; linear or cosine: to zero at the last step; step: times decay_factor every decay_every;
                    exponential: times decay_factor every step
    warmup          steps of linear increase from 0
    decay_start     first step at which the schedule falls
    decay_every     steps between two decays of schedule=step
    decay_factor    of schedule=step, in (0, 1], and of exponential, in [0.9, 1], such as 0.999995
    """

    name: OptimizerName = "adam"
    lr: float = 2e-4
    betas: tuple[float, float] = (0.5, 0.999)
    eps: float = 1e-8
    alpha: float = 0.99
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float | None = None
    schedule: ScheduleName = "constant"
    warmup: int = 0
    decay_start: int = 0
    decay_every: int = 0
    decay_factor: float = 0.5

    def __post_init__(self) -> None:
        for what, given, kinds in (
            ("optimiser", self.name, OptimizerName),
            ("schedule", self.schedule, ScheduleName),
        ):
            if given not in get_args(kinds):
                raise ConfigError(registry.unknown(what, str(given), list(get_args(kinds))))
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas is {self.betas}; give two numbers in [0, 1), such as [0.5, 0.999]")
        object.__setattr__(self, "betas", tuple(self.betas))  # yaml gives a list
        for name, allowed, good in (
            ("lr", "a number above 0", self.lr > 0 and math.isfinite(self.lr)),
            ("eps", "a number above 0", self.eps > 0),
            ("weight_decay", "0 or more", self.weight_decay >= 0),
            ("momentum", "a number in [0, 1)", 0 <= self.momentum < 1),
            ("clip_norm", "null or a number above 0", self.clip_norm is None or self.clip_norm > 0),
            ("warmup", "0 or more steps", self.warmup >= 0),
            ("decay_start", "0 or more steps", self.decay_start >= 0),
            ("decay_factor", "a number in (0, 1]", 0 < self.decay_factor <= 1),
        ):
            if not good:
                raise ConfigError(f"optim {name} is {getattr(self, name)}; allowed: {allowed}")
        if self.schedule == "step" and self.decay_every < 1:
            raise ConfigError("schedule=step needs decay_every, the number of steps between two decays")
        if self.schedule == "exponential" and self.decay_factor < 0.9:
            raise ConfigError(
                f"schedule=exponential multiplies at every step; decay_factor {self.decay_factor} would end learning "
                "within 100 steps. Give a factor near 1, such as 0.999995, or schedule=step"
            )


def make_optimizer(parameters: Iterable[nn.Parameter], options: OptimOptions) -> torch.optim.Optimizer:
    """The optimiser that `options` describe; fused kernels wherever torch has them."""
    chosen = list(parameters)
    common: dict[str, Any] = {"lr": options.lr, "weight_decay": options.weight_decay}
    # measured on CPU: fused Adam 3.6x over the default, foreach slower than either
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in chosen)
    if options.name in ("adam", "adamw"):
        on_cpu = fused and all(p.device.type == "cpu" for p in chosen)
        kind: Any = FlatAdam if on_cpu else torch.optim.Adam
        decoupled = options.name == "adamw"
        return kind(
            chosen, betas=options.betas, eps=options.eps, fused=fused, decoupled_weight_decay=decoupled, **common
        )
    if options.name == "sgd":
        return torch.optim.SGD(chosen, momentum=options.momentum, fused=fused, **common)
    return torch.optim.RMSprop(chosen, alpha=options.alpha, eps=options.eps, momentum=options.momentum, **common)


class FlatAdam(torch.optim.Adam):
    """Fused Adam on the CPU that sees channels-last weights as the flat memory they are.

    torch's own kernel copies every tensor that is not contiguous in the order of its dimensions: measured 3.5 times
    slower for channels-last convolution weights. An update is elementwise, so the order does not matter.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        if not all(flat(p, flat_order(p)).is_contiguous() for group in self.param_groups for p in group["params"]):
            super().step()  # some other layout: torch copies
            return
        for group in self.param_groups:
            lists: list[list[torch.Tensor]] = [[] for _ in range(6)]
            self._init_group(group, *lists)
            params, grads, firsts, seconds, _, steps = lists
            if not params:
                continue
            torch._foreach_add_(steps, 1)
            orders = [flat_order(p) for p in params]
            moments = [[flat(t, o) for t, o in zip(m, orders, strict=True)] for m in (firsts, seconds)]
            update: Any = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
            update(
                [flat(t, o) for t, o in zip(params, orders, strict=True)],
                # the kernel reads memory in order: a gradient that lies otherwise is laid out anew
                [flat(t, o).contiguous() for t, o in zip(grads, orders, strict=True)],
                *moments, [], steps, lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1],
                weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False,
            )  # fmt: skip


def flat(tensor: torch.Tensor, order: tuple[int, ...] | None) -> torch.Tensor:
    """The tensor with its dimensions in this order; a view."""
    return tensor if order is None else tensor.permute(order)


def flat_order(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The permutation that makes a channels-last tensor contiguous; None for any other."""
    if tensor.is_contiguous():
        return None
    for order, layout in (((0, 2, 3, 1), torch.channels_last), ((0, 2, 3, 4, 1), torch.channels_last_3d)):
        if tensor.dim() == len(order) and tensor.is_contiguous(memory_format=layout):
            return order
    return None


def state_keys(options: OptimOptions) -> frozenset[str]:
    """The state that this optimiser keeps for a parameter once it has been updated."""
    if options.name in ("adam", "adamw"):
        return frozenset({"step", "exp_avg", "exp_avg_sq"})
    momentum = {"momentum_buffer"} if options.momentum else set()
    return frozenset(momentum if options.name == "sgd" else momentum | {"step", "square_avg"})


def learning_rate(step: int, total_steps: int, options: OptimOptions) -> float:
    """Learning rate of step `step` (0-based) out of `total_steps`."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    start = max(options.decay_start, options.warmup)
    if options.schedule == "constant" or step < start:
        return options.lr
    if options.schedule in ("step", "exponential"):
        every = options.decay_every if options.schedule == "step" else 1
        return float(options.lr * options.decay_factor ** ((step - start) // every))
    passed = min((step - start) / max(total_steps - start, 1), 1.0)
    share = 1 - passed if options.schedule == "linear" else (1 + math.cos(math.pi * passed)) / 2
    return options.lr * share
