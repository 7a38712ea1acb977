"""What follows training, and what `condgen evaluate` repeats: export, scores, report, what to do next."""

from __future__ import annotations

import contextlib
import shlex
import signal
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from condgen.commands import launcher
from condgen.commands.tables import number, table
from condgen.errors import CheckpointError, Stopped
from condgen.systems.base import System

if TYPE_CHECKING:
    from torch import Tensor

    from condgen.build import Built
    from condgen.engine.checkpoint import Checkpoint
    from condgen.engine.log import Log
    from condgen.engine.run import RunFolder
    from condgen.engine.world import World
    from condgen.inference.export import ExportInfo
    from condgen.metrics.score import Score


def finish(built: Built, world: World, run: RunFolder, log: Log) -> None:
    """Export of the averaged weights, the task's scores, report.html. Every process calls it."""
    from condgen.engine.checkpoint import CheckpointStore
    from condgen.engine.report import write_report
    from condgen.inference.export import write_export

    checkpoint = CheckpointStore(run.checkpoints, keep=built.config.launch.keep).latest()
    if checkpoint is None:
        raise CheckpointError(f"{run.path} has no checkpoint to export; a training writes one at its end")
    weights = averaged(checkpoint)
    built.system.load_state_dict({**built.system.state_dict(), **weights})
    if world.is_main:
        write_export(run.export, built.system, {}, export_info(built, checkpoint.step))
    scores: list[Score] = []
    if built.can_score:
        log.text("scoring ...")
        scores = score(built, world, run, checkpoint.step)
    else:
        log.text("no scores: a stream has no rows by number")
    if world.is_main:
        run.status("done", 0, "done", checkpoint.step)  # the report shows it
        report = write_report(run)
        log.text(closing(run, report, scores, built, checkpoint.step))


def averaged(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights that sampling uses: the running average where there is one."""
    names = [name for name in ("system", "ema") if name in checkpoint.groups]
    return {key: tensor for name in names for key, tensor in checkpoint.tensors(name).items()}


def export_info(built: Built, step: int) -> ExportInfo:
    """All that `condgen.load` must know besides the weights."""
    from condgen.inference.export import ExportInfo

    config, text = built.config, {}
    if built.encoder is not None:
        text = {
            "encoder": config.text.encoder,
            "tokens": config.text.tokens,
            "length": config.text.length,
            "fingerprint": built.encoder.fingerprint,
        }
    names = list(built.train_data.provides.label.names) if built.train_data.provides.label is not None else []
    return ExportInfo(
        system=config.system_name,
        condition=built.spec,
        target=built.target,
        options=dict(config.system),
        text=text,
        task=config.task,
        data={
            "name": config.data_name,
            "label_names": names,
            "attribution": built.train_data.attribution,
            "background": config.data.get("background", 255),
            "overlap": bool(config.data.get("overlap", False)),
        },
        step=step,
    )


def write_system(built: Built, run: RunFolder) -> None:
    """system.json: lets `condgen sample` use the checkpoints of a run that is not finished."""
    from condgen.inference.export import write_info

    write_info(run.path / "system.json", export_info(built, 0))


def score(built: Built, world: World, run: RunFolder, step: int) -> list[Score]:
    """The task's scores, also as eval/<time>-step-<step>.json. The system holds the weights to be scored."""
    from condgen.disk import replace_file, to_json
    from condgen.engine.run import png_bytes

    built.system.to(world.device).eval()
    scores = built.task.score(built.system, built, world, built.config.eval)
    if world.is_main:
        record = {
            "step": step,
            "task": built.config.task,
            "data": built.config.data_name,
            "attribution": built.train_data.attribution,
            "eval": built.config.tree["eval"],
            "scores": [entry.to_dict() for entry in scores],
        }
        file = _free(run.evals, step)
        for one in scores:
            if one.picture is not None:
                replace_file(file.with_name(f"{file.stem}-{one.name.replace('/', '-')}.png"), png_bytes(one.picture))
        replace_file(file, to_json(record, indent=1))
    return scores


def _free(folder: Path, step: int) -> Path:
    """A file name that is not taken: scores of earlier evaluations stay."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    name, count = f"step-{step:08d}-{stamp}", 1
    while (folder / f"{name}.json").exists():
        count += 1
        name = f"step-{step:08d}-{stamp}-{count}"
    return folder / f"{name}.json"


def score_table(scores: Sequence[Score]) -> str:
    """One line per score, with the ends that make the number readable; then what has to be read with them."""
    rows = [(s.name, number(s.value), number(s.error), number(s.floor), number(s.ceiling), _better(s)) for s in scores]
    if not rows:
        return "this task has no scores"
    about: dict[str, list[str]] = {}
    for one in scores:
        if one.note:
            about.setdefault(one.note, []).append(one.name)
    lines = [f"{', '.join(names)}: {note}" for note, names in about.items()]
    return "\n".join([table(("score", "value", "error", "floor", "ceiling", "better"), rows), *lines])


def _better(one: Score) -> str:
    return "higher" if one.higher_is_better else "lower"


def closing(run: RunFolder, report: Path, scores: Sequence[Score], built: Built, step: int) -> str:
    """What a user reads at the end: where things are, how good they are, what to type next."""
    grids = sorted(run.samples.glob("*.png"))
    lines = ["", f"run folder   {run.path}"]
    lines += [f"samples      {grids[-1]}"] if grids else []
    lines += [f"report       {report}", "", score_table(scores), "", "next:"]
    if isinstance(built.system, System):
        lines += [f"  {_start('sample')} {run.path} {example(built)} --num 8 -o grid.png"]
    lines += [f"  {_start('evaluate')} {run.path}"] if built.can_score else []
    longer = "" if step < built.options.steps else f" train.steps={2 * step}"
    lines += [f"  {_start('train')} train.resume={run.path}{longer}"]
    if built.train_data.attribution:
        lines += ["", built.train_data.attribution]
    return "\n".join(lines)


def _start(command: str) -> str:
    return shlex.join(launcher.words(command))


def example(built: Built) -> str:
    """The flags that ask for something this system knows."""
    spec, flags = built.spec, []
    if spec.text is not None:
        caption = next(iter(built.train_data.captions()), "a red fox").splitlines()[0].replace('"', "")
        flags.append(f'--text "{caption}"')
    if spec.label is not None:
        flags.append(f'--label "{spec.label.names[0]}"' if spec.label.names else "--label 0")
    if spec.boxes is not None:
        flags.append("--boxes 0.2,0.2,0.8,0.8")
    if spec.keypoints is not None:
        flags.append("--keypoints points.json")
    if spec.image is not None:
        flags.append("--image picture.png")
    if spec.frames is not None:
        flags.append("--frames " + " ".join(f"{i}.png" for i in range(spec.frames.frames)))
        flags += ["--actions actions.npy"] if spec.frames.actions else []
    return " ".join(flags)


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """After the last step nothing is lost by stopping at once: SIGTERM, SIGINT and SIGUSR1 raise Stopped."""

    def stop(number_: int, frame: Any) -> None:
        name = signal.Signals(number_).name
        raise Stopped(f"{name} while scoring; training is done, its last checkpoint is written")

    previous = {}
    try:
        for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            previous[each] = signal.signal(each, stop)
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
