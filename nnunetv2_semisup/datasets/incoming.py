"""Find the images in a folder of any layout, and the case and channel that each is."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunetv2_semisup.datasets import dicom, images
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.files import listed

FORMATS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
PHOTOGRAPHS = (".png", ".bmp", ".tif", ".tiff")
DETACHED = (".nhdr", ".mhd")  # headers whose voxels lie in another file
SIDED = (".tif", ".tiff")  # beside 3D ones nnU-Net reads the voxel size from CASE.json
COMPANIONS = (".raw", ".zraw", ".raw.gz", ".img")  # such voxels


@dataclass(frozen=True)
class Incoming:
    """A case to bring in.

    Attributes:
        case: its id.
        sources: one entry per channel: a file, or the slices of a DICOM series.
        side: the file beside a TIFF image that tells its voxel size, if there is one.
    """

    case: str
    sources: tuple[tuple[Path, ...], ...]
    side: Path | None = None


@dataclass(frozen=True)
class _Image:
    """A file or series with its name, without ending, and the same with the folders before it."""

    files: tuple[Path, ...]
    name: str
    long_name: str


def find_incoming(source: Path, channels: int, ending: str) -> tuple[list[Incoming], list[Path], dict[str, str]]:
    """The cases below ``source``, the files of other kinds, and what is refused: file or case -> why.

    Args:
        source: resolved.
        channels: of the dataset.
        ending: of its files.

    Raises:
        InputError: no images are there, or the folder cannot be read as a whole.
    """
    files = images.walk(source)
    refused: dict[str, str] = {}
    series = dicom.find_series(files, refused)
    slices = {file for members in series.values() for file in members}
    formats = PHOTOGRAPHS if ending in PHOTOGRAPHS else FORMATS
    with_headers = {file.parent for file in files if file.name.lower().endswith(DETACHED)}
    found: list[_Image] = []
    others: list[Path] = []
    for file in files:
        name = file.name.lower()
        if file in slices or (name.endswith(COMPANIONS) and file.parent in with_headers):
            continue
        if name.endswith(images.ARCHIVES):
            refused[str(file)] = f"{file} is an archive: unpack it and give the folder"
            continue
        suffix = next((suffix for suffix in formats if name.endswith(suffix)), None)
        if suffix is None:
            others.append(file)
            continue
        names = (file.name, file.relative_to(source).as_posix())
        with _noted(refused, file):
            found.append(_Image((file,), *(_case_name(name[: -len(suffix)], file) for name in names)))
    per_folder = [folder for folder, _ in series]
    for (folder, uid), members in series.items():
        if len(members) < 2:
            refused[str(members[0])] = (
                f"{members[0]}: the DICOM series has one file only; complete it, move it away if it is a scout, or "
                f"convert it to NIfTI if it holds all slices"
            )
            continue
        name = folder.relative_to(source).as_posix() if folder != source else source.name
        with _noted(refused, members[0]):
            name = _case_name(f"{name}_{uid[-8:]}" if per_folder.count(folder) > 1 else name, folder)
            found.append(_Image(tuple(members), name, name))
    if not found and not refused:
        hint = f"; {other_kinds(others)}" if others else ""
        kinds = ", ".join(formats) + ("" if formats == PHOTOGRAPHS else " and DICOM series")
        raise InputError(f"{source} holds no images of the formats {kinds}{hint}")
    cases = _by_case(_without_segmentations(found, refused), channels, source, ending, refused)
    sides = {item.side for item in cases}
    return cases, [file for file in others if file not in sides], refused


@contextlib.contextmanager
def _noted(refused: dict[str, str], what: object) -> Iterator[None]:
    """An InputError of the block becomes an entry of ``refused``."""
    try:
        yield
    except InputError as error:
        refused[str(what)] = str(error)


def side_file(image: Path) -> Path | None:
    """``CASE.json`` beside ``CASE_0000.tif`` or ``CASE.tif``; None without one, and for other formats."""
    if image.suffix.lower() not in SIDED:
        return None
    names = (re.sub(r"_\d{4}$", "", image.stem), image.stem)
    return next((file for name in names if (file := image.with_name(f"{name}.json")).is_file()), None)


def other_kinds(files: Sequence[Path]) -> str:
    """What to tell of files that are not read: their number, and one of each kind."""
    examples = list({file.suffix.lower(): str(file) for file in reversed(files)}.values())[::-1]
    return f"{len(files)} files of other kinds were not read, e.g. {', '.join(examples[:3])}"


def _without_segmentations(found: Sequence[_Image], refused: dict[str, str]) -> list[_Image]:
    """Refuse what ends with ``_seg``, with or without a channel."""
    files = [str(image.files[0]) for image in found if re.search(r"_seg(_\d{4})?$", image.name)]
    refused.update(
        dict.fromkeys(
            files,
            f"{listed(files)} looks like a segmentation: move segmentations away, only images belong here. If it is an "
            f"image, rename it: nnU-Net keeps names ending with _seg for its own files",
        )
    )
    return [image for image in found if str(image.files[0]) not in files]


def _by_case(
    found: Sequence[_Image], channels: int, source: Path, ending: str, refused: dict[str, str]
) -> list[Incoming]:
    """Cases by the names; by those with the folders where several cases would have one name."""
    if channels == 1:
        found = _without_second_channels(found, refused)
    usual: list[tuple[_Image, tuple[str, int]]] = []
    for image in found:
        with _noted(refused, image.files[0]):
            usual.append((image, _case_and_channel(image, image.name, channels, ending)))
    times = Counter(place for _, place in usual)
    repeated = {case for (case, _), number in times.items() if number > 1}
    cases: dict[str, dict[int, tuple[Path, ...]]] = {}
    unclear: set[str] = set()
    for image, (case, channel) in usual:
        with _noted(refused, image.files[0]):
            if case in repeated:
                case, channel = _case_and_channel(image, image.long_name, channels, ending)
            if channel in cases.setdefault(case, {}):
                unclear.add(case)
                other = cases[case][channel][0]
                raise InputError(f"{image.files[0]}: {other} would be case {case} as well; rename one of them")
            cases[case][channel] = image.files
    incoming = []
    for case, parts in sorted(cases.items()):
        expected = 1 if ending in PHOTOGRAPHS and set(parts) == {0} else channels
        if case in unclear:
            continue
        if sorted(parts) == list(range(expected)):
            incoming.append(Incoming(case, tuple(parts[i] for i in sorted(parts)), side_file(parts[0][0])))
        elif parts:
            channel_list = ", ".join(f"{channel:04d}" for channel in sorted(parts))
            refused[case] = (
                f"{source}: case {case} has channel {channel_list}, expected {expected} channels from 0000 on"
            )
    return incoming


def _case_and_channel(image: _Image, name: str, channels: int, ending: str) -> tuple[str, int]:
    match = re.fullmatch(r"(.+)_(\d{4})", name)
    if match and (channels > 1 or match[2] == "0000"):
        return match[1], int(match[2])
    if channels == 1 or ending in PHOTOGRAPHS:
        return name, 0
    raise InputError(
        f"{image.files[0]}: the dataset has {channels} channels, so names must end with the channel, {name}_0000; "
        f"rename it"
    )


def _without_second_channels(found: Sequence[_Image], refused: dict[str, str]) -> list[_Image]:
    """Refuse X_0001 beside X_0000: a channel that a dataset of one channel has no place for, and no case of its own."""
    first = {image.name.removesuffix("_0000"): image.files[0] for image in found if image.name.endswith("_0000")}
    left = []
    for image in found:
        match = re.fullmatch(r"(.+)_\d{4}", image.name)
        if match and match[1] in first and not image.name.endswith("_0000"):
            refused[str(image.files[0])] = (
                f"{image.files[0]} looks like another channel of {first[match[1]]}, and the dataset has one channel; "
                f"move it away, or, if they are two cases, name the latter {match[1]}_0000_0000"
            )
        else:
            left.append(image)
    return left


def present_cases(folder: Path, ending: str) -> list[Incoming]:
    """Cases that lie in a folder of the dataset already."""
    cases: dict[str, list[tuple[Path, ...]]] = {}
    for file in sorted(folder.glob(f"[!.]*_[0-9][0-9][0-9][0-9]{ending}")):
        cases.setdefault(file.name[: -len(ending) - 5], []).append((file,))
    return [Incoming(case, tuple(files)) for case, files in cases.items()]


def _case_name(name: str, file: Path) -> str:
    """A case id of letters, digits, '_', '-' and '.'."""
    clean = re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("_.")
    if not clean:
        raise InputError(f"{file}: its name has no letter (A to Z) or digit to call a case by; rename it")
    return clean
