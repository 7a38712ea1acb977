"""PixelCNN++ a pixel at a time: the u stream by rows, the ul stream by pixels, a scale only where it is due.

Scale s runs at rows and columns that are multiples of 2 ** s; what a doubling gives is kept until its four positions
have come. Weight norm is folded once. Every tensor that a pixel touches is allocated beforehand, and so is every view,
since at one row a step costs more to start than to compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from condgen.nn.incremental import LineConv, Product, RowConv, rows_of
from condgen.nn.pixelcnnpp import ColourHead, GatedResnet, PixelCnnPp
from condgen.nn.weight_norm import WeightNormConv2d

elu_into = torch.ops.aten.elu.out


def elus(x: Tensor) -> Tensor:
    """concat_elu along the last axis."""
    return F.elu(torch.cat([x, -x], -1))


def line_conv(conv: WeightNormConv2d, rows: int, width: int) -> LineConv:
    return LineConv(conv.folded(), conv.b, rows=rows, width=width, left=conv.pad[0], stride=conv.stride)


def row_conv(conv: WeightNormConv2d, rows: int, width: int) -> RowConv:
    left, right, _, _ = conv.pad
    return RowConv(conv.folded(), conv.b, rows=rows, width=width, left=left, right=right, stride=conv.stride)


class RowBlock:
    """A gated resnet of the u stream, row by row."""

    def __init__(self, block: GatedResnet, rows: int, width: int, told: Tensor | None) -> None:
        self.conv_in, self.conv_out = row_conv(block.conv_in, rows, width), row_conv(block.conv_out, rows, width)
        self.skip = None if block.skip is None else (block.skip.folded().flatten(1), block.skip.b)
        self.told = told

    def row(self, x: Tensor, a: Tensor | None, at: int) -> Tensor:
        self.conv_in.push(elus(x))
        y = self.conv_in.read()
        if self.skip is not None and a is not None:
            y = y + F.linear(elus(a), *self.skip)
        self.conv_out.push(elus(y))
        y = self.conv_out.read()
        here = rows_of(self.told, at)
        return x + F.glu(y if here is None else y + here, -1)


class PixelBlock:
    """A gated resnet of the ul stream, pixel by pixel.

    Before `pixel` its input stands in `x`; afterwards its output stands in `into`. write_in[c] holds concat_elu(x).
    """

    def __init__(self, block: GatedResnet, rows: int, width: int, told: Tensor | None) -> None:
        self.conv_in, self.conv_out = line_conv(block.conv_in, rows, width), line_conv(block.conv_out, rows, width)
        assert block.skip is not None
        features = block.conv_in.b.shape[0]
        # of a = (u, skip): what u gives is known for the whole row, what the other gives only at its pixel
        weight = block.skip.folded().flatten(1).unflatten(1, (2, -1, features))  # (F, elu of + and -, u and skip, F)
        self.from_u = weight[:, :, 0].flatten(1)
        self.from_skip = Product(weight[:, :, 1].flatten(1).t().contiguous(), rows) if weight.shape[2] > 1 else None
        self.skip_bias, self.told = block.skip.b, told
        self.before, self.between = (block.conv_in.b.new_zeros(rows, 2 * features) for _ in range(2))
        self.x, self.minus_x = self.before.split(features, 1)
        self.y, self.minus_y = self.between.split(features, 1)
        self.write_in, self.write_out = self.conv_in.write[0], self.conv_out.write[0]
        self.base_in, self.base_out = self.conv_in.bases[0], self.conv_out.bases[0]
        self.window_in, self.window_out = self.conv_in.window[0], self.conv_out.window[0]
        self.product_in, self.product_out = self.conv_in.products[0], self.conv_out.products[0]
        self.into = self.x

    def start_row(self, u: Tensor, at: int) -> None:
        self.conv_in.start_row(F.linear(elus(u), self.from_u, self.skip_bias))
        self.conv_out.start_row(rows_of(self.told, at))

    def pixel(self, c: int, skip: Tensor | None) -> None:
        torch.neg(self.x, out=self.minus_x)
        elu_into(self.before, 1.0, 1.0, 1.0, out=self.write_in[c])
        self.product_in(self.base_in[c], self.window_in[c], self.y)
        if skip is not None and self.from_skip is not None:
            self.from_skip(self.y, skip, self.y)
        torch.neg(self.y, out=self.minus_y)
        elu_into(self.between, 1.0, 1.0, 1.0, out=self.write_out[c])
        change = self.product_out(self.base_out[c], self.window_out[c])
        torch.add(self.x, F.glu(change, 1), out=self.into)


class Scale:
    """Both streams at one resolution, and the ways to the next coarser one."""

    def __init__(
        self, net: PixelCnnPp, at: int, rows: int, width: int, vector: Tensor | None, maps: Tensor | None
    ) -> None:
        def made(kind: Any, blocks: Any) -> list:
            return [kind(block, rows, width, block.told(vector, maps)) for block in blocks]

        self.up_u, self.back_u = made(RowBlock, net.up_u[at]), made(RowBlock, net.back_u[at])
        self.up: list[PixelBlock] = made(PixelBlock, net.up_ul[at])
        self.back: list[PixelBlock] = made(PixelBlock, net.back_ul[at])
        self.last = at == net.scales - 1
        self.end = torch.zeros_like(self.back[0].x)  # where the last block leaves its output
        features = self.end.shape[1]
        for block, after in zip(self.up, self.up[1:], strict=False):
            block.into = after.x
        for block, after in zip(self.back, self.back[1:], strict=False):
            block.into = after.x
        self.back[-1].into = self.end
        self.u_skips: list[Tensor] = []
        columns = range(width)
        entering = [[block.write_in[c] for block in self.up] for c in columns]  # concat_elu of what each one got
        if self.last:
            self.up[-1].into = self.back[0].x
            self.skips = [column[::-1] for column in entering]
            return
        self.top = self.end.new_zeros(rows, 2 * features)
        self.up[-1].into, self.minus_top = self.top.split(features, 1)
        self.top_elu = torch.zeros_like(self.top)
        self.skips = [[self.top_elu, *column[::-1]] for column in entering]
        halvings: Any = (net.halve_u[at], net.halve_ul[at], net.double_u[at], net.double_ul[at])
        self.halve_u, self.halve = row_conv(halvings[0], rows, width), line_conv(halvings[1], rows, width)
        up, across = halvings[2:]
        self.double_u: tuple[Tensor, Tensor] = (up.folded(), up.b)
        self.double = across.folded().permute(0, 2, 3, 1).flatten(1).contiguous()  # (F, 2 rows x 2 columns x F)
        self.double_bias = across.b.repeat(4)
        self.kept_u: Tensor | None = None  # (B, 2, W, F) from the coarser scale
        self.kept = self.end.new_zeros(2, width, rows, features)

    def u_up(self, u: Tensor, at: int) -> Tensor:
        self.u_skips = [u]
        for block, line in zip(self.up_u, self.up, strict=True):
            u = block.row(u, None, at)
            line.start_row(u, at)
            self.u_skips.append(u)
        if self.last:
            self.u_skips.pop()
        else:
            self.halve_u.push(u)
        return u

    def u_back(self, u: Tensor, at: int) -> Tensor:
        for block, line in zip(self.back_u, self.back, strict=True):
            u = block.row(u, self.u_skips.pop(), at)
            line.start_row(u, at)
        return u

    def u_from(self, u: Tensor) -> None:
        """A row of the coarser scale, which gives two of this one."""
        weight, bias = self.double_u
        out = F.conv_transpose2d(u.transpose(1, 2)[:, :, None], weight, bias, 2, output_padding=1)
        self.kept_u = out[:, :, :2, 1:-1].permute(0, 2, 3, 1)

    def ul_up(self, c: int) -> None:
        for block in self.up:
            block.pixel(c, None)
        if not self.last:
            torch.neg(self.up[-1].into, out=self.minus_top)
            elu_into(self.top, 1.0, 1.0, 1.0, out=self.top_elu)
            self.halve.write[0][c].copy_(self.up[-1].into)

    def ul_back(self, c: int) -> None:
        for block, skip in zip(self.back, self.skips[c], strict=True):
            block.pixel(c, skip)

    def ul_from(self, coarse: Tensor, c: int) -> None:
        """A pixel of the coarser scale, which gives 2 x 2 of this one."""
        out = torch.addmm(self.double_bias, coarse, self.double)
        self.kept[:, 2 * c : 2 * c + 2] = out.view(len(out), 2, 2, -1).permute(1, 2, 0, 3)


class PixelCnnPpSteps:
    """`PixelCnnPp` in the protocol `condgen.nn.incremental.Steps`."""

    def __init__(
        self, net: PixelCnnPp, rows: int, size: tuple[int, int], vector: Tensor | None, maps: Sequence[Tensor]
    ) -> None:
        width = size[1]
        self.scales = [Scale(net, s, rows, width >> s, vector, maps[s] if maps else None) for s in range(net.scales)]
        self.first_u, self.first_above = row_conv(net.first_u, rows, width), row_conv(net.first_above, rows, width)
        self.above, self.left = net.first_left.folded()[..., 0].unbind(2)  # (F, C + 1) each
        self.left_matrix, self.left_bias = self.left.t().contiguous(), net.first_left.b
        channels, features = self.above.shape[1], len(self.above)
        self.picture = self.above.new_zeros(rows, width + 1, channels)  # with a column of zeros at the left
        self.filled = torch.ones_like(self.picture[:, 1:, 0])
        self.base = self.above.new_zeros(rows, width, features)
        self.head = _HeadSteps(net.head, rows, channels - 1)
        self.row = 0

    def start_row(self, row: int) -> None:
        self.row = row
        above = self.picture[:, 1:].clone()
        if row:
            for conv in (self.first_u, self.first_above):
                conv.push(above)
            u = self.first_u.read()
            self.base.copy_(self.first_above.read())
        else:
            u = torch.zeros_like(self.base)
            self.base.zero_()
        self.base[:, 1:] += F.linear(above[:, :-1], self.above, self.left_bias)
        self.picture[:, 1:, -1] = self.filled
        self._u_stream(u, row)

    def _u_stream(self, u: Tensor, row: int) -> None:
        due = [(s, scale) for s, scale in enumerate(self.scales) if row % (1 << s) == 0]
        for s, scale in due:
            u = scale.u_up(u, row >> s)
            if not scale.last and row % (2 << s) == 0:
                u = scale.halve_u.read()
                scale.halve.start_row()
        for s, scale in reversed(due):
            if not scale.last:
                assert scale.kept_u is not None
                u = scale.kept_u[:, row >> s & 1]
            u = scale.u_back(u, row >> s)
            if s:
                self.scales[s - 1].u_from(u)

    def parameters(self, column: int, colour: int) -> Tensor:
        if colour == 0:
            self.head.start(self._features(column))
        return self.head.parameters(colour)

    def _features(self, column: int) -> Tensor:
        first = self.scales[0].up[0].x
        torch.addmm(self.base[:, column], self.picture[:, column], self.left_matrix, out=first)
        due = [s for s in range(len(self.scales)) if self.row % (1 << s) == 0 and column % (1 << s) == 0]
        for s in due:
            scale, c = self.scales[s], column >> s
            scale.ul_up(c)
            if s + 1 in due:
                self.scales[s + 1].up[0].x.copy_(scale.halve.pixel(c >> 1))
        for s in reversed(due):
            scale, c = self.scales[s], column >> s
            if not scale.last:
                scale.back[0].x.copy_(scale.kept[self.row >> s & 1, c])
            scale.ul_back(c)
            if s:
                self.scales[s - 1].ul_from(scale.end, c)
        return self.scales[0].end

    def put(self, column: int, colour: int, value: Tensor) -> None:
        first = 0 if value.shape[1] > 1 else colour
        self.picture[:, column + 1, first : first + value.shape[1]] = value
        self.head.put(colour, value)


class _HeadSteps:
    """Either head: parameters of a whole pixel, or of one colour after another."""

    def __init__(self, head: Any, rows: int, colours: int) -> None:
        self.colours: ColourHead | None = head if isinstance(head, ColourHead) else None
        conv = head.features if isinstance(head, ColourHead) else head.out
        self.matrix, self.bias = conv.folded().flatten(1).t().contiguous(), conv.b
        self.found = self.matrix
        if self.colours is not None:
            self.own = LineConv.of(self.colours.own, rows, 1)
            self.out = LineConv.of(self.colours.out, rows, 1)
            self.out.start_row()
            self.own.start_row()

    def start(self, ul: Tensor) -> None:
        self.found = torch.addmm(self.bias, F.elu(ul), self.matrix)
        if self.colours is not None:
            self.own.start_row(self.found[:, None])

    def parameters(self, colour: int) -> Tensor:
        if self.colours is None:
            return self.found
        torch.clamp(self.own.pixel(0, colour), min=0, out=self.out.write[colour][0])
        return self.out.pixel(0, colour)

    def put(self, colour: int, value: Tensor) -> None:
        if self.colours is not None:
            self.own.write[colour][0].copy_(value)
