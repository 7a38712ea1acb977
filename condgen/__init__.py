"""condgen: conditional image and video synthesis under one typed condition interface.

    pipe = condgen.load("runs/NAME")
    pipe(text="a red fox", seed=0).images[0].save("fox.png")

Names are imported when first used, so `import condgen` is quick and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from condgen.errors import CondgenError, ConfigError, DataError
    from condgen.inference.hub import push_to_hub
    from condgen.pipeline import Pipeline, Samples, load
    from condgen.systems.base import Phase, System
    from condgen.types import Batch, Condition, ConditionSpec, Sample, TargetSpec

__version__ = "0.1.0"

__all__ = [
    "Batch", "CondgenError", "Condition", "ConditionSpec", "ConfigError", "DataError", "Phase", "Pipeline", "Sample",
    "Samples", "System", "TargetSpec", "__version__", "load", "push_to_hub",
]  # fmt: skip

_HOMES = {
    "load": "condgen.pipeline", "Pipeline": "condgen.pipeline", "Samples": "condgen.pipeline",
    "push_to_hub": "condgen.inference.hub",
    "System": "condgen.systems.base", "Phase": "condgen.systems.base",
    "Batch": "condgen.types", "Condition": "condgen.types", "ConditionSpec": "condgen.types",
    "Sample": "condgen.types", "TargetSpec": "condgen.types",
    "CondgenError": "condgen.errors", "ConfigError": "condgen.errors", "DataError": "condgen.errors",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'condgen' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
