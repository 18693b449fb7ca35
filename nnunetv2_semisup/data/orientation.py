"""Where the axes of stored images point. Most of nnU-Net's readers take axes as they are stored and say nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import nibabel
import SimpleITK as sitk

from nnunetv2_semisup.files import listed


def turns_images(reader_name: str) -> bool:
    """Whether a reader of nnU-Net, given by the name of its class, turns all images to the same axes."""
    return reader_name.endswith("WithReorient")


def stored_axes(file: str) -> str:
    """Where the axes of a 3D image point, by its header, e.g. "LPS" = to the left, posterior, superior.

    Empty for other images and for files that cannot be read: whoever reads the values will say so.
    """
    reader = sitk.ImageFileReader()
    reader.SetFileName(file)
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return _axes_by_nibabel(file)  # ITK refuses sheared axes
    if reader.GetDimension() != 3:
        return ""
    return sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(reader.GetDirection())


def _axes_by_nibabel(file: str) -> str:
    if not file.lower().endswith((".nii", ".nii.gz")):
        return ""
    try:
        return "".join(code or "?" for code in nibabel.aff2axcodes(nibabel.Nifti1Image.from_filename(file).affine))
    except Exception:  # damaged in one of many ways
        return ""


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
