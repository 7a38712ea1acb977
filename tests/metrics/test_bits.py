"""Bits per dimension: known distributions, the importance-weighted bound, exact pixels, and processes."""

import math

import pytest
import torch

from condgen.errors import ConfigError, DataError, DivergedError, ShapeError
from condgen.metrics.likelihood import bits_per_dim, exact_pixels, has_bits, histogram_bits
from condgen.metrics.signature import comparable, parse
from condgen.pixels import pixels_to_float
from condgen.rng import RowRandom
from condgen.types import Condition

LN2 = math.log(2)


def pictures(rows=12, channels=3, side=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(rows, channels, side, side, generator=generator).square() * 256).to(torch.uint8)


class Table(torch.nn.Module):
    """One probability for each level of each channel: exact."""

    likelihood, dequantisation = "exact", "none"

    def __init__(self, probabilities):
        super().__init__()
        self.log_p = torch.nn.Parameter(probabilities.log())  # (C, 256)
        self.asked, self.largest = 0, 0

    def log_prob(self, target, condition, *, random):
        self.asked, self.largest = self.asked + 1, max(self.largest, len(target))
        assert not torch.is_grad_enabled() and not self.training
        levels = ((target + 1) * 127.5).round().long()
        rows = [self.log_p[c][levels[:, c]].flatten(1).sum(1) for c in range(levels.shape[1])]
        return torch.stack(rows).sum(0)


class Bounded(torch.nn.Module):
    """Importance weights exp(s eps - s^2 / 2) p, of mean p: log p is known."""

    likelihood, dequantisation = "lower bound (ELBO)", "interval"

    def __init__(self, spread=1.5):
        super().__init__()
        self.spread, self.anchor = spread, torch.nn.Parameter(torch.zeros(()))

    def log_prob(self, target, condition, *, random):
        noise = random.randn()
        given = 0.0 if condition.label is None else condition.label.float()
        return self.spread * noise - self.spread**2 / 2 - 8 * LN2 * target[0].numel() + given


def test_the_uniform_model_has_8_bits_exactly():
    model = Table(torch.full((3, 256), 1 / 256, dtype=torch.float64))
    score = bits_per_dim(model, pictures())
    assert score.value == pytest.approx(8, abs=1e-12) and score.error == pytest.approx(0, abs=1e-12)
    assert score.floor == 8 and not score.higher_is_better and score.ceiling is None
    assert model.training  # as it was


def test_a_fitted_histogram_has_its_entropy():
    target = pictures(40)
    counts = torch.stack([torch.bincount(target[:, c].flatten().long(), minlength=256) for c in range(3)]).double()
    p = counts / counts.sum(1, keepdim=True)
    entropy = -(p * p.clamp_min(1e-300).log2()).sum(1).mean()
    score = bits_per_dim(Table(p.clamp_min(1e-300)), target, batch_size=7)
    assert score.value == pytest.approx(float(entropy), abs=1e-9)
    smoothed = -(p * ((counts + 1) / (counts + 1).sum(1, keepdim=True)).log2()).sum(1).mean()
    assert bits_per_dim(Table(p), target, reference=target).floor == pytest.approx(float(smoothed), abs=1e-12)
    assert histogram_bits(target, target) > float(entropy)


class ClipTable(Table):
    """The same of clips (B, T, C, H, W): channels are the third dimension, time is no colour."""

    def log_prob(self, target, condition, *, random):
        assert target.dim() == 5
        return super().log_prob(target.transpose(1, 2), condition, random=random)


@pytest.mark.parametrize(("frames", "channels"), [(2, 3), (5, 1), (3, 3)])
def test_bits_of_clips_are_per_number_of_all_frames(frames, channels):
    target = (torch.rand(9, frames, channels, 4, 4, generator=torch.Generator().manual_seed(3)) ** 2 * 256).byte()
    target[:, 0] //= 2  # frames differ more than colours do: a histogram of each frame would be another code
    uniform = ClipTable(torch.full((channels, 256), 1 / 256, dtype=torch.float64))
    score = bits_per_dim(uniform, target, batch_size=4)
    assert score.value == pytest.approx(8, abs=1e-12) and score.floor == 8
    assert parse(score.signature).fields["dims"] == str(frames * channels * 16)
    colours = target.transpose(1, 2).transpose(0, 1).flatten(1).long()
    p = torch.stack([torch.bincount(row, minlength=256) for row in colours]).double() / colours.shape[1]
    entropy = -(p * p.clamp_min(1e-300).log2()).sum(1).mean()
    asked = Condition(label=torch.zeros(9, dtype=torch.int64))
    fitted = bits_per_dim(ClipTable(p.clamp_min(1e-300)), target, asked, batch_size=2, reference=target)
    assert fitted.value == pytest.approx(float(entropy), abs=1e-9)
    # frames side by side are the same numbers in the same colours
    wide = target.permute(0, 2, 3, 1, 4).flatten(3)
    assert fitted.floor == pytest.approx(histogram_bits(wide, wide), abs=1e-12)
    assert fitted.floor > float(entropy)


def test_rows_are_averaged_and_not_batches():
    """An uneven last batch weighs as many rows as it has."""
    target = pictures(7)
    target[6] = 0
    p = torch.full((3, 256), 1e-3, dtype=torch.float64)
    p[:, 0] = 0.5
    by_one = [bits_per_dim(Table(p), target[i : i + 1]).value for i in range(7)]
    model = Table(p)
    score = bits_per_dim(model, target, batch_size=3)
    assert (model.asked, model.largest) == (3, 3)  # one batch at a time
    assert score.value == pytest.approx(sum(by_one) / 7, abs=1e-12)
    assert score.error == pytest.approx(float(torch.tensor(by_one).double().std()) / math.sqrt(7))
    assert bits_per_dim(model, target[:1]).error is None


def test_more_draws_tighten_the_bound_to_the_truth():
    target, model = pictures(400, 1, 2), Bounded()
    found = [bits_per_dim(model, target, importance=k, batch_size=400).value for k in (1, 5, 50)]
    elbo = 8 + 1.5**2 / 2 / LN2 / 4
    assert found[0] == pytest.approx(elbo, abs=0.1)
    assert found[0] > found[1] > found[2] > 8 - 0.02
    assert found[2] == pytest.approx(8, abs=0.03)


def test_an_exact_system_is_asked_once_and_a_bound_k_times():
    exact = Table(torch.full((3, 256), 1 / 256))
    score = bits_per_dim(exact, pictures(4), importance=9)
    assert exact.asked == 1 and parse(score.signature).fields["draws"] == "1"
    assert parse(bits_per_dim(Bounded(), pictures(4), importance=9).signature).fields["draws"] == "9"


def test_draws_belong_to_rows_whatever_the_batch():
    target, model = pictures(9), Bounded()
    whole = bits_per_dim(model, target, importance=3, batch_size=9, seed=4)
    parts = bits_per_dim(model, target, importance=3, batch_size=2, seed=4)
    assert parts.value == pytest.approx(whole.value, abs=1e-9)
    assert parts.signature == whole.signature
    order = [5, 0, 8, 1, 2, 3, 4, 6, 7]
    moved = bits_per_dim(model, target[order], ids=order, importance=3, seed=4)
    assert moved.value == pytest.approx(whole.value, abs=1e-9)
    assert bits_per_dim(model, target, importance=3, seed=5).value != whole.value


class FakeWorld:
    """Ranks one after the other: collects what each gives, then answers with all of it."""

    def __init__(self, rank, world, given):
        self.rank, self.world, self.given, self.device = rank, world, given, torch.device("cpu")

    def gather(self, tensor):
        self.given[self.rank] = tensor
        return torch.cat([self.given.get(r, torch.zeros_like(tensor)) for r in range(self.world)])


@pytest.mark.parametrize("world", [1, 2, 4, 11])
def test_processes_give_the_score_of_one(world):
    target, model, given = pictures(9), Bounded(), {}
    condition = Condition(label=torch.arange(9))
    for _ in range(2):  # the second time every rank's part is there
        scores = [
            bits_per_dim(model, target, condition, importance=2, world=FakeWorld(rank, world, given))
            for rank in range(world)
        ]
    alone = bits_per_dim(model, target, condition, importance=2)
    assert all(score.value == pytest.approx(alone.value, abs=1e-9) for score in scores)
    assert all(score.error == pytest.approx(alone.error, abs=1e-9) for score in scores)
    assert {score.signature for score in scores} == {alone.signature}


def test_conditions_stay_with_their_rows():
    target = pictures(4)
    model = Bounded(spread=0.0)
    label = torch.tensor([0, 10, 20, 30])
    by_row = bits_per_dim(model, target, Condition(label=label), batch_size=3).value
    assert by_row == pytest.approx(8 - 15 / LN2 / 48, abs=1e-6)


def test_the_signature_holds_what_must_agree():
    target, model = pictures(4), Bounded()
    fields = parse(bits_per_dim(model, target, importance=3, about={"data": "d", "split": "test"}).signature).fields
    assert fields["likelihood"] == "lower bound (ELBO)" and fields["dequantisation"] == "interval"
    assert (fields["draws"], fields["n"], fields["data"], fields["split"], fields["dims"]) == (
        "3",
        "4",
        "d",
        "test",
        "48",
    )
    a, b = (bits_per_dim(model, target, importance=k).signature for k in (1, 2))
    assert comparable(a, b) == ["draws"]


def test_floats_on_the_grid_are_exact_and_others_are_refused():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(exact_pixels(pixels_to_float(every)), exact_pixels(every))
    assert torch.equal(((exact_pixels(every) + 1) * 127.5).round().long(), every.long())
    model = Bounded()
    floats = pixels_to_float(pictures())
    bits_per_dim(model, floats)
    for wrong, says in (
        (floats + 0.5 / 255, "between the 256"),
        (torch.nn.functional.interpolate(floats, 7, mode="bilinear"), "between the 256"),
        (floats * 255, "between the 256|span"),
        (floats + 2 / 255 * 200, "span"),
        (torch.full_like(floats, math.nan), "between the 256"),
    ):
        with pytest.raises(ShapeError, match=says):
            bits_per_dim(model, wrong)


def test_black_and_white_pictures():
    class Even(Bounded):
        def log_prob(self, target, condition, *, random):
            assert bool((target.abs() == 1).all())
            return -LN2 * target[0].numel() + 0 * random.randn()

    target = pictures()
    for how in ("threshold", "dynamic"):
        score = bits_per_dim(Even(), target, binarise=how, reference=target)
        assert score.value == pytest.approx(1, abs=1e-6) and score.floor < 1
        assert parse(score.signature).fields["pixels"] == f"binarised by {how}"
    assert bits_per_dim(Even(), target, binarise="threshold").floor == 1


def test_dynamic_binarisation_is_white_with_the_probability_of_the_grey_level():
    from condgen.metrics.likelihood import as_binary

    grey = torch.full((2000, 1, 2, 2), 51 / 127.5 - 1)
    share = float((as_binary(grey, "dynamic", 0, list(range(2000))) > 0).float().mean())
    assert share == pytest.approx(0.2, abs=0.02)
    one = as_binary(grey[:2], "dynamic", 0, [7, 3])
    assert torch.equal(one, as_binary(grey[:2], "dynamic", 0, [3, 7]).flip(0))
    extremes = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    assert torch.equal(as_binary(extremes, "dynamic", 1, [0, 1]), extremes)


def test_what_cannot_be_scored_is_said():
    class Grey(Bounded):
        likelihood = "none (cross-entropy)"

    target = pictures(3)
    assert has_bits(Bounded()) and not has_bits(Grey()) and not has_bits(torch.nn.Linear(1, 1))
    for model in (Grey(), torch.nn.Linear(1, 1)):
        with pytest.raises(ConfigError, match="gives no likelihood"):
            bits_per_dim(model, target)
    with pytest.raises(ShapeError, match="3 pictures, 2 ids"):
        bits_per_dim(Bounded(), target, ids=[0, 1])
    with pytest.raises(ShapeError, match="2 conditions"):
        bits_per_dim(Bounded(), target, Condition(label=torch.zeros(2, dtype=torch.int64)))
    with pytest.raises(ConfigError, match="importance=0"):
        bits_per_dim(Bounded(), target, importance=0)
    with pytest.raises(DataError, match="at least one"):
        bits_per_dim(Bounded(), target[:0])

    class Broken(Bounded):
        def log_prob(self, target, condition, *, random):
            return torch.full((len(target),), math.nan)

    class Flat(Bounded):
        def log_prob(self, target, condition, *, random):
            return torch.zeros(len(target), 1)

    with pytest.raises(DivergedError, match="NaN"):
        bits_per_dim(Broken(), target)
    with pytest.raises(ShapeError, match=r"\(3, 1\)"):
        bits_per_dim(Flat(), target)


def test_an_impossible_picture_costs_infinitely_many_bits():
    p = torch.zeros(3, 256)
    p[:, 0] = 1
    assert bits_per_dim(Table(p), pictures(3)).value == math.inf


def test_the_noise_streams_are_not_those_of_sampling():
    """A system that samples with seed 0 and is scored with seed 0 must not meet its own noise again."""
    seen = []

    class Recorder(Bounded):
        def log_prob(self, target, condition, *, random):
            seen.append(random.randn(3))
            return torch.zeros(len(target))

    bits_per_dim(Recorder(), pictures(2))
    assert not torch.equal(seen[0], RowRandom(0, [0, 1]).randn(3))
