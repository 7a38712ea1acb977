"""From configuration to objects: fields are matched before step 0, and the same configuration gives the same system."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from condgen import config, registry
from condgen.build import build, match
from condgen.errors import ConfigError, DataError
from condgen.systems.base import Trainable
from condgen.task import Task
from condgen.types import ConditionSpec, ImageSpec, LabelSpec, TextSpec

TOY = Path(__file__).parent / "toy_project"


@pytest.fixture(autouse=True)
def toy_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONDGEN_PROJECT", str(TOY))


def toy(*words: str) -> config.Config:
    return config.load(["task=toy_task", "text.encoder=hash_bow", "text.cache=memory", *words])


def system_class(**attributes: tuple[str, ...]) -> type[Trainable]:
    """Only what matching reads."""
    plain = {"consumes": ("vector",), "requires": (), "needs_one_of": (), "reads": None}
    return SimpleNamespace(**{**plain, **attributes})  # type: ignore[return-value]


TASK: Task = SimpleNamespace(conditions=("label",))  # type: ignore[assignment]
NO_TASK: Task = SimpleNamespace(conditions=())  # type: ignore[assignment]


def test_only_fields_that_are_not_ignored_reach_the_system() -> None:
    assert build(toy()).spec.given == ("label",)
    both = build(toy("data.ignore=[]"))
    assert both.spec.given == ("label", "text") and both.encoder is not None
    assert both.spec.text == both.encoder.spec and both.spec.text.pooled > 0
    assert build(toy()).encoder is None


def test_dropping_conditions_makes_the_spec_nullable() -> None:
    assert not build(toy()).spec.nullable
    assert build(toy("train.condition_drop=0.1")).spec.nullable


def test_batches_are_prepared_with_embeddings() -> None:
    built = build(toy("data.ignore=[]"))
    built.fill_captions()
    batch = built.prepare(built.batches()[0].batch)
    assert batch.condition.text is not None and batch.condition.text.pooled is not None
    assert batch.condition.text.pooled.shape == (4, built.spec.text.pooled)
    losses = built.system.phases()[0].loss(batch.as_float(), None)
    assert torch.isfinite(losses["loss"])


def test_weights_depend_on_the_seed_and_not_on_what_was_drawn_before() -> None:
    first = build(toy()).system.state_dict()
    torch.randn(17)
    state = torch.get_rng_state()
    second = build(toy()).system.state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build(toy("train.seed=1")).system.state_dict()
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_saved_configuration_rebuilds_the_same_system(tmp_path: Path) -> None:
    made = toy("system.width=5")
    (tmp_path / "config.yaml").write_text(made.to_yaml())
    again = build(config.load([], [tmp_path / "config.yaml"])).system.state_dict()
    first = build(made).system.state_dict()
    assert {n: t.shape for n, t in first.items()} == {n: t.shape for n, t in again.items()}
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_needed_field_that_nothing_provides() -> None:
    with pytest.raises(
        ConfigError, match=r"toy_pointer needs keypoints; this data set \(toy_colours\) provides label, text"
    ):
        build(toy("system=toy_pointer", "system.width=1"))


def test_a_needed_field_that_is_ignored() -> None:
    with pytest.raises(ConfigError, match=r"the task toy_task needs label, but data.ignore=\[label\] leaves it out"):
        build(toy("data.ignore=[label]"))


def test_what_would_bring_a_missing_field_is_said() -> None:
    clips = config.load(["task=frame2video", "data=clips", "data.root=DIR", "data.past=0", "data.overlap=false"])
    with pytest.raises(ConfigError, match=r"needs frames; .* set data.past=1 or more"):
        match(clips, system_class(requires=("frames",)), NO_TASK, ConditionSpec(label=LabelSpec(3)))
    either = system_class(needs_one_of=("label", "image"))
    with pytest.raises(ConfigError, match=r"less data.ignore=\[text,label\]; set data.ignore=\[text\]"):
        match(toy("data.ignore=[text,label]"), either, NO_TASK, ConditionSpec(label=LabelSpec(3)))
    with pytest.raises(ConfigError, match="choose another data set"):
        match(toy("data.ignore=[]"), either, NO_TASK, ConditionSpec(text=TextSpec(pooled=4)))


def test_a_field_that_the_system_would_lose() -> None:
    provided = ConditionSpec(label=LabelSpec(3), image=ImageSpec(3, 8, 8))
    with pytest.raises(ConfigError, match=r"image.*takes only temporal.*data.ignore=\[image\]"):
        match(toy(), system_class(consumes=("temporal",)), NO_TASK, replace(provided, label=None))
    with pytest.raises(ConfigError, match="no condition"):
        match(toy(), system_class(consumes=()), TASK, provided)


def test_a_field_that_the_system_never_reads() -> None:
    words = ("task=text_embedding", "system.preset=tiny", "text.cache=memory")
    with pytest.raises(
        ConfigError, match=r"does not use boxes or keypoints or image.*data.ignore=\[boxes,keypoints,image"
    ):
        build(config.load([*words, "data.ignore=[]"]))


def test_ignoring_more_than_there_is_is_harmless() -> None:
    spec = match(
        toy("data.ignore=[text,frames]"), system_class(), TASK, ConditionSpec(label=LabelSpec(3), text=TextSpec())
    )
    assert spec.given == ("label",)


def test_unknown_phase_is_refused_with_the_phases() -> None:
    with pytest.raises(ConfigError, match=r"optim.regresion.*Did you mean 'optim.regression'.*phases.*regression"):
        build(toy("optim.regresion.lr=1e-3"))


def test_data_that_are_not_there() -> None:
    with pytest.raises(DataError, match=r"data\.root"):
        build(toy("data.root=missing"))


def test_task_options_come_from_eval() -> None:
    assert build(toy("eval.strictness=2")).task.strictness == 2.0  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("task", registry.names("tasks"))
def test_every_task_builds_its_tiny_system_and_takes_a_step(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONDGEN_PROJECT")
    made = config.load([f"task={task}", "system.preset=tiny", "train.batch_size=4", "text.cache=memory"])
    built = build(made)
    batch = built.prepare(built.batches()[0].batch).as_float()
    from condgen.rng import StepRandom

    for phase in built.system.phases():
        random = StepRandom(0, phase.name, rows=4)
        losses = phase.loss(replace(batch, shared=built.system.shared(batch, random)), random)
        assert losses is None or torch.isfinite(losses["loss"])
