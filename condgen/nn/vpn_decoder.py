"""Decoders of video pixel networks: a PixelCNN of multiplicative units, with one stack or two, whole or pixel by pixel.

Kalchbrenner et al. 2017, "Video Pixel Networks", ICML, arXiv:1610.00527. The context of a frame, which knows nothing
of it, is added to every gate of every unit and never masked. The second stack is that of Gated PixelCNN
(arXiv:1606.05328): rows above are seen whole, so that no earlier pixel is missed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgen.nn.causal import CausalConv2d, ConditionBias, Kind, RowsConv2d, down, run
from condgen.nn.incremental import LineConv, RowConv, rows_of
from condgen.nn.vpn import GATES, Block, Make, Unit, activate, convolution, laid_out
from condgen.nn.vpn import Kind as UnitKind


def masked(colours: int) -> Make:
    """Causal convolutions that look at the rows above and to the left, as published."""

    def make(inputs: int, outputs: int, kernel: int) -> CausalConv2d:
        side = kernel // 2
        return CausalConv2d(inputs, outputs, above=side, left=side, right=side, colours=colours)

    return make


def beside(colours: int) -> Make:
    """Causal convolutions that look to the left alone."""
    return lambda inputs, outputs, kernel: CausalConv2d(inputs, outputs, left=kernel // 2, colours=colours)


def rows(inputs: int, outputs: int, kernel: int) -> nn.Module:
    """Convolutions over complete rows: what lies above, and the own row whole."""
    if kernel == 1:
        return convolution(inputs, outputs, 1)
    return RowsConv2d(inputs, outputs, above=kernel // 2, beside=kernel // 2)


class MaskedDecoder(nn.Module):
    """Frame (B, C, H, W) in [-1, 1] and context (B, maps, H, W) -> parameters (B, P, H, W), with a blind spot.

    width     c; the residual stream is 2c wide
    colours   C: a colour sees those before it in its own pixel
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        width: int,
        blocks: int,
        kind: UnitKind,
        vector: int,
        maps: int,
        save_memory: bool,
    ) -> None:
        super().__init__()
        self.save_memory, self.colours = save_memory, channels
        self.enter = CausalConv2d(channels, 2 * width, above=1, left=1, right=1, kind="A", colours=channels)
        self.blocks = nn.ModuleList(
            Block(
                width, masked(channels), kind, vector=vector, maps=maps, outputs=outputs if i == blocks - 1 else 0
            )
            for i in range(blocks)
        )  # fmt: skip

    def forward(self, x: Tensor, vector: Tensor | None, maps: Sequence[Tensor]) -> Tensor:
        x = laid_out(self.enter(x), self)
        for block in self.blocks:
            x = run(block, (x, vector, maps[0]), self.save_memory)
        return x

    def steps(self, batch: int, size: tuple[int, int], vector: Tensor | None, maps: Sequence[Tensor]) -> MaskedSteps:
        """The same network a pixel at a time, for frames of `size` (H, W)."""
        return MaskedSteps(self, batch, size[1], vector, maps[0])


class TwoStackBlock(nn.Module):
    """A block over complete rows, v, and one along the row, h; each unit of h also sees that of v one row above."""

    def __init__(self, width: int, kind: UnitKind, *, colours: int, vector: int, maps: int, outputs: int = 0) -> None:
        super().__init__()
        self.above = Block(width, rows, kind, vector=vector, maps=maps)
        self.left = Block(width, beside(colours), kind, vector=vector, maps=maps, outputs=outputs)
        self.links = nn.ModuleList(convolution(width, GATES[kind] * width, 1, bias=False) for _ in range(2))
        if outputs:
            self.above.widen = nn.Identity()  # nobody looks at the last block's rows

    def forward(self, v: Tensor, h: Tensor, vector: Tensor | None, maps: Tensor | None) -> tuple[Tensor, Tensor]:
        a, b = self.above.narrow(v), self.left.narrow(h)
        for upper, unit, link in zip(self.above.units, self.left.units, self.links, strict=True):
            a = upper(a, vector, maps)
            b = unit(b, vector, maps, link(down(a)))
        out = self.left.widen(b)
        return (v + self.above.widen(a), h + out) if self.left.residual else (v, out)


class TwoStackDecoder(nn.Module):
    """As `MaskedDecoder`, without a blind spot."""

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        width: int,
        blocks: int,
        kind: UnitKind,
        vector: int,
        maps: int,
        save_memory: bool,
    ) -> None:
        super().__init__()
        self.save_memory, self.colours = save_memory, channels
        first: Kind = "A"
        self.enter_above = RowsConv2d(channels, 2 * width, above=1, beside=1)
        self.enter_left = CausalConv2d(channels, 2 * width, left=1, kind=first, colours=channels)
        self.link = convolution(2 * width, 2 * width, 1, bias=False)
        self.blocks = nn.ModuleList(
            TwoStackBlock(
                width, kind, colours=channels, vector=vector, maps=maps, outputs=outputs if i == blocks - 1 else 0
            )
            for i in range(blocks)
        )  # fmt: skip

    def forward(self, x: Tensor, vector: Tensor | None, maps: Sequence[Tensor]) -> Tensor:
        v = laid_out(self.enter_above(x), self)
        h = laid_out(self.enter_left(x) + self.link(down(v)), self)
        for block in self.blocks:
            v, h = run(block, (v, h, vector, maps[0]), self.save_memory)
        return h

    def steps(self, batch: int, size: tuple[int, int], vector: Tensor | None, maps: Sequence[Tensor]) -> TwoStackSteps:
        """The same network a pixel at a time, for frames of `size` (H, W)."""
        return TwoStackSteps(self, batch, size[1], vector, maps[0])


class Scratch:
    """Memory for the gates of one pixel and one colour, which all units use in turn: a step is many tiny operations,
    and half of their time would go into making tensors."""

    def __init__(self, like: Tensor, batch: int, width: int, kind: UnitKind) -> None:
        self.gates = like.new_empty(batch, GATES[kind] * width)
        if kind == "multiplicative":
            self.open, self.u = self.gates[:, : 3 * width], self.gates[:, 3 * width :]
            self.g1, self.g2, self.g3 = self.open.chunk(3, 1)
            self.h = like.new_empty(batch, width)


class LineUnit:
    """A `Unit` of which the current row is filled from the left: its input is written to `slot`."""

    def __init__(self, unit: Unit, batch: int, width: int, scratch: Scratch) -> None:
        assert isinstance(unit.conv, CausalConv2d)
        self.conv, self.told = LineConv.of(unit.conv, batch, width), unit.told
        self.multiplicative, self.scratch = unit.kind == "multiplicative", scratch
        self.slot = self.conv.write

    def start_row(self, row: int, vector: Tensor | None, maps: Tensor, extra: Tensor | None) -> None:
        """`extra` (B, W, G c) is added to the gates."""
        here = told_row(self.told, row, vector, maps)
        self.conv.start_row(here if extra is None else extra if here is None else here + extra)

    def pixel(self, column: int, colour: int, out: Tensor) -> None:
        """`activate`, in place."""
        s = self.scratch
        self.conv.pixel(column, colour, out=s.gates)
        if not self.multiplicative:
            torch.clamp(s.gates, min=0, out=out)
            return
        s.open.sigmoid_()
        s.u.tanh_()
        torch.mul(s.g2, self.slot[colour][column], out=s.h)
        torch.mul(s.g1, s.h.addcmul_(s.g3, s.u).tanh_(), out=out)


class LineBlock:
    """A `Block` of causal convolutions, a pixel at a time."""

    def __init__(self, block: Block, batch: int, width: int, scratch: Scratch) -> None:
        self.narrow, self.widen = (LineConv.of(conv, batch, width) for conv in (block.narrow, block.widen))  # type: ignore[arg-type]
        self.first, self.second = (LineUnit(unit, batch, width, scratch) for unit in block.units)  # type: ignore[arg-type]
        self.residual, self.one_colour = block.residual, len(self.narrow.write) == 1

    def start_row(
        self, row: int, vector: Tensor | None, maps: Tensor, extras: Sequence[Tensor | None] = (None, None)
    ) -> None:
        self.narrow.start_row()
        self.first.start_row(row, vector, maps, extras[0])
        self.second.start_row(row, vector, maps, extras[1])
        self.widen.start_row()

    def pixel(self, x: Tensor, column: int, colour: int) -> Tensor:
        h = self.first.slot[colour][column]
        if self.one_colour:  # nothing else is seen of the pixel, so nothing needs to be kept
            self.narrow.products[0](self.narrow.bases[0][column], x, h)
        else:
            self.narrow.write[colour][column].copy_(x)
            self.narrow.pixel(column, colour, out=h)
        self.first.pixel(column, colour, out=self.second.slot[colour][column])
        self.second.pixel(column, colour, out=self.widen.write[colour][column])
        y = self.widen.pixel(column, colour)
        return y.add_(x) if self.residual else y


def line_blocks(blocks: Sequence[Block], batch: int, width: int, colours: int) -> list[LineBlock]:
    first = blocks[0].units[0]
    assert isinstance(first, Unit) and isinstance(first.conv, CausalConv2d)
    weight = first.conv.weight
    scratch = Scratch(weight, batch, weight.shape[1] // colours, first.kind)
    return [LineBlock(block, batch, width, scratch) for block in blocks]


class MaskedSteps:
    """`MaskedDecoder` in the protocol `condgen.nn.incremental.Steps`."""

    def __init__(self, net: MaskedDecoder, batch: int, width: int, vector: Tensor | None, maps: Tensor) -> None:
        self.enter = LineConv.of(net.enter, batch, width)
        self.blocks = line_blocks(list(net.blocks), batch, width, net.colours)  # type: ignore[arg-type]
        self.vector, self.maps = vector, maps

    def start_row(self, row: int) -> None:
        self.enter.start_row()
        for block in self.blocks:
            block.start_row(row, self.vector, self.maps)

    def parameters(self, column: int, colour: int) -> Tensor:
        x = self.enter.pixel(column, colour)
        for block in self.blocks:
            x = block.pixel(x, column, colour)
        return x

    def put(self, column: int, colour: int, value: Tensor) -> None:
        self.enter.write[colour][column].copy_(value)


class TwoStackSteps:
    """`TwoStackDecoder` in the protocol `condgen.nn.incremental.Steps`: the rows above are computed a row at a time."""

    def __init__(self, net: TwoStackDecoder, batch: int, width: int, vector: Tensor | None, maps: Tensor) -> None:
        self.net, self.vector, self.maps = net, vector, maps
        self.blocks: list[TwoStackBlock] = list(net.blocks)  # type: ignore[arg-type]
        self.enter_above = row_conv(net.enter_above, batch, width)
        self.above = [[row_conv(unit.conv, batch, width) for unit in block.above.units] for block in self.blocks]
        self.enter_left = LineConv.of(net.enter_left, batch, width)
        self.left = line_blocks([block.left for block in self.blocks], batch, width, net.colours)
        weight = net.enter_left.weight
        self.frame = weight.new_zeros(batch, width, weight.shape[1])  # the row being drawn

    def start_row(self, row: int) -> None:
        first, links = self._above(row - 1) if row else (None, [(None, None)] * len(self.blocks))
        self.enter_left.start_row(first)
        for block, extras in zip(self.left, links, strict=True):
            block.start_row(row, self.vector, self.maps, extras)

    def _above(self, row: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The stack over rows at a row that is complete, as each unit of the next row sees it."""
        self.enter_above.push(self.frame)
        v = self.enter_above.read()
        first, seen = point(self.net.link, v), list[tuple[Tensor, Tensor]]()
        for block, convs in zip(self.blocks, self.above, strict=True):
            a, links = point(block.above.narrow, v), list[Tensor]()
            for unit, conv, link in zip(block.above.units, convs, block.links, strict=True):
                assert isinstance(unit, Unit)
                conv.push(a)
                gates, here = conv.read(), told_row(unit.told, row, self.vector, self.maps)
                a = activate(gates if here is None else gates + here, a, unit.kind, 2)
                links.append(point(link, a))
            seen.append((links[0], links[1]))
            if block.left.residual:
                v = v + point(block.above.widen, a)
        return first, seen

    def parameters(self, column: int, colour: int) -> Tensor:
        x = self.enter_left.pixel(column, colour)
        for block in self.left:
            x = block.pixel(x, column, colour)
        return x

    def put(self, column: int, colour: int, value: Tensor) -> None:
        self.enter_left.write[colour][column].copy_(value)
        self.frame[:, column, colour : colour + 1] = value


def told_row(told: ConditionBias, row: int, vector: Tensor | None, maps: Tensor) -> Tensor | None:
    """What a condition adds at one row, (B, W or 1, outputs): whole maps of every unit would not fit into memory."""
    return rows_of(told(vector, maps[:, :, row : row + 1]), 0)


def row_conv(conv: Tensor | nn.Module, batch: int, width: int) -> RowConv:
    assert isinstance(conv, RowsConv2d)
    return RowConv(conv.weight, conv.bias, rows=batch, width=width, left=conv.beside, right=conv.beside)


def point(conv: nn.Module, row: Tensor) -> Tensor:
    """A 1 x 1 convolution of a row (B, W, I)."""
    assert isinstance(conv, nn.Conv2d)
    return F.linear(row, conv.weight.flatten(1), conv.bias)
