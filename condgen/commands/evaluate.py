"""`condgen evaluate RUN`: the task's scores of a trained run; `--ladder FILE`: of every row of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from condgen.commands import arguments, finish
from condgen.commands.train import agreed, main_first
from condgen.config import Config
from condgen.errors import ConfigError

if TYPE_CHECKING:
    from condgen.engine.checkpoint import CheckpointStore

EPILOG = """\
examples:
  condgen evaluate runs/NAME
  condgen evaluate runs/NAME eval.num_samples=1000 eval.seed=1
  condgen evaluate runs/NAME eval.metrics=[all] eval.extractor=own
  condgen evaluate runs/NAME data.root=/elsewhere     the data have moved
  condgen evaluate --ladder configs/ladder/NAME.yaml  train what is not trained, score every row, write the table
  condgen evaluate --ladder NAME --dry-run            say what that would do
"""
ALLOWED = ("eval.", "data.", "text.cache", "train.device", "train.precision")


def main(words: Sequence[str]) -> int:
    parser = arguments.parser("evaluate", "Score a trained run; values are written to RUN/eval.", EPILOG)
    parser.add_argument("run", nargs="?", help="a run folder, such as runs/NAME")
    parser.add_argument("words", nargs="*", default=[], metavar="key=value", help="eval.* and data.* options")
    parser.add_argument("--step", type=int, help="score this checkpoint instead of the newest")
    parser.add_argument("--best", action="store_true", help="score the checkpoint that train.best has kept")
    parser.add_argument("--ladder", metavar="FILE", help="a comparison: configs/ladder/NAME.yaml, or NAME")
    parser.add_argument("--folder", help="of a ladder: where its runs and its table are (runs/ladder-NAME)")
    parser.add_argument("--dry-run", action="store_true", help="of a ladder: say what is left to do")
    given = parser.parse_intermixed_args(words)
    if given.ladder is not None:
        from condgen.commands import ladder

        if given.step is not None or given.best:
            raise ConfigError("--step and --best are for one run; a ladder scores the last step of each")
        return ladder.main(given, [*([given.run] if given.run else []), *given.words])
    if given.run is None:
        raise ConfigError("evaluate needs a run folder, such as runs/NAME, or --ladder FILE")
    if given.folder is not None or given.dry_run:
        raise ConfigError("--folder and --dry-run belong to --ladder")
    for word in given.words:
        if not word.startswith(ALLOWED):
            raise ConfigError(f"{word!r} would change what was trained; evaluate takes {' '.join(ALLOWED)}")
    return score_run(arguments.load_run(given.run, given.words), Path(given.run), step=given.step, best=given.best)


def score_run(config: Config, folder: Path, *, step: int | None = None, best: bool = False) -> int:
    """Scores a checkpoint of the run in `folder` (the newest, `step`, or the best), prints and keeps the scores."""
    from condgen.build import build
    from condgen.engine.checkpoint import CheckpointStore
    from condgen.engine.report import write_report
    from condgen.engine.run import RunFolder
    from condgen.engine.world import World
    from condgen.inference.export import check_fits

    world = World.start(device=config.launch.device, precision=config.launch.precision, seed=config.train.seed)
    try:
        run = RunFolder.open(folder)
        store = CheckpointStore(run.checkpoints, keep=config.launch.keep)
        built = main_first(world, lambda: build(config))
        if not built.can_score:
            raise ConfigError(
                f"{config.data_name} is a stream, and scores read rows by number: runs on streams are not scored"
            )
        main_first(world, built.fill_captions)
        newest = agreed(world, lambda: chosen_step(store, step, best))
        weights = finish.averaged(store.load(newest))
        check_fits(built.system.state_dict(), weights, f"{run.path}, step {newest}")
        built.system.load_state_dict(weights)
        scores = finish.score(built, world, run, newest)
        if world.is_main:
            write_report(run)
            print(f"{run.path}, step {newest}\n\n{finish.score_table(scores)}")
            for one in scores:
                print(f"{one.name}: {one.signature}")
    finally:
        world.close()
    return 0


def chosen_step(store: CheckpointStore, step: int | None, best: bool) -> int:
    """`step`, the best step, or the newest valid one. Raises ConfigError where there is none."""
    if step is not None:
        return step
    if best:
        held = store.best()
        if held is None:
            raise ConfigError(f"{store.folder} has no best checkpoint; training needs train.best=METRIC for that")
        return int(held["step"])
    newest = store.latest()
    if newest is None:
        raise ConfigError(f"{store.folder} has no checkpoint yet; train first")
    return newest.step
