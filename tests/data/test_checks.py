"""The report counts what is there, names what is wrong and changes nothing."""

from collections.abc import Callable

import pytest
import torch

from condgen.data.base import RowDataset
from condgen.data.checks import check
from condgen.errors import DataError
from condgen.types import (
    BoxesSpec,
    ConditionSpec,
    ImageSpec,
    KeypointsSpec,
    LabelSpec,
    Sample,
    TargetSpec,
    TextSpec,
)


class Rows(RowDataset):
    """`make(index)` gives the fields of a row that replace the good ones, or raises."""

    def __init__(self, rows: int, make: Callable[[int], dict] = lambda index: {}, prefix: str = "r") -> None:
        self.rows, self.make, self.prefix = rows, make, prefix
        self.provides = ConditionSpec(
            label=LabelSpec(3, ("ant", "bee", "cow")), text=TextSpec(), boxes=BoxesSpec(2), keypoints=KeypointsSpec(2),
            image=ImageSpec(1, 4, 4),
        )  # fmt: skip
        self.target = TargetSpec(3, 4, 4)

    def __len__(self) -> int:
        return self.rows

    def key(self, index: int) -> str:
        return f"{self.prefix}{index}"

    def sample(self, index: int, random: torch.Generator | None) -> Sample:
        assert random is None  # a check reads rows as they are
        pixels = torch.full((3, 4, 4), index % 256, dtype=torch.uint8)
        pixels[0, 0, 0] = index // 256
        good = {"target": pixels, "label": index % 2, "caption": f"caption {index}"}
        return Sample(key=self.key(index), **{**good, **self.make(index)})


def bad(reason: str) -> dict:
    raise DataError(reason)


def test_good_data_set():
    report = check(Rows(10))
    assert (report.rows, report.read, report.good, report.exit_code) == (10, 10, 10, 0)
    assert report.labels == {0: 5, 1: 5} and report.present == {"label": 10, "text": 10}
    assert report.sizes == {"uint8 3x4x4": 10} and not report.duplicates
    text = str(report)
    assert "10 good, 0 bad" in text and "ant 5, bee 5" in text and "without rows: cow" in text and "9 / 9 / 9" in text


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"target": torch.zeros(3, 4, 5, dtype=torch.uint8)}, "target has shape"),
        ({"target": torch.full((3, 4, 4), 134.0)}, r"float pixels must lie in \[-1, 1\]"),  # H3
        ({"target": torch.full((3, 4, 4), torch.nan)}, "float pixels"),
        ({"label": 3}, r"r1: label 3 must be an integer in 0..2"),
        ({"label": -1}, "label -1"),
        ({"label": 1.0}, "label 1.0"),
        ({"label": "bee"}, "label 'bee'"),
        ({"caption": "  "}, "caption is empty"),
        ({"boxes": torch.tensor([[0.5, 0.5, 0.4, 0.6]])}, "x1 > x0"),
        ({"boxes": torch.tensor([[0.0, 0.0, 30.0, 40.0]])}, r"corners in \[0, 1\]"),
        ({"boxes": torch.tensor([[torch.nan, 0, 1, 1]])}, "NaN"),
        ({"keypoints": torch.tensor([[2.0, 0], [0, 0]]), "visible": torch.tensor([True, True])}, "keypoints"),
        ({"keypoints": torch.zeros(3, 2), "visible": torch.ones(3, dtype=torch.bool)}, "keypoints has shape"),
        ({"image": torch.zeros(3, 4, 4)}, "image has shape"),
        ({"image": torch.full((1, 4, 4), 255.0)}, "image spans"),
    ],
)
def test_wrong_rows_are_found(fields, reason):
    report = check(Rows(3, lambda index: fields if index == 1 else {}))
    assert list(report.bad) == ["r1"] and report.good == 2
    with pytest.raises(DataError, match=reason):
        raise DataError(report.bad["r1"])
    assert report.exit_code == 0  # one bad row is quarantined, not fatal


def test_reasons_are_grouped_with_the_most_frequent_first():
    def make(index: int) -> dict:
        if index < 5:
            return bad(f"r{index}: the file is cut at byte {index * 100}")
        return bad(f"r{index}: missing") if index < 7 else {}

    report = check(Rows(20, make))
    assert [(count, key) for _, count, key in report.reasons()] == [(5, "r0"), (2, "r5")]
    assert str(report).index("5 x the file is cut") < str(report).index("2 x missing (such as r5)")


@pytest.mark.parametrize(("wrong", "code"), [(100, 0), (101, 3)])
def test_too_many_bad_rows_is_exit_status_3(wrong, code):
    """D15: more than 100 rows and more than 1 %."""
    report = check(Rows(400, lambda index: bad("broken") if index < wrong else {}))
    assert report.exit_code == code and ("TOO MANY" in str(report)) == bool(code)


def test_nothing_good_or_nothing_at_all_is_exit_status_3():
    assert check(Rows(2, lambda index: bad("broken"))).exit_code == 3
    assert check(Rows(0)).exit_code == 3


def test_duplicates_and_leaks():
    same = torch.full((3, 4, 4), 200, dtype=torch.uint8)
    train = Rows(6, lambda index: {"target": same} if index in (1, 4) else {})
    test = Rows(3, lambda index: {"target": same if index == 2 else same // (index + 2)}, prefix="t")
    report = check(train, other=test)
    assert report.duplicates == [["r1", "r4"]] and report.leaks == [("r1", "t2")]
    assert "r1 = r4" in str(report) and "LEAK" in str(report)
    assert check(train, other=Rows(2)).leaks == [("r0", "r0"), ("r1", "r1")]


def test_limit_spreads_over_the_data_set():
    report = check(Rows(100, lambda index: bad("late") if index >= 90 else {}), limit=10)
    assert report.read == 10 and report.rows == 100 and list(report.bad) == ["r90"]
    assert check(Rows(3), limit=10).read == 3


def test_equal_numbers_of_another_shape_are_no_duplicates():
    report = check(Rows(2, lambda index: {"target": torch.zeros(3, 4, 4, dtype=(torch.uint8, torch.float32)[index])}))
    assert report.duplicates == []
