"""Gated PixelCNN: a vertical and a horizontal stack, so that no earlier pixel is missed.

van den Oord, Kalchbrenner, Vinyals, Espeholt, Graves, Kavukcuoglu 2016, "Conditional Image Generation with PixelCNN
Decoders", NeurIPS, arXiv:1606.05328.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgen.nn.causal import CausalConv2d, ConditionBias, Kind, RowsConv2d, down, run
from condgen.nn.incremental import LineConv, RowConv, rows_of
from condgen.nn.pixelcnn import Head, HeadSteps


def gate(x: Tensor, dim: int) -> Tensor:
    """tanh of the first half times sigmoid of the second."""
    a, b = x.chunk(2, dim)
    return torch.tanh(a) * torch.sigmoid(b)


class GatedLayer(nn.Module):
    """v' = gate(n x n(v) + told), h' = h + 1x1(gate(1 x n(h) + 1x1(down(n x n(v))) + told)).

    The vertical convolution takes its own row in whole and is moved one row down before the horizontal stack sees it.
    The first layer has no residual and a horizontal convolution of kind A.
    """

    def __init__(
        self, inputs: int, width: int, kernel: int, *, first: bool, colours: int, vector: int, maps: int
    ) -> None:
        super().__init__()
        side = kernel // 2
        self.first = first
        self.vertical = RowsConv2d(inputs, 2 * width, above=side, beside=side)
        kind: Kind = "A" if first else "B"
        self.horizontal = CausalConv2d(inputs, 2 * width, left=side, kind=kind, colours=colours)
        self.link = nn.Conv2d(2 * width, 2 * width, 1, bias=False)
        self.out = CausalConv2d(width, width, colours=colours)
        self.told_vertical = ConditionBias(vector, maps, 2 * width)
        self.told_horizontal = ConditionBias(vector, maps, 2 * width)

    def forward(self, v: Tensor, h: Tensor, vector: Tensor | None, maps: Tensor | None) -> tuple[Tensor, Tensor]:
        above = self.vertical(v)
        beside = self.horizontal(h) + self.link(down(above))
        told_v, told_h = self.told_vertical(vector, maps), self.told_horizontal(vector, maps)
        v = gate(above if told_v is None else above + told_v, 1)
        out = self.out(gate(beside if told_h is None else beside + told_h, 1))
        return v, out if self.first else h + out


class GatedPixelCnn(nn.Module):
    """(B, C, H, W) in [-1, 1] -> parameters (B, P, H, W).

    width      p of each stack; kernel n of the vertical n x n and the horizontal 1 x n convolutions
    colours    C: a colour sees those before it in its own pixel. 1: a pixel sees none of its own colours
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        width: int,
        blocks: int,
        kernel: int,
        head_width: int,
        colours: int,
        vector: int = 0,
        maps: int = 0,
        save_memory: bool = False,
    ) -> None:
        super().__init__()
        self.save_memory = save_memory
        self.layers = nn.ModuleList(
            GatedLayer(width if i else channels, width, kernel, first=i == 0, colours=colours, vector=vector, maps=maps)
            for i in range(blocks)
        )
        self.head = Head(width, head_width, outputs, colours)
        last = self.layers[-1]
        last.told_vertical = ConditionBias(0, 0, 2 * width)  # nobody looks at the last layer's vertical output

    def forward(self, x: Tensor, vector: Tensor | None, maps: Sequence[Tensor]) -> Tensor:
        place = maps[0] if maps else None
        v = h = x
        for layer in self.layers:
            v, h = run(layer, (v, h, vector, place), self.save_memory)
        return self.head(h)

    def steps(self, rows: int, size: tuple[int, int], vector: Tensor | None, maps: Sequence[Tensor]) -> GatedSteps:
        """The same network a pixel at a time, for pictures of `size` (H, W)."""
        return GatedSteps(self, rows, size[1], vector, maps[0] if maps else None)


class GatedSteps:
    """`GatedPixelCnn` in the protocol `condgen.nn.incremental.Steps`."""

    def __init__(self, net: GatedPixelCnn, rows: int, width: int, vector: Tensor | None, maps: Tensor | None) -> None:
        layers: list[GatedLayer] = list(net.layers)  # type: ignore[arg-type]
        self.vertical = [
            RowConv(
                layer.vertical.weight, layer.vertical.bias, rows=rows, width=width,
                left=layer.vertical.beside, right=layer.vertical.beside,
            )
            for layer in layers
        ]  # fmt: skip
        self.links = [layer.link.weight.flatten(1) for layer in layers]
        self.horizontal = [LineConv.of(layer.horizontal, rows, width) for layer in layers]
        self.out = [LineConv.of(layer.out, rows, width) for layer in layers]
        self.told_v = [layer.told_vertical(vector, maps) for layer in layers]
        self.told_h = [layer.told_horizontal(vector, maps) for layer in layers]
        self.head = HeadSteps(net.head, rows, width)
        first = layers[0].horizontal
        self.picture = first.weight.new_zeros(rows, width, first.weight.shape[1])  # the row being drawn

    def start_row(self, row: int) -> None:
        links = self._vertical(row - 1) if row else [None] * len(self.links)
        for link, conv, out, told in zip(links, self.horizontal, self.out, self.told_h, strict=True):
            here = rows_of(told, row)
            conv.start_row(link if here is None else here if link is None else link + here)
            out.start_row()
        self.head.start_row()

    def _vertical(self, row: int) -> list[Tensor | None]:
        """The vertical stack at a row that is complete, as the next row's horizontal stack sees it."""
        v, seen = self.picture, list[Tensor | None]()
        for conv, link, told in zip(self.vertical, self.links, self.told_v, strict=True):
            conv.push(v)
            above = conv.read()
            seen.append(F.linear(above, link))
            here = rows_of(told, row)
            v = gate(above if here is None else above + here, 2)
        return seen

    def parameters(self, column: int, colour: int) -> Tensor:
        y = self.horizontal[0].pixel(column, colour)
        self.out[0].write[colour][column].copy_(gate(y, 1))
        h = self.out[0].pixel(column, colour)
        for conv, out in zip(self.horizontal[1:], self.out[1:], strict=True):
            conv.write[colour][column].copy_(h)
            out.write[colour][column].copy_(gate(conv.pixel(column, colour), 1))
            h = h + out.pixel(column, colour)
        return self.head.parameters(h, column, colour)

    def put(self, column: int, colour: int, value: Tensor) -> None:
        self.horizontal[0].write[colour][column].copy_(value)
        first = 0 if value.shape[1] > 1 else colour
        self.picture[:, column, first : first + value.shape[1]] = value
