"""Boxes in images."""

import numpy as np


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box, as slices, that holds the true voxels of ``mask``; there must be one."""
    slices = []
    for axis in range(mask.ndim):
        occupied = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        slices.append(slice(int(occupied[0]), int(occupied[-1]) + 1))
    return tuple(slices)
