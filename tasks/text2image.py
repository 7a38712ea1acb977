"""A sentence -> a picture. Scored by text R-precision, condition sensitivity, KID and FID."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from condgen.data.base import RowDataset
from condgen.engine.trainer import Hook
from condgen.errors import ConfigError
from condgen.inference.sample import sample_over, sample_rows
from condgen.metrics.quality import quality_scores
from condgen.metrics.retrieval import retrieval_scores
from condgen.metrics.score import Score
from condgen.show.drawing import draw_grid
from condgen.systems.base import System
from condgen.task import (
    SENSITIVITY_ROWS,
    Task,
    evaluator_of,
    judged,
    rows_of,
    sensitivity_hook,
    sensitivity_scores,
    splits,
)
from condgen.types import Condition

if TYPE_CHECKING:
    from condgen.build import Built
    from condgen.engine.log import Log
    from condgen.engine.run import RunFolder
    from condgen.engine.world import World

COLUMNS = 4


class Text2Image(Task):
    """The sample grid has half its rows from captions that were trained on and half from held-out ones.

    grid_rows        rows of the sample grid
    validate_every   steps between scores of rprec@10 on the scored split while training, 0 = never; for train.best
    """

    conditions: ClassVar[tuple[str, ...]] = ("text",)

    def __init__(self, *, grid_rows: int = 8, validate_every: int = 0) -> None:
        self.grid_rows, self.validate_every = grid_rows, validate_every

    def hooks(self, built: Built, run: RunFolder, log: Log) -> Sequence[Hook]:
        train_data, test_data = built.train_data, built.test_data
        streamed = not (isinstance(train_data, RowDataset) and isinstance(test_data, RowDataset))
        if built.spec.text is not None and not built.spec.text.pooled:
            raise ConfigError(
                f"text.encoder={built.config.text.encoder} gives only tokens, and the scores need one vector "
                "per sentence; choose minilm, or char_cnn_rnn:<run of task=text_embedding>"
            )
        every = built.options.sample_every
        seen = self.grid_rows if streamed else max(1, min(self.grid_rows // 2, len(train_data)))
        held = 0 if streamed else max(1, min(self.grid_rows - seen, len(test_data)))
        parts = [rows_of(built, data, rows, seed=0) for data, rows in ((train_data, seen), (test_data, held)) if rows]
        shown = Condition.cat([condition for condition, _, _ in parts])
        real = torch.cat([pixels for _, pixels, _ in parts])
        probe, _, _ = rows_of(
            built, train_data, SENSITIVITY_ROWS if streamed else min(SENSITIVITY_ROWS, len(train_data)), seed=1
        )

        def draw(system: System, step: int) -> None:
            ids = list(range(COLUMNS)) * len(shown)
            pixels = sample_rows(system, shown.repeat(COLUMNS), seed=0, ids=ids)
            grid = draw_grid(
                pixels.view(len(shown), COLUMNS, *pixels.shape[1:]),
                shown,
                real=real,
                title=f"step {step}: {seen} captions of the training split, {held} held out",
                attribution=train_data.attribution,
            )
            log.media(step, "grid", grid)

        hooks = [Hook("grid", every, draw), sensitivity_hook(probe, every)]
        if self.validate_every and isinstance(test_data, RowDataset):
            hooks.append(self.validation(built, test_data))
        return hooks

    def validation(self, built: Built, data: RowDataset) -> Hook:
        """rprec@10 during training. Choose with eval.split=val, so that the test split stays unseen."""
        options, judge = built.config.eval, None
        condition, real, captions = rows_of(built, data, options.num_samples, seed=options.seed)

        def run(system: System, step: int) -> Mapping[str, float]:
            nonlocal judge
            judge = judge or evaluator_of(built, next(system.parameters()).device)
            ids = list(range(len(condition)))
            fake = sample_rows(system, condition, seed=options.seed, ids=ids, batch_size=options.batch_size)
            text = condition.text
            assert text is not None and text.pooled is not None
            found = retrieval_scores(judge, fake, real, captions, text.pooled, about={}, candidates=(10,))
            return {one.name: one.value for one in found}

        return Hook("validation", self.validate_every, run)

    def score(self, system: System, built: Built, world: World, options: Any) -> list[Score]:
        """On held-out captions rprec@10 and @100, KID, FID and sensitivity; then rprec on captions that were seen."""
        if world.is_main:
            evaluator_of(built, world.device)  # trains it; the others then read it from the cache
        world.barrier()
        judge = evaluator_of(built, world.device)
        asked = {split: rows_of(built, data, options.num_samples, seed=options.seed) for split, data in splits(built)}
        scores: list[Score] = []
        for split, data in splits(built):
            condition, real, captions = asked[split]
            ids = list(range(len(condition)))
            fake = sample_over(world, system, condition, seed=options.seed, ids=ids, batch_size=options.batch_size)
            about = {"data": f"{built.config.data_name}#{data.fingerprint}", "split": split}
            about |= system.sample_fields
            text = condition.text
            assert text is not None and text.pooled is not None
            found = retrieval_scores(
                judge, fake, real, captions, text.pooled, seed=options.seed,
                about={**about, "text": built.config.text.encoder},
            )  # fmt: skip
            if not found and world.is_main:
                print(f"no R-precision on {split}: it needs 10 different captions, and there are {len(set(captions))}")
            if split == "train":
                scores += [replace(one, name=f"{one.name}/seen") for one in found]
                continue
            scores += found
            scores += quality_scores(
                fake, real, asked["train"][1], about=about, evaluator=judge, **judged(built, world)
            )
            scores += sensitivity_scores(system, condition, about=about, seed=options.seed)
        return scores
