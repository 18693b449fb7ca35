"""Evaluations of the same cases side by side: what each gains over the first one, case by case.

Read from the ``cases.csv`` files that :func:`folder.evaluate_folder` wrote; nothing is measured again, and nothing
slow is imported.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.evaluation.statistics import bootstrap_interval
from nnunetv2_semisup.evaluation.summary import (
    FAILURE,
    POSTPROCESSING,
    aligned,
    cases_text,
    describe,
    is_failure,
    mean_and_sd,
)
from nnunetv2_semisup.files import listed

NEEDED = ("case", "label", "postprocessing", "dice", "voxels_prediction", "voxels_reference")
AGAIN = "evaluate again with nnUNetv2_semisup_evaluate ... -o"
SAME = "evaluate both with the same -ref and -djfile"

Rows = dict[tuple[str, str], dict]  # (case, label) -> row of cases.csv, with numbers


def compare_folders(folders: Sequence[str]) -> str:
    """A table per post-processing that all folders have: Dice, and the difference to the first folder.

    A mask that is rightly empty in one folder and not in another counts as a Dice of 1 where it is empty.

    Args:
        folders: at least two outputs of :func:`folder.evaluate_folder`, the baseline first. Named in the table as here.

    Raises:
        InputError: missing or damaged files, other cases, labels or references than the baseline's.
    """
    if len(folders) < 2:
        raise InputError(f"--compare {' '.join(folders)}: name at least two folders, the baseline first")
    evaluations = [read_cases(Path(folder)) for folder in folders]
    for folder, parts in zip(folders[1:], evaluations[1:], strict=True):
        _require_same(folders[0], evaluations[0]["none"], folder, parts["none"])
    names = list(dict.fromkeys(name for parts in evaluations for name in parts))
    common = [name for name in names if all(name in parts for parts in evaluations)]
    texts = [_table(name, folders, [parts[name] for parts in evaluations]) for name in common]
    for name in names:
        if lacking := [folder for folder, parts in zip(folders, evaluations, strict=True) if name not in parts]:
            texts.append(f"no table for {name}: {listed(lacking)} was evaluated without --{name}")
    notes = [
        f"difference: to {folders[0]} in Dice points, case by case; better: cases with more Dice than there",
        "interval: how far the mean difference depends on the cases; another training may change it by more",
        FAILURE,
    ]
    return "\n\n".join([*texts, "\n".join(notes)])


def read_cases(folder: Path) -> dict[str, Rows]:
    """Post-processing -> rows of ``cases.csv``, as many labels for each case; ``none`` is always there.

    Raises:
        InputError: the file is missing, has not the columns, or something else than numbers.
    """
    file = folder / "cases.csv"
    if not file.is_file():
        raise InputError(f"{folder} has no cases.csv: name a folder that nnUNetv2_semisup_evaluate -o wrote")
    parts: dict[str, Rows] = {}
    try:
        with open(file, encoding="utf-8", newline="") as f:
            reader = csv.DictReader(f)
            if missing := [column for column in NEEDED if column not in (reader.fieldnames or ())]:
                raise InputError(f"{file} has no column {listed(missing)}: {AGAIN} {folder}")
            for row in reader:
                rows = parts.setdefault(row["postprocessing"], {})
                if (row["case"], row["label"]) in rows:
                    raise InputError(f"{file} has case {row['case']}, label {row['label']} twice: {AGAIN} {folder}")
                rows[row["case"], row["label"]] = _numbers(file, folder, row)
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{file} is no CSV file ({error}): {AGAIN} {folder}") from error
    if unknown := [name for name in parts if name not in POSTPROCESSING]:
        raise InputError(f"{file} has an unknown postprocessing {unknown[0]!r}: {AGAIN} {folder}")
    if "none" not in parts:
        raise InputError(f"{file} has no rows with postprocessing none: {AGAIN} {folder}")
    for name, rows in parts.items():
        for case, label in ((c, x) for c in _cases(parts["none"]) for x in _labels(parts["none"])):
            if (case, label) not in rows:
                raise InputError(
                    f"{file} has no row of case {case}, label {label}, postprocessing {name}: {AGAIN} {folder}"
                )
    return parts


def _numbers(file: Path, folder: Path, row: dict) -> dict:
    try:
        dice = float(row["dice"])
        voxels = {key: int(row[key]) for key in ("voxels_prediction", "voxels_reference")}
    except (TypeError, ValueError):
        dice, voxels = math.inf, {}
    if not (math.isnan(dice) or 0 <= dice <= 1):
        raise InputError(
            f"{file} is damaged at case {row['case']}, label {row['label']}: dice is a number of 0 to 1 or nan, and "
            f"voxels are counts: {AGAIN} {folder}"
        )
    return {"dice": dice, **voxels}


def _cases(rows: Rows) -> list[str]:
    return list(dict.fromkeys(case for case, _ in rows))


def _labels(rows: Rows) -> list[str]:
    return list(dict.fromkeys(label for _, label in rows))


def _require_same(baseline: str, expected: Rows, folder: str, rows: Rows) -> None:
    """Raise an InputError unless cases, labels and the references' voxels are the same."""
    for kind, names in (("case", _cases), ("label", _labels)):
        of_baseline, here = names(expected), names(rows)
        for lacks, has, missing in (
            (folder, baseline, [name for name in of_baseline if name not in here]),
            (baseline, folder, [name for name in here if name not in of_baseline]),
        ):
            if missing:
                raise InputError(f"{lacks} has no {kind} {listed(missing)}, but {has} has: {SAME}")
    for (case, label), row in expected.items():
        voxels, other = row["voxels_reference"], rows[case, label]["voxels_reference"]
        if voxels != other:
            raise InputError(
                f"{folder} had another reference than {baseline}: case {case}, label {label} has {other:,} voxels "
                f"there, and {voxels:,} here: {SAME}"
            )


def _table(postprocessing: str, folders: Sequence[str], evaluations: list[Rows]) -> str:
    cases, labels = _cases(evaluations[0]), _labels(evaluations[0])
    dice = np.array([[[rows[c, x]["dice"] for x in labels] for c in cases] for rows in evaluations])
    failed = np.array([[[is_failure(rows[c, x]) for x in labels] for c in cases] for rows in evaluations])
    rightly_empty = np.isnan(dice) & ~np.isnan(dice).all(axis=0)
    dice[rightly_empty] = 1.0
    lines = [["", "Dice %", "difference [95 % interval]", "better", "failures"]]
    if len(labels) == 1:
        lines += _lines(folders, dice[..., 0], failed[..., 0])
    else:
        lines += [[f"mean over {len(labels)} labels", *[""] * 4]]
        lines += _lines([f"  {folder}" for folder in folders], _mean_over_labels(dice), failed)
        for i, label in enumerate(labels):
            lines += [[label, *[""] * 4]]
            lines += _lines([f"  {folder}" for folder in folders], dice[..., i], failed[..., i])
    texts = [
        f"{cases_text(len(cases))}, {POSTPROCESSING[postprocessing]}; mean ± sd over cases",
        *aligned(lines),
    ]
    if rightly_empty.any():
        texts.append(
            f"{rightly_empty.sum()} predictions are rightly empty where another folder's is not: Dice 1 in this table"
        )
    return "\n".join(texts)


def _mean_over_labels(dice: np.ndarray) -> np.ndarray:
    """(folders, cases, labels) to (folders, cases): the mean over the labels that a case has, NaN if it has none."""
    known = ~np.isnan(dice)
    number = known.sum(axis=-1)
    return np.where(number > 0, np.where(known, dice, 0).sum(axis=-1) / np.maximum(number, 1), math.nan)


def _lines(names: Sequence[str], dice: np.ndarray, failed: np.ndarray) -> list[list[str]]:
    """A row of cells per folder; dice (folders, cases) has NaN in the same cases for all; failed (folders, ...)."""
    lines = []
    for i, (name, values) in enumerate(zip(names, dice, strict=True)):
        gains = (values - dice[0])[~np.isnan(values)]
        compared = [_difference(gains), f"{(gains > 0).sum()} of {len(gains)}"] if i and len(gains) else ["", ""]
        failures = int(failed[i].sum())
        lines.append([name, mean_and_sd(describe(values.tolist(), failures), True), *compared, str(failures)])
    return lines


def _difference(gains: np.ndarray) -> str:
    """``+1.2 [0.3, 2.1]`` in points, without brackets for one case."""
    low, high = bootstrap_interval(gains)
    interval = "" if math.isnan(low) else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{100 * gains.mean():+.1f}{interval}"
