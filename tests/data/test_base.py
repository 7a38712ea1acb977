"""Batches are a function of their number: resume, workers, ranks and quarantine never change what one holds."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from condgen.data import base
from condgen.data.base import BatchDataset, RowDataset, batches, collate, too_many_bad
from condgen.errors import ConfigError, DataError
from condgen.types import BoxesSpec, ConditionSpec, KeypointsSpec, LabelSpec, Sample, TargetSpec, TextSpec


class Rows(RowDataset):
    """Row i is the number i, plus noise from the generator it is given."""

    def __init__(self, rows: int = 23, bad: tuple[int, ...] = ()) -> None:
        self.rows, self.bad = rows, bad
        self.provides = ConditionSpec(label=LabelSpec(1000), text=TextSpec())
        self.target = TargetSpec(1, 2, 2)

    def __len__(self) -> int:
        return self.rows

    def key(self, index: int) -> str:
        return str(index)

    def sample(self, index: int, random: torch.Generator | None) -> Sample:
        if index in self.bad:
            raise DataError(f"{index} is broken")
        noise = torch.rand(1, 2, 2, generator=random)
        return Sample(key=str(index), target=noise * 0.5, label=index, caption=f"row {index}")


def loader(data: RowDataset, **options: int) -> BatchDataset:
    return BatchDataset(data, data.provides, **{"batch_size": 4, "seed": 7, **options})


def same(one: base.Loaded, two: base.Loaded) -> bool:
    a, b = one.batch, two.batch
    return (
        a.keys == b.keys
        and torch.equal(a.target, b.target)
        and torch.equal(a.condition.label, b.condition.label)
        and a.condition.text.strings == b.condition.text.strings
        and one.quarantined == two.quarantined
    )


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), batch=st.integers(1, 9), seed=st.integers(0, 99))
def test_every_epoch_is_a_permutation(rows, batch, seed):
    data = loader(Rows(rows), batch_size=batch, seed=seed)
    stream = [key for number in range(3 * rows // batch + 1) for key in data[number].batch.keys]
    epochs = [stream[e * rows : (e + 1) * rows] for e in range(3)]
    for epoch in epochs:
        assert len(epoch) < rows or sorted(map(int, epoch)) == list(range(rows))
    if rows > 20:
        assert epochs[0] != epochs[1]


def test_order_and_augmentation_depend_on_the_seed():
    one, two = loader(Rows())[0], loader(Rows(), seed=8)[0]
    assert one.batch.keys != two.batch.keys and not torch.equal(one.batch.target, two.batch.target)


def test_a_row_is_augmented_anew_in_each_epoch():
    data = loader(Rows(4))
    first, second = data[0].batch, data[1].batch
    a, b = first.keys.index("2"), second.keys.index("2")
    assert not torch.equal(first.target[a], second.target[b])


def test_any_start_gives_the_same_batches():
    """Resume: batch g is the same whether or not the batches before it were made, in any order."""
    straight = [loader(Rows())[number] for number in range(14)]
    data = loader(Rows())
    for number in (13, 0, 6, 5, 13):
        assert same(data[number], straight[number])
    resumed = list(batches(loader(Rows()), start=9, stop=14))
    assert len(resumed) == 5 and all(same(a, b) for a, b in zip(resumed, straight[9:], strict=True))


def test_workers_do_not_change_the_batches():
    plain = list(batches(loader(Rows(bad=(3,))), start=2, stop=12))
    with_two = list(batches(loader(Rows(bad=(3,))), start=2, stop=12, workers=2))
    assert len(plain) == 10 and all(same(a, b) for a, b in zip(plain, with_two, strict=True))


def test_loader_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    list(batches(loader(Rows()), start=0, stop=2))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_hold_the_rows_of_one_large_batch(world):
    """W ranks at B hold, in order, what 1 rank holds at W*B; augmentation included."""
    whole = loader(Rows(), batch_size=4 * world)
    ranks = [loader(Rows(), rank=r, world=world) for r in range(world)]
    for number in range(8):
        parts = [rank[number].batch for rank in ranks]
        assert sum((p.keys for p in parts), ()) == whole[number].batch.keys
        assert torch.equal(torch.cat([p.target for p in parts]), whole[number].batch.target)


# quarantine


def test_bad_rows_are_replaced_deterministically():
    clean, data = loader(Rows()), loader(Rows(bad=(2, 11)))
    seen = set()
    for number in range(12):
        loaded = data[number]
        assert len(loaded.batch) == 4 and not {"2", "11"} & set(loaded.batch.keys)
        assert same(loaded, loader(Rows(bad=(2, 11)))[number])
        for at, (key, before) in enumerate(zip(loaded.batch.keys, clean[number].batch.keys, strict=True)):
            if before not in ("2", "11"):
                assert key == before  # nothing else moves
            else:
                epoch_position = number * 4 + at + 1
                following = clean[epoch_position // 4].batch.keys[epoch_position % 4]
                assert key == following or following in ("2", "11")
        seen |= {(q.key, q.reason) for q in loaded.quarantined}
    assert seen == {("2", "2 is broken"), ("11", "11 is broken")}


def test_nothing_but_bad_rows_is_an_error_with_reasons():
    with pytest.raises(DataError, match=r"0 is broken.*check-data"):
        loader(Rows(1, bad=(0,)))[0]


def test_other_errors_are_not_hidden():
    class Broken(Rows):
        def sample(self, index: int, random: torch.Generator | None) -> Sample:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loader(Broken())[0]


def test_empty_data_set():
    with pytest.raises(DataError, match="empty"):
        loader(Rows(0))


@pytest.mark.parametrize(
    ("bad", "rows", "stop"),
    [(0, 10, False), (9, 10, False), (10, 10, True), (100, 5000, False), (101, 5000, True), (400, 50_000, False),
     (501, 50_000, True)],
)  # fmt: skip
def test_too_many_bad(bad, rows, stop):
    assert too_many_bad(bad, rows) is stop


# collate


SPEC = ConditionSpec(label=LabelSpec(3), boxes=BoxesSpec(2, 5), keypoints=KeypointsSpec(2), text=TextSpec())
PIXELS = torch.zeros(1, 2, 2)


@pytest.mark.parametrize("label", [3, -1, 1.0, "cat"])
def test_wrong_labels_name_the_row_and_the_range(label):
    """D11."""
    with pytest.raises(DataError, match=r"row x: label .* must be an integer in 0\.\.2"):
        collate([Sample("x", PIXELS, label=label)], SPEC)


def test_missing_fields_are_null_and_absent():
    full = Sample("a", PIXELS, label=2, caption="c", boxes=torch.tensor([[0.0, 0, 1, 1]]), box_labels=torch.tensor([4]),
                  keypoints=torch.rand(2, 2), visible=torch.ones(2, dtype=torch.bool))  # fmt: skip
    batch = collate([full, Sample("b", PIXELS)], SPEC)
    for name in SPEC.given:
        assert batch.condition.is_present(name).tolist() == [True, False]
    assert batch.condition.label.tolist() == [2, -1] and batch.condition.text.strings == ("c", "")
    assert batch.condition.boxes.valid.tolist() == [[True, False], [False, False]]
    assert batch.condition.boxes.label.tolist() == [[4, 0], [0, 0]]
    assert batch.condition.keypoints.visible.tolist() == [[True, True], [False, False]]


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_boxes_are_padded_and_cut(counts):
    """D12: none, some, or more than fit."""
    rows = [Sample(str(i), PIXELS, boxes=torch.rand(n, 4), box_labels=torch.arange(n)) for i, n in enumerate(counts)]
    boxes = collate(rows, SPEC.only(["boxes"])).condition.boxes
    assert boxes.valid.sum(1).tolist() == [min(n, 2) for n in counts]
    for row, sample in enumerate(rows):
        n = min(len(sample.boxes), 2)
        assert torch.equal(boxes.xyxy[row, :n], sample.boxes[:n]) and bool((boxes.xyxy[row, n:] == 0).all())


def test_shapes_that_differ_name_the_row():
    rows = [Sample("a", PIXELS, label=0), Sample("odd", torch.zeros(3, 2, 2), label=0)]
    with pytest.raises(DataError, match=r"row odd: target has shape \(3, 2, 2\)"):
        collate(rows, ConditionSpec(label=LabelSpec(1)))


def test_uint8_and_float_rows_do_not_mix():
    """Stacking them would give float pixels in 0..255."""
    rows = [Sample("a", PIXELS, label=0), Sample("odd", torch.full((1, 2, 2), 200, dtype=torch.uint8), label=0)]
    with pytest.raises(DataError, match=r"row odd: target has dtype torch\.uint8"):
        collate(rows, ConditionSpec(label=LabelSpec(1)))


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (torch.full((1, 2, 2), 134.0), r"target spans \[134, 134\]; float pixels must lie in \[-1, 1\]"),
        (torch.full((1, 2, 2), 1.01), "float pixels"),
        (torch.full((1, 2, 2), torch.nan), "float pixels"),
        (torch.zeros(3, 2, 2), r"target has shape \(3, 2, 2\); the data set says \(1, 2, 2\)"),
        (torch.zeros(1, 2, 3), "target has shape"),
        (torch.zeros(1, 1, 2, 2), "target has shape"),  # a clip of one frame is not a picture
    ],
)
def test_rows_that_are_not_what_the_data_set_promises_never_reach_training(pixels, reason):
    """H2, H3, H5, D6: one such row is quarantined, a data set of them is an error."""

    class Odd(Rows):
        def sample(self, index: int, random: torch.Generator | None) -> Sample:
            found = super().sample(index, random)
            return replace(found, target=pixels) if index in self.odd else found

    data = Odd(8)
    data.odd = {3}
    loaded = loader(data, batch_size=8)[0]
    (bad,) = loaded.quarantined
    assert bad.key == "3" and re.search(reason, bad.reason) and loaded.batch.target.shape == (8, 1, 2, 2)
    data.odd = set(range(8))
    with pytest.raises(DataError, match=reason):
        loader(data)[0]


@pytest.mark.parametrize("value", [torch.full((1, 2, 2), 1.0005), torch.full((1, 2, 2), 255, dtype=torch.uint8)])
def test_pixels_in_range_pass(value):
    class Fine(Rows):
        def sample(self, index: int, random: torch.Generator | None) -> Sample:
            return replace(super().sample(index, random), target=value)

    assert loader(Fine())[0].quarantined == ()


@pytest.mark.parametrize("given", ["soon", "0", "-1", "nan", "inf"])
def test_a_wait_that_is_no_time_is_refused(monkeypatch, given):
    monkeypatch.setenv("CONDGEN_TIMEOUT_SECONDS", given)
    with pytest.raises(ConfigError, match="CONDGEN_TIMEOUT_SECONDS"):
        batches(loader(Rows()), start=0, stop=2, workers=1)
    assert len(batches(loader(Rows()), start=0, stop=2)) == 2  # nobody waits for this process


def test_the_last_rows_of_an_epoch_are_joined_with_the_first_of_the_next():
    """H4: there is no smaller last batch, which batch norm would see."""
    data = loader(Rows(5), batch_size=4)
    assert [len(data[number].batch) for number in range(5)] == [4] * 5


def test_keys_are_known_without_reading():
    data = loader(Rows(bad=(3,)), rank=1, world=2)
    assert data.keys(2) == [str(data.row(position)[1]) for position in range(20, 24)]
    clean = loader(Rows(), rank=1, world=2)
    assert tuple(clean.keys(2)) == clean[2].batch.keys


def test_pixels_given_as_0_to_255_floats_are_refused():
    """H3: the check that `condgen check-data` runs on every row."""
    from condgen.errors import ShapeError
    from condgen.types import ImageSpec

    spec = ConditionSpec(image=ImageSpec(1, 2, 2))
    for value, fine in ((1.0, True), (1.0005, True), (1.01, False), (134.0, False), (torch.nan, False)):
        condition = collate([Sample("a", PIXELS, image=torch.full((1, 2, 2), value))], spec).condition
        if fine:
            condition.check_values()
        else:
            with pytest.raises(ShapeError, match=r"\[-1, 1\]"):
                condition.check_values()
