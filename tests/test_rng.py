"""Randomness is a function of names: rows do not depend on batches, nor numbers on the count of processes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from condgen import rng

DRAWS = [("randn", (3,)), ("rand", (2, 2)), ("randint", (7, 4)), ("randn", ())]


def draw_all(random):
    return [getattr(random, name)(*arguments) for name, arguments in DRAWS]


@given(st.lists(st.one_of(st.integers(), st.text(max_size=5)), max_size=4))
@settings(max_examples=100, deadline=None)
def test_derive_fits_a_seed_and_depends_on_order(parts):
    seed = rng.derive(*parts)
    assert 0 <= seed < 2**63 and seed == rng.derive(*parts)
    if [str(p) for p in parts] != [str(p) for p in reversed(parts)]:
        assert seed != rng.derive(*reversed(parts))


def test_derive_does_not_run_parts_together():
    assert (
        len({rng.derive("ab", "c"), rng.derive("a", "bc"), rng.derive("abc"), rng.derive(1, 23), rng.derive(12, 3)})
        == 5
    )


def test_derive_is_the_same_in_every_release():
    """Stored seeds must keep their meaning; a change here breaks every published sample."""
    assert rng.derive(0, "sample", 1) == 7701829227574290271


def test_a_step_is_a_function_of_its_names():
    for a, b in zip(
        draw_all(rng.StepRandom(0, 5, "g", rows=4)), draw_all(rng.StepRandom(0, 5, "g", rows=4)), strict=True
    ):
        assert torch.equal(a, b)
    assert not torch.equal(rng.StepRandom(0, 5, "g", rows=4).randn(3), rng.StepRandom(0, 5, "d", rows=4).randn(3))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_hold_slices_of_the_single_process_batch(world):
    rows = 4
    whole = draw_all(rng.StepRandom(0, 7, "g", rows=rows * world))
    ranks = [draw_all(rng.StepRandom(0, 7, "g", rows=rows, rank=r, world=world)) for r in range(world)]
    for index, value in enumerate(whole):
        assert torch.equal(torch.cat([rank[index] for rank in ranks]), value)


def test_local_streams_differ_between_ranks():
    one, two = (rng.StepRandom(0, 7, "g", rows=4, rank=r, world=2).local for r in range(2))
    assert not torch.equal(torch.rand(3, generator=one), torch.rand(3, generator=two))


@given(ids=st.lists(st.integers(0, 50), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_row_i_depends_on_seed_and_id_alone(ids):
    together = draw_all(rng.RowRandom(3, ids))
    for row, i in enumerate(ids):
        for alone, value in zip(draw_all(rng.RowRandom(3, [i])), together, strict=True):
            assert torch.equal(alone[0], value[row])


def test_rows_differ_and_continue_their_stream():
    random = rng.RowRandom(3, [0, 1])
    first, second = random.randn(5), random.randn(5)
    assert not torch.equal(first[0], first[1]) and not torch.equal(first, second)
    assert not torch.equal(rng.RowRandom(4, [0, 1]).randn(5), first)
    assert len(random) == random.rows == 2


def test_shapes_and_ranges():
    for random in (rng.StepRandom(0, rows=500), rng.RowRandom(0, range(500))):
        assert random.randn(2, 3).shape == (500, 2, 3)
        uniform, integers = random.rand(2), random.randint(5, 2)
        assert uniform.min() >= 0 and uniform.max() < 1 and integers.dtype == torch.int64
        assert set(integers.flatten().tolist()) == set(range(5))


def test_permutation_is_a_function_of_its_names():
    a = rng.permutation(100, 0, "epoch", 1)
    assert torch.equal(a.sort().values, torch.arange(100)) and torch.equal(a, rng.permutation(100, 0, "epoch", 1))
    assert not torch.equal(a, rng.permutation(100, 0, "epoch", 2))


def test_nothing_reads_the_global_generator():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    draw_all(rng.StepRandom(0, rows=4)), draw_all(rng.RowRandom(0, [1])), rng.permutation(5, 1)
    assert torch.equal(torch.get_rng_state(), state)
