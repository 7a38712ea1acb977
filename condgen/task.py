"""What every task implements: a user's intent, the conditions that define it and what scores its output. Below the
class, what several tasks share: rows of a split, the evaluator of its captions, the watch on sensitivity.

The file `tasks/<name>.py` holds one subclass. A task never changes how a system is trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from condgen import rng
from condgen.data.base import DataSource, RowDataset, batched, collate
from condgen.data.cache import cache_folder
from condgen.engine.options import Hook
from condgen.errors import DataError
from condgen.metrics.evaluator import Evaluator, cached_evaluator
from condgen.metrics.score import Score
from condgen.metrics.sensitivity import condition_sensitivity, require_sensitive
from condgen.systems.base import System
from condgen.types import Batch, Condition, Sample

if TYPE_CHECKING:
    from condgen.build import Built
    from condgen.engine.log import Log
    from condgen.engine.run import RunFolder
    from condgen.engine.world import World

SENSITIVITY_ROWS = 16


class Task(ABC):
    """conditions  fields of `Condition` that define the task: its data must provide them
    trains      what its system has to be; a generator unless said otherwise

    Keyword-only constructor parameters of a subclass are options `eval.<name>`.
    """

    conditions: ClassVar[tuple[str, ...]] = ()
    trains: ClassVar[type] = System

    def hooks(self, built: Built, run: RunFolder, log: Log) -> Sequence[Hook]:
        """What is looked at during training: sample grids, sensitivity, validation scores."""
        return ()

    @abstractmethod
    def score(self, system: Any, built: Built, world: World, options: Any) -> list[Score]:
        """Scores of `system` on `built.test_data`, each with its floor and ceiling. Every rank calls it.

        `options` is the configuration's `eval` section.
        """


def splits(built: Built) -> list[tuple[str, RowDataset]]:
    """The held-out split that is scored, then the one that was trained on."""
    pairs = ((built.config.eval.split, built.test_data), ("train", built.train_data))
    return [(name, data) for name, data in dict(pairs).items() if isinstance(data, RowDataset)]


def evaluator_of(built: Built, device: torch.device) -> Evaluator:
    """The dual encoder for this data, trained on its training split unless the cache has it."""
    assert built.encoder is not None and isinstance(built.train_data, RowDataset)
    about = {"data": built.config.data_name, "split": "train", "text": built.encoder.fingerprint}
    folder = cache_folder() / "evaluators"
    return cached_evaluator(built.train_data, built.encoder, folder, about=about, device=device, say=print)


def judged(built: Built, world: World) -> dict[str, Any]:
    """Arguments of `quality_scores` that say how the configuration wants sets of pictures to be judged."""
    options, train = built.config.eval, built.train_data
    return {
        "name": options.extractor, "metrics": options.metrics, "force_fid": options.force_fid, "seed": options.seed,
        "train": train if isinstance(train, RowDataset) else None, "device": world.device, "world": world,
        "attribution": train.attribution,
    }  # fmt: skip


def sensitivity_hook(probe: Condition, every: int) -> Hook:
    """Logs how far the output moves with each field of `probe` (2 rows or more), and stops a run that ignores one."""

    def run(system: System, step: int) -> Mapping[str, float]:
        measured = condition_sensitivity(system, probe)
        require_sensitive(measured)
        return {f"sensitivity/{m.field}": m.swap for m in measured if m.swap is not None}

    return Hook("sensitivity", every, run)


def sensitivity_scores(system: System, condition: Condition, *, about: Mapping[str, str], seed: int) -> list[Score]:
    """Condition sensitivity on the first SENSITIVITY_ROWS rows, 2 or more."""
    probe = condition.index(slice(0, SENSITIVITY_ROWS))
    measured = condition_sensitivity(system, probe, seed=seed)
    return [score for one in measured for score in one.scores(seed=seed, rows=len(probe), about=dict(about))]


def rows_of(built: Built, data: DataSource, count: int, *, seed: int) -> tuple[Condition, Tensor, list[str]]:
    """Conditions, real pictures (n, C, H, W) in [-1, 1] and captions of `count` rows drawn by seed, as they are.
    No captions where the system gets no text.

    Rows that cannot be read are left out, and so are those without a caption where the system gets text. With fewer
    rows than asked for, rows are used again: another sample is drawn for the same caption. A stream gives its first
    `count` rows in the order of `seed`, as training would see them.
    """
    batch = batch_of(built, data, count, seed=seed)
    text = batch.condition.text
    captions = [] if text is None or text.strings is None else list(text.strings)
    return batch.condition, batch.target, captions


def batch_of(built: Built, data: DataSource, count: int, *, seed: int) -> Batch:
    """The rows of `rows_of` as a batch, with their truth."""
    if isinstance(data, RowDataset):
        loaded = collate(_drawn(built, data, count, seed), built.spec)
    else:
        loaded = batched(data, built.spec, batch_size=count, seed=seed)[0].batch
    return built.prepare(loaded).as_float()


def blocks_of(
    built: Built, data: RowDataset, count: int, *, seed: int, size: int, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """The first `count` rows that `batch_of` would draw, `size` at a time, read when they are asked for.

    Rows that cannot be read are left out, and none comes twice. Rank r of `world` gets blocks r, r + world, ...
    """
    rows = rng.permutation(len(data), seed, "scored rows").tolist()[:count]
    size = max(1, min(size, -(-len(rows) // world)))
    for block in range(rank, -(-len(rows) // size), world):
        good = list(_readable(built, data, rows[block * size : (block + 1) * size]))
        if good:
            yield built.prepare(collate(good, built.spec)).as_float()


def _readable(built: Built, data: RowDataset, rows: Iterable[int]) -> Iterator[Sample]:
    for row in rows:
        with suppress(DataError):  # check-data says which ones, and why
            sample = data.sample(row, None)
            if sample.caption or built.spec.text is None:
                yield sample


def _drawn(built: Built, data: RowDataset, count: int, seed: int) -> list[Sample]:
    rows = rng.permutation(len(data), seed, "scored rows").tolist()
    good = list(islice(_readable(built, data, rows), count))
    if not good:
        needed = "a picture" if built.spec.text is None else "a picture and a caption"
        raise DataError(f"none of {len(data)} rows has {needed}; run `condgen check-data`")
    return [good[i % len(good)] for i in range(count)]
