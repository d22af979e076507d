"""Scores and their intervals. What scikit-learn has (accuracy, AUROC, ...) is used from there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from . import UsageError


def bootstrap(
    values: Sequence[float] | np.ndarray,
    statistic: Callable[[np.ndarray], float] = np.mean,
    n: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile bootstrap interval of a statistic over examples (Efron 1979), as (low, high).

    `values` is (example,) or (example, ...): whole examples are resampled, so several measurements on one example
    stay together and the statistic may be a difference of paired means. Raises UsageError for fewer than two examples
    or values that are not finite.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        raise UsageError(f"A bootstrap interval needs at least two examples, not {len(values)}: raise the sample size.")
    if not np.isfinite(values).all():
        raise UsageError("A bootstrap interval needs finite values; some are NaN or infinite.")
    rng = np.random.default_rng(seed)
    draws = [statistic(values[rng.integers(len(values), size=len(values))]) for _ in range(n)]
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
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
