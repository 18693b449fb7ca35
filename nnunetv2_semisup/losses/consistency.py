"""Consistency between two predictions of the same patch."""

import torch
from torch import Tensor


def probabilities(logits: Tensor, regions: bool) -> Tensor:
    """Softmax over the heads, or one sigmoid per head for region-based training, in fp32.

    Args:
        logits: (B, heads, X, Y, Z) float, unnormalised.
        regions: True for nnU-Net's region-based training.

    Returns:
        (B, heads, X, Y, Z) float32 in [0, 1].
    """
    logits = logits.float()
    return torch.sigmoid(logits) if regions else torch.softmax(logits, 1)


def mean_squared_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over batch, heads and voxels of (student - teacher)^2.

    Args:
        student: (B, heads, X, Y, Z) float32 probabilities, carry the gradient.
        teacher: the same shape, no gradient.

    Returns:
        Scalar in [0, 1].

    Reference: Tarvainen & Valpola, NeurIPS 2017, equation 1 with the mean squared error.
    """
    return torch.mean((student - teacher) ** 2)


def agreement(student: Tensor, teacher: Tensor, regions: bool) -> Tensor:
    """Share of voxels (with regions: of voxels and heads) where both predictions decide alike.

    Args:
        student, teacher: (B, heads, X, Y, Z) float32 probabilities.
        regions: True compares each head with 0.5, False compares the arg max.

    Returns:
        Scalar in [0, 1], no gradient.
    """
    with torch.no_grad():
        if regions:
            return ((student > 0.5) == (teacher > 0.5)).float().mean()
        return (student.argmax(1) == teacher.argmax(1)).float().mean()
