"""The sections of a configuration that are the same for every system, as plain dataclasses, and `Range`.

`train.*` and `optim.*` are defined by the engine (`TrainOptions`, `OptimOptions`); `system.*`, the rest of `data.*`
and what a task adds to `eval.*` are the keyword-only constructor parameters of the class that was chosen.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from condgen.errors import ConfigError

TIMEOUT_SECONDS = 600  # torch waits 30 minutes for a process and for ever for a loader


def timeout_seconds() -> float:
    """How long to wait for another process or for a loader's batch: CONDGEN_TIMEOUT_SECONDS, or 600.

    Raises ConfigError for a value that is not a number above 0.
    """
    given = os.environ.get("CONDGEN_TIMEOUT_SECONDS", str(TIMEOUT_SECONDS))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"CONDGEN_TIMEOUT_SECONDS={given!r}; give a number of seconds above 0, such as 600")
    return seconds


@dataclass(frozen=True)
class Range:
    """Bounds of a number, both included, for constructor annotations: `rate: Annotated[float, Range(0, 1)] = 0.5`."""

    low: float | None = None
    high: float | None = None

    def __contains__(self, value: float) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        if self.high is None:
            return f"at least {self.low:g}"
        return f"at most {self.high:g}" if self.low is None else f"from {self.low:g} to {self.high:g}"


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """`text.*`: how sentences become embeddings.

    encoder   "minilm", "char", "hash_bow", "char_cnn_rnn:<run folder>", or a model folder or hub id
    tokens    also give one embedding per token
    length    most tokens kept; 0 = what the encoder prefers
    cache     folder for finished embeddings; null = the user's cache folder, "memory" = nowhere
    """

    encoder: str = "minilm"
    tokens: bool = False
    length: Annotated[int, Range(0)] = 0
    cache: str | None = None


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """The part of `train.*` that says where and how a run goes, not what it computes.

    precision   "auto" is bf16 where the hardware has it, else fp32
    resume      null, "latest", a step, or the path of a run folder or of one of its checkpoints
    trackers    such as [tensorboard]; nothing is sent anywhere by default
    keep        checkpoints kept, the newest first; keep_every also keeps each multiple of that many steps
    """

    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    resume: int | str | None = None
    trackers: tuple[str, ...] = ()
    keep: Annotated[int, Range(2)] = 2
    keep_every: Annotated[int, Range(1)] | None = None


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """`eval.*`: how a trained system is scored.

    extractor    the feature network: a name, "inception:<file>" or "torchscript:<file>"; "auto" = what is installed
    num_samples  rows that are generated; split and seed choose them
    metrics      which scores of whole sets of pictures: see docs/metrics.md; [all] = every one
    force_fid    FID of fewer than 2,048 pictures too; its signature then says so
    """

    extractor: str = "auto"
    num_samples: Annotated[int, Range(2)] = 256
    batch_size: Annotated[int, Range(1)] = 16
    split: Literal["test", "val", "train"] = "test"
    seed: Annotated[int, Range(0)] = 0
    metrics: tuple[Literal["kid", "fid", "is", "prdc", "memorisation", "ms_ssim", "parzen", "all"], ...] = (
        "kid",
        "fid",
    )
    force_fid: bool = False


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """`run.*`: where the run folder is made. name null = task-system-data; a taken name gets a number."""

    dir: str = "runs"
    name: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The part of `data.*` that belongs to no single data set.

    workers   loader processes; 0 loads in the training process
    ignore    condition fields that the data carry and this run shall not use
    """

    workers: Annotated[int, Range(0)] = 0
    ignore: tuple[Literal["label", "text", "boxes", "keypoints", "image", "frames"], ...] = ()


# bounds of numbers that the engine's dataclasses leave open
TRAIN_BOUNDS = {
    "steps": Range(1), "batch_size": Range(1), "seed": Range(0), "accumulate": Range(1), "checkpoint_every": Range(0),
    "checkpoint_seconds": Range(0), "sample_every": Range(0), "log_every": Range(1), "ema_decay": Range(0, 1),
    "condition_drop": Range(0, 1), "time_limit_seconds": Range(0),
}  # fmt: skip
OPTIM_BOUNDS = {
    "lr": Range(0), "betas": Range(0, 1), "eps": Range(0), "alpha": Range(0, 1), "momentum": Range(0, 1),
    "weight_decay": Range(0), "clip_norm": Range(0), "warmup": Range(0), "decay_start": Range(0),
    "decay_every": Range(0), "decay_factor": Range(0, 1),
}  # fmt: skip


def idle_options(tree: Mapping[str, Any], sources: Mapping[str, str]) -> Iterator[str]:
    """Options that somebody set and that change nothing under the other values. `sources`: dotted key -> who set it."""
    for phase, given in tree["optim"].items():
        values = {**tree["optim"]["default"], **given}
        used = {"adam": ("betas", "eps"), "adamw": ("betas", "eps"), "rmsprop": ("alpha", "eps", "momentum")}
        idle = {"betas", "alpha", "momentum", "eps"} - set(used.get(values["name"], ("momentum",)))
        reason = {key: f"optim.{phase}.name is {values['name']}" for key in idle}
        if values["schedule"] == "constant":
            wait = f"optim.{phase}.schedule is constant"
            reason |= dict.fromkeys(("decay_start", "decay_every", "decay_factor"), wait)
        elif values["schedule"] == "exponential":
            reason["decay_every"] = f"optim.{phase}.schedule is exponential: every step"
        yield from _idle(f"optim.{phase}", reason, sources)
    if tree["train"]["best"] is None and tree["train"]["best_is"] != "max":
        yield from _idle("train", {"best_is": "train.best names no number"}, sources)
    if not tree["text"]["tokens"]:
        yield from _idle("text", {"length": "text.tokens is false"}, sources)


def _idle(section: str, reasons: Mapping[str, str], sources: Mapping[str, str]) -> Iterator[str]:
    for key, reason in sorted(reasons.items()):
        source = sources.get(f"{section}.{key}", "")
        if source and not source.startswith("configs/"):  # shipped files may set what another choice leaves idle
            yield f"{section}.{key} ({source}) has no effect: {reason}"
