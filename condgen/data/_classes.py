"""The classes of a labelled data set: their order, and which are kept, by number, by range or by name."""

from __future__ import annotations

import re
from collections.abc import Sequence

from condgen.errors import ConfigError, DataError
from condgen.registry import unknown

RANGE = re.compile(r"(\d+)\s*-\s*(\d+)")


def chosen_classes(given: Sequence[int | str], names: Sequence[str]) -> tuple[int, ...]:
    """Class numbers in the order of `given`; () gives all of `names`.

    given   numbers (3), ranges with both ends ("30-39") and names ("Sandal", exact); a name that looks like a
            range or a number is a name
    Raises ConfigError for a class that is not there or is named twice.
    """
    if not given:
        return tuple(range(len(names)))
    known = {name: number for number, name in reversed(list(enumerate(names)))}
    kept: list[int] = []
    for one in given:
        span = RANGE.fullmatch(one.strip()) if isinstance(one, str) else None
        if isinstance(one, str) and one in known:
            kept.append(known[one])
        elif span is not None:
            first, last = int(span[1]), int(span[2])
            if first > last:
                raise ConfigError(f"data.classes: the range {one!r} runs backwards; write {last}-{first}")
            kept += _in_range(one, first, last, len(names))
        elif isinstance(one, str) and not one.strip().isdigit():
            raise ConfigError(f"data.classes={list(given)}: {unknown('class', one, list(names))}")
        else:
            kept += _in_range(one, int(one), int(one), len(names))
    twice = sorted({number for number in kept if kept.count(number) > 1})
    if twice:
        raise ConfigError(f"data.classes={list(given)}: class {twice[0]} ({names[twice[0]]}) is there twice")
    return tuple(kept)


def class_values(name: str, given: Sequence[int | str | None]) -> tuple[int | str, ...]:
    """Class values in the order of their index: 0..max for numbers, sorted names for strings."""
    values = {value for value in given if value is not None}
    numbers = {v for v in values if isinstance(v, int)}
    if numbers and len(numbers) != len(values):
        words = sorted(str(v) for v in values - numbers)[:3]
        raise DataError(f"{name} mixes whole numbers and names ({', '.join(words)}); use one kind")
    if numbers and max(numbers) >= 1_000_000:
        raise DataError(f"{name} goes up to {max(numbers)}; class numbers must be indices 0..K-1")
    return tuple(range(max(numbers) + 1)) if numbers else tuple(sorted(str(v) for v in values))


def _in_range(one: int | str, first: int, last: int, classes: int) -> range:
    if first < 0 or last >= classes:
        raise ConfigError(f"data.classes: {one!r} is outside this data set, which has the classes 0..{classes - 1}")
    return range(first, last + 1)
