"""What the converters share: case lists, checks before writing, one dataset folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from nnunetv2_semisup.data.splits import make_splits
from nnunetv2_semisup.errors import InputError

SUBFOLDERS = ("imagesTr", "labelsTr", "imagesUn", "imagesTs", "labelsTs")
FILE_ENDING = ".nii.gz"
RAW, PREPROCESSED, RESULTS = "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"  # environment variables


# --- case lists ---------------------------------------------------------------------------------------------------


def read_list(path: Path) -> list[str]:
    """Read a case list: one ID per line; blank lines and lines starting with ``#`` are skipped.

    Raises:
        InputError: the file cannot be read or names a case twice.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the case list cannot be read ({error})") from error
    cases = [line for line in lines if line and not line.startswith("#")]
    twice = sorted({case for case in cases if cases.count(case) > 1})
    if twice:
        raise InputError(f"{path}: listed more than once: {', '.join(twice)}; name each case once")
    return cases


def choose_labelled(choice: str, train: Sequence[str]) -> list[str]:
    """The labelled cases.

    Args:
        choice: a number N (the first N of ``train``, as in the literature), or a file naming cases of ``train``.
        train: IDs of all training cases, in published order.

    Returns:
        at least one ID; the rest of ``train`` is unlabelled.
    """
    if re.fullmatch(r"[+-]?\d+", choice):
        number = int(choice)
        if not 1 <= number <= len(train):
            raise InputError(f"--labeled {choice}: the number of labelled cases must be 1 to {len(train)}")
        return list(train[:number])
    labelled = read_list(Path(choice))
    if not labelled:
        raise InputError(f"--labeled {choice}: the list names no case, at least 1 is needed")
    unknown = sorted(set(labelled) - set(train))
    if unknown:
        raise InputError(f"--labeled {choice}: not in the list of training cases: {', '.join(unknown)}")
    return labelled


# --- checks before anything is written ------------------------------------------------------------------------------


def new_dataset_path(dataset_id: int, name: str) -> Path:
    """The folder ``$nnUNet_raw/DatasetXXX_name``, checked: it can be made and nothing else has this ID.

    nnU-Net looks datasets up by ID in all three of its folders, so a leftover of another dataset with the same ID
    would be taken for this one.
    """
    if not 1 <= dataset_id <= 999:
        raise InputError(f"-d {dataset_id}: a dataset ID must be 1 to 999")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise InputError(f"--name {name!r}: only letters, digits, '_' and '-' can be used")
    if not os.environ.get(RAW):
        raise InputError(f"{RAW} is not set; run: export {RAW}=FOLDER")
    raw = Path(os.environ[RAW]).absolute()
    if not raw.is_dir():
        raise InputError(f"{RAW} is {raw}, which is no folder; create it or correct the variable")
    places = [Path(os.environ[key]) for key in (RAW, PREPROCESSED, RESULTS) if os.environ.get(key)]
    taken = [str(path) for place in places for path in sorted(place.glob(f"Dataset{dataset_id:03d}*"))]
    if taken:
        raise InputError(f"ID {dataset_id} is taken: {', '.join(taken)}; choose another with -d, or remove it first")
    return raw / f"Dataset{dataset_id:03d}_{name}"


def check_image(array: np.ndarray, path: Path) -> None:
    """Raise an InputError unless ``array`` is a real-valued, finite, non-empty volume of three axes."""
    if array.ndim != 3 or array.size == 0:
        raise InputError(f"{path}: the image has shape {array.shape}, expected a volume of three axes")
    if array.dtype.kind not in "uif":
        raise InputError(f"{path}: the image has type {array.dtype}, expected numbers")
    if not np.isfinite(array).all():
        raise InputError(f"{path}: the image has values that are not finite (NaN or infinity); copy the file again")


def check_label(array: np.ndarray, shape: tuple[int, ...], allowed: Sequence[int], path: Path) -> None:
    """Raise an InputError unless ``array`` has the image's ``shape`` and only ``allowed`` values."""
    if array.shape != shape:
        raise InputError(f"{path}: the label has shape {array.shape}, the image {shape}; both must be the same")
    if array.dtype.kind not in "uif":
        raise InputError(f"{path}: the label has type {array.dtype}, expected numbers")
    unexpected = np.unique(array[~np.isin(array, allowed)])
    if unexpected.size:
        values = ", ".join(f"{value:g}" for value in unexpected[:5])
        raise InputError(f"{path}: unexpected label value {values}; only {' and '.join(map(str, allowed))} may occur")


# --- writing --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``target`` with the dataset's subfolders; rename it to ``target`` at the end.

    On any error, Ctrl-C included, the temporary folder is removed. Its name does not start with ``Dataset``, so
    nnU-Net never sees it.
    """
    temporary = target.with_name(f".tmp_{target.name}_{os.getpid()}")
    temporary.mkdir()
    try:
        for name in SUBFOLDERS:
            (temporary / name).mkdir()
        yield temporary
        if target.exists():  # rename would replace an empty folder that appeared meanwhile
            raise InputError(f"{target} has appeared during the conversion; remove it and start again")
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_image(image: sitk.Image, path: Path) -> None:
    """Write a NIfTI file and read it back: on a full disk SimpleITK loses data without raising an error."""
    try:
        sitk.WriteImage(image, str(path), useCompression=True)
        written = sitk.ReadImage(str(path))
        same = np.array_equal(sitk.GetArrayViewFromImage(written), sitk.GetArrayViewFromImage(image))
    except RuntimeError:
        same = False
    if not same:
        raise InputError(f"{path} could not be written; is the disk full?")


def write_dataset_json(folder: Path, channels: Sequence[str], labels: dict[str, int], labelled: int, **extra) -> None:
    """Write nnU-Net's ``dataset.json``.

    Args:
        folder: dataset folder.
        channels: channel names in order; nnU-Net chooses the normalisation by them.
        labels: class name to value, background 0.
        labelled: number of cases in ``imagesTr``.
        extra: descriptive keys, which nnU-Net ignores.
    """
    content = {
        "channel_names": {str(index): name for index, name in enumerate(channels)},
        "labels": labels,
        "numTraining": labelled,
        "file_ending": FILE_ENDING,
        **extra,
    }
    (folder / "dataset.json").write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


def write_splits(folder: Path, labelled: Sequence[str], groups: dict[str, str] | None = None) -> None:
    """Write ``splits_final.json`` for the labelled cases, which nnU-Net's planner copies.

    Args:
        folder: dataset folder.
        labelled: case IDs.
        groups: case to patient; cases of one patient stay on one side. Without it each case is its own patient.
    """
    splits = make_splits(sorted(labelled), groups)
    (folder / "splits_final.json").write_text(json.dumps(splits, indent=4) + "\n", encoding="utf-8")


# --- running --------------------------------------------------------------------------------------------------------


def run_jobs(function: Callable, jobs: Sequence, processes: int) -> list:
    """Apply ``function`` to each job, with a progress bar; the first error stops everything.

    Args:
        function: module-level function of one argument, picklable.
        jobs: its arguments, picklable.
        processes: 1 runs in this process, more in freshly started ones.

    Returns:
        results in the order of ``jobs``.
    """
    if processes < 1:
        raise InputError(f"-np {processes}: at least 1 process is needed")
    with tqdm(total=len(jobs), unit="case", disable=None) as bar:
        if processes == 1:
            results = []
            for job in jobs:
                results.append(function(job))
                bar.update()
            return results
        return _run_in_processes(function, jobs, min(processes, len(jobs)), bar)


def _run_in_processes(function: Callable, jobs: Sequence, processes: int, bar: tqdm) -> list:
    # Workers ignore Ctrl-C: this process stops them, and waits for them before the folder they write to is removed.
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)
    )
    try:
        futures = [pool.submit(function, job) for job in jobs]
        for future in as_completed(futures):
            future.result()
            bar.update()
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        raise InputError(f"a worker process died, perhaps for lack of memory; try -np {processes // 2}") from error
    finally:
        pool.shutdown(cancel_futures=True)


def range_text(rows: Sequence[Sequence[float]]) -> str:
    """Smallest and largest value per column: ``[(148, 88), (244, 88)]`` gives ``"148-244 x 88"``."""
    columns = [(min(column), max(column)) for column in zip(*rows, strict=True)]
    return " x ".join(f"{low:g}" if low == high else f"{low:g}-{high:g}" for low, high in columns)


def table_text(rows: Sequence[tuple[str, object]]) -> str:
    """Two aligned columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
