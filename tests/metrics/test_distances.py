"""FID and KID: golden values, parity with torch-fidelity and torchmetrics, and the properties of a distance."""

import pytest
import torch

from condgen.errors import DataError, ShapeError
from condgen.metrics.frechet import fid, frechet_distance
from condgen.metrics.kernel import kid, polynomial_mmd2
from condgen.metrics.statistics import FeatureStatistics, Gaussian, gaussian_of


def features(count, dim=8, seed=0, shift=0.0, scale=1.0):
    draws = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99)) / dim**0.5
    return scale * torch.randn(count, dim, generator=draws) @ mixing + shift


def gaussian(mean, covariance):
    return Gaussian(torch.tensor(mean, dtype=torch.float64), torch.tensor(covariance, dtype=torch.float64), 100)


def test_frechet_golden_value():
    a = gaussian([0, 1, 2], [[2, 0.5, 0], [0.5, 1, 0.2], [0, 0.2, 1.5]])
    b = gaussian([1, 1, 0], [[1, -0.2, 0.1], [-0.2, 2, 0], [0.1, 0, 1]])
    assert frechet_distance(a, b) == pytest.approx(5.599202856, abs=1e-9)
    assert frechet_distance(b, a) == pytest.approx(5.599202856, abs=1e-9)


def test_commuting_covariances_have_a_closed_form():
    a, b = gaussian([0, 0], [[4, 0], [0, 9]]), gaussian([0, 3], [[1, 0], [0, 25]])
    assert frechet_distance(a, b) == pytest.approx(9 + (2 - 1) ** 2 + (3 - 5) ** 2, abs=1e-10)


def test_identical_sets_are_at_distance_zero_and_a_shift_costs_its_square():
    x = features(300)
    assert fid(x, x, force=True) == pytest.approx(0, abs=1e-9)
    moved = x.double()
    moved[:, 2] += 3
    assert fid(x, moved, force=True) == pytest.approx(9, abs=1e-9)


def test_singular_covariances_agree_with_scipy_free_eigenvalues():
    # fewer rows than dimensions on both sides: scipy's root goes complex here
    x, y = features(6, dim=16, seed=1).double(), features(7, dim=16, seed=2, shift=0.3).double()
    a, b = gaussian_of(x), gaussian_of(y)
    roots = torch.linalg.eigvals(a.covariance @ b.covariance).real.clamp(min=0).sqrt().sum()
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * roots
    assert frechet_distance(a, b) == pytest.approx(float(expected), abs=1e-5)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_statistics_do_not_depend_on_order_batches_or_processes():
    x = features(2500, dim=5)
    whole = gaussian_of(x)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    one, two = FeatureStatistics(), FeatureStatistics()
    for part in x[order][:900].split(7):
        one.add(part)
    two.add(x[order][900:])
    joined = one.merge(two).merge(FeatureStatistics()).gaussian()
    assert whole.mean.dtype == whole.covariance.dtype == torch.float64
    assert joined.count == whole.count == 2500
    torch.testing.assert_close(joined.mean, whole.mean, rtol=0, atol=1e-13)
    torch.testing.assert_close(joined.covariance, whole.covariance, rtol=0, atol=1e-12)
    torch.testing.assert_close(whole.covariance, torch.cov(x.double().T), rtol=0, atol=1e-12)


def test_statistics_survive_a_mean_far_from_zero():
    # float32 sums of squares lose everything here: the variance is 1 on top of 1e4 ** 2
    x = features(500, dim=3).double() + 1e4
    torch.testing.assert_close(gaussian_of(x).covariance, torch.cov(x.T), rtol=1e-9, atol=0)


def test_fid_refuses_small_sets_unless_forced():
    x = features(2047, dim=2)
    with pytest.raises(DataError, match="at least 2048"):
        fid(x, x)
    assert fid(features(2048, dim=2), features(2048, dim=2)) == pytest.approx(0, abs=1e-9)


def test_distances_grow_with_noise():
    x, y = features(400, seed=1), features(400, seed=2)
    noise = torch.randn(400, 8, generator=torch.Generator().manual_seed(5))
    levels = [y + amount * noise for amount in (0.0, 0.5, 1.0, 2.0)]
    for measure in (lambda z: fid(x, z, force=True), lambda z: kid(x, z, subsets=5).value):
        values = [measure(z) for z in levels]
        assert values == sorted(values) and values[-1] > 10 * abs(values[0])


X = torch.tensor([[1, 0, 2], [0, 1, 1], [2, 1, 0], [1, 1, 1.0]])
Y = torch.tensor([[0, 0, 1], [1, 2, 0], [1, 0, 0], [2, 2, 1.0]])


def test_kernel_golden_value_in_any_block_and_order():
    for block in (1, 3, 1024):
        assert polynomial_mmd2(X, Y, block=block) == pytest.approx(-2.617283951, abs=1e-9)
    assert polynomial_mmd2(Y[[2, 0, 3, 1]], X) == pytest.approx(-2.617283951, abs=1e-9)
    whole = kid(X, Y, subsets=3, subset_size=4)
    assert whole.value == pytest.approx(-2.617283951, abs=1e-9) and whole.error == pytest.approx(0, abs=1e-12)


def test_kid_is_unbiased_reproducible_and_bounded_by_its_sets():
    x, y = features(200, seed=1), features(200, seed=2)
    made = kid(x, y, seed=4, subsets=50)
    assert made == kid(x, y, seed=4, subsets=50)
    assert made.value != kid(x, y, seed=5, subsets=50).value
    assert abs(made.value) < made.error and made.subset_size == 100
    with pytest.raises(DataError, match="201"):
        kid(x, y, subset_size=201)


def test_bad_features_are_refused():
    with pytest.raises(DataError, match="NaN"):
        gaussian_of(torch.full((3, 2), torch.nan))
    with pytest.raises(DataError, match="at least 2"):
        gaussian_of(torch.zeros(1, 2))
    with pytest.raises(ShapeError):
        polynomial_mmd2(torch.zeros(3, 2), torch.zeros(3, 4))
    with pytest.raises(ShapeError):
        FeatureStatistics().add(torch.zeros(3, 2)).merge(FeatureStatistics().add(torch.zeros(3, 4)))


def test_parity_with_torch_fidelity():
    fidelity = pytest.importorskip("torch_fidelity")
    assert fidelity
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = features(600, dim=24, seed=1), features(500, dim=24, seed=2, shift=0.2, scale=1.3)
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(f.double()) for f in (x, y)), verbose=False)
    assert fid(x, y, force=True) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    theirs = kid_features_to_metric(x[:500], y, kid_subsets=1, kid_subset_size=500, verbose=False)
    assert polynomial_mmd2(x[:500], y) == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-5)


def test_parity_with_torchmetrics():
    pytest.importorskip("torchmetrics")
    from torchmetrics.image.fid import _compute_fid
    from torchmetrics.image.kid import poly_mmd

    x, y = features(600, dim=24, seed=1), features(600, dim=24, seed=2, shift=0.2, scale=1.3)
    a, b = gaussian_of(x), gaussian_of(y)
    theirs = float(_compute_fid(a.mean, a.covariance, b.mean, b.covariance))
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-3)
    assert polynomial_mmd2(x, y) == pytest.approx(float(poly_mmd(x.double(), y.double())), abs=1e-5)
