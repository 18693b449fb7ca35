"""Cross-validation folds that keep a patient on one side, and the unlabelled cases of a fold."""

from __future__ import annotations

import warnings
from pathlib import Path

from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.files import listed, read_json, write_json

MIN_CASES_OF_STOCK = 5  # nnU-Net's 5-fold split dies below


def make_splits(
    identifiers: list[str], groups: dict[str, str] | None = None, n_splits: int = 5, seed: int = 12345
) -> list[dict[str, list[str]]]:
    """Divide labelled cases into folds; all cases of a patient are on the same side of each.

    With at least ``n_splits`` patients this is nnU-Net's own shuffled split, over the sorted patients; without groups
    it is nnU-Net's split itself. With fewer patients each is left out once. A single patient is both sides, with a
    warning, because there is nothing to validate on.

    Args:
        identifiers: case ids, any order.
        groups: case id -> patient. None: every case is a patient.
        n_splits: number of folds where there are enough patients.
        seed: of the shuffle; the default is nnU-Net's.

    Returns:
        One dictionary per fold with the sorted lists "train" and "val".
    """
    cases = sorted(set(identifiers))
    if not cases:
        raise InputError("no labelled cases to split: imagesTr is empty")
    patient_of = {case: case for case in cases} if groups is None else groups
    unknown = [case for case in cases if patient_of.get(case) is None]
    if unknown:
        raise InputError(f"no patient is given for {', '.join(unknown)}: add them to the groups")
    patients = sorted({patient_of[case] for case in cases})

    if len(patients) == 1:
        warnings.warn(f"One patient only ({patients[0]}): validation runs on the training cases.", stacklevel=2)
        return [{"train": cases, "val": list(cases)}]
    if len(patients) < n_splits:
        validation = [{patient} for patient in patients]
    else:
        validation = [set(fold["val"]) for fold in generate_crossval_split(patients, seed=seed, n_splits=n_splits)]
    return [
        {
            "train": [case for case in cases if patient_of[case] not in left_out],
            "val": [case for case in cases if patient_of[case] in left_out],
        }
        for left_out in validation
    ]


def ensure_splits(preprocessed_dataset_folder: Path, identifiers: list[str]) -> Path | None:
    """Write ``splits_final.json`` where nnU-Net could not: it is missing and there are fewer than 5 cases.

    Args:
        preprocessed_dataset_folder: ``nnUNet_preprocessed/DatasetXXX_Name``.
        identifiers: the labelled cases.

    Returns:
        The file if it was written, otherwise None.
    """
    file = _splits_file(preprocessed_dataset_folder)
    if file.exists() or len(set(identifiers)) >= MIN_CASES_OF_STOCK:
        return None
    write_json(file, make_splits(identifiers))
    return file


def unlabeled_of_fold(preprocessed_dataset_folder: Path, fold: int | str, available: list[str]) -> list[str]:
    """The unlabelled cases that serve a fold: its list "unlabeled" in ``splits_final.json``, or all.

    Args:
        preprocessed_dataset_folder: ``nnUNet_preprocessed/DatasetXXX_Name``.
        fold: number of the fold, or "all".
        available: ids of the preprocessed unlabelled cases.

    Returns:
        Sorted ids.
    """
    file = _splits_file(preprocessed_dataset_folder)
    if fold == "all" or not file.exists():
        return sorted(available)
    splits = _read_splits(file)
    if int(fold) >= len(splits) or "unlabeled" not in splits[int(fold)]:
        return sorted(available)
    names = splits[int(fold)]["unlabeled"]
    where = f'{file}: "unlabeled" of fold {fold}'
    if not isinstance(names, list) or not all(isinstance(case, str) for case in names):
        raise InputError(f"{where} must be a list of case names, it is {names!r:.200}")
    if not names:
        raise InputError(f"{where} is empty: name unlabelled cases, or remove the key to use all of imagesUn")
    unknown = sorted(set(names) - set(available))
    if unknown:
        raise InputError(
            f"{where} names cases that are not in imagesUn: {listed(unknown)}. Add their images or remove the names"
        )
    return sorted(set(names))


def read_folds(file: Path, identifiers: list[str], fold: int | None = None) -> list[dict[str, list[str]]]:
    """The folds of a ``splits_final.json``, checked: "train" and "val" name labelled cases.

    Args:
        file: to read.
        identifiers: the labelled cases.
        fold: check this one alone; None: all.
    """
    folds = _read_splits(file)
    known = set(identifiers)
    for number, content in enumerate(folds):
        if fold not in (None, number):
            continue
        for key in ("train", "val"):
            names = content.get(key)
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise InputError(f'{file}: fold {number} must have "{key}", a list of case names: repair or remove it')
            if unknown := sorted(set(names) - known):
                raise InputError(
                    f'{file}: "{key}" of fold {number} names cases that are not there: {listed(unknown)}. Correct the '
                    f"names, or preprocess those cases"
                )
    return folds


def check_fold(preprocessed_dataset_folder: Path, fold: int | str, identifiers: list[str]) -> None:
    """Raise an InputError if ``splits_final.json`` names cases for ``fold`` that are not preprocessed.

    Args:
        preprocessed_dataset_folder: ``nnUNet_preprocessed/DatasetXXX_Name``.
        fold: number of the fold, or "all".
        identifiers: the labelled cases.
    """
    file = _splits_file(preprocessed_dataset_folder)
    if fold != "all" and file.exists():
        read_folds(file, identifiers, int(fold))


def _splits_file(preprocessed_dataset_folder: Path) -> Path:
    return Path(preprocessed_dataset_folder) / "splits_final.json"


def _read_splits(file: Path) -> list[dict]:
    splits = read_json(file, "repair it, or remove it to get new folds")
    if not isinstance(splits, list) or not all(isinstance(split, dict) for split in splits):
        raise InputError(f'{file} must be a list of folds, each with "train" and "val": repair or remove it')
    return splits
