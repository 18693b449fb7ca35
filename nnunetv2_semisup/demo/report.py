"""What the demo ends with: a table of test Dice, and predictions as contours on the images."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunetv2_semisup.colours import COLOURS
from nnunetv2_semisup.files import read_object, write_csv

SHOWN_CASES = 3
WIDTH = 3.0  # inches of an image

Dice = dict[str, dict[str, float]]  # model -> case -> mean over labels


def read_dice(models: dict[str, Path]) -> Dice:
    """The Dice of every case, mean over the labels that it has; NaN where it has none and none is predicted.

    Args:
        models: name -> folder with the ``cases.csv`` of ``nnUNetv2_semisup_evaluate``.
    """
    dice: Dice = {}
    for name, folder in models.items():
        values: dict[str, list[float]] = {}
        with open(folder / "cases.csv", encoding="utf-8", newline="") as f:
            for row in csv.DictReader(f):
                values.setdefault(row["case"], []).append(float(row["dice"]))
        dice[name] = {case: _mean([v for v in of_case if v == v]) for case, of_case in values.items()}
    return dice


def write_table(file: Path, dice: Dice) -> str:
    """Write the Dice of every case, and return a table of mean, sd over cases and minimum.

    Args:
        file: CSV, a column per model.
        dice: of two models on the same cases, the baseline first.
    """
    baseline, ours = dice
    cases = sorted(dice[baseline])
    write_csv(file, ("case", *dice), ({"case": case, **{n: f"{dice[n][case]:.4f}" for n in dice}} for case in cases))
    known = [case for case in cases if not any(np.isnan(dice[name][case]) for name in dice)]
    lines = [f"{'test Dice, last checkpoint':40}{'mean':>8}{'sd':>8}{'min':>8}"]
    for name in dice:
        values = np.array([dice[name][case] for case in known])
        sd = f"{values.std(ddof=1):8.3f}" if len(values) > 1 else f"{'-':>8}"
        lines.append(f"{name:40}{values.mean():8.3f}{sd}{values.min():8.3f}")
    gains = np.array([dice[ours][case] - dice[baseline][case] for case in known])
    better = f"{int((gains > 0).sum())} of {len(known)} cases better"
    lines.append(f"difference {gains.mean():+.3f}, {better} (one run each: no measure of chance)")
    return "\n".join(lines)


def draw_overlay(file: Path, raw: Path, models: dict[str, Path], dice: Dice) -> None:
    """Image, truth and each prediction as contours, on the axial slice of most foreground, for the first test cases.

    Args:
        file: PNG.
        raw: the data set; images are turned so that the front of the body is at the top, as their headers say.
        models: name -> folder of predictions.
        dice: stands above them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    content = read_object(raw / "dataset.json", "make it again", "labels")
    labels = {value: name for name, value in content["labels"].items()}
    colours = {value: (COLOURS[4], COLOURS[5], *COLOURS[1:4])[i % 5] for i, value in enumerate(sorted(labels)[1:])}
    cases = sorted(f.name.removesuffix(".nii.gz") for f in (raw / "labelsTs").iterdir())[:SHOWN_CASES]
    shown = []
    for case in cases:
        image, (height, width) = _read(raw / "imagesTs" / f"{case}_0000.nii.gz")
        masks = {"truth": _read(raw / "labelsTs" / f"{case}.nii.gz")[0]}
        masks |= {name: _read(folder / f"{case}.nii.gz")[0] for name, folder in models.items()}
        z = int((masks["truth"] > 0).sum((1, 2)).argmax())
        aspect = height / width
        edges = image.shape[1] * height, image.shape[2] * width
        shown.append((case, image[z], {name: mask[z] for name, mask in masks.items()}, aspect, edges[0] / edges[1]))
    columns = 2 + len(models)
    heights = [WIDTH * relative + 0.45 for *_, relative in shown]
    figure = Figure(figsize=(WIDTH * columns, sum(heights) + 0.4), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(cases), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, (case, image, masks, aspect, _) in zip(grid, shown, strict=True):
        low, high = np.percentile(image, (1, 99))
        for axes, name in zip(row, (case, *masks), strict=True):
            axes.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=aspect)
            axes.autoscale(False)  # contours shall not change what is shown
            axes.set_axis_off()
            below = f"Dice {dice[name][case]:.3f}" if name in dice else ""  # two lines always: images of one size
            axes.set_title(f"{name}\n{below}", fontsize="small")
        for axes, mask in zip(row[1:], masks.values(), strict=True):
            for value, colour in colours.items():
                if (mask == value).any():
                    padded = np.pad(mask == value, 1).astype(float)  # so that a contour at the edge is closed
                    places = [np.arange(-1, size + 1) for size in mask.shape[::-1]]
                    axes.contour(*places, padded, [0.5], colors=colour, linewidths=1.5)
    handles = [Line2D([], [], color=colour, label=labels[value]) for value, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(file)


def _read(file: Path) -> tuple[np.ndarray, tuple[float, float]]:
    """Voxels (z, y, x) with patient axes left, posterior, superior, and the size of a pixel along y and x in mm."""
    image = sitk.DICOMOrient(sitk.ReadImage(str(file)), "LPS")
    return sitk.GetArrayFromImage(image), image.GetSpacing()[1::-1]


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
