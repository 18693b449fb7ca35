import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_semisup.schedules import sigmoid_ramp_up

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
