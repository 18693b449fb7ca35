"""Pictures that show a fault of orientation: three planes of a case, patient axes named, the label as contour."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import SimpleITK as sitk
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from nnunetv2_semisup.files import whole_file

COLOURS = ("#ff3b30", "#34c759", "#0a84ff", "#ffd60a", "#ff2d95", "#64d2ff")
Style = Literal["solid", "dashed", "dotted"]
STYLES: tuple[Style, ...] = ("solid", "dashed", "dotted")  # with more classes than colours
MOST_IN_LEGEND = 16
# Of an array (z, y, x) of an image with axes to the left, posterior, superior: axis that the plane lies across, whether
# its rows run downwards in the picture, and what is at the left, right, top and bottom edge.
PLANES = {
    "axial": (0, True, "RLAP"),
    "coronal": (1, False, "RLSI"),
    "sagittal": (2, False, "APSI"),
}


class Plane(NamedTuple):
    """A slice: what is above it, image (Y, X) or (Y, X, RGB), label (Y, X), mm of a row over mm of a column, and the
    letters at the left, right, top and bottom edge."""

    name: str
    grey: np.ndarray
    mask: np.ndarray
    aspect: float
    edges: str


def save_preview(
    image: sitk.Image,
    label: sitk.Image | None,
    path: Path,
    title: str,
    classes: Mapping[str, int] | None = None,
) -> None:
    """Write a PNG, whole or not at all.

    3D images are turned to patient axes, as their header says, and cut through the middle of the largest labelled
    slice, or through the middle of the image. So in a right case the front of the body is at the top of the axial
    plane, the head at the top of the other two. A photograph is shown as it is.

    Args:
        image: 3D scalar, or 2D scalar or RGB.
        label: same grid, or None.
        path: PNG file to write.
        title: shown above, with size and spacing of the image.
        classes: class name -> value in the label, for the legend; a value without name stands there as a number.
    """
    planes = [Plane("", *_arrays(image, label), 1.0, "")] if image.GetDimension() == 2 else _planes(image, label)
    figure = Figure(figsize=(3.6 * len(planes), 4.4), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}\n{_grid(image)}", fontsize=9)
    shown: set[int] = set()
    for axes, plane in zip(figure.subplots(1, len(planes), squeeze=False)[0], planes, strict=True):
        grey, mask = plane.grey, plane.mask
        low, high = np.percentile(grey, (1, 99))
        window = {"vmin": low, "vmax": max(high, low + 1e-6)}
        axes.imshow(grey, cmap="gray", **window, aspect=plane.aspect, interpolation="nearest")
        for value in (int(v) for v in np.unique(mask) if v > 0):
            padded = np.pad(mask == value, 1).astype(float)
            grid = [np.arange(-1, size + 1) for size in mask.shape[::-1]]
            colour, style = _line(value)
            axes.contour(*grid, padded, [0.5], colors=colour, linestyles=style, linewidths=1)
            shown.add(value)
        for letter, place in zip(plane.edges, ((0.05, 0.5), (0.95, 0.5), (0.5, 0.94), (0.5, 0.06)), strict=False):
            text = axes.text(*place, letter, transform=axes.transAxes, ha="center", va="center", color="yellow")
            text.set(fontsize=11, weight="bold", path_effects=[withStroke(linewidth=3, foreground="black")])
        axes.set_title(plane.name, fontsize=8)
        axes.set_axis_off()
    names = {value: name for name, value in (classes or {}).items()}
    lines = {names.get(value, str(value)): _line(value) for value in sorted(shown)[:MOST_IN_LEGEND]}
    handles = [Line2D([], [], color=colour, linestyle=style, label=name) for name, (colour, style) in lines.items()]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=2 * len(planes), fontsize=8)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png")


def _line(value: int) -> tuple[str, Style]:
    """Colour and style of a class's outline."""
    again, colour = divmod(value - 1, len(COLOURS))
    return COLOURS[colour], STYLES[again % len(STYLES)]


def _grid(image: sitk.Image) -> str:
    """Size and spacing as the file has them, axes x, y, z; of a photograph, which has none, no spacing."""
    size, spacing = (" x ".join(f"{n:.4g}" for n in numbers) for numbers in (image.GetSize(), image.GetSpacing()))
    if image.GetDimension() == 2:
        return f"{size} pixels" + ("" if set(image.GetSpacing()) == {1.0} else f", {spacing} mm")
    return f"{size} voxels, {spacing} mm (x, y, z)"


def _planes(image: sitk.Image, label: sitk.Image | None) -> list[Plane]:
    image = sitk.DICOMOrient(image, "LPS")
    label = None if label is None else sitk.DICOMOrient(label, "LPS")
    grey, mask = _arrays(image, label)
    spacing = image.GetSpacing()[::-1]
    planes = []
    for name, (axis, downwards, edges) in PLANES.items():
        others = tuple(other for other in range(3) if other != axis)
        sizes = (mask > 0).sum(axis=others)
        index = int(sizes.argmax()) if sizes.any() else grey.shape[axis] // 2
        rows, columns = (spacing[other] for other in others)
        plane, contour = grey.take(index, axis), mask.take(index, axis)
        if not downwards:
            plane, contour = plane[::-1], contour[::-1]
        above = f"{name}, slice {index + 1} of {grey.shape[axis]}"
        planes.append(Plane(above, plane, contour, rows / columns, edges))
    return planes


def _arrays(image: sitk.Image, label: sitk.Image | None) -> tuple[np.ndarray, np.ndarray]:
    array = sitk.GetArrayFromImage(image)
    shape = array.shape[: image.GetDimension()]
    return array, np.zeros(shape, np.uint8) if label is None else sitk.GetArrayFromImage(label)
