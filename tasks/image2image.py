"""A picture -> another picture of the same thing. Scored by L1, PSNR, SSIM, input recovery, KID and sensitivity, and
by label recovery where the source is a label map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from condgen.conditions.image import resize
from condgen.data.base import RowDataset
from condgen.data.cache import cache_folder
from condgen.engine.trainer import Hook
from condgen.errors import ConfigError
from condgen.inference.sample import sample_over, sample_rows
from condgen.metrics.label_recovery import cached_segmenter, find_labels, label_scores
from condgen.metrics.paired import paired_scores
from condgen.metrics.quality import quality_scores
from condgen.metrics.score import Score
from condgen.pixels import pixels_to_float
from condgen.show.drawing import draw_grid
from condgen.show.pictures import by_class
from condgen.systems.base import System
from condgen.task import (
    SENSITIVITY_ROWS,
    Task,
    judged,
    rows_of,
    sensitivity_hook,
    sensitivity_scores,
)
from condgen.types import Condition

if TYPE_CHECKING:
    from condgen.build import Built
    from condgen.engine.log import Log
    from condgen.engine.run import RunFolder
    from condgen.engine.world import World

COLUMNS = 3
KID_ROWS = 4  # with fewer held-out pairs there is no KID


class Image2Image(Task):
    """The sample grid shows source, real picture and samples; half its rows were trained on, half are held out.

    grid_rows   rows of the sample grid
    labels      label recovery, which trains a segmenter on the real pairs once: "auto" = where the source looks like
                a label map (few colours cover nearly all its flat areas; see metrics/label_recovery.py), "on", "off"
    """

    conditions: ClassVar[tuple[str, ...]] = ("image",)

    def __init__(self, *, grid_rows: int = 8, labels: bool | str = "auto") -> None:
        known = {True: "on", False: "off"}  # what yaml makes of on and off
        self.grid_rows, self.labels = grid_rows, known[labels] if isinstance(labels, bool) else labels
        if self.labels not in ("auto", "on", "off"):
            raise ConfigError(f"eval.labels={labels!r}: choose auto, on or off")

    def hooks(self, built: Built, run: RunFolder, log: Log) -> Sequence[Hook]:
        train_data, test_data = built.train_data, built.test_data
        if not isinstance(train_data, RowDataset) or not isinstance(test_data, RowDataset):
            return ()
        if len(test_data) < 2:
            raise ConfigError(
                f"{len(test_data)} held-out pairs are too few to score; give data.root a test or val folder of at "
                "least 2, or set eval.split=train where scores do not matter"
            )
        seen = max(1, min(self.grid_rows // 2, len(train_data)))
        held = max(1, min(self.grid_rows - seen, len(test_data)))
        seen_condition, seen_real, _ = rows_of(built, train_data, seen, seed=0)
        held_condition, held_real, _ = rows_of(built, test_data, held, seed=0)
        shown, real = Condition.cat([seen_condition, held_condition]), torch.cat([seen_real, held_real])
        probe, _, _ = rows_of(built, train_data, min(SENSITIVITY_ROWS, len(train_data)), seed=1)

        def draw(system: System, step: int) -> None:
            pixels = sample_rows(system, shown.repeat(COLUMNS), seed=0, ids=list(range(COLUMNS)) * len(shown))
            grid = draw_grid(
                pixels.view(len(shown), COLUMNS, *pixels.shape[1:]),
                shown,
                real=real,
                title=f"step {step}: {seen} sources of the training split, {held} held out",
                attribution=train_data.attribution,
            )
            log.media(step, "grid", grid)

        every = built.options.sample_every
        hooks = [Hook("grid", every, draw)]
        return [*hooks, sensitivity_hook(probe, every)] if len(probe) > 1 else hooks

    def score(self, system: System, built: Built, world: World, options: Any) -> list[Score]:
        """Held-out sources, each once, at most eval.num_samples of them."""
        data, train_data = built.test_data, built.train_data
        assert isinstance(data, RowDataset) and isinstance(train_data, RowDataset)
        count = max(2, min(options.num_samples, len(data)))
        condition, real, _ = rows_of(built, data, count, seed=options.seed)
        _, seen, _ = rows_of(
            built, train_data, max(KID_ROWS, min(options.num_samples, len(train_data))), seed=options.seed
        )
        fake = sample_over(
            world, system, condition, seed=options.seed, ids=list(range(count)), batch_size=options.batch_size
        )
        about = {"data": f"{built.config.data_name}#{data.fingerprint}", "split": built.config.eval.split}
        about |= system.sample_fields
        assert condition.image is not None
        drawn = condition.image.pixels
        if built.spec.image is not None and built.spec.image.classes:
            drawn = pixels_to_float(by_class(drawn, sure=True))  # colours have edges and brightness
        source = resize(drawn, (real.shape[-2], real.shape[-1]))
        scores = paired_scores(fake, real, source, seen, about=about, seed=options.seed)
        if count >= KID_ROWS:
            scores += quality_scores(fake, real, seen, about=about, **judged(built, world))
        labels = None if self.labels == "off" else find_labels(train_data, sure=self.labels == "on", seed=options.seed)
        if labels is not None:
            judge = cached_segmenter(
                train_data, labels, cache_folder() / "evaluators", about={"data": built.config.data_name},
                device=world.device, say=print,
            )  # fmt: skip
            scores += label_scores(judge, labels, fake, real, condition.image.pixels, about=about, seed=options.seed)
        scores += sensitivity_scores(system, condition, about=about, seed=options.seed)
        return scores
