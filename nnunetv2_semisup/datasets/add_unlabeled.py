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
from nnunetv2_semisup.datasets import images
from nnunetv2_semisup.datasets.check_incoming import Seen, far_spacings, look, read_channels, refusals, try_look
from nnunetv2_semisup.datasets.incoming import (
    Incoming,
    find_incoming,
    other_kinds,
    present_cases,
    side_file,
)
from nnunetv2_semisup.datasets.raw import find_dataset, locked
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.files import listed, read_object, write_json

RECORD = "added_unlabeled.json"  # in the dataset's folder: case -> source and hash
WORK = ".tmp_unlabeled"  # there too, while images are written
PLAN = ".plan"  # ending, there: what is to be done with the files of a case
PREVIEWS = "previews_unlabeled"  # there too
JUDGED = {"imagesTs": "test", "imagesVal": "validation"}  # images that training should not see
MOST_REASONS = 10  # of refused images, told at once


def add_unlabeled(
    dataset: str,
    folder: Path,
    reorient: bool = False,
    dry_run: bool = False,
    previews: int = 0,
    processes: int = 1,
    allow_test_images: bool = False,
    skip_refused: bool = False,
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
        allow_test_images: bring in test and validation images, too, with a warning; else they are left out.
        skip_refused: bring in the other images where some cannot serve.

    Returns:
        a report for people.

    Raises:
        InputError: images cannot serve; it names them, and nothing was brought in.
    """
    raw = find_dataset(dataset)
    source = _checked_folder(folder)
    if previews < 0:
        raise InputError(f"--previews {previews}: give 0 or more")
    add = partial(_add, raw, source, reorient, previews, processes, allow_test_images, skip_refused)
    if dry_run:
        return add(dry_run=True)
    with locked(raw / ".unlabeled.lock", f"another process is adding images to {raw}"):
        _finish_moves(raw)
        return add(dry_run=False)


def _add(
    raw: Path,
    source: Path,
    reorient: bool,
    previews: int,
    processes: int,
    allow_test_images: bool,
    skip_refused: bool,
    dry_run: bool,
) -> str:
    dataset_json = read_dataset_json(raw)
    ending, channels = dataset_json["file_ending"], channel_count(dataset_json)
    labelled_files = labelled_cases(raw, dataset_json)
    reader = reader_class(dataset_json, labelled_files).__name__
    if any((raw / RAW_FOLDER).glob("[!.]*")):
        find_unlabeled_cases(raw, dataset_json)  # what is wrong there would be wrong afterwards too
    incoming, others, refused = find_incoming(source, files_per_case(raw, dataset_json), ending)
    images.check_inside([file for item in incoming for files in item.sources for file in files], source)
    images.check_inside([item.side for item in incoming if item.side], source)

    there = {
        "imagesTr": [
            Incoming(case, tuple((Path(file),) for file in files["images"]), side_file(Path(files["images"][0])))
            for case, files in labelled_files.items()
        ],
        **{name: present_cases(raw / name, ending) for name in (RAW_FOLDER, *JUDGED)},
    }
    by_nibabel = reader.startswith("Nibabel")
    jobs = [(name, item) for name, items in there.items() for item in items]
    facts = run_jobs(
        partial(look, by_nibabel=by_nibabel), [item for _, item in jobs], processes, "Reading the dataset's images"
    )
    known = {name: [fact for (where, _), fact in zip(jobs, facts, strict=True) if where == name] for name in there}
    labelled = known["imagesTr"]
    hashes = {name: {fact.hash: fact.case for fact in seen} for name, seen in known.items()}
    looked = run_jobs(partial(try_look, by_nibabel=by_nibabel), incoming, processes, "Reading images")

    new: list[tuple[Incoming, Seen]] = []
    doubles, judged = [], []
    for item, fact in zip(incoming, looked, strict=True):
        if isinstance(fact, str):
            refused[item.case] = fact
        elif double := hashes["imagesTr"].get(fact.hash) or hashes[RAW_FOLDER].get(fact.hash):
            doubles.append(f"{item.case} = {double}")
        elif not allow_test_images and (place := next((name for name in JUDGED if fact.hash in hashes[name]), "")):
            judged.append(f"{item.case} = {place}/{hashes[place][fact.hash]}")
        elif fault := _name_taken(raw, fact, known):
            refused[item.case] = fault
        else:
            new.append((item, fact))
    refused |= refusals([fact for _, fact in new], labelled, channels, reorient, turns_images(reader))
    good = [(item, fact) for item, fact in new if item.case not in refused]
    here: dict[str, str] = {}
    for item, fact in good:
        if (first := here.setdefault(fact.hash, item.case)) != item.case:
            doubles.append(f"{item.case} = {first}")
    new = [(item, fact) for item, fact in good if here[fact.hash] == item.case]
    if refused and not skip_refused:
        raise _refusal(refused, len(new))

    gone: list[str] = []
    if not dry_run:
        gone = _drop_gone(raw, ending)
        turn = labelled[0].orientation if reorient and labelled else ""
        _bring(raw, [_Move(item, fact.hash, raw / WORK, ending, turn, by_nibabel) for item, fact in new], processes)
        _save_previews(raw, [item.case for item, _ in new], ending, previews)
    done = "would be brought in (dry run)" if dry_run else "brought in"
    lines = [f"{raw / RAW_FOLDER}: {len(new)} cases {done}"]
    if doubles:
        lines.append(f"left out, there already with the same content: {listed(doubles)}")
    if judged:
        lines.append(
            f"left out, {len(judged)} test or validation images: {listed(judged)}; --allow_test_images brings them in"
        )
    if refused:
        lines += [f"left out, {len(refused)} refused:", *(f"  {text}" for text in _reasons(refused))]
    if gone := [case for case in gone if case not in here.values()]:
        lines.append(f"note: {RECORD} does not list any more what was removed from {RAW_FOLDER}: {listed(gone)}")
    if others:
        lines.append(f"note: {other_kinds(others)}")
    if far := far_spacings([fact for _, fact in new], labelled):
        lines.append(f"WARNING: spacing below half or above twice that of the labelled images: {listed(far)}")
    unlabelled = hashes[RAW_FOLDER] | {fact.hash: item.case for item, fact in new}
    for name, kind in JUDGED.items():
        if both := [
            f"{case} = {hashes[name][digest]}" for digest, case in unlabelled.items() if digest in hashes[name]
        ]:
            lines.append(
                f"WARNING: {len(both)} unlabelled images are {kind} images of {name} ({listed(both)}): your {kind} "
                f"result will be too good, because training sees the {kind} images; remove them from {RAW_FOLDER}, or "
                f"report the result as transductive"
            )
    return "\n  ".join(lines)


def _name_taken(raw: Path, fact: Seen, known: dict[str, list[Seen]]) -> str:
    """What is wrong if another image has its name; the same image in imagesTs or imagesVal is told elsewhere."""
    for name, seen in known.items():
        taken = next((other for other in seen if other.case == fact.case), None)
        if taken and not (name in JUDGED and taken.hash == fact.hash):
            return f"{fact.file}: {raw / name} has another image named {fact.case}; rename the new one"
    return ""


def _reasons(refused: dict[str, str]) -> list[str]:
    """The first ten reasons, and how many more there are."""
    reasons = list(dict.fromkeys(refused.values()))
    return [*reasons[:MOST_REASONS], *([f"and {more} more"] if (more := len(reasons) - MOST_REASONS) > 0 else [])]


def _refusal(refused: dict[str, str], others: int) -> InputError:
    """One line that names all that is refused."""
    reasons = _reasons(refused)
    text = reasons[0]
    if len(reasons) > 1:
        text = f"{len(refused)} images are refused, none was brought in: {' | '.join(reasons)}"
    hint = " | " if len(reasons) > 1 else "; "
    return InputError(text + (f"{hint}--skip_refused brings in the other {others}" if others else ""))


def _checked_folder(folder: Path) -> Path:
    if folder.is_file():
        if folder.name.lower().endswith(images.ARCHIVES):
            raise InputError(f"{folder} is an archive: unpack it and give the folder")
        raise InputError(f"{folder} is a file: give the folder that holds the images")
    if not folder.is_dir():
        raise InputError(f"{folder.absolute()} is no folder: correct the spelling, or give the absolute path")
    return folder.resolve()


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
    if not moves:
        return
    (raw / WORK).mkdir()
    try:
        run_jobs(_write_case, moves, processes, "Writing images")
    finally:
        _finish_moves(raw)


def _write_case(move: _Move) -> None:
    """Write all files of a case to the work folder, and then what is to be done with them."""
    item = move.item
    targets = [f"{item.case}_{channel:04d}{move.ending}" for channel in range(len(item.sources))]
    for image, files, target in zip(read_channels(item, move.by_nibabel), item.sources, targets, strict=True):
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


def _drop_gone(raw: Path, ending: str) -> list[str]:
    """Take cases whose images were removed by hand out of the record, and return them."""
    file = raw / RECORD
    record = read_object(file, "repair or remove it") if file.exists() else {}
    gone = [case for case in record if not (raw / RAW_FOLDER / f"{case}_0000{ending}").exists()]
    if gone:
        write_json(file, {case: entry for case, entry in record.items() if case not in gone})
    return gone


def _save_previews(raw: Path, cases: Sequence[str], ending: str, number: int) -> None:
    """Pictures of some new cases, as they are in ``imagesUn``, first channel."""
    if not number or not cases:
        return
    from nnunetv2_semisup.datasets.preview import save_preview

    (raw / PREVIEWS).mkdir(exist_ok=True)
    for index in sorted(set(np.linspace(0, len(cases) - 1, number).astype(int))):
        case = cases[index]
        image = images.read_image(raw / RAW_FOLDER / f"{case}_0000{ending}")
        save_preview(image, None, raw / PREVIEWS / f"{case}.png", case)
