"""Which pseudo-labels to trust: how much several predictions of a case differ, and how sure the last one is.

Source of ``disagreement``: Huang et al., FLARE 2022 (its winner), who select unlabelled cases by the voxels in which
predictions of different rounds differ. The paper compares two predictions; here the form for any number is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def disagreement(predictions: Sequence[np.ndarray]) -> float:
    """u = voxels in which the predictions are not all equal / voxels that are foreground in any of them; 0 to 1.

    Args:
        predictions: label maps of one shape, two or more; 0 is background.

    Returns:
        u; 0 where all are background everywhere.
    """
    first, *others = predictions
    differing = np.zeros(first.shape, bool)
    foreground = first > 0
    for other in others:
        differing |= other != first
        foreground |= other > 0
    return int(differing.sum()) / max(1, int(foreground.sum()))


def cases_to_drop(u: dict[str, float], share: float) -> list[str]:
    """The cases of largest ``u``, sorted by name: ``share`` of all, rounded down; of equal ones the later names."""
    number = math.floor(share * len(u) + 1e-9)  # 0.29 * 100 is 28.999...
    ranked = sorted(u, key=lambda case: (u[case], case))
    return sorted(ranked[len(ranked) - number :])


def unsure(probabilities: np.ndarray, threshold: float, regions: bool) -> np.ndarray:
    """Voxels whose confidence is below ``threshold``.

    Args:
        probabilities: (channels, *shape), as nnU-Net saves them: of classes, or each of a region for itself.
        threshold: of the largest class probability, or of the least sure region's max(p, 1 - p).
        regions: the channels are regions.

    Returns:
        bool, ``shape``.
    """
    confidence = np.maximum(probabilities, 1 - probabilities).min(0) if regions else probabilities.max(0)
    return confidence < threshold
