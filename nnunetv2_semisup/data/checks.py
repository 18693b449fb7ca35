"""Checks of images and labels that converters and the preprocessing of unlabelled images share, and their report."""

from __future__ import annotations

import itertools
import math
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from nibabel.nifti1 import Nifti1Header, data_type_codes
from nibabel.nifti2 import Nifti2Header

from nnunetv2_semisup.data.headers import differing_axes
from nnunetv2_semisup.errors import InputError

LABELLED, UNLABELLED, VALIDATION, TEST = "labelled", "unlabelled", "validation", "test"
MAX_INTENSITY = 1e15  # squares of more than 1e19 are infinite in float32
IMAGES_OF = {LABELLED: "imagesTr", UNLABELLED: "imagesUn", VALIDATION: "imagesVal", TEST: "imagesTs"}
LABELS_OF = {LABELLED: "labelsTr", VALIDATION: "labelsVal", TEST: "labelsTs"}


# --- of one image, raising ValueError: whoever preprocesses adds file and remedy -------------------------------------


def require_whole_nifti(file: str, finite: bool = False) -> None:
    """Refuse what ITK reads of a NIfTI file without complaint: cut off, no voxels, no voxel size, complex numbers.

    Args:
        file: of any kind; what is not named as NIfTI passes.
        finite: refuse NaN and infinity as well, which ITK turns into zeros.
    """
    if not file.lower().endswith((".nii", ".nii.gz")):
        return
    name = os.path.basename(file)
    with open(file, "rb") as stream:
        is_compressed = stream.read(2) == b"\x1f\x8b"
        stream.seek(0)
        blocks = _decompressed(stream) if is_compressed else _blocks(stream)
        start = b""
        while len(start) < Nifti2Header.template_dtype.itemsize and (block := next(blocks, b"")):
            start += block
        is_second = start[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c")
        header_class = Nifti2Header if is_second else Nifti1Header
        header_size = header_class.template_dtype.itemsize
        if len(start) < header_size:
            raise ValueError(f"{name} is no NIfTI image")
        header = header_class(start[:header_size], check=False)
        kind = _require_sound_header(header, name)
        offset = int(header["vox_offset"])
        expected = offset + math.prod(_nifti_shape(header)) * kind.itemsize
        look_at_values = finite and kind.kind == "f"
        found, rest = header_size, b""
        for block in itertools.chain([start[header_size:]], blocks):
            if look_at_values:
                voxels = block[max(offset - found, 0) : max(expected - found, 0)]
                rest = _require_finite_values(rest + voxels, kind, name)
            found += len(block)
    if found < expected:
        raise ValueError(f"{name} is cut off, {found} of {expected} bytes are there")


def _blocks(stream: BinaryIO, size: int = 1 << 20) -> Iterator[bytes]:
    """A file in pieces."""
    return iter(lambda: stream.read(size), b"")


def _decompressed(stream: BinaryIO) -> Iterator[bytes]:
    """A gzip file in pieces. What follows its last member is left alone, as readers of NIfTI do.

    Raises:
        EOFError: not even its first member is whole.
    """
    member, one_is_whole = zlib.decompressobj(wbits=31), False
    for piece in _blocks(stream, 1 << 16):
        while piece:
            if member.eof:
                if not piece.startswith(b"\x1f\x8b"):
                    return
                member = zlib.decompressobj(wbits=31)
            yield from filter(None, [member.decompress(piece)])
            piece = member.unused_data
            one_is_whole |= member.eof
    if not one_is_whole:
        raise EOFError("the compressed data end too early")


def _nifti_shape(header: Nifti1Header) -> list[int]:
    return [int(n) for n in header["dim"][1 : 1 + max(0, int(header["dim"][0]))]]


def _require_sound_header(header: Nifti1Header, name: str) -> np.dtype:
    """Check number of axes, lengths, voxel size and type; returns the type of a voxel."""
    shape = _nifti_shape(header)
    if not 1 <= int(header["dim"][0]) <= 7 or any(n < 0 for n in shape):
        raise ValueError(f"{name} is no NIfTI image")
    if 0 in shape:
        raise ValueError(f"{name} has no voxels, its size is {' x '.join(map(str, shape))}")
    sizes = header["pixdim"][1 : 1 + min(3, len(shape))]
    if any(length > 1 and not (np.isfinite(size) and size) for length, size in zip(shape, sizes, strict=False)):
        told = " x ".join(f"{float(size):g}" for size in sizes)
        raise ValueError(f"{name} has no voxel size, its header says {told} mm: correct pixdim")
    code = int(header["datatype"])
    known: Any = data_type_codes.dtype
    if code not in known or known[code].itemsize == 0:
        raise ValueError(f"{name} has the data type {code}, which NIfTI does not know or readers do not read")
    kind = known[code].newbyteorder(header.endianness)
    if kind.kind == "c":
        raise ValueError(f"{name} has complex numbers, of which the imaginary part would be lost: save the magnitude")
    return kind


def _require_finite_values(content: bytes, kind: np.dtype, name: str) -> bytes:
    """Check the whole numbers in ``content``; returns the bytes of the last one, if it is not whole."""
    whole = len(content) // kind.itemsize * kind.itemsize
    if not np.isfinite(np.frombuffer(content[:whole], kind)).all():
        raise ValueError(f"{name} has NaN or infinite values")
    return content[whole:]


def require_own_data(file: str) -> None:
    """Refuse an NRRD or MetaImage header whose voxels lie in a file outside its folder.

    Args:
        file: of any kind; what is not named as NRRD or MetaImage passes.
    """
    if not file.lower().endswith((".nhdr", ".nrrd", ".mhd", ".mha")):
        return
    named = _named_data_files(file)
    folder = os.path.realpath(os.path.dirname(file))
    for name in named:
        place = os.path.realpath(os.path.join(folder, name))
        if os.path.isabs(name) or os.path.commonpath([folder, place]) != folder:
            raise ValueError(
                f"{os.path.basename(file)} takes its voxels from {name}, outside its folder: put that file beside it, "
                f"or save the image as one file"
            )


def _named_data_files(file: str) -> list[str]:
    """The files that a header names, patterns included; nothing where the voxels are in the file itself."""
    with open(file, "rb") as stream:
        text = stream.read(1 << 20).split(b"\n\n", 1)[0] if file.lower().endswith("rrd") else stream.read(1 << 20)
    names: list[str] = []
    lines = iter(text.decode("latin-1").splitlines())
    for line in lines:
        match = re.match(r"\s*(?:elementdatafile\s*=|data ?file:)\s*(.*?)\s*$", line, re.IGNORECASE)
        if match is None:
            continue
        value = match[1]
        if value.upper().startswith("LIST"):
            return [name.strip() for name in lines if name.strip()]
        if value.upper() == "LOCAL":
            return []
        return [value.split()[0] if "%" in value else value]
    return names


def require_channels(data: np.ndarray, expected: int) -> None:
    """Args: data: (C, X, Y, Z)."""
    found = data.shape[0]
    if found != expected:
        photograph = {(4, 3): ": the fourth is transparency, save it without", (1, 3): ": it is grey, save it as RGB"}
        raise ValueError(f"it has {found} channels, the plans expect {expected}{photograph.get((found, expected), '')}")


def require_finite(data: np.ndarray) -> None:
    """Args: data: (C, X, Y, Z) float."""
    bad = [channel for channel in range(data.shape[0]) if not np.isfinite(data[channel]).all()]
    if bad:
        raise ValueError(f"NaN or infinite values in channel {', '.join(map(str, bad))}")


def require_intensities(data: np.ndarray) -> list[int]:
    """Refuse an image of one value, and values that cannot be squared in float32.

    Args:
        data: (C, X, Y, Z), finite.

    Returns:
        the channels that have one value alone, where others have more.
    """
    if data.size == 0:
        raise ValueError(f"it has no voxels, its size is {' x '.join(map(str, data.shape[1:]))}")
    lowest, highest = (reduce(data.reshape(len(data), -1), axis=1) for reduce in (np.min, np.max))
    largest = float(np.abs(np.array([lowest, highest], float)).max())
    if largest > MAX_INTENSITY:
        raise ValueError(f"it has values up to {largest:.3g}, which are no intensities: replace them")
    empty = [channel for channel in range(len(data)) if lowest[channel] == highest[channel]]
    if len(empty) == len(data) and data[0].size > 1:
        raise ValueError(f"every voxel is {float(lowest[0]):g}: it shows nothing")
    return empty if data[0].size > 1 else []


# --- of one case, raising InputError ---------------------------------------------------------------------------------


def check_image(array: np.ndarray, path: os.PathLike, axes: Sequence[int] = (3,)) -> None:
    """Raise an InputError unless ``array`` is a real-valued, finite image.

    Args:
        array: a volume, or a colour photograph with its channels last.
        path: of the image.
        axes: numbers of axes that are allowed.
    """
    if array.ndim not in axes or array.size == 0:
        many = " or ".join(map(str, axes))
        raise InputError(f"{path}: the image has shape {array.shape}, expected {many} axes with voxels")
    if array.dtype.kind not in "uif":
        raise InputError(f"{path}: the image has type {array.dtype}, expected real numbers")
    if not np.isfinite(array).all():
        raise InputError(
            f"{path}: the image has values that are not finite (NaN or infinity); replace them, e.g. by the value of "
            f"the background"
        )


def check_shows_something(array: np.ndarray, path: os.PathLike) -> None:
    """Raise an InputError if all voxels have one value, or some have values that are no intensities."""
    try:
        require_intensities(array[None])
    except ValueError as error:
        raise InputError(f"{path}: {error}; leave the image out, or copy or download it again") from error


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
