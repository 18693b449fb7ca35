"""Hard pseudo-labels with their confidence, and the losses that learn from the confident voxels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from nnunetv2_semisup.losses.consistency import probabilities, weighted_mean


class PseudoLabel(NamedTuple):
    """A decision per voxel; with regions one per voxel and head.

    Attributes:
        label: (B, 1, X, Y, Z) int64 class; with regions (B, heads, X, Y, Z) int64, 0 or 1.
        confidence: the same shape, float32 in [0, 1]: probability of the decision.
    """

    label: Tensor
    confidence: Tensor


def pseudo_label(logits: Tensor, regions: bool) -> PseudoLabel:
    """The arg max (regions: each head above 0.5 or not) and its probability, without gradient.

    Args:
        logits: (B, heads, X, Y, Z).
        regions: True for sigmoid heads.
    """
    p = probabilities(logits.detach(), regions)
    if regions:
        return PseudoLabel((p > 0.5).long(), torch.maximum(p, 1 - p))
    confidence, label = p.max(1, keepdim=True)
    return PseudoLabel(label, confidence)


def mix(inside: PseudoLabel, outside: PseudoLabel, box: Tensor) -> PseudoLabel:
    """``inside`` where ``box`` (B, 1, X, Y, Z) is True, ``outside`` elsewhere; label and confidence alike."""
    return PseudoLabel(*(torch.where(box, a, b) for a, b in zip(inside, outside, strict=True)))


def kept(target: PseudoLabel, threshold: float, weights: Tensor, regions: bool) -> Tensor:
    """How much each voxel counts, float32 of the label's shape: 0 below ``threshold``, else the weight of its class.

    Args:
        target: pseudo-label.
        threshold: confidence that a voxel needs.
        weights: (heads,) in [0, 1], how much each head counts.
        regions: True: a voxel counts per head, with the head's weight.
    """
    confident = (target.confidence >= threshold).float()
    if regions:
        return confident * weights.reshape(1, -1, *[1] * (confident.ndim - 2))
    return confident * weights[target.label]


def largest_components(label: Tensor) -> Tensor:
    """The largest connected component of each class and sample; all other voxels become background. On the CPU.

    Args:
        label: (B, 1, X, Y, Z) int64 class; with regions (B, heads, X, Y, Z) bool. Voxels that touch in a corner are
            connected.

    Returns:
        Of the label's shape, type and device.

    Reference: BCP (Bai et al., CVPR 2023), released code.
    """
    given = label.cpu().numpy()
    largest = np.zeros_like(given)
    structure = np.ones([3] * (given.ndim - 2))
    for sample in np.ndindex(given.shape[:2]):
        for value in np.unique(given[sample]):
            if value:
                components, _ = ndimage.label(given[sample] == value, structure)
                sizes = np.bincount(components.ravel())
                largest[sample][components == 1 + sizes[1:].argmax()] = value
    return torch.from_numpy(largest).to(label.device)


def masked_dice(
    student: Tensor,
    target: PseudoLabel,
    keep: Tensor,
    weights: Tensor,
    regions: bool,
    include_background: bool,
    smooth: float,
    skip_absent: bool,
) -> Tensor:
    """Weighted mean over classes of 1 - (2 sum k p y + s) / (sum k y + sum k p^2 + s), sums over batch and voxels.

    k is how much a voxel counts. With no voxel kept the loss is 0 and has no gradient.

    Args:
        student: (B, heads, X, Y, Z) float32 probabilities, carry the gradient.
        target: of the same patches.
        keep: k, see :func:`kept`.
        weights: (heads,) in [0, 1], of the classes.
        regions: True: every head is a class of its own.
        include_background: False leaves out class 0; without effect for regions, which have none.
        smooth: s.
        skip_absent: leave out classes without a kept voxel of theirs: their Dice would push them to 0 everywhere.

    Returns:
        Scalar in [0, 1].

    Reference: CrossMatch (Zhao et al., JBHI 2024), released code.
    """
    if regions:
        truth = target.label.float()
    else:
        classes = torch.arange(student.shape[1], device=student.device).reshape(1, -1, *[1] * (student.ndim - 2))
        truth = (target.label == classes).float()
        if not include_background:
            student, truth, weights = student[:, 1:], truth[:, 1:], weights[1:]
    axes = [0, *range(2, student.ndim)]
    counted = student * keep
    intersection = (counted * truth).sum(axes)
    volumes = (keep * truth).sum(axes)
    sizes = volumes + (counted * student).sum(axes)
    losses = 1 - (2 * intersection + smooth) / (sizes + smooth)
    return weighted_mean(losses, weights, volumes > 0 if skip_absent else None)


def masked_cross_entropy(logits: Tensor, target: PseudoLabel, keep: Tensor, regions: bool) -> Tensor:
    """Mean of k CE over all voxels, whether they count or not; with regions over voxels and heads, CE the binary one.

    Args:
        logits: (B, heads, X, Y, Z), carry the gradient.
        target: of the same patches.
        keep: k, see :func:`kept`.
        regions: True for sigmoid heads.

    Returns:
        Scalar, 0 or more.

    Reference: FixMatch (Sohn et al., NeurIPS 2020), equation 4, voxels in the place of images.
    """
    with torch.autocast(logits.device.type, enabled=False):
        if regions:
            ce = F.binary_cross_entropy_with_logits(logits.float(), target.label.float(), reduction="none")
        else:
            ce = F.cross_entropy(logits.float(), target.label[:, 0], reduction="none")[:, None]
        return (keep * ce).mean()


def confidence_weighted_cross_entropy(
    logits: Tensor, target: PseudoLabel, threshold: float, weights: Tensor, regions: bool
) -> tuple[Tensor, Tensor]:
    """Mean of omega_b * CE over all voxels whose CE is above 0; omega_b is the share of confident voxels of patch b.

    The threshold sets the weight of a patch; all of its voxels count. Without any voxel to count the loss is 0.

    Args:
        logits: (B, heads, X, Y, Z), carry the gradient.
        target: of the same patches; voxels with the label -1 (regions: in any head) do not exist.
        threshold: confidence from which a voxel is confident; with regions all heads must reach it.
        weights: (heads,) in [0, 1]: factor of the CE of voxels of each class, with regions of each head.
        regions: True: CE is the mean over heads of the binary cross-entropy.

    Returns:
        The loss, a scalar, 0 or more; and (B,) omega.

    Reference: ReCo (Liu et al., ICLR 2022), released code; ACTION (You et al., IPMI 2023).
    """
    with torch.autocast(logits.device.type, enabled=False):
        known = (target.label >= 0).all(1)
        label = target.label.clamp(min=0)
        if regions:
            ce = F.binary_cross_entropy_with_logits(logits.float(), label.float(), reduction="none")
            weighted = (ce * weights.reshape(1, -1, *[1] * (ce.ndim - 2))).mean(1)
            ce = ce.mean(1)
        else:
            ce = F.cross_entropy(logits.float(), label[:, 0], reduction="none")
            weighted = ce * weights[label[:, 0]]
        confident = (target.confidence.amin(1) >= threshold) & known
        omega = confident.flatten(1).sum(1) / known.flatten(1).sum(1).clamp(min=1)
        counted = known & (ce.detach() > 0)  # before the classes' weights: a class without one leaves the mean as it is
        total = torch.where(counted, weighted * omega.reshape(-1, *[1] * (ce.ndim - 1)), 0.0).sum()
        return total / counted.sum().clamp(min=1), omega
