"""Disagreement in closed form, the choice of cases, and confidence of classes and regions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nnunetv2_semisup.selftrain.agreement import cases_to_drop, disagreement, unsure

MAPS = st.lists(arrays(np.uint8, (2, 3, 4), elements=st.integers(0, 3)), min_size=2, max_size=4)


def test_two_boxes_that_overlap_by_half():
    a, b = np.zeros((1, 4, 9), np.uint8), np.zeros((1, 4, 9), np.uint8)
    a[..., 0:6], b[..., 3:9] = 1, 1  # 24 voxels each, 12 in common, 36 in either
    assert disagreement([a, b]) == 24 / 36
    assert disagreement([a, 2 * a]) == 1.0, "another class is a difference too"
    assert disagreement([a, a]) == 0.0 and disagreement([0 * a, 0 * a]) == 0.0
    assert disagreement([a, 0 * a]) == 1.0, "a case that one of them does not find"
    assert disagreement([a, a, b]) == disagreement([a, b])


@given(MAPS)
def test_disagreement_counts_voxel_by_voxel(maps):
    voxels = list(zip(*(m.ravel().tolist() for m in maps), strict=True))
    differing = sum(len(set(values)) > 1 for values in voxels)
    foreground = sum(any(values) for values in voxels)
    u = disagreement(maps)
    assert u == (differing / foreground if foreground else 0) and 0 <= u <= 1
    assert u == disagreement(maps[::-1])


@given(st.dictionaries(st.text("abc", min_size=1), st.floats(0, 1), max_size=20), st.floats(0, 0.99))
def test_the_share_of_largest_u_is_dropped(u, share):
    dropped = cases_to_drop(u, share)
    assert len(dropped) == int(share * len(u) + 1e-9) and set(dropped) <= set(u) and dropped == sorted(dropped)
    assert max((v for k, v in u.items() if k not in dropped), default=0) <= min((u[k] for k in dropped), default=1)


def test_shares_that_floats_cannot_hold():
    u = {f"{i:03d}": float(i) for i in range(100)}
    assert len(cases_to_drop(u, 0.29)) == 29 and cases_to_drop(u, 0.02) == ["098", "099"]
    assert cases_to_drop({}, 0.5) == []


@pytest.mark.parametrize("threshold", [0.6, 0.8])
def test_confidence_of_classes_and_of_regions(threshold):
    p = np.array([0.1, 0.3, 0.5, 0.7, 0.9])[None, None]
    assert np.array_equal(unsure(np.stack([p, 1 - p]), threshold, regions=False), np.maximum(p, 1 - p) < threshold)
    sure_region = np.ones_like(p)
    assert np.array_equal(unsure(np.stack([p, sure_region]), threshold, regions=True), np.maximum(p, 1 - p) < threshold)
