"""Toy data and systems for the engine's tests, and what makes two runs comparable. Children import it too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from condgen import rng
from condgen.data.base import BatchDataset, RowDataset
from condgen.engine import state
from condgen.engine.log import Log, read_metrics
from condgen.engine.optim import OptimOptions
from condgen.engine.run import RunFolder
from condgen.engine.trainer import Hook, Trainer, TrainOptions
from condgen.engine.world import World
from condgen.errors import DataError
from condgen.systems.base import Phase, System
from condgen.types import Batch, Condition, ConditionSpec, LabelSpec, Sample, TargetSpec

CLASSES, NOISE = 3, 4
SPEC = ConditionSpec(label=LabelSpec(CLASSES))
TARGET = TargetSpec(3, 4, 4)


class ToyData(RowDataset):
    """`rows` random pictures 3x4x4 with labels; augmentation flips. `bad` rows cannot be read."""

    provides = SPEC
    target = TARGET

    def __init__(self, *, rows: int = 13, bad: Sequence[int] = ()) -> None:
        self.rows, self.bad = rows, set(bad)

    def __len__(self) -> int:
        return self.rows

    def key(self, index: int) -> str:
        return f"row-{index}"

    def sample(self, index: int, random: torch.Generator | None) -> Sample:
        if index in self.bad:
            raise DataError("the file is torn")
        pixels = torch.randint(256, (3, 4, 4), generator=rng.generator("toy", index), dtype=torch.uint8)
        if random is not None and float(torch.rand((), generator=random)) < 0.5:
            pixels = pixels.flip(-1)
        return Sample(self.key(index), pixels, label=index % CLASSES)


class ToyGan(System):
    """Two phases, batch norm and dropout in both networks, one buffer that is written by hand.

    `on_loss(phase, batch, losses)` may look at or replace what a loss method returns.
    """

    generates = ("generator",)

    def __init__(
        self, *, condition: ConditionSpec, target: TargetSpec, dropout: float = 0.3, norm: bool = True,
        width: int = 8, phases: Sequence[Mapping[str, Any]] = ({}, {}),
    ) -> None:  # fmt: skip
        super().__init__(condition=condition, target=target)
        self.generator = nn.Sequential(
            nn.Linear(NOISE + CLASSES, width), nn.BatchNorm1d(width) if norm else nn.Identity(), nn.ReLU(),
            nn.Dropout(dropout), nn.Linear(width, 48), nn.Tanh(), nn.Unflatten(1, (3, 4, 4)),
        )  # fmt: skip
        self.discriminator = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.LeakyReLU(0.2),
            nn.Dropout(dropout), nn.Flatten(), nn.Linear(64, 1),
        )  # fmt: skip
        self.register_buffer("mean_loss", torch.zeros(()))
        self.options = phases
        self.on_loss: Callable[[str, Batch, Any], Any] | None = None

    def phases(self) -> Sequence[Phase]:
        first, second = self.options
        return [
            Phase("discriminator", self.discriminator_loss, ("discriminator",), **first),
            Phase("generator", self.generator_loss, ("generator",), **second),
        ]

    def fake(self, batch: Batch, random: Any) -> Tensor:
        label = batch.condition.label
        given = nn.functional.one_hot(label.clamp(min=0), CLASSES).float() * (label >= 0)[:, None]
        return self.generator(torch.cat([random.randn(NOISE), given], dim=1))

    def _out(self, phase: str, batch: Batch, losses: Any) -> Any:
        return losses if self.on_loss is None else self.on_loss(phase, batch, losses)

    def discriminator_loss(self, batch: Batch, random: Any) -> Any:
        with torch.no_grad():
            fake = self.fake(batch, random)
        real, wrong = self.discriminator(batch.target), self.discriminator(fake)
        loss = nn.functional.softplus(-real).mean() + nn.functional.softplus(wrong).mean()
        self.mean_loss.lerp_(loss.detach().float(), 0.1)
        return self._out("discriminator", batch, {"loss": loss, "real": real.mean()})

    def generator_loss(self, batch: Batch, random: Any) -> Any:
        loss = nn.functional.softplus(-self.discriminator(self.fake(batch, random))).mean()
        return self._out("generator", batch, {"loss": loss})

    def sample(self, condition: Condition, *, random: Any) -> Tensor:
        return self.fake(Batch(torch.zeros(random.rows, 3, 4, 4), condition), random)


class ToyShared(ToyGan):
    """The fake batch is made once for both phases."""

    def shared(self, batch: Batch, random: Any) -> Tensor:
        return self.fake(batch, random)

    def discriminator_loss(self, batch: Batch, random: Any) -> Any:
        scores = self.discriminator(batch.shared.detach())
        return self._out("discriminator", batch, {"loss": nn.functional.softplus(scores).mean()})

    def generator_loss(self, batch: Batch, random: Any) -> Any:
        loss = nn.functional.softplus(-self.discriminator(batch.shared)).mean()
        return self._out("generator", batch, {"loss": loss})


class StopAfter:
    """Asks to stop once `steps` further steps were done; the trainer asks once before each step."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @property
    def requested(self) -> bool:
        self.left -= 1
        return self.left < 0


def make_system(kind: type[System] = ToyGan, **options: Any) -> Any:
    torch.manual_seed(1)
    return kind(condition=SPEC, target=TARGET, **options)


def make_trainer(
    folder: Path, system: Any = None, *, world: World | None = None, data: RowDataset | None = None,
    optim: Mapping[str, OptimOptions] | None = None, hooks: Sequence[Hook] = (), **options: Any,
) -> Trainer:  # fmt: skip
    """A trainer in `folder`, which may hold an earlier part of the run."""
    world = world or World()
    given = {"steps": 20, "batch_size": 4, "seed": 3, "log_every": 3, "checkpoint_every": 0, **options}
    chosen = TrainOptions(**given)
    folder.mkdir(parents=True, exist_ok=True)
    run = RunFolder(folder)
    batches = BatchDataset(
        data or ToyData(), SPEC, batch_size=chosen.batch_size, seed=chosen.seed, rank=world.rank, world=world.world
    )
    optim = optim or {"default": OptimOptions(lr=1e-2), "discriminator": OptimOptions(lr=5e-3, schedule="linear")}
    log = Log(run, quiet=True, main=world.is_main)
    return Trainer(system or make_system(), batches, lambda b: b, optim, chosen, world, run, log, hooks)


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """Weights, buffers, averaged weights and every optimiser's state, as copies."""
    found = {f"system/{n}": t for n, t in state.system_tensors(trainer.system).items()}
    found.update((f"ema/{n}", t) for n, t in trainer.ema.tensors().items())
    for runner in trainer.runners:
        moments = state.optimizer_tensors(runner.optimizer, runner.parameters)
        found.update((f"{runner.phase.name}/{n}", t) for n, t in moments.items())
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def metrics(trainer: Trainer) -> list[dict[str, float]]:
    """Lines of metrics.jsonl without what depends on the clock."""
    lines = read_metrics(trainer.run.metrics)
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def differences(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Names whose tensors are not equal bit by bit."""
    return sorted(n for n in {*a, *b} if n not in a or n not in b or not torch.equal(a[n], b[n]))
