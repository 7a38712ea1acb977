"""Which points a mirror swaps, for sets of points that are known by name or by number."""

from __future__ import annotations

import re
from collections.abc import Sequence

from condgen.data.coco import FLIP_PAIRS as COCO
from condgen.data.mpii import FLIP_PAIRS as MPII
from condgen.errors import ConfigError

Pairs = tuple[tuple[int, int], ...]

# iBUG 300-W (Sagonas et al. 2013): jaw, brows, nostrils, eyes, outer lip, inner lip
FACE68: Pairs = (
    *((i, 16 - i) for i in range(8)),
    *((17 + i, 26 - i) for i in range(5)),
    (31, 35), (32, 34),
    (36, 45), (37, 44), (38, 43), (39, 42), (40, 47), (41, 46),
    (48, 54), (49, 53), (50, 52), (59, 55), (58, 56),
    (60, 64), (61, 63), (67, 65),
)  # fmt: skip
# Leeds Sports Pose (Johnson and Everingham 2010): ankle knee hip of the right, hip knee ankle of the left, the arms
LSP14: Pairs = ((0, 5), (1, 4), (2, 3), (6, 11), (7, 10), (8, 9))
SKELETONS: dict[str, tuple[int, Pairs]] = {
    "face68": (68, FACE68), "coco17": (17, COCO), "lsp14": (14, LSP14), "mpii16": (16, MPII),
}  # fmt: skip
SIDES = {"left": "right", "l": "r", "lt": "rt"}


def flip_pairs_of(skeleton: str, names: Sequence[str], count: int) -> Pairs:
    """(left, right) index pairs of `count` points. Raises ConfigError for an unknown or unfit skeleton."""
    if skeleton == "none":
        return ()
    if skeleton == "auto":
        return paired(names) if names else FACE68 if count == 68 else ()
    if skeleton not in SKELETONS:
        raise ConfigError(f"data.skeleton={skeleton!r}: choose auto, {', '.join(SKELETONS)} or none")
    points, pairs = SKELETONS[skeleton]
    if points != count:
        raise ConfigError(f"data.skeleton={skeleton} has {points} points and the data have {count}")
    return pairs


def paired(names: Sequence[str]) -> Pairs:
    """Names that differ in nothing but the side: "left eye" and "right eye", "l_knee" and "r_knee", "LEye", "REye"."""
    at = {_words(name): i for i, name in enumerate(names)}
    found = []
    for words, i in at.items():
        other = tuple(SIDES.get(word, word) for word in words)
        if other != words and other in at:
            found.append((i, at[other]))
    return tuple(found)


def _words(name: str) -> tuple[str, ...]:
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return tuple(re.split(r"[\s_.\-]+", spaced.strip().lower()))
