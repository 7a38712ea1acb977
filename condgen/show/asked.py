"""How a condition is drawn beside its samples: caption, label, layout of boxes and keypoints, source, past."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

from condgen.pixels import pixels_to_float
from condgen.show.pictures import into, to_rgb
from condgen.types import Condition

INK, QUIET, BLANK = "#1f2430", "#7a8190", "#f4f6f8"
# Okabe and Ito's colours, which stay apart for colour-blind readers
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6a51a3", "#8c564b")
SMOOTH = 4  # shapes are drawn this much larger and reduced, because PIL draws no smooth edges
PAST_SHOWN = 3  # of the past frames, the last ones
MAX_CHARACTERS = 400  # of a caption
SHOWN_WEIGHT = 0.005  # of a class in a soft label, at least

_PLAIN = str.maketrans({"–": "-", "—": "-", "‘": "'", "’": "'", "“": '"', "”": '"', "…": "...", "\ufe0f": "", "•": "-"})

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def fit(text: str, font: Font, width: int) -> str:
    """`text` on one line of `width` px, shortened with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def wrap(text: str, font: Font, width: int) -> list[str]:
    """Words broken into lines of at most `width` px; a longer word is shortened."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(fit(word, font, width))
    return lines


@cache
def _empty_box() -> tuple[Font, bytes]:
    font = ImageFont.load_default(24)
    return font, bytes(font.getmask("\U0010ffff"))


@cache
def drawable(character: str) -> str:
    """What Pillow's built-in font, which holds little more than ASCII, can draw for it: e for an accented e, or ?."""
    font, box = _empty_box()
    parts = unicodedata.normalize("NFKD", character)
    return "".join(c for c in parts if c.isspace() or bytes(font.getmask(c)) not in (box, b"")) or "?"


def printable(text: str) -> str:
    """One line in characters that the font has, without control characters, at most MAX_CHARACTERS long."""
    text = text[: 4 * MAX_CHARACTERS].translate(_PLAIN)
    text = "".join(c if c.isprintable() else " " for c in text)
    line = " ".join("".join(drawable(c) for c in text).split())
    return line if len(line) <= MAX_CHARACTERS else line[: MAX_CHARACTERS - 3] + "..."


@dataclass(frozen=True)
class AskedCell:
    """One row's condition. `pictures`: (column header, tile) in drawing order."""

    caption: str | None = None  # "" = not given
    label: str | None = None  # "" = not given
    label_colour: str = INK
    boxes: tuple[tuple[tuple[float, ...], str], ...] = ()  # (xyxy in [0, 1], colour)
    points: tuple[tuple[tuple[float, ...], str], ...] = ()  # (xy in [0, 1], colour)
    pictures: list[tuple[str, Image.Image]] = field(default_factory=list)

    def layout_over(self, picture: Image.Image, *, tint: bool = False) -> Image.Image:
        """Boxes and keypoints on top of `picture`; `tint` also colours the inside of boxes a little."""
        if not self.boxes and not self.points:
            return picture
        width, height = picture.size
        layer = Image.new("RGBA", (width * SMOOTH, height * SMOOTH), (0, 0, 0, 0))
        draw = ImageDraw.Draw(layer)
        unit = max(1.0, min(width, height) / 96) * SMOOTH
        for (x0, y0, x1, y1), colour in self.boxes:
            rgb = ImageColor.getrgb(colour)
            corners = (x0 * layer.width, y0 * layer.height, x1 * layer.width - 1, y1 * layer.height - 1)
            draw.rectangle(corners, outline=(*rgb, 255), fill=(*rgb, 36 if tint else 0), width=round(2 * unit))
        for (x, y), colour in self.points:
            for radius, fill in ((4.2 * unit, "#ffffff"), (3.0 * unit, colour)):
                cx, cy = x * layer.width, y * layer.height
                draw.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=fill)
        layer = layer.resize(picture.size, Image.Resampling.BOX)
        return Image.alpha_composite(picture.convert("RGBA"), layer).convert("RGB")

    def draw_text(self, draw: ImageDraw.ImageDraw, at: tuple[int, int], width: int, height: int, font: Font) -> None:
        """Label as a coloured tag, caption below it, centred in the height of the row."""
        if not width:
            return
        line_h = round(_size(font) * 1.3)
        tag_h = round(line_h * 1.35) if self.label is not None else 0
        room = max(1, (height - tag_h) // line_h)
        lines = wrap(printable(self.caption), font, width) if self.caption else []
        if len(lines) > room:
            lines = [*lines[: room - 1], fit(lines[room - 1] + " ...", font, width)]
        if self.caption == "":
            lines = ["any text"]
        x, y = at[0], at[1] + (height - tag_h - len(lines) * line_h) // 2
        if self.label:
            text = fit(printable(self.label), font, width - line_h)
            rgb = ImageColor.getrgb(self.label_colour)
            tint = tuple(round(255 - (255 - c) * 0.14) for c in rgb)
            right = x + font.getlength(text) + line_h * 0.9
            draw.rounded_rectangle((x, y, right, y + line_h * 1.15), radius=line_h * 0.35, fill=tint)
            dark = tuple(round(c * 0.72) for c in rgb)  # light colours are hard to read as text
            draw.text((x + line_h * 0.45, y + line_h * 0.56), text, fill=dark, font=font, anchor="lm")
        elif self.label == "":
            draw.text((x, y), "any label", fill=QUIET, font=font)
        for i, line in enumerate(lines):
            at_line = (x, y + tag_h + i * line_h)
            draw.text(at_line, line, fill=INK if self.caption else QUIET, font=font)


def _size(font: Font) -> float:
    return font.size if isinstance(font, ImageFont.FreeTypeFont) else 11


def text_width(cells: Sequence[AskedCell], size: tuple[int, int], font: Font) -> int:
    """Width of the text column in px: as wide as a short text, at most about two tiles; 0 without text."""
    most = round(1.9 * max(size))
    longest = 0.0
    for cell in cells:
        if cell.label is not None:
            longest = max(longest, font.getlength(printable(cell.label) or "any label") + _size(font) * 1.6)
        if cell.caption is not None:
            longest = max(longest, font.getlength(printable(cell.caption) or "any text") + 2)
    return min(most, round(longest))


def asked_cells(condition: Condition, size: tuple[int, int], label_names: Sequence[str] = ()) -> list[AskedCell]:
    """What each row of the condition asks for, with tiles of `size` (width, height)."""
    condition = condition.to("cpu")
    return [_cell(condition, row, size, label_names) for row in range(len(condition))]


def _cell(condition: Condition, row: int, size: tuple[int, int], names: Sequence[str]) -> AskedCell:
    given = {name: bool(condition.is_present(name)[row]) for name in condition.given}
    label, colour = _label(condition.label, row, names) if condition.label is not None else (None, INK)
    cell = AskedCell(
        caption=_caption(condition, row),
        label=label,
        label_colour=colour,
        boxes=_boxes(condition, row) if given.get("boxes") else (),
        points=_points(condition, row) if given.get("keypoints") else (),
    )
    tiles = cell.pictures
    if condition.image is not None:
        tiles.append(("source", _source(condition, row, size) if given["image"] else _nothing(size)))
    if condition.frames is not None:
        frames, mask = condition.frames.pixels[row], condition.frames.mask[row]
        for t in range(max(0, len(frames) - PAST_SHOWN), len(frames)):
            shown = given["frames"] and bool(mask[t])
            tiles.append((f"t={t - len(frames)}", into(to_rgb(frames[t]), size) if shown else _nothing(size)))
    if condition.boxes is not None or condition.keypoints is not None:
        drawn = cell.boxes or cell.points
        tiles.append(
            ("layout", cell.layout_over(Image.new("RGB", size, BLANK), tint=True) if drawn else _nothing(size))
        )
    return cell


def _caption(condition: Condition, row: int) -> str | None:
    text = condition.text
    if text is None or text.strings is None:
        return None
    if not bool(condition.is_present("text")[row]):
        return ""
    captions = [line.strip() for line in text.strings[row].split("\n") if line.strip()]
    more = f" (+{len(captions) - 1} more)" if len(captions) > 1 else ""
    return captions[0] + more if captions else ""


def _label(label: Tensor, row: int, names: Sequence[str]) -> tuple[str, str]:
    """(name, colour) of a class; of a soft label "0.7 cat + 0.3 dog" in the colour of the largest."""
    value = label[row]
    if not value.is_floating_point():
        index = int(value)
        return ("", INK) if index < 0 else (_class_name(index, names), COLOURS[index % len(COLOURS)])
    weights = {k: float(w) for k, w in enumerate(value) if abs(float(w)) >= SHOWN_WEIGHT}
    if not weights:
        return "", INK
    ordered = sorted(weights, key=lambda k: -weights[k])
    text = ""
    for k in ordered:
        sign = " - " if weights[k] < 0 else " + " if text else ""
        size = "" if abs(abs(weights[k]) - 1) < SHOWN_WEIGHT else f"{abs(weights[k]):.2g} "
        text += sign + size + _class_name(k, names)
    return text.strip(), COLOURS[ordered[0] % len(COLOURS)]


def _class_name(index: int, names: Sequence[str]) -> str:
    name = names[index] if index < len(names) else f"class {index}"
    return name.replace("_", " ").replace("-", " ")


def _boxes(condition: Condition, row: int) -> tuple[tuple[tuple[float, ...], str], ...]:
    boxes = condition.boxes
    assert boxes is not None
    found = []
    for n in boxes.valid[row].nonzero().flatten().tolist():
        kind = n if boxes.label is None else int(boxes.label[row, n])
        found.append((tuple(boxes.xyxy[row, n].tolist()), COLOURS[kind % len(COLOURS)]))
    return tuple(found)


def _points(condition: Condition, row: int) -> tuple[tuple[tuple[float, ...], str], ...]:
    points = condition.keypoints
    assert points is not None
    seen = points.visible[row].nonzero().flatten().tolist()
    return tuple((tuple(points.xy[row, k].tolist()), COLOURS[k % len(COLOURS)]) for k in seen)


def _source(condition: Condition, row: int, size: tuple[int, int]) -> Image.Image:
    image = condition.image
    assert image is not None
    pixels = pixels_to_float(image.pixels[row])
    if image.mask is not None:
        pixels = torch.where(image.mask[row] > 0, pixels, torch.full_like(pixels, 0.85))  # light grey = not given
    return into(to_rgb(pixels), size)


def _nothing(size: tuple[int, int]) -> Image.Image:
    """A field that this row does not give: blank with a dash."""
    out = Image.new("RGB", size, BLANK)
    draw, middle = ImageDraw.Draw(out), (size[0] // 2, size[1] // 2)
    draw.line((middle[0] - size[0] // 16, middle[1], middle[0] + size[0] // 16, middle[1]), fill=QUIET, width=2)
    return out
