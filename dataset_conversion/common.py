"""What the converters share: one engine that reads, checks, writes and reports.

A converter says which cases there are and how one is read (a ``Recipe``), and which options are its own; the rest is
done here: several processes, nothing half-written, going on after an interruption, dry run, previews, report, command
line.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from dataset_conversion.lists import require_present
from nnunetv2_semisup.data.checks import (
    IMAGES_OF,
    LABELLED,
    LABELS_OF,
    UNLABELLED,
    Facts,
    check_image,
    check_label,
    check_not_empty,
    check_shows_something,
    facts_rows,
    table_text,
)
from nnunetv2_semisup.data.folders import PATIENTS
from nnunetv2_semisup.data.jobs import run_jobs
from nnunetv2_semisup.datasets.images import check_inside, check_source, orientation, read_image, write_image
from nnunetv2_semisup.datasets.raw import SUBFOLDERS, new_dataset_path, publish, reserved_id, write_splits
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.files import write_json

FILE_ENDING = ".nii.gz"
RECORDS = ".finished"  # in an unfinished folder: what is known of each case that is done
MADE_BY = ".made_by"  # there too: the fingerprint of the call


# --- the engine -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One case to convert.

    Attributes:
        name: ID, as its files will be named.
        role: LABELLED, UNLABELLED, VALIDATION or TEST.
        files: what is read for its image.
        label_file: what is read for its label; None for unlabelled cases, whose labels are not touched.
    """

    name: str
    role: str
    files: tuple[Path, ...]
    label_file: Path | None = None


Image = sitk.Image | tuple[sitk.Image, ...]
Read = Callable[[Case], tuple[Image, sitk.Image | None, str]]


@dataclass(frozen=True)
class Recipe:
    """What the engine has to know of a data set.

    Attributes:
        cases: all cases.
        read: case -> image, label on the same grid (None if the case has no ``label_file``), remark for the report or
            "". A module-level function, or a ``functools.partial`` of one. The image is a tuple of one per channel, on
            the same grid, if ``separate_channels``.
        channels: channel names in order; nnU-Net chooses the normalisation by them.
        labels: class name -> value, background 0.
        description: keys for ``dataset.json``, which nnU-Net ignores.
        conversion: how it was made, for ``dataset.json``.
        spacing_note: where the spacing comes from.
        role_notes: role -> what to add to its row of the report.
        rows: more rows of the report: what is special here.
        groups: case -> patient, for the cross-validation folds.
        file_ending: of the files to write.
        extra_files: name -> text of files beside ``dataset.json``.
        separate_channels: one image file per channel, else all channels are in one.
    """

    cases: Sequence[Case]
    read: Read
    channels: Sequence[str]
    labels: Mapping[str, int]
    description: Mapping
    conversion: Mapping = field(default_factory=dict)
    spacing_note: str = ""
    role_notes: Mapping[str, str] = field(default_factory=dict)
    rows: Sequence[tuple[str, str]] = ()
    groups: Mapping[str, str] | None = None
    file_ending: str = FILE_ENDING
    extra_files: Mapping[str, str] = field(default_factory=dict)
    separate_channels: bool = False


def cases_of(
    source: Path,
    roles: Mapping[str, str],
    images: Mapping[str, Path],
    labels: Mapping[str, Path],
    lack: str,
    remedy: str = "complete the folder",
) -> list[Case]:
    """Cases of one image file and one label file each, having checked that no label that will be read is missing.

    Args:
        source: for the error.
        roles: case -> role.
        images: case -> file.
        labels: likewise.
        lack: what is wrong with cases without label.
        remedy: against it.
    """
    missing = sorted(case for case, role in roles.items() if role != UNLABELLED and case not in labels)
    require_present(source, missing, len(roles), lack, remedy)
    return [
        Case(case, role, (images[case],), None if role == UNLABELLED else labels[case]) for case, role in roles.items()
    ]


@dataclass(frozen=True)
class Options:
    """What the user decides for any data set.

    Attributes:
        processes: number of processes.
        dry_run: read and check everything, write nothing.
        previews: number of cases with a picture, evenly chosen among those with a label.
        subset: which of the disjoint sets of labelled cases, see ``lists.choose_labelled``.
    """

    processes: int = 1
    dry_run: bool = False
    previews: int = 0
    subset: int = 0


@dataclass(frozen=True)
class Job:
    """A case, and where it goes; without a folder it is only checked."""

    case: Case
    read: Read
    classes: Mapping[str, int]
    folder: Path | None
    file_ending: str
    image_files: int
    preview: bool


def convert_source(
    make_recipe: Callable[..., Recipe],
    default_name: str | None,
    source: Path,
    dataset_id: int,
    labelled_choice: str,
    *special,
    name: str | None = None,
    options: Options | None = None,
    **more_special,
) -> str:
    """Convert a data set; a converter fills in the first two arguments.

    Args:
        make_recipe: of the resolved source, ``labelled_choice``, the subset, and what is special about the data set.
        default_name: None: the name in the recipe's description.
        source: folder below which the data lies.
        dataset_id: 1 to 999.
        labelled_choice: a number, a list file, or what else ``make_recipe`` takes; see ``lists.choose_labelled``.
        special: for ``make_recipe``, with ``more_special``.
        name: the dataset is called ``DatasetXXX_name``; None: ``default_name``.
        options: see there.

    Returns:
        a report for people.

    Raises:
        InputError: something given is wrong. No dataset has appeared then.
    """
    options, name = options or Options(), default_name if name is None else name
    if name is not None:
        new_dataset_path(dataset_id, name)  # before the source is looked through
    source = check_source(source)
    recipe = make_recipe(source, labelled_choice, options.subset, *special, **more_special)
    return convert(recipe, source, dataset_id, name or recipe.description["name"], options)


def convert(recipe: Recipe, source: Path, dataset_id: int, name: str, options: Options) -> str:
    """Convert what a recipe describes.

    Args:
        recipe: the data set.
        source: folder below which all its files must lie, resolved.
        dataset_id: 1 to 999.
        name: the dataset is called ``DatasetXXX_name``.
        options: see there.

    Returns:
        a report for people.

    Raises:
        InputError: something given is wrong. No dataset has appeared then.
    """
    target = new_dataset_path(dataset_id, name)
    check_inside([file for case in recipe.cases for file in _files(case)], source)
    labelled = [case.name for case in recipe.cases if case.role == LABELLED]
    recipe = replace(recipe, conversion={**recipe.conversion, "subset": options.subset})
    if options.dry_run:
        facts = run_jobs(convert_case, _jobs(recipe, None, 0), options.processes, "Checking")
        return f"{target}: dry run, nothing was written\n{_report(recipe, source, facts, dataset_id)}"
    with _kept_folder(target, _fingerprint(recipe, source)) as folder:
        jobs = _jobs(recipe, folder, options.previews)
        facts = run_jobs(convert_case, jobs, options.processes, "Converting")
        patients = {PATIENTS: {case: recipe.groups[case] for case in labelled}} if recipe.groups else {}
        write_dataset_json(
            folder, recipe.channels, recipe.labels, len(labelled), recipe.file_ending,
            **recipe.description, **patients, conversion=_conversion(recipe, facts),
        )  # fmt: skip
        for file, text in recipe.extra_files.items():
            (folder / file).write_text(text, encoding="utf-8")
        write_splits(folder, labelled, None if recipe.groups is None else dict(recipe.groups))
        _check_files(folder, jobs, recipe.extra_files)
    return f"{target}\n{_report(recipe, source, facts, dataset_id)}"


def convert_case(job: Job) -> Facts:
    """Read, check and write one case, unless an earlier call has done it."""
    case = job.case
    state = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in _files(case)]
    facts = _finished(job, state)
    if facts is None:
        image, label, remark = job.read(case)
        images = image if isinstance(image, tuple) else (image,)
        voxels = _check(case, images, label, tuple(job.classes.values()))
        axes = orientation(images[0]) if images[0].GetDimension() == 3 else ""
        facts = Facts(case.name, case.role, images[0].GetSize(), images[0].GetSpacing(), voxels, remark, axes)
        for written, file in zip((*images, label), _outputs(job), strict=False):
            write_image(written, file)
        if job.folder:
            sizes = [file.stat().st_size for file in _outputs(job)]
            write_json(_record(job), {"state": state, "sizes": sizes, "facts": asdict(facts)})
    if job.preview:
        from nnunetv2_semisup.datasets.preview import save_preview

        image, label = (read_image(_outputs(job)[place]) for place in (0, -1))
        save_preview(image, label, _preview(job), f"{case.name} ({case.role})", job.classes)
    return facts


def _finished(job: Job, state: list) -> Facts | None:
    """What an earlier call has recorded of a case, if its sources and what was written are as they were then."""
    if not job.folder:
        return None
    try:
        done = json.loads(_record(job).read_text(encoding="utf-8"))
        if done["state"] != state or done["sizes"] != [file.stat().st_size for file in _outputs(job)]:
            return None
        voxels = {int(value): number for value, number in done["facts"]["voxels"].items()}
        return Facts(**{**done["facts"], "voxels": voxels})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _record(job: Job) -> Path:
    return job.folder / RECORDS / f"{job.case.name}.json"


def _preview(job: Job) -> Path:
    return job.folder / "previews" / f"{job.case.name}.png"


def _outputs(job: Job) -> list[Path]:
    """Where images and, as the last one, the label of a case go."""
    if not job.folder:
        return []
    case = job.case
    folder = job.folder / IMAGES_OF[case.role]
    images = [folder / f"{case.name}_{channel:04d}{job.file_ending}" for channel in range(job.image_files)]
    label = [job.folder / LABELS_OF[case.role] / f"{case.name}{job.file_ending}"] if case.label_file else []
    return [*images, *label]


def _check_files(folder: Path, jobs: Sequence[Job], extra_files: Mapping[str, str]) -> None:
    """Refuse to go on unless ``folder`` holds the files of these jobs and no others: a label too many is a leak.

    Hidden files, as file browsers leave them, and what was being written when a process was killed, are removed.
    """
    files = [path for path in folder.rglob("*") if not path.is_dir() and path.name != MADE_BY]
    for file in [file for file in files if file.name.startswith(".") or file.suffix == ".tmp"]:
        file.unlink()
        files.remove(file)
    expected = {folder / name for name in ("dataset.json", "splits_final.json", *extra_files)}
    for job in jobs:
        expected.update([*_outputs(job), _record(job)], [_preview(job)] if job.preview else [])
    for wrong in sorted(expected.symmetric_difference(files)):
        what = "is of no case of this call" if wrong in files else "is missing"
        raise InputError(f"{wrong} {what}: another process was at work there; remove {folder} and start again")


def _check(case: Case, images: Sequence[sitk.Image], label: sitk.Image | None, values: Sequence[int]) -> dict[int, int]:
    """Check a case; returns class value -> number of voxels."""
    for image in images:
        check_image(sitk.GetArrayViewFromImage(image), case.files[0])
        check_shows_something(sitk.GetArrayViewFromImage(image), case.files[0])
    if label is None:
        return {}
    array = sitk.GetArrayViewFromImage(label)
    check_label(array, images[0].GetSize()[::-1], values, case.label_file)
    check_not_empty(array, case.label_file)
    return {value: int(np.count_nonzero(array == value)) for value in values}


def _files(case: Case) -> tuple[Path, ...]:
    return (*case.files, case.label_file) if case.label_file else case.files


def _jobs(recipe: Recipe, folder: Path | None, previews: int) -> list[Job]:
    for role in {case.role for case in recipe.cases} if folder else ():
        (folder / IMAGES_OF[role]).mkdir(exist_ok=True)
        if role in LABELS_OF:
            (folder / LABELS_OF[role]).mkdir(exist_ok=True)
    shown = [case.name for case in recipe.cases if case.label_file]
    if previews < len(shown):
        shown = [shown[i] for i in np.linspace(0, len(shown) - 1, previews).astype(int)]
    if folder and previews > 0:
        (folder / "previews").mkdir(exist_ok=True)
    image_files = len(recipe.channels) if recipe.separate_channels else 1
    what = (recipe.read, recipe.labels, folder, recipe.file_ending, image_files)
    return [Job(case, *what, folder is not None and case.name in shown) for case in recipe.cases]


@contextlib.contextmanager
def _kept_folder(target: Path, fingerprint: str) -> Iterator[Path]:
    """A folder that becomes ``target`` when all is well; else the finished cases stay for the next same call."""
    folder = target.with_name(f".unfinished_{target.name}")
    with reserved_id(target):
        try:
            _prepare(folder, fingerprint)
            try:
                yield folder
                publish(folder, target)
            except (InputError, OSError, KeyboardInterrupt) as error:
                done = sum(1 for _ in (folder / RECORDS).glob("*.json"))
                kept = f"{done} cases are finished and kept in {folder}, the same command goes on from there"
                if isinstance(error, KeyboardInterrupt):
                    raise KeyboardInterrupt(kept) from error
                raise (InputError(f"{error} ({kept})") if done else error) from error
            shutil.rmtree(target / RECORDS, ignore_errors=True)  # only now, so that a failure loses nothing
            (target / MADE_BY).unlink(missing_ok=True)
        finally:
            if not any((folder / RECORDS).glob("*.json")):
                shutil.rmtree(folder, ignore_errors=True)


def _prepare(folder: Path, fingerprint: str) -> None:
    """Make the folder, or keep it if the same call has begun it; previews are made anew."""
    made_by = folder / MADE_BY
    if folder.exists() and not (made_by.is_file() and made_by.read_bytes() == fingerprint.encode()):
        if done := sum(1 for _ in (folder / RECORDS).glob("*.json")):
            print(f"note: {folder} had {done} finished cases of another call; they are removed", file=sys.stderr)
        shutil.rmtree(folder)
    shutil.rmtree(folder / "previews", ignore_errors=True)
    for name in (*SUBFOLDERS, RECORDS):
        (folder / name).mkdir(parents=True, exist_ok=True)
    made_by.write_text(fingerprint, encoding="utf-8")


def _fingerprint(recipe: Recipe, source: Path) -> str:
    """Hash of what decides the result, except for the content of the files."""
    cases = [(case.name, case.role, *map(str, _files(case))) for case in recipe.cases]
    reading = sorted(getattr(recipe.read, "keywords", {}).items())
    content = [str(source), cases, reading, dict(recipe.labels), dict(recipe.conversion)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _conversion(recipe: Recipe, facts: Sequence[Facts]) -> dict:
    numbers = {role: sum(fact.role == role for fact in facts) for role in IMAGES_OF}
    return {**recipe.conversion, **numbers, "spacing": dict(_rows(recipe, facts))["spacing"]}


def _rows(recipe: Recipe, facts: Sequence[Facts]) -> list[tuple[str, str]]:
    return facts_rows(facts, dict(recipe.labels), recipe.spacing_note, dict(recipe.role_notes))


def _report(recipe: Recipe, source: Path, facts: Sequence[Facts], dataset_id: int) -> str:
    form = recipe.conversion.get("source_form")
    rows = [("source", f"{source}{f' ({form} form)' if form else ''}"), *_rows(recipe, facts), *recipe.rows]
    if subset := recipe.conversion["subset"]:
        rows.append(("subset", f"{subset}: the labelled cases are none of those of subset 0 to {subset - 1}"))
    return table_text([*rows, ("next", f"nnUNetv2_plan_and_preprocess -d {dataset_id} --verify_dataset_integrity")])


def write_dataset_json(
    folder: Path, channels: Sequence[str], labels: Mapping[str, int], labelled: int, file_ending: str, **extra
) -> None:
    """Write nnU-Net's ``dataset.json``.

    Args:
        folder: dataset folder.
        channels: channel names in order; nnU-Net chooses the normalisation by them.
        labels: class name to value, background 0.
        labelled: number of cases in ``imagesTr``.
        file_ending: of images and labels.
        extra: descriptive keys, which nnU-Net ignores.
    """
    content = {
        "channel_names": {str(index): name for index, name in enumerate(channels)},
        "labels": dict(labels),
        "numTraining": labelled,
        "file_ending": file_ending,
        **extra,
    }
    (folder / "dataset.json").write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


# --- command line ---------------------------------------------------------------------------------------------------


def make_parser(description: str, name: str | None, labelled_help: str, source_help: str) -> argparse.ArgumentParser:
    """A parser with the arguments that all converters have; without a name, the source decides it.

    What a converter adds must be stored under the name of the argument of its ``make_recipe``.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--source", type=Path, required=True, help=source_help)
    add("-d", dest="dataset_id", type=int, required=True, metavar="ID", help="dataset ID, 1 to 999, not in use yet")
    add("--labeled", dest="labelled_choice", required=True, metavar="N|FILE", help=labelled_help)
    subset_help = "the K-th N of them (default: 0, the first): no case is labelled in two subsets"
    add("--subset", type=int, default=0, metavar="K", help=subset_help)
    add("--name", default=name, help=f"DatasetXXX_NAME (default: {name or 'as the source is called'})")
    processes = min(4, os.cpu_count() or 1)
    add("-np", dest="processes", type=int, default=processes, metavar="N", help="processes (default here: %(default)s)")
    add("--previews", type=int, default=8, metavar="N", help="cases with a picture in previews/ (default: %(default)s)")
    add("--dry-run", "--dry_run", action="store_true", help="read and check everything, write nothing")
    return parser


def run_command(
    parser: argparse.ArgumentParser, convert_data_set: Callable[..., str], arguments: Sequence[str] | None
) -> int:
    """Convert as the arguments say and print the report; the exit code: 0, 2 for wrong input, 130 for Ctrl-C."""
    given = vars(parser.parse_args(arguments))
    options = Options(**{option.name: given.pop(option.name) for option in fields(Options)})
    try:
        if options.previews < 0:
            raise InputError(f"--previews {options.previews}: give 0 or more")
        print(convert_data_set(**given, options=options))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        print(f"error: interrupted, no dataset was written. {interruption}".rstrip(), file=sys.stderr)
        return 130
    return 0
