"""A chart of points with names and spreads as a picture, by PIL alone: two scores of several models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from condgen.errors import DataError
from condgen.show.chart import ticks

WIDTH, HEIGHT = 960, 640
LEFT, RIGHT, TOP, BOTTOM = 90, 30, 30, 64
INK, QUIET, PAPER = "#1d2733", "#8a94a0", "#ffffff"
COLOURS = ("#2563a8", "#c2410c", "#15803d", "#7e22ce", "#b91c1c", "#0f766e", "#a16207", "#475569")


@dataclass(frozen=True)
class Point:
    """A named point with the half length of its bars; 0 = no bar."""

    name: str
    x: float
    y: float
    dx: float = 0.0
    dy: float = 0.0


def scatter(points: Sequence[Point], *, x_label: str, y_label: str) -> Image.Image:
    """One dot a point, its bars and its name. Raises DataError without a finite point."""
    shown = [p for p in points if math.isfinite(p.x) and math.isfinite(p.y)]
    if not shown:
        raise DataError("no point to draw has two finite values")
    x_range = _range([p.x - p.dx for p in shown] + [p.x + p.dx for p in shown])
    y_range = _range([p.y - p.dy for p in shown] + [p.y + p.dy for p in shown])
    image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(16)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_range[0]) / (x_range[1] - x_range[0]) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - (y - y_range[0]) / (y_range[1] - y_range[0]) * (HEIGHT - TOP - BOTTOM)
        return across, down

    for value in ticks(*x_range):
        x, _ = place(value, y_range[0])
        draw.line([(x, TOP), (x, HEIGHT - BOTTOM)], fill="#e6e9ed")
        draw.text((x, HEIGHT - BOTTOM + 8), f"{value:.4g}", fill=QUIET, font=font, anchor="ma")
    for value in ticks(*y_range):
        _, y = place(x_range[0], value)
        draw.line([(LEFT, y), (WIDTH - RIGHT, y)], fill="#e6e9ed")
        draw.text((LEFT - 8, y), f"{value:.4g}", fill=QUIET, font=font, anchor="rm")
    draw.text((WIDTH - RIGHT, HEIGHT - 14), x_label, fill=INK, font=font, anchor="rs")
    draw.text((8, 6), y_label, fill=INK, font=font, anchor="la")
    taken: list[tuple[float, float, float, float]] = []
    for index, point in enumerate(shown):
        colour = COLOURS[index % len(COLOURS)]
        x, y = place(point.x, point.y)
        for dx, dy in ((point.dx, 0.0), (0.0, point.dy)):
            ends = place(point.x - dx, point.y - dy), place(point.x + dx, point.y + dy)
            draw.line(ends, fill=colour, width=2)
        draw.ellipse((x - 6, y - 6, x + 6, y + 6), fill=colour)
        _name(draw, point.name, x, y, colour, font, taken)
    return image


def _name(
    draw: ImageDraw.ImageDraw, name: str, x: float, y: float, colour: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont, taken: list[tuple[float, float, float, float]],
) -> None:  # fmt: skip
    """Beside its dot, where no other name stands: right, left, above, below, else right after all."""
    places = ((x + 10, y, "lm"), (x - 10, y, "rm"), (x, y - 10, "mb"), (x, y + 10, "mt"))
    boxes = [draw.textbbox((a, b), name, font=font, anchor=anchor) for a, b, anchor in places]
    free = [
        i for i, box in enumerate(boxes)
        if box[0] >= 0 and box[2] <= WIDTH and not any(_overlap(box, other) for other in taken)
    ]  # fmt: skip
    at = free[0] if free else 0
    taken += [boxes[at], (x - 6, y - 6, x + 6, y + 6)]
    draw.text(places[at][:2], name, fill=colour, font=font, anchor=places[at][2])


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = (high - low) * 0.1 or abs(low) * 0.1 or 1.0
    return low - pad, high + pad
