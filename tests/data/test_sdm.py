"""Signed distance maps against a loop over all pairs of voxels, their symmetries, and what the loader gets."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.ndimage import distance_transform_edt

from nnunetv2_semisup.data.sdm import SignedDistanceMaps, distance_to, signed_distance_map
from tools import sdm_speed

SHAPES = st.one_of(st.tuples(*[st.integers(1, 6)] * 2), st.tuples(*[st.integers(1, 5)] * 3))
MASKS = SHAPES.flatmap(lambda shape: arrays(bool, shape))
SPACINGS = st.tuples(*[st.sampled_from([0.3, 0.625, 1.0, 5.0])] * 3)
LONG = {"norm": "truncated_mm", "truncation_mm": 1000.0}


def slow_distance(sources, spacing):
    """Every voxel's distance to every source."""
    points = np.argwhere(sources)
    return np.array([np.sqrt((((points - x) * spacing) ** 2).sum(1)).min() for x in np.ndindex(sources.shape)]).reshape(
        sources.shape
    )


def slow_boundary(mask):
    found = np.zeros_like(mask)
    for x in np.argwhere(mask):
        for axis in range(mask.ndim):
            for step in (-1, 1):
                y = x.copy()
                y[axis] += step
                if 0 <= y[axis] < mask.shape[axis] and not mask[tuple(y)]:
                    found[tuple(x)] = True
    return found


def has_both(mask):
    return mask.any() and not mask.all()


@given(MASKS, SPACINGS)
def test_equals_the_definition(mask, spacing):
    spacing = spacing[: mask.ndim]
    signed = signed_distance_map(mask, spacing)
    assert signed.dtype == np.float32 and signed.shape == mask.shape
    if not has_both(mask):
        assert (signed == (-1 if mask.any() else 1)).all()
        return
    d_out, d_in = slow_distance(mask, spacing), slow_distance(~mask, spacing)
    expected = d_out / d_out.max() - d_in / d_in.max()
    expected[slow_boundary(mask)] = 0
    np.testing.assert_allclose(signed, expected, rtol=1e-5, atol=1e-6)
    truncated = np.clip((d_out - d_in) / 1.5, -1, 1)
    truncated[slow_boundary(mask)] = 0
    found = signed_distance_map(mask, spacing, norm="truncated_mm", truncation_mm=1.5)
    np.testing.assert_allclose(found, truncated, rtol=1e-5, atol=1e-6)


@given(MASKS, st.sampled_from([0.5, 1.0, 3.0]))
def test_signs_and_range_on_an_isotropic_grid(mask, size):
    if not has_both(mask):
        return
    signed, boundary = signed_distance_map(mask, (size,) * mask.ndim), slow_boundary(mask)
    assert (signed[boundary] == 0).all() and (signed[mask & ~boundary] < 0).all() and (signed[~mask] > 0).all()
    assert signed.max() == 1 and signed.min() == (-1 if (mask & ~boundary).any() else 0)


@given(MASKS, SPACINGS, st.integers(0, 2))
def test_moves_with_the_mask(mask, spacing, axis):
    axis, spacing = min(axis, mask.ndim - 1), spacing[: mask.ndim]
    flipped = signed_distance_map(np.flip(mask, axis), spacing)
    np.testing.assert_array_equal(flipped, np.flip(signed_distance_map(mask, spacing), axis))
    swapped = signed_distance_map(mask.T, spacing[::-1])
    np.testing.assert_allclose(swapped, signed_distance_map(mask, spacing).T, atol=1e-6)


def test_by_hand():
    """A line of voxels 2 mm apart, foreground from 2 to 6: 4 mm outside at the left end, 6 mm deep in the middle."""
    mask = np.array([[0, 0, 1, 1, 1, 1, 1, 0]], bool)
    expected = np.array([[4 / 4, 2 / 4, 0, -4 / 6, -6 / 6, -4 / 6, 0, 2 / 4]])
    np.testing.assert_allclose(signed_distance_map(mask, (5.0, 2.0)), expected, rtol=1e-6)
    cut = signed_distance_map(mask, (5.0, 2.0), norm="truncated_mm", truncation_mm=5.0)
    np.testing.assert_allclose(cut, [[0.8, 0.4, 0, -0.8, -1, -0.8, 0, 0.4]], rtol=1e-6)


def test_the_edge_of_the_patch_is_no_boundary():
    mask = np.zeros((4, 6), bool)
    mask[:, :3] = True
    assert (signed_distance_map(mask, (1.0, 1.0)) == np.array([-1, -2 / 3, 0, 1 / 3, 2 / 3, 1], np.float32)).all()


@pytest.mark.parametrize("full", [False, True])
def test_empty_and_full_masks(full):
    mask = np.full((3, 4, 5), full)
    values = {"one": -1.0 if full else 1.0, "zero": 0.0, "mask": np.nan}
    for empty, value in values.items():
        found = signed_distance_map(mask, (1.0, 1.0, 1.0), empty=empty)
        np.testing.assert_array_equal(found, np.full(mask.shape, value, np.float32))
        ignored = np.zeros_like(mask)
        ignored[0, 0, 0] = True
        assert np.isnan(signed_distance_map(mask, (1.0, 1.0, 1.0), ignored, empty=empty)).all()


@given(st.data())
def test_targets_beside_ignored_voxels_hold_whatever_those_are(data):
    mask = data.draw(MASKS)
    ignored = data.draw(arrays(bool, mask.shape, elements=st.sampled_from([False, False, False, True])))
    spacing = data.draw(SPACINGS)[: mask.ndim]
    signed = signed_distance_map(mask, spacing, ignored, **LONG)
    known = ~np.isnan(signed)
    assert not known[ignored].any()
    for truth in (mask & ~ignored, mask | ignored, np.where(ignored, data.draw(arrays(bool, mask.shape)), mask)):
        expected = signed_distance_map(truth, spacing, **LONG)
        np.testing.assert_allclose(signed[known], expected[known], rtol=1e-5, atol=1e-9)
    if not ignored.any():
        assert known.all()
    scaled = signed_distance_map(mask, spacing, ignored)
    np.testing.assert_array_equal(np.isnan(scaled), ~known)
    if known.any():
        assert np.abs(scaled[known]).max() <= 1


def test_only_uncertain_voxels_lose_their_target():
    """Foreground 0-3, background 4-9, voxel 9 ignored: from 7 on the ignored voxel is nearer than the boundary."""
    mask, ignored = (np.zeros((1, 10), bool) for _ in range(2))
    mask[0, :4], ignored[0, 9] = True, True
    signed = signed_distance_map(mask, (1.0, 1.0), ignored)[0]
    np.testing.assert_allclose(signed[:7], [-1, -3 / 4, -2 / 4, 0, 1 / 3, 2 / 3, 1])
    assert np.isnan(signed[7:]).all()


@pytest.mark.parametrize("shape", [(30, 20), (18, 24, 12), (3, 178), (3, 182)])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.9])
@pytest.mark.parametrize("spacing", [(1.0,) * 3, (0.625,) * 3, (2.5, 0.7, 0.7)])
def test_distance_equals_scipy(shape, share, spacing):
    """Cubes up to a length of 180 are computed in whole numbers of 16 bits, the others in float32."""
    generator = np.random.default_rng(0)
    corner, sources = np.zeros(shape, bool), generator.random(shape) < share
    corner.flat[0] = sources.flat[generator.integers(sources.size)] = True
    for mask in (corner, sources):
        expected = distance_transform_edt(~mask, spacing[: len(shape)])
        found = distance_to(mask, spacing[: len(shape)])
        assert found.dtype == np.float32 and found.flags.c_contiguous
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("spacing", sdm_speed.SPACINGS_MM)
def test_the_benchmark_compares_equal_maps(spacing):
    mask = sdm_speed.atrium_like()
    assert mask.shape == (112, 112, 80) and 0.18 < mask.mean() < 0.2
    assert sdm_speed.compare(spacing, repeats=1)["difference"] < 1e-6


@pytest.mark.parametrize("ignore", [None, 3])
@pytest.mark.parametrize("shape", [(6, 7), (5, 6, 7)])
def test_maps_of_a_batch_of_labels(shape, ignore):
    labels = torch.randint(0, 3 if ignore is None else 4, (2, 1, *shape), dtype=torch.int16)
    spacing = (2.0, 1.0, 1.0)[-len(shape) :]
    transform = pickle.loads(pickle.dumps(SignedDistanceMaps(2, False, ignore, spacing)))
    for target in (labels, [labels, labels[:, :, ::2]]):
        found = transform({"target": target})["sdm"]
        assert found.shape == (2, 2, *shape) and found.dtype == torch.float32
        for b in range(2):
            for c in range(2):
                label = labels[b, 0].numpy()
                expected = signed_distance_map(label == c + 1, spacing, None if ignore is None else label == ignore)
                np.testing.assert_array_equal(found[b, c].numpy(), expected)


@pytest.mark.parametrize("ignore", [None, 3])
def test_maps_of_a_batch_of_regions(ignore):
    target = torch.rand(2, 2 if ignore is None else 3, 5, 6, 7) > 0.7
    before = target.clone()
    found = SignedDistanceMaps(2, True, ignore, (1.0, 1.0, 1.0))({"target": target})["sdm"]
    assert found.shape == (2, 2, 5, 6, 7) and torch.equal(target, before)
    for b in range(2):
        ignored = None if ignore is None else target[b, 2].numpy()
        for c in range(2):
            expected = signed_distance_map(target[b, c].numpy(), (1.0, 1.0, 1.0), ignored)
            np.testing.assert_array_equal(found[b, c].numpy(), expected)
