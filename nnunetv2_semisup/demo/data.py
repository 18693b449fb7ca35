"""The demo's data: an organ with spots, a look-alike without, in images whose contrast, shading and noise vary.

Frozen before any method was run on it; changing it means choosing data by result. ``numpy.random.RandomState`` is used
because its streams are guaranteed to stay as they are.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

SHAPE = (72, 96, 96)  # z, y, x
SPACING_MM = (1.0, 1.0, 1.25)  # x, y, z, as SimpleITK takes it
LABELS = {"background": 0, "organ": 1}


def make_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """One image and its label.

    Args:
        seed: every seed is another case.

    Returns:
        image (72, 96, 96) int16, arbitrary units as in MR; label (72, 96, 96) uint8, 1 = organ.
    """
    random = np.random.RandomState(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij"))

    body = _blob(random, grid, centre=(0, 0, 0), radii=(0.95, 0.85, 0.9), roughness=0.06)
    side = random.choice((-1, 1))
    organ_centre = np.array((0, 0.05, 0.38 * side)) + random.uniform(-0.1, 0.1, 3)
    organ = _blob(random, grid, organ_centre, random.uniform(0.28, 0.42, 3), roughness=0.25) & body
    like_centre = np.array((0, 0.05, -0.4 * side)) + random.uniform(-0.12, 0.12, 3)
    look_alike = _blob(random, grid, like_centre, random.uniform(0.24, 0.38, 3), roughness=0.25) & body & ~organ
    spots = ndimage.gaussian_filter(random.standard_normal(SHAPE), 3)
    spots = organ & (spots > 0.8 * spots.std())

    contrast = random.uniform(0.22, 0.5)
    texture = ndimage.gaussian_filter(random.standard_normal(SHAPE), 4)
    image = 0.04 * texture / texture.std()
    image += np.where(body, 1.0, 0.1)
    image += contrast * (organ | look_alike) - contrast * spots
    for _ in range(3):  # small bright vessels
        centre = random.uniform(-0.6, 0.6, 3)
        image[_blob(random, grid, centre, random.uniform(0.05, 0.1, 3), roughness=0.1) & ~organ] += 0.7
    image *= np.exp(np.tensordot(random.uniform(-0.3, 0.3, 3), grid, 1))
    image = ndimage.gaussian_filter(image, 0.8) + random.uniform(0.06, 0.16) * random.standard_normal(SHAPE)
    return (500 * random.uniform(0.7, 1.4) * image).astype(np.int16), organ.astype(np.uint8)


def _blob(random, grid: np.ndarray, centre, radii, roughness: float) -> np.ndarray:
    """An ellipsoid, turned in the axial plane, whose surface a smooth random field bends; its largest piece."""
    z, y, x = grid - np.reshape(centre, (3, 1, 1, 1))
    angle = random.uniform(-0.5, 0.5)
    turned = (z, np.cos(angle) * y - np.sin(angle) * x, np.sin(angle) * y + np.cos(angle) * x)
    distance = np.sqrt(sum((axis / radius) ** 2 for axis, radius in zip(turned, radii, strict=True)))
    field = ndimage.gaussian_filter(random.standard_normal(SHAPE), 9)
    mask = distance + roughness * field / field.std() < 1
    pieces, count = ndimage.label(mask)
    return pieces == 1 + np.argmax(ndimage.sum_labels(mask, pieces, range(1, count + 1)))
