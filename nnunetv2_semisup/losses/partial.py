"""nnU-Net's Dice and cross-entropy for patches whose voxels are known to different degrees."""

import torch
import torch.nn.functional as F
from torch import Tensor


def partial_dice_cross_entropy(
    logits: Tensor,
    label: Tensor,
    weight: Tensor,
    factors: Tensor,
    regions: bool,
    batch_dice: bool,
    include_background: bool,
    smooth: float,
) -> Tensor:
    """Mean over voxels of w CE, minus the mean over classes of f (2 sum w p y + s) / (sum w y + sum w p + s).

    A class without a voxel of weight above 0 takes no part in the Dice, whose value would push it to 0 everywhere. With
    w = f = 1 and all classes present this is nnU-Net's loss.

    Args:
        logits: (B, heads, X, Y, Z), carry the gradient.
        label: (B, 1, X, Y, Z) int64 class; with regions (B, heads, X, Y, Z) bool.
        weight: w, (B, 1, X, Y, Z) float, 0 where nothing is known; with regions also (B, heads, X, Y, Z). For several
            weightings of the same patches at once (K, B, 1, X, Y, Z).
        factors: f, (heads,) float in [0, 1], how much each class counts in the Dice; or (K, heads).
        regions: True: sigmoid heads, binary cross-entropy.
        batch_dice: sums over batch and voxels, else a Dice for each sample; as nnU-Net's plans say.
        include_background: False leaves out head 0 of the Dice; without effect for regions, which have none.
        smooth: s.

    Returns:
        Scalar, at least -1; (K,) for several weightings.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.float()
        if regions:
            truth, p = label.float(), torch.sigmoid(logits)
            ce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        else:
            ce = F.cross_entropy(logits, label[:, 0], reduction="none")[:, None]
            truth, p = torch.zeros_like(logits).scatter_(1, label, 1), torch.softmax(logits, 1)
            if not include_background:
                truth, p, factors = truth[:, 1:], p[:, 1:], factors[..., 1:]
        voxels = tuple(range(2 - logits.ndim, 0))
        samples_and_voxels = (-logits.ndim, *voxels)
        axes, classes = (samples_and_voxels, (-1,)) if batch_dice else (voxels, (-2, -1))
        known, predicted = truth * weight, p * weight
        volumes = known.sum(axes)
        dice = (2 * (predicted * truth).sum(axes) + smooth) / (volumes + predicted.sum(axes) + smooth)
        present = volumes > 0
        if not batch_dice:
            factors = factors.unsqueeze(-2)
        mean_dice = (factors * torch.where(present, dice, 0)).sum(classes) / present.sum(classes).clamp(min=1)
        return (ce * weight).mean((-logits.ndim, 1 - logits.ndim, *voxels)) - mean_dice
