"""Signed distance maps of labelled patches, computed in the loader's workers after augmentation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nnunetv2_semisup.evaluation.metrics import bounding_box


@dataclass(frozen=True)
class SignedDistanceMaps:
    """A ``labelled_transform`` (see ``trainers/method.py``): one map per foreground class or region of each patch.

    Attributes:
        classes: foreground classes (labels 1 to ``classes``), or regions.
        has_regions: True where the target holds one channel per region, the ignore region last.
        ignore_label: value without a label, or None.
        spacing_mm: voxel size per axis of the patch.
        norm, empty, truncation_mm: as in :func:`signed_distance_map`.
    """

    classes: int
    has_regions: bool
    ignore_label: int | None
    spacing_mm: tuple[float, ...]
    norm: str = "patch_max"
    empty: str = "one"
    truncation_mm: float = 20.0

    def __call__(self, batch: dict) -> dict[str, Tensor]:
        """``batch["target"]`` as nnU-Net's loader gives it -> ``sdm`` (B, classes, X, Y, Z) float32, 2D drops Z."""
        target = batch["target"]
        target = (target[0] if isinstance(target, list) else target).numpy()
        maps = np.empty((len(target), self.classes, *target.shape[2:]), np.float32)
        for sample, labels in zip(maps, target, strict=True):
            ignored = None
            if self.ignore_label is not None:
                ignored = labels[-1].astype(bool) if self.has_regions else labels[0] == self.ignore_label
            for index in range(self.classes):
                mask = labels[index].astype(bool) if self.has_regions else labels[0] == index + 1
                sample[index] = signed_distance_map(
                    mask, self.spacing_mm, ignored, self.norm, self.empty, self.truncation_mm
                )
        return {"sdm": torch.from_numpy(maps)}


def signed_distance_map(
    mask: np.ndarray,
    spacing_mm: tuple[float, ...],
    ignored: np.ndarray | None = None,
    norm: str = "patch_max",
    empty: str = "one",
    truncation_mm: float = 20.0,
) -> np.ndarray:
    """Distance to the boundary: negative inside, positive outside, 0 on the inner boundary, in [-1, 1].

    d_out(x) is the distance to the nearest foreground voxel, d_in(x) that to the nearest background voxel of the patch,
    both 0 on their own side: S = d_out / max d_out - d_in / max d_in, then 0 on the inner boundary, the foreground
    voxels with a background voxel across a face. Beyond the patch there is neither.

    Args:
        mask: (X, Y, Z) or (X, Y) bool, the class.
        spacing_mm: voxel size per axis. With unequal sizes max d_in can lie on the boundary; S then stays above -1.
        ignored: bool voxels without a label, or None. They are in neither set, and a voxel that is nearer to them than
            to the boundary has no target, since the boundary may be there; the maxima are those of the others.
        norm: "patch_max" as above, or "truncated_mm": (d_out - d_in) / truncation_mm, cut to [-1, 1].
        empty: target of a patch without foreground or without background. "one": 1 or -1; "zero": 0; "mask": none.
        truncation_mm: distance that becomes 1 with "truncated_mm".

    Returns:
        float32, shape of ``mask``; NaN where there is no target.

    Reference: Li et al. (SASSNet), MICCAI 2020, released code, in voxels and with 0 for an empty mask.
    """
    if ignored is not None and not ignored.any():
        ignored = None
    inside, outside = (mask, ~mask) if ignored is None else (mask & ~ignored, ~mask & ~ignored)
    if not (inside.any() and outside.any()):
        value = {"one": -1.0 if inside.any() else 1.0, "zero": 0.0, "mask": np.nan}[empty]
        return np.full(mask.shape, value if ignored is None else np.nan, np.float32)

    # The background voxel nearest to a foreground one lies at most one voxel outside the class's bounding box.
    box = tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in bounding_box(inside))
    if ignored is not None:  # that voxel may be ignored
        box = (slice(None),) * mask.ndim
    d_out = np.sqrt(squared_distance(inside, spacing_mm))
    d_in = np.sqrt(squared_distance(outside[box], spacing_mm))
    known = None
    if ignored is not None:
        distance = np.where(inside, d_in, d_out)
        known = (np.sqrt(squared_distance(ignored, spacing_mm)) >= distance) & ~ignored

    if norm == "patch_max":
        d_out /= _maximum(d_out, known)
        d_in /= _maximum(d_in, known)
    signed = d_out
    signed[box] -= d_in
    if norm == "truncated_mm":
        signed = np.clip(signed / np.float32(truncation_mm), -1, 1)
    signed[box][_inner_boundary(inside[box], outside[box])] = 0
    if known is not None:
        signed[~known] = np.nan
    return signed


def squared_distance(sources: np.ndarray, spacing_mm: tuple[float, ...]) -> np.ndarray:
    """Exact squared Euclidean distance of every voxel to the nearest source.

    Axis by axis, d(i) = min_j d(j) + (spacing (i - j))^2. Here j runs over the bounding box of the sources alone, and
    lines that miss it wait for the pass along whose axis they meet it.

    Args:
        sources: (X, Y, Z) or (X, Y) bool, not empty.
        spacing_mm: voxel size per axis.

    Returns:
        float32 in mm^2, shape of ``sources``.

    Reference: Felzenszwalb & Huttenlocher, Theory of Computing 2012, section 2, with the minimum over all j.
    """
    box = bounding_box(sources)
    # The longest side first, as its pass has the fewest lines; the last pass covers the patch.
    first, *others = sorted(range(sources.ndim), key=lambda axis: box[axis].start - box[axis].stop)
    lines = tuple(slice(None) if axis == first else side for axis, side in enumerate(box))
    distance = np.square(_distance_along(sources[lines], first) * np.float32(spacing_mm[first]))
    for axis in others:
        length, side = sources.shape[axis], box[axis]
        steps = np.arange(length)[:, None] - np.arange(side.start, side.stop)
        added = np.square(steps * spacing_mm[axis]).astype(np.float32)
        distance = np.moveaxis(distance, axis, 0)
        shape = distance.shape[1:]
        distance = np.ascontiguousarray(distance).reshape(len(distance), -1)
        nearest = np.empty((length, distance.shape[1]), np.float32)
        candidates = np.empty_like(distance)
        for position in range(length):
            np.add(distance, added[position][:, None], out=candidates)
            np.minimum.reduce(candidates, axis=0, out=nearest[position])
        distance = np.moveaxis(nearest.reshape(length, *shape), 0, axis)
    return np.ascontiguousarray(distance)


def _distance_along(sources: np.ndarray, axis: int) -> np.ndarray:
    """Voxels along ``axis`` to the nearest source of the same line; inf where the line has none."""
    shape = [-1 if i == axis else 1 for i in range(sources.ndim)]
    position = np.arange(sources.shape[axis], dtype=np.float32).reshape(shape)
    before = np.maximum.accumulate(np.where(sources, position, -np.inf), axis=axis)
    after = np.minimum.accumulate(np.flip(np.where(sources, position, np.inf), axis), axis=axis)
    return np.minimum(position - before, np.flip(after, axis) - position).astype(np.float32)


def _inner_boundary(inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """Voxels of ``inside`` that share a face with one of ``outside``."""
    touched = np.zeros_like(inside)
    for axis in range(inside.ndim):
        mine, others = np.moveaxis(touched, axis, 0), np.moveaxis(outside, axis, 0)
        mine[1:] |= others[:-1]
        mine[:-1] |= others[1:]
    return inside & touched


def _maximum(distance: np.ndarray, known: np.ndarray | None) -> np.float32:
    """Largest distance among the known voxels; 1 if it is 0, as there is then nothing to scale."""
    largest = distance.max() if known is None else distance.max(where=known, initial=0)
    return largest if largest > 0 else np.float32(1)
