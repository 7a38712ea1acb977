"""Signatures as schemas: which options a class takes, of which type, and whether given values fit.

An option is a keyword-only constructor parameter or a dataclass field. Its annotation is the whole rule:
`int`, `float | None`, `Literal["a", "b"]`, `tuple[float, float]`, `Annotated[float, Range(0, 1)]`, ...
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from condgen.config.tree import Tree, chosen, flatten, shown
from condgen.errors import ConfigError
from condgen.options import Range

REQUIRED = inspect.Parameter.empty
Origins = Mapping[str, Sequence[tuple[str, Any]]]  # dotted key -> (source, value), the last one in force


@dataclass(frozen=True)
class Option:
    """One option: `type` is the annotation without `Annotated`, `bounds` the ranges found in it."""

    type: Any
    bounds: tuple[Range, ...]
    default: Any
    owner: str

    def describe(self) -> str:
        """In words: "int, at least 1", "one of adam, sgd", "float or null", ..."""
        return ", ".join([_words(self.type), *map(str, self.bounds)])

    def objection(self, value: Any) -> str | None:
        """What is wrong with a value of the right type: out of range, or not a finite number."""
        for number in _numbers(value):
            if not math.isfinite(number):
                return "must be a finite number"
            if any(number not in bound for bound in self.bounds):
                return f"must be {' and '.join(map(str, self.bounds))}"
        return None


def options_of(cls: type, without: Sequence[str] = ()) -> dict[str, Option]:
    """The options of a dataclass (its fields) or of any class (its keyword-only constructor parameters)."""
    constructor: Any = cls
    if not dataclasses.is_dataclass(cls):
        return options_of_call(constructor.__init__, without, owner=cls.__name__)
    hints = typing.get_type_hints(cls, include_extras=True)
    out = {}
    for entry in dataclasses.fields(cls):
        if entry.init and entry.name not in without:
            default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
            default = REQUIRED if default is dataclasses.MISSING else default
            plain, bounds = _plain(hints[entry.name])
            out[entry.name] = Option(plain, tuple(bounds), default, cls.__name__)
    return out


def options_of_call(call: Callable[..., Any], without: Sequence[str] = (), owner: str = "") -> dict[str, Option]:
    """The keyword-only parameters of a function."""
    hints = typing.get_type_hints(call, include_extras=True)
    out = {}
    for parameter in inspect.signature(call).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.name not in without:
            plain, bounds = _plain(hints.get(parameter.name, Any))
            out[parameter.name] = Option(plain, tuple(bounds), parameter.default, owner or call.__name__)
    return out


def suggest(given: str, known: Iterable[str]) -> str:
    """ " Did you mean 'train.steps'?" or "": the same name in another section, a near one here, then elsewhere."""
    known = list(dict.fromkeys(known))
    section, _, leaf = given.rpartition(".")
    leaves: dict[str, str] = {}
    for key in known:
        leaves.setdefault(key.rpartition(".")[2], key)
    siblings = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == section}
    for names, cutoff in ((leaves, 1.0), (siblings, 0.6), (leaves, 0.7)):
        close = difflib.get_close_matches(leaf, names, n=1, cutoff=cutoff)
        if close:
            return f" Did you mean {names[close[0]]!r}?"
    whole = difflib.get_close_matches(given, known, n=1, cutoff=0.75)
    return f" Did you mean {whole[0]!r}?" if whole else ""


def convert(key: str, value: Any, option: Option) -> Any:
    """The value in the option's type. Raises ConfigError (without the source)."""
    plain = f"{key} = {shown(value)}: expected {option.describe()}"
    names_bool = "true or false" in option.describe() or option.type is Any
    if isinstance(value, bool) and not names_bool:
        quote = ". Quote it if the word itself is meant" if "text" in option.describe() else ""
        raise ConfigError(plain + quote)
    if option.type is bool and isinstance(value, int) and not isinstance(value, bool):
        raise ConfigError(plain)
    schema = dataclasses.make_dataclass("Schema", [("value", option.type)])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # a yaml list for a tuple is what we want
            merged = OmegaConf.merge(OmegaConf.structured(schema), {"value": value})
        converted = OmegaConf.to_container(merged)["value"]  # type: ignore[index,call-overload]
    except (OmegaConfBaseException, ValueError, TypeError):
        raise ConfigError(plain) from None
    objection = option.objection(converted)
    if objection:
        raise ConfigError(f"{key} = {shown(value)}: {objection}")
    return converted


class Checker:
    """Collects every problem of a merged tree instead of stopping at the first."""

    def __init__(self, tree: Tree, origins: Origins, problems: list[str], sections: Sequence[str]) -> None:
        self.tree, self.origins, self.problems, self.sections = tree, origins, problems, sections
        self.known: dict[str, None] = dict.fromkeys(("task", "system.name", "system.preset", "data.name"))
        self.pending: dict[str, None] = {}  # every key that was given, in order

    def source(self, key: str) -> str:
        found = next((self.origins[k] for k in self.origins if k == key or k.startswith(key + ".")), None)
        return f" ({found[-1][0]})" if found else ""

    def section(self, name: str, options: Mapping[str, Option]) -> Tree:
        """The values of `options` in section `name`: what was given, else the default. Missing ones are problems."""
        given = self.at(name)
        out: Tree = {}
        for key, option in options.items():
            full = f"{name}.{key}"
            self.known[full] = None
            if key not in given:
                if option.default is REQUIRED:
                    self.problems.append(f"{full} is missing: {option.owner} needs it ({option.describe()})")
                else:
                    # a default of 600 for a float prints as 600.0, as it will when it is read back
                    out[key] = float(option.default) if option.type is float else option.default
                continue
            try:
                out[key] = convert(full, given[key], option)
            except ConfigError as error:
                self.problems.append(f"{error}{self.source(full)}")
        self.pending.update((f"{name}.{key}", None) for key in given)
        return out

    def at(self, name: str) -> Tree:
        found = chosen([self.tree], *name.split("."))
        return found if isinstance(found, dict) else {}

    def skip(self, name: str) -> None:
        """Section `name` cannot be checked, because its class is unknown."""
        self.known.update(dict.fromkeys(f"{name}.{key}" for key in self.at(name)))

    def finish(self) -> None:
        tops = [key for key, _ in flatten({k: v for k, v in self.tree.items() if k not in ("task", *self.sections)})]
        for key in [*tops, *(key for key in self.pending if key not in self.known)]:
            self.problems.append(f"unknown option {key!r}{self.source(key)}.{suggest(key, self.known)}")


def _plain(annotation: Any) -> tuple[Any, list[Range]]:
    """The annotation in types that a yaml value can have, and the ranges that stood in it."""
    if annotation is None or annotation is type(None):
        return type(None), []
    if annotation is Path:
        return str, []
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        plain, bounds = _plain(args[0])
        return plain, bounds + [extra for extra in args[1:] if isinstance(extra, Range)]
    if origin in (Union, types.UnionType):
        parts = [_plain(arg) for arg in args]
        union: Any = Union[tuple(part for part, _ in parts)]  # noqa: UP007  (built at run time)
        return union, [bound for _, bounds in parts for bound in bounds]
    if origin in (list, tuple) or (isinstance(origin, type) and issubclass(origin, Sequence)):
        inner = [(Ellipsis, []) if arg is Ellipsis else _plain(arg) for arg in args]
        bounds = [bound for _, found in inner for bound in found]
        kinds = tuple(kind for kind, _ in inner)
        if origin is list:
            return types.GenericAlias(list, kinds), bounds
        return types.GenericAlias(tuple, kinds if origin is tuple else (kinds[0], Ellipsis)), bounds
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return types.GenericAlias(dict, (args[0], _plain(args[1])[0])), []
    return annotation, []


def _words(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    names = {int: "int", float: "float", str: "text", bool: "true or false", type(None): "null", Any: "anything"}
    if annotation in names:
        return names[annotation]
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return " or ".join(_words(arg) for arg in args)
    if origin is list or (origin is tuple and args[-1:] == (Ellipsis,)):
        return f"list of {_words(args[0])}"
    if origin is tuple:
        return f"list of {len(args)}: " + ", ".join(_words(arg) for arg in args)
    if origin is dict:
        return f"mapping to {_words(args[1])}"
    return str(getattr(annotation, "__name__", annotation))


def _numbers(value: Any) -> list[float]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [number for part in value for number in _numbers(part)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []
