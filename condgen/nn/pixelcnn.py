"""PixelCNN as of 2016: residual blocks of masked convolutions, with its blind spot.

van den Oord, Kalchbrenner, Kavukcuoglu 2016, "Pixel Recurrent Neural Networks", ICML, arXiv:1601.06759.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgen.nn.causal import CausalConv2d, ConditionBias, run
from condgen.nn.incremental import LineConv, rows_of


class Head(nn.Module):
    """Twice ReLU and a masked 1x1 convolution to `hidden`, then ReLU and one to the parameters."""

    def __init__(self, inputs: int, hidden: int, outputs: int, colours: int) -> None:
        super().__init__()
        sizes = (inputs, hidden, hidden, outputs)
        self.layers = nn.ModuleList(CausalConv2d(a, b, colours=colours) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(F.relu(x))
        return x


class HeadSteps:
    """`Head`, a pixel at a time."""

    def __init__(self, head: Head, rows: int, width: int) -> None:
        self.layers = [LineConv.of(layer, rows, width) for layer in head.layers]  # type: ignore[arg-type]

    def start_row(self) -> None:
        for layer in self.layers:
            layer.start_row()

    def parameters(self, x: Tensor, column: int, colour: int) -> Tensor:
        for layer in self.layers:
            torch.clamp(x, min=0, out=layer.write[colour][column])
            x = layer.pixel(column, colour)
        return x


class Block(nn.Module):
    """x + 1x1(ReLU(k x k(ReLU(1x1(ReLU(x)))) + condition)): 2h -> h -> h -> 2h."""

    def __init__(self, width: int, kernel: int, colours: int, vector: int, maps: int) -> None:
        super().__init__()
        side = kernel // 2
        self.narrow = CausalConv2d(2 * width, width, colours=colours)
        self.wide = CausalConv2d(width, width, above=side, left=side, right=side, colours=colours)
        self.told = ConditionBias(vector, maps, width)
        self.widen = CausalConv2d(width, 2 * width, colours=colours)

    def forward(self, x: Tensor, vector: Tensor | None, maps: Tensor | None) -> Tensor:
        y = self.wide(F.relu(self.narrow(F.relu(x))))
        told = self.told(vector, maps)
        y = y if told is None else y + told
        return x + self.widen(F.relu(y))


class ResidualStack(nn.Module):
    """(B, C, H, W) in [-1, 1] -> parameters (B, P, H, W): a masked 7x7 convolution, blocks, a head.

    block      makes one; called with the stream (B, 2 * width, H, W), the vector and the map of the condition
    colours    C: a colour sees those before it in its own pixel. 1: a pixel sees none of its own colours
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        block: Callable[[], nn.Module],
        *,
        width: int,
        blocks: int,
        head_width: int,
        colours: int,
        save_memory: bool,
    ) -> None:
        super().__init__()
        self.save_memory = save_memory
        self.first = CausalConv2d(channels, 2 * width, above=3, left=3, right=3, kind="A", colours=colours)
        self.blocks = nn.ModuleList(block() for _ in range(blocks))
        self.head = Head(2 * width, head_width, outputs, colours)

    def forward(self, x: Tensor, vector: Tensor | None, maps: Sequence[Tensor]) -> Tensor:
        place = maps[0] if maps else None
        x = self.first(x)
        for block in self.blocks:
            x = run(block, (x, vector, place), self.save_memory)
        return self.head(x)


class PixelCnn2016(ResidualStack):
    """width      h; the residual stream is 2h wide
    kernel     of the masked convolution in each block, 3 as published; the first one is 7x7, mask A
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        width: int,
        kernel: int,
        colours: int,
        vector: int = 0,
        maps: int = 0,
        save_memory: bool = False,
        **sizes: int,
    ) -> None:
        block = partial(Block, width, kernel, colours, vector, maps)
        super().__init__(channels, outputs, block, width=width, colours=colours, save_memory=save_memory, **sizes)

    def steps(self, rows: int, size: tuple[int, int], vector: Tensor | None, maps: Sequence[Tensor]) -> PixelCnnSteps:
        """The same network a pixel at a time, for pictures of `size` (H, W)."""
        return PixelCnnSteps(self, rows, size[1], vector, maps[0] if maps else None)


class PixelCnnSteps:
    """`PixelCnn2016` in the protocol `condgen.nn.incremental.Steps`."""

    def __init__(self, net: PixelCnn2016, rows: int, width: int, vector: Tensor | None, maps: Tensor | None) -> None:
        self.first = LineConv.of(net.first, rows, width)
        blocks: list[Block] = list(net.blocks)  # type: ignore[arg-type]
        self.blocks = [
            tuple(LineConv.of(conv, rows, width) for conv in (block.narrow, block.wide, block.widen))
            for block in blocks
        ]
        self.told = [block.told(vector, maps) for block in blocks]
        self.head = HeadSteps(net.head, rows, width)

    def start_row(self, row: int) -> None:
        self.first.start_row()
        for (narrow, wide, widen), told in zip(self.blocks, self.told, strict=True):
            narrow.start_row()
            wide.start_row(rows_of(told, row))
            widen.start_row()
        self.head.start_row()

    def parameters(self, column: int, colour: int) -> Tensor:
        x = self.first.pixel(column, colour)
        for convs in self.blocks:
            y = x
            for conv in convs:
                torch.clamp(y, min=0, out=conv.write[colour][column])
                y = conv.pixel(column, colour)
            x = x + y
        return self.head.parameters(x, column, colour)

    def put(self, column: int, colour: int, value: Tensor) -> None:
        self.first.write[colour][column].copy_(value)
