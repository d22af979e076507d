import numpy as np
import pytest
from scipy import stats

from mmfm_utils import UsageError, metrics


def test_bootstrap_agrees_with_scipy_and_covers_the_mean():
    values = np.random.default_rng(0).normal(3, 2, size=400)
    ours = metrics.bootstrap(values)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", rng=0, n_resamples=2000).confidence_interval
    assert ours == pytest.approx(tuple(theirs), abs=0.05)
    hits = 0
    for seed in range(200):
        sample = np.random.default_rng(seed).normal(0, 1, size=60)
        low, high = metrics.bootstrap(sample, n=200, seed=seed)
        hits += low <= 0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_bootstrap_keeps_pairs_together():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 10, size=300)
    pairs = np.stack([noise + 1, noise], axis=1)  # a difference of exactly 1 in every pair
    low, high = metrics.bootstrap(pairs, lambda p: (p[:, 0] - p[:, 1]).mean())
    assert low == pytest.approx(1) and high == pytest.approx(1)


@pytest.mark.parametrize("values", [[1.0], [1.0, np.nan], [np.inf, 0.0]])
def test_bootstrap_refuses_what_it_cannot_do(values):
    with pytest.raises(UsageError):
        metrics.bootstrap(values)


def test_centre_of_mass():
    assert metrics.centre_of_mass([1, 0, 0]) == 0
    assert metrics.centre_of_mass([0, 0, 2]) == 1
    assert metrics.centre_of_mass([1, 1, 1, 1]) == pytest.approx(0.5)
    for bad in ([1], [0, 0], [1, -1], [1, np.nan]):
        with pytest.raises(UsageError):
            metrics.centre_of_mass(bad)


def test_explained_share_is_one_for_labels_that_say_all_and_zero_for_none():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), 60)
    means = rng.normal(size=(5, 7))
    assert metrics.explained_share(means[labels], labels) == pytest.approx(1)
    noise = rng.normal(size=(300, 7))
    assert abs(metrics.explained_share(noise, labels)) < 0.02
    half = metrics.explained_share(means[labels] * np.sqrt(300 / 299) + means[labels].std() * noise, labels)
    assert 0.3 < half < 0.7
    names = np.array(list("abcde"))[labels]
    assert metrics.explained_share(noise, names) == metrics.explained_share(noise, labels)
    with pytest.raises(UsageError):
        metrics.explained_share(noise, np.zeros(300))
    with pytest.raises(UsageError, match="finite"):
        metrics.explained_share(np.full((300, 2), np.nan), labels)


def test_explained_share_agrees_with_the_one_way_table():
    """For one dimension it is epsilon squared, which follows from the F statistic."""
    rng = np.random.default_rng(1)
    groups = [rng.normal(mean, 1, size=40) for mean in (0, 0.5, 1)]
    f = stats.f_oneway(*groups).statistic
    within_df, between_df = 117, 2
    epsilon = between_df * (f - 1) / (between_df * f + within_df)
    ours = metrics.explained_share(np.concatenate(groups)[:, None], np.repeat([0, 1, 2], 40))
    assert ours == pytest.approx(epsilon)
