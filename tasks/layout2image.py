"""A sentence and a place -> a picture. Scored by box IoU or PCK and OKS of what was drawn, whether it moves with its
place, R-precision, KID, sensitivity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from condgen.data.base import RowDataset
from condgen.data.cache import cache_folder
from condgen.engine.trainer import Hook
from condgen.errors import ConfigError
from condgen.inference.sample import sample_over, sample_rows
from condgen.metrics.layout import inside_score, layout_scores, moves, moves_score, plain
from condgen.metrics.pose import Finder, cached_finder
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
from condgen.types import Boxes, Condition

if TYPE_CHECKING:
    from condgen.build import Built
    from condgen.engine.log import Log
    from condgen.engine.run import RunFolder
    from condgen.engine.world import World

COLUMNS = 4
STRIP_ROWS = 4
STRIP = ((0.0, 0.0), (0.25, 0.25), (0.5, 0.5), (0.0, 0.5), (0.5, 0.0))  # corners of boxes of half a side
HALF = 0.5


class Layout2Image(Task):
    """Half of the sample grid's rows were trained on, half are held out; boxes and points are drawn over the samples.
    For boxes there is also a strip: one noise, one sentence, the box in five places.

    grid_rows   rows of the sample grid
    finder      who says where a thing is: "foreground" (plain backgrounds), "trained" (a network trained on the real
                training rows and kept in the cache), "auto": the foreground where it finds real things
    """

    conditions: ClassVar[tuple[str, ...]] = ("text",)

    def __init__(self, *, grid_rows: int = 8, finder: Literal["auto", "foreground", "trained"] = "auto") -> None:
        self.grid_rows, self.finder = grid_rows, finder

    def hooks(self, built: Built, run: RunFolder, log: Log) -> Sequence[Hook]:
        train_data, test_data = built.train_data, built.test_data
        check_place(built)
        if not isinstance(train_data, RowDataset) or not isinstance(test_data, RowDataset):
            return ()
        seen = max(1, min(self.grid_rows // 2, len(train_data)))
        held = max(1, min(self.grid_rows - seen, len(test_data)))
        parts = [rows_of(built, data, count, seed=0) for data, count in ((train_data, seen), (test_data, held))]
        shown, real = Condition.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        probe, _, _ = rows_of(built, train_data, min(SENSITIVITY_ROWS, len(train_data)), seed=1)

        def draw(system: System, step: int) -> None:
            pixels = sample_rows(system, shown.repeat(COLUMNS), seed=0, ids=list(range(COLUMNS)) * len(shown))
            grid = draw_grid(
                pixels.view(len(shown), COLUMNS, *pixels.shape[1:]),
                shown,
                real=real,
                title=f"step {step}: {seen} rows of the training split, {held} held out",
                attribution=train_data.attribution,
                overlay=True,
            )
            log.media(step, "grid", grid)

        def strip(system: System, step: int) -> None:
            rows = shown.index(slice(0, STRIP_ROWS))
            moved = places(rows)
            ids = [row for row in range(len(rows)) for _ in STRIP]
            pixels = sample_rows(system, moved, seed=0, ids=ids)
            picture = draw_grid(
                pixels.view(len(rows), len(STRIP), *pixels.shape[1:]),
                replace(rows, boxes=None, present={n: t for n, t in rows.present.items() if n != "boxes"}),
                title=f"step {step}: the same noise, the box in {len(STRIP)} places",
                column_names=[f"box at {x:g}, {y:g}" for x, y in STRIP],
                attribution=train_data.attribution,
            )
            log.media(step, "moved", picture)

        every = built.options.sample_every
        hooks = [Hook("grid", every, draw), sensitivity_hook(probe, every)]
        return [*hooks, Hook("moved", every, strip)] if built.spec.boxes is not None else hooks

    def score(self, system: System, built: Built, world: World, options: Any) -> list[Score]:
        """On held-out rows box_iou or pck and oks, inside, moves, rprec, KID and sensitivity; on seen rows the same
        without KID and sensitivity."""
        check_place(built)
        asked = {split: rows_of(built, data, options.num_samples, seed=options.seed) for split, data in splits(built)}
        names = built.spec.keypoints.names if built.spec.keypoints is not None else ()
        by_foreground = self._by_foreground(asked["train"], names)
        if world.is_main:  # trains them; the others then read them from the cache
            evaluator_of(built, world.device)
            finders_of(built, world.device, by_foreground)
        world.barrier()
        judge, finders = evaluator_of(built, world.device), finders_of(built, world.device, by_foreground)
        scores: list[Score] = []
        for split, data in splits(built):
            condition, real, captions = asked[split]
            ids = list(range(len(condition)))
            fake = sample_over(world, system, condition, seed=options.seed, ids=ids, batch_size=options.batch_size)
            about = {"data": f"{built.config.data_name}#{data.fingerprint}", "split": split}
            about |= system.sample_fields
            text = condition.text
            assert text is not None and text.pooled is not None
            found = layout_scores(fake, real, condition, names=names, finders=finders, about=about, seed=options.seed)
            if condition.boxes is not None and by_foreground:
                found += inside_score(fake, real, condition.boxes, about=about, seed=options.seed)
            move = moves(condition)
            if len(move.rows):
                after = sample_over(
                    world, system, move.condition, seed=options.seed, ids=move.rows.tolist(),
                    batch_size=options.batch_size,
                )  # fmt: skip
                found += moves_score(fake[move.rows], after, move, about=about, seed=options.seed)
            found += retrieval_scores(
                judge, fake, real, captions, text.pooled, seed=options.seed,
                about={**about, "text": built.config.text.encoder},
            )  # fmt: skip
            if split == "train":
                scores += [replace(one, name=f"{one.name}/seen") for one in found]
                continue
            scores += found
            scores += quality_scores(
                fake, real, asked["train"][1], about=about, evaluator=judge, **judged(built, world)
            )
            scores += sensitivity_scores(system, condition, about=about, seed=options.seed)
        return scores

    def _by_foreground(self, seen: tuple[Condition, Tensor, list[str]], names: Sequence[str]) -> bool:
        return self.finder == "foreground" or (self.finder == "auto" and plain(seen[1], seen[0], names))


def finders_of(built: Built, device: torch.device, by_foreground: bool) -> dict[str, Finder]:
    """Networks that find the boxes or the points of this data, trained on its training split unless cached."""
    places = [] if by_foreground else [name for name in ("boxes", "keypoints") if name in built.spec.given]
    assert isinstance(built.train_data, RowDataset)
    return {
        name: cached_finder(
            built.train_data, cache_folder() / "evaluators", boxes=name == "boxes", device=device, say=print,
            about={"data": built.config.data_name, "split": "train"},
        )
        for name in places
    }  # fmt: skip


def check_place(built: Built) -> None:
    """Raises ConfigError where nothing says where to draw."""
    if built.spec.boxes is None and built.spec.keypoints is None:
        raise ConfigError(
            "the task layout2image needs boxes or keypoints; the system gets "
            f"{', '.join(built.spec.given) or 'no condition'}. Take one of them off data.ignore"
        )


def places(condition: Condition) -> Condition:
    """Each row len(STRIP) times, its first box put in each place of the strip and its others taken away."""
    rows = condition.repeat(len(STRIP))
    boxes = rows.boxes
    assert boxes is not None
    corners = torch.tensor(STRIP).repeat(len(condition), 1)
    xyxy, valid = torch.zeros_like(boxes.xyxy), torch.zeros_like(boxes.valid)
    xyxy[:, 0], valid[:, 0] = torch.cat([corners, corners + HALF], dim=1).to(xyxy), True
    present = {**rows.present, "boxes": torch.ones_like(valid[:, 0])}
    return replace(rows, boxes=Boxes(xyxy, valid, boxes.label), present=present)
