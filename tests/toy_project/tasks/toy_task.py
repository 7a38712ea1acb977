"""A toy task: a colour's number -> a picture of that colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from condgen.metrics.score import Score
from condgen.task import Task


class ToyTask(Task):
    conditions = ("label",)

    def __init__(self, *, strictness: float = 1.0) -> None:
        self.strictness = strictness

    def score(self, system: Any, built: Any, world: Any, options: Any) -> list[Score]:
        rows = [built.test_data.sample(i, None) for i in range(len(built.test_data))]
        return [
            Score(
                name="rows", value=float(len(rows)), floor=0.0, ceiling=None, error=None,
                signature=f"rows|n={options.num_samples}", higher_is_better=True,
            )
        ]  # fmt: skip

    def hooks(self, built: Any, run: Any, log: Any) -> Sequence[Any]:
        return []
