"""When terms start: by the online Dice alone; how they ramp up; what vanishing classes do."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_semisup.training.start import Start

TOTAL = 1000


def start(threshold=0.5, latest=0.3, ramp_share=0.2, names=("a", "b"), background=True) -> Start:
    return Start(list(names), background, threshold, latest, ramp_share)


def test_starts_after_the_epoch_in_which_the_last_class_has_passed():
    s = start()
    assert s.after_epoch([0.6, 0.2], 100, TOTAL) == [] and not s.started
    assert s.ramp(100, TOTAL) == 0
    (told,) = s.after_epoch([0.1, 0.5], 200, TOTAL)  # a class that has passed once has passed
    assert s.step == 200 and "after 200 of 1000 steps" in told
    assert s.head_weights(TOTAL, TOTAL) == [1, 1, 1]
    assert s.after_epoch([0.0, 0.0], 300, TOTAL) == [] and s.step == 200


def test_ramp_and_progress_count_from_the_start():
    s = start(ramp_share=0.5)
    s.after_epoch([1, 1], 200, TOTAL)
    assert s.progress(200, TOTAL) == 0 and s.progress(600, TOTAL) == 0.5
    assert s.ramp(200, TOTAL) == pytest.approx(math.exp(-5))
    assert s.ramp(400, TOTAL) == pytest.approx(math.exp(-5 * 0.25)) and s.ramp(600, TOTAL) == s.ramp(999, TOTAL) == 1


def test_without_a_threshold_everything_is_on_from_the_first_step():
    s = start(threshold=0, ramp_share=0)
    assert s.started and s.step == 0 and s.ramp(0, TOTAL) == 1 and s.progress(0, TOTAL) == 0
    assert s.head_weights(TOTAL, TOTAL) == [1, 1, 1]


def test_a_class_that_is_late_stays_off_is_named_once_and_comes_with_a_ramp():
    s = start()
    assert s.after_epoch([0.9, 0.2], 200, TOTAL) == []
    begins, late = s.after_epoch([0.9, 0.2], 300, TOTAL)
    assert "start after 300" in begins and "WARNING: the online Dice of b has not reached 0.5: its own terms" in late
    assert s.head_weights(300, TOTAL) == [0, 1, 0], "the background may be b"
    assert s.after_epoch([0.9, 0.1], 400, TOTAL) == []
    (comes,) = s.after_epoch([0.9, 0.7], 500, TOTAL)
    assert "terms of b start after 500" in comes and s.step == 300
    assert s.head_weights(500, TOTAL) == pytest.approx([math.exp(-5), 1, math.exp(-5)])
    assert s.head_weights(600, TOTAL) == [1, 1, 1], "a fifth of what was left"


def test_each_late_class_is_named_once():
    s = start(names="abc")
    told = [text for i in range(6) for text in s.after_epoch([0.9 if i > k else 0.1 for k in range(3)], 300 + i, TOTAL)]
    assert sorted(text.split()[5] for text in told if "WARNING" in text) == ["a", "b", "c"]


def test_a_class_that_no_validation_patch_has_does_not_hold_back_the_others():
    s = start()
    assert s.after_epoch([0.9, math.nan], 200, TOTAL) == [] and not s.started
    untested, begins = s.after_epoch([0.9, math.nan], 300, TOTAL)
    assert "b had no online Dice" in untested and "start after 300" in begins
    assert s.head_weights(300, TOTAL) == [1, 1, 1]
    seen = start()
    seen.after_epoch([0.9, 0.1], 200, TOTAL)
    seen.after_epoch([0.9, math.nan], 300, TOTAL)
    assert seen.head_weights(300, TOTAL) == [0, 1, 0], "b was measured, and not known"


def test_what_was_not_used_is_told_at_the_end():
    s = start()
    assert "NOT used" in s.unused([0.2, 0.4]) and "(a ended at 0.20, b ended at 0.40)" in s.unused([0.2, 0.4])
    assert "0.5 before the last epoch (a ended at 0.90, b was never measured)" in s.unused([0.9, math.nan])
    s.after_epoch([0.9, 0.1], 300, TOTAL)
    assert s.unused([0.9, 0.3]).startswith("WARNING: not every class") and "(b ended at 0.30)" in s.unused([0.9, 0.3])
    s.after_epoch([0.9, 0.8], 400, TOTAL)
    assert s.unused([0.1, 0.1]) == "", "what happens later is the validation's matter"
    assert Start(("a",), True, 0.0, 0.3, 0.2).unused([0.0]) == ""


def test_when_no_class_has_passed_nothing_starts():
    s = start()
    for name, told in zip("ab", s.after_epoch([0.1, 0.2], 500, TOTAL), strict=True):
        assert f"Dice of {name} has" in told and "the method's terms stay off" in told and not s.started
    assert s.after_epoch([0.1, 0.2], 700, TOTAL) == []
    s.after_epoch([0.9, 0.9], 1000, TOTAL)
    assert not s.started, "there is no step left"


def test_a_vanishing_class_counts_less_and_is_named_once():
    s = start(threshold=0)
    assert s.note_volumes([0.06, 0.05], [0.1, 0.1]) == [] and s.head_weights(0, TOTAL) == [1, 1, 1]
    (told,) = s.note_volumes([0.06, 0.01], [0.1, 0.1])  # the average of both epochs: 3 %
    assert "b vanishes from the pseudo-labels: 3 % of the voxels, 10 %" in told
    assert s.head_weights(0, TOTAL) == pytest.approx([0.6, 1, 0.6])
    assert s.note_volumes([0.06, 0.0], [0.1, 0.1]) == [] and s.head_weights(0, TOTAL) == pytest.approx([0.3, 1, 0.3])
    assert s.note_volumes([0.06, 0.2], [0.1, 0.1]) == [] and s.head_weights(0, TOTAL) == [1, 1, 1]
    assert s.note_volumes([0.0, 0.2], [0.0, 0.1]) == []  # nothing labelled: nothing to compare with


def test_regions_have_no_background():
    s = start(background=False)
    s.after_epoch([0.9, 0.1], 300, TOTAL)
    assert s.head_weights(300, TOTAL) == [1, 0]


def test_state_goes_on():
    s = start()
    s.after_epoch([0.9, 0.1], 300, TOTAL)
    s.note_volumes([0.01, 0.1], [0.1, 0.1])
    other = start()
    other.load(s.state(), 300)
    assert other == s and other.after_epoch([0.9, 0.1], 400, TOTAL) == []


def test_a_run_that_had_not_started_starts_where_the_threshold_is_gone():
    s, other = start(), start(threshold=0)
    s.after_epoch([0.1, 0.1], 100, TOTAL)
    other.load(s.state(), 100)
    assert other.step == 100 and other.head_weights(100, TOTAL) == [1, 1, 1]


@given(
    st.lists(st.tuples(st.floats(0, 1), st.just(math.nan) | st.floats(0, 1)), min_size=1, max_size=20),
    st.floats(0.01, 1),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_start_happens_once_and_weights_stay_in_range(dices, threshold, latest, ramp_share):
    s = start(threshold, latest, ramp_share)
    total = 50 * len(dices)
    seen = set()
    for i, dice in enumerate(dices, 1):
        s.after_epoch(dice, 50 * i, total)
        seen.add(s.step)
        assert 0 <= s.ramp(50 * i, total) <= 1 and 0 <= s.progress(50 * i, total) <= 1
        weights = s.head_weights(50 * i, total)
        assert weights[0] == min(weights[1:]) and all(0 <= w <= 1 for w in weights)
        assert s.ramp(50 * i, total) == 0 or s.started
    assert len(seen - {None}) <= 1
