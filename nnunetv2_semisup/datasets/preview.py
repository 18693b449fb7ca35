"""Pictures that show a fault of orientation: three planes of a case, patient axes named, the label as contour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nnunetv2_semisup.files import whole_file

COLOURS = ("#ff3b30", "#34c759", "#0a84ff", "#ffd60a", "#ff2d95", "#64d2ff")
# Of an array (z, y, x) of an image with axes to the left, posterior, superior: axis that the plane lies across, whether
# its rows run downwards in the picture, and what is at the left, right, top and bottom edge.
PLANES = {
    "axial": (0, True, "RLAP"),
    "coronal": (1, False, "RLSI"),
    "sagittal": (2, False, "APSI"),
}


def save_preview(image: sitk.Image, label: sitk.Image | None, path: Path, title: str) -> None:
    """Write a PNG, whole or not at all.

    3D images are turned to patient axes, as their header says, and cut through the middle of the largest labelled
    slice, or through the middle of the image. So in a right case the front of the body is at the top of the axial
    plane, the head at the top of the other two. A photograph is shown as it is.

    Args:
        image: 3D scalar, or 2D scalar or RGB.
        label: same grid, or None.
        path: PNG file to write.
        title: shown above.
    """
    planes = [("", *_arrays(image, label), 1.0, "")] if image.GetDimension() == 2 else _planes(image, label)
    figure = Figure(figsize=(3.6 * len(planes), 4), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9)
    for axes, (name, grey, mask, aspect, edges) in zip(
        figure.subplots(1, len(planes), squeeze=False)[0], planes, strict=True
    ):
        low, high = np.percentile(grey, (1, 99))
        axes.imshow(grey, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=aspect, interpolation="nearest")
        for value in range(1, int(mask.max(initial=0)) + 1):
            if (mask == value).any():
                padded = np.pad(mask == value, 1).astype(float)
                grid = [np.arange(-1, size + 1) for size in mask.shape[::-1]]
                axes.contour(*grid, padded, [0.5], colors=COLOURS[(value - 1) % len(COLOURS)], linewidths=1)
        for letter, place in zip(edges, ((0.02, 0.5), (0.94, 0.5), (0.48, 0.94), (0.48, 0.02)), strict=False):
            axes.text(*place, letter, transform=axes.transAxes, color="yellow", fontsize=11, weight="bold")
        axes.set_title(name, fontsize=8)
        axes.set_axis_off()
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png")


def _planes(image: sitk.Image, label: sitk.Image | None) -> list[tuple]:
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
        planes.append((name, plane, contour, rows / columns, edges))
    return planes


def _arrays(image: sitk.Image, label: sitk.Image | None) -> tuple[np.ndarray, np.ndarray]:
    array = sitk.GetArrayFromImage(image)
    shape = array.shape[: image.GetDimension()]
    return array, np.zeros(shape, np.uint8) if label is None else sitk.GetArrayFromImage(label)
