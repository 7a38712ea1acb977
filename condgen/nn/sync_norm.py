"""Batch normalisation whose statistics span every process, for CPU: torch's own SyncBatchNorm needs a GPU.

With it, N processes at batch B normalise like one process at batch N*B, in the forward and in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from condgen.errors import ShapeError


class _Sum(torch.autograd.Function):
    """Sum over processes. Its gradient is the same sum, so it can be differentiated any number of times."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return sum_over_ranks(gradients[0])


def sum_over_ranks(value: Tensor) -> Tensor:
    """Differentiable sum of equally shaped tensors over every process."""
    out: Tensor = _Sum.apply(value)
    return out


class SyncBatchNorm(_BatchNorm):
    """BatchNorm1d/2d/3d over (N, C) or (N, C, ...), with the statistics of all processes while training.

    Same state_dict keys, same running statistics (unbiased variance) and same evaluation as
    `torch.nn.BatchNorm2d`. With one process it is that layer.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ShapeError(f"batch norm needs (N, C) or (N, C, ...); got shape {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalises (N, C, ...); every process must call it, in the same order."""
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        self._check_input_dim(input)
        axes = [0, *range(2, input.dim())]
        shape = [1, -1] + [1] * (input.dim() - 2)
        wide = input.float()
        # two sums rather than E[x^2] - E[x]^2, which cancels for large means
        count = sum_over_ranks(torch.tensor([float(input.numel() // input.shape[1])], device=input.device))
        mean = sum_over_ranks(wide.sum(axes)) / count
        centred = wide - mean.view(shape)
        variance = sum_over_ranks(centred.square().sum(axes)) / count
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach(), count)
        out = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)

    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        assert self.num_batches_tracked is not None and self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(variance * (count / (count - 1).clamp(min=1)), weight)


def convert(module: nn.Module) -> nn.Module:
    """Replaces every BatchNorm1d/2d/3d under `module` by SyncBatchNorm, sharing its parameters and buffers.

    Works in place and returns the module to use instead of `module` (another one only if it is a norm itself).
    """
    return _convert(module, {})


def _convert(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    if module in done:  # registered under two names: stays one module
        return done[module]
    done[module] = module
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        made = SyncBatchNorm(
            module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
        )
        made._parameters.update(module._parameters)
        made._buffers.update(module._buffers)
        done[module] = made.train(module.training)
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = _convert(child, done)
    return done[module]
