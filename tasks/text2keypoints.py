"""A sentence and some of the points -> all the points, for layout2image. Scored by PCK of the hidden points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from condgen import rng
from condgen.data.base import RowDataset
from condgen.errors import ConfigError
from condgen.metrics.pose import REACH
from condgen.metrics.score import Score
from condgen.metrics.signature import signature
from condgen.rng import RowRandom
from condgen.systems.keypoint_gan import KeypointGan
from condgen.task import Task, rows_of
from condgen.types import Keypoints

if TYPE_CHECKING:
    from condgen.build import Built
    from condgen.engine.log import Log
    from condgen.engine.run import RunFolder
    from condgen.engine.trainer import Hook
    from condgen.engine.world import World


class Text2Keypoints(Task):
    """Each point of a row is hidden by a coin; floor: the hidden points of another row, ceiling: the real ones.

    hidden   probability that scoring hides a point, 1 = all of them
    """

    conditions: ClassVar[tuple[str, ...]] = ("text", "keypoints")
    trains: ClassVar[type] = KeypointGan

    def __init__(self, *, hidden: float = 0.5) -> None:
        if not 0 < hidden <= 1:
            raise ConfigError(f"eval.hidden={hidden} must lie in (0, 1]: with nothing hidden there is nothing to score")
        self.hidden = hidden

    def hooks(self, built: Built, run: RunFolder, log: Log) -> Sequence[Hook]:
        """The scores every train.sample_every steps."""
        from condgen.engine.trainer import Hook

        if not isinstance(built.test_data, RowDataset):
            return ()

        def validate(system: Any, step: int) -> dict[str, float]:
            return {score.name: score.value for score in self.completion(system, built, built.config.eval)}

        return [Hook("completion", built.options.sample_every, validate)]

    def score(self, system: Any, built: Built, world: World, options: Any) -> list[Score]:
        return self.completion(system, built, options)

    @torch.no_grad()
    def completion(self, system: KeypointGan, built: Built, options: Any) -> list[Score]:
        """pck of the hidden points on the scored split; [] where the coin hid no visible point."""
        data = built.test_data
        if not isinstance(data, RowDataset):
            raise ConfigError("completion reads rows by number, which a stream cannot give; choose a data set instead")
        condition, _, _ = rows_of(built, data, options.num_samples, seed=options.seed)
        real = condition.keypoints
        assert real is not None
        coin = torch.rand(real.visible.shape, generator=rng.generator(options.seed, "hidden points")) < self.hidden
        asked = Keypoints(torch.where(coin[..., None], torch.zeros(()), real.xy), real.visible & ~coin)
        device = next(system.parameters()).device
        was_training = system.training
        system.eval()
        random = RowRandom(options.seed, range(len(condition)), device)
        # threshold 0: every point is placed, since the score asks where and not whether
        drawn = system.complete(replace(condition, keypoints=asked).to(device), random=random, threshold=0.0)
        system.train(was_training)
        hidden = real.visible & coin
        if not hidden.any():
            return []
        other = real.index(condition.mismatch(rng.generator(options.seed, "another row")))
        hits = near(drawn.xy.cpu(), real.xy)[hidden]
        about = {"data": f"{built.config.data_name}#{data.fingerprint}", "split": built.config.eval.split}
        return [
            Score(
                name=f"pck@{REACH}/hidden",
                value=float(hits.mean()),
                floor=float(near(other.xy, real.xy)[hidden].mean()),
                ceiling=1.0,
                error=float(hits.std(correction=0)) / len(hits) ** 0.5,
                signature=signature(
                    f"pck@{REACH}/hidden", n=len(condition), hidden=self.hidden, **about, seed=options.seed
                ),
            )
        ]


def near(a: Tensor, b: Tensor) -> Tensor:
    """float (B, K): 1 where two points (B, K, 2) are within REACH of the picture's side."""
    return ((a - b).norm(dim=-1) <= REACH).float()
