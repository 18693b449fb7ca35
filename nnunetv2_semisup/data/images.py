"""Medical images in files: read with an error that says what to do, write surely, orientation, DICOM series."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunetv2_semisup.data.checks import require_whole_nifti
from nnunetv2_semisup.errors import InputError

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar")


def read_image(path: Path, image_io: str = "") -> sitk.Image:
    """Read an image file; an InputError names it if it is damaged, a NIfTI file that was cut off included.

    Args:
        path: file of any format that SimpleITK knows.
        image_io: name of the reader, e.g. "NrrdImageIO"; empty: by content.
    """
    try:
        require_whole_nifti(str(path))
        return sitk.ReadImage(str(path), imageIO=image_io)
    except (RuntimeError, ValueError, OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: damaged or incomplete ({last_line(error)}); copy or download it again") from error


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


def last_line(error: Exception) -> str:
    """The last line of an error's text, which is where ITK says what happened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


# --- geometry -------------------------------------------------------------------------------------------------------


def same_geometry(a: sitk.Image, b: sitk.Image) -> bool:
    """Whether spacing, origin (mm) and direction agree to 0.001."""
    pairs = ((a.GetSpacing(), b.GetSpacing()), (a.GetOrigin(), b.GetOrigin()), (a.GetDirection(), b.GetDirection()))
    return all(np.allclose(left, right, rtol=0, atol=1e-3) for left, right in pairs)


def orientation(image: sitk.Image) -> str:
    """Where the axes of a 3D image point, to the closest patient axis: "LPS" = left, posterior, superior."""
    return sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection())


def align_label(label: sitk.Image, image: sitk.Image, path: Path) -> tuple[sitk.Image, bool]:
    """Put a label stored with other axes onto the grid of its image, by permuting and flipping axes only.

    Which axes belong together is read from the direction matrices. No value is interpolated.

    Args:
        label: 3D, any orientation.
        image: 3D.
        path: the label's file, for errors.

    Returns:
        the label with the image's geometry, and whether both headers describe the same grid in space (to a tenth of a
        voxel). If not, only the orientation could be taken from the headers: look at a preview.

    Raises:
        InputError: number of voxels or spacing differ after that.
    """
    between = _direction(label).T @ _direction(image)  # column j: image axis j in terms of the label's axes
    order = np.abs(between).argmax(axis=0)
    if len(set(order)) < 3:
        raise InputError(f"{path}: its axes lie between those of the image; resample it onto the image's grid first")
    flipped = [bool(between[axis, j] < 0) for j, axis in enumerate(order)]

    array = sitk.GetArrayFromImage(label).transpose(2, 1, 0).transpose(order)
    array = np.flip(array, [j for j in range(3) if flipped[j]])
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
    # The first and the last voxel of the image, seen by the label's header.
    opposite = np.asarray(label.GetSize()) - 1 - corner
    ends = [label.TransformIndexToPhysicalPoint([int(i) for i in index]) for index in (corner, opposite)]
    last = image.TransformIndexToPhysicalPoint([size - 1 for size in image.GetSize()])
    exact = np.allclose(ends, [image.GetOrigin(), last], rtol=0, atol=0.1 * min(image.GetSpacing()))

    aligned = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    aligned.CopyInformation(image)
    return aligned, exact


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
    return np.asarray(image.GetDirection()).reshape(3, 3)


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
    """
    found = []
    for root, folders, files in os.walk(folder):
        check_inside([Path(root, name) for name in folders if Path(root, name).is_symlink()], folder.resolve())
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(root, name) for name in sorted(files) if not name.startswith(".")]
    return found


# --- DICOM ----------------------------------------------------------------------------------------------------------


def find_series(files: Sequence[Path]) -> dict[tuple[Path, str], list[Path]]:
    """DICOM series among ``files``: (folder, series UID) -> files in the order of their position."""
    folders = {}
    for file in files:
        if file.parent not in folders and _is_dicom(file):
            folders[file.parent] = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(file.parent))
    return {
        (folder, uid): [Path(name) for name in sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid)]
        for folder, uids in folders.items()
        for uid in uids
    }


def _is_dicom(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def dicom_tag(file: Path, tag: str) -> str:
    """Text of a tag, e.g. "0010|0020"; empty if it is missing."""
    reader = _information(file)
    return reader.GetMetaData(tag).strip() if reader.HasMetaDataKey(tag) else ""


def read_series(files: Sequence[Path]) -> sitk.Image:
    """Read the slices of a DICOM series, in HU for CT, having checked that none is missing.

    Args:
        files: in the order of their position, at least two.
    """
    place = files[0].parent
    if len(files) < 2:
        raise InputError(f"{place}: the DICOM series has one slice only; copy or download it again")
    slices = [_information(file) for file in files]
    normal = np.asarray(slices[0].GetDirection()).reshape(3, 3)[:, 2]
    steps = np.diff([reader.GetOrigin() for reader in slices], axis=0)
    distances = steps @ normal
    usual = float(np.median(distances))
    if usual <= 0 or np.abs(distances - usual).max() > max(0.02 * usual, 0.01):
        raise InputError(
            f"{place}: the {len(files)} DICOM slices are not evenly spaced ({distances.min():.3g} to "
            f"{distances.max():.3g} mm); slices are missing or doubled, download the series again"
        )
    if np.abs(steps - np.outer(distances, normal)).max() > 0.05 * usual:
        raise InputError(f"{place}: the DICOM slices are shifted against each other (gantry tilt); resample them first")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(file) for file in files])
    try:
        return reader.Execute()
    except RuntimeError as error:
        raise InputError(f"{place}: damaged DICOM series ({last_line(error)}); download it again") from error


def _information(file: Path) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise InputError(f"{file}: damaged or incomplete ({last_line(error)}); download it again") from error
    return reader
