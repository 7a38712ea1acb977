"""Row i of a sampling call depends on (seed, id, condition row) and on nothing else."""

from pathlib import Path

import pytest
import torch

from condgen import registry
from condgen.errors import ConfigError, DivergedError, ShapeError
from condgen.inference.sample import rows_of_rank, sample_chunks, sample_over, sample_rows
from condgen.pixels import pixels_to_uint8
from condgen.systems.base import System
from condgen.types import Condition, ConditionSpec, LabelSpec, TargetSpec

PROJECT = Path(__file__).parents[1] / "toy_project"
TARGET = TargetSpec(3, 8, 8)
LABELS = torch.tensor([0, 1, 2, 3, 0, 1, 2])


@pytest.fixture
def make(monkeypatch):
    monkeypatch.setenv("CONDGEN_PROJECT", str(PROJECT))

    def make(**options) -> System:
        torch.manual_seed(0)
        spec = ConditionSpec(label=LabelSpec(4))
        system = registry.load("systems", "toy", System)(condition=spec, target=TARGET, **options)
        with torch.no_grad():
            for module in system.modules():
                if isinstance(module, torch.nn.BatchNorm1d):
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 2)
        return system.train()

    return make


def draw(system, ids=range(7), labels=LABELS, **options):
    return sample_rows(system, Condition(label=labels), seed=3, ids=list(ids), **options)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_rows_do_not_depend_on_the_batch_size(make, batch_size):
    system = make()
    whole, parts = draw(system, batch_size=7), draw(system, batch_size=batch_size)
    assert whole.shape == (7, 3, 8, 8) and whole.dtype == torch.float32
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
    assert torch.equal(pixels_to_uint8(parts), pixels_to_uint8(whole))


def test_rows_follow_their_ids_and_conditions_in_any_order(make):
    system, order = make(), torch.tensor([5, 0, 3])
    whole = draw(system)
    some = draw(system, ids=order.tolist(), labels=LABELS[order], batch_size=2)
    torch.testing.assert_close(some, whole[order], atol=1e-5, rtol=0)


def test_id_seed_and_condition_each_matter(make):
    system = make()
    base = draw(system, ids=[0], labels=LABELS[:1])
    other = {
        "id": draw(system, ids=[1], labels=LABELS[:1]),
        "label": draw(system, ids=[0], labels=LABELS[1:2]),
        "seed": sample_rows(system, Condition(label=LABELS[:1]), seed=4, ids=[0]),
    }
    for what, pixels in other.items():
        assert (pixels - base).abs().max() > 0.01, what


def test_the_caller_finds_everything_as_it_was(make):
    system = make()
    system.critic.eval()
    modes = [m.training for m in system.modules()]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    pixels = draw(system)
    assert [m.training for m in system.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled() and not pixels.requires_grad
    buffers = {k: v.clone() for k, v in system.named_buffers()}
    draw(system)
    assert all(torch.equal(v, buffers[k]) for k, v in system.named_buffers())


def test_modes_come_back_after_an_error(make):
    system = make(broken="nan")
    with pytest.raises(DivergedError, match="NaN"):
        draw(system)
    assert all(m.training for m in system.modules())


def test_the_generator_of_chunks_leaves_the_system_in_training_between_chunks(make):
    system = make()
    chunks = sample_chunks(system, Condition(label=LABELS), seed=3, ids=range(7), batch_size=4)
    rows, _ = next(chunks)
    assert rows == slice(0, 4) and system.training
    assert next(chunks)[0] == slice(4, 7)


def test_full_precision_also_inside_autocast(make):
    system = make()
    whole = draw(system)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(draw(system), whole)
    half = draw(system, precision="bf16")
    assert half.dtype == torch.float32 and not torch.equal(half, whole)
    torch.testing.assert_close(half, whole, atol=0.1, rtol=0)


def test_a_sampler_may_take_gradients(make):
    system = make()

    def refine(condition, *, random):
        with torch.enable_grad():
            noise = random.randn(4).requires_grad_()
            energy = system.generator(noise, condition).square().sum()
            (slope,) = torch.autograd.grad(energy, noise)
        return system.generator(noise - 0.1 * slope, condition)

    system.sample = refine
    assert draw(system).shape == (7, 3, 8, 8)


def test_options_reach_the_sampler_and_no_rows_give_no_rows(make):
    system = make()
    assert torch.allclose(draw(system, shift=0.5) - draw(system), torch.tensor(0.5))
    assert sample_rows(system, Condition(), seed=0, ids=[]).shape == (0, 3, 8, 8)


class FakeWorld:
    """Ranks one after the other: collects what each gives, then answers with all of it."""

    def __init__(self, rank, world, given):
        self.rank, self.world, self.given, self.device = rank, world, given, torch.device("cpu")

    def gather(self, tensor):
        self.given[self.rank] = tensor
        return torch.cat([self.given.get(r, torch.full_like(tensor, 9)) for r in range(self.world)])


@pytest.mark.parametrize("world", [1, 2, 3, 9])
def test_sampling_over_processes_equals_one_process(make, world):
    system, given = make(), {}
    for _ in range(2):  # the second time every rank's part is there
        for rank in range(world):
            every = sample_over(
                FakeWorld(rank, world, given), system, Condition(label=LABELS), seed=3, ids=list(range(7)), batch_size=2
            )
    torch.testing.assert_close(every, draw(system), atol=1e-5, rtol=0)
    assert sorted(i for r in range(world) for i in rows_of_rank(7, r, world)) == list(range(7))


def test_errors_name_what_is_wrong(make):
    system = make()
    with pytest.raises(ShapeError, match="7 rows and there are 2 ids"):
        draw(system, ids=[0, 1])
    with pytest.raises(ConfigError, match="batch_size is 0"):
        draw(system, batch_size=0)
    with pytest.raises(ConfigError, match="fp32, bf16"):
        draw(system, precision="fp8")
    with pytest.raises(ShapeError, match=r"\(7, 3, 8, 7\)"):
        draw(make(broken="shape"))
