"""Bring images of any usual format into ``imagesUn`` of a dataset, with the checks that spare surprises later.

Each case appears once all of its channels are written and recorded, so an interrupted call is finished by the same call
again: what is there already is recognised by its content. One process works at a time.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunetv2_semisup.data import checks
from nnunetv2_semisup.data.folders import (
    RAW_FOLDER,
    channel_count,
    files_per_case,
    find_unlabeled_cases,
    labelled_cases,
    read_dataset_json,
    reader_class,
)
from nnunetv2_semisup.data.headers import turns_images
from nnunetv2_semisup.data.jobs import run_jobs
from nnunetv2_semisup.datasets import dicom, images
from nnunetv2_semisup.datasets.incoming import (
    PHOTOGRAPHS,
    Incoming,
    find_incoming,
    other_kinds,
    present_cases,
    side_file,
)
from nnunetv2_semisup.datasets.raw import find_dataset, locked
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.files import listed, read_json, read_object, write_json

RECORD = "added_unlabeled.json"  # in the dataset's folder: case -> source and hash
WORK = ".tmp_unlabeled"  # there too, while images are written
PLAN = ".plan"  # ending, there: what is to be done with the files of a case
PREVIEWS = "previews_unlabeled"  # there too
JUDGED = {"imagesTs": "test", "imagesVal": "validation"}  # images that training should not see


@dataclass(frozen=True)
class Seen:
    """What is known of a case after reading it.

    Attributes:
        case: its id.
        file: its first one, for errors.
        hash: of its content.
        channels: number of channels.
        axes: number of axes of a channel, 2 or 3.
        spacing: x, y(, z) in mm.
        has_side: it was read from a file beside the image.
        orientation: e.g. "LPS"; "" for 2D images.
        like_label: whole numbers and fewer than 10 different ones.
        worthless: why it shows nothing, or "".
    """

    case: str
    file: Path
    hash: str
    channels: int
    axes: int
    spacing: tuple[float, ...]
    has_side: bool
    orientation: str
    like_label: bool
    worthless: str


def add_unlabeled(
    dataset: str,
    folder: Path,
    reorient: bool = False,
    dry_run: bool = False,
    previews: int = 0,
    processes: int = 1,
) -> str:
    """Check the images of ``folder`` and bring them into ``imagesUn``.

    Args:
        dataset: id or name.
        folder: NIfTI, NRRD, MetaImage files or DICOM series, in any depth. Files of a dataset with several channels
            must be named ``CASE_0000``, ``CASE_0001`` and so on, before the ending; DICOM folders likewise. Where files
            of several cases have one name, the folders become part of the case's id.
        reorient: turn images to the orientation of the labelled ones, by permuting and flipping axes.
        dry_run: check only.
        previews: number of new cases with a picture, evenly chosen.
        processes: number of processes.

    Returns:
        a report for people.

    Raises:
        InputError: an image cannot serve; nothing was brought in.
    """
    raw = find_dataset(dataset)
    source = _checked_folder(folder)
    if previews < 0:
        raise InputError(f"--previews {previews}: give 0 or more")
    if dry_run:
        return _add(raw, source, reorient, True, 0, processes)
    with locked(raw / ".unlabeled.lock", f"another process is adding images to {raw}"):
        _finish_moves(raw)
        return _add(raw, source, reorient, False, previews, processes)


def _add(raw: Path, source: Path, reorient: bool, dry_run: bool, previews: int, processes: int) -> str:
    dataset_json = read_dataset_json(raw)
    ending, channels = dataset_json["file_ending"], channel_count(dataset_json)
    labelled_files = labelled_cases(raw, dataset_json)
    reader = reader_class(dataset_json, labelled_files).__name__
    if any((raw / RAW_FOLDER).glob("[!.]*")):
        find_unlabeled_cases(raw, dataset_json)  # what is wrong there would be wrong afterwards too
    incoming, others = find_incoming(source, files_per_case(raw, dataset_json), ending)
    images.check_inside([file for item in incoming for files in item.sources for file in files], source)
    images.check_inside([item.side for item in incoming if item.side], source)

    known = {
        "imagesTr": [
            Incoming(case, tuple((Path(file),) for file in files["images"]), side_file(Path(files["images"][0])))
            for case, files in labelled_files.items()
        ],
        **{name: present_cases(raw / name, ending) for name in (RAW_FOLDER, *JUDGED)},
    }
    jobs = [item for items in known.values() for item in items]
    by_nibabel = reader.startswith("Nibabel")
    seen = run_jobs(partial(look, by_nibabel=by_nibabel), [*jobs, *incoming], processes, "Reading images")
    facts = dict(zip((id(item) for item in (*jobs, *incoming)), seen, strict=True))
    labelled = [facts[id(item)] for item in known["imagesTr"]]
    hashes = {name: {facts[id(item)].hash: item.case for item in items} for name, items in known.items()}

    new, skipped = [], []
    here: dict[str, str] = {}
    for item in incoming:
        digest = facts[id(item)].hash
        double = hashes["imagesTr"].get(digest) or hashes[RAW_FOLDER].get(digest) or here.get(digest)
        if double:
            skipped.append(f"{item.case} = {double}")
            continue
        here[digest] = item.case
        new.append(item)
    _check_names(raw, new, facts, known)
    warnings = _check_facts([facts[id(item)] for item in new], labelled, channels, reorient, turns_images(reader))
    for name, kind in JUDGED.items():
        both = [f"{case} = {hashes[name][digest]}" for digest, case in here.items() if digest in hashes[name]]
        if both:
            warnings.append(
                f"{len(both)} of them are {kind} images of {name} ({listed(both, 1000)}): training sees them, so "
                f"results on them are transductive and must be reported as such"
            )

    if not dry_run and new:
        turn = labelled[0].orientation if reorient and labelled else ""
        moves = [_Move(item, facts[id(item)].hash, raw / WORK, ending, turn, by_nibabel) for item in new]
        _bring(raw, moves, processes)
        _save_previews(raw, new, ending, previews)
    done = "would be brought in (dry run)" if dry_run else "brought in"
    lines = [f"{raw / RAW_FOLDER}: {len(new)} cases {done}"]
    if skipped:
        lines.append(f"  left out, there already with the same content: {listed(skipped)}")
    if others:
        lines.append(f"  note: {other_kinds(others)}")
    return "\n".join([*lines, *(f"  WARNING: {text}" for text in warnings)])


def _checked_folder(folder: Path) -> Path:
    if folder.is_file() and folder.name.lower().endswith(images.ARCHIVES):
        raise InputError(f"{folder} is an archive: unpack it and give the folder")
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder")
    return folder.resolve()


# --------------------------------------------------------------------------------------------------------- checking


def look(item: Incoming, by_nibabel: bool = False) -> Seen:
    """Read and check all channels of a case.

    Args:
        item: the case.
        by_nibabel: read NIfTI as the data set's own reader does, which is one of nnU-Net's two that use nibabel.
    """
    channels = _read(item, by_nibabel)
    first = channels[0]
    axes = min(first.GetDimension(), 3)
    for channel, files in zip(channels, item.sources, strict=True):
        checks.check_image(sitk.GetArrayViewFromImage(channel), files[0], axes=(2, 3, 4))
        if channel.GetSize() != first.GetSize() or not images.same_geometry(channel, first):
            raise InputError(f"{files[0]}: shape or geometry differ from {item.sources[0][0]}; resample it first")
    if first.GetDimension() == 4:  # the channels are the fourth axis
        if len(channels) > 1:
            raise InputError(f"{item.sources[0][0]}: a fourth axis beside other channels; give one file per channel")
        number = first.GetSize()[3]
    else:
        number = sum(channel.GetNumberOfComponentsPerPixel() for channel in channels)
    turned = images.orientation(first) if axes == 3 else ""
    few, worthless = _has_few_values(sitk.GetArrayViewFromImage(first)), ""
    try:
        for channel, files in zip(channels, item.sources, strict=True):
            checks.check_shows_something(sitk.GetArrayViewFromImage(channel), files[0])
    except InputError as error:  # of new images only: nnU-Net takes labelled ones as they are
        worthless = str(error)
    spacing = _side_spacing(item.side) if item.side else first.GetSpacing()[:axes]
    file, digest = item.sources[0][0], images.content_hash(channels)
    return Seen(item.case, file, digest, number, axes, spacing, item.side is not None, turned, few, worthless)


def _side_spacing(file: Path) -> tuple[float, ...]:
    """x, y, z in mm, of a file that has them as nnU-Net reads them, ``{"spacing": [z, y, x]}``."""
    content = read_json(file, "correct it")
    spacing = content.get("spacing") if isinstance(content, dict) else None
    if (
        not isinstance(spacing, list)
        or len(spacing) != 3
        or not all(type(value) in (int, float) and 0 < value < np.inf for value in spacing)
    ):
        raise InputError(f'{file}: expected {{"spacing": [z, y, x]}}, three numbers above 0 in mm; correct it')
    return tuple(map(float, spacing[::-1]))


def _has_few_values(array: np.ndarray) -> bool:
    if len(np.unique(array.ravel()[::101])) >= 10:  # enough for nearly all images, and quick
        return False
    values = np.unique(array)
    return len(values) < 10 and bool((values == np.round(values)).all())


def _read(item: Incoming, by_nibabel: bool) -> list[sitk.Image]:
    channels = []
    for files in item.sources:
        image = dicom.read_series(files) if len(files) > 1 else images.read_image(files[0], by_nibabel=by_nibabel)
        wrong = image.GetDimension() > 2 and image.GetNumberOfComponentsPerPixel() > 1
        if wrong or image.GetDimension() not in (2, 3, 4):
            raise InputError(f"{files[0]}: several values per voxel or a time axis; split it into one file per channel")
        channels.append(image)
    return channels


def _check_names(raw: Path, new: list[Incoming], facts: dict[int, Seen], known: dict[str, list[Incoming]]) -> None:
    """Names that are taken by other images; the same image in imagesTs or imagesVal is a warning elsewhere."""
    for name, items in known.items():
        taken = {item.case: facts[id(item)].hash for item in items}
        for item in new:
            if item.case in taken and not (name in JUDGED and taken[item.case] == facts[id(item)].hash):
                raise InputError(
                    f"{item.sources[0][0]}: {raw / name} has another image named {item.case}; rename the new one"
                )


def _check_facts(
    new: list[Seen], labelled: Sequence[Seen], channels: int, reorient: bool, reader_turns: bool
) -> list[str]:
    """Errors for channels, axes and orientation, and for images like labels; warnings for spacing."""
    for fact in new:
        if fact.worthless:
            raise InputError(fact.worthless)
        if fact.channels != channels:
            four = " (the fourth is transparency, save it without)" if (fact.channels, channels) == (4, 3) else ""
            raise InputError(
                f"{fact.file}: it has {fact.channels} channels{four}, dataset.json declares {channels}; remove or "
                f"complete it"
            )
        allowed = {other.axes for other in labelled} or ({2, 3} if fact.file.suffix.lower() in PHOTOGRAPHS else {3})
        if fact.axes not in allowed:
            raise InputError(
                f"{fact.file}: an image of {fact.axes} axes, the labelled ones have {min(allowed)}; nnU-Net would "
                f"stretch it into a volume: leave it out"
            )
    bare = [str(fact.file) for fact in new if not fact.has_side]
    if bare and any(fact.has_side for fact in labelled):
        raise InputError(
            f"{listed(bare, 3)}: no file CASE.json with the voxel size beside it, as labelled images have, so nnU-Net "
            f'would take it for 1 mm; add it, {{"spacing": [z, y, x]}} in mm'
        )
    usual = {fact.orientation for fact in labelled}
    turned = [f"{fact.case} ({fact.orientation})" for fact in new if usual and fact.orientation not in usual]
    if reader_turns:
        turned = []
    if turned and reorient and len(usual) > 1:
        raise InputError(
            f"--reorient: the labelled images have several orientations themselves ({listed(sorted(usual))})"
        )
    if turned and not reorient:
        raise InputError(
            f"{listed(turned)}: the axes point elsewhere than in the labelled images ({listed(sorted(usual))}) and "
            f"nnU-Net does not turn images; --reorient turns them without loss"
        )
    few = [str(fact.file) for fact in new if fact.like_label]
    if few and not any(fact.like_label for fact in labelled):
        raise InputError(
            f"{listed(few, 3)}: labels? Fewer than 10 different values, all of them whole numbers, unlike the labelled "
            f"images; move them away. Should they be images, put them into {RAW_FOLDER} by hand"
        )
    if not labelled or not new or len({len(fact.spacing) for fact in (*labelled, *new)}) > 1:
        return []
    spacings = np.sort([fact.spacing for fact in labelled], axis=1)  # the order of the axes may differ
    low, high = spacings.min(axis=0) / 2, spacings.max(axis=0) * 2
    far = [fact.case for fact in new if ((np.sort(fact.spacing) < low) | (np.sort(fact.spacing) > high)).any()]
    return [f"spacing below half or above twice that of the labelled images: {listed(far)}"] if far else []


# --------------------------------------------------------------------------------------------------------- bringing


@dataclass(frozen=True)
class _Move:
    item: Incoming
    hash: str
    work: Path
    ending: str
    orientation: str
    by_nibabel: bool


def _bring(raw: Path, moves: list[_Move], processes: int) -> None:
    (raw / WORK).mkdir()
    try:
        run_jobs(_write_case, moves, processes, "Writing images")
    finally:
        _finish_moves(raw)


def _write_case(move: _Move) -> None:
    """Write all files of a case to the work folder, and then what is to be done with them."""
    item = move.item
    targets = [f"{item.case}_{channel:04d}{move.ending}" for channel in range(len(item.sources))]
    for image, files, target in zip(_read(item, move.by_nibabel), item.sources, targets, strict=True):
        turn = move.orientation and images.orientation(image) != move.orientation
        if len(files) == 1 and files[0].name.endswith(move.ending) and not turn:
            shutil.copyfile(files[0], move.work / target)
            continue
        images.write_image(images.reoriented(image, move.orientation, files[0]) if turn else image, move.work / target)
    if item.side:
        shutil.copyfile(item.side, move.work / f"{item.case}.json")
        targets.insert(0, f"{item.case}.json")
    entry = {"source": [str(files[0]) for files in item.sources], "content": move.hash}
    write_json(move.work / f"{item.case}{PLAN}", {"files": targets, "record": {item.case: entry}})


def _finish_moves(raw: Path) -> None:
    """Record the cases that are whole in the work folder, this call's or that of a killed one, and put them in place.

    Killed in between, the next call goes on: a case is planned as long as its plan is in the work folder.
    """
    work = raw / WORK
    plans = [read_object(file, f"remove {work}", "files", "record") for file in sorted(work.glob(f"*{PLAN}"))]
    if plans:
        file = raw / RECORD
        record = read_object(file, "repair or remove it") if file.exists() else {}
        write_json(file, {**record, **{case: entry for plan in plans for case, entry in plan["record"].items()}})
        (raw / RAW_FOLDER).mkdir(exist_ok=True)
    for target in [target for plan in plans for target in plan["files"]]:
        if (work / target).exists():
            os.replace(work / target, raw / RAW_FOLDER / target)
    shutil.rmtree(work, ignore_errors=True)


def _save_previews(raw: Path, new: Sequence[Incoming], ending: str, number: int) -> None:
    """Pictures of some new cases, as they are in ``imagesUn``, first channel."""
    if not number:
        return
    from nnunetv2_semisup.datasets.preview import save_preview

    (raw / PREVIEWS).mkdir(exist_ok=True)
    for index in sorted(set(np.linspace(0, len(new) - 1, number).astype(int))):
        case = new[index].case
        image = images.read_image(raw / RAW_FOLDER / f"{case}_0000{ending}")
        save_preview(image, None, raw / PREVIEWS / f"{case}.png", case)
