"""Our metrics beside MedPy's: the table of docs/evaluation.md, and the time both take.

    python -m tools.against_medpy

MedPy is needed for this comparison only: pip install medpy.
"""

from __future__ import annotations

from collections.abc import Callable
from time import process_time

import numpy as np

from nnunetv2_semisup.boxes import bounding_box
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.evaluation.metrics import METRICS, compare_masks

Pair = tuple[np.ndarray, np.ndarray, tuple[float, ...]]  # prediction, reference, spacing in mm

SPEED_SHAPE = (176, 144, 88)
SPEED_SPACING = (0.625, 0.625, 1.25)


def medpy_metrics(prediction: np.ndarray, reference: np.ndarray, spacing_mm: tuple[float, ...]) -> dict[str, float]:
    """``METRICS`` by MedPy's functions; RuntimeError where a mask is empty, as MedPy raises it."""
    try:
        from medpy.metric import binary
    except ModuleNotFoundError as error:
        raise InputError("MedPy is not installed, and this is a comparison with it: pip install medpy") from error
    return {
        "dice": binary.dc(prediction, reference),
        "jaccard": binary.jc(prediction, reference),
        "hd95_voxel": binary.hd95(prediction, reference),
        "asd_voxel": binary.asd(prediction, reference),
        "hd95_mm": binary.hd95(prediction, reference, spacing_mm),
        "assd_mm": binary.assd(prediction, reference, spacing_mm),
    }


def example_pairs() -> dict[str, Pair]:
    """The masks of the table, 40 x 40 x 40, drawn by formula."""
    ball, nothing = _ball(10), np.zeros((40, 40, 40), bool)
    box = nothing.copy()
    box[:, 10:30, :15] = True
    return {
        "ball, radius 10, shifted by 3": (_ball(10, (3, 0, 0)), ball, (1.0, 1.0, 1.0)),
        "the same in thick slices": (_ball(10, (3, 0, 0)), ball, (10.0, 1.5, 1.5)),
        "radius 8 in radius 10": (_ball(8), ball, (0.625, 0.625, 1.25)),
        "radius 10 around radius 8": (ball, _ball(8), (0.625, 0.625, 1.25)),
        "one of two balls missed": (_ball(6, (-10, 0, 0)), _ball(6, (-10, 0, 0)) | _ball(6, (10, 0, 0)), (1, 1, 1)),
        "ball and a stray one, radius 2": (ball | _ball(2, (15, 15, 15)), ball, (1.0, 1.0, 1.0)),
        "at the border, half a box": (box & _ball(99, (0, -101, 0)), box, (1.0, 2.0, 0.5)),
        "empty prediction": (nothing, ball, (1.0, 1.0, 1.0)),
        "empty reference": (ball, nothing, (1.0, 1.0, 1.0)),
    }


def table() -> str:
    """Markdown: MedPy's numbers and ours for every pair of :func:`example_pairs`."""
    lines = ["| masks | spacing (mm) | by | " + " | ".join(f"`{m}`" for m in METRICS) + " |"]
    lines.append("|" + "---|" * (len(METRICS) + 3))
    for name, pair in example_pairs().items():
        spacing = " x ".join(f"{s:g}" for s in pair[2])
        for by, function in (("MedPy", _medpy_or_error), ("ours", compare_masks)):
            values = function(*pair)
            cells = [f"{values[m]:.4f}" if m in values else "error" for m in METRICS]
            lines.append(f"| {name} | {spacing} | {by} | " + " | ".join(cells) + " |")
            name = spacing = ""
    return "\n".join(lines)


def speed(repeats: int = 3) -> str:
    """CPU time of MedPy and of ours for the same six numbers, best of ``repeats`` in this process, and the ratio."""
    lines = []
    # the boxes around left atria of the LA data set measure about 155 x 85 x 57 voxels
    for name, radii in (("as a left atrium", (0.42, 0.29, 0.31)), ("as large as the image", (0.5, 0.5, 0.5))):
        pair = (_blob(radii, 0.0), _blob(radii, 0.7), SPEED_SPACING)
        expected, slow = _timed(medpy_metrics, pair, repeats)
        found, fast = _timed(compare_masks, pair, repeats)
        for metric in METRICS:
            if abs(found[metric] - expected[metric]) > 1e-6:
                raise AssertionError(f"{metric}: MedPy has {expected[metric]}, we have {found[metric]}")
        box = " x ".join(str(s.stop - s.start) for s in bounding_box(pair[0] | pair[1]))
        lines.append(f"{name} (box {box}): MedPy {slow:.3f} s, ours {fast:.3f} s, ratio {slow / fast:.1f}")
    return f"{' x '.join(map(str, SPEED_SHAPE))}, spacing {SPEED_SPACING} mm, CPU time\n" + "\n".join(lines)


def _medpy_or_error(*pair) -> dict[str, float]:
    """MedPy's numbers; without those for which it raises an error."""
    from medpy.metric import binary

    try:
        return medpy_metrics(*pair)
    except RuntimeError:
        return {"dice": binary.dc(*pair[:2]), "jaccard": binary.jc(*pair[:2])}


def _timed(function: Callable, pair: Pair, repeats: int) -> tuple[dict[str, float], float]:
    times = []
    for _ in range(repeats):
        start = process_time()
        values = function(*pair)
        times.append(process_time() - start)
    return values, min(times)


def _ball(radius: float, shift: tuple[float, float, float] = (0, 0, 0), size: int = 40) -> np.ndarray:
    axes = np.ogrid[:size, :size, :size]
    return sum((a - size // 2 - s) ** 2 for a, s in zip(axes, shift, strict=True)) <= radius**2


def _blob(radii: tuple[float, float, float], phase: float) -> np.ndarray:
    """An ellipsoid with a wavy surface in a volume of ``SPEED_SHAPE``; ``radii`` are shares of its axes."""
    grid = np.ogrid[tuple(slice(n) for n in SPEED_SHAPE)]
    x, y, z = ((a / n - 0.5) / r for a, n, r in zip(grid, SPEED_SHAPE, radii, strict=True))
    waves = np.sin(10 * x + phase) + np.sin(9 * y + 2 * phase) + np.sin(7 * z + 3 * phase)
    return x**2 + y**2 + z**2 < (1 + 0.03 * waves) ** 2


if __name__ == "__main__":
    print(table(), speed(), sep="\n\n")
