"""What a user writes for arithmetic and walks, taken apart: "s1,s2,s3 - s4 + s5", "Coat - Shirt + Bag", "cat .. dog".

A term is a label or a sentence, sample numbers (s12, or s12,s40,s7 for their mean), or a picture file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from condgen.data.decode import SUFFIXES
from condgen.errors import ConfigError

SIGN = re.compile(r"(?:^|(?<=\s))([+-])(?=\s)")  # spaces on both sides: names hold hyphens
STOP = re.compile(r"\s*(?<![./\\])\.\.(?![./\\])\s*")  # not that of ../a.png
SAMPLES = re.compile(r"s\d+(?:\s*,\s*s\d+)*")
Kind = Literal["named", "samples", "picture"]


@dataclass(frozen=True)
class Term:
    """One term. kind "named" is a label or sentence (`text`), "samples" has `ids`, "picture" is a file (`text`).

    ids of a "named" term are those behind an @ ("cat@s3"): the noise to go with it.
    """

    text: str
    kind: Kind
    ids: tuple[int, ...] = ()
    sign: int = 1


def parse_sum(text: str, names: Sequence[str] = ()) -> list[Term]:
    """ "A - B + C" -> its terms. Signs stand between spaces. Raises ConfigError with what is wrong.

    names   of labels: a term that is one of them is that label, whatever it looks like
    """
    example = "write it as 'A - B + C', with spaces around + and -"
    pieces = SIGN.split(f" {text.strip()} ")
    first, rest = pieces[0].strip(), pieces[1:]
    signs = [1] if first else []
    words = [first] if first else []
    for sign, word in zip(rest[::2], rest[1::2], strict=True):
        signs.append(1 if sign == "+" else -1)
        words.append(word.strip())
    if not words or not all(words):
        raise ConfigError(f"--arithmetic {text!r}: a term is missing; {example}")
    if len(words) == 1:
        raise ConfigError(f"--arithmetic {text!r} has one term; {example}")
    terms = [_term(word, names, sign) for word, sign in zip(words, signs, strict=True)]
    if any(term.kind == "named" and term.ids for term in terms):
        raise ConfigError(f"--arithmetic {text!r}: @ belongs to --walk; labels share the noise of --seed here")
    kinds = {term.kind == "named" for term in terms}
    if len(kinds) > 1:
        raise ConfigError(
            f"--arithmetic {text!r} mixes labels with samples or pictures: the first are sums of conditions, the "
            "others of noise. Use one kind, and give the label of samples by --label"
        )
    return terms


def parse_walk(text: str, names: Sequence[str] = ()) -> list[Term]:
    """ "cat .. dog .. cat", "s1..s5", "cat@s3..dog@s7" -> the stops. Raises ConfigError."""
    words = [word.strip() for word in STOP.split(text.strip())]
    if len(words) < 2 or not all(words):
        raise ConfigError(f"--walk {text!r}: write two stops or more as 'A .. B', such as 'cat .. dog' or 's1 .. s5'")
    stops = [_term(word, names, 1) for word in words]
    if len({bool(stop.ids) or stop.kind == "picture" for stop in stops}) > 1:
        raise ConfigError(f"--walk {text!r}: some stops name their noise and others do not; write 'cat@s3 .. dog@s7'")
    if len({stop.kind == "named" for stop in stops}) > 1:
        raise ConfigError(f"--walk {text!r} mixes labels with samples or pictures; write 'cat@s3 .. dog@s7'")
    return stops


def _term(word: str, names: Sequence[str], sign: int) -> Term:
    if word in names:
        return Term(word, "named", sign=sign)
    if SAMPLES.fullmatch(word):
        return Term(word, "samples", _ids(word), sign)
    if Path(word).suffix.lower() in SUFFIXES:
        return Term(word, "picture", sign=sign)
    label, at, samples = word.rpartition("@")
    if at and SAMPLES.fullmatch(samples.strip()):
        if not label.strip():
            raise ConfigError(f"{word!r}: a label is missing before the @; for a sample alone write {samples.strip()}")
        return Term(label.strip(), "named", _ids(samples), sign)
    return Term(word, "named", sign=sign)


def _ids(text: str) -> tuple[int, ...]:
    return tuple(int(one.strip()[1:]) for one in text.split(","))
