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


def weighted_mean(values: Tensor, weights: Tensor, present: Tensor | None = None) -> Tensor:
    """Mean over heads of weights * values, over those alone that are present; 0 if none is.

    Args:
        values: (heads,) float.
        weights: (heads,) float in [0, 1].
        present: (heads,) bool, or None for all.
    """
    if present is None:
        return (weights * values).mean()
    return (weights * torch.where(present, values, 0)).sum() / present.sum().clamp(min=1)


def mean_squared_difference(student: Tensor, teacher: Tensor, weights: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean over batch, heads and voxels of weight * (student - teacher)^2.

    Args:
        student: (B, heads, X, Y, Z) float32 probabilities, carry the gradient.
        teacher: the same shape, no gradient.
        weights: (heads,) in [0, 1], how much each head counts.
        counted: (B, 1 or heads, X, Y, Z) bool, what the mean runs over; None for all. The mean of nothing is 0.

    Returns:
        Scalar in [0, 1].

    Reference: Tarvainen & Valpola, NeurIPS 2017, equation 1 with the mean squared error; with ``counted`` UA-MT (Yu et
    al., MICCAI 2019).
    """
    squares = (student - teacher) ** 2 * weights.reshape(1, -1, *[1] * (student.ndim - 2))
    if counted is None:
        return torch.mean(squares)
    counted = counted.expand(squares.shape)
    return torch.where(counted, squares, 0.0).sum() / counted.sum().clamp(min=1)


def entropy(probabilities: Tensor, regions: bool) -> Tensor:
    """-sum p log(p + 1e-6) of each voxel over the classes; with regions of each head over its two outcomes.

    Args:
        probabilities: (B, heads, X, Y, Z) float32.
        regions: True for region-based training.

    Returns:
        (B, 1, X, Y, Z) in [0, ln heads] up to 1e-5; with regions (B, heads, X, Y, Z) in [0, ln 2].

    Reference: UA-MT (Yu et al., MICCAI 2019), released code.
    """
    outcomes = [probabilities, 1 - probabilities] if regions else [probabilities]
    total = -sum((p * torch.log(p + 1e-6) for p in outcomes), torch.zeros_like(probabilities))
    return total if regions else total.sum(1, keepdim=True)


def decide(probabilities: Tensor, regions: bool) -> Tensor:
    """The most probable head of each voxel, (B, X, Y, Z) int64; with regions each head above 0.5 or not, bool.

    Args:
        probabilities: (B, heads, X, Y, Z).
        regions: True for region-based training.
    """
    return probabilities > 0.5 if regions else probabilities.max(1).indices  # argmax takes 10 times as long on a CPU


def agreement(student: Tensor, teacher: Tensor, regions: bool) -> Tensor:
    """Share of voxels (with regions: of voxels and heads) where both predictions decide alike.

    Args:
        student, teacher: (B, heads, X, Y, Z) float32 probabilities.
        regions: True compares each head with 0.5, False compares the arg max.

    Returns:
        Scalar in [0, 1], no gradient.
    """
    with torch.no_grad():
        return (decide(student, regions) == decide(teacher, regions)).float().mean()


def squared_dice(student: Tensor, target: Tensor, smooth: float) -> Tensor:
    """(heads,): 1 - (2 sum p q + s) / (sum p^2 + sum q^2 + s), sums over batch and voxels; 0 for p = q.

    Args:
        student: p, (B, heads, X, Y, Z) float32 probabilities, carry the gradient.
        target: q, the same shape, no gradient.
        smooth: s.

    Reference: SS-Net (Wu et al., MICCAI 2022), released code for ACDC.
    """
    axes = [0, *range(2, student.ndim)]
    overlap = (student * target).sum(axes)
    sizes = student.square().sum(axes) + target.square().sum(axes)
    return 1 - (2 * overlap + smooth) / (sizes + smooth)


def joint_linear_dice(student: Tensor, target: Tensor, smooth: float, weights: Tensor) -> Tensor:
    """1 - (2 sum p q + s) / (sum p + sum q + s), sums over batch, heads and voxels.

    For softmax probabilities this is 1 - mean over voxels of sum_c p_c q_c, which is 0 for p = q only if both are
    certain: it also acts as an entropy term.

    Args: as :func:`squared_dice`, and
        weights: (heads,) in [0, 1], how much each head counts.

    Reference: SS-Net (Wu et al., MICCAI 2022), released code for LA.
    """
    weights = weights.reshape(1, -1, *[1] * (student.ndim - 2))
    overlap = (weights * student * target).sum()
    return 1 - (2 * overlap + smooth) / ((weights * student).sum() + (weights * target).sum() + smooth)
