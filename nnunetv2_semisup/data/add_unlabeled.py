"""Bring images of any usual format into ``imagesUn`` of a dataset, with the checks that spare surprises later.

Each case appears once all of its channels are written and recorded, so an interrupted call is finished by the same call
again: what is there already is recognised by its content. One process works at a time.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunetv2_semisup.data import checks, images
from nnunetv2_semisup.data.folders import (
    RAW_FOLDER,
    channel_count,
    find_unlabeled_cases,
    labelled_cases,
    read_dataset_json,
    read_json,
    write_json,
)
from nnunetv2_semisup.data.jobs import run_jobs
from nnunetv2_semisup.data.raw import find_dataset, locked
from nnunetv2_semisup.errors import InputError

FORMATS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
PHOTOGRAPHS = (".png", ".bmp", ".tif", ".tiff")
COMPANIONS = (".raw", ".zraw", ".raw.gz", ".img")  # voxels of detached headers
RECORD = "added_unlabeled.json"  # in the dataset's folder: case -> source and hash
WORK = ".tmp_unlabeled"  # there too, while images are written


@dataclass(frozen=True)
class Incoming:
    """A case to bring in.

    Attributes:
        case: its id.
        sources: one entry per channel: a file, or the slices of a DICOM series.
    """

    case: str
    sources: tuple[tuple[Path, ...], ...]


@dataclass(frozen=True)
class Seen:
    """What is known of a case after reading it.

    Attributes:
        case: its id.
        hash: of its content.
        channels: number of channels.
        spacing: x, y(, z) in mm.
        orientation: e.g. "LPS"; "" for 2D images.
        like_label: whole numbers and fewer than 10 different ones.
    """

    case: str
    hash: str
    channels: int
    spacing: tuple[float, ...]
    orientation: str
    like_label: bool


def add_unlabeled(dataset: str, folder: Path, reorient: bool = False, dry_run: bool = False, processes: int = 1) -> str:
    """Check the images of ``folder`` and bring them into ``imagesUn``.

    Args:
        dataset: id or name.
        folder: NIfTI, NRRD, MetaImage files or DICOM series, in any depth. Files of a dataset with several channels
            must be named ``CASE_0000``, ``CASE_0001`` and so on, before the ending; DICOM folders likewise.
        reorient: turn images to the orientation of the labelled ones, by permuting and flipping axes.
        dry_run: check only.
        processes: number of processes.

    Returns:
        a report for people.

    Raises:
        InputError: an image cannot serve; nothing was brought in.
    """
    raw = find_dataset(dataset)
    source = _checked_folder(folder)
    if dry_run:
        return _add(raw, source, reorient, True, processes)
    with locked(raw / ".unlabeled.lock", f"another process is adding images to {raw}"):
        _finish_moves(raw)
        return _add(raw, source, reorient, False, processes)


def _add(raw: Path, source: Path, reorient: bool, dry_run: bool, processes: int) -> str:
    dataset_json = read_dataset_json(raw)
    ending = dataset_json["file_ending"]
    incoming = find_incoming(source, channel_count(dataset_json), ending)
    images.check_inside([file for item in incoming for files in item.sources for file in files], source)

    known = {
        "imagesTr": [
            Incoming(case, tuple((Path(file),) for file in files["images"]))
            for case, files in labelled_cases(raw, dataset_json).items()
        ],
        "imagesTs": _present(raw / "imagesTs", ending),
        RAW_FOLDER: _present(raw / RAW_FOLDER, ending),
    }
    jobs = [item for items in known.values() for item in items]
    seen = run_jobs(look, [*jobs, *incoming], processes, "Reading images")
    facts = dict(zip((id(item) for item in (*jobs, *incoming)), seen, strict=True))
    labelled = [facts[id(item)] for item in known["imagesTr"]]
    hashes = {name: {facts[id(item)].hash: item.case for item in items} for name, items in known.items()}

    new, skipped, transductive = [], [], []
    here: dict[str, str] = {}
    for item in incoming:
        fact = facts[id(item)]
        double = hashes["imagesTr"].get(fact.hash) or hashes[RAW_FOLDER].get(fact.hash) or here.get(fact.hash)
        if double:
            skipped.append(f"{item.case} = {double}")
            continue
        here[fact.hash] = item.case
        new.append(item)
        if fact.hash in hashes["imagesTs"]:
            transductive.append(f"{item.case} = {hashes['imagesTs'][fact.hash]}")
    _check_names(raw, new, facts, known)
    warnings = _check_facts([facts[id(item)] for item in new], labelled, channel_count(dataset_json), reorient)

    if not dry_run and new:
        turn = labelled[0].orientation if reorient and labelled else ""
        _bring(raw, new, [facts[id(item)].hash for item in new], ending, turn, processes)
        find_unlabeled_cases(raw, dataset_json)
    return _report(raw, dry_run, new, skipped, transductive, warnings)


# ---------------------------------------------------------------------------------------------------------- finding


def find_incoming(source: Path, channels: int, ending: str) -> list[Incoming]:
    """The cases below ``source``; a file that cannot be one is an error that names it."""
    files = images.walk(source)
    series = images.find_series(files)
    slices = {file for members in series.values() for file in members}
    formats = PHOTOGRAPHS if ending in PHOTOGRAPHS else FORMATS
    found: dict[str, list[tuple[Path, ...]]] = {}
    ignored = []
    for file in files:
        name = file.name.lower()
        if file in slices or name.endswith(COMPANIONS):
            continue
        if name.endswith(images.ARCHIVES) and not name.endswith(".nii.gz"):
            raise InputError(f"{file} is an archive: unpack it and give the folder")
        suffix = next((suffix for suffix in formats if name.endswith(suffix)), None)
        if suffix is None:
            ignored.append(file)
            continue
        found.setdefault(_case_name(file.name[: -len(suffix)], file), []).append((file,))
    per_folder = [folder for folder, _ in series]
    for (folder, uid), members in series.items():
        if len(members) < 2:
            raise InputError(
                f"{members[0]}: the DICOM series has one file only; complete it, move it away if it is a scout, or "
                f"convert it to NIfTI if it holds all slices"
            )
        name = folder.relative_to(source).as_posix() if folder != source else source.name
        several = per_folder.count(folder) > 1
        found.setdefault(_case_name(f"{name}_{uid[-8:]}" if several else name, folder), []).append(tuple(members))
    if not found:
        hint = f"; {len(ignored)} files of other kinds are there, e.g. {ignored[0]}" if ignored else ""
        kinds = ", ".join(formats) + ("" if formats == PHOTOGRAPHS else " and DICOM series")
        raise InputError(f"{source} holds no images of the formats {kinds}{hint}")
    twice = [name for name, sources in found.items() if len(sources) > 1]
    if twice:
        raise InputError(f"{source}: several images would be named {twice[0]}; rename {found[twice[0]][0][0]}")
    return _by_case({name: sources[0] for name, sources in found.items()}, channels, source, ending)


def _by_case(found: dict[str, tuple[Path, ...]], channels: int, source: Path, ending: str) -> list[Incoming]:
    cases: dict[str, dict[int, tuple[Path, ...]]] = {}
    for name, files in found.items():
        match = re.fullmatch(r"(.+)_(\d{4})", name)
        if match and (channels > 1 or match[2] == "0000"):
            case, channel = match[1], int(match[2])
        elif channels == 1 or ending in PHOTOGRAPHS:
            case, channel = name, 0
        else:
            raise InputError(
                f"{files[0]}: the dataset has {channels} channels, so names must end with the channel, {name}_0000; "
                f"rename it"
            )
        if channel in cases.setdefault(case, {}):
            raise InputError(f"{files[0]}: {cases[case][channel][0]} would be case {case} as well; rename one of them")
        cases[case][channel] = files
    for case, parts in cases.items():
        expected = 1 if ending in PHOTOGRAPHS and set(parts) == {0} else channels
        if sorted(parts) != list(range(expected)):
            there = ", ".join(f"{channel:04d}" for channel in sorted(parts))
            raise InputError(f"{source}: case {case} has channel {there}, expected {expected} channels from 0000 on")
        if case.endswith("_seg"):
            raise InputError(f"{parts[0][0]}: nnU-Net keeps names ending with _seg for its own files: rename it")
    return [Incoming(case, tuple(parts[i] for i in sorted(parts))) for case, parts in sorted(cases.items())]


def _present(folder: Path, ending: str) -> list[Incoming]:
    """Cases that lie in a folder of the dataset already."""
    cases: dict[str, list[tuple[Path, ...]]] = {}
    for file in sorted(folder.glob(f"[!.]*_[0-9][0-9][0-9][0-9]{ending}")):
        cases.setdefault(file.name[: -len(ending) - 5], []).append((file,))
    return [Incoming(case, tuple(files)) for case, files in cases.items()]


def _checked_folder(folder: Path) -> Path:
    if folder.is_file() and folder.name.lower().endswith(images.ARCHIVES):
        raise InputError(f"{folder} is an archive: unpack it and give the folder")
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder")
    return folder.resolve()


def _case_name(name: str, file: Path) -> str:
    """A case id of letters, digits, '_', '-' and '.'."""
    clean = re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("_.")
    if not clean:
        raise InputError(f"{file}: its name has no letter (A to Z) or digit to call a case by; rename it")
    return clean


# --------------------------------------------------------------------------------------------------------- checking


def look(item: Incoming) -> Seen:
    """Read and check all channels of a case."""
    channels = _read(item)
    first = channels[0]
    for channel, files in zip(channels, item.sources, strict=True):
        checks.check_image(
            sitk.GetArrayViewFromImage(channel), files[0], grey_2d=files[0].suffix.lower() in PHOTOGRAPHS
        )
        if channel.GetSize() != first.GetSize() or not images.same_geometry(channel, first):
            raise InputError(f"{files[0]}: shape or geometry differ from {item.sources[0][0]}; resample it first")
    number = sum(channel.GetNumberOfComponentsPerPixel() for channel in channels)
    turned = images.orientation(first) if first.GetDimension() == 3 else ""
    few = _has_few_values(sitk.GetArrayViewFromImage(first))
    return Seen(item.case, images.content_hash(channels), number, first.GetSpacing(), turned, few)


def _has_few_values(array: np.ndarray) -> bool:
    if array.dtype.kind not in "ui":
        return False
    some = np.unique(array.ravel()[::101])  # enough for nearly all images, and quick
    return len(some) < 10 and len(np.unique(array)) < 10


def _read(item: Incoming) -> list[sitk.Image]:
    channels = []
    for files in item.sources:
        image = images.read_series(files) if len(files) > 1 else images.read_image(files[0])
        wrong = image.GetDimension() == 3 and image.GetNumberOfComponentsPerPixel() > 1
        if wrong or image.GetDimension() not in (2, 3):
            raise InputError(f"{files[0]}: several values per voxel or a time axis; split it into one file per channel")
        channels.append(image)
    return channels


def _check_names(raw: Path, new: list[Incoming], facts: dict[int, Seen], known: dict[str, list[Incoming]]) -> None:
    """Names that are taken by other images; the same image under the same name in imagesTs is a warning elsewhere."""
    for name, items in known.items():
        taken = {item.case: facts[id(item)].hash for item in items}
        for item in new:
            if item.case in taken and not (name == "imagesTs" and taken[item.case] == facts[id(item)].hash):
                raise InputError(
                    f"{item.sources[0][0]}: {raw / name} has another image named {item.case}; rename the new one"
                )


def _check_facts(new: list[Seen], labelled: Sequence[Seen], channels: int, reorient: bool) -> list[str]:
    """Errors for channels and orientation, warnings for values and spacing."""
    wrong = [fact.case for fact in new if fact.channels != channels]
    if wrong:
        raise InputError(
            f"{_names(wrong)}: not {channels} channels, which dataset.json declares; remove or complete them"
        )
    usual = {fact.orientation for fact in labelled}
    turned = [f"{fact.case} ({fact.orientation})" for fact in new if usual and fact.orientation not in usual]
    if turned and reorient and len(usual) > 1:
        raise InputError(
            f"--reorient: the labelled images have several orientations themselves ({_names(sorted(usual))})"
        )
    if turned and not reorient:
        raise InputError(
            f"{_names(turned)}: the axes point elsewhere than in the labelled images ({_names(sorted(usual))}) and "
            f"nnU-Net does not turn images; --reorient turns them without loss"
        )
    few = [fact.case for fact in new if fact.like_label]
    warnings = []
    if few and not any(fact.like_label for fact in labelled):
        warnings.append(f"fewer than 10 different values, all of them whole numbers; labels? {_names(few)}")
    if not labelled or not new or len({len(fact.spacing) for fact in (*labelled, *new)}) > 1:
        return warnings
    spacings = np.sort([fact.spacing for fact in labelled], axis=1)  # the order of the axes may differ
    low, high = spacings.min(axis=0) / 2, spacings.max(axis=0) * 2
    far = [fact.case for fact in new if ((np.sort(fact.spacing) < low) | (np.sort(fact.spacing) > high)).any()]
    if far:
        warnings.append(f"spacing below half or above twice that of the labelled images: {_names(far)}")
    return warnings


def _names(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# --------------------------------------------------------------------------------------------------------- bringing


@dataclass(frozen=True)
class _Move:
    item: Incoming
    hash: str
    work: Path
    ending: str
    orientation: str


def _bring(raw: Path, new: list[Incoming], hashes: list[str], ending: str, orientation: str, processes: int) -> None:
    work = raw / WORK
    work.mkdir()
    try:
        moves = [_Move(item, digest, work, ending, orientation) for item, digest in zip(new, hashes, strict=True)]
        run_jobs(_write_case, moves, processes, "Writing images")
    finally:
        _finish_moves(raw)


def _write_case(move: _Move) -> None:
    """Write all files of a case to the work folder, and then what is to be done with them."""
    item = move.item
    targets = [f"{item.case}_{channel:04d}{move.ending}" for channel in range(len(item.sources))]
    for image, files, target in zip(_read(item), item.sources, targets, strict=True):
        turn = move.orientation and images.orientation(image) != move.orientation
        if len(files) == 1 and files[0].name.endswith(move.ending) and not turn:
            shutil.copyfile(files[0], move.work / target)
        else:
            images.write_image(sitk.DICOMOrient(image, move.orientation) if turn else image, move.work / target)
    entry = {"source": [str(files[0]) for files in item.sources], "content": move.hash}
    write_json(move.work / f"{item.case}.json", {"files": targets, "record": {item.case: entry}})


def _finish_moves(raw: Path) -> None:
    """Record the cases that are whole in the work folder, this call's or that of a killed one, and put them in place.

    Killed in between, the next call goes on: a case is planned as long as its plan is in the work folder.
    """
    work = raw / WORK
    plans = [read_json(file, f"remove {work}") for file in sorted(work.glob("*.json"))]
    if plans:
        file = raw / RECORD
        record = read_json(file, "repair or remove it") if file.exists() else {}
        write_json(file, {**record, **{case: entry for plan in plans for case, entry in plan["record"].items()}})
        (raw / RAW_FOLDER).mkdir(exist_ok=True)
    for target in [target for plan in plans for target in plan["files"]]:
        if (work / target).exists():
            os.replace(work / target, raw / RAW_FOLDER / target)
    shutil.rmtree(work, ignore_errors=True)


def _report(
    raw: Path, dry_run: bool, new: list[Incoming], skipped: list[str], transductive: list[str], warnings: list[str]
) -> str:
    done = "would be brought in (dry run)" if dry_run else "brought in"
    lines = [f"{raw / RAW_FOLDER}: {len(new)} cases {done}"]
    if skipped:
        lines.append(f"  left out, there already with the same content: {_names(skipped)}")
    lines += [f"  WARNING: {text}" for text in warnings]
    if transductive:
        lines.append(
            f"  WARNING: {len(transductive)} of them are test images of imagesTs ({_names(transductive, 1000)}): "
            f"training sees them, so results on them are transductive and must be reported as such"
        )
    return "\n".join(lines)
