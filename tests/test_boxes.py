import numpy as np
from hypothesis import assume, given, settings
from hypothesis.extra import numpy as hnp

from nnunetv2_semisup.boxes import bounding_box


@settings(max_examples=60)
@given(hnp.arrays(bool, hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=6)))
def test_bounding_box_is_the_smallest(mask):
    assume(mask.any())
    box = bounding_box(mask)
    assert mask[box].sum() == mask.sum()
    for axis in range(mask.ndim):
        assert np.take(mask[box], 0, axis).any() and np.take(mask[box], -1, axis).any()
