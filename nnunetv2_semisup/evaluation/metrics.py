"""Overlap and surface distances of two binary masks, as the literature computes them; the unit is in every name.

With P = prediction, R = reference, and the surface of a mask = its voxels that have a face neighbour outside it (the
outside of the image counts as outside the mask):

- ``dice`` = 2|P and R| / (|P| + |R|), ``jaccard`` = |P and R| / |P or R|
- d(P, R) = for every surface voxel of P the Euclidean distance to the nearest surface voxel of R
- ``hd95`` = 95th percentile (linear interpolation) of d(P, R) and d(R, P) pooled
- ``asd`` = mean of d(P, R) alone: from prediction to reference, as published tables have it
- ``assd`` = mean of d(P, R) and d(R, P) pooled

``_voxel`` takes every axis as one voxel long, as published tables do; ``_mm`` uses the spacing.

Where a mask is empty no distance exists, and none is made up:

==========================  =============  =========
case                        dice, jaccard  distances
==========================  =============  =========
one mask empty (a failure)  0              NaN
both masks empty            NaN            NaN
==========================  =============  =========

Reference: MedPy 0.5.2, ``medpy.metric.binary`` (dc, jc, hd95, asd, assd with connectivity 1). The same numbers wherever
both masks have a voxel. docs/evaluation.md has the two side by side, and how other libraries differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.ndimage import distance_transform_edt

from nnunetv2_semisup.boxes import bounding_box

METRICS = ("dice", "jaccard", "hd95_voxel", "asd_voxel", "hd95_mm", "assd_mm")


def compare_masks(
    prediction: np.ndarray, reference: np.ndarray, spacing_mm: Sequence[float] | None
) -> dict[str, float]:
    """All of ``METRICS`` for one pair of masks.

    Args:
        prediction: bool, any number of axes.
        reference: bool, the same shape.
        spacing_mm: voxel size per axis, in the order of the arrays' axes, in mm. None: unknown, no ``_mm`` metrics.

    Returns:
        Metric name -> value; NaN where it is undefined (see the module's docstring).

    Raises:
        TypeError: a mask is not boolean.
        ValueError: shapes differ, or the spacing is not one positive number per axis.
    """
    _check(prediction, reference, spacing_mm)
    sizes = int(np.count_nonzero(prediction)), int(np.count_nonzero(reference))
    overlap = int(np.count_nonzero(prediction & reference))
    values = dict.fromkeys(METRICS, math.nan)
    if any(sizes):
        values["dice"], values["jaccard"] = 2 * overlap / sum(sizes), overlap / (sum(sizes) - overlap)
    if not all(sizes):
        return values

    box = bounding_box(prediction | reference)
    surfaces = surface(prediction[box]), surface(reference[box])
    to_reference, to_prediction = _distances(*surfaces, (1.0,) * prediction.ndim)
    values["hd95_voxel"] = _percentile_95(to_reference, to_prediction)
    values["asd_voxel"] = float(to_reference.mean())
    if spacing_mm is None:
        return values
    if len(set(spacing_mm)) == 1:
        to_reference, to_prediction = to_reference * spacing_mm[0], to_prediction * spacing_mm[0]
    else:
        to_reference, to_prediction = _distances(*surfaces, spacing_mm)
    values["hd95_mm"] = _percentile_95(to_reference, to_prediction)
    values["assd_mm"] = float(np.concatenate((to_reference, to_prediction)).mean())
    return values


def surface(mask: np.ndarray) -> np.ndarray:
    """Voxels of ``mask`` (bool) with a face neighbour outside it; what lies beyond the array is outside.

    Equal to the mask minus its erosion at connectivity 1. Cropping to a box that holds the mask does not change it,
    since every neighbour beyond the box is background either way.
    """
    inner = mask.copy()
    for axis in range(mask.ndim):
        moved, inside = np.moveaxis(mask, axis, 0), np.moveaxis(inner, axis, 0)
        inside[1:] &= moved[:-1]
        inside[:-1] &= moved[1:]
        inside[0] = inside[-1] = False
    boundary: np.ndarray = mask & ~inner
    return boundary


def _distances(first: np.ndarray, second: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """From every voxel of ``first`` to the nearest of ``second``, and back: one transform each, read where needed."""
    return _distances_to(first, second, spacing), _distances_to(second, first, spacing)


def _distances_to(voxels: np.ndarray, target: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    nearest = distance_transform_edt(~target, sampling=spacing, return_distances=False, return_indices=True)
    squared = np.zeros(np.count_nonzero(voxels))
    for axis, position in enumerate(np.nonzero(voxels)):
        squared = squared + ((nearest[axis][voxels] - position) * spacing[axis]) ** 2
    distances: np.ndarray = np.sqrt(squared)
    return distances


def _percentile_95(*distances: np.ndarray) -> float:
    return float(np.percentile(np.concatenate(distances), 95))


def _check(prediction: np.ndarray, reference: np.ndarray, spacing_mm: Sequence[float] | None) -> None:
    for name, mask in (("prediction", prediction), ("reference", reference)):
        if mask.dtype != np.bool_:
            raise TypeError(f"{name} must be a boolean mask, not {mask.dtype}")
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction has shape {prediction.shape}, reference {reference.shape}")
    if spacing_mm is not None and (
        len(spacing_mm) != prediction.ndim or not all(math.isfinite(s) and s > 0 for s in spacing_mm)
    ):
        raise ValueError(f"spacing_mm must be {prediction.ndim} positive numbers, not {tuple(spacing_mm)}")
