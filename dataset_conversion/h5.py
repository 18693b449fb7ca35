"""HDF5 files with ``image`` and ``label``, the form in which the semi-supervised literature passes data sets on."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunetv2_semisup.data.reading import damaged, read_errors
from nnunetv2_semisup.errors import InputError


def require_h5py() -> None:
    if importlib.util.find_spec("h5py") is None:
        raise InputError("h5py is needed to read the h5 form; run: pip install h5py")


def read_h5_arrays(path: Path, names: Sequence[str]) -> list[np.ndarray]:
    """Read the named datasets of an HDF5 file, and no others."""
    import h5py  # an extra: whoever converts other forms does not need it

    with read_errors(damaged(path)), h5py.File(path) as file:
        for name in names:
            if not isinstance(file.get(name), h5py.Dataset):
                raise InputError(f"{path}: no dataset {name!r} inside; it must have 'image' and 'label'")
        return [np.asarray(file[name][()]) for name in names]


def array_to_image(array: np.ndarray, spacing: Sequence[float]) -> sitk.Image:
    """An image with identity direction and origin 0.

    Args:
        array: (X, Y, Z).
        spacing: x, y, z in mm.
    """
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    image.SetSpacing(spacing)
    return image


def check_spacing(
    values: Sequence[float] | None, form: str, default: tuple[float, float, float], headers: str
) -> tuple[float, float, float] | None:
    """The spacing to write, x, y, z in mm; None for a form whose headers have it.

    Args:
        values: one or three numbers in mm, or None: ``default``.
        form: "h5" or another one.
        default: mm.
        headers: what the files of the other form are called, for the error.
    """
    if form != "h5":
        if values is not None:
            raise InputError(f"--spacing is for the h5 form only: the {headers} headers have the spacing; leave it out")
        return None
    if values is None:
        return default
    if len(values) not in (1, 3) or not all(math.isfinite(value) and value > 0 for value in values):
        raise InputError(f"--spacing {' '.join(map(str, values))}: give one number or three (x y z), in mm, above 0")
    return tuple(values) * 3 if len(values) == 1 else tuple(values)
