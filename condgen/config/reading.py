"""Reading yaml files and `key=value` words as plain values, and refusing everything that is more than a value."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from condgen.config.tree import Layer, Tree, listed, merge, shown
from condgen.errors import ConfigError

SECTIONS = ("system", "data", "text", "optim", "train", "eval", "run")
COMMAND_LINE = "command line"
MAX_BYTES = 1 << 20  # a configuration is small; anything larger is a mistake or an attack


def read_file(path: Path | str, source: str | None = None) -> Layer:
    """A yaml file as plain values. ConfigError for what is not plain: tags, interpolations, duplicate keys."""
    source = source or str(path)
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {source}: {error.strerror or error}") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{source} has {len(raw)} bytes; a configuration file may have {MAX_BYTES}")
    try:
        loaded = _read_yaml(raw.decode("utf-8"), source)
    except UnicodeDecodeError:
        raise ConfigError(f"{source} is not UTF-8 text") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{source} must hold a mapping of sections, not {type(loaded).__name__}")
    _refuse_unplain(loaded, source)
    return Layer(source, normal(loaded, source))


def read_words(words: Sequence[str]) -> Layer:
    """`key=value` words; bare `task=`, `system=` and `data=` choose a group."""
    tree: Tree = {}
    for word in words:
        key, equals, value = word.partition("=")
        parts = key.split(".")
        if not equals or not all(part.isidentifier() for part in parts):
            raise ConfigError(f"cannot read {word!r}: options are given as key=value, such as train.steps=2000")
        held = _read_yaml(f"value: {value}" if value.strip() else "value:", f"{COMMAND_LINE}, {key}")
        leaf: Any = held["value"] if set(held) == {"value"} else value
        for part in reversed(parts):
            leaf = {part: leaf}
        _refuse_unplain(leaf, COMMAND_LINE)
        merge(tree, normal(leaf, COMMAND_LINE))
    return Layer(COMMAND_LINE, tree)


def _read_yaml(text: str, source: str) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.create(text), resolve=False) if text.strip() else {}
    except yaml.YAMLError as error:
        what = " ".join(str(error).split())
        raise ConfigError(f"{source} is not plain yaml: {what}") from None
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: {error}") from None


def _refuse_unplain(value: Any, source: str, key: str = "") -> None:
    """An interpolation could copy an environment variable into the saved config, a tag could build an object."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str) or "${" in name:
                raise ConfigError(f"{source}: the key {name!r} under {key or 'the top'} must be a plain word")
            _refuse_unplain(inner, source, f"{key}.{name}".strip("."))
    elif isinstance(value, list | tuple):
        for inner in value:
            _refuse_unplain(inner, source, key)
    elif isinstance(value, str) and ("${" in value or value == "???"):
        raise ConfigError(f"{source}: {key} = {value!r}: interpolations are not read; write the value itself")
    elif not isinstance(value, str | int | float | bool | None):
        raise ConfigError(f"{source}: {key} holds a {type(value).__name__}; only text, numbers, lists and mappings")


def normal(tree: Tree, source: str) -> Tree:
    """`system: gan_cls` means `system: {name: gan_cls}`; `task: {name: x}` means `task: x`."""
    out = dict(tree)
    for group in ("system", "data"):
        if isinstance(out.get(group), str):
            out[group] = {"name": out[group]}
    if isinstance(out.get("task"), dict) and set(out["task"]) == {"name"}:
        out["task"] = out["task"]["name"]
    for section in SECTIONS:
        if section in out and not isinstance(out[section], dict):
            if out[section] is not None:
                what = (
                    "choose one by name"
                    if section in ("task", "system", "data")
                    else f"its options are written {section}.NAME=..."
                )
                raise ConfigError(f"{source}: {section} = {shown(out[section])}: {section} is a section; {what}")
            out[section] = {}
    return out


def to_yaml(tree: Tree) -> str:
    """The tree as yaml that `read_file` reads back to equal values."""
    return OmegaConf.to_yaml(OmegaConf.create(listed(tree)))
