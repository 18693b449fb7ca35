"""Distillation of the relations between voxels of a feature map from the teacher to the student."""

import math

import torch.nn.functional as F
from torch import Tensor

from nnunetv2_semisup.losses.contrastive import info_nce


def voxel_vectors(features: Tensor, max_voxels: int) -> Tensor:
    """Feature map to one vector per voxel, averaged over neighbouring voxels where there would be too many.

    Args:
        features: (B, F, X, Y, Z) float.
        max_voxels: at least 1. The longest axis is halved until this many remain at most.

    Returns:
        (B, N, F) float32.
    """
    size = list(features.shape[2:])
    while math.prod(size) > max_voxels:
        longest = size.index(max(size))
        size[longest] = size[longest] // 2
    features = features.float()
    if size != list(features.shape[2:]):
        features = F.interpolate(features, size, mode="area")  # means, as adaptive pooling
    return features.flatten(2).transpose(1, 2)


def pair_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over voxels j of -log softmax_k cos(s_j, t_k) at k = j, over the voxels k of the same volume.

    Not 0 for equal features: n orthogonal voxels give log(e + n - 1) - 1, equal ones log n, and no features less than
    log(1 + (n - 1) exp(-2)).

    Args:
        student: (B, n, F) float, carries the gradient.
        teacher: the same shape, no gradient.

    Returns:
        Scalar above 0.

    Reference: SimCVD (You et al., IEEE TMI 2022), equation 4, which prints the sum.
    """
    return info_nce(student, teacher, temperature=1.0)
