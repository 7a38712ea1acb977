"""What every registered system owes, over every condition that its forms can take.

A new file in `condgen/systems/` with a `tiny` preset is tested here without a line of its own.
"""

from __future__ import annotations

import inspect
import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from condgen import registry
from condgen.conditions.stack import kind_class
from condgen.data.base import BatchDataset, RowDataset
from condgen.engine.log import Log
from condgen.engine.run import RunFolder
from condgen.engine.trainer import OptimOptions, Trainer, TrainOptions
from condgen.engine.world import World
from condgen.errors import ShapeError, Stopped
from condgen.pixels import pixels_to_float
from condgen.rng import RowRandom, StepRandom
from condgen.systems.base import System, Trainable
from condgen.types import (
    Batch,
    Boxes,
    BoxesSpec,
    Condition,
    ConditionSpec,
    Frames,
    FramesSpec,
    Image,
    ImageSpec,
    Keypoints,
    KeypointsSpec,
    LabelSpec,
    Sample,
    TargetSpec,
    Text,
    TextSpec,
)

ROWS = 4
SIDE = 16
TARGET = TargetSpec(3, SIDE, SIDE)
CLIP = TargetSpec(3, SIDE, SIDE, frames=4)
SPECS = {
    "label": LabelSpec(5),
    "text": TextSpec(pooled=6, tokens=70, length=201, encoder="char"),
    "boxes": BoxesSpec(2),
    "keypoints": KeypointsSpec(3, flip_pairs=((0, 1),)),
    "image": ImageSpec(3, SIDE, SIDE),
    "frames": FramesSpec(2, 3, SIDE, SIDE),
}
PAIRS = [("text", "boxes"), ("label", "image"), ("label", "keypoints")]


def classes() -> dict[str, type[Trainable]]:
    return {name: registry.load("systems", name, Trainable) for name in registry.names("systems")}


def cells() -> list[tuple[str, tuple[str, ...]]]:
    """(system, fields) for every field, and pair of fields, whose kind can produce a form that the system takes."""
    found = []
    for name, cls in classes().items():
        fits = [f for f in SPECS if set(kind_class(f).forms) & set(cls.consumes) and f in (cls.reads or SPECS)]
        wanted = [(f,) for f in fits] + [pair for pair in PAIRS if set(pair) <= set(fits)]
        for fields in wanted:
            full = needed(cls, fields)
            if (name, full) not in found:
                found.append((name, full))
    return found


def needed(cls: type[Trainable], fields: tuple[str, ...] = ()) -> tuple[str, ...]:
    """`fields` and what the system cannot do without."""
    full = tuple(dict.fromkeys((*cls.requires, *fields)))
    return full if not cls.needs_one_of or set(full) & set(cls.needs_one_of) else (*full, cls.needs_one_of[0])


def target_of(name: str) -> TargetSpec:
    """What a system says that it makes: `Trainable.makes`."""
    return {"pictures": TARGET, "clips": CLIP}[registry.load("systems", name, Trainable).makes]


def build(name: str, fields: tuple[str, ...], nullable: bool = False) -> Trainable:
    cls = registry.load("systems", name, Trainable)
    spec = ConditionSpec(**{f: SPECS[f] for f in fields}, nullable=nullable)
    torch.manual_seed(0)
    return cls(condition=spec, target=target_of(name), **tiny_options(name))


def tiny_options(name: str) -> dict[str, object]:
    """Constructor options of the preset that these tests run."""
    file = OmegaConf.to_container(OmegaConf.load(registry.path("configs/system", name, ".yaml")))
    return {**file.get("system", {}), **file["presets"]["tiny"].get("system", {})}


def condition(fields: tuple[str, ...], rows: int = ROWS) -> Condition:
    g = torch.Generator().manual_seed(7)
    corners = torch.rand(rows, 2, 2, generator=g) * 0.4
    tokens = torch.nn.functional.one_hot(torch.randint(70, (rows, 201), generator=g), 70).float()
    full = {
        "label": torch.arange(rows) % 5,
        "text": Text(
            pooled=torch.randn(rows, 6, generator=g),
            tokens=tokens,
            mask=torch.ones(rows, 201, dtype=torch.bool),
            strings=tuple(f"caption {i}" for i in range(rows)),
        ),
        "boxes": Boxes(torch.cat([corners, corners + 0.3], dim=2), torch.ones(rows, 2, dtype=torch.bool)),
        "keypoints": Keypoints(torch.rand(rows, 3, 2, generator=g), torch.ones(rows, 3, dtype=torch.bool)),
        "image": Image(torch.rand(rows, 3, SIDE, SIDE, generator=g) * 2 - 1),
        "frames": Frames(
            torch.rand(rows, 2, 3, SIDE, SIDE, generator=g) * 2 - 1, torch.ones(rows, 2, dtype=torch.bool)
        ),
    }
    return Condition(**{f: full[f] for f in fields})


def batch(name: str, fields: tuple[str, ...], rows: int = ROWS) -> Batch:
    shape = (rows, *target_of(name).shape)
    pixels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return Batch(pixels_to_float(pixels), condition(fields, rows), tuple(map(str, range(rows))))


def random(rows: int = ROWS) -> StepRandom:
    return StepRandom("contract", rows=rows)


CELLS = cells()
GENERATORS = [(name, fields) for name, fields in CELLS if issubclass(classes()[name], System)]
ids = {"ids": lambda value: value if isinstance(value, str) else "+".join(value)}
each_cell = pytest.mark.parametrize(("name", "fields"), CELLS, **ids)
each_generator = pytest.mark.parametrize(("name", "fields"), GENERATORS, **ids)


@each_cell
def test_phases_train_disjoint_parameters_and_gradient_reaches_all_of_them(name, fields):
    system, data = build(name, fields), batch(name, fields)
    seen: set[str] = set()
    for phase in system.phases():
        names = {n for n, p in system.named_parameters() if n.split(".")[0] in phase.trains and p.requires_grad}
        assert names, f"{phase.name} trains nothing"
        assert not names & seen, f"{phase.name} shares parameters with an earlier phase"
        seen |= names
        system.zero_grad()
        losses = phase.loss(data, random())
        assert losses is not None and losses["loss"].dim() == 0 and torch.isfinite(losses["loss"])
        losses["loss"].backward()
        left = [n for n, p in system.named_parameters() if n in names and p.grad is None]
        assert not left, f"{phase.name}: no part of the loss, so several processes could not be synchronised: {left}"
        silent = [n for n, p in system.named_parameters() if n in names and not p.grad.any()]
        # a unit that is dead for this batch may be silent, a whole network may not
        assert len(silent) < 0.2 * len(names), f"{phase.name}: no gradient in {silent[:5]}"
    assert seen == {n for n, p in system.named_parameters() if p.requires_grad}


@each_cell
def test_losses_are_a_function_of_the_seed(name, fields):
    def losses() -> list[float]:
        system, data, out = build(name, fields), batch(name, fields), []
        for phase in system.phases():
            torch.manual_seed(11)
            out.append(phase.loss(data, random())["loss"].item())
        return out

    assert losses() == losses()


@each_generator
def test_sample_shape_range_and_batch_independence(name, fields):
    system = build(name, fields).eval()
    asked = condition(fields)
    with torch.no_grad():
        together = system.sample(asked, random=RowRandom(5, range(ROWS)))
        again = system.sample(asked, random=RowRandom(5, range(ROWS)))
        apart = torch.cat([system.sample(asked.index([i]), random=RowRandom(5, [i])) for i in range(ROWS)])
    assert together.shape == (ROWS, *target_of(name).shape) and together.dtype == torch.float32
    assert together.abs().max() <= 1 + 1e-5
    assert torch.equal(together, again)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", sorted({name for name, _ in GENERATORS}))
def test_what_a_system_makes_of_its_samples_is_in_their_signatures(name):
    """An option of `sample` whose default is the system's own option shows in `sample_fields`."""
    cls = classes()[name]
    chosen = inspect.signature(cls.__init__).parameters.keys()
    shared = [p.name for p in inspect.signature(cls.sample).parameters.values() if p.default is None]
    system = build(name, next(fields for found, fields in GENERATORS if found == name))
    for option in set(shared) & set(chosen):
        before = system.sample_fields
        setattr(system, option, {"sample_mode": "noisy", "temperature": 0.7}[option])
        assert system.sample_fields != before and option in system.sample_fields
    assert all(isinstance(value, str) for value in system.sample_fields.values())
    assert system.sample_fields or not set(shared) & set(chosen)


@each_generator
def test_output_depends_on_every_condition_and_not_on_other_rows(name, fields):
    system = build(name, fields).eval()
    asked = condition(fields)
    with torch.no_grad():
        base = system.sample(asked, random=RowRandom(5, [0] * ROWS))
        for field in fields:
            swapped = condition((field,)).index([1, 2, 3, 0])
            other = Condition(**{f: getattr(swapped if f == field else asked, f) for f in fields})
            moved = (system.sample(other, random=RowRandom(5, [0] * ROWS)) - base).abs().flatten(1).amax(1)
            assert (moved > 0).all(), f"{name} ignores {field}"


@each_generator
def test_dropped_conditions_work_and_are_learned_nulls_where_the_form_has_one(name, fields):
    system = build(name, fields, nullable=True).eval()
    asked = condition(fields)
    with torch.no_grad():
        null = system.sample(asked.null_like(), random=RowRandom(5, [0] * ROWS))
        given = system.sample(asked, random=RowRandom(5, [0] * ROWS))
    assert torch.isfinite(null).all()
    torch.testing.assert_close(null, null[:1].expand_as(null), atol=1e-5, rtol=0)  # nothing leaks through a null
    assert not torch.allclose(null, given)


@each_cell
def test_state_dict_round_trip_is_exact(name, fields):
    system, other = build(name, fields), build(name, fields)
    for parameter in other.parameters():
        parameter.data.add_(1)
    other.load_state_dict(system.state_dict(), strict=True)
    for (key, mine), theirs in zip(system.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), key


@each_cell
def test_a_few_steps_change_exactly_what_each_phase_trains(name, fields):
    system, data = build(name, fields), batch(name, fields)
    for phase in system.phases():
        before = {n: p.detach().clone() for n, p in system.named_parameters()}
        trained = [p for n, p in system.named_parameters() if n.split(".")[0] in phase.trains]
        optimizer = torch.optim.Adam(trained, 1e-2)
        optimizer.zero_grad()
        phase.loss(data, random())["loss"].backward()
        optimizer.step()
        changed = {n.split(".")[0] for n, p in system.named_parameters() if not torch.equal(p, before[n])}
        assert changed == set(phase.trains)


@each_cell
def test_a_batch_of_two_works(name, fields):
    system, data = build(name, fields), batch(name, fields, rows=2)
    for phase in system.phases():
        assert torch.isfinite(phase.loss(data, random(2))["loss"])


@each_cell
def test_a_batch_of_one_works_or_says_that_it_needs_two(name, fields):
    """H4. In training mode, where batch norm and losses that compare rows could fail in odd ways."""
    system, data = build(name, fields).train(), batch(name, fields, rows=1)
    for phase in system.phases():
        try:
            assert torch.isfinite(phase.loss(data, random(1))["loss"])
        except ShapeError as error:
            assert re.search("at least 2 rows|batch_size=2", str(error))


def test_torch_may_not_broadcast_inside_a_loss():
    """H2: a critic's (B, 1) against (B,) would give (B, B); pyproject makes torch's warning an error in every test."""
    with pytest.raises(UserWarning, match="Using a target size"):
        torch.nn.functional.mse_loss(torch.zeros(3, 1), torch.zeros(3))


def test_every_system_has_a_config_with_the_presets_that_users_are_promised():
    for name in registry.names("systems"):
        file = OmegaConf.load(registry.path("configs/system", name, ".yaml"))
        assert {"tiny", "small", "paper"} <= set(file.presets), name


@pytest.mark.parametrize("name", sorted({name for name, _ in GENERATORS}))
def test_a_system_refuses_the_kind_of_target_that_it_does_not_make(name):
    cls, other = registry.load("systems", name, Trainable), CLIP if target_of(name) is TARGET else TARGET
    fields = next(fields for found, fields in GENERATORS if found == name)
    with pytest.raises(ShapeError, match="picture|image|clip|frames"):
        cls(condition=ConditionSpec(**{f: SPECS[f] for f in fields}), target=other, **tiny_options(name))


def test_the_matrix_is_not_empty():
    systems = {name for name, _ in CELLS}
    assert systems == set(registry.names("systems"))
    covered = set(itertools.chain.from_iterable(fields for _, fields in GENERATORS))
    assert {"label", "text"} <= covered


class Rows(RowDataset):
    """Twelve rows in memory that carry the given fields."""

    def __init__(self, fields: tuple[str, ...], target: TargetSpec) -> None:
        self.provides, self.target = ConditionSpec(**{f: SPECS[f] for f in fields}), target
        self.pixels = torch.randint(0, 256, (12, *target.shape), dtype=torch.uint8)

    def __len__(self) -> int:
        return 12

    def key(self, index: int) -> str:
        return str(index)

    def sample(self, index: int, random: torch.Generator | None) -> Sample:
        return Sample(str(index), self.pixels[index], label=index % 5, caption=f"caption {index}")


class StopAfter:
    """Asks to stop once the trainer has looked `steps` times."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @property
    def requested(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("name", registry.names("systems"))
def test_stopping_and_going_on_equals_never_stopping(name, tmp_path):
    """With the real trainer: weights, averages and every optimiser, bit by bit."""
    fields = needed(registry.load("systems", name, Trainable)) or ("label",)

    def prepare(data: Batch) -> Batch:
        text = data.condition.text
        if text is None:
            return data
        rows = [int(s.split()[1]) for s in text.strings]
        return replace(
            data, condition=replace(data.condition, text=condition(("text",), 12).text.index(torch.tensor(rows)))
        )

    def trainer(folder: Path) -> Trainer:
        folder.mkdir(exist_ok=True)
        run = RunFolder(folder)
        torch.manual_seed(2)
        spec = ConditionSpec(**{f: SPECS[f] for f in fields})
        rows = BatchDataset(Rows(fields, target_of(name)), spec, batch_size=4, seed=1)
        options = TrainOptions(steps=6, batch_size=4, seed=1, checkpoint_every=0)
        optim = {"default": OptimOptions(lr=1e-3)}
        return Trainer(build(name, fields), rows, prepare, optim, options, World(), run, Log(run, quiet=True))

    whole, parts = trainer(tmp_path / "whole"), trainer(tmp_path / "parts")
    whole.train(stop=StopAfter(99))
    with pytest.raises(Stopped):
        parts.train(stop=StopAfter(3))
    again = trainer(tmp_path / "parts")
    again.train(parts.store.latest(), stop=StopAfter(99))
    one, two = whole.store.latest(), again.store.latest()
    assert one.step == two.step == 6 and one.groups == two.groups
    for group in one.groups:
        mine, theirs = one.tensors(group), two.tensors(group)
        assert mine.keys() == theirs.keys()
        assert [n for n in mine if not torch.equal(mine[n], theirs[n])] == [], group
