"""What can be said about a difference of Dice: a bootstrap interval, p-values corrected for their number, a verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

LEVEL = 0.95  # of the interval
RESAMPLES = 10_000
FEWEST_RUNS = 3  # of the baseline: the sd of two runs may be small by chance


def bootstrap_interval(
    values: np.ndarray, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean, the values resampled with replacement.

    Reference: Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.

    Args:
        values: independent ones, (cases,), in any unit, without NaN.
        level: share of the resampled means inside the interval.
        resamples: number of resampled means.
        seed: of the resampling; the same values give the same interval.

    Returns:
        Lower and upper end in the unit of the values; NaN where there are fewer than two values.
    """
    if len(values) < 2:
        return math.nan, math.nan
    chosen = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.quantile(np.asarray(values, float)[chosen].mean(axis=1), ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm, Scandinavian Journal of Statistics 1979), in the given order.

    The smallest of m is multiplied by m, the next by m - 1, and so on; none may become smaller than the one before it,
    nor larger than 1. NaN stays and does not count.
    """
    corrected = [math.nan] * len(p)
    order = sorted((i for i, value in enumerate(p) if not math.isnan(value)), key=lambda i: p[i])
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p[i]))
        corrected[i] = largest
    return corrected


def verdict(difference: float, interval: tuple[float, float], baseline: Sequence[float]) -> str:
    """``beats``: the interval is above 0 and the difference above twice the baseline's sd; ``worse``: the same below.

    Args:
        difference: mean of the paired differences.
        interval: of that mean, see :func:`bootstrap_interval`.
        baseline: one value per run of the baseline, in the unit of the difference. Runs differ in labelled subset and
            seed, so their sd (n - 1) holds both: how hard a subset is, and chance.

    Returns:
        ``beats``, ``worse``, ``no difference``, ``too few runs`` (of the baseline), or nothing without a difference.
    """
    if math.isnan(difference):
        return ""
    if len(baseline) < FEWEST_RUNS:
        return "too few runs"
    threshold = 2 * np.std(baseline, ddof=1)
    if interval[0] > 0 and difference > threshold:
        return "beats"
    if interval[1] < 0 and difference < -threshold:
        return "worse"
    return "no difference"
