"""Line charts as inline SVG: no plotting library, no script, colours from the page's style sheet."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 480, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 8, 24  # margins for the labels
MAX_POINTS = 300  # about one per pixel
COLOURS = 8  # --c0 .. --c7 in the page's style

Point = tuple[float, float]


def line_chart(series: Mapping[str, Sequence[Point]]) -> str:
    """SVG and legend for name -> (x, y) points in order of x. A y that is not finite makes a gap."""
    shown = {name: _thin(points) for name, points in series.items()}
    finite = [point for points in shown.values() for point in points if math.isfinite(point[1])]
    if not finite:
        return '<p class="soft">no finite values</p>'
    xs, ys = [x for x, _ in finite], [y for _, y in finite]
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_low, y_high = _padded(min(ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        down = TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return across, down

    parts = []
    for value in ticks(y_low, y_high):
        _, y = place(x_low, value)
        parts.append(f'<line class="grid-line" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in ticks(x_low, x_high):
        x, _ = place(value, y_low)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{value:.6g}</text>')
    for index, points in enumerate(shown.values()):
        for piece in _pieces(points):
            path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in piece)
            parts.append(f'<polyline style="stroke:var(--c{index % COLOURS})" points="{path}"/>')
    legend = "".join(_key(index, name, points) for index, (name, points) in enumerate(series.items()))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg><div>{legend}</div>'


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers (multiples of 1, 2 or 5 times a power of ten) within [low, high], 2 to `count` of them."""
    raw = (high - low) / (count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    gap = power * next(m for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return [index * gap for index in range(math.ceil(low / gap - 1e-9), math.floor(high / gap + 1e-9) + 1)]


def _padded(low: float, high: float) -> tuple[float, float]:
    """A little more than [low, high], and never empty."""
    pad = (high - low) * 0.05 or abs(low) * 0.1 or 1.0
    return low - pad, high + pad


def _thin(points: Sequence[Point]) -> list[Point]:
    """At most about MAX_POINTS points that keep the lowest and the highest of every stretch, so spikes stay."""
    if len(points) <= MAX_POINTS:
        return list(points)
    out: list[Point] = []
    size = math.ceil(len(points) / (MAX_POINTS // 2))
    for begin in range(0, len(points), size):
        stretch = list(enumerate(points[begin : begin + size]))
        finite = [(index, point) for index, point in stretch if math.isfinite(point[1])]
        if not finite:
            out.append(stretch[0][1])
            continue
        ends = {min(finite, key=lambda item: item[1][1]), max(finite, key=lambda item: item[1][1])}
        out.extend(point for _, point in sorted(ends))
    return out


def _pieces(points: Sequence[Point]) -> list[list[Point]]:
    """Stretches without a gap; a single point is drawn twice, which gives a dot with round joins."""
    pieces: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    return [piece if len(piece) > 1 else [piece[0], (piece[0][0] + 1e-3, piece[0][1])] for piece in pieces if piece]


def _key(index: int, name: str, points: Sequence[Point]) -> str:
    last = points[-1][1]
    colour = f"var(--c{index % COLOURS})"
    return (
        f'<span class="key"><i style="background:{colour}"></i><b>{html.escape(name)}</b> '
        f'<span class="soft">{last:.4g}</span></span>'
    )
