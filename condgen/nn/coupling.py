"""Affine coupling of Real NVP and what it is made of: masks, the s/t network, ActNorm and the flow's batch norm.

Dinh, Sohl-Dickstein, Bengio 2017, "Density estimation using Real NVP", arXiv:1605.08803. ActNorm: Kingma, Dhariwal
2018, "Glow", arXiv:1807.03039. Everything here works on (B, C, H, W) and in both directions.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from condgen.nn.sync_norm import sum_over_ranks
from condgen.nn.weight_norm import convolved

Norm = Literal["actnorm", "batch", "none"]
NetNorm = Literal["batch", "none"]
Affine = Literal["released", "paper"]
Start = Literal["released", "identity"]

EPS = 1e-4  # of variances: logits of flat pictures vary little, and log-dets must stay finite


class Area(NamedTuple):
    """What a coupling changes: mask (1, 1, H, W) of ones there, or None for every position; positions = how many."""

    mask: Tensor | None
    positions: int


class Given(NamedTuple):
    """The condition as it reaches one coupling network: vector (B, V), map (B, M, H, W) of the network's size."""

    vector: Tensor | None = None
    map: Tensor | None = None


def checkerboards(x: Tensor) -> tuple[Area, Area]:
    """The two checkerboards of the size of x (..., H, W): positions with even row + column, then with odd."""
    height, width = x.shape[-2:]
    rows = torch.arange(height, device=x.device)
    odd = ((rows[:, None] + torch.arange(width, device=x.device)) % 2).to(x.dtype)[None, None]
    count = height * width // 2
    return Area(1 - odd, height * width - count), Area(odd, count)


class WeightNormConv2d(nn.Module):
    """Convolution of stride 1 and the same size with weight g v / |v|, g per output channel (arXiv:1602.07868).

    torch's own parametrization does the same in three modules per layer; a flow has hundreds of layers.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, *, bias: bool = True) -> None:
        super().__init__()
        start = nn.Conv2d(inputs, outputs, kernel, bias=bias)
        self.padding = kernel // 2
        self.weight = nn.Parameter(start.weight.detach().contiguous(memory_format=torch.channels_last))
        self.gain = nn.Parameter(start.weight.detach().flatten(1).norm(dim=1).view(-1, 1, 1, 1))
        self.bias = start.bias

    def forward(self, x: Tensor) -> Tensor:
        # one kernel each way: 1.4 to 3.6x over plain products; and it copies whatever has its channels not outermost
        weight = torch._weight_norm(self.weight.movedim(1, 3), self.gain, 0).movedim(3, 1)
        return convolved(x, weight, self.bias, padding=(self.padding, self.padding))


class ResidualBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x))) + bias))); the bias (B, width) carries a vector condition."""

    def __init__(self, width: int, norm: NetNorm) -> None:
        super().__init__()
        self.norms = nn.ModuleList(_norm(width, norm) for _ in range(2))
        self.convs = nn.ModuleList([WeightNormConv2d(width, width, 3, bias=False), WeightNormConv2d(width, width, 3)])

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        h = self.convs[0](normed_relu(self.norms[0], x))
        if bias is not None:
            h = h + bias[:, :, None, None]
        h = self.convs[1](normed_relu(self.norms[1], h))
        return h.add_(x) if h.dtype == x.dtype else x + h  # nothing keeps what a 3x3 convolution gives


class CouplingNet(nn.Module):
    """(B, inputs, H, W) -> (B, outputs, H, W): the residual network with skips of the released code.

    blocks, width   residual blocks and their maps
    norm            "batch" as published, or "none": then a row's output never depends on other rows
    doubled         the input times 2 after its norm, since half of it is 0 (checkerboards)
    vector          width of a vector condition: a learned bias of the stem and of every block; 0 = none
    maps            channels of a map condition, concatenated to the input; 0 = none
    """

    def __init__(
        self, inputs: int, outputs: int, *, width: int, blocks: int, norm: NetNorm, doubled: bool,
        vector: int = 0, maps: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.factor = 2.0 if doubled and norm == "batch" else 1.0
        self.norm = _norm(inputs, norm)
        self.stem = WeightNormConv2d(2 * inputs + maps, width, 3)
        self.blocks = nn.ModuleList(ResidualBlock(width, norm) for _ in range(blocks))
        self.skips = nn.ModuleList(WeightNormConv2d(width, width, 1) for _ in range(blocks + 1))
        self.last_norm = _norm(width, norm)
        self.last = WeightNormConv2d(width, outputs, 1)
        self.bias = nn.Linear(vector, width * (blocks + 1), bias=False) if vector else None

    def forward(self, x: Tensor, given: Given) -> Tensor:
        x = self.norm(x.contiguous(memory_format=torch.channels_last)) * self.factor
        h = F.relu(torch.cat([x, -x], dim=1))
        h = self.stem(h if given.map is None else torch.cat([h, given.map.to(h.dtype)], dim=1))
        count = len(self.blocks) + 1
        biases = (None,) * count if self.bias is None else self.bias(given.vector).chunk(count, dim=1)
        if biases[0] is not None:
            h = h + biases[0][:, :, None, None]
        total = self.skips[0](h)
        for block, skip, bias in zip(self.blocks, self.skips[1:], biases[1:], strict=True):
            h = block(h, bias)
            total = total + skip(h)
        return self.last(normed_relu(self.last_norm, total))


class Coupling(nn.Module):
    """Changes one half of x by an affine map whose parameters are a network of the other half and of the condition.

    kind      "checkerboard": positions of an Area; "channel": the first half of the channels, `flip`: the second
    affine    "released": (x + t) exp(s), as the authors' code; "paper": x exp(s) + t. s = factor tanh(raw), with a
              learned factor per channel that starts at 0: at first no coupling scales
    norm      of the changed half afterwards: "actnorm", "batch" or "none"
    start     "released", or "identity": t starts at 0 as well (the last gain is 0, as in Glow)

    The network may run in bf16 under autocast; x, s, t and log-determinants keep the number format of x.
    """

    def __init__(
        self, channels: int, kind: Literal["checkerboard", "channel"], *, flip: bool, width: int, blocks: int,
        norm: Norm = "actnorm", net_norm: NetNorm = "none", affine: Affine = "released", start: Start = "released",
        lag: float = 0.0, vector: int = 0, maps: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        whole = kind == "checkerboard"
        half = channels if whole else channels // 2
        self.kind, self.flip, self.affine = kind, flip, affine
        self.net = CouplingNet(
            half, 2 * half, width=width, blocks=blocks, norm=net_norm, doubled=whole, vector=vector, maps=maps
        )
        self.factor = nn.Parameter(torch.zeros(half, 1, 1))
        self.norm = FlowNorm(half, norm, lag)
        if start == "identity":
            nn.init.zeros_(self.net.last.gain)
            assert self.net.last.bias is not None
            nn.init.zeros_(self.net.last.bias)

    def forward(self, x: Tensor, area: Area, given: Given, *, initialise: bool = False) -> tuple[Tensor, Tensor]:
        """x -> (y, log|det dy/dx| (B,)). `initialise`: ActNorm takes its parameters from this batch."""
        kept, moved = self._split(x, area)
        scale, shift = self._scale_and_shift(kept, area, given)
        y = (moved + shift) * scale.exp() if self.affine == "released" else moved * scale.exp() + shift
        y, logdet = self.norm(y, area, initialise=initialise)
        return self._join(kept, y), scale.flatten(1).sum(1) + logdet

    def inverse(self, y: Tensor, area: Area, given: Given) -> Tensor:
        kept, moved = self._split(y, area)
        scale, shift = self._scale_and_shift(kept, area, given)
        moved = self.norm.inverse(moved, area)
        x = moved * (-scale).exp() - shift if self.affine == "released" else (moved - shift) * (-scale).exp()
        return self._join(kept, x)

    def _scale_and_shift(self, kept: Tensor, area: Area, given: Given) -> tuple[Tensor, Tensor]:
        """(s, t), both 0 where nothing changes."""
        raw, shift = self.net(kept, given).to(kept.dtype).chunk(2, dim=1)
        if area.mask is None:
            return raw.tanh() * self.factor, shift
        return raw.tanh() * (self.factor * area.mask), shift * area.mask

    def _split(self, x: Tensor, area: Area) -> tuple[Tensor, Tensor]:
        if area.mask is not None:
            return x * (1 - area.mask), x
        first, second = x.chunk(2, dim=1)
        return (first, second) if self.flip else (second, first)

    def _join(self, kept: Tensor, moved: Tensor) -> Tensor:
        if self.kind == "checkerboard":
            return moved
        return torch.cat((kept, moved) if self.flip else (moved, kept), dim=1)


class FlowNorm(nn.Module):
    """Normalises the changed half per channel, invertibly, with its log-determinant.

    "actnorm"  learned scale and bias, set by the first training batch so that it comes out with mean 0 and variance 1;
               the same map in training and evaluation, and for every row
    "batch"    statistics of the batch in training, running ones in evaluation and in `inverse`. lag > 0: training
               uses (1 - lag) batch + lag running statistics, as the paper proposes for small batches
    "none"     nothing

    With several processes statistics are those of all of them.
    """

    def __init__(self, channels: int, norm: Norm, lag: float = 0.0, momentum: float = 0.1) -> None:
        super().__init__()
        self.kind, self.lag, self.momentum = norm, lag, momentum
        if norm == "actnorm":
            self.bias = nn.Parameter(torch.zeros(channels, 1, 1))
            self.log_scale = nn.Parameter(torch.zeros(channels, 1, 1))
        elif norm == "batch":
            self.running_mean: Tensor
            self.running_var: Tensor
            self.register_buffer("running_mean", torch.zeros(channels, 1, 1))
            self.register_buffer("running_var", torch.ones(channels, 1, 1))

    def forward(self, y: Tensor, area: Area, *, initialise: bool) -> tuple[Tensor, Tensor]:
        """y -> (normalised y, log-determinant ()), the same for every row."""
        if self.kind == "none":
            return y, y.new_zeros(())
        if self.kind == "actnorm" and initialise:
            with torch.no_grad():
                mean, var = moments(y, area)
                self.bias.copy_(-mean)
                self.log_scale.copy_(-0.5 * (var + EPS).log())
        bias, log_scale = self._batch(y, area) if self.kind == "batch" and self.training else self._held()
        logdet = area.positions * log_scale.sum()
        if area.mask is not None:
            bias, log_scale = bias * area.mask, log_scale * area.mask
        return (y + bias) * log_scale.exp(), logdet

    def inverse(self, y: Tensor, area: Area) -> Tensor:
        if self.kind == "none":
            return y
        bias, log_scale = self._held()
        if area.mask is not None:
            bias, log_scale = bias * area.mask, log_scale * area.mask
        return y * (-log_scale).exp() - bias

    def _held(self) -> tuple[Tensor, Tensor]:
        if self.kind == "actnorm":
            return self.bias, self.log_scale
        return -self.running_mean, -0.5 * (self.running_var + EPS).log()

    def _batch(self, y: Tensor, area: Area) -> tuple[Tensor, Tensor]:
        mean, var = moments(y, area)
        if self.lag:
            mean, var = mean.lerp(self.running_mean, self.lag), var.lerp(self.running_var, self.lag)
        with torch.no_grad():
            step = 1.0 if self.lag else self.momentum
            self.running_mean.lerp_(mean, step)
            self.running_var.lerp_(var, step)
        return -mean, -0.5 * (var + EPS).log()


def moments(y: Tensor, area: Area) -> tuple[Tensor, Tensor]:
    """Mean and variance (C, 1, 1) of y (B, C, H, W) over rows and the area's positions, of every process.

    Two sums rather than E[y^2] - E[y]^2, which cancels for large means.
    """
    axes = (0, 2, 3)
    count: Tensor | float = float(max(len(y) * area.positions, 1))
    several = dist.is_initialized() and dist.get_world_size() > 1
    if several:
        count = sum_over_ranks(torch.tensor([count], dtype=y.dtype, device=y.device))
    total = (y if area.mask is None else y * area.mask).sum(axes)
    mean = ((sum_over_ranks(total) if several else total) / count)[:, None, None]
    gap = y - mean if area.mask is None else (y - mean) * area.mask
    squares = gap.square().sum(axes)
    return mean, ((sum_over_ranks(squares) if several else squares) / count)[:, None, None]


def normed_relu(norm: nn.Module, x: Tensor) -> Tensor:
    """relu(norm(x)), in the place of norm(x) where that is not x: batch norm keeps its input alone."""
    return F.relu(norm(x), inplace=not isinstance(norm, nn.Identity))


def _norm(channels: int, norm: NetNorm) -> nn.Module:
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.Identity()
