"""Signed distance maps of labelled patches, computed in the loader's workers after augmentation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nnunetv2_semisup import labels
from nnunetv2_semisup.boxes import bounding_box


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
        of_task = (batch["target"], self.has_regions, self.ignore_label)
        classes = range(self.classes) if self.has_regions else range(1, self.classes + 1)
        masks, ignored = labels.class_masks(*of_task, classes).numpy(), ~labels.known_voxels(*of_task).numpy()
        maps = np.empty(masks.shape, np.float32)
        for sample, patch, unknown in zip(maps, masks, ignored, strict=True):
            for one, mask in zip(sample, patch, strict=True):
                one[...] = signed_distance_map(
                    mask, self.spacing_mm, unknown, self.norm, self.empty, self.truncation_mm
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
        ignored: bool voxels without a label, or None. They are in neither set, and a voxel whose value would depend on
            them has no target: off the boundary, those nearer to an ignored voxel than to the boundary, and foreground
            voxels that share a face with one. The maxima are those of the other voxels.
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
    d_out = distance_to(inside, spacing_mm)
    d_in = distance_to(outside[box], spacing_mm)
    boundary = _inner_boundary(inside[box], outside[box])
    known = None
    if ignored is not None:
        uncertain = ignored | (distance_to(ignored, spacing_mm) < np.where(inside, d_in, d_out))
        known = ~(uncertain | _inner_boundary(inside, ignored)) | boundary

    if norm == "patch_max":
        d_out /= _maximum(d_out, known)
        d_in /= _maximum(d_in, known)
    signed = d_out
    signed[box] -= d_in
    if norm == "truncated_mm":
        signed = np.clip(signed / np.float32(truncation_mm), -1, 1)
    signed[box][boundary] = 0
    if known is not None:
        signed[~known] = np.nan
    return signed


def distance_to(sources: np.ndarray, spacing_mm: tuple[float, ...]) -> np.ndarray:
    """Exact Euclidean distance of every voxel to the nearest source.

    Axis by axis, d2(i) = min_j d2(j) + (spacing (i - j))^2. Here j runs over the bounding box of the sources alone, and
    lines that miss it wait for the pass along whose axis they meet it. Where voxels are cubes and the patch is not too
    large, squared distances are whole numbers of 16 bits, which takes half the time of float32.

    Args:
        sources: (X, Y, Z) or (X, Y) bool, not empty.
        spacing_mm: voxel size per axis.

    Returns:
        float32 in mm, shape of ``sources``.

    Reference: Felzenszwalb & Huttenlocher, Theory of Computing 2012, section 2, with the minimum over all j.
    """
    reaches = [(length - 1) ** 2 for length in sources.shape]
    unit: float
    sizes: tuple[float, ...]
    far: float
    dtype: type[np.uint16 | np.float32]
    if len(set(spacing_mm)) == 1 and sum(reaches) + 1 + max(reaches) < 2**16:  # no sum below can be larger
        unit, sizes, far, dtype = spacing_mm[0], (1,) * sources.ndim, sum(reaches) + 1, np.uint16
    else:
        unit, sizes, far, dtype = 1, spacing_mm, np.inf, np.float32
    box = bounding_box(sources)
    # The longest side first, as its pass has the fewest lines; the last pass covers the patch.
    first, *others = sorted(range(sources.ndim), key=lambda axis: box[axis].start - box[axis].stop)
    lines = tuple(slice(None) if axis == first else side for axis, side in enumerate(box))
    squares = np.square(_steps_along(sources[lines], first) * np.float32(sizes[first]))
    squares = np.minimum(squares, np.float32(far)).astype(dtype)
    for axis in others:
        length, side = sources.shape[axis], box[axis]
        steps = np.arange(length)[:, None] - np.arange(side.start, side.stop)
        added = np.square(steps * sizes[axis]).astype(dtype)
        squares = np.moveaxis(squares, axis, 0)
        shape = squares.shape[1:]
        squares = np.ascontiguousarray(squares).reshape(len(squares), -1)
        # Some j brings every line within this reach, so those that are further away in themselves need not be tried.
        needed = added <= (added + squares.max(1)).min(1, keepdims=True)
        starts, stops = needed.argmax(1), len(squares) - needed[:, ::-1].argmax(1)
        nearest = np.empty((length, squares.shape[1]), dtype)
        candidates = np.empty_like(squares)
        for position, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            tried = np.add(squares[start:stop], added[position, start:stop, None], out=candidates[start:stop])
            np.minimum.reduce(tried, axis=0, out=nearest[position])
        squares = np.moveaxis(nearest.reshape(length, *shape), 0, axis)
    return np.sqrt(np.ascontiguousarray(squares, np.float32)) * np.float32(unit)


def _steps_along(sources: np.ndarray, axis: int) -> np.ndarray:
    """Voxels along ``axis`` to the nearest source of the same line, float32; inf where the line has none."""
    steps = np.where(sources, np.float32(0), np.float32(np.inf))
    rows = np.moveaxis(steps, axis, 0)
    for here, before in [*zip(rows[1:], rows, strict=False), *zip(rows[-2::-1], rows[::-1], strict=False)]:
        np.minimum(here, before + np.float32(1), out=here)
    return steps


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
