"""How long our signed distance maps take beside the plain way, two distance transforms of the whole patch.

python -m tools.sdm_speed
"""

from __future__ import annotations

from statistics import median
from time import process_time

import numpy as np
from scipy import ndimage

from nnunetv2_semisup.data.sdm import signed_distance_map

PATCH = (112, 112, 80)
SPACINGS_MM = ((0.625, 0.625, 0.625), (1.25, 0.625, 0.625))
REPEATS = 15


def atrium_like(shape: tuple[int, ...] = PATCH) -> np.ndarray:
    """An ellipsoid with four veins that reach the patch's edge: 19% of the voxels, bounding box 112 x 89 x 57.

    In such patches around the 90 atria at hand of the LA data the medians are 19% and 112 x 91 x 58.
    """
    x, y, z = (grid - length / 2 for grid, length in zip(np.ogrid[tuple(map(slice, shape))], shape, strict=True))
    mask = (x / 30) ** 2 + (y / 45) ** 2 + (z / 29) ** 2 < 1
    for side in (-1, 1):
        for height in (-14, 14):
            mask |= (y - side * 0.5 * abs(x)) ** 2 + (z - height) ** 2 < 40
    return mask


def plain(mask: np.ndarray, spacing_mm: tuple[float, ...]) -> np.ndarray:
    """The definition with SciPy's two transforms, nothing cropped."""
    d_in = ndimage.distance_transform_edt(mask, spacing_mm)
    d_out = ndimage.distance_transform_edt(~mask, spacing_mm)
    signed = d_out / d_out.max() - d_in / d_in.max()
    signed[mask & ~ndimage.binary_erosion(mask, border_value=1)] = 0
    return signed.astype(np.float32)


def compare(spacing_mm: tuple[float, ...], repeats: int = REPEATS) -> dict[str, float]:
    """Median processor seconds of both, called in turn, and the largest difference of their maps."""
    mask = atrium_like()
    functions = {"plain": plain, "ours": signed_distance_map}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    maps = {}
    for _ in range(repeats):
        for name, function in functions.items():
            start = process_time()
            maps[name] = function(mask, spacing_mm)
            seconds[name].append(process_time() - start)
    difference = float(np.abs(maps["plain"] - maps["ours"]).max())
    return {**{name: median(values) for name, values in seconds.items()}, "difference": difference}


if __name__ == "__main__":
    print(f"patch {PATCH}, foreground {atrium_like().mean():.0%}, median processor time of {REPEATS} calls in turn")
    for spacing in SPACINGS_MM:
        result = compare(spacing)
        print(
            f"spacing {spacing} mm: plain {1000 * result['plain']:.0f} ms, ours {1000 * result['ours']:.0f} ms, "
            f"{result['plain'] / result['ours']:.1f} times as fast; largest difference {result['difference']:.0e}"
        )
