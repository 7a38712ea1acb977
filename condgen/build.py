"""A checked `Config` -> plain objects: data sets, text encoder, system. Below this file there are no config objects.

Fields are matched here, before step 0: what the data provide, less `data.ignore`, is what the system is built for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from condgen import registry, rng
from condgen.conditions.stack import assign_forms
from condgen.config import Config
from condgen.config.schema import suggest
from condgen.data.base import BatchDataset, DataSource, RowDataset, StreamBatches, batched
from condgen.errors import ConfigError, DataError
from condgen.systems.base import Trainable
from condgen.task import Task
from condgen.types import Batch, ConditionSpec, TargetSpec

if TYPE_CHECKING:
    from condgen.conditions.text_encoders import CachedEncoder
    from condgen.engine.optim import OptimOptions
    from condgen.engine.options import TrainOptions


@dataclass(frozen=True)
class Built:
    """Everything that training or scoring needs.

    spec      the fields that reach the system, text widths and nullable filled in
    encoder   strings -> embeddings, or None where no field is text
    optim     phase name -> options, always with "default"
    options   the trainer's options
    """

    system: Trainable
    train_data: DataSource
    test_data: DataSource
    spec: ConditionSpec
    target: TargetSpec
    encoder: CachedEncoder | None
    optim: Mapping[str, OptimOptions]
    options: TrainOptions
    task: Task
    config: Config

    def prepare(self, batch: Batch) -> Batch:
        """Attaches text embeddings; runs on CPU in the training process."""
        if self.encoder is None or batch.condition.text is None:
            return batch
        return replace(batch, condition=self.encoder.attach(batch.condition))

    def batches(self, rank: int = 0, world: int = 1) -> BatchDataset | StreamBatches:
        """This process's share of the training batches, by number."""
        options = self.options
        return batched(
            self.train_data, self.spec, batch_size=options.batch_size, seed=options.seed, rank=rank, world=world
        )

    @property
    def can_score(self) -> bool:
        """Scores read rows by number, which a stream cannot give."""
        return isinstance(self.test_data, RowDataset)

    def fill_captions(self) -> None:
        """Embeds every caption of both splits once; later steps only look them up."""
        if self.encoder is not None:
            self.encoder.fill(list(dict.fromkeys([*self.train_data.captions(), *self.test_data.captions()])))


def build(config: Config) -> Built:
    """Raises ConfigError where task, data and system do not fit together, DataError where the data cannot be read."""
    task = registry.load("tasks", config.task, Task)(**config.task_options)
    cls = registry.load("systems", config.system_name, Trainable)
    train_data = _data(config, "train")
    provided = train_data.provides
    if not issubclass(cls, task.trains):
        raise ConfigError(
            f"the task {config.task} trains a {task.trains.__name__}, and {config.system_name} is none; "
            f"{config.task} starts from the system in configs/task/{config.task}.yaml"
        )
    spec = match(config, cls, task, provided)
    encoder = _encoder(config) if spec.text is not None else None
    if encoder is not None:
        spec = replace(spec, text=encoder.spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.derive(config.train.seed, "weights"))  # weights are a function of the seed alone
        system = cls(condition=spec, target=train_data.target, **config.system)
    check_phases(config, system)
    return Built(
        system=system,
        train_data=train_data,
        # a stream is never scored, so it needs no shards of another split
        test_data=_scored_data(config) if isinstance(train_data, RowDataset) else train_data,
        spec=spec,
        target=train_data.target,
        encoder=encoder,
        optim=config.optim,
        options=config.train,
        task=task,
        config=config,
    )


def match(config: Config, cls: type[Trainable], task: Task, provided: ConditionSpec) -> ConditionSpec:
    """The fields that reach the system. ConfigError when a needed one is missing or a given one would be lost."""
    spec = replace(provided.without(config.data_options.ignore), nullable=config.train.condition_drop > 0)
    has = f"this data set ({config.data_name}) provides {_named(provided)}"
    for who, needs in ((config.system_name, cls.requires), (f"the task {config.task}", task.conditions)):
        for name in needs:
            if getattr(provided, name) is None:
                hint = "choose another data set: `condgen list` shows them"
                if name == "frames" and "past" in config.data:
                    hint = "set data.past=1 or more, and data.overlap=true if the clip is to start with the given frame"
                raise ConfigError(f"{who} needs {name}; {has}; {hint}")
            if getattr(spec, name) is None:
                raise ConfigError(f"{who} needs {name}, but data.ignore={_list(config)} leaves it out; {has}")
    if cls.needs_one_of and not any(getattr(spec, name) for name in cls.needs_one_of):
        kept = [name for name in config.data_options.ignore if name not in cls.needs_one_of]
        raise ConfigError(
            f"{config.system_name} needs {' or '.join(cls.needs_one_of)}; {has}, less data.ignore={_list(config)}; "
            + (
                f"set data.ignore=[{','.join(kept)}]"
                if any(getattr(provided, n) for n in cls.needs_one_of)
                else "choose another data set"
            )
        )
    lost = [name for name in spec.given if cls.reads is not None and name not in cls.reads]
    if lost:
        raise ConfigError(
            f"{config.system_name} does not use {' or '.join(lost)}, and {has}; "
            f"set data.ignore=[{','.join([*config.data_options.ignore, *lost])}] to leave it out on purpose"
        )
    try:
        assign_forms(spec, cls.consumes)
    except ConfigError as error:
        raise ConfigError(f"{config.system_name}: {error}. The data set {config.data_name} carries it") from None
    return spec


def check_phases(config: Config, system: Trainable) -> None:
    """`optim.<phase>` must name a phase of the system."""
    phases = [phase.name for phase in system.phases()]
    for name in config.optim:
        if name not in ("default", *phases):
            hint = suggest(f"optim.{name}", [f"optim.{phase}" for phase in ("default", *phases)])
            raise ConfigError(
                f"unknown option 'optim.{name}'.{hint} The phases of {config.system_name} are {', '.join(phases)}"
            )


def _data(config: Config, split: str) -> DataSource:
    cls: Any = registry.load("data", config.data_name, DataSource)
    made: DataSource = cls(split=split, **config.data)
    return made


def _scored_data(config: Config) -> DataSource:
    split = config.eval.split
    try:
        made = _data(config, split)
    except ConfigError as error:
        raise ConfigError(f"eval.split={split}: {error}") from None
    if isinstance(made, RowDataset) and len(made) == 0:
        raise DataError(
            f"there are no rows to score: eval.split={split} of {config.data_name} is empty. "
            "Raise data.holdout where the data set has it, or score what was trained on: eval.split=train"
        )
    return made


def _encoder(config: Config) -> CachedEncoder:
    from condgen.conditions.text_encoders import CachedEncoder, text_encoder

    options = config.text
    encoder = text_encoder(options.encoder, tokens=options.tokens, length=options.length)
    in_memory = options.cache == "memory"
    return CachedEncoder(encoder, None if in_memory else options.cache, disk=not in_memory)


def _named(spec: ConditionSpec) -> str:
    return ", ".join(spec.given) or "no condition"


def _list(config: Config) -> str:
    return "[" + ",".join(config.data_options.ignore) + "]"
