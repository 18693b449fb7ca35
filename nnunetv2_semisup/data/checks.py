"""Checks of images and labels that converters and the preprocessing of unlabelled images share, and their report."""

from __future__ import annotations

import gzip
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header

from nnunetv2_semisup.data.orientation import differing_axes
from nnunetv2_semisup.errors import InputError

LABELLED, UNLABELLED, VALIDATION, TEST = "labelled", "unlabelled", "validation", "test"
IMAGES_OF = {LABELLED: "imagesTr", UNLABELLED: "imagesUn", VALIDATION: "imagesVal", TEST: "imagesTs"}
LABELS_OF = {LABELLED: "labelsTr", VALIDATION: "labelsVal", TEST: "labelsTs"}


# --- of one image, raising ValueError: whoever preprocesses adds file and remedy -------------------------------------


def require_whole_nifti(file: str, finite: bool = False) -> None:
    """ITK reads a NIfTI file that was cut off without complaint and fills the rest with zeros, so count its bytes.

    Args:
        file: of any kind; what is not named as NIfTI passes.
        finite: refuse NaN and infinity as well, which ITK turns into zeros.
    """
    if not file.lower().endswith((".nii", ".nii.gz")):
        return
    with open(file, "rb") as stream:
        is_compressed = stream.read(2) == b"\x1f\x8b"
    name = os.path.basename(file)
    with gzip.open(file) if is_compressed else open(file, "rb") as stream:
        start = stream.read(4)
        header_class = Nifti2Header if start in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else Nifti1Header
        header_size = header_class.template_dtype.itemsize
        start += stream.read(header_size - len(start))
        if len(start) < header_size:
            raise ValueError(f"{name} is no NIfTI image")
        header = header_class(start, check=False)
        shape = header["dim"][1 : 1 + header["dim"][0]].astype(np.int64)
        offset = int(header["vox_offset"])
        expected = offset + int(shape.prod()) * int(header["bitpix"]) // 8
        kind = {16: "f4", 64: "f8"}.get(int(header["datatype"])) if finite else None
        found, rest = header_size, b""
        for block in iter(lambda: stream.read(1 << 20), b""):
            if kind:
                voxels = block[max(offset - found, 0) : max(expected - found, 0)]
                rest = _require_finite_values(rest + voxels, kind, header, name)
            found += len(block)
    if found < expected:
        raise ValueError(f"{name} is cut off, {found} of {expected} bytes are there")


def _require_finite_values(content: bytes, kind: str, header: Nifti1Header, name: str) -> bytes:
    """Check the whole numbers in ``content``; returns the bytes of the last one, if it is not whole."""
    whole = len(content) // int(kind[1]) * int(kind[1])
    if not np.isfinite(np.frombuffer(content[:whole], header.endianness + kind)).all():
        raise ValueError(f"{name} has NaN or infinite values")
    return content[whole:]


def require_channels(data: np.ndarray, expected: int) -> None:
    """Args: data: (C, X, Y, Z)."""
    if data.shape[0] != expected:
        raise ValueError(f"it has {data.shape[0]} channels, the plans expect {expected}")


def require_finite(data: np.ndarray) -> None:
    """Args: data: (C, X, Y, Z) float."""
    bad = [channel for channel in range(data.shape[0]) if not np.isfinite(data[channel]).all()]
    if bad:
        raise ValueError(f"NaN or infinite values in channel {', '.join(map(str, bad))}")


# --- of one case, raising InputError ---------------------------------------------------------------------------------


def check_image(array: np.ndarray, path: os.PathLike, grey_2d: bool = False) -> None:
    """Raise an InputError unless ``array`` is real-valued, finite, not empty, and has three axes.

    Args:
        array: a volume, or a colour photograph with its channels last.
        path: of the image.
        grey_2d: allow two axes as well.
    """
    if array.ndim not in ((2, 3) if grey_2d else (3,)) or array.size == 0:
        raise InputError(f"{path}: the image has shape {array.shape}, expected a volume of three axes")
    if array.dtype.kind not in "uif":
        raise InputError(f"{path}: the image has type {array.dtype}, expected numbers")
    if not np.isfinite(array).all():
        raise InputError(
            f"{path}: the image has values that are not finite (NaN or infinity); replace them, e.g. by the value of "
            f"the background"
        )


def check_label(array: np.ndarray, shape: tuple[int, ...], allowed: Sequence[int], path: os.PathLike) -> None:
    """Raise an InputError unless ``array`` has the image's ``shape`` and only ``allowed`` values."""
    if array.shape != shape:
        raise InputError(f"{path}: the label has shape {array.shape}, the image {shape}; both must be the same")
    if array.dtype.kind not in "uif":
        raise InputError(f"{path}: the label has type {array.dtype}, expected numbers")
    unexpected = np.unique(array[~np.isin(array, allowed)])
    if unexpected.size:
        values = ", ".join(f"{value:.10g}" for value in unexpected[:5])
        raise InputError(f"{path}: unexpected label value {values}; only {', '.join(map(str, allowed))} may occur")


def check_not_empty(array: np.ndarray, path: os.PathLike) -> None:
    """Raise an InputError if a label is background only."""
    if not np.any(array):
        raise InputError(f"{path}: the label is empty, yet every case shows something; copy or download it again")


# --- of all cases ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What is known of a case once it was read.

    Attributes:
        case: its id.
        role: "labelled", "unlabelled", "validation" or "test".
        size: voxels along x, y (and z).
        spacing: mm along x, y (and z).
        voxels: class value -> number of voxels; empty without a label.
        remark: something to tell the user, or "".
        axes: where they point, e.g. "LPS"; "" for 2D images.
    """

    case: str
    role: str
    size: tuple[int, ...]
    spacing: tuple[float, ...]
    voxels: dict[int, int]
    remark: str = ""
    axes: str = ""

    def volume(self, value: int) -> float:
        """Volume of a class in ml."""
        return self.voxels.get(value, 0) * float(np.prod(self.spacing)) / 1000


def facts_rows(
    facts: Sequence[Facts], labels: dict[str, int], spacing_note: str = "", role_notes: dict[str, str] | None = None
) -> list[tuple[str, str]]:
    """The rows of a report: cases, roles, spacing and shape ranges, size of each class.

    Args:
        facts: of all cases.
        labels: class name -> value.
        spacing_note: where the spacing comes from.
        role_notes: role -> what to add to its row.
    """
    notes = role_notes or {}
    rows = [("cases", str(len(facts)))]
    for role, folder in IMAGES_OF.items():
        number = sum(fact.role == role for fact in facts)
        if number or role != VALIDATION:
            rows.append((role, f"{number} in {folder}{notes.get(role, '')}"))
    axes = "x, y, z" if len(facts[0].size) == 3 else "x, y"
    rows.append(
        ("spacing", f"{range_text([f.spacing for f in facts])} mm ({axes}){spacing_note and ', '}{spacing_note}")
    )
    rows.append(("shape", f"{range_text([fact.size for fact in facts])} voxels ({axes})"))
    with_label = [fact for fact in facts if fact.voxels]
    for name, value in labels.items():
        if value == 0 or not with_label:
            continue
        if axes == "x, y":
            shares = [100 * fact.voxels.get(value, 0) / np.prod(fact.size) for fact in with_label]
            text = f"{np.mean(shares):.3g} % of the image on average ({min(shares):.3g}-{max(shares):.3g})"
        else:
            volumes = [fact.volume(value) for fact in with_label]
            text = f"{np.mean(volumes):.3g} ml on average ({min(volumes):.3g}-{max(volumes):.3g})"
        absent = sum(not fact.voxels.get(value) for fact in with_label)
        rows.append((name, f"{text} in {len(with_label)} cases{f', absent in {absent}' if absent else ''}"))
    for remark in sorted({fact.remark for fact in facts if fact.remark}):
        cases = [fact.case for fact in facts if fact.remark == remark]
        more = f" and {len(cases) - 5} more" if len(cases) > 5 else ""
        rows.append(("note", f"{remark}: {len(cases)} cases ({', '.join(cases[:5])}{more})"))
    turned = differing_axes({f.case: f.axes for f in facts}, [f.case for f in facts if f.role == LABELLED])
    return [*rows, ("WARNING", turned)] if turned else rows


def range_text(rows: Sequence[Sequence[float]]) -> str:
    """Smallest and largest value per column: ``[(148, 88), (244, 88)]`` gives ``"148-244 x 88"``."""
    columns = [(min(column), max(column)) for column in zip(*rows, strict=True)]
    return " x ".join(f"{low:g}" if low == high else f"{low:g}-{high:g}" for low, high in columns)


def table_text(rows: Sequence[tuple[str, object]]) -> str:
    """Two aligned columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
