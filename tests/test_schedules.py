import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_semisup.schedules import cosine_temperature, sigmoid_ramp_up, stage_bounds

SHARE = st.floats(0, 1)


@pytest.mark.parametrize(
    ("progress", "fraction", "expected"),
    [(0, 0.4, 0.00674), (0.2, 0.4, 0.2865), (0.4, 0.4, 1), (1, 0.4, 1), (0, 0, 1), (0.5, 1, math.exp(-1.25))],
)
def test_values_of_the_literature(progress, fraction, expected):
    assert sigmoid_ramp_up(progress, fraction) == pytest.approx(expected, abs=1e-5)


@given(SHARE, SHARE, SHARE)
def test_rises_and_stays_in_range(a, b, fraction):
    low, high = sorted((a, b))
    assert 0 < sigmoid_ramp_up(low, fraction) <= sigmoid_ramp_up(high, fraction) <= 1


@pytest.mark.parametrize(("progress", "expected"), [(0, 1.0), (0.25, 0.55), (0.5, 0.1), (0.75, 0.55), (1, 1.0)])
def test_cosine_temperature(progress, expected):
    assert cosine_temperature(progress, 0.1, 1.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("fractions", "epochs", "expected"),
    [
        ((0.25, 0.25, 0.5), 400, (0, 100, 200, 400)),
        ((0.25, 0.25, 0.5), 7, (0, 1, 3, 7)),
        ((0.0, 0.25, 0.75), 4, (0, 0, 1, 4)),
        ((0.7, 0.1, 0.2), 10, (0, 7, 8, 10)),  # 0.7 + 0.1 is a little less than 0.8
        ((0.0, 0.0, 1.0), 1, (0, 0, 0, 1)),
    ],
)
def test_stage_bounds(fractions, epochs, expected):
    assert stage_bounds(fractions, epochs) == expected
