"""Medical images in files: read with an error that says what to do, write surely, orientation."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk

from nnunetv2_semisup.data.checks import check_label, require_own_data, require_whole_nifti
from nnunetv2_semisup.data.headers import orientation_of
from nnunetv2_semisup.data.reading import damaged, last_line, read_errors
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.files import is_utf8

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar")


def read_image(path: Path, image_io: str = "", by_nibabel: bool = False) -> sitk.Image:
    """Read an image file; an InputError names it if it is damaged, a NIfTI file cut off or with NaN included.

    Args:
        path: file of any format that SimpleITK knows.
        image_io: name of the reader, e.g. "NrrdImageIO"; empty: by content.
        by_nibabel: read NIfTI by nibabel, which takes sheared axes too.
    """
    with read_errors(lambda error: _what_is_wrong(path, error)):
        require_whole_nifti(str(path), finite=True)
        require_own_data(str(path))
        if by_nibabel and path.name.lower().endswith((".nii", ".nii.gz")):
            return _read_by_nibabel(path)
        image = sitk.ReadImage(str(path), imageIO=image_io)
        if "complex" in image.GetPixelIDTypeAsString():
            raise ValueError("complex numbers, of which the imaginary part would be lost: save the magnitude")
        return image


def _read_by_nibabel(path: Path) -> sitk.Image:
    """As nnU-Net's NibabelIO reads it: three axes, the voxel size of the header, the axes of the affine matrix."""
    nifti = nibabel.Nifti1Image.from_filename(path)
    if nifti.ndim != 3:
        raise ValueError(f"{nifti.ndim} axes, and the data set's reader (nibabel) takes three")
    affine = np.diag([-1, -1, 1, 1]) @ nifti.affine  # to ITK's axes
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not lengths.all():
        raise ValueError("its affine matrix has an axis of length 0")
    image = sitk.GetImageFromArray(np.ascontiguousarray(np.asanyarray(nifti.dataobj).T))
    image.SetSpacing([float(size) for size in nifti.header.get_zooms()])
    image.SetDirection((affine[:3, :3] / lengths).ravel())
    image.SetOrigin(affine[:3, 3])
    return image


def _what_is_wrong(path: Path, error: Exception) -> str:
    """An error of a reader, with what helps against it."""
    reason = last_line(error)
    ending = re.search(r"(\.nii)?\.\w+$", path.name, re.IGNORECASE)
    if "Unable to determine" in reason and ending and ending[0] != ending[0].lower():
        return f"{path}: ITK does not know the ending {ending[0]}; rename the file, with the ending {ending[0].lower()}"
    if "orthonormal" in reason:
        return f"{path}: by its header the axes are not at right angles (sheared); resample it onto axes that are"
    if "NaN" in reason:
        return f"{path} has NaN or infinite values; replace them, e.g. by the value of the background"
    return damaged(path)(error)


def read_label(path: Path, allowed: Sequence[int]) -> sitk.Image:
    """Read a 3D label as uint8, with its header, having checked that no other than the ``allowed`` values occur."""
    label = read_image(path)
    _require_volume(label, path)
    array = sitk.GetArrayViewFromImage(label)
    check_label(array, array.shape, allowed, path)
    small = sitk.Cast(label, sitk.sitkUInt8)
    for key in label.GetMetaDataKeys():
        small.SetMetaData(key, label.GetMetaData(key))
    return small


def _require_volume(image: sitk.Image, path: Path) -> None:
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() > 1:
        raise InputError(f"{path}: {image.GetDimension()} axes or several values per voxel; expected one 3D volume")


def write_image(image: sitk.Image, path: Path) -> None:
    """Write an image and read it back: on a full disk SimpleITK loses data without raising an error."""
    try:
        sitk.WriteImage(image, str(path), useCompression=True)
        written = sitk.ReadImage(str(path))
        same = np.array_equal(sitk.GetArrayViewFromImage(written), sitk.GetArrayViewFromImage(image))
    except RuntimeError:
        same = False
    if not same:
        raise InputError(f"{path} could not be written; is the disk full?")


# --- geometry -------------------------------------------------------------------------------------------------------


def same_geometry(a: sitk.Image, b: sitk.Image) -> bool:
    """Whether spacing, origin (mm) and direction agree to 0.001."""
    pairs = ((a.GetSpacing(), b.GetSpacing()), (a.GetOrigin(), b.GetOrigin()), (a.GetDirection(), b.GetDirection()))
    return all(np.allclose(left, right, rtol=0, atol=1e-3) for left, right in pairs)


def require_same_geometry(label: sitk.Image, image: sitk.Image, path: Path, image_path: Path) -> None:
    """Raise an InputError unless label and image lie at the same place by their headers."""
    if not same_geometry(label, image):
        raise InputError(
            f"{path}: its header differs from {image_path.name} in spacing, origin or direction; is it the label of "
            f"another case? If it belongs there, correct the header, else copy or download it again"
        )


def orientation(image: sitk.Image) -> str:
    """Where the axes of a 3D image point, to the closest patient axis: "LPS" = left, posterior, superior."""
    return orientation_of(_direction(image).ravel())


def reoriented(image: sitk.Image, axes: str, path: Path) -> sitk.Image:
    """A 3D image with its axes permuted and flipped so that they point as ``axes``, e.g. "LPS", says.

    Args:
        path: of the image, for errors.
    """
    cosines = np.reshape(image.GetDirection(), (image.GetDimension(),) * 2)
    if len(cosines) != 3 or not np.allclose(cosines.T @ cosines, np.eye(3), atol=1e-3):
        raise InputError(f"{path}: its axes are four or not at right angles, so it cannot be turned; convert it first")
    return sitk.DICOMOrient(image, axes)


def align_label(label: sitk.Image, image: sitk.Image, path: Path, image_path: Path) -> tuple[sitk.Image, bool]:
    """Put a label stored with other axes onto the grid of its image, by permuting and flipping axes only.

    Which axes belong together is read from the direction matrices. No value is interpolated.

    Args:
        label: 3D, any orientation.
        image: 3D.
        path: the label's file, for errors.
        image_path: the image's file, or one of them, for errors.

    Returns:
        the label with the image's geometry, and whether both headers describe the same place in space (to half a
        voxel). If not, the label's header keeps no place, its origin is zero: only the orientation could be taken from
        it, so look at a preview.

    Raises:
        InputError: the label keeps no orientation, or number of voxels, spacing or place differ after that.
    """
    _require_volume(label, path)
    _require_volume(image, image_path)
    if _lacks_orientation(label) and not _lacks_orientation(image):
        raise InputError(
            f"{path}: its header keeps no orientation (qform and sform code 0), so which way round it belongs onto "
            f"{image_path} is unknown; correct the header"
        )
    between = _direction(label).T @ _direction(image)  # column j: image axis j in terms of the label's axes
    order = np.abs(between).argmax(axis=0)
    if len(set(order)) < 3:
        raise InputError(f"{path}: its axes lie between those of the image; resample it onto the image's grid first")
    flipped = [bool(between[axis, j] < 0) for j, axis in enumerate(order)]

    array = sitk.GetArrayFromImage(label).transpose(2, 1, 0).transpose(order)
    array = np.flip(array, tuple(j for j in range(3) if flipped[j]))
    spacing = np.asarray(label.GetSpacing())[order]
    if array.shape != image.GetSize():
        raise InputError(
            f"{path}: the label has {_text(array.shape)} voxels along the axes of its image, which has "
            f"{_text(image.GetSize())}; is it the label of another case, or are slices missing?"
        )
    if not np.allclose(spacing, image.GetSpacing(), rtol=0.01):
        raise InputError(
            f"{path}: its spacing is {_text(spacing)} mm along the axes of its image, the image's "
            f"{_text(image.GetSpacing())} mm; correct the header or download it again"
        )
    corner = np.zeros(3, int)
    corner[order] = [size - 1 if flip else 0 for size, flip in zip(array.shape, flipped, strict=True)]
    # The first and the last voxel of the image, seen by the label's header: where in the image are they?
    opposite = np.asarray(label.GetSize()) - 1 - corner
    ends = [label.TransformIndexToPhysicalPoint([int(i) for i in index]) for index in (corner, opposite)]
    places = [image.TransformPhysicalPointToContinuousIndex(end) for end in ends]
    off = np.abs(np.asarray(places) - [np.zeros(3), np.asarray(image.GetSize()) - 1]).max()
    if off > 0.5 and any(label.GetOrigin()):
        raise InputError(
            f"{path}: by the headers it lies {off:.3g} voxels away from {image_path}; is it the label of another case? "
            f"If it belongs there, correct the header, e.g. with origin and direction of the image"
        )

    aligned = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    aligned.CopyInformation(image)
    return aligned, bool(off <= 0.5)


def _lacks_orientation(image: sitk.Image) -> bool:
    """Whether a NIfTI header says nothing of the axes."""
    return all(image.HasMetaDataKey(key) and image.GetMetaData(key) == "0" for key in ("qform_code", "sform_code"))


def content_hash(images: Sequence[sitk.Image]) -> str:
    """Hash of the values of a case, the same in every file format, number type and stored orientation.

    Args:
        images: one per channel.
    """
    digest = hashlib.sha256()
    for image in images:
        if image.GetDimension() == 3 and image.GetNumberOfComponentsPerPixel() == 1:
            image = sitk.DICOMOrient(image, "LPS")
        array = sitk.GetArrayViewFromImage(image)
        digest.update(str(array.shape).encode())
        digest.update(np.ascontiguousarray(array, dtype="<f4").data)
    return digest.hexdigest()


def _direction(image: sitk.Image) -> np.ndarray:
    """(3, 3) of an image of three axes, or of four, the last of which is that of the channels."""
    return np.reshape(image.GetDirection(), (image.GetDimension(),) * 2)[:3, :3]


def _text(values: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)


# --- files and folders ----------------------------------------------------------------------------------------------


def check_source(source: Path) -> Path:
    """``source`` resolved, if it is a folder; archives are refused, since unpacking is the user's decision."""
    if source.is_file() and source.name.lower().endswith(ARCHIVES):
        raise InputError(f"--source {source} is an archive: unpack it and give the folder")
    if not source.is_dir():
        raise InputError(f"--source {source} is no folder")
    return source.resolve()


def packed(source: Path) -> str:
    """What to add to an error where files are missing: the archives below ``source``, or nothing."""
    found = [str(file) for file in sorted(source.rglob("[!.]*")) if file.name.lower().endswith(ARCHIVES)]
    if not found:
        return ""
    more = f" and {len(found) - 1} more archives are" if len(found) > 1 else " is"
    return f"; {found[0]}{more} there: unpack first"


def check_inside(files: Sequence[Path], source: Path) -> None:
    """Refuse files that lie outside of ``source``, which must be resolved, when links are followed."""
    for file in files:
        if not file.resolve().is_relative_to(source):
            raise InputError(
                f"{file} is a link that leaves the source folder (to {file.resolve()}); put the file there, or "
                f"give the folder where the files lie"
            )


def walk(folder: Path) -> list[Path]:
    """All files below ``folder``, sorted, hidden ones left out.

    A linked folder is not entered: it leads to files that are found anyway, or out of ``folder``, which is refused.
    So are links that lead nowhere, folders that cannot be read, pipes and devices, which would hang a reader, and names
    that are no UTF-8.
    """

    def refuse(error: OSError) -> None:
        text = f"{error.filename} cannot be read ({error.strerror}); change its permissions, or move it away"
        raise InputError(text) from error

    found = []
    for root, folders, files in os.walk(folder, onerror=refuse):
        check_inside([Path(root, name) for name in folders if Path(root, name).is_symlink()], folder.resolve())
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(root, name) for name in sorted(files) if not name.startswith(".")]
    for file in found:
        if not is_utf8(str(file)):
            raise InputError(f"{str(file)!a}: its name is no UTF-8; rename it")
        if not file.exists():
            raise InputError(f"{file} is a link to {file.readlink()}, which does not exist; put the file there")
        if not file.is_file():
            raise InputError(f"{file} is a pipe, socket or device and no file; move it away")
    return found
