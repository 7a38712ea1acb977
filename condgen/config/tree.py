"""Nested mappings of plain values: join them, flatten them, look one value up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Tree = dict[str, Any]


@dataclass(frozen=True)
class Layer:
    """One source of values: a file or the command line."""

    source: str
    tree: Tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def merge(into: Tree, tree: Mapping[str, Any]) -> None:
    for key, value in tree.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = copied(value)


def copied(value: Any) -> Any:
    return {k: copied(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def chosen(trees: Sequence[Tree], *path: str) -> Any:
    """The value at `path` in the last tree that has one."""
    for tree in reversed(trees):
        value: Any = tree
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            return value
    return None


def listed(value: Any) -> Any:
    """The same with lists for tuples and dicts for mappings: what yaml and JSON can hold."""
    if isinstance(value, Mapping):
        return {key: listed(inner) for key, inner in value.items()}
    return [listed(inner) for inner in value] if isinstance(value, list | tuple) else value


def shown(value: Any) -> str:
    """A value as a user would write it in yaml."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(shown, value)) + "]"
    return repr(value)
