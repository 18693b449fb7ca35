"""What the headers of stored images say. Most of nnU-Net's readers take axes as they are stored and say nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import nibabel
import numpy as np
import SimpleITK as sitk

from nnunetv2_semisup.data.reading import READ_ERRORS
from nnunetv2_semisup.files import listed


@dataclass(frozen=True)
class Header:
    """Of one image file.

    Attributes:
        number: of axes.
        axes: where they point, e.g. "LPS" = to the left, posterior, superior; "" with two axes.
        is_complex: a voxel is a complex number.
    """

    number: int
    axes: str
    is_complex: bool = False


def turns_images(reader_name: str) -> bool:
    """Whether a reader of nnU-Net, given by the name of its class, turns all images to the same axes."""
    return reader_name.endswith("WithReorient")


def read_header(file: str) -> Header | None:
    """The header of an image; None for files that cannot be read: whoever reads the values will say so."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(file)
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return _header_by_nibabel(file)  # ITK refuses sheared axes
    number = reader.GetDimension()
    is_complex = "complex" in sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if number < 3:
        return Header(number, "", is_complex)
    direction = np.reshape(reader.GetDirection(), (number, number))[:3, :3]  # a fourth axis is that of the channels
    return Header(number, orientation_of(direction.ravel()), is_complex)


def stored_axes(file: str) -> str:
    """Where the axes of an image point, "" if that is not known; see :class:`Header`."""
    header = read_header(file)
    return header.axes if header else ""


def orientation_of(direction: Collection[float]) -> str:
    """Where three axes point, e.g. "LPS", to the closest axes of the patient.

    Args:
        direction: 9 cosines, as ITK has them.
    """
    return sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(tuple(direction))


def _header_by_nibabel(file: str) -> Header | None:
    if not file.lower().endswith((".nii", ".nii.gz")):
        return None
    try:
        image = nibabel.Nifti1Image.from_filename(file)
        return Header(image.ndim, "".join(code or "?" for code in nibabel.aff2axcodes(image.affine)))
    except READ_ERRORS:
        return None


def differing_axes(axes: Mapping[str, str], reference: Collection[str]) -> str:
    """A warning that names the cases whose axes point elsewhere than usual; empty if none do.

    Args:
        axes: case -> axes as of :func:`stored_axes`; empty ones do not count.
        reference: the cases, labelled ones, whose most frequent axes are the usual ones. If none are known: all.
    """
    known = {case: found for case, found in axes.items() if found}
    counts = Counter(known[case] for case in sorted(reference) if case in known) or Counter(known.values())
    if not counts:
        return ""
    usual = counts.most_common(1)[0][0]
    turned = [f"{case} ({found})" for case, found in sorted(known.items()) if found != usual]
    if not turned:
        return ""
    return (
        f"{len(turned)} cases have axes that point elsewhere than usual here ({usual}): {listed(turned, 10)}. nnU-Net "
        f"does not turn images: turn them, or leave them out"
    )
