"""Statistics of the rows of :func:`folder.evaluate_folder`, and the printed table."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from nnunetv2_semisup.evaluation.metrics import METRICS

COLUMNS = ("case", "label", "postprocessing", *METRICS, "voxels_prediction", "voxels_reference")  # of cases.csv
POSTPROCESSING = {"none": "predictions as they are", "largest_component": "largest component of each predicted label"}
HEADS = {  # of the printed table
    "dice": "Dice %",
    "jaccard": "Jaccard %",
    "hd95_voxel": "95HD voxel",
    "asd_voxel": "ASD voxel",
    "hd95_mm": "95HD mm",
    "assd_mm": "ASSD mm",
}
FAILURE = "failure: only one of prediction and reference has the label; Dice 0"


def summarize(rows: list[dict]) -> dict:
    """Statistics of the rows of :func:`evaluate_folder`.

    Returns:
        ``{postprocessing: {"cases": number, "labels": {label: {metric: statistics}}, "over_labels": {metric:
        statistics}}}`` with the statistics ``mean``, ``sd`` (n - 1), ``median``, ``n``, the number of values behind
        them, and ``failures``, the number of masks of which exactly one of prediction and reference is empty. Failures
        are 0 in ``dice`` and ``jaccard`` and are left out of the distances. ``over_labels`` has the mean of the labels'
        means, as published tables do, and sd and median over the cases' own means over labels. NaN where there is no
        value.
    """
    summary = {}
    for name in dict.fromkeys(row["postprocessing"] for row in rows):
        chosen = [row for row in rows if row["postprocessing"] == name]
        labels = list(dict.fromkeys(row["label"] for row in chosen))
        per_label = {label: _statistics([row for row in chosen if row["label"] == label]) for label in labels}
        summary[name] = {
            "cases": len({row["case"] for row in chosen}),
            "labels": per_label,
            "over_labels": _over_labels(chosen, per_label),
        }
    return summary


def table(summary: dict) -> str:
    """The summary as text: a line per label, mean ± sd of every metric, the failures.

    Dice and Jaccard are in %, the unit of a distance is in its column's head. The columns are always the same; ``-``
    stands where there is no value, and for the mean over labels of which one has no distance. Labels' names of at most
    12 characters make at most 100 columns of text. Median and number of values are in summary.json.
    """
    return "\n\n".join(_table_of(name, part) for name, part in summary.items())


def _table_of(postprocessing: str, part: dict) -> str:
    labels, means = part["labels"], dict(part["over_labels"])
    measured, in_mm = means["hd95_voxel"]["n"], means["hd95_mm"]["n"]
    without = [name for name, group in labels.items() if group["dice"]["n"] and not group["hd95_voxel"]["n"]]
    if without:
        means |= {metric: {**means[metric], "n": 0} for metric in METRICS if metric not in ("dice", "jaccard")}
    lines = [["label", *HEADS.values(), "failures"]]
    for name, group in {**labels, "(mean)": means}.items() if len(labels) > 1 else labels.items():
        values = [mean_and_sd(group[metric], "%" in head) for metric, head in HEADS.items()]
        lines.append([name, *values, str(group["dice"]["failures"])])
    texts = [f"{cases_text(part['cases'])}, {POSTPROCESSING[postprocessing]}; mean ± sd over cases", *aligned(lines)]
    for name, group in labels.items():
        if (n := group["dice"]["n"]) < part["cases"]:
            texts.append(f"{name}: {n} cases, in the others neither prediction nor reference has it")
    if any(group["dice"]["failures"] for group in labels.values()):
        texts.append(f"{FAILURE}, left out of the distances")
    if without and measured:
        texts.append(f"(mean): no distances, since these labels have none: {', '.join(without)}")
    if measured and not in_mm:
        texts.append("mm: unknown, these files have no voxel size")
    return "\n".join(texts)


def cases_text(number: int) -> str:
    """``1 case``, ``20 cases``."""
    return f"{number} case{'s' if number != 1 else ''}"


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """A line of text per line of cells, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = []
    for line in lines:
        cells = (f"{cell:{'>' if i else '<'}{width}}" for i, (cell, width) in enumerate(zip(line, widths, strict=True)))
        texts.append("  ".join(cells).rstrip())
    return texts


def mean_and_sd(values: dict, percent: bool) -> str:
    """``83.1 ± 5.3`` from :func:`describe`, 11 characters at most for Dice and Jaccard, and distances below 10,000."""
    if not values["n"]:
        return "-"
    known = [(100 if percent else 1) * value for value in (values["mean"], values["sd"]) if not math.isnan(value)]
    digits = 1 if percent else max(0, 2 - len(f"{max(known):.0f}") + 1)
    texts = [f"{value:.{digits}f}" for value in known]
    return " ± ".join([*texts, "-"][:2])


# ----------------------------------------------------------------------------------------------------------- statistics


def is_failure(row: dict) -> bool:
    """Whether exactly one of prediction and reference is empty in this row."""
    return (row["voxels_prediction"] == 0) != (row["voxels_reference"] == 0)


def _statistics(rows: list[dict]) -> dict:
    failures = sum(is_failure(row) for row in rows)
    return {metric: describe([row[metric] for row in rows], failures) for metric in METRICS}


def _over_labels(rows: list[dict], per_label: dict) -> dict:
    statistics = {}
    for metric in METRICS:
        by_case: dict[str, list[float]] = {}
        for row in rows:
            by_case.setdefault(row["case"], []).append(row[metric])
        failures = sum(label[metric]["failures"] for label in per_label.values())
        statistics[metric] = describe([_mean(values) for values in by_case.values()], failures)
        statistics[metric]["mean"] = _mean([label[metric]["mean"] for label in per_label.values()])
    return statistics


def describe(values: Sequence[float], failures: int) -> dict:
    """The statistics of :func:`summarize`; NaN among the values is left out."""
    known = [value for value in values if not math.isnan(value)]
    return {
        "mean": _mean(known),
        "sd": float(np.std(known, ddof=1)) if len(known) > 1 else math.nan,
        "median": float(np.median(known)) if known else math.nan,
        "n": len(known),
        "failures": failures,
    }


def _mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan
