"""Files and folders for every part of the package: write whole or not at all, read with a remedy, find a data set."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nnunetv2_semisup.errors import InputError

RAW, PREPROCESSED, RESULTS = "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"


@contextlib.contextmanager
def whole_file(file: Path, only_writer: bool = False) -> Iterator[Path]:
    """A temporary path beside ``file``, renamed to ``file`` when the block ends without an error, else removed.

    A reader finds either the old file or the whole new one. What a killed process leaves is hidden and ends with
    ``.tmp``; with ``only_writer`` the next writer of ``file`` overwrites it: for large files that one process writes.

    Raises:
        InputError: it cannot be written, as on a full disk.
    """
    number = "" if only_writer else f".{os.getpid()}"
    temporary = file.with_name(f".{file.name}{number}.tmp")
    try:
        yield temporary
        os.replace(temporary, file)
    except OSError as error:
        raise cannot_write(file, error.strerror or str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def cannot_write(file: Path, reason: str) -> InputError:
    """The error for a file that could not be written, with the room that is left on its disk."""
    room = ""
    with contextlib.suppress(OSError):
        room = f", {shutil.disk_usage(file.parent).free / 1e9:.3g} GB are free there"
    return InputError(f"{file} cannot be written ({reason}{room}): make room on the disk, or change permissions")


def write_text(file: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with whole_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(file: Path, content: dict | list, indent: int = 1) -> None:
    """Write ``content`` as JSON, whole or not at all."""
    write_text(file, json.dumps(content, indent=indent) + "\n")


def read_json(file: Path, remedy: str) -> Any:
    """Content of ``file``; an InputError that names it and ends with ``remedy`` if it is missing or damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{file} does not exist: {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not valid JSON ({error}): {remedy}") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): {remedy}") from error


def read_object(file: Path, remedy: str, *keys: str) -> dict:
    """As :func:`read_json`, of a file that must hold an object with these keys."""
    content = read_json(file, remedy)
    if not isinstance(content, dict):
        raise InputError(f"{file} is not what belongs there, a JSON object: {remedy}")
    if missing := [key for key in keys if key not in content]:
        raise InputError(f"{file} has no {listed(missing)}: {remedy}")
    return content


def write_csv(file: Path, columns: Sequence[str], rows: Iterable[dict]) -> None:
    """Write ``rows`` under a header, whole or not at all; what a row lacks is an empty cell."""
    with whole_file(file) as temporary, open(temporary, "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def is_utf8(name: str) -> bool:
    """Whether a file's name is text: one that is not can be neither printed nor written into a record."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def listed(names: Sequence[str], most: int = 10) -> str:
    """``A, B, C and 7 more``: the first ``most`` of ``names`` and how many are left."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def nnunet_folder(variable: str) -> Path:
    """The folder that nnU-Net's ``variable`` names.

    Raises:
        InputError: it is not set, or no folder is there.
    """
    if not os.environ.get(variable):
        raise InputError(f"{variable} is not set: export {variable}=FOLDER, as nnU-Net needs it too")
    value = os.environ[variable]
    folder = Path(value).absolute()
    if not folder.is_dir():
        odd = value.startswith("~") or value[0] in "\"'" or value != value.strip()
        hint = f"; it is set to {value!r}: write it without quotes, blanks and ~" if odd else ""
        raise InputError(f"{variable} is {folder}, which is not a folder: create it or correct the variable{hint}")
    return folder


def find_dataset(dataset: str, variable: str, remedy: str) -> Path:
    """The one folder in ``variable``'s folder that ``dataset`` means: an id ("508"), a full name, or that with a slash.

    Raises:
        InputError: none or several; ``remedy`` says what to do when there is none.
    """
    root = nnunet_folder(variable)
    dataset = dataset.rstrip("/\\") or dataset
    if dataset.isdecimal():
        found = [f for f in sorted(root.glob(f"Dataset{int(dataset):03d}_*")) if f.is_dir()]
    else:
        found = [root / dataset] if Path(dataset).name == dataset and (root / dataset).is_dir() else []
    if not found:
        there = listed([f.name for f in sorted(root.glob("Dataset[0-9]*_*")) if f.is_dir()]) or "none"
        raise InputError(f"-d {dataset}: no dataset of that id or name in {root}, there is {there}: {remedy}")
    if len(found) > 1:
        raise InputError(
            f"-d {dataset}: {len(found)} datasets ({listed([f.name for f in found])}) in {root}: give the full name"
        )
    return found[0]


def find_preprocessed(dataset: str) -> Path:
    """The data set's folder in ``nnUNet_preprocessed``, as :func:`find_dataset` finds it."""
    remedy = f"correct it, or run nnUNetv2_plan_and_preprocess -d {dataset_id(dataset)}"
    return find_dataset(dataset, PREPROCESSED, remedy)


def dataset_id(dataset: str) -> str:
    """``508`` of ``Dataset508_Name``, which is all that nnU-Net's planning and preprocessing take; else as it is."""
    number = dataset.removeprefix("Dataset")[:3]
    return str(int(number)) if dataset.startswith("Dataset") and number.isdecimal() else dataset


def plans_in(folder: Path) -> list[str]:
    """Names of the plans files in a data set's preprocessed folder."""
    found = []
    for file in sorted(folder.glob("*.json")):
        with contextlib.suppress(OSError, ValueError):
            content = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(content, dict) and isinstance(content.get("configurations"), dict):
                found.append(file.stem)
    return found


def require_preprocessed(dataset_folder: Path, identifier: str, plans: str, configuration: str) -> None:
    """Raise an InputError that names nnU-Net's command unless labelled cases are preprocessed.

    Args:
        dataset_folder: the data set's folder in nnUNet_preprocessed.
        identifier: the configuration's ``data_identifier``, the folder of its cases.
        plans: name of the plans.
        configuration: e.g. ``3d_fullres``.
    """
    if not any((dataset_folder / identifier).glob("*.pkl")):
        raise InputError(
            f"{dataset_folder / identifier} holds no preprocessed cases: run nnUNetv2_preprocess "
            f"-d {dataset_id(dataset_folder.name)} -plans_name {plans} -c {configuration}"
        )
