"""Preprocess unlabelled images as nnU-Net preprocesses labelled ones; nothing here opens a segmentation.

Finished cases go to ``<data_identifier>_unlabeled/``. The manifest beside that folder lists them and is written last,
so a case counts only once all of it is in place, whenever the process is killed. What the manifest does not list is
removed by the next call. One process works at a time, under a file lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from nnunetv2.paths import nnUNet_raw
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from tqdm import tqdm

from nnunetv2_semisup.data import checks
from nnunetv2_semisup.data.folders import (
    RAW_FOLDER,
    check_dataset_json,
    find_unlabeled_cases,
    labelled_cases,
    manifest_file,
    unlabeled_folder,
)
from nnunetv2_semisup.data.headers import Header, differing_axes, read_header, stored_axes, turns_images
from nnunetv2_semisup.data.jobs import submit, worker_pool
from nnunetv2_semisup.data.reading import read_errors
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.files import (
    PREPROCESSED,
    cannot_write,
    dataset_id,
    nnunet_folder,
    plans_in,
    read_json,
    write_json,
)

MANIFEST_PAUSE = 20  # between two writings of the manifest, as many times as long as the last one took
MAX_GROWTH = 100  # times as many voxels after resampling; slices of 10 mm to 1 mm are 10
SUFFIXES = (".b2nd", "_seg.b2nd", ".pkl")  # the files of a case: image, nonzero mask, properties

# What in a configuration changes the result; patch size and batch size do not.
_RELEVANT_KEYS = (
    "preprocessor_name",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
)

# Normalisations that do not look at the labelled cases' intensities; CT's does.
_SCHEMES_WITHOUT_STATISTICS = {
    "ZScoreNormalization",
    "NoNormalization",
    "RescaleTo01Normalization",
    "RGBTo01Normalization",
}


def preprocess_unlabeled(
    dataset_name: str,
    plans_name: str,
    configuration: str,
    num_processes: int,
    log: Callable[[str], None] = print,
    identifiers: list[str] | None = None,
) -> list[str]:
    """Preprocess the unlabelled cases that are missing or stale; remove those that left ``imagesUn``.

    A case is stale when its images changed (size or time) or the plans changed in a way that alters the result. Where
    ``imagesUn`` is not at hand, cases preprocessed earlier with the same plans serve.

    Args:
        dataset_name: ``DatasetXXX_Name``.
        plans_name: plans file without ``.json``.
        configuration: ``2d``, ``3d_fullres``, ...
        num_processes: processes at most; 1 works in this one.
        log: takes one line of text.
        identifiers: process these cases only. None: all.

    Returns:
        Sorted ids of the cases ready for use, all or ``identifiers``.
    """
    task = _read_task(dataset_name, plans_name, configuration)
    survey = _survey(task)
    if survey.images is None:
        log(f"No {RAW_FOLDER} at hand: using the {len(survey.recorded)} cases preprocessed earlier in {task.folder}")
        if survey.lost:
            log(f"WARNING: not used, because their preprocessed files are incomplete: {', '.join(survey.lost)}")
        return _wanted(task, survey, identifiers)
    if not survey.pending_of(_wanted(task, survey, identifiers)) and not survey.strays:
        log(f"{len(survey.recorded)} unlabelled cases are preprocessed in {task.folder}")
        wanted = _wanted(task, survey, identifiers)
        _tell_turned(task, survey, wanted, log)
        return wanted

    with _locked(task.lock_file, log):
        survey = _survey(task)  # another process may have done it meanwhile
        wanted = _wanted(task, survey, identifiers)
        _tell_turned(task, survey, wanted, log)
        _tidy(task, survey)
        pending = survey.pending_of(wanted)
        if pending:
            log(f"Preprocessing {len(pending)} of {len(survey.files)} unlabelled cases into {task.folder}")
            _process(task, survey, pending, num_processes, log)
        log(f"{len(wanted)} unlabelled cases are preprocessed in {task.folder}")
    return wanted


def pending_cases(dataset_name: str, plans_name: str, configuration: str) -> list[str]:
    """Sorted ids of the cases that :func:`preprocess_unlabeled` would process; changes nothing."""
    return _survey(_read_task(dataset_name, plans_name, configuration)).pending


# -------------------------------------------------------------------------------------------------------- what is there


@dataclass(frozen=True)
class _Task:
    """One configuration of one dataset, as read from ``nnUNet_preprocessed``."""

    dataset_name: str
    plans_name: str
    configuration: str
    dataset_folder: Path
    dataset_json: dict
    plans: dict

    @cached_property
    def _data_identifier(self) -> str:
        return PlansManager(self.plans).get_configuration(self.configuration).data_identifier

    @property
    def folder(self) -> Path:
        return unlabeled_folder(self.dataset_folder, self._data_identifier)

    @property
    def manifest(self) -> Path:
        return manifest_file(self.dataset_folder, self._data_identifier)

    @property
    def lock_file(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.lock")

    @property
    def temporary(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.tmp")

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything in the plans that changes the result."""
        plans = PlansManager(self.plans)
        configuration = plans.get_configuration(self.configuration).configuration
        relevant = {
            **{key: configuration.get(key) for key in _RELEVANT_KEYS},
            "transpose_forward": plans.transpose_forward,
            "image_reader_writer": self.plans["image_reader_writer"],
        }
        relevant["spacing"] = [float(s) for s in relevant["spacing"]]  # 1 and 1.0 are the same
        if not set(relevant["normalization_schemes"]) <= _SCHEMES_WITHOUT_STATISTICS:
            relevant["foreground_intensities"] = plans.foreground_intensity_properties_per_channel
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


class _Survey(NamedTuple):
    """State of the folders.

    Attributes:
        images: case id -> image files; None where ``imagesUn`` is not at hand.
        facts: case id -> name, size and time of its image files.
        recorded: the manifest's entries of cases that are whole and not stale.
        pending: sorted ids of cases to process.
        lost: sorted ids of recorded cases whose files are missing and cannot be made again.
        strays: files in the folder that belong to no recorded case.
    """

    images: dict[str, list[str]] | None
    facts: dict[str, list]
    recorded: dict[str, dict]
    pending: list[str]
    lost: list[str]
    strays: list[Path]

    @property
    def files(self) -> dict[str, list[str]]:
        """``images``; nothing where they are not at hand."""
        return self.images or {}

    def pending_of(self, wanted: list[str]) -> list[str]:
        return sorted(set(self.pending) & set(wanted))


def _read_task(dataset_name: str, plans_name: str, configuration: str) -> _Task:
    folder = nnunet_folder(PREPROCESSED) / dataset_name
    command = f"run nnUNetv2_plan_and_preprocess -d {dataset_id(dataset_name)}"
    plans_file = folder / f"{plans_name}.json"
    others = plans_in(folder)
    hint = f", or choose one of the plans there with -p: {', '.join(others)}" if others else ""
    plans = read_json(plans_file, command + hint)
    check_plans(plans, configuration, str(plans_file), command)
    dataset_json = read_json(folder / "dataset.json", command)
    check_dataset_json(dataset_json, folder / "dataset.json")
    return _Task(dataset_name, plans_name, configuration, folder, dataset_json, plans)


def check_plans(plans: object, configuration: str, where: str, remedy: str) -> None:
    """Raise an InputError unless ``plans`` tell how to preprocess in ``configuration``.

    Args:
        plans: content of a plans file.
        configuration: e.g. ``2d``.
        where: the file, for the error.
        remedy: against it.
    """
    if not isinstance(plans, dict) or not isinstance(plans.get("configurations"), dict):
        raise InputError(f"{where} is no plans file: {remedy}")
    if configuration not in plans["configurations"]:
        existing = ", ".join(plans["configurations"])
        raise InputError(f"{where} has no configuration {configuration!r}: choose one of {existing}, or {remedy}")
    try:
        manager = PlansManager(plans)
        found = manager.get_configuration(configuration)
        needed = [found.data_identifier, found.preprocessor_class, found.resampling_fn_data, found.resampling_fn_seg]
        needed += [found.normalization_schemes, found.use_mask_for_norm, plans["image_reader_writer"]]
        spacing = np.array(found.spacing, float)
        axes = sorted(manager.transpose_forward)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, LookupError, ImportError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise InputError(f"{where}: configuration {configuration} cannot be used ({what}): {remedy}") from error
    if None in needed or axes != [0, 1, 2] or spacing.shape not in ((2,), (3,)) or not (spacing > 0).all():
        raise InputError(
            f"{where}: configuration {configuration} needs a spacing above 0 mm, a preprocessor, resampling and "
            f"normalisation: {remedy}"
        )


def _tell_turned(task: _Task, survey: _Survey, wanted: list[str], log: Callable[[str], None]) -> None:
    """Warn of images whose axes point elsewhere than those of the labelled ones."""
    if turns_images(task.plans["image_reader_writer"]):
        return
    labelled = labelled_cases(Path(nnUNet_raw) / task.dataset_name, task.dataset_json)
    axes = {case: stored_axes(str(files["images"][0])) for case, files in labelled.items() if files["images"]}
    for case in wanted:  # the manifest has those of finished cases: thousands of headers take long to read
        known = survey.recorded.get(case, {}).get("axes")
        axes[case] = known if isinstance(known, str) else stored_axes(survey.files[case][0])
    if turned := differing_axes(axes, labelled):
        log(f"WARNING: {turned}")


def _labelled_axes(task: _Task) -> int | None:
    """Number of axes of a labelled image; None where they are not at hand, and for readers that count on their own."""
    if not task.plans["image_reader_writer"].startswith("SimpleITK"):
        return None
    labelled = labelled_cases(Path(nnUNet_raw) / task.dataset_name, task.dataset_json)
    files = (str(entry["images"][0]) for entry in labelled.values() if entry["images"])
    header = next((found for file in files if (found := read_header(file))), None)
    return header.number if header else None


def _survey(task: _Task) -> _Survey:
    images = _find_images(task)
    manifest = _read_manifest(task)
    whole = {case: entry for case, entry in manifest.items() if _sizes(task.folder, case) == entry.get("sizes")}
    if images is None:
        if not whole:
            nothing = f"{task.folder} holds no case made with these plans"
            if not nnUNet_raw.get():
                raise InputError(f"nnUNet_raw is not set and {nothing}: export nnUNet_raw=FOLDER")
            where = Path(nnUNet_raw, task.dataset_name, RAW_FOLDER)
            raise InputError(
                f"{where} is not there and {nothing}: put the unlabelled images into {where}, named as in imagesTr, or "
                f"copy that folder and its manifest"
            )
        return _Survey(None, {}, whole, [], sorted(set(manifest) - set(whole)), [])
    facts = {case: _file_facts(files) for case, files in images.items()}
    recorded = {case: entry for case, entry in whole.items() if entry.get("images") == facts.get(case)}
    return _Survey(images, facts, recorded, sorted(set(images) - set(recorded)), [], _strays(task.folder, recorded))


def _find_images(task: _Task) -> dict[str, list[str]] | None:
    if not nnUNet_raw.is_set():
        return None
    folder = Path(nnUNet_raw) / task.dataset_name
    return find_unlabeled_cases(folder, task.dataset_json) if (folder / RAW_FOLDER).is_dir() else None


def _read_manifest(task: _Task) -> dict[str, dict]:
    """Case id -> entry; empty if there is none, it is damaged, or it was made with other plans."""
    try:
        content = json.loads(task.manifest.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    if not isinstance(content, dict) or content.get("plans") != task.fingerprint:
        return {}
    cases = content.get("cases")
    return {case: entry for case, entry in cases.items() if isinstance(entry, dict)} if isinstance(cases, dict) else {}


def _file_facts(files: list[str]) -> list[list]:
    """Name, size in bytes and time of last change in ns of the files that make a case."""
    paths = [Path(file) for file in files]
    spacing_file = paths[0].with_name(f"{paths[0].name.rsplit('_', 1)[0]}.json")  # beside TIFF images
    if spacing_file.exists():
        paths.append(spacing_file)
    stats = [path.stat() for path in paths]
    return [[path.name, stat.st_size, stat.st_mtime_ns] for path, stat in zip(paths, stats, strict=True)]


def _sizes(folder: Path, case: str) -> list[int] | None:
    """Sizes in bytes of a preprocessed case's files, None if one is missing."""
    try:
        return [(folder / f"{case}{suffix}").stat().st_size for suffix in SUFFIXES]
    except FileNotFoundError:
        return None


def _strays(folder: Path, recorded: dict[str, dict]) -> list[Path]:
    known = {f"{case}{suffix}" for case in recorded for suffix in SUFFIXES}
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [file for file in files if file.suffix in (".b2nd", ".pkl") and file.name not in known]


def _wanted(task: _Task, survey: _Survey, identifiers: list[str] | None) -> list[str]:
    existing = survey.recorded if survey.images is None else survey.images
    unknown = sorted(set(identifiers or []) - set(existing))
    if unknown:
        where = task.folder if survey.images is None else RAW_FOLDER
        raise InputError(f"no such cases in {where}: {', '.join(unknown)}. Add their images or leave them out")
    return sorted(existing if identifiers is None else set(identifiers))


# ----------------------------------------------------------------------------------------------------------- processing


class _Job(NamedTuple):
    case: str
    files: list[str]
    output: str  # path without suffix
    plans: dict
    configuration: str
    dataset_json: dict
    axes: int | None  # of the labelled images


@contextlib.contextmanager
def _locked(file: Path, log: Callable[[str], None]) -> Iterator[None]:
    lock = FileLock(str(file))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log(f"Another process is preprocessing these unlabelled images: waiting for it (lock {file})")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _tidy(task: _Task, survey: _Survey) -> None:
    """Remove what an interrupted run left and cases that are gone; the manifest first, so that it never lies.

    Files of stale cases stay until they are replaced: a training with other plans may be reading them.
    """
    task.folder.mkdir(exist_ok=True)
    _write_manifest(task, survey.recorded)
    expected = {f"{case}{suffix}" for case in survey.files for suffix in SUFFIXES}
    for file in survey.strays:
        if file.name not in expected:
            file.unlink()
    for file in task.dataset_folder.glob(f".{task.manifest.name}.*.tmp"):
        file.unlink()
    shutil.rmtree(task.temporary, ignore_errors=True)


def _write_manifest(task: _Task, recorded: dict[str, dict]) -> None:
    write_json(task.manifest, {"plans": task.fingerprint, "cases": recorded})


def _process(task: _Task, survey: _Survey, pending: list[str], num_processes: int, log: Callable[[str], None]) -> None:
    """Preprocess ``pending`` in a temporary folder and move each case into place once it is whole."""
    recorded = dict(survey.recorded)
    task.temporary.mkdir(exist_ok=True)
    # A folder of this run's own: a worker that outlived an earlier run cannot write into it.
    work = Path(tempfile.mkdtemp(dir=task.temporary))
    axes = _labelled_axes(task)
    jobs = [
        _Job(case, survey.files[case], str(work / case), task.plans, task.configuration, task.dataset_json, axes)
        for case in pending
    ]
    paused_until, in_manifest = 0.0, len(recorded)

    def publish(case: str, remarks: list[str]) -> None:
        nonlocal paused_until, in_manifest
        for remark in remarks:
            log(f"WARNING: {remark}")
        for suffix in SUFFIXES:
            os.replace(work / f"{case}{suffix}", task.folder / f"{case}{suffix}")
        stored = stored_axes(survey.files[case][0])
        recorded[case] = {"images": survey.facts[case], "sizes": _sizes(task.folder, case), "axes": stored}
        start = perf_counter()
        if start >= paused_until:  # it grows with the cases, so that writing it after each would take quadratic time
            _write_manifest(task, recorded)
            in_manifest = len(recorded)
            paused_until = perf_counter() + MANIFEST_PAUSE * (perf_counter() - start)
        bar.update()

    try:
        with tqdm(total=len(jobs), desc="Preprocessing unlabelled cases") as bar:
            workers = min(num_processes, len(jobs))
            if workers > 1:
                _run_in_pool(jobs, workers, publish)
            else:
                for job in jobs:
                    publish(job.case, _preprocess_case(job))
    except BrokenProcessPool as error:
        raise InputError(
            f"A process that preprocessed unlabelled images was killed, most likely for lack of memory: finish with "
            f"fewer processes, nnUNetv2_semisup_preprocess -d {dataset_id(task.dataset_name)} -p {task.plans_name} "
            f"-c {task.configuration} -np {workers // 2}"
        ) from error
    finally:
        if len(recorded) > in_manifest:
            _write_manifest(task, recorded)
        shutil.rmtree(task.temporary, ignore_errors=True)


def _run_in_pool(jobs: list[_Job], workers: int, publish: Callable[[str, list[str]], None]) -> None:
    """Run the jobs in processes of their own; the first error ends all of them and is raised."""
    with worker_pool(workers) as pool:
        case_of = {submit(pool, _preprocess_case, job): job.case for job in jobs}
        running = set(case_of)
        while running:
            # With a time limit: a Ctrl-C that arrives just before the wait begins would be noticed only at its end.
            done, running = wait(running, timeout=1, return_when=FIRST_COMPLETED)
            failed = [future for future in done if future.exception() is not None]
            for future in done.difference(failed):
                publish(case_of[future], future.result())
            for future in failed:
                future.result()  # raises


def _preprocess_case(job: _Job) -> list[str]:
    """Write the files of a case; returns what to tell of it."""
    plans = PlansManager(job.plans)
    configuration = plans.get_configuration(job.configuration)
    preprocessor = _checked(configuration.preprocessor_class, job.axes)(verbose=False)
    try:
        preprocessor.run_case_save(job.output, job.files, None, plans, configuration, job.dataset_json)
    except (RuntimeError, OSError) as error:  # what is wrong with the image is an InputError by now
        raise cannot_write(Path(f"{job.output}.b2nd"), " ".join(str(error).split())) from error
    return preprocessor.remarks


def _checked(preprocessor_class: type[DefaultPreprocessor], axes: int | None) -> type[DefaultPreprocessor]:
    """The plans' preprocessor, which also checks values and names the files in its errors.

    Values are those that nnU-Net's reader delivers: ITK turns NaN and infinity in NIfTI files into 0, for labelled
    images too, other formats and readers keep them. ``axes``: of the labelled images, None if not known.
    """

    class Checked(preprocessor_class):
        def run_case(self, image_files, *args, **kwargs):
            self.remarks: list[str] = []
            files = ", ".join(image_files)

            def tell(error: Exception) -> str:
                # nnU-Net's readers raise without text in one situation only, and print the rest.
                what = " ".join(str(error).split()) or "its channels differ in shape or voxel size"
                return f"{files} cannot be preprocessed: {what}. Repair the image or remove it from {RAW_FOLDER}"

            with read_errors(tell):
                for file in image_files:
                    checks.require_whole_nifti(file)
                    checks.require_own_data(file)
                    _require_axes(read_header(file), axes)
                data, mask, properties = super().run_case(image_files, *args, **kwargs)
                checks.require_finite(data)
            self.remarks = [f"{files}: {remark}" for remark in self.remarks]
            return data, mask, properties

        def run_case_npy(self, data, seg, properties, plans_manager, configuration_manager, dataset_json):
            checks.require_channels(data, len(configuration_manager.normalization_schemes))
            checks.require_finite(data)
            if empty := checks.require_intensities(data):
                self.remarks.append(f"channel {', '.join(map(str, empty))} has one value alone")
            _require_sane_size(data.shape, properties["spacing"], plans_manager, configuration_manager)
            return super().run_case_npy(data, seg, properties, plans_manager, configuration_manager, dataset_json)

    return Checked


def _require_axes(header: Header | None, axes: int | None) -> None:
    if header is None:
        return  # the reader will say what is wrong
    if header.is_complex:
        raise ValueError("complex numbers, of which the imaginary part would be lost: save the magnitude")
    if axes is not None and header.number != axes:
        raise ValueError(
            f"it has {header.number} axes, the labelled images have {axes}, so nnU-Net would stretch it into a volume"
        )


def _require_sane_size(
    shape: tuple[int, ...], spacing: list[float], plans: PlansManager, configuration: ConfigurationManager
) -> None:
    """Refuse a voxel size with which resampling would leave nothing, or ask for a huge image.

    Args:
        shape: (C, Z, Y, X) as stored.
        spacing: of z, y, x in mm.
        plans, configuration: nnU-Net's.
    """
    sizes = [float(spacing[axis]) for axis in plans.transpose_forward]
    lengths = [shape[axis + 1] for axis in plans.transpose_forward]
    target = [*sizes[: 3 - len(configuration.spacing)], *configuration.spacing]  # slices stay as they are in 2d
    told = f"its voxel size {' x '.join(f'{size:g}' for size in sizes)} mm"
    if not all(0 < size < math.inf for size in sizes):
        raise ValueError(f"{told} is none: correct the header")
    new = [round(length * size / wanted) for length, size, wanted in zip(lengths, sizes, target, strict=True)]
    if 0 in new:
        raise ValueError(
            f"{told} leaves no voxel of {' x '.join(f'{size:g}' for size in target)} mm: correct the header"
        )
    growth, gigabytes = math.prod(new) / math.prod(lengths), shape[0] * math.prod(new) * 4 / 2**30
    if growth > MAX_GROWTH and gigabytes > 1:
        raise ValueError(
            f"{told} would make {gigabytes:.3g} GiB of it, {' x '.join(map(str, new))} voxels: correct the header"
        )
