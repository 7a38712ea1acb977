"""PixelRNN: residual layers of convolutional LSTMs, over rows (Row LSTM) or over diagonals (Diagonal BiLSTM).

van den Oord, Kalchbrenner, Kavukcuoglu 2016, "Pixel Recurrent Neural Networks", ICML, arXiv:1601.06759.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgen.nn.causal import CausalConv2d, ConditionBias, down, run
from condgen.nn.incremental import LineConv, by_colour, rows_of, strips
from condgen.nn.pixelcnn import HeadSteps, ResidualStack


def lstm(gates: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Gates (..., 4h) before their activations, in the order output, forget, input, content, and the cell state before
    (..., h) -> cell state, hidden state."""
    o, f, i, g = gates.chunk(4, -1)
    cell = torch.sigmoid(f) * before + torch.sigmoid(i) * torch.tanh(g)
    return cell, torch.sigmoid(o) * torch.tanh(cell)


def add(made: Tensor, x: Tensor, skipped: Tensor | None, skip: bool) -> tuple[Tensor, Tensor | None]:
    """What a layer makes goes to the stream; with `skip` its second half goes to the output."""
    if not skip:
        return x + made, None
    here, out = made.chunk(2, 1)
    return x + here, out if skipped is None else skipped + out


@dataclass(frozen=True)
class Sweep:
    """Lines of cells that are computed one after the other, all cells of a line at once.

    order      (directions, H * W): the cells in raster numbers, line by line
    lengths    cells of each line
    starts     where the line's first cell stands among the `cells` places of a line
    """

    order: Tensor
    lengths: list[int]
    starts: list[int]
    cells: int


@lru_cache(maxsize=16)
def row_sweep(height: int, width: int) -> Sweep:
    """Each row is a line."""
    return Sweep(torch.arange(height * width)[None], [width] * height, [0] * height, width)


@lru_cache(maxsize=16)
def diagonal_sweep(height: int, width: int) -> Sweep:
    """Line d has the cells of row + column = d, and in the second direction those of the mirrored picture: the skewed
    picture without its padding. A cell's place in its line is its row."""
    row, column = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    ranks = torch.argsort((row + column) * height + row)
    order = torch.stack([row * width + column, row * width + width - 1 - column])[:, ranks]
    starts = [max(0, d - width + 1) for d in range(height + width - 1)]
    lengths = [min(d, height - 1) + 1 - start for d, start in enumerate(starts)]
    return Sweep(order, lengths, starts, height)


class Reorder(torch.autograd.Function):
    """x (D, N, ...) -> x[d, order[d]]; `inverse` undoes `order`, so the gradient is a gather too."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return torch.stack([part.index_select(0, index) for part, index in zip(x, order, strict=True)])

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors  # type: ignore[attr-defined]
        return Reorder.apply(grads[0], inverse, order), None, None


class LstmLayer(nn.Module):
    """x + 1x1(LSTM(x)): 2h -> h -> 2h. `skip`: with another 1x1 of the same states, 2h, for the output of the network.

    Row LSTM: the gates of a cell are a masked 1 x kernel convolution of its row, plus an unmasked one of the hidden
    states of the row above. Its context is a triangle.

    Diagonal BiLSTM: the gates are a masked 1x1 convolution, plus a product with the hidden states above and to the
    left. A second LSTM does the same from the right; its states are moved one row down before they are added, so that
    no cell sees what comes after it. The last pixel of a row then reaches the next row's cells only through the 7x7
    convolution, 3 columns far (its last colour, where colours are in order): the published blind spot.
    """

    def __init__(
        self, width: int, kernel: int, diagonal: bool, skip: bool, colours: int, vector: int, maps: int
    ) -> None:
        super().__init__()
        self.width, self.diagonal, self.directions, self.skip = width, diagonal, 2 if diagonal else 1, skip
        side = kernel // 2
        self.taps, self.pad = (2, (1, 0)) if diagonal else (kernel, (side, side))
        gates = self.directions * 4 * width
        self.enter = CausalConv2d(2 * width, gates, left=0 if diagonal else side, colours=colours)
        self.recur = nn.Parameter(
            torch.randn(self.directions, self.taps * width, 4 * width) * (self.taps * width) ** -0.5
        )
        self.told = ConditionBias(vector, maps, gates)
        self.widen = CausalConv2d(width, (4 if skip else 2) * width, colours=colours)

    def forward(
        self, x: Tensor, skipped: Tensor | None, vector: Tensor | None, maps: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The stream, and the sum of what this and the layers before give to the output (None without skips)."""
        gates, told = self.enter(x), self.told(vector, maps)
        states = self.states(gates if told is None else gates + told)
        return add(self.widen(states[0] + down(states[1]) if self.diagonal else states[0]), x, skipped, self.skip)

    def states(self, gates: Tensor) -> Tensor:
        """What enters the gates, (B, directions * 4h, H, W) -> hidden states (directions, B, h, H, W)."""
        batch, _, height, width = gates.shape
        sweep = (diagonal_sweep if self.diagonal else row_sweep)(height, width)
        order = sweep.order.to(gates.device)
        inverse = order.argsort(1)
        cells = gates.unflatten(1, (self.directions, -1)).permute(1, 3, 4, 0, 2).flatten(1, 2)  # (D, HW, B, 4h)
        cells = Reorder.apply(cells, order, inverse)
        found, (left, right) = list[Tensor](), self.pad
        shape = (self.directions, left + sweep.cells + right, batch, self.width)
        hidden, cell = self.recur.new_zeros(shape), self.recur.new_zeros(shape)  # float32 under autocast as well
        for line, at in zip(cells.split(sweep.lengths, 1), sweep.starts, strict=True):
            length = line.shape[1]
            window = torch.cat([hidden[:, at + t : at + t + length] for t in range(self.taps)], -1)
            total = line + torch.matmul(window.flatten(1, 2), self.recur).view(line.shape)
            cell, hidden = lstm(total, cell[:, at + left : at + left + length])
            found.append(hidden)
            edge = (0, 0, 0, 0, left + at, sweep.cells + right - at - length)
            cell, hidden = F.pad(cell, edge), F.pad(hidden, edge)
        out = Reorder.apply(torch.cat(found, 1), inverse, order)
        return out.unflatten(1, (height, width)).permute(0, 3, 4, 1, 2)


class PixelRnn(ResidualStack):
    """width      h; the residual stream is 2h wide
    diagonal   Diagonal BiLSTM; otherwise Row LSTM
    kernel     of Row LSTM's convolutions along the row, 3 as published; the first one is 7x7, mask A
    skip       a learned 1x1 convolution from every layer to the output beside the residuals
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        diagonal: bool,
        width: int,
        kernel: int = 3,
        skip: bool = False,
        colours: int,
        vector: int = 0,
        maps: int = 0,
        save_memory: bool = False,
        **sizes: int,
    ) -> None:
        block = partial(LstmLayer, width, kernel, diagonal, skip, colours, vector, maps)
        super().__init__(channels, outputs, block, width=width, colours=colours, save_memory=save_memory, **sizes)
        self.diagonal, self.skip = diagonal, skip

    def forward(self, x: Tensor, vector: Tensor | None, maps: Sequence[Tensor]) -> Tensor:
        place = maps[0] if maps else None
        x, skipped = self.first(x), None
        for layer in self.blocks:
            x, skipped = run(layer, (x, skipped, vector, place), self.save_memory)
        return self.head(x if skipped is None else x + skipped)

    def steps(self, rows: int, size: tuple[int, int], vector: Tensor | None, maps: Sequence[Tensor]) -> PixelRnnSteps:
        """The same network a pixel at a time, for pictures of `size` (H, W)."""
        return PixelRnnSteps(self, rows, size[1], vector, maps[0] if maps else None)


class LayerSteps:
    """`LstmLayer` a pixel at a time, without the direction from the right. Channels of states lie by colours.

    What the row above adds to the gates is computed for the whole row; the buffers of its states are then overwritten.
    """

    def __init__(self, layer: LstmLayer, rows: int, width: int) -> None:
        h, colours, gates = layer.width, layer.enter.colours, 4 * layer.width
        bias = layer.enter.bias
        assert bias is not None
        self.enter = LineConv(
            layer.enter.folded()[:gates], bias[:gates], rows=rows, width=width, left=layer.enter.left, colours=colours
        )
        self.widen = LineConv.of(layer.widen, rows, width)
        recur = layer.recur[0].view(layer.taps, h, gates)[:, by_colour(h, colours)]
        self.lag = int(layer.diagonal)  # the cell state comes from the column before, or from the row above
        self.beside: list[Tensor] = []
        left, right = layer.pad
        self.hidden = recur.new_zeros(rows, left + width + right, h)
        if layer.diagonal:
            self.above, self.window = recur[0], self.hidden[:, 1:]
            self.beside = [part.contiguous() for part in recur[1][:, by_colour(gates, colours)].chunk(colours, 1)]
        else:
            self.above, self.window = recur.flatten(0, 1), strips(self.hidden, width, layer.taps)
        self.cell = recur.new_zeros(rows, self.lag + width, h)
        share = h // colours
        parts = [slice(k * share, (k + 1) * share) for k in range(colours)]
        self.before = [[self.cell[:, c, part] for c in range(width)] for part in parts]
        self.cells = [[self.cell[:, c + self.lag, part] for c in range(width)] for part in parts]
        self.hiddens = [[self.hidden[:, c + left, part] for c in range(width)] for part in parts]
        self.lefts = [self.hidden[:, c] for c in range(width)]

    def start_row(self, told: Tensor | None) -> None:
        above = self.window @ self.above
        self.enter.start_row(above if told is None else above + told)
        self.widen.start_row()

    def pixel(self, x: Tensor, column: int, colour: int, mirrored: Tensor | None) -> Tensor:
        """What the layer makes of the stream `x` (B, 2h / colours); `mirrored` is the other direction's state."""
        self.enter.write[colour][column].copy_(x)
        gates = self.enter.pixel(column, colour)
        if self.beside:
            gates = torch.addmm(gates, self.lefts[column], self.beside[colour])
        cell, hidden = lstm(gates, self.before[colour][column])
        self.cells[colour][column].copy_(cell)
        self.hiddens[colour][column].copy_(hidden)
        self.widen.write[colour][column].copy_(hidden if mirrored is None else hidden + mirrored)
        return self.widen.pixel(column, colour)


class MirrorSteps:
    """The direction from the right of all layers together: a row at a time, once it is complete."""

    def __init__(self, layers: Sequence[LstmLayer], rows: int, width: int) -> None:
        h, colours = layers[0].width, layers[0].enter.colours
        inputs, self.order = by_colour(2 * h, colours), by_colour(h, colours)
        self.enter = torch.stack([layer.enter.folded()[4 * h :, inputs, 0, 0].t() for layer in layers])
        self.bias = torch.stack([layer.enter.bias[None, 4 * h :] for layer in layers])  # type: ignore[index]
        self.above, self.beside = torch.stack([layer.recur[1] for layer in layers]).split(h, 1)
        self.hidden = self.above.new_zeros(len(layers), rows, width, h)

    def row(self, streams: Sequence[Tensor], told: Sequence[Tensor | None]) -> Tensor:
        """Streams (B, W, 2h), channels by colours, and conditions (B, W or 1, 4h) -> (L, B, W, h) likewise."""
        gates = torch.baddbmm(self.bias, torch.stack(list(streams)).flatten(1, 2), self.enter)
        gates = torch.baddbmm(gates, self.hidden.flatten(1, 2), self.above).unflatten(1, self.hidden.shape[1:3])
        for layer, bias in zip(gates, told, strict=True):
            if bias is not None:
                layer.add_(bias)
        hidden = cell = torch.zeros_like(self.hidden[:, :, 0])
        for column in reversed(range(self.hidden.shape[2])):
            cell, hidden = lstm(torch.baddbmm(gates[:, :, column], hidden, self.beside), cell)
            self.hidden[:, :, column] = hidden
        return self.hidden[..., self.order]


class PixelRnnSteps:
    """`PixelRnn` in the protocol `condgen.nn.incremental.Steps`."""

    def __init__(self, net: PixelRnn, rows: int, width: int, vector: Tensor | None, maps: Tensor | None) -> None:
        layers: list[LstmLayer] = list(net.blocks)  # type: ignore[arg-type]
        self.first = LineConv.of(net.first, rows, width)
        self.layers = [LayerSteps(layer, rows, width) for layer in layers]
        self.mirror = MirrorSteps(layers, rows, width) if net.diagonal else None
        self.mirrored: list[list[Sequence[Tensor | None]]] = [[[None] * width] * net.first.colours] * len(layers)
        told = [layer.told(vector, maps) for layer in layers]
        split = [(None,) * 2 if bias is None else bias.split(4 * layers[0].width, 1) for bias in told]
        self.told = [[parts[d] for parts in split] for d in range(1 + net.diagonal)]
        self.head, self.skip = HeadSteps(net.head, rows, width), net.skip

    def start_row(self, row: int) -> None:
        if self.mirror is not None and row:
            told = [rows_of(bias, row - 1) for bias in self.told[1]]
            states = self.mirror.row([layer.enter.line for layer in self.layers], told)
            colours = len(self.first.write)
            self.mirrored = [[part.unbind(1) for part in layer.chunk(colours, 2)] for layer in states]
        self.first.start_row()
        for layer, bias in zip(self.layers, self.told[0], strict=True):
            layer.start_row(rows_of(bias, row))
        self.head.start_row()

    def parameters(self, column: int, colour: int) -> Tensor:
        x, skipped = self.first.pixel(column, colour), None
        for layer, mirrored in zip(self.layers, self.mirrored, strict=True):
            x, skipped = add(layer.pixel(x, column, colour, mirrored[colour][column]), x, skipped, self.skip)
        return self.head.parameters(x if skipped is None else x + skipped, column, colour)

    def put(self, column: int, colour: int, value: Tensor) -> None:
        self.first.write[colour][column].copy_(value)
