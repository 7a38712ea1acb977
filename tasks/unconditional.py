"""Pictures like those of a data set, without a condition or with one. Scored by bits per dimension, FID, KID,
Inception score, precision and recall, density and coverage, and whether training pictures come back.

The task file leaves every condition field out, whatever the data set; `data.ignore=[text,boxes]` keeps the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import torch

from condgen.data.base import RowDataset
from condgen.engine.trainer import Hook
from condgen.errors import ConfigError
from condgen.inference.sample import sample_over, sample_rows, sampling
from condgen.metrics.likelihood import binarised, bits_per_dim, has_bits
from condgen.metrics.quality import quality_scores
from condgen.metrics.score import Score
from condgen.options import Range
from condgen.show.drawing import draw_grid
from condgen.systems.base import HasLatent, HasLikelihood, System
from condgen.task import (
    SENSITIVITY_ROWS,
    Task,
    judged,
    rows_of,
    sensitivity_hook,
    sensitivity_scores,
)

if TYPE_CHECKING:
    from condgen.build import Built
    from condgen.engine.log import Log
    from condgen.engine.run import RunFolder
    from condgen.engine.world import World


class Unconditional(Task):
    """The sample grid has a real picture at the start of each row.

    grid_rows, grid_columns   of the sample grid
    importance                K draws a picture of the bound on the likelihood (`condgen.metrics.likelihood`)
    watched                   held-out pictures whose bits are logged during training, with K = 1; 0 = none
    train_rows                training pictures among which memorisation looks for copies; at least eval.num_samples
    """

    def __init__(
        self,
        *,
        grid_rows: Annotated[int, Range(1)] = 8,
        grid_columns: Annotated[int, Range(1)] = 8,
        importance: Annotated[int, Range(1)] = 1,
        watched: Annotated[int, Range(0)] = 64,
        train_rows: Annotated[int, Range(2)] = 2000,
    ) -> None:
        self.grid_rows, self.grid_columns, self.importance, self.watched = grid_rows, grid_columns, importance, watched
        self.train_rows = train_rows

    def hooks(self, built: Built, run: RunFolder, log: Log) -> Sequence[Hook]:
        """grid; reconstructions where the system encodes; bits where it has a likelihood; sensitivity to conditions."""
        data, every, rows = built.train_data, built.options.sample_every, self.grid_rows
        condition, real, _ = rows_of(built, data, rows, seed=0)
        columns, conditional = self.grid_columns, len(condition) > 0
        names = data.provides.label.names if data.provides.label is not None else ()

        def draw(system: System, step: int) -> None:
            ids = list(range(columns)) * rows if conditional else list(range(columns * rows))
            pixels = sample_rows(system, condition.repeat(columns) if conditional else condition, seed=0, ids=ids)
            grid = draw_grid(
                pixels.unflatten(0, (rows, columns)), condition if conditional else None, real=real,
                label_names=names, title=f"step {step}", attribution=data.attribution,
            )  # fmt: skip
            log.media(step, "grid", grid)

        hooks = [Hook("grid", every, draw)]
        system, held_out = built.system, built.test_data if built.can_score else data
        asked, pictures, _ = rows_of(built, held_out, max(self.watched, rows), seed=1)
        if isinstance(system, HasLatent):

            def reconstruct(system: System, step: int) -> None:
                assert isinstance(system, HasLatent)
                some = asked.index(slice(0, rows)) if len(asked) else asked
                with sampling(system) as device:
                    seen, given = pictures[:rows].to(device), some.to(device)
                    again = system.decode(system.encode(seen, given), given).float().cpu()
                title = f"step {step}: held-out pictures and their reconstructions"
                names = ["real", "again"]
                pairs = torch.stack([pictures[:rows], again.clamp(-1, 1)], dim=1)
                log.media(
                    step, "reconstructions",
                    draw_grid(pairs, title=title, column_names=names, attribution=data.attribution),
                )  # fmt: skip

            hooks.append(Hook("reconstructions", every, reconstruct))
        if has_bits(system) and self.watched:

            def bits(system: System, step: int) -> dict[str, float]:
                assert isinstance(system, HasLikelihood)
                score = bits_per_dim(system, pictures, asked, binarise=binarised(system))
                return {"bits_per_dim": score.value}

            hooks.append(Hook("bits", every, bits))
        probe = rows_of(built, data, SENSITIVITY_ROWS, seed=1)[0]
        return [*hooks, sensitivity_hook(probe, every)] if len(probe) > 1 else hooks

    def score(self, system: System, built: Built, world: World, options: Any) -> list[Score]:
        """Bits per dimension, what `eval.metrics` names of the samples as a set, and sensitivity to each condition."""
        data, train = built.test_data, built.train_data
        if not isinstance(data, RowDataset) or not isinstance(train, RowDataset):
            raise ConfigError(f"{built.config.data_name} is a stream; scores read rows by number. Use another data set")
        condition, real, _ = rows_of(built, data, options.num_samples, seed=options.seed)
        looked_through = max(options.num_samples, self.train_rows) if copies_wanted(options) else options.num_samples
        _, pool, _ = rows_of(built, train, looked_through, seed=options.seed)
        ids = list(range(options.num_samples))
        fake = sample_over(world, system, condition, seed=options.seed, ids=ids, batch_size=options.batch_size)
        real, pool = real[: len(data)], pool[: len(train)]  # conditions may be used again; pictures are compared
        other = pool[: options.num_samples]
        about = {"data": f"{built.config.data_name}#{data.fingerprint}", "split": built.config.eval.split}
        scores: list[Score] = []
        if has_bits(system):
            assert isinstance(system, HasLikelihood)
            asked = condition.index(slice(0, len(real))) if len(condition) else condition
            scores += [
                bits_per_dim(
                    system, real, asked, seed=options.seed, batch_size=options.batch_size, importance=self.importance,
                    binarise=binarised(system), reference=other, about=about, world=world,
                )
            ]  # fmt: skip
        about |= system.sample_fields  # bits do not depend on them
        scores += quality_scores(fake, real, other, about=about, train_pictures=pool, **judged(built, world))
        if len(condition) > 1:
            scores += sensitivity_scores(system, condition, about=about, seed=options.seed)
        return scores


def copies_wanted(options: Any) -> bool:
    """Whether samples are looked up among training pictures."""
    return bool({"memorisation", "all"} & set(options.metrics))
