import numpy as np
import pytest
from scipy import stats

from mmfm_utils import UsageError, metrics

SAMPLES = 4000
CHANCE = 3 * np.sqrt(
    0.95 * 0.05 / SAMPLES
)  # of the share of 4000 simulated intervals that cover, three standard errors


def covered(values, truth):
    """The share of simulated samples, the columns of (example, sample), whose 95 % interval holds the truth."""
    low, high = metrics.interval(values)
    assert low.shape == high.shape == (SAMPLES,)
    return ((low <= truth) & (truth <= high)).mean()


def zeros_and_ones(n, p, seed=0):
    return (np.random.default_rng(seed).random((n, SAMPLES)) < p).astype(float)


def pairs(n, gain, loss, seed=0):
    """Zeros and ones before and after, (example, sample) each, of which some go up and some go down."""
    u = np.random.default_rng(seed).random((n, SAMPLES))
    before, changed = (u > gain) & (u < 0.5), (u < gain) | (u > 1 - loss)
    before |= u > 1 - loss
    return before.astype(float), (before ^ changed).astype(float)


@pytest.mark.parametrize("n", [14, 48])
@pytest.mark.parametrize("p", [0.05, 0.95, "any"])
def test_the_interval_of_a_proportion_covers(n, p):
    p = np.random.default_rng(1).random(SAMPLES) if p == "any" else p
    assert covered(zeros_and_ones(n, p), p) >= 0.95 - CHANCE
    # above chance, as a share of what is possible
    assert covered((zeros_and_ones(n, p) - 1 / 8) / (7 / 8), (p - 1 / 8) / (7 / 8)) >= 0.95 - CHANCE


@pytest.mark.parametrize("n", [14, 48])
@pytest.mark.parametrize(("gain", "loss"), [(0.05, 0.05), (0.1, 0.02), (0.3, 0.1), (0.4, 0)])
def test_the_interval_of_a_paired_difference_covers(n, gain, loss):
    before, after = pairs(n, gain, loss)
    assert covered(after - before, gain - loss) >= 0.95 - CHANCE
    some = [metrics.difference(a, b, paired=True) for a, b in zip(after.T[:400], before.T[:400])]
    assert np.mean([low <= gain - loss <= high for low, high in some]) >= 0.95 - CHANCE * np.sqrt(10)


@pytest.mark.parametrize(("p", "q"), [(0.05, 0.05), (0.95, 0.8), (0.5, 0.05)])
def test_the_interval_of_a_difference_of_groups_covers(p, q):
    first, second = zeros_and_ones(14, p), zeros_and_ones(20, q, seed=1)
    some = [metrics.difference(a, b) for a, b in zip(first.T[:1000], second.T[:1000])]
    assert np.mean([low <= p - q <= high for low, high in some]) >= 0.95 - CHANCE * 2


@pytest.mark.parametrize(
    ("draw", "mean", "n", "said"),
    [
        (lambda rng, shape: rng.normal(size=shape), 0, 14, 0.95),
        (lambda rng, shape: rng.triangular(0, 0, 1, shape), 1 / 3, 14, 0.95),
        (lambda rng, shape: rng.exponential(size=shape), 1, 48, 0.935),  # the shortfall that the docstring tells
    ],
)
def test_the_interval_of_real_values_covers(draw, mean, n, said):
    rng, hits = np.random.default_rng(0), []
    for part in range(10):  # samples of one call share their resamples
        low, high = metrics.interval(draw(rng, (n, SAMPLES // 20)), seed=part)
        hits.append(((low <= mean) & (mean <= high)).mean())
    assert abs(np.mean(hits) - said) <= CHANCE * np.sqrt(2)  # from half as many samples


def test_the_simulation_tells_a_bad_interval():
    """The percentiles of the resampled means, which say 0.95 and cover about half (no sample without a one does)."""
    few = zeros_and_ones(14, 0.05)
    draws = few[np.random.default_rng(2).integers(14, size=(500, 14))].mean(1)  # (resample, sample)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    assert ((low <= 0.05) & (0.05 <= high)).mean() < 0.6


def test_intervals_agree_with_their_sources():
    for k, n in ((0, 14), (7, 72), (40, 48), (192, 192)):
        values = np.arange(n) < k
        theirs = stats.binomtest(k, n).proportion_ci(0.9, method="wilson")
        assert metrics.interval(values, level=0.9) == pytest.approx(tuple(theirs))
        assert metrics.interval(values, np.sum, level=0.9) == pytest.approx(tuple(n * np.array(theirs)))
    for n in range(2, 60):
        for values in (np.zeros(n), np.ones(n)):  # whiskers may not point the wrong way, not by rounding
            low, high = metrics.interval(values)
            assert 0 <= low <= values.mean() <= high <= 1
    # Newcombe 1998, example (a): 56 of 70 and 48 of 80
    ours = metrics.difference(np.arange(70) < 56, np.arange(80) < 48)
    assert ours == pytest.approx((0.0524, 0.3339), abs=5e-5)
    # the adjusted Wald interval as the R package statpsych gives it: 26 of 48 pairs go up, 4 go down
    after, before = np.repeat([1, 0, 1, 0], [26, 4, 6, 12]), np.repeat([0, 1, 1, 0], [26, 4, 6, 12])
    assert metrics.difference(after, before, paired=True) == pytest.approx((0.2548067, 0.6251933))
    assert metrics.interval(after - before) == pytest.approx((0.2548067, 0.6251933))
    values = np.random.default_rng(0).normal(3, 2, size=400)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", rng=0, n_resamples=1000).confidence_interval
    assert metrics.interval(values) == pytest.approx(tuple(theirs), abs=0.02)
    # of few values as wide as Student's t interval: the plain percentiles reach 0.77 as far
    few = np.linspace(-1, 1, 8)
    (low, high), t = metrics.interval(few, n=20000), stats.ttest_1samp(few, 0).confidence_interval()
    assert high - low == pytest.approx(t.high - t.low, rel=0.05)


def test_an_interval_fits_what_the_values_are():
    rng = np.random.default_rng(0)
    assert metrics.bootstrap is metrics.interval
    low, high = metrics.interval(np.ones(192))
    assert 0.97 < low < high == 1
    assert metrics.interval(np.zeros(192)) == pytest.approx((1 - high, 1 - low))
    ups = np.array([1.0, 1, 0, 0, 0, 0, 0, 0, 0, 0])
    assert metrics.interval(ups)[0] > 0 > metrics.difference(ups, 0 * ups, paired=True)[0]
    assert metrics.interval(3 * (ups - ups[::-1])) == pytest.approx(3 * np.array(metrics.interval(ups - ups[::-1])))
    one, other = rng.normal(size=(30, 4)), rng.normal(1, 1, size=(30, 4))
    low, high = metrics.interval(one)
    assert [low[2], high[2]] == pytest.approx(metrics.interval(one[:, 2]))  # the same resamples for every column
    assert metrics.difference(one[:, 0], other[:, 0], paired=True) == metrics.interval(one[:, 0] - other[:, 0])
    low, high = metrics.difference(one[:, 0], other[:20, 0])
    assert low < one[:, 0].mean() - other[:20, 0].mean() < high
    assert metrics.interval([0.3, 0.3, 0.3]) == (0.3, 0.3)  # no interval, which `findings.judge` finds out


def test_the_interval_of_a_statistic_keeps_pairs_together():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 10, size=300)
    pairs = np.stack([noise + 1, noise], axis=1)  # a difference of exactly 1 in every pair
    low, high = metrics.interval(pairs, lambda p: (p[:, 0] - p[:, 1]).mean())
    assert low == pytest.approx(1) and high == pytest.approx(1)
    base = rng.uniform(1, 2, size=(100, 1))
    low, high = metrics.interval(
        base * [0.5, 1] + [0.1, 0] * rng.normal(size=(100, 1)), lambda p: np.divide(*p.mean(0))
    )
    assert low < 0.5 < high < low + 0.05


@pytest.mark.parametrize("values", [[1.0], [1.0, np.nan], [np.inf, 0.0]])
def test_an_interval_refuses_what_it_cannot_do(values):
    with pytest.raises(UsageError):
        metrics.interval(values)
    with pytest.raises(UsageError):
        metrics.difference([0, 1], values)
    with pytest.raises(UsageError, match="same examples"):
        metrics.difference([0, 1], [0, 1, 1], paired=True)


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
