"""Volumes of the labelled classes, as uniformly random patches see them."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_semisup.data.volumes import labelled_volumes


def dataset(*segmentations):
    cases = {f"case{i}": s for i, s in enumerate(segmentations)}
    return SimpleNamespace(identifiers=list(cases), load_case=lambda case: (None, cases[case][None], None, {}))


LABELS = SimpleNamespace(has_regions=False, foreground_labels=[1, 2], all_labels=[0, 1, 2])
REGIONS = SimpleNamespace(has_regions=True, foreground_regions=[(1, 2), (2,)], all_labels=[0, 1, 2])


def slow(segmentation, patch, value) -> float:
    """Mean over every place of the patch; an image that is smaller lies in it once, padded."""
    places = [range(max(1, n - p + 1)) for n, p in zip(segmentation.shape, patch, strict=True)]
    shares = []
    for corner in product(*places):
        window = segmentation[tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))]
        shares.append(np.isin(window, value).sum() / np.prod(patch))
    return float(np.mean(shares))


@given(st.integers(0, 10**6), st.tuples(*[st.integers(1, 7)] * 3))
@settings(max_examples=25)
def test_against_every_place_of_the_patch(seed, patch):
    random = np.random.default_rng(seed)
    cases = [random.integers(-1, 3, random.integers(1, 7, 3)).astype(np.int8) for _ in range(2)]  # -1: nnU-Net, outside
    for labels, values in ((LABELS, (1, 2)), (REGIONS, ((1, 2), 2))):
        expected = [np.mean([slow(case, patch, value) for case in cases]) for value in values]
        assert labelled_volumes(dataset(*cases), labels, list(patch)) == pytest.approx(expected)


def test_two_dimensional_patches_are_slices_of_the_volume():
    segmentation = np.zeros((4, 6, 6), np.int8)
    segmentation[1, 2:4, 2:4] = 1
    expected = slow(segmentation, (1, 4, 4), 1)
    assert labelled_volumes(dataset(segmentation), LABELS, [4, 4])[0] == pytest.approx(expected)


def test_at_most_twenty_cases_are_read():
    read = []
    data = dataset(*[np.ones((2, 2, 2), np.int8)] * 50)
    load = data.load_case
    data.load_case = lambda case: (read.append(case), load(case))[1]
    assert labelled_volumes(data, LABELS, [2, 2, 2]) == [1, 0]
    assert 10 < len(read) <= 20
