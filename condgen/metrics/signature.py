"""Metric signatures in the manner of sacreBLEU (Post, WMT 2018, arXiv:1804.08771).

    rprec@10|cand=10|n=446|evaluator=1f0c9a|data=openmoji#0a1b2c|split=test|seed=0|condgen=0.1.0

Two numbers may be compared only when their signatures agree. FID differs by orders of magnitude between resize
modes, sample counts and weights, so a number without its signature says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from condgen import __version__
from condgen.errors import ConfigError

METRIC = "metric"  # the name under which `comparable` reports that the metrics themselves differ


@dataclass(frozen=True)
class Signature:
    """A metric's name and its protocol, in order. `str` writes it, `parse` reads it."""

    metric: str
    fields: Mapping[str, str]

    def __str__(self) -> str:
        return "|".join([self.metric, *(f"{name}={value}" for name, value in self.fields.items())])


def signature(metric: str, **fields: object) -> str:
    """The signature string of `metric` with these fields and the version of condgen.

    None leaves a field out; True and False become yes and no. Raises ConfigError for a value that would break
    the format.
    """
    given = {name: _text(value) for name, value in fields.items() if value is not None}
    made = Signature(metric, {**given, "condgen": __version__})
    for part in (made.metric, *made.fields.values()):
        if any(sign in part for sign in "|\n\r") or not part:
            raise ConfigError(f"{part!r} cannot stand in a signature; it must be text without '|' and line breaks")
    return str(made)


def parse(text: str) -> Signature:
    """Reads a signature string. Raises ConfigError for anything else."""
    metric, *parts = text.split("|")
    fields: dict[str, str] = {}
    for part in parts:
        name, found, value = part.partition("=")
        if not found or not name or name in fields:
            raise ConfigError(f"{text!r} is not a signature: {part!r} should be one more name=value")
        fields[name] = value
    if not metric or "=" in metric:
        raise ConfigError(f"{text!r} is not a signature: it must begin with the name of the metric")
    return Signature(metric, fields)


def comparable(a: str, b: str, *, ignore: Sequence[str] = ()) -> list[str]:
    """Names of the fields in which two signatures differ; an empty list means that the numbers are comparable.

    `ignore` names fields that the caller accepts to differ, such as ("seed", "condgen").
    """
    one, two = parse(a), parse(b)
    names = [METRIC] if one.metric != two.metric else []
    union = dict.fromkeys([*one.fields, *two.fields])
    names += [name for name in union if one.fields.get(name) != two.fields.get(name)]
    return [name for name in names if name not in ignore]


def require_comparable(a: str, b: str, *, ignore: Sequence[str] = ()) -> None:
    """Raises ConfigError that names each differing field with both of its values."""
    different = comparable(a, b, ignore=ignore)
    if not different:
        return
    one, two = parse(a), parse(b)

    def show(side: Signature, name: str) -> str:
        return side.metric if name == METRIC else side.fields.get(name, "absent")

    listed = "; ".join(f"{name}: {show(one, name)} against {show(two, name)}" for name in different)
    raise ConfigError(
        f"these two numbers cannot be compared, because their protocols differ in {listed}. "
        "Evaluate both with the same settings"
    )


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
