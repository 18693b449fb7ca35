"""How long our signed distance maps take beside the plain way, two distance transforms of the whole patch.

python -m nnunetv2_semisup.data.sdm_speed
"""

from __future__ import annotations

from statistics import median
from time import process_time

import numpy as np
from scipy import ndimage

from nnunetv2_semisup.data.sdm import signed_distance_map

PATCH = (112, 112, 80)
SPACING_MM = (0.625, 0.625, 0.625)
REPEATS = 15


def atrium_like(shape: tuple[int, ...] = PATCH) -> np.ndarray:
    """An ellipsoid of 52 x 64 x 40 voxels with four tubes from it, about a tenth of the patch, as a left atrium."""
    centre = [n / 2 for n in shape]
    grid = [g - c for g, c in zip(np.ogrid[tuple(slice(n) for n in shape)], centre, strict=True)]
    x, y, z = grid
    mask = (x / 26) ** 2 + (y / 32) ** 2 + (z / 20) ** 2 < 1
    for height in (-8, 8):
        for sign in (-1, 1):
            mask |= ((x + 0.3 * abs(y)) ** 2 + (z - height) ** 2 < 25) & (sign * y > 0) & (sign * y < 44)
    return mask


def plain(mask: np.ndarray, spacing_mm: tuple[float, ...]) -> np.ndarray:
    """The definition with SciPy's two transforms, nothing cropped."""
    d_in = ndimage.distance_transform_edt(mask, spacing_mm)
    d_out = ndimage.distance_transform_edt(~mask, spacing_mm)
    signed = d_out / d_out.max() - d_in / d_in.max()
    signed[mask & ~ndimage.binary_erosion(mask, border_value=1)] = 0
    return signed.astype(np.float32)


def compare(repeats: int = REPEATS) -> dict[str, float]:
    """Median processor seconds of both, called in turn, and the largest difference of their maps."""
    mask = atrium_like()
    functions = {"plain": plain, "ours": signed_distance_map}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    maps = {}
    for _ in range(repeats):
        for name, function in functions.items():
            start = process_time()
            maps[name] = function(mask, SPACING_MM)
            seconds[name].append(process_time() - start)
    difference = float(np.abs(maps["plain"] - maps["ours"]).max())
    return {**{name: median(values) for name, values in seconds.items()}, "difference": difference}


if __name__ == "__main__":
    result = compare()
    print(f"patch {PATCH}, foreground {atrium_like().mean():.1%}, {REPEATS} repeats in turn, median processor time")
    print(f"plain {1000 * result['plain']:.0f} ms, ours {1000 * result['ours']:.0f} ms: ", end="")
    print(f"{result['plain'] / result['ours']:.1f} times as fast; largest difference {result['difference']:.1e}")
