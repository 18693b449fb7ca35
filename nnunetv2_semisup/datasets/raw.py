"""Datasets in ``nnUNet_raw``: find one, make a new one that appears whole or not at all, link files into it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from nnunetv2_semisup import files
from nnunetv2_semisup.data.folders import RAW_FOLDER
from nnunetv2_semisup.data.splits import make_splits
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.files import PREPROCESSED, RAW, RESULTS, nnunet_folder, write_json

SUBFOLDERS = ("imagesTr", "labelsTr", RAW_FOLDER, "imagesTs", "labelsTs")


def find_dataset(dataset: str) -> Path:
    """The folder in ``nnUNet_raw`` of a dataset given by id ("4") or name ("Dataset004_Hippocampus")."""
    folder = files.find_dataset(dataset, RAW, "give the id or the full name of one that is there")
    if not (folder / "dataset.json").is_file():
        raise InputError(f"{folder} has no dataset.json; complete it as nnU-Net's dataset format describes")
    return folder


def new_dataset_path(dataset_id: int, name: str, option: str = "-d") -> Path:
    """The folder ``$nnUNet_raw/DatasetXXX_name``, checked: it can be made and nothing else has this ID.

    nnU-Net looks datasets up by ID in all three of its folders, so a leftover of another dataset with the same ID
    would be taken for this one. ``option`` is the one that gave the ID.
    """
    if not 1 <= dataset_id <= 999:
        raise InputError(f"{option} {dataset_id}: a dataset ID must be 1 to 999")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise InputError(f"--name {name!r}: only letters, digits, '_' and '-' can be used")
    raw = nnunet_folder(RAW)
    places = [Path(os.environ[key]) for key in (RAW, PREPROCESSED, RESULTS) if os.environ.get(key)]
    taken = [str(path) for place in places for path in sorted(place.glob(f"Dataset{dataset_id:03d}*"))]
    if taken:
        raise InputError(
            f"ID {dataset_id} is taken: {', '.join(taken)}; choose another with {option}, or remove it first"
        )
    return raw / f"Dataset{dataset_id:03d}_{name}"


@contextlib.contextmanager
def locked(file: Path, busy: str) -> Iterator[None]:
    """Hold the lock ``file``, which is gone afterwards; an InputError that starts with ``busy`` if another does."""
    lock = FileLock(str(file))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"{busy} (lock {file}); wait for it") from None
    except OSError as error:
        text = f"{file.parent} cannot be written ({error.strerror}); change its permissions, or use another folder"
        raise InputError(text) from error
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # while it is locked: who waits for this file takes a new one
        lock.release()


def reserved_id(target: Path) -> contextlib.AbstractContextManager[None]:
    """Hold the lock of the ID of the dataset ``target``, so that no two processes make datasets with one ID."""
    return locked(target.with_name(f".unfinished_{_id_of(target)}.lock"), f"another process is making {_id_of(target)}")


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``target`` with the dataset's subfolders; rename it to ``target`` at the end.

    On any error, Ctrl-C included, the temporary folder is removed; after ``kill -9`` the next call with this ID does
    it. Its name does not start with ``Dataset``, so nnU-Net never sees it.
    """
    with reserved_id(target):
        for leftover in target.parent.glob(f".tmp_{_id_of(target)}_*"):
            shutil.rmtree(leftover)
        temporary = target.with_name(f".tmp_{target.name}")
        try:
            for name in SUBFOLDERS:
                (temporary / name).mkdir(parents=True)
            yield temporary
            publish(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, target: Path) -> None:
    """Rename a finished folder to its final name, unless a dataset with the same ID has appeared meanwhile."""
    taken = sorted(target.parent.glob(f"{_id_of(target)}_*"))
    if taken:
        raise InputError(f"{taken[0]} has appeared during the conversion; remove it and start again")
    temporary.rename(target)


def _id_of(target: Path) -> str:
    """``Dataset004`` of ``Dataset004_Name``."""
    return target.name.split("_", 1)[0]


def link_or_copy(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source``: hard link, else symbolic link, else copy."""
    source = source.resolve()
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        try:
            target.symlink_to(source)
        except OSError:
            shutil.copy2(source, target)


def write_splits(folder: Path, labelled: Sequence[str], groups: dict[str, str] | None = None) -> None:
    """Write ``splits_final.json`` for the labelled cases, which nnU-Net's planner copies.

    Args:
        folder: dataset folder.
        labelled: case IDs.
        groups: case to patient; cases of one patient stay on one side. Without it each case is its own patient.
    """
    splits = make_splits(sorted(labelled), groups)
    write_json(folder / "splits_final.json", splits, indent=4)
