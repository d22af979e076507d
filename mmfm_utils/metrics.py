"""Scores and their intervals. What scikit-learn has (accuracy, AUROC, ...) is used from there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

from . import UsageError


def _finite(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """As floats; UsageError for fewer than two examples, or for NaN and infinity."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        raise UsageError(f"An interval needs at least two examples, not {len(values)}: raise the sample size.")
    if not np.isfinite(values).all():
        raise UsageError("An interval needs finite values; some are NaN or infinite.")
    return values


def _wilson(share: np.ndarray, n: int, level: float) -> tuple[np.ndarray, np.ndarray]:
    """The score interval of a proportion seen in n examples (Wilson 1927)."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre, half = share + z * z / (2 * n), z * np.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    low, high = ((centre + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return np.clip(low, 0, share), np.clip(high, share, 1)  # at 0 and 1 the share is an end, but for rounding


def _paired(gain: np.ndarray, loss: np.ndarray, n: int, level: float) -> tuple[np.ndarray, np.ndarray]:
    """The interval of gain - loss, the shares of n pairs that go from 0 to 1 and back (Bonett and Price 2012)."""
    z, gain, loss = NormalDist().inv_cdf((1 + level) / 2), (n * gain + 1) / (n + 2), (n * loss + 1) / (n + 2)
    half = z * np.sqrt((gain + loss - (gain - loss) ** 2) / (n + 2))
    return np.maximum(gain - loss - half, -1), np.minimum(gain - loss + half, 1)


def _resampled(data: tuple, statistic: Callable, n: int, level: float, seed: int):
    """The percentile bootstrap interval (Efron 1979), widened for small samples as in Hesterberg (2015).

    The percentiles are moved out as far as Student's t lies beyond the normal distribution: for 14 normal examples
    they cover 0.95, the plain ones 0.92. Of skewed values they cover less: 0.935 for 48 exponential ones.
    """
    from scipy import stats  # about a second to load, and most of a notebook does without

    size = min(map(len, data))
    reach = stats.t.ppf((1 + level) / 2, size - 1) * np.sqrt(size / (size - 1))
    return stats.bootstrap(
        data, statistic, n_resamples=n, batch=100, vectorized=True, method="percentile", rng=seed,
        confidence_level=1 - 2 * stats.norm.sf(reach),
    ).confidence_interval  # fmt: skip


def interval(
    values: Sequence[float] | np.ndarray,
    statistic: Callable[[np.ndarray], float] = np.mean,
    n: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """The interval of a statistic over examples, as (low, high), in the units of the statistic.

    `values` is (example,) or (example, ...). For np.mean and np.sum, which are taken over examples, it depends on what
    the values are; of (example, ...) each end is then an array (...):
    - zeros and ones, or these less chance and rescaled (two values on both sides of 0): Wilson's score interval
      (Wilson 1927). All 0 or all 1 count as zeros and ones;
    - -1, 0 and 1, or multiples, as differences of paired zeros and ones are: adjusted Wald (Bonett and Price 2012).
      Where no -1 need be among them use `difference`: 0 and 1 alone look like zeros and ones.
    All else, and any other statistic: the percentile bootstrap of `n` resamples (Efron 1979), widened for small samples
    (Hesterberg 2015). Whole examples are resampled, so several measurements on one example stay together and the
    statistic may be a ratio of paired means. Where it is the same in every resample, low equals high: there is no
    interval then, and `findings.judge` takes none of width 0.

    Raises UsageError for fewer than two examples or values that are not finite.
    """
    values = _finite(values)
    size, seen = len(values), np.unique(values)
    if statistic not in (np.mean, np.sum):
        of_each = lambda rows, axis: np.array([statistic(values[some]) for some in rows])  # rows (resample, example)
        low, high = _resampled((np.arange(size),), of_each, n, level, seed)
        return float(low), float(high)
    bottom, top = seen[0], seen[-1]
    if set(seen) <= {0, 1} or len(seen) == 2 < size and bottom < 0 < top:
        bottom, top = (0.0, 1.0) if bottom >= 0 else (bottom, top)
        ends = [bottom + (top - bottom) * end for end in _wilson((values == top).mean(0), size, level)]
    elif set(seen) in ({-top, 0, top}, {-1, 0}):
        ends = [-bottom * end for end in _paired((values > 0).mean(0), (values < 0).mean(0), size, level)]
    else:
        ends = _resampled((values,), np.mean, n, level, seed)
    times = size if statistic is np.sum else 1
    low, high = (times * np.asarray(end) for end in ends)
    return (float(low), float(high)) if values.ndim == 1 else (low, high)


bootstrap = interval  # its name when it knew one method


def difference(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    paired: bool = False,
    n: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """The interval of a difference of two means, first less second, as (low, high); each is (example,).

    `paired` says that both were measured on the same examples. Of zeros and ones it is then the adjusted Wald interval
    (Bonett and Price 2012), and for two groups of different examples the hybrid score interval (Newcombe 1998, method
    10); of other values the bootstrap of `interval`, in which each group is resampled by itself unless they are paired.

    Raises UsageError as `interval` does, and for paired groups of different sizes.
    """
    first, second = _finite(first), _finite(second)
    binary = set(np.unique([*first, *second])) <= {0, 1}
    if paired and len(first) != len(second):
        raise UsageError(f"Paired values come from the same examples: {len(first)} are not {len(second)}.")
    if paired and binary:
        low, high = _paired((first > second).mean(), (first < second).mean(), len(first), level)
    elif paired:
        return interval(first - second, n=n, level=level, seed=seed)
    elif binary:
        one, other = first.mean(), second.mean()
        (one_low, one_high), (other_low, other_high) = (_wilson(x.mean(), len(x), level) for x in (first, second))
        low = one - other - np.hypot(one - one_low, other_high - other)
        high = one - other + np.hypot(one_high - one, other - other_low)
    else:
        gap = lambda x, y, axis: x.mean(axis) - y.mean(axis)
        low, high = _resampled((first, second), gap, n, level, seed)
    return float(low), float(high)


def centre_of_mass(weights: Sequence[float] | np.ndarray) -> float:
    """Where along an axis the weight lies: 0 when all is in the first entry, 1 when all is in the last.

    For layers this is normalised depth, comparable between models of different depth. Raises UsageError when the
    weights are negative or sum to zero.
    """
    weights = np.asarray(weights, dtype=float)
    if len(weights) < 2 or not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() == 0:
        raise UsageError("A centre of mass needs two or more finite weights, none negative, not all zero.")
    return float(weights @ np.linspace(0, 1, len(weights)) / weights.sum())


def explained_share(values: np.ndarray, labels: Sequence) -> float:
    """The share of variance that lies between the groups of a labelling (eta squared), over all dimensions.

    `values` is (example, dim), `labels` one label an example. Adjusted for the number of groups (epsilon squared,
    Kelley 1935), so that labels which say nothing score about 0 rather than above it.
    """
    values = np.asarray(values, dtype=float)
    kinds, index = np.unique(np.asarray(labels), return_inverse=True)
    if not np.isfinite(values).all():
        raise UsageError("The explained share needs finite values; some are NaN or infinite.")
    if len(kinds) < 2 or len(values) <= len(kinds):
        raise UsageError("The explained share needs at least two groups and more examples than groups.")
    counts = np.bincount(index)[:, None]
    means = np.stack([np.bincount(index, values[:, d]) for d in range(values.shape[1])], axis=1) / counts
    within = ((values - means[index]) ** 2).sum() / (len(values) - len(kinds))
    total = ((values - values.mean(0)) ** 2).sum() / (len(values) - 1)
    return float(1 - within / total) if total > 0 else 0.0
