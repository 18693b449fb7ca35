"""Intervals, corrections and verdicts against closed forms and slow loops."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom, bootstrap

from nnunetv2_semisup.evaluation.statistics import bootstrap_interval, holm, verdict

NAN = math.nan


def test_interval_of_many_values_is_that_of_the_normal_distribution():
    values = np.random.default_rng(1).normal(0.3, 2.0, 4000)
    half = 1.959964 * values.std() / math.sqrt(len(values))
    low, high = bootstrap_interval(values)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03 * half)


def test_interval_of_zeros_and_ones_is_that_of_the_binomial_distribution():
    low, high = bootstrap_interval(np.repeat([0.0, 1.0], [12, 8]))
    assert 20 * low == pytest.approx(binom.ppf(0.025, 20, 0.4)) and 20 * high == pytest.approx(
        binom.ppf(0.975, 20, 0.4)
    )


def test_interval_is_scipys():
    values = np.random.default_rng(2).exponential(1.0, 25)
    theirs = bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=3).confidence_interval
    assert bootstrap_interval(values, resamples=20_000) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_interval_against_every_possible_resample():
    values = np.array([0.0, 1.0, 5.0, -2.0])
    means = [sum(chosen) / 4 for chosen in itertools.product(values, repeat=4)]
    for level in (0.5, 0.8, 0.95):
        ends = (1 - level) / 2, (1 + level) / 2
        low, high = bootstrap_interval(values, level)
        for end, share in zip((low, high), ends, strict=True):  # the value at which the true shares pass ``share``
            assert np.mean([m < end - 1e-9 for m in means]) <= share + 0.01
            assert np.mean([m <= end + 1e-9 for m in means]) >= share - 0.01


def test_interval_of_next_to_nothing():
    assert all(map(math.isnan, (*bootstrap_interval(np.array([])), *bootstrap_interval(np.array([1.0])))))
    assert bootstrap_interval(np.full(3, 0.5)) == pytest.approx((0.5, 0.5))
    assert bootstrap_interval(np.arange(9.0)) == bootstrap_interval(np.arange(9.0)), "fixed seed"


def holm_step_by_step(p: list[float]) -> list[float]:
    """The smallest level at which Holm's procedure, as he wrote it, rejects each hypothesis; in steps of 1 / 1000."""
    smallest = [1.0] * len(p)
    for level in np.arange(1, 1001) / 1000:
        left = sorted(range(len(p)), key=lambda i: p[i])
        while left and p[left[0]] * len(left) <= level + 1e-12:
            rejected = left.pop(0)
            smallest[rejected] = min(smallest[rejected], level)
    return smallest


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0] and holm([]) == [] and holm([0.2]) == [0.2]
    assert holm([NAN, 0.02, 0.01])[1:] == pytest.approx([0.02, 0.02]) and math.isnan(holm([NAN])[0])


@pytest.mark.parametrize("seed", range(5))
def test_holm_is_the_procedure_step_by_step(seed):
    p = (np.random.default_rng(seed).integers(1, 300, 6) / 1000).tolist()
    assert holm(p) == pytest.approx(holm_step_by_step(p), abs=1.1e-3)


RUNS = (0.69, 0.70, 0.71)  # sd 0.01


@pytest.mark.parametrize(
    ("difference", "interval", "baseline", "expected"),
    [
        (0.021, (0.001, 0.04), RUNS, "beats"),
        (0.019, (0.001, 0.04), RUNS, "no difference"),  # less than twice the sd
        (0.021, (-0.001, 0.05), RUNS, "no difference"),  # the interval holds 0
        (-0.021, (-0.04, -0.001), RUNS, "worse"),
        (-0.019, (-0.04, -0.001), RUNS, "no difference"),
        (-0.021, (-0.04, 0.001), RUNS, "no difference"),
        (0.5, (0.4, 0.6), RUNS[:2], "too few runs"),
        (0.001, (0.0005, 0.002), (0.7, 0.7, 0.7), "beats"),
        (0.5, (NAN, NAN), RUNS, "no difference"),
        (NAN, (NAN, NAN), RUNS, ""),
    ],
)
def test_verdict(difference, interval, baseline, expected):
    assert verdict(difference, interval, baseline) == expected
