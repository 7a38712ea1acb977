"""Finding systems, conditions, data sets, tasks and configs by name.

File name = config name = registry name. Nothing registers itself: a name is looked up as a file and imported
only when asked for, so a broken system cannot break another and listing imports nothing. A user's project can
drop `systems/`, `data/`, `tasks/` and `configs/` folders beside its data; they are searched first.

Names are plain identifiers. No configuration value is ever turned into an import path.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from condgen.errors import ConfigError

PACKAGE = Path(__file__).resolve().parent
NAME = re.compile(r"[a-z][a-z0-9_]*")
IN_PACKAGE = ("systems", "data", "conditions")  # folders of the package that hold one file per name
SUPPORT = {
    "base",
    "stack",
    "text_encoders",
    "decode",
    "checks",
    "cache",
    "archive",
    "video",
    "stabilise",
}  # shared parts in those folders, not entries


def shipped(folder: str) -> Path:
    """`tasks` or `configs`: beside the package in a checkout, inside it in a wheel."""
    inside = PACKAGE / "_shipped" / folder
    return inside if inside.is_dir() else PACKAGE.parent / folder


def project() -> Path:
    """The folder of the user's own project: CONDGEN_PROJECT, or the current folder."""
    return Path(os.environ.get("CONDGEN_PROJECT") or Path.cwd())


def folders(kind: str) -> list[Path]:
    """Folders searched for `kind` (systems, data, conditions, tasks, configs/...), the user's first."""
    own = PACKAGE / kind if kind in IN_PACKAGE else shipped(kind)
    found = [project() / kind, own]
    return list(dict.fromkeys(path.resolve() for path in found if path.is_dir()))


def names(kind: str, suffix: str = ".py") -> list[str]:
    """Sorted names available for `kind`, without importing anything."""
    found: set[str] = set()
    for folder in folders(kind):
        for path in folder.glob(f"*{suffix}"):
            if NAME.fullmatch(path.stem) and _is_entry(kind, path):
                found.add(path.stem)
    return sorted(found)


def path(kind: str, name: str, suffix: str = ".py") -> Path:
    """The file for `name`; ConfigError with suggestions and the full list when there is none."""
    if NAME.fullmatch(str(name)):
        for folder in folders(kind):
            candidate = folder / f"{name}{suffix}"
            if candidate.is_file():
                return candidate
    raise ConfigError(unknown(kind, str(name), names(kind, suffix)))


def unknown(what: str, given: str, allowed: list[str]) -> str:
    """The text of an unknown-name error."""
    close = difflib.get_close_matches(given, allowed, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"there is no {what} named {given!r}.{hint} Available: {', '.join(allowed) or 'none'}"


def module(kind: str, name: str) -> ModuleType:
    """Imports the file for `name`."""
    file = path(kind, name)
    if file.parent == PACKAGE / kind:
        return importlib.import_module(f"condgen.{kind}.{name}")
    key = (
        f"condgen_project.{kind}.{name}"
        if file.is_relative_to(project().resolve())
        else f"condgen_shipped.{kind}.{name}"
    )
    if key in sys.modules and getattr(sys.modules[key], "__file__", None) == str(file):
        return sys.modules[key]
    spec = importlib.util.spec_from_file_location(key, file)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[key] = loaded  # before running it: dataclasses and pickling look the module up by name
    try:
        spec.loader.exec_module(loaded)
    except BaseException:
        del sys.modules[key]
        raise
    return loaded


def load(kind: str, name: str, base: type) -> type[Any]:
    """The one subclass of `base` that the file for `name` defines."""
    source = module(kind, name)
    own = [
        value
        for value in vars(source).values()
        if inspect.isclass(value)
        and issubclass(value, base)
        and value is not base
        and value.__module__ == source.__name__
    ]
    public = [value for value in own if not value.__name__.startswith("_")]
    if len(public) != 1:
        listed = ", ".join(value.__name__ for value in public) or "none"
        raise ConfigError(f"{source.__file__} must define exactly one public {base.__name__}; it defines {listed}")
    return public[0]


def summary(kind: str, name: str) -> str:
    """First line of the file's docstring, read without importing it."""
    doc = ast.get_docstring(ast.parse(path(kind, name).read_text(encoding="utf-8")))
    return (doc or "").strip().splitlines()[0] if doc else ""


def _is_entry(kind: str, file: Path) -> bool:
    """Systems and data sets are entries; shared parts beside them (in SUPPORT or private) are not."""
    return not file.stem.startswith("_") and not (kind in IN_PACKAGE and file.stem in SUPPORT)


def constructor_options(cls: type) -> Iterator[inspect.Parameter]:
    """Keyword-only constructor parameters: the schema that configuration is checked against."""
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            yield parameter
