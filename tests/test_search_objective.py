import numpy as np
import pytest
import torch

from fewstep.predictors.yardstick import bootstrap_ratio, frechet_distance, score_interval
from fewstep.search.objective import EndpointMSE


def test_endpoint_mse_is_the_mean_square_per_element():
    x, reference = torch.full((1, 2, 3, 4), 2.0), torch.zeros(2, 3, 4)
    reference[1] = 1.0
    objective = EndpointMSE("mean")
    measures = objective.measure(x, reference)[0].numpy()
    assert measures[:, 0].tolist() == [4.0, 1.0]
    assert objective.score(measures, measures) == 2.5
    assert EndpointMSE().score(measures, measures) == pytest.approx(2.0)


def test_frechet_distance_of_a_set_to_itself_is_zero():
    a = np.random.default_rng(0).normal(size=(200, 5))
    assert frechet_distance(a, a) < 1e-9


def test_frechet_distance_of_commuting_gaussians_is_the_closed_form():
    """Diagonal covariances: |mu - mu'|^2 + sum (s - s')^2."""
    a = np.random.default_rng(1).normal(size=(400, 3))
    a = (a - a.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(a, rowvar=False))).T
    s, t, shift = np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.5, 0.5]), np.array([1.0, 0.0, -2.0])
    expected = (shift**2).sum() + ((s - t) ** 2).sum()
    assert frechet_distance(a * s, a * t + shift) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_features_that_are_not_finite_is_inf():
    a = np.zeros((4, 2))
    assert frechet_distance(a + np.nan, a) == float("inf")


def test_paired_interval_holds_the_true_ratio_and_is_narrower_than_an_unpaired_one():
    rng = np.random.default_rng(2)
    b = rng.lognormal(size=500)
    a = 0.5 * b * rng.lognormal(sigma=0.1, size=500) / np.exp(0.005)
    low, high = bootstrap_ratio(a, b, np.mean)
    assert low < 0.5 < high
    loose = bootstrap_ratio(a, rng.permutation(b), np.mean)
    assert high - low < 0.5 * (loose[1] - loose[0])


def test_intervals_are_seeded():
    rng = np.random.default_rng(3)
    a, b = rng.random(50), rng.random(50)
    assert bootstrap_ratio(a, b, np.mean, seed=1) == bootstrap_ratio(a, b, np.mean, seed=1)


def test_interval_of_a_score_of_whole_sets_agrees_with_that_of_means():
    rng = np.random.default_rng(4)
    a, b = rng.random((300, 1)), rng.random((300, 1))
    whole = score_interval(a, b, lambda m, picks: float(m[picks].mean()))
    assert whole == pytest.approx(bootstrap_ratio(a[:, 0], b[:, 0], np.mean), abs=0.03)
