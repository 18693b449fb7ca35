"""Metrics against MedPy on random masks, and against distances computed by hand."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from medpy.metric import binary
from scipy.ndimage import binary_erosion, gaussian_filter, generate_binary_structure

from nnunetv2_semisup.evaluation import metrics
from nnunetv2_semisup.evaluation.metrics import METRICS, compare_masks, surface

QUICK = settings(max_examples=60)
DISTANCES = METRICS[2:]
MASKS = hnp.arrays(bool, hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=6))


def medpy(prediction, reference, spacing) -> dict[str, float]:
    return {
        "dice": binary.dc(prediction, reference),
        "jaccard": binary.jc(prediction, reference),
        "hd95_voxel": binary.hd95(prediction, reference),
        "asd_voxel": binary.asd(prediction, reference),
        "hd95_mm": binary.hd95(prediction, reference, spacing),
        "assd_mm": binary.assd(prediction, reference, spacing),
    }


def random_pair(rng) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    """Noise or blobs, sparse or dense, 2D or 3D, often touching the border; never empty."""
    shape = tuple(rng.integers(1, 14, rng.integers(2, 4)))
    smooth, threshold = rng.uniform(0, 2), rng.uniform(-1, 2)
    masks = []
    for _ in range(2):
        field = gaussian_filter(rng.normal(size=shape), smooth)
        masks.append(field > threshold * field.std())
        masks[-1].flat[rng.integers(masks[-1].size)] = True
    spacing = rng.uniform(0.2, 6, len(shape)) if rng.random() < 0.7 else np.full(len(shape), rng.uniform(0.2, 6))
    return *masks, tuple(float(s) for s in spacing)


@pytest.mark.parametrize("seed", range(20))
def test_equal_to_medpy(seed):
    rng = np.random.default_rng(seed)
    for _ in range(25):
        pair = random_pair(rng)
        assert compare_masks(*pair) == pytest.approx(medpy(*pair), rel=0, abs=1e-6)


def test_equal_to_medpy_where_a_mask_fills_the_image():
    full = np.ones((4, 5, 6), bool)
    part = np.zeros_like(full)
    part[1:3, 2, 2:4] = True
    for pair in ((full, part), (part, full), (full, full)):
        assert compare_masks(*pair, (1, 2, 3)) == pytest.approx(medpy(*pair, (1, 2, 3)), rel=0, abs=1e-6)


def voxels(shape, *positions) -> np.ndarray:
    mask = np.zeros(shape, bool)
    for position in positions:
        mask[position] = True
    return mask


def test_two_voxels_by_hand():
    first, second = voxels((6, 6, 6), (1, 1, 1)), voxels((6, 6, 6), (2, 3, 4))
    found = compare_masks(first, second, (5.0, 1.0, 2.0))
    far = math.sqrt(1 + 4 + 9), math.sqrt(5**2 + 2**2 + 6**2)
    expected = (0, 0, far[0], far[0], far[1], far[1])
    assert list(found.values()) == pytest.approx(expected)


def test_the_nearest_voxel_depends_on_the_spacing():
    """One voxel with a neighbour 2 away along the first axis and one 3 away along the second."""
    reference = voxels((3, 4), (2, 0), (0, 3))
    found = compare_masks(voxels((3, 4), (0, 0)), reference, (4.0, 1.0))
    assert found["asd_voxel"] == 2  # along the first axis
    # mm: 3 to (0, 3); back 8 from (2, 0) and 3 from (0, 3); voxel: 2; 2 and 3
    assert found["assd_mm"] == pytest.approx((3 + 8 + 3) / 3)
    assert found["hd95_mm"] == pytest.approx(np.percentile([3, 8, 3], 95))
    assert found["hd95_voxel"] == pytest.approx(np.percentile([2, 2, 3], 95))


def test_asd_is_directed_from_the_prediction():
    """A prediction that misses one of two objects has an ASD of 0, as in the literature; the symmetric ASSD sees it."""
    both, one = voxels((1, 11), (0, 0), (0, 10)), voxels((1, 11), (0, 0))
    missed = compare_masks(one, both, (1.0, 1.0))
    assert (missed["asd_voxel"], missed["assd_mm"]) == (0, pytest.approx(10 / 3))
    assert compare_masks(both, one, (1.0, 1.0))["asd_voxel"] == 5


def test_hd95_pools_both_directions():
    """19 voxels at distance 0 and 1 at 10, and 19 at 0: the maximum of directed percentiles would be 0.5."""
    line = np.zeros((1, 40), bool)
    line[0, :19] = True
    prediction = line.copy()
    prediction[0, 28] = True
    distances = [0] * 19 + [10] + [0] * 19
    found = compare_masks(prediction, line, (2.0, 2.0))
    assert found["hd95_voxel"] == pytest.approx(np.percentile(distances, 95)) == 0
    assert found["asd_voxel"] == 10 / 20 and found["assd_mm"] == pytest.approx(2 * 10 / 39)


def test_cubes_shifted_by_two():
    reference, prediction = np.zeros((2, 9, 9, 9), bool)
    reference[2:6, 2:6, 2:6] = True
    prediction[2:6, 2:6, 4:8] = True
    found = compare_masks(prediction, reference, (1.0, 1.0, 3.0))
    assert (found["dice"], found["jaccard"]) == (0.5, pytest.approx(1 / 3))
    assert (found["hd95_voxel"], found["hd95_mm"]) == (2, 6)


@QUICK
@given(MASKS)
def test_identical_masks(mask):
    assume(mask.any())
    assert list(compare_masks(mask, mask, (2.0,) * mask.ndim).values()) == [1, 1, 0, 0, 0, 0]


@QUICK
@given(MASKS)
def test_surface_is_the_mask_minus_its_erosion(mask):
    assert np.array_equal(surface(mask), mask & ~binary_erosion(mask, generate_binary_structure(mask.ndim, 1)))


@st.composite
def pairs(draw):
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, max_side=6))
    spacing = draw(st.tuples(*[st.floats(0.1, 9)] * len(shape)))
    return draw(hnp.arrays(bool, shape)), draw(hnp.arrays(bool, shape)), spacing


def same(first: dict, second: dict) -> bool:
    return first == pytest.approx(second, rel=1e-9, abs=1e-9, nan_ok=True)


@QUICK
@given(pairs(), st.integers(1, 3))
def test_background_around_the_image_changes_nothing(pair, width):
    *masks, spacing = pair
    assert same(compare_masks(*(np.pad(m, width) for m in masks), spacing), compare_masks(*masks, spacing))


@QUICK
@given(pairs())
def test_order_of_axes_and_masks(pair):
    prediction, reference, spacing = pair
    found = compare_masks(prediction, reference, spacing)
    assert same(compare_masks(prediction.T, reference.T, spacing[::-1]), found)
    swapped = compare_masks(reference, prediction, spacing)
    assert same({**swapped, "asd_voxel": 0}, {**found, "asd_voxel": 0})


@QUICK
@given(pairs(), st.floats(0.1, 10))
def test_mm_scale_with_the_spacing_and_voxels_do_not(pair, factor):
    *masks, spacing = pair
    found = compare_masks(*masks, spacing)
    scaled = compare_masks(*masks, [factor * s for s in spacing])
    factors = {name: factor if name.endswith("_mm") else 1 for name in METRICS}
    assert scaled == pytest.approx({n: found[n] * factors[n] for n in METRICS}, rel=1e-6, abs=1e-9, nan_ok=True)


@QUICK
@given(pairs())
def test_empty_masks_never_get_a_good_value(pair):
    prediction, reference, spacing = pair
    found = compare_masks(prediction, reference, spacing)
    if prediction.any() and reference.any():
        assert not any(math.isnan(value) for value in found.values())
        assert (found["assd_mm"] == 0) == np.array_equal(surface(prediction), surface(reference))
    elif prediction.any() or reference.any():
        assert (found["dice"], found["jaccard"]) == (0, 0)
        assert all(math.isnan(found[name]) for name in DISTANCES)
    else:
        assert all(math.isnan(value) for value in found.values())


def test_unknown_spacing_leaves_the_voxel_metrics():
    first, second = voxels((3, 3), (0, 0)), voxels((3, 3), (0, 2))
    found = compare_masks(first, second, None)
    assert (found["hd95_voxel"], found["asd_voxel"]) == (2, 2)
    assert math.isnan(found["hd95_mm"]) and math.isnan(found["assd_mm"])


@QUICK
@given(pairs())
def test_masks_are_not_changed(pair):
    prediction, reference, spacing = pair
    before = prediction.copy(), reference.copy()
    compare_masks(prediction, reference, spacing)
    assert np.array_equal(prediction, before[0]) and np.array_equal(reference, before[1])


@pytest.mark.parametrize(("spacing", "transforms"), [((2, 2, 2), 2), ((2, 2, 3), 4), (None, 2)])
def test_each_transform_once_and_on_the_joint_box(monkeypatch, spacing, transforms):
    shapes = []
    original = metrics.distance_transform_edt

    def counted(image, **kwargs):
        shapes.append(image.shape)
        return original(image, **kwargs)

    monkeypatch.setattr(metrics, "distance_transform_edt", counted)
    compare_masks(voxels((50, 60, 70), (20, 30, 40)), voxels((50, 60, 70), (22, 33, 44)), spacing)
    assert shapes == [(3, 4, 5)] * transforms


@pytest.mark.parametrize(
    ("prediction", "reference", "spacing", "error", "word"),
    [
        (np.ones((2, 2), np.uint8), np.ones((2, 2), bool), (1, 1), TypeError, "prediction"),
        (np.ones((2, 2), bool), np.ones((2, 2), float), (1, 1), TypeError, "reference"),
        (np.ones((2, 2), bool), np.ones((2, 3), bool), (1, 1), ValueError, "shape"),
        (np.ones((2, 2), bool), np.ones((2, 2), bool), (1, 1, 1), ValueError, "spacing_mm"),
        (np.ones((2, 2), bool), np.ones((2, 2), bool), (1, 0), ValueError, "spacing_mm"),
        (np.ones((2, 2), bool), np.ones((2, 2), bool), (1, math.nan), ValueError, "spacing_mm"),
    ],
)
def test_wrong_input(prediction, reference, spacing, error, word):
    with pytest.raises(error, match=word):
        compare_masks(prediction, reference, spacing)


def test_needs_numpy_and_scipy_only():
    blocked = "sys.modules.update(dict.fromkeys(('torch', 'nnunetv2', 'SimpleITK', 'medpy')))"
    code = f"import sys; {blocked}; import nnunetv2_semisup.evaluation.metrics"
    subprocess.run([sys.executable, "-c", code], check=True)
