"""HDF5 files with ``image`` and ``label``, the form in which the semi-supervised literature passes data sets on."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunetv2_semisup.data.reading import damaged, read_errors
from nnunetv2_semisup.errors import InputError

MAX_COMPRESSION = 1100  # deflate makes at most 1032 bytes of one


def require_h5py() -> None:
    if importlib.util.find_spec("h5py") is None:
        raise InputError("h5py is needed to read the h5 form; run: pip install h5py")


def read_h5_arrays(path: Path, names: Sequence[str]) -> list[np.ndarray]:
    """Read the named datasets of an HDF5 file, and no others; what lies in other files, or is not there, is refused."""
    import h5py  # an extra: whoever converts other forms does not need it

    with read_errors(damaged(path)), h5py.File(path) as file:
        return [np.asarray(_own_dataset(file, name, path)[()]) for name in names]


def _own_dataset(file: Any, name: str, path: Path) -> Any:
    """The dataset ``name``, if its values are in this file."""
    import h5py

    if isinstance(file.get(name, getlink=True), h5py.ExternalLink):
        raise InputError(f"{path}: {name!r} is a link to another file; put the values into this one")
    data = file[name] if name in file else None  # noqa: SIM401 - whoever watches sees what is opened
    if not isinstance(data, h5py.Dataset):
        raise InputError(f"{path}: no dataset {name!r} inside; it must have 'image' and 'label'")
    if data.external or data.is_virtual:
        raise InputError(f"{path}: {name!r} has its values in another file; put them into this one")
    if data.nbytes > MAX_COMPRESSION * max(1, data.id.get_storage_size()):
        raise InputError(
            f"{path}: {name!r} claims {data.nbytes / 2**30:.3g} GiB and {data.id.get_storage_size()} bytes are there; "
            f"copy or download it again"
        )
    return data


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
