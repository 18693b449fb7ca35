"""One picture of kept and dropped pseudo-labels: a slice of each case with the label's outline, and its u."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nnunetv2_semisup.datasets.preview import COLOURS
from nnunetv2_semisup.files import whole_file

COLUMNS = 6
MOST = 12  # of kept cases, and of dropped ones


@dataclass(frozen=True)
class Picture:
    """A case of the sheet: image files, label (Z, Y, X) with the ignore label, u or None, and whether it was kept."""

    case: str
    images: list[str]
    label: np.ndarray
    u: float | None
    kept: bool


def draw_sheet(file: Path, pictures: list[Picture], reader, ignore: int | None) -> None:
    """Write a PNG: kept cases, the least sure first, then dropped ones; at most ``MOST`` of each.

    Args:
        file: to write.
        pictures: all cases.
        reader: nnU-Net's, for the images.
        ignore: the label that is drawn dotted in white.
    """
    ranked = sorted(pictures, key=lambda p: (-(p.u or 0), p.case))
    groups = [[p for p in ranked if p.kept is kept][:MOST] for kept in (True, False)]
    rows = [group[i : i + COLUMNS] for group in groups for i in range(0, len(group), COLUMNS)]
    figure = Figure(figsize=(2.4 * COLUMNS, 2.7 * len(rows)), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    number = {kept: sum(p.kept is kept for p in pictures) for kept in (True, False)}
    figure.suptitle(f"{number[True]} cases kept, {number[False]} dropped; the largest disagreement u first", fontsize=9)
    for row, axes in zip(rows, figure.subplots(len(rows), COLUMNS, squeeze=False), strict=True):
        for axis in axes:
            axis.set_axis_off()
        for picture, axis in zip(row, axes, strict=False):
            _draw(axis, picture, reader, ignore)
    with whole_file(file) as temporary:
        figure.savefig(temporary, format="png")


def _draw(axis, picture: Picture, reader, ignore: int | None) -> None:
    labelled = picture.label > 0
    z = int(labelled.sum((1, 2)).argmax()) if labelled.any() else len(labelled) // 2
    grey, label = reader.read_images(picture.images)[0][0, z], picture.label[z]
    low, high = np.percentile(grey, (1, 99))
    axis.imshow(grey, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), interpolation="nearest")
    for value in np.unique(label[label > 0]):
        padded = np.pad(label == value, 1).astype(float)
        grid = [np.arange(-1, size + 1) for size in label.shape[::-1]]
        colour, style = ("white", "dotted") if value == ignore else (COLOURS[(int(value) - 1) % len(COLOURS)], "solid")
        axis.contour(*grid, padded, [0.5], colors=colour, linewidths=1, linestyles=style)
    u = "" if picture.u is None else f", u = {picture.u:.3f}"
    axis.set_title(f"{picture.case}{u}, {'kept' if picture.kept else 'dropped'}", fontsize=7)
