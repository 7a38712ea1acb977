"""Causal convolutions one row and one pixel at a time: what cached sampling is made of.

Ramachandran et al. 2017, "Fast Generation for Convolutional Autoregressive Models", arXiv:1704.06001. Each activation
is computed once, so drawing a picture costs the arithmetic of one forward pass. What a pixel gets from complete rows is
computed a row at a time; only what lies to its left, and its own earlier colours, is left to the pixel.

Rows are (B, W, channels), so that the window of a pixel is one contiguous run of numbers and a step is one product
with a matrix. Within a row the channels of one colour lie together (see `by_colour`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from condgen.nn.causal import CausalConv2d

LARGE = 1 << 22  # multiplications from which a matrix put in order gains more than its call costs
PACKED = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
)


class Steps(Protocol):
    """A network that gives parameters pixel by pixel. Order of the calls: for each row start_row, then for each
    column and colour `parameters` and `put`; networks whose pixels are drawn whole have one colour."""

    def start_row(self, row: int) -> None: ...

    def parameters(self, column: int, colour: int) -> Tensor:
        """(B, P) of what is drawn next."""
        ...

    def put(self, column: int, colour: int, value: Tensor) -> None:
        """The pixel that was drawn: (B, C), or (B, 1) of one colour."""
        ...


class PlainSteps:
    """Any network in the protocol `Steps` by running all of it for every draw: what cached sampling is measured by."""

    def __init__(
        self,
        net: Callable[[Tensor, Tensor | None, Sequence[Tensor]], Tensor],
        canvas: Tensor,
        colours: int,
        vector: Tensor | None,
        maps: Sequence[Tensor],
    ) -> None:
        self.net, self.canvas, self.colours, self.vector, self.maps = net, canvas, colours, vector, maps
        self.row = 0

    def start_row(self, row: int) -> None:
        self.row = row

    def parameters(self, column: int, colour: int) -> Tensor:
        return self.net(self.canvas, self.vector, self.maps)[:, colour :: self.colours, self.row, column]

    def put(self, column: int, colour: int, value: Tensor) -> None:
        first = 0 if value.shape[1] > 1 else colour
        self.canvas[:, first : first + value.shape[1], self.row, column] = value


def softmax_sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """logits (B, L) and uniforms (B, 1) in [0, 1) -> one of L values in [-1, 1], (B, 1), by the inverse of the sums."""
    top = logits.shape[1] - 1
    sums = torch.softmax(logits, 1).cumsum(1)
    index = (sums <= uniform * sums[:, -1:]).sum(1, keepdim=True).clamp(max=top)
    return index.to(logits.dtype).mul_(2 / top).sub_(1)


def by_colour(channels: int, colours: int) -> Tensor:
    """Order of channels that brings those of one colour together: 0, 3, 6, ..., 1, 4, 7, ..."""
    return torch.arange(channels).view(-1, colours).t().reshape(-1)


def strips(row: Tensor, columns: int, taps: int, stride: int = 1) -> Tensor:
    """(B, padded W, I) -> a view (B, columns, taps * I): the window of each column."""
    batch, padded, channels = row.shape
    steps = (padded * channels, stride * channels, 1)
    return row.as_strided((batch, columns, taps * channels), steps, row.storage_offset())


class Product:
    """base + x @ matrix, again and again with the same matrix (K, N): `rows` rows of x each time.

    On a CPU in float32 the matrix is put once into the order that oneDNN reads, through the operators that torch's own
    compiler uses: up to twice as fast. Small products, float64 and other devices go through torch.addmm.
    """

    def __init__(self, matrix: Tensor, rows: int) -> None:
        self.matrix, self.packed = matrix, None
        large = rows * matrix.numel() >= LARGE
        if PACKED and large and matrix.device.type == "cpu" and matrix.dtype == torch.float32:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(matrix.t().contiguous(), rows)

    def __call__(self, base: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
        """base (rows, N), x (rows, K), in `out` if given."""
        if self.packed is None:
            return torch.addmm(base, x, self.matrix, out=out)
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, base, self.packed, None, "add")
        return found if out is None else out.copy_(found)


def of_rows(weight: Tensor, rows: int) -> list[Product]:
    """What each row of a kernel (O, I, kh, kw) makes of a window (kw I) of its row of the picture."""
    return [Product(row.permute(2, 1, 0).flatten(0, 1).contiguous(), rows) for row in weight.unbind(2)]


class RowConv:
    """A convolution over complete rows: weight (O, I, kh, kw), the last of its kh rows being the newest one."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, rows: int, width: int, left: int, right: int, stride: int = 1
    ) -> None:
        outputs, inputs, height, taps = weight.shape
        self.width, self.left, self.columns = width, left, width // stride
        self.taps = of_rows(weight, rows * self.columns)
        self.bias = bias if bias is not None else weight.new_zeros(outputs)
        self.held = [weight.new_zeros(rows, left + width + right, inputs) for _ in range(height)]
        self.windows = [strips(row, self.columns, taps, stride) for row in self.held]

    def push(self, row: Tensor) -> None:
        """The next row (B, W, I)."""
        for older, newer in zip(self.held, self.held[1:], strict=False):
            older.copy_(newer)
        self.held[-1][:, self.left : self.left + self.width] = row

    def read(self) -> Tensor:
        """(B, columns, O) at the newest row."""
        batch, columns, _ = self.windows[0].shape
        total = self.bias.expand(batch * columns, -1)
        for window, taps in zip(self.windows, self.taps, strict=True):
            total = taps(total, window.reshape(batch * columns, -1))
        return total.view(batch, columns, -1)


class LineConv:
    """A `CausalConv2d` of which the current row is filled from the left.

    weight     (O, I, above + 1, left + 1 + right), masked; outputs and inputs still in their own order
    seen       share of the input colours that a pixel sees of itself: "A" those before its own, "B" also its own
    stride     columns and rows between outputs; rows in between are filled but not started

    write[k][c] is where the inputs of colour k at column c go, (B, I / colours).
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        rows: int,
        width: int,
        left: int,
        kind: str = "B",
        colours: int = 1,
        stride: int = 1,
    ) -> None:
        outputs, inputs, height, taps = weight.shape
        self.order = by_colour(outputs, colours).to(weight.device) if colours > 1 else None
        if self.order is not None:
            weight = weight[self.order][:, by_colour(inputs, colours).to(weight.device)]
            bias = bias[self.order] if bias is not None else None
        self.columns, self.outputs, self.stride = width // stride, outputs, stride
        above, padded = height - 1, taps + width - 1
        self.bias = bias if bias is not None else weight.new_zeros(outputs)
        self.taps = of_rows(weight[:, :, :above], rows * self.columns)
        self.line = weight.new_zeros(rows, padded, inputs)
        # the rows above; the last of them is the line itself, until it is filled anew
        self.held = [weight.new_zeros(rows, padded, inputs) for _ in range(above - 1)] + [self.line] * (above > 0)
        self.windows = [strips(row, self.columns, taps, stride) for row in self.held]
        self.base = weight.new_zeros(rows, self.columns, outputs)
        flat, part, share = self.line.view(rows, -1), inputs // colours, outputs // colours
        own = weight[:, :, above, : left + 1].permute(2, 1, 0).reshape((left + 1) * inputs, outputs)
        known = [left * inputs + part * (k + (kind == "B")) for k in range(colours)]
        self.products = [Product(own[:n, k * share : (k + 1) * share].contiguous(), rows) for k, n in enumerate(known)]
        starts = [c * stride * inputs for c in range(self.columns)]
        self.window = [[flat[:, s : s + n] for s in starts] for n in known]
        self.bases = [
            [self.base[:, c, k * share : (k + 1) * share] for c in range(self.columns)] for k in range(colours)
        ]
        self.write = [[self.line[:, left + c, k * part : (k + 1) * part] for c in range(width)] for k in range(colours)]

    @staticmethod
    def of(conv: CausalConv2d, rows: int, width: int) -> LineConv:
        return LineConv(
            conv.folded(), conv.bias, rows=rows, width=width, left=conv.left, kind=conv.kind, colours=conv.colours
        )

    def start_row(self, extra: Tensor | None = None) -> None:
        """Everything that the pixels of the next row get from the rows above; `extra` (B, W or 1, O) is added."""
        if extra is not None and self.order is not None:
            extra = extra[..., self.order]
        self.base.copy_(self.bias if extra is None else self.bias + extra)
        flat = self.base.view(-1, self.outputs)
        for window, taps in zip(self.windows, self.taps, strict=True):
            taps(flat, window.reshape(len(flat), -1), flat)
        for older, newer in zip(self.held, self.held[1:], strict=False):
            older.copy_(newer)

    def pixel(self, column: int, colour: int = 0, out: Tensor | None = None) -> Tensor:
        """(B, O / colours) of one colour, from what has been written; in `out`, if given."""
        return self.products[colour](self.bases[colour][column], self.window[colour][column], out)


def rows_of(value: Tensor | None, row: int) -> Tensor | None:
    """(B, O, H or 1, W or 1) -> (B, W or 1, O) at one row."""
    if value is None:
        return None
    return value[:, :, row if value.shape[2] > 1 else 0].transpose(1, 2)
