"""Scores of sets: closed forms, published formulas by brute force, tiles, several processes, one pass for all."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

from condgen.errors import ConfigError, DataError
from condgen.metrics import extractors, inception_score, kept, manifold, neighbours, parzen, quality
from condgen.metrics.signature import parse

ABOUT = {"data": "toy#1", "split": "test"}


def features(count, dim=6, seed=0, shift=0.0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) + shift


# inception score


def test_inception_score_golden_value_and_bounds():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.25, 0.25, 0.5], [0.6, 0.3, 0.1]], dtype=torch.float64)
    made = inception_score.inception_score(p.log(), splits=1, seed=None)
    assert made.value == pytest.approx(1.233555010, abs=1e-9) and made.error == 0
    assert inception_score.inception_score(p.log() + 7, splits=1).value == pytest.approx(1.233555010, abs=1e-9)
    sure = torch.eye(5).repeat(4, 1) * 100  # every class, each for sure: K
    assert inception_score.inception_score(sure, splits=1).value == pytest.approx(5, abs=1e-9)
    assert inception_score.inception_score(torch.zeros(20, 5)).value == pytest.approx(1, abs=1e-12)


def test_inception_score_splits_and_blocks(monkeypatch):
    logits = features(103, 7) * 3
    whole = inception_score.inception_score(logits, splits=5, seed=None)
    by_hand = []
    for i in range(5):
        p = logits[i * 103 // 5 : (i + 1) * 103 // 5].double().softmax(1)
        by_hand.append(float((p * (p / p.mean(0)).log()).sum(1).mean().exp()))
    assert whole.value == pytest.approx(np.mean(by_hand), abs=1e-12)
    assert whole.error == pytest.approx(np.std(by_hand), abs=1e-12)
    monkeypatch.setattr(inception_score, "BLOCK", 4)
    assert inception_score.inception_score(logits, splits=5, seed=None).value == pytest.approx(whole.value, abs=1e-12)
    assert inception_score.inception_score(logits, splits=5, seed=1).value != whole.value
    with pytest.raises(DataError, match="at least 20"):
        inception_score.inception_score(logits[:19])


# precision, recall, density, coverage


def prdc(real, fake, k):
    """The formulas of Naeem et al.'s prdc package, distances by subtraction."""
    d = lambda a, b: np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))  # noqa: E731
    radius = lambda x: np.partition(d(x, x), k, axis=1)[:, k]  # noqa: E731
    real_radius, fake_radius, cross = radius(real), radius(fake), d(real, fake)
    return {
        "precision": (cross < real_radius[:, None]).any(axis=0).mean(),
        "recall": (cross < fake_radius[None]).any(axis=1).mean(),
        "density": (1.0 / k) * (cross < real_radius[:, None]).sum(axis=0).mean(),
        "coverage": (cross.min(axis=1) < real_radius).mean(),
    }


@pytest.mark.parametrize(("rows", "columns"), [(1024, 4096), (7, 11)])
def test_manifold_equals_the_prdc_formulas_in_any_tile(monkeypatch, rows, columns):
    monkeypatch.setattr(neighbours, "ROWS", rows)
    monkeypatch.setattr(neighbours, "COLUMNS", columns)
    real, fake = features(60, seed=1), features(60, seed=2, shift=0.7)
    made = manifold.manifold(real, fake, k=5, k_density=5)
    for name, expected in prdc(real.double().numpy(), fake.double().numpy(), 5).items():
        assert getattr(made, name) == pytest.approx(expected, abs=1e-12), name
    assert 0.1 < made.precision < 0.99 and made.precision != made.recall


def test_manifold_limits():
    x = features(50)
    same = manifold.manifold(x, x.clone())
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    far = manifold.manifold(x, features(50, seed=1, shift=1000.0))
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)
    one = manifold.manifold(x, x[:1].expand(50, -1))  # one real picture again and again
    assert one.precision == 1 and one.recall <= 0.02 and one.coverage < 0.5
    with pytest.raises(DataError, match="neighbour"):
        manifold.manifold(x[:5], x[:5])


def test_manifold_scores_are_those_of_each_set_alone():
    fake, real, other, noise = (features(60, seed=i, shift=0.3 * i) for i in range(4))
    scores = {s.name: s for s in manifold.manifold_scores(fake, real, other, noise, fields=ABOUT)}
    for where, of in (("value", fake), ("ceiling", other), ("floor", noise)):
        alone = asdict(manifold.manifold(real, of))
        assert {name: getattr(scores[name], where) for name in alone} == pytest.approx(alone)


def test_manifold_of_one_distribution_covers_what_is_expected():
    made = manifold.manifold(features(2000, 32, seed=1), features(2000, 32, seed=2))
    assert made.coverage == pytest.approx(0.974, abs=0.01) and made.density == pytest.approx(1.005, abs=0.05)


# Parzen


def test_parzen_golden_values():
    samples = torch.tensor([[0.0, 0], [1, 1]])
    made = parzen.parzen_log_likelihood(samples, torch.tensor([[0.5, 0.5], [0, 1.0]]), 0.2)
    assert made.tolist() == pytest.approx([-4.8690012415, -11.1190012415], abs=1e-9)


def test_parzen_is_a_density_and_sigma_is_chosen_by_validation(monkeypatch):
    samples = features(40, 1)
    grid = torch.linspace(-8, 8, 4001)[:, None]
    for columns in (4096, 7):
        monkeypatch.setattr(neighbours, "COLUMNS", columns)
        mass = parzen.parzen_log_likelihood(samples, grid, 0.3).exp().sum() * 16 / 4000
        assert float(mass) == pytest.approx(1, abs=1e-4)
    points = features(400, 4, seed=3)
    best = parzen.choose_sigma(features(400, 4, seed=2), points, (0.05, 0.4, 5.0))
    assert best == 0.4


def pictures(count, seed=0, side=12, low=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(low, 256, (count, 3, side, side), generator=draw, dtype=torch.uint8)


def smooth(count, seed=0, side=12):
    draw = torch.Generator().manual_seed(seed)
    return torch.nn.functional.interpolate(torch.rand(count, 3, 2, 2, generator=draw) * 2 - 1, size=side)


def test_parzen_score_prints_its_caveat_and_knows_its_ends():
    real, train = smooth(40, 1), smooth(60, 2)
    noise = torch.rand(60, 3, 12, 12, generator=torch.Generator().manual_seed(3)) * 2 - 1
    (made,) = parzen.parzen_scores(smooth(60, 5), real, train, noise, fields=ABOUT)
    assert made.floor < made.value < made.ceiling + 100 and "Theis" in made.note and "sigma" in made.note
    fields = parse(made.signature).fields
    assert (fields["valid"], fields["ref"], fields["dims"], fields["sigmas"]) == ("20", "20", "432", "0.1..1x10")


# memorisation


def test_nearest_in_any_tile(monkeypatch):
    a, b = features(30, seed=1), features(50, seed=2)
    b[17] = a[3]
    expected = torch.cdist(a.double(), b.double()).min(1)
    for rows, columns in ((1024, 4096), (7, 11)):
        monkeypatch.setattr(neighbours, "ROWS", rows)
        monkeypatch.setattr(neighbours, "COLUMNS", columns)
        distance, which = neighbours.nearest(a, b)
        assert torch.equal(which, expected.indices) and which[3] == 17 and distance[3] == 0
        torch.testing.assert_close(distance, expected.values, atol=1e-6, rtol=1e-9)


def test_memorisation_between_a_new_generator_and_a_copier():
    train, real, noise = features(400, seed=1), features(300, seed=2), features(300, seed=3) * 4
    new, copies = features(300, seed=4), train[:300]
    half = torch.cat([new[:150], copies[:150]])
    made = [
        {s.name: s for s in neighbours.memorisation_scores(x, real, train, noise, fields=ABOUT)}
        for x in (new, half, copies)
    ]
    nearer = [m["nearer_than_real"].value for m in made]
    assert nearer[0] == pytest.approx(0.5, abs=0.06) and nearer[2] == 1 == made[0]["nearer_than_real"].floor
    assert nearer[1] == pytest.approx(0.75, abs=0.05)
    assert made[0]["nearer_than_real"].ceiling == pytest.approx(0.5, abs=0.08)
    tail = [m["memorised"].value for m in made]
    assert tail[0] < 0.05 and tail[1] == pytest.approx(0.5, abs=0.04) and tail[2] == 1
    assert "train=400" in made[0]["memorised"].signature and "noise gets 0:" in made[0]["memorised"].note


def test_ties_count_half():
    made = neighbours.memory(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, 2.0]))
    assert made.share == pytest.approx((0.75 + 0.75 + 0.25) / 3)


def test_the_picture_shows_a_copy_beside_its_source():
    train, fake = pictures(20, 1), pictures(10, 2)
    fake[7] = train[4]
    flat = [x.flatten(1).float() for x in (fake, train)]
    image = np.asarray(neighbours.neighbour_picture(fake, train, *flat).convert("RGB"))
    tile = fake[7].permute(1, 2, 0).numpy()
    wide = tile.repeat(8, 0).repeat(8, 1)
    found = sum(
        np.array_equal(image[y : y + 96, x : x + 96], wide)
        for y, x in zip(*np.nonzero((image == wide[0, 0]).all(2)), strict=True)
    )
    assert found == 2  # the sample, and the training picture beside it


# all together


class Counting:
    def __init__(self):
        self.rows = 0

    def __call__(self, pixels):
        self.rows += len(pixels)
        return torch.nn.functional.adaptive_avg_pool2d(pixels.float() / 255, 3).flatten(1)


@pytest.fixture
def network(monkeypatch, tmp_path):
    monkeypatch.setenv("CONDGEN_CACHE", str(tmp_path))
    counting = Counting()
    head = torch.randn(27, 5, generator=torch.Generator().manual_seed(0))
    made = extractors.Extractor(
        "counting", "1", "area-3", counting, torch.device("cpu"), head=lambda x: x @ head
    )  # fmt: skip
    monkeypatch.setattr(quality, "extractor", lambda name, **more: made)
    return counting


def scores(**more):
    given = {"metrics": ["all"], "train_pictures": smooth(50, 3), **more}
    return quality.quality_scores(smooth(30, 1), smooth(20, 2), smooth(50, 3)[:25], name="x", about=ABOUT, **given)


def test_one_pass_feeds_every_score_and_real_features_are_kept(network):
    first = scores()
    assert network.rows == 30 + 20 + 50 + 30  # samples, held-out, training pictures, noise: each once
    assert [s.name for s in first] == [
        "kid", "is", "precision", "recall", "density", "coverage", "nearer_than_real", "memorised",
        "nearer_than_real/pixels", "memorised/pixels", "ms_ssim/any", "parzen",
    ]  # fmt: skip
    assert scores() == first and network.rows == 130 + 30  # the samples alone
    for one in first:
        assert one.floor is not None and one.ceiling is not None and parse(one.signature).metric == one.name
    assert parse(first[1].signature).fields["head"] == "counting#1"


def test_damaged_features_are_made_again_and_few_sets_are_kept(network, tmp_path, monkeypatch):
    first = scores()
    for file in (tmp_path / "features").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:40])
    assert scores() == first and network.rows == 2 * 130
    monkeypatch.setattr(kept, "MOST_SETS", 2)
    kept.write_features(tmp_path / "features", "one", torch.zeros(2, 3))
    assert len(list((tmp_path / "features").iterdir())) == 2
    a, b = pictures(4, 1), pictures(4, 2)
    assert kept.name_of(a, "x") == kept.name_of(a.clone(), "x") != kept.name_of(b, "x")
    assert kept.name_of(a, "x") not in (kept.name_of(a, "y"), kept.name_of(a.view(4, 3, 24, 6), "x"))


def test_names_of_scores_are_checked_and_fid_is_forced_by_name_only(network):
    with pytest.raises(ConfigError, match="no score 'fdi'"):
        scores(metrics=["fdi"])
    assert scores(metrics=["fid"]) == []
    (forced,) = scores(metrics=["fid"], force_fid=True)
    assert forced.ceiling < forced.value + 1 and forced.floor > forced.ceiling
    assert "forced=below 2048" in forced.signature and "bias" in forced.note
    (plain,) = scores(metrics=["kid"])
    assert "no FID" not in plain.note and "95 % interval" in plain.note
    with pytest.raises(DataError, match="begin"):
        scores(train_pictures=smooth(50, 4))


class Rank:
    """One of `world` processes that run one after the other; what they gather is put together from a first round."""

    def __init__(self, rank, world, held):
        self.rank, self.world, self.held, self.calls = rank, world, held, 0
        self.device = torch.device("cpu")

    def gather(self, tensor):
        parts = self.held.setdefault(self.calls, [None] * self.world)
        parts[self.rank] = tensor
        self.calls += 1
        return torch.cat([tensor if part is None else part for part in parts])


def test_every_process_looks_at_its_share_and_gets_the_same_features(network, tmp_path, monkeypatch):
    made = quality.extractor("x")
    images = pictures(11, 4)
    whole = made.features(images)
    network.rows = 0
    held = {}
    for _ in range(2):
        parts = [quality._features(made, images, Rank(rank, 3, held), keep=False) for rank in range(3)]
    assert network.rows == 2 * 12
    for part in parts:
        assert torch.equal(part, whole)


# KID's interval


def test_the_interval_of_kid_holds_the_truth_about_as_often_as_it_says():
    from condgen.metrics.kernel import kid

    hits = 0
    truth = kid(features(4000, 4, seed=900), features(4000, 4, seed=901, shift=0.5), subsets=4).value
    for seed in range(30):
        x, y = features(120, 4, seed=seed), features(120, 4, seed=seed + 100, shift=0.5)
        low, high = kid(x, y, subsets=60, seed=seed).interval
        hits += low <= truth <= high
        assert high - low < 4 * abs(truth)
    assert 24 <= hits <= 30
    assert kid(features(9), features(9), subset_size=9).interval is None and math.isfinite(truth)
