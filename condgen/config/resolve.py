"""Choosing groups, merging layers and checking the result: words and files -> `Config`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from condgen import registry
from condgen.config.reading import SECTIONS, normal, read_file, read_words, to_yaml
from condgen.config.schema import Checker, Option, Origins, options_of, suggest
from condgen.config.tree import Layer, Tree, chosen, flatten, merge, shown
from condgen.errors import ConfigError
from condgen.options import (
    OPTIM_BOUNDS,
    TRAIN_BOUNDS,
    DataOptions,
    EvalOptions,
    LaunchOptions,
    RunOptions,
    TextOptions,
    idle_options,
)

GROUPS = {"task": "tasks", "system": "systems", "data": "data"}  # key on the command line -> registry kind
OWN_SECTIONS = {"text": TextOptions, "eval": EvalOptions, "run": RunOptions}


@dataclass(frozen=True)
class Config:
    """A checked configuration. `system`, `data` and `task_options` are keyword arguments of the chosen classes.

    optim     phase name -> options, always with "default"; a phase inherits what it does not set
    tree      every value that is in force, as plain yaml types
    origins   dotted key -> (source, value), the last one in force
    warnings  options that were set and have no effect
    """

    task: str
    system_name: str
    preset: str | None
    system: Mapping[str, Any]
    data_name: str
    data: Mapping[str, Any]
    data_options: DataOptions
    text: TextOptions
    optim: Mapping[str, Any]
    train: Any
    launch: LaunchOptions
    eval: EvalOptions
    task_options: Mapping[str, Any]
    run: RunOptions
    tree: Tree = field(repr=False)
    origins: Origins = field(repr=False, compare=False)
    warnings: tuple[str, ...] = field(default=(), compare=False)

    def to_yaml(self) -> str:
        """The resolved configuration; `load(files=[...])` of it gives an equal Config."""
        return to_yaml(self.tree)

    def record(self) -> str:
        """`to_yaml` for the run folder: without train.resume, which says how this start was asked for."""
        return to_yaml({**self.tree, "train": {**self.tree["train"], "resume": None}})

    def explain(self, key: str) -> str:
        """Where the value of a dotted key came from. ConfigError with a suggestion for an unknown key."""
        leaves = dict(flatten(self.tree))
        if key not in leaves and not any(leaf.startswith(key + ".") for leaf in leaves):
            raise ConfigError(f"there is no option {key!r}.{suggest(key, leaves)}")
        lines = []
        for leaf, value in leaves.items():
            if leaf == key or leaf.startswith(key + "."):
                lines.append(f"{leaf} = {shown(value)}")
                history = self.origins.get(leaf, ())
                lines += [f"    {source}: {shown(given)}" for source, given in history] or ["    default"]
        return "\n".join(lines)


# choosing groups


def _group_file(group: str, name: Any, problems: list[str]) -> Tree:
    """configs/<group>/<name>.yaml; {} where only the class exists."""
    files = registry.names(f"configs/{group}", ".yaml")
    classes = registry.names(GROUPS[group])
    if not isinstance(name, str) or name not in {*files, *classes}:
        problems.append(registry.unknown(group if group != "data" else "data set", str(name), classes))
        return {}
    if name not in files:
        return {}
    source = f"configs/{group}/{name}.yaml"
    tree = read_file(registry.path(f"configs/{group}", name, ".yaml"), source).tree
    allowed = {"name", *SECTIONS, *(("presets",) if group == "system" else ())}
    problems += [f"{source}: unknown key {key!r}.{suggest(key, allowed)}" for key in tree if key not in allowed]
    if tree.get("name", name) != name:
        problems.append(f"{source}: name is {tree['name']!r}; it must be the name of the file, {name!r}")
    return {key: value for key, value in tree.items() if key in allowed and key != "name"}


def _layers(files: Sequence[Path | str], words: Sequence[str], problems: list[str]) -> list[Layer]:
    """All layers in merge order, the chosen names written into the first."""
    given = [*map(read_file, files), read_words(words)]
    task = chosen([layer.tree for layer in given], "task")
    if task is None:
        raise ConfigError(f"no task was chosen; add task=NAME. Available: {', '.join(registry.names('tasks'))}")
    task_tree = _group_file("task", task, problems)
    trees = [task_tree, *(layer.tree for layer in given)]
    names: Tree = {"task": task}
    for group in ("system", "data"):
        names[group] = {"name": chosen(trees, group, "name")}
        if names[group]["name"] is None and task in registry.names("tasks"):
            problems.append(f"the task {task!r} has no default {group}; add {group}=NAME")
    data_tree = _group_file("data", names["data"]["name"], problems) if names["data"]["name"] is not None else {}
    task_tree = _for_data(task_tree, names["data"]["name"], data_tree)
    system = names["system"]["name"]
    system_tree = _group_file("system", system, problems) if system is not None else {}
    presets = system_tree.pop("presets", None) or {}
    preset = chosen(trees, "system", "preset") or ("small" if "small" in presets else None)
    names["system"]["preset"] = preset
    if preset is not None and preset not in presets and not (system_tree == {} and problems):
        problems.append(registry.unknown(f"preset of {system}", str(preset), sorted(presets)))
    base = read_file(registry.shipped("configs") / "train.yaml", "configs/train.yaml")
    return [
        Layer("the chosen names", names),
        base,
        Layer(f"configs/data/{names['data']['name']}.yaml", data_tree),
        Layer(f"configs/task/{task}.yaml", task_tree),
        Layer(f"configs/system/{system}.yaml", system_tree),
        Layer(f"configs/system/{system}.yaml, preset {preset}", normal(presets.get(preset) or {}, str(preset))),
        *given,
    ]


def _for_data(task_tree: Tree, data: str | None, data_tree: Tree) -> Tree:
    """A task file without the options of its own data set, where another one was chosen.

    What every data set understands (`ignore`, `workers`) stays, and so does what makes a clip fit the task (`past`,
    `overlap`), for data sets that have it and do not set it in their own file.
    """
    own = task_tree.get("data") or {}
    if own.get("name") == data or not isinstance(own, dict):
        return task_tree
    stays = set(options_of(DataOptions))
    if data in registry.names("data") and "past" not in (data_tree.get("data") or {}):
        from condgen.data.base import DataSource

        has = options_of(registry.load("data", data, DataSource), ("split",))
        stays |= {"past", "overlap"} & set(has) if "past" in has else set()
    return {**task_tree, "data": {key: value for key, value in own.items() if key in stays}}


def load(words: Sequence[str] = (), files: Sequence[Path | str] = ()) -> Config:
    """The configuration of `key=value` words over `files` over the shipped defaults.

    Raises ConfigError with every problem, each with the file it came from and what is allowed.
    """
    problems: list[str] = []
    tree: Tree = {}
    origins: dict[str, list[tuple[str, Any]]] = {}
    for layer in _layers(files, words, problems):
        merge(tree, layer.tree)
        for key, value in flatten(layer.tree):
            if layer.source != "the chosen names":
                origins.setdefault(key, []).append((layer.source, value))
    config = _checked(tree, origins, problems)
    _raise(problems)
    assert config is not None
    return config


def _raise(problems: Sequence[str]) -> None:
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(f"{count} in the configuration:\n" + "\n".join(f"  - {line}" for line in problems))


def train_sections() -> tuple[dict[str, Option], dict[str, Option]]:
    """The options of `train.*` and of `optim.<phase>.*`; bounds that the engine's classes do not annotate are here."""
    from condgen.engine.optim import OptimOptions
    from condgen.engine.options import TrainOptions

    # the loader's workers are data.workers for the user
    train = {**options_of(TrainOptions, without=("workers",)), **options_of(LaunchOptions)}
    optim = options_of(OptimOptions)
    for options, bounds in ((train, TRAIN_BOUNDS), (optim, OPTIM_BOUNDS)):
        for name, bound in bounds.items():
            if name in options and not options[name].bounds:
                options[name] = dataclasses.replace(options[name], bounds=(bound,))
    return train, optim


def _classes() -> dict[str, tuple[str, type, tuple[str, ...]]]:
    """section -> (registry kind, base class, constructor parameters that the framework gives)."""
    from condgen.data.base import DataSource
    from condgen.systems.base import Trainable
    from condgen.task import Task

    return {
        "system": ("systems", Trainable, ("condition", "target")),
        "data": ("data", DataSource, ("split",)),
        "eval": ("tasks", Task, ()),
    }


def _optim(check: Checker, options: Mapping[str, Option]) -> tuple[Tree, Tree]:
    """(phase -> OptimOptions, the resolved `optim` section, in which a phase keeps only what it sets)."""
    from condgen.engine.optim import OptimOptions

    for phase, given in check.at("optim").items():
        if not isinstance(given, dict):
            where = f"optim.{phase}.OPTION" if phase == "default" or phase not in options else f"optim.default.{phase}"
            check.problems.append(f"optim.{phase} = {shown(given)}: write {where}=...{check.source(f'optim.{phase}')}")
    default = check.section("optim.default", options)
    made: Tree = {}
    tree: Tree = {"default": default}
    for phase, given in check.at("optim").items():
        if phase == "default" or not isinstance(given, dict):
            continue
        inherits = {name: dataclasses.replace(o, default=default.get(name, o.default)) for name, o in options.items()}
        values = check.section(f"optim.{phase}", inherits)
        tree[phase] = {key: value for key, value in values.items() if key in given}
        made[phase] = values
    if check.problems:
        return {}, tree
    try:
        return {phase: OptimOptions(**values) for phase, values in {"default": default, **made}.items()}, tree
    except (ConfigError, ValueError) as error:
        check.problems.append(f"optim: {error}")
        return {}, tree


def _checked(tree: Tree, origins: Origins, problems: list[str]) -> Config | None:
    check = Checker(tree, origins, problems, SECTIONS)
    train_options, optim_options = train_sections()
    train = check.section("train", train_options)
    optim, optim_tree = _optim(check, optim_options)
    data_options = check.section("data", options_of(DataOptions))
    own: dict[str, Tree] = {}
    for section, (kind, base, reserved) in _classes().items():
        name = tree.get("task") if section == "eval" else check.at(section).get("name")
        if not isinstance(name, str) or name not in registry.names(kind):
            check.skip(section)
            continue
        try:
            own[section] = check.section(section, options_of(registry.load(kind, name, base), reserved))
        except ConfigError as error:  # the file does not define exactly one such class
            problems.append(str(error))
            check.skip(section)
    sections = {name: check.section(name, options_of(cls)) for name, cls in OWN_SECTIONS.items()}
    check.finish()
    if problems:
        return None
    launch_keys = options_of(LaunchOptions)
    launch = LaunchOptions(**{key: value for key, value in train.items() if key in launch_keys})
    engine = {key: value for key, value in train.items() if key not in launch_keys}
    full: Tree = {
        "task": tree["task"],
        "system": {"name": tree["system"]["name"], "preset": tree["system"]["preset"], **own["system"]},
        "data": {"name": tree["data"]["name"], **data_options, **own["data"]},
        "text": sections["text"],
        "optim": optim_tree,
        "train": train,
        "eval": {**sections["eval"], **own["eval"]},
        "run": sections["run"],
    }
    from condgen.engine.options import TrainOptions

    try:
        engine_options = TrainOptions(**engine, workers=data_options["workers"])
    except (ConfigError, ValueError) as error:
        problems.append(str(error))
        return None
    return Config(
        task=tree["task"],
        system_name=tree["system"]["name"],
        preset=tree["system"]["preset"],
        system=own["system"],
        data_name=tree["data"]["name"],
        data=own["data"],
        data_options=DataOptions(**data_options),
        text=TextOptions(**sections["text"]),
        optim=optim,
        train=engine_options,
        launch=launch,
        eval=EvalOptions(**sections["eval"]),
        task_options=own["eval"],
        run=RunOptions(**sections["run"]),
        tree=full,
        origins=origins,
        warnings=tuple(idle_options(full, _deliberate(origins, optim_options))),
    )


def _deliberate(origins: Origins, optim: Mapping[str, Option]) -> dict[str, str]:
    """Dotted key -> who set it, without what a resolved config.yaml only repeats: a shipped value or a default."""
    out = {}
    text = options_of(TextOptions)
    for key, found in origins.items():
        section, _, name = key.rpartition(".")
        option = text.get(name) if section == "text" else optim.get(name) if section.startswith("optim.") else None
        usual = [value for source, value in found if source.startswith("configs/")]
        if option is None or found[-1][1] != (usual[-1] if usual else option.default):
            out[key] = found[-1][0]
    return out


def load_data(words: Sequence[str]) -> tuple[str, Tree]:
    """(name, constructor options) of a data set alone: `data=NAME data.root=...`. Raises ConfigError."""
    from condgen.data.base import DataSource

    problems: list[str] = []
    given = read_words(words)
    name = chosen([given.tree], "data", "name")
    if name is None:
        raise ConfigError(f"no data set was chosen; add data=NAME. Available: {', '.join(registry.names('data'))}")
    tree: Tree = {}
    origins: dict[str, list[tuple[str, Any]]] = {}
    for layer in (Layer(f"configs/data/{name}.yaml", _group_file("data", name, problems)), given):
        merge(tree, {key: value for key, value in layer.tree.items() if key == "data" or layer is given})
        for key, value in flatten(layer.tree):
            origins.setdefault(key, []).append((layer.source, value))
    out: Tree = {}
    if not problems:
        check = Checker(tree, origins, problems, SECTIONS)
        check.section("data", options_of(DataOptions))
        out = check.section("data", options_of(registry.load("data", name, DataSource), ("split",)))
        check.finish()
    _raise(problems)
    return name, out
