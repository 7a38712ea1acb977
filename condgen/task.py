"""What every task implements: a user's intent, the conditions that define it and what scores its output.

The file `tasks/<name>.py` holds one subclass. A task never changes how a system is trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from condgen.metrics.score import Score
from condgen.systems.base import System

if TYPE_CHECKING:
    from condgen.build import Built
    from condgen.engine.log import Log
    from condgen.engine.run import RunFolder
    from condgen.engine.trainer import Hook
    from condgen.engine.world import World


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
