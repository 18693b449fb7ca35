"""DICOM series: find them among files, and read one whose slices are all there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunetv2_semisup.data.reading import last_line, read_errors
from nnunetv2_semisup.errors import InputError

# Objects that are no images: directory, curves and presentation states, registrations, reports, documents, plans.
_NO_IMAGES = (
    "1.2.840.10008.1.3.10",
    *(f"1.2.840.10008.5.1.4.1.1.{part}" for part in ("9.", "11.", "66", "88.", "104.", "481.3", "481.5")),
)


def find_series(files: Sequence[Path], refused: dict[str, str] | None = None) -> dict[tuple[Path, str], list[Path]]:
    """DICOM series among ``files``: (folder, series UID) -> files in the order of their position.

    Args:
        files: of any kind.
        refused: takes what is wrong, file or folder -> reason, in the place of an error; these series are left out.

    Raises:
        InputError: without ``refused``: a DICOM file belongs to no series, since it cannot be read: the series of its
            folder may lack a slice. Or two folders have parts or copies of one series.
    """
    faults: dict[str, str] = {}
    found: dict[tuple[Path, str], list[Path]] = {}
    dicom = [file for file in files if _is_dicom(file)]
    for folder in dict.fromkeys(file.parent for file in dicom):
        for uid in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)):
            names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid)
            found[folder, uid] = [Path(name) for name in names]
    members = {file for series in found.values() for file in series}
    for file in dicom:
        if file not in members and not _dicom_class(file).startswith(_NO_IMAGES):
            faults[str(file)] = (
                f"{file}: a DICOM file that cannot be read as an image; download it again, or move it away if it is no "
                f"slice"
            )
            incomplete = [key for key in found if key[0] == file.parent]
            found = {key: series for key, series in found.items() if key not in incomplete}
    found = _in_one_folder(found, faults)
    if refused is None and faults:
        raise InputError(next(iter(faults.values())))
    if refused is not None:
        refused |= faults
    return found


def _in_one_folder(
    found: dict[tuple[Path, str], list[Path]], faults: dict[str, str]
) -> dict[tuple[Path, str], list[Path]]:
    """``found`` without series of which two folders have parts or copies; why is put into ``faults``.

    Other slices at the same positions are other images, e.g. phases; so are those of other patients, whose UIDs should
    differ and sometimes do not after anonymisation.
    """
    seen: dict[tuple[str, str], list[list[Path]]] = {}
    apart: set[tuple[Path, str]] = set()
    for (folder, uid), files in found.items():
        before = seen.setdefault((uid, dicom_tag(files[0], "0010|0020")), [])
        for others in before:
            (ids, places), (other_ids, other_places) = (
                [{dicom_tag(file, tag) for file in part} for tag in ("0008|0018", "0020|0032")]
                for part in (files, others)
            )
            if ids & other_ids:
                what = f"; {len(ids & other_ids)} slices are there twice, move one copy away"
            elif places != other_places:
                what = ", slices of one image; put them into one folder"
            else:
                continue
            where = f"{others[0].parent} and {folder} both have files of the DICOM series {uid}"
            faults[f"{folder} {uid}"] = where + what
            apart |= {(folder, uid), (others[0].parent, uid)}
        before.append(files)
    return {key: files for key, files in found.items() if key not in apart}


def _is_dicom(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _dicom_class(file: Path) -> str:
    """UID of the kind of object, from the file's meta header; empty if it is not there."""
    with file.open("rb") as stream:
        start = stream.read(1024)
    place = start.find(b"\x02\0\x02\0UI") + 6
    if place < 6:
        return ""
    length = int.from_bytes(start[place : place + 2], "little")
    return start[place + 2 : place + 2 + length].decode("ascii", "replace").rstrip("\0 ")


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
    for file, reader in zip(files, slices, strict=True):
        if other := _grid_differs(reader, slices[0]):
            raise InputError(
                f"{file}: its {other} is another than that of {files[0].name}, and yet both are of one DICOM series; "
                f"move the slices of another kind to a folder of their own"
            )
        if _stored_as(reader) != _stored_as(slices[0]):
            raise InputError(
                f"{file}: its values are stored otherwise than those of {files[0].name} (rescaling or number type); "
                f"convert the series to NIfTI with a tool that allows this, e.g. dcm2niix"
            )
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
    series = sitk.ImageSeriesReader()
    series.SetFileNames([str(file) for file in files])
    with read_errors(lambda error: f"{place}: damaged DICOM series ({last_line(error)}); download it again"):
        return series.Execute()


def _grid_differs(reader: sitk.ImageFileReader, first: sitk.ImageFileReader) -> str:
    """What of a slice's place in the plane differs from the first one; empty if nothing."""
    for what, here, there in (
        ("number of pixels", reader.GetSize()[:2], first.GetSize()[:2]),
        ("pixel spacing", reader.GetSpacing()[:2], first.GetSpacing()[:2]),
        ("orientation", reader.GetDirection(), first.GetDirection()),
    ):
        if not np.allclose(here, there, rtol=1e-3, atol=1e-3):
            return what
    return ""


def _stored_as(reader: sitk.ImageFileReader) -> list:
    """Rescale intercept and slope, bits and sign of a slice."""
    tags = ("0028|1052", "0028|1053", "0028|0100", "0028|0103")
    return [float(reader.GetMetaData(tag)) if reader.HasMetaDataKey(tag) else None for tag in tags]


def _information(file: Path) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    with read_errors(lambda error: f"{file}: damaged or incomplete ({last_line(error)}); download it again"):
        reader.ReadImageInformation()
    return reader
