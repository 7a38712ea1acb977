"""The completion task end to end, and what its score says of a perfect and of a blind system."""

import pytest
import torch

from condgen import build, config
from condgen.errors import ConfigError
from condgen.types import Keypoints

WORDS = [
    "task=text2keypoints", "system.preset=tiny", "data.size=16", "text.encoder=hash_bow", "text.cache=memory",
    "data.groups=[food-drink]", "eval.num_samples=40",
]  # fmt: skip


class Known(torch.nn.Module):
    """Returns the points that it is told, whatever is asked; it sees which were hidden."""

    def __init__(self, points):
        super().__init__()
        self.points, self.one = points, torch.nn.Parameter(torch.zeros(1))

    def complete(self, condition, *, random, threshold):
        assert (~condition.keypoints.visible).any() and condition.keypoints.visible.any()
        return Keypoints(self.points(condition), torch.ones_like(condition.keypoints.visible))


def test_hidden_points_are_scored_between_strangers_and_the_truth():
    pytest.importorskip("resvg_py")
    built = build.build(config.load(WORDS))
    (score,) = built.task.completion(built.system, built, built.config.eval)
    assert 0 <= score.floor < score.ceiling == 1 and 0 <= score.value < 0.6
    (hook,) = built.task.hooks(built, None, None)
    assert hook.run(built.system, 1) == {score.name: score.value}
    blind = Known(lambda condition: torch.full_like(condition.keypoints.xy, 9.0))
    assert built.task.completion(blind, built, built.config.eval)[0].value == 0


def test_nothing_hidden_is_refused():
    with pytest.raises(ConfigError, match="nothing to score"):
        build.build(config.load([*WORDS, "eval.hidden=0"]))
