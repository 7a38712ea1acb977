"""`condgen list`: what exists, and what fits together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from condgen import config, registry
from condgen.commands import arguments
from condgen.commands.tables import table
from condgen.errors import CondgenError

NOTHING = "-"


def main(words: Sequence[str]) -> int:
    parser = arguments.parser("list", "Tables of tasks, systems, conditions and data sets, and which fit together.")
    parser.parse_args(words)
    print(listing())
    return 0


def listing() -> str:
    from condgen.conditions.base import ConditionKind
    from condgen.data.base import DataSource
    from condgen.systems.base import Trainable
    from condgen.task import Task

    tasks = {name: _load("tasks", name, Task) for name in registry.names("tasks")}
    systems = {name: _load("systems", name, Trainable) for name in registry.names("systems")}
    kinds = {name: _load("conditions", name, ConditionKind) for name in registry.names("conditions")}
    data = {name: _load("data", name, DataSource) for name in registry.names("data")}
    parts = [
        "TASKS",
        table(
            ("task", "conditions", "what it is"),
            [(name, _joined(task, "conditions"), _about("tasks", name, task)) for name, task in tasks.items()],
        ),
        "\nSYSTEMS",
        table(
            ("system", "forms it takes", "needs", "presets", "what it is"),
            [
                (name, _joined(cls, "consumes"), _needs(cls), _presets(name), _about("systems", name, cls))
                for name, cls in systems.items()
            ],
        ),
        "\nCONDITIONS: the forms in which each can be given",
        table(
            ("condition", "forms", "what it is"),
            [(name, _joined(kind, "forms"), _about("conditions", name, kind)) for name, kind in kinds.items()],
        ),
        "\nWHAT FITS: the form in which a condition reaches a system",
        table(("system", *kinds), [(name, *_row(cls, list(kinds.values()))) for name, cls in systems.items()]),
        "\nDATA SETS: the condition fields that each provides with its default options",
        table(
            ("data set", "provides", "what it is"),
            [(name, _provides(name, cls), _about("data", name, cls)) for name, cls in data.items()],
        ),
    ]
    return "\n".join(parts)


def _load(kind: str, name: str, base: type) -> Any:
    """The class, or the error that importing it gave: one broken file must not hide the others."""
    try:
        return registry.load(kind, name, base)
    except Exception as error:
        return error


def _about(kind: str, name: str, found: Any) -> str:
    if isinstance(found, Exception):
        return f"cannot be loaded: {type(found).__name__}: {found}".splitlines()[0]
    return registry.summary(kind, name)


def _joined(cls: Any, attribute: str) -> str:
    return ", ".join(getattr(cls, attribute, ())) or NOTHING


def _needs(cls: Any) -> str:
    """ "text and one of boxes, keypoints": what it requires, and the fields of which one will do."""
    required, either = getattr(cls, "requires", ()), getattr(cls, "needs_one_of", ())
    parts = [", ".join(required)] if required else []
    return " and ".join([*parts, f"one of {', '.join(either)}"] if either else parts) or NOTHING


def _presets(system: str) -> str:
    if system not in registry.names("configs/system", ".yaml"):
        return NOTHING
    found = config.read_file(registry.path("configs/system", system, ".yaml")).tree.get("presets") or {}
    return ", ".join(found) or NOTHING


def _row(system: Any, kinds: Sequence[Any]) -> list[str]:
    takes, reads = getattr(system, "consumes", ()), getattr(system, "reads", None)

    def form_of(kind: Any) -> str:
        if reads is not None and getattr(kind, "field", "") not in reads:
            return NOTHING
        return next((form for form in takes if form in getattr(kind, "forms", ())), NOTHING)

    return [form_of(kind) for kind in kinds]


def _provides(name: str, cls: Any) -> str:
    """Fields of the data set with the options of its yaml file; most layouts can only say once they see the files."""
    if isinstance(cls, Exception):
        return NOTHING
    options: dict[str, Any] = {}
    if name in registry.names("configs/data", ".yaml"):
        options = config.read_file(registry.path("configs/data", name, ".yaml")).tree.get("data") or {}
    own = {parameter.name for parameter in registry.constructor_options(cls)}
    try:
        made = cls(**{key: value for key, value in options.items() if key in own})
    except (CondgenError, TypeError):
        return "depends on data.root"
    return ", ".join(made.provides.given) or NOTHING
