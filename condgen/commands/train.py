"""`condgen train`: one run from configuration to scores.

Every process runs this. The first one owns the run folder; the others learn its path. Whatever happens,
status.json and the last line on the screen say how the run ended, because launchers hide exit codes.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from condgen import config as configuration
from condgen.commands import arguments, finish, launcher
from condgen.config import Config
from condgen.config.tree import flatten, listed, shown
from condgen.errors import CheckpointError, CondgenError, ConfigError, Stopped

if TYPE_CHECKING:
    from condgen.build import Built
    from condgen.engine.checkpoint import Checkpoint, CheckpointStore
    from condgen.engine.log import Log
    from condgen.engine.run import RunFolder
    from condgen.engine.trainer import Trainer
    from condgen.engine.world import World

T = TypeVar("T")

EPILOG = """\
examples:
  condgen train task=text2image
  condgen train task=text2image system.preset=paper data=coco data.root=/data/coco train.steps=200000
  condgen train train.resume=runs/NAME              go on with a stopped run
  accelerate launch --config_file configs/accelerate/cpu_2proc.yaml tools/train.py task=text2image
"""


def main(words: Sequence[str]) -> int:
    parser = arguments.parser("train", "Train a system and write a run folder.", EPILOG)
    arguments.add_configuration(parser)
    parser.add_argument("--dry-run", action="store_true", help="sizes, memory and one timed step; keeps nothing")
    parser.add_argument("--quiet", action="store_true", help="nothing on the screen but the last lines")
    given = parser.parse_intermixed_args(words)
    config = load(given.words, given.config)
    if arguments.shown(config, given):
        return 0
    if given.dry_run:
        from condgen.commands.dry_run import dry_run

        return dry_run(config)
    return train(config, quiet=given.quiet)


def load(words: Sequence[str], files: Sequence[str]) -> Config:
    """The configuration; `train.resume=<run folder>` alone brings that run's own."""
    resume = configuration.read_words(words).tree.get("train", {}).get("resume")
    if not files and isinstance(resume, str) and resume != "latest":
        return arguments.load_run(run_of(Path(resume)), words)
    return configuration.load(words, files)


def run_of(path: Path) -> Path:
    """The run folder that holds `path`: itself, or the parent of its checkpoints folder."""
    return path.parent.parent if path.parent.name == "checkpoints" else path


@dataclass
class Ending:
    """How a run ended; `step` is the last one done."""

    state: str
    code: int
    reason: str
    step: int = 0


def train(config: Config, *, quiet: bool = False) -> int:
    """Runs a training to its end, its time limit, a signal or an error. Returns the exit code."""
    from condgen.engine.world import World

    world = World.start(device=config.launch.device, precision=config.launch.precision, seed=config.train.seed)
    try:
        from condgen.build import build

        built = main_first(world, lambda: build(config))  # mistakes show up before a run folder exists
        folder = agreed(world, lambda: str(open_folder(config).path) if world.is_main else "")
        return _in_folder(built, world, Path(folder), quiet)
    finally:
        world.close()


def _in_folder(built: Built, world: World, folder: Path, quiet: bool) -> int:
    from condgen.engine.log import Log
    from condgen.engine.run import RunFolder

    run = RunFolder(folder)
    with contextlib.ExitStack() as stack:
        agreed(world, lambda: world.is_main and stack.enter_context(run.lock()) is None)
        start = find_checkpoint(built.config, run, world)
        changed = _changed(built.config, run) if start else []
        before = run.record()
        if world.is_main:
            run.write_config(built.config.record())
            run.write_command(launcher.typed())
            finish.write_system(built, run)
            run.write_environment(world_size=world.world, device=str(world.device))
            run.status("running", 0, "", start.step if start else 0)
        log = Log(run, trackers=built.config.launch.trackers, quiet=quiet, main=world.is_main)
        stack.callback(log.close)
        if changed:
            log.text(f"changed since this run was started: {'; '.join(changed)}")
        ending = _run(built, world, run, log, start)
        if world.is_main and start and ending.code == ConfigError.exit_code and ending.step == start.step:
            run.put_back(before)  # options that were refused must not stay as the run's own
    if world.is_main:
        run.status(ending.state, ending.code, ending.reason, ending.step)
        resume = shlex.join([*launcher.words("train", processes=world.world), f"train.resume={run.path}"])
        tail = f' resume="{resume}"' if ending.code else f" run={run.path}"
        print(f"condgen: exit={ending.code} reason={shlex.quote(ending.reason)}{tail}", flush=True)
    return ending.code


def _changed(config: Config, run: RunFolder) -> list[str]:
    """Options whose values differ from those in the run folder, such as "train.steps 20 -> 30"."""
    try:
        before = dict(flatten(configuration.read_file(run.path / "config.yaml").tree))
    except ConfigError:
        return []
    after = dict(flatten(listed(config.tree)))
    names = [name for name in dict.fromkeys((*before, *after)) if name != "train.resume"]
    return [f"{n} {shown(before.get(n))} -> {shown(after.get(n))}" for n in names if before.get(n) != after.get(n)]


def _run(built: Built, world: World, run: RunFolder, log: Log, start: Checkpoint | None) -> Ending:
    try:
        trainer = make_trainer(built, world, run, log)
        for warning in built.config.warnings:
            log.text(f"warning: {warning}")
        log.text(f"run folder: {run.path}")
        outcome = trainer.train(start)
        with finish.signals_raise():
            finish.finish(built, world, run, log)
        return Ending("done", 0, outcome.reason, outcome.step)
    except Stopped as error:
        ending = Ending("stopped", error.exit_code, str(error))
        log.text(f"stopped: {error}")
    except CondgenError as error:
        ending = Ending("failed", error.exit_code, f"{type(error).__name__}: {error}")
        log.text(f"error: {error}")
    except BaseException as error:
        if world.is_main:
            run.status("failed", 1, f"{type(error).__name__}: {error}", 0)
        raise
    steps = open_store(built.config, run).steps()
    ending.step = steps[-1] if steps else 0
    return ending


def make_trainer(built: Built, world: World, run: RunFolder, log: Log) -> Trainer:
    """The trainer over this process's share of the data."""
    from condgen.engine.trainer import Trainer

    main_first(world, built.fill_captions)
    hooks = built.task.hooks(built, run, log)
    return Trainer(
        built.system,
        built.batches(world.rank, world.world),
        built.prepare,
        built.optim,
        built.options,
        world,
        run,
        log,
        hooks,
        open_store(built.config, run),
    )


def open_store(config: Config, run: RunFolder) -> CheckpointStore:
    """The checkpoints of a run, kept as `train.keep` says."""
    from condgen.engine.checkpoint import CheckpointStore

    return CheckpointStore(run.checkpoints, keep=config.launch.keep, keep_every=config.launch.keep_every)


# the run folder and where to start


def default_name(config: Config) -> str:
    return "-".join((config.task, config.system_name, config.data_name))


def open_folder(config: Config) -> RunFolder:
    """A new run folder, or the one that train.resume means. "latest" without any run to go on with starts one."""
    from condgen.engine.run import RunFolder

    root, resume = Path(config.run.dir), config.launch.resume
    if isinstance(resume, str) and resume != "latest":
        return RunFolder.open(run_of(Path(resume)))
    if resume is not None:
        name = config.run.name or default_name(config)
        again = [root / name] if config.run.name else [p for p in root.glob(f"{name}*") if _numbered(p.name, name)]
        found = [path for path in again if (path / "config.yaml").is_file()]
        if found:
            return RunFolder.open(max(found, key=lambda path: (path / "config.yaml").stat().st_mtime))
        if resume != "latest":
            raise CheckpointError(f"train.resume={resume}, but there is no run {root / name}; give its path")
    return RunFolder.create(root, config.run.name, default_name(config))


def _numbered(given: str, name: str) -> bool:
    return given == name or (given.startswith(f"{name}-") and given[len(name) + 1 :].isdigit())


def find_checkpoint(config: Config, run: RunFolder, world: World) -> Checkpoint | None:
    """What to start from: the first process chooses the step, so that all start from the same one."""
    resume = config.launch.resume
    if resume is None:
        return None
    store = open_store(config, run)

    def choose() -> int | None:
        if not world.is_main:
            return None
        if isinstance(resume, int):
            return store.load(resume).step
        path = Path(str(resume))
        if path.parent.name == "checkpoints":
            digits = path.name.removeprefix("step-")
            if not digits.isdigit():
                raise CheckpointError(f"train.resume={resume} is not a checkpoint folder such as step-00000500")
            return store.load(int(digits)).step
        newest = store.latest()
        return newest.step if newest is not None else None

    step = agreed(world, choose)
    return None if step is None else store.load(step)


# several processes


def agreed(world: World, act: Callable[[], T]) -> T:
    """Runs `act` everywhere and returns the first process's result; an error there is raised everywhere."""
    result: Any = None
    failed: CondgenError | None = None
    try:
        result = act()
    except CondgenError as error:
        failed = error
    result, first = world.broadcast((result if world.is_main else None, failed if world.is_main else None))
    if failed or first:
        raise failed or first
    return result


def main_first(world: World, act: Callable[[], T]) -> T:
    """Runs `act` in the first process, then in the others, which find its caches filled."""
    result: Any = None
    failed: CondgenError | None = None
    if world.is_main:
        try:
            result = act()
        except CondgenError as error:
            failed = error
    failed = world.broadcast(failed)
    if failed is not None:
        raise failed
    return result if world.is_main else act()
