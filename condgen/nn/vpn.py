"""Video pixel networks: blocks of multiplicative units, encoders that keep the resolution, a convolutional LSTM.

Kalchbrenner, van den Oord, Simonyan, Danihelka, Vinyals, Graves, Kavukcuoglu 2017, "Video Pixel Networks", ICML,
arXiv:1610.00527. No code was released; where the paper is silent, `docs/parity.md` says what was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgen.nn.causal import ConditionBias, run
from condgen.nn.gates import Cell, Multiply

Kind = Literal["multiplicative", "relu"]
Make = Callable[[int, int, int], nn.Module]  # (inputs, outputs, kernel) -> a convolution that keeps the resolution
GATES: dict[str, int] = {"multiplicative": 4, "relu": 1}
PATTERN = (1, 2, 4, 8)  # dilations of successive blocks, as published; then from the start again
OPEN = 2.0  # bias of gates 1 and 2: an untrained unit lets its memory through, as a forget gate with a bias does
QUIET = 0.1  # gain of the last convolution: an untrained network gives nearly uniform probabilities


def multiply(gates: Tensor, h: Tensor, dim: int = 1) -> Tensor:
    """g1 tanh(g2 h + g3 u) of gates (4c): sigmoids g1, g2, g3 and u = tanh of the last quarter. h (c) is the memory."""
    made: Tensor = Multiply.apply(gates, h.to(gates.dtype), dim)
    return made


def activate(gates: Tensor, h: Tensor, kind: Kind, dim: int = 1) -> Tensor:
    """What a unit makes of its convolution: `multiply`, or a plain ReLU."""
    return multiply(gates, h, dim) if kind == "multiplicative" else F.relu(gates)


class Unit(nn.Module):
    """h (B, c, H, W) -> the same shape. The four convolutions of a multiplicative unit are one, gate after gate.

    conv has a bias.
    """

    def __init__(self, conv: nn.Module, kind: Kind, outputs: int, vector: int, maps: int) -> None:
        super().__init__()
        self.conv, self.kind = conv, kind
        self.told = ConditionBias(vector, maps, outputs)
        if kind == "multiplicative":
            with torch.no_grad():
                conv.bias[: outputs // 2] = OPEN  # type: ignore[operator]

    def forward(self, h: Tensor, vector: Tensor | None, maps: Tensor | None, extra: Tensor | None = None) -> Tensor:
        gates = self.conv(h)
        for more in (self.told(vector, maps), extra):
            gates = gates if more is None else gates.add_(more)  # in place: no convolution needs its result again
        return activate(gates, h, self.kind)


def units(width: int, make: Make, kind: Kind, vector: int, maps: int) -> nn.ModuleList:
    """The two 3 x 3 units of a block."""
    outputs = GATES[kind] * width
    return nn.ModuleList(Unit(make(width, outputs, 3), kind, outputs, vector, maps) for _ in range(2))


class Block(nn.Module):
    """x + 1x1(unit(unit(1x1(x)))): 2c -> c -> c -> c -> 2c. With `outputs` it ends in them, without the residual."""

    def __init__(self, width: int, make: Make, kind: Kind, *, vector: int = 0, maps: int = 0, outputs: int = 0) -> None:
        super().__init__()
        self.narrow = make(2 * width, width, 1)
        self.units = units(width, make, kind, vector, maps)
        self.widen = make(width, outputs or 2 * width, 1)
        self.residual = not outputs
        if outputs:
            with torch.no_grad():
                self.widen.weight.mul_(QUIET)  # type: ignore[operator]

    def forward(self, x: Tensor, vector: Tensor | None, maps: Tensor | None) -> Tensor:
        h = self.narrow(x)
        for unit in self.units:
            h = unit(h, vector, maps)
        y = self.widen(h)
        return y.add_(x) if self.residual else y


def laid_out(x: Tensor, network: nn.Module) -> Tensor:
    """x (B, c, H, W) in the memory layout of the network's kernels.

    A convolution of one channel or one tap cannot tell channels-last by its strides; what follows one in the other
    layout would lay out every activation anew.
    """
    kernels = (p for p in network.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] * p.shape[3] > 1)
    kernel = next(kernels, None)
    inside = kernel is not None and kernel.is_contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last if inside else torch.contiguous_format)


class DilatedConv2d(nn.Conv2d):
    """In single precision on CPUs where channels are no multiple of 16: there the gradient of a dilated bf16 kernel
    holds memory that oneDNN (torch 2.15) never wrote, as large as it happens to be (seen at 32 and 64 columns, not at
    24 or fewer, nor with 12 channels or fewer)."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and self.in_channels % 16 and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())
        return super().forward(x)


def convolution(inputs: int, outputs: int, kernel: int, dilation: int = 1, bias: bool = True) -> nn.Conv2d:
    """A convolution that sees all around it, kept at unit gain."""
    chosen = nn.Conv2d if dilation == 1 else DilatedConv2d
    conv = chosen(inputs, outputs, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=bias)
    nn.init.normal_(conv.weight, std=(inputs * kernel**2) ** -0.5)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class Encoder(nn.Module):
    """One frame (B, C + A, H, W), its action replicated over space -> codes (B, 2 width, H, W).

    dilated   3 x 3 convolutions of successive blocks are dilated by 1, 2, 4, 8, 1, 2, ...
    vector    width of a vector that enters with the frame
    """

    def __init__(
        self, channels: int, *, width: int, blocks: int, kind: Kind, dilated: bool, vector: int, save_memory: bool
    ) -> None:
        super().__init__()
        self.save_memory = save_memory
        self.enter = convolution(channels, 2 * width, 1)
        self.told = ConditionBias(vector, 0, 2 * width)

        def made(dilation: int) -> Make:
            return lambda i, o, k: convolution(i, o, k, dilation if k > 1 else 1)

        self.blocks = nn.ModuleList(
            Block(width, made(PATTERN[i % len(PATTERN)] if dilated else 1), kind) for i in range(blocks)
        )

    def forward(self, x: Tensor, vector: Tensor | None) -> Tensor:
        x, told = self.enter(x), self.told(vector, None)
        x = laid_out(x if told is None else x + told, self)
        for block in self.blocks:
            x = run(block, (x, None, None), self.save_memory)
        return x


State = tuple[Tensor, Tensor]


class ConvLstm(nn.Module):
    """Shi et al. 2015, arXiv:1506.04214, without peepholes: 3 x 3, gates i, f, o sigmoid and g tanh, forget bias 1."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.inward = convolution(inputs, 4 * hidden, 3)
        self.back = convolution(hidden, 4 * hidden, 3, bias=False)
        assert self.inward.bias is not None
        nn.init.ones_(self.inward.bias[hidden : 2 * hidden])

    def forward(self, x: Tensor, state: State | None) -> State:
        """x (B, inputs, H, W) and (h, cell) before it -> (h, cell)."""
        gates = self.inward(x)
        if state is None:
            made: State = Cell.apply(gates, None)
        else:
            made = Cell.apply(gates.add_(self.back(state[0])), state[1].to(gates.dtype))
        return made


class IndependentDecoder(nn.Module):
    """The VPN baseline: every pixel and colour from the past frames alone. `x` is not looked at.

    Blocks without masks on the context (B, maps, H, W) -> parameters (B, P, H, W).
    """

    def __init__(
        self, outputs: int, *, width: int, blocks: int, kind: Kind, vector: int, maps: int, save_memory: bool
    ) -> None:
        super().__init__()
        self.save_memory = save_memory
        self.enter = ConditionBias(vector, maps, 2 * width)
        self.blocks = nn.ModuleList(
            Block(width, convolution, kind, outputs=outputs if i == blocks - 1 else 0) for i in range(blocks)
        )

    def forward(self, x: Tensor | None, vector: Tensor | None, maps: Sequence[Tensor]) -> Tensor:
        y = self.enter(vector, laid_out(maps[0], self))
        for block in self.blocks:
            y = run(block, (y, None, None), self.save_memory)
        assert isinstance(y, Tensor)
        return y
