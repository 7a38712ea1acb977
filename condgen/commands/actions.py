"""`condgen actions RUN data=clips data.root=DIR`: what a run's discriminator is worth for action recognition."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from condgen.commands import arguments
from condgen.errors import ConfigError

EPILOG = """\
examples:
  condgen actions runs/NAME                                     the labels of the run's own data
  condgen actions runs/NAME data=clips data.root=actions        class folders of clips
  condgen actions runs/NAME --steps 1000 --share 0.125          an eighth of the labels

The discriminator's last layer becomes a layer of K classes and everything is fine-tuned on the labels; the same network
from random weights gets the same budget. Prints both accuracies on held-out clips and chance, and writes them to
RUN/eval/actions-*.json. Size and length of the clips are those of the run.
"""


def main(words: Sequence[str]) -> int:
    parser = arguments.parser("actions", "Fine-tunes a run's discriminator for action recognition.", EPILOG)
    parser.add_argument("run", help="the folder of a training run with checkpoints")
    parser.add_argument("words", nargs="*", default=[], metavar="key=value", help="data= and data.* of labelled clips")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--share", type=float, default=1.0, help="of the labelled clips (1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    given = parser.parse_intermixed_args(words)
    if given.steps < 1 or given.batch_size < 1 or not 0 < given.share <= 1 or not given.lr > 0:
        raise ConfigError("--steps and --batch-size are at least 1, --share lies in (0, 1], --lr is above 0")
    return run(given)


def run(given: Any) -> int:
    from condgen.commands.finish import averaged, score_table
    from condgen.engine.checkpoint import CheckpointStore
    from condgen.engine.disk import replace_file, to_json
    from condgen.metrics.actions import ActionOptions, action_scores
    from condgen.pipeline import choose_device

    folder, device = Path(given.run), choose_device(given.device)
    config, trained, fresh, train, test = prepared(folder, given.words)
    checkpoint = CheckpointStore(folder / "checkpoints").latest()
    if checkpoint is None:
        raise ConfigError(f"{folder} has no checkpoint; the discriminator is not in an export")
    trained.load_state_dict({**trained.state_dict(), **averaged(checkpoint)})
    scores = action_scores(
        trained.to(device), fresh.to(device), train, test, say=print,
        about={"data": f"{config.data_name}#{test.fingerprint}", "split": config.eval.split},
        options=ActionOptions(
            steps=given.steps, batch_size=given.batch_size, lr=given.lr, share=given.share, seed=given.seed
        ),
    )  # fmt: skip
    print(score_table(scores))
    file = folder / "eval" / f"actions-step-{checkpoint.step:08d}-seed-{given.seed}.json"
    file.parent.mkdir(exist_ok=True)
    replace_file(file, to_json({"step": checkpoint.step, "scores": [one.to_dict() for one in scores]}, indent=1))
    print(file)
    return 0


def prepared(folder: Path, words: Sequence[str]) -> tuple[Any, Any, Any, Any, Any]:
    """(configuration, the run's system, the same untrained, labelled training and test clips)."""
    from condgen import registry, rng
    from condgen.build import build
    from condgen.data.base import RowDataset

    built = build(arguments.load_run(folder))  # the run as it was trained: its sizes and its condition
    other = arguments.load_run(folder, words)
    made: list[RowDataset] = []
    for split in ("train", other.eval.split):
        data = registry.load("data", other.data_name, RowDataset)(split=split, **other.data)
        if data.target != built.target:
            raise ConfigError(
                f"the clips are {data.target.shape} (T, C, H, W) and the run was trained with {built.target.shape}; "
                "set data.size and data.frames"
            )
        made.append(data)
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.derive("actions", "fresh weights"))
        fresh = type(built.system)(condition=built.spec, target=built.target, **built.config.system)
    return other, built.system, fresh, made[0], made[1]
