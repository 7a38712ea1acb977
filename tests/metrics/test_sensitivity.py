"""The tripwire: zero for a system that ignores a field, the right size for one that uses it, silent on no evidence."""

from typing import ClassVar

import pytest
import torch

from condgen.errors import DivergedError, ShapeError
from condgen.metrics.sensitivity import condition_sensitivity, require_sensitive, swap_field
from condgen.metrics.signature import parse
from condgen.systems.base import System
from condgen.types import Boxes, Condition, ConditionSpec, LabelSpec, TargetSpec, Text


class Painter(System):
    """Every pixel = weights of label and text plus noise."""

    consumes: ClassVar[tuple[str, ...]] = ("vector",)

    def __init__(self, *, label=0.0, text=0.0, noise=1.0):
        super().__init__(condition=ConditionSpec(label=LabelSpec(5)), target=TargetSpec(1, 4, 4))
        self.weights = (label, text, noise)
        self.calls = []

    def phases(self):
        return []

    def sample(self, condition, *, random):
        assert not self.training and not torch.is_grad_enabled()
        self.calls.append(len(condition))
        label, text, noise = self.weights
        level = label * condition.label.float() + text * condition.text.pooled[:, 0]
        return level[:, None, None, None] + noise * random.randn(1, 4, 4)


def condition(size=12):
    pooled = torch.arange(size, dtype=torch.float32)[:, None]
    return Condition(
        label=torch.arange(size) % 3, text=Text(pooled=pooled, strings=tuple(f"row {i}" for i in range(size)))
    )


def measure(system, given, **kwargs):
    return {m.field: m for m in condition_sensitivity(system, given, **kwargs)}


def test_a_field_that_is_ignored_measures_exactly_zero_and_trips():
    found = measure(Painter(text=0.5), condition())
    assert found["label"].swap == 0 and found["label"].null == 0 and found["label"].relative_swap == 0
    assert found["text"].swap > 0 and found["text"].null > 0
    with pytest.raises(DivergedError, match=r"does not depend on label: .*data\.ignore=\[label\]"):
        require_sensitive(found.values())
    require_sensitive(measure(Painter(label=0.1, text=0.1), condition()).values())


def test_the_size_of_the_effect():
    found = measure(Painter(label=2.0, noise=1.0), condition(240), batch_size=32)["label"]
    assert found.rows == 240  # every class has somewhere to go
    assert 2.0 <= found.swap <= 4.0  # labels differ by 1 or 2, times the weight
    # null is label -1: labels 0, 1, 2 move by 1, 2, 3 times the weight
    assert found.null == pytest.approx(4.0, abs=1e-5)
    # two independent normal pictures differ by sqrt(2)
    assert found.noise == pytest.approx(2**0.5, rel=0.05)
    assert found.relative_swap == pytest.approx(found.swap / found.noise)


def test_same_noise_whatever_the_batch_size():
    system, given = Painter(label=1.0, text=0.3), condition()
    assert measure(system, given, batch_size=5) == measure(system, given, batch_size=12)
    assert max(system.calls) == 12
    one = [condition_sensitivity(system, given, seed=seed)[0].noise for seed in (0, 0, 1)]
    assert one[0] == one[1] != one[2]


def test_no_evidence_is_no_alarm():
    same = Condition(label=torch.ones(4, dtype=torch.int64), text=condition(4).text)
    found = measure(Painter(text=0.1), same)
    assert found["label"].swap is None and found["label"].rows == 0
    require_sensitive(found.values())
    with pytest.raises(ShapeError, match="at least 2"):
        condition_sensitivity(Painter(), condition(1))


def test_rows_that_found_no_other_value_do_not_dilute_the_swap():
    mostly = torch.tensor([0, 0, 0, 0, 0, 0, 0, 4])  # one row differs, so only two rows can change
    found = measure(Painter(label=1.0), Condition(label=mostly, text=condition(8).text))["label"]
    assert found.rows == 2 and found.swap == pytest.approx(4.0, abs=1e-5)


def test_a_system_without_noise_is_reported_in_pixels():
    found = measure(Painter(label=1.0, noise=0.0), condition())["label"]
    assert found.noise == 0 and found.relative_swap is None
    scores = found.scores(seed=0, rows=12)
    assert [s.name for s in scores] == ["sensitivity/label", "sensitivity/label/null"]
    assert scores[0].value == found.swap and parse(scores[0].signature).fields["unit"] == "rms"
    noisy = measure(Painter(label=1.0), condition())["label"].scores(seed=0, rows=12, about={"data": "x"})
    assert parse(noisy[0].signature).fields["unit"] == "swap-per-noise"


def test_mode_and_global_randomness_are_left_alone():
    system = Painter(label=1.0).train()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    condition_sensitivity(system, condition())
    assert system.training and torch.equal(torch.rand(2), expected)


def test_swap_moves_one_field_with_its_presence():
    given = condition(6).drop(torch.tensor([True] * 3 + [False] * 3), ["text"])
    swapped, changed = swap_field(given, "text", seed=2)
    assert torch.equal(swapped.label, given.label)
    assert sorted(swapped.text.strings) == sorted(given.text.strings)
    held = [bool(s) for s in swapped.text.strings]
    assert swapped.is_present("text").tolist() == held
    moved = [a != b for a, b in zip(given.text.strings, swapped.text.strings)]
    assert [bool(c) for c in changed] == moved
    boxes = Boxes(torch.rand(4, 2, 4), torch.ones(4, 2, dtype=torch.bool))
    other, changed = swap_field(Condition(boxes=boxes), "boxes")
    assert changed.all() and not torch.equal(other.boxes.xyxy, boxes.xyxy)
    with pytest.raises(ShapeError, match="no image"):
        swap_field(given, "image")
