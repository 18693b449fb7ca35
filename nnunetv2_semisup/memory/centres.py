"""Fixed class centres on the sphere, as far from each other as possible, and which class takes which."""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def simplex_centres(classes: int, features: int) -> Tensor:
    """The corners of a regular simplex: unit vectors with the pairwise cosine -1 / (classes - 1), whose sum is 0.

    Args:
        classes: 2 or more.
        features: length of the vectors, at least ``classes``.

    Returns:
        (classes, features) float32, the same at every call.

    Reference: ACTION++ (You et al., MICCAI 2023), after TSC (Li et al., CVPR 2022). Deviation: both search the optimum
    by gradient descent, which stalls near its start for small temperatures; this is the optimum in closed form.
    """
    corners = np.eye(classes) - 1 / classes
    corners /= np.linalg.norm(corners, axis=1, keepdims=True)
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(features, classes)))
    return torch.from_numpy((corners @ basis.T).astype(np.float32))


def allocate(cosines: Tensor) -> Tensor:
    """The one-to-one allocation of centres to classes with the largest sum of cosines (Hungarian algorithm).

    Args:
        cosines: (K, K) float on the CPU, entry (c, j) that of class c's centroid and centre j.

    Returns:
        (K,) int64, the centre of each class.
    """
    _, centres = linear_sum_assignment(np.array(cosines.tolist()), maximize=True)
    return torch.from_numpy(centres)
