"""Perturbations of feature maps."""

import torch
from torch import Tensor


def draw_channel_masks(skips: list[Tensor], rate: float) -> list[Tensor]:
    """Channel-dropout masks, independent for every map, sample and channel.

    Args:
        skips: feature maps (B, C, X, Y, Z), each of its own size; shapes, type and device are taken from them.
        rate: probability of a channel to be dropped, in [0, 1).

    Returns:
        (B, C, 1, 1, 1) per map, 0 or 1 / (1 - rate).

    Reference: CrossMatch (Zhao et al., JBHI 2024) and UniMatch (Yang et al., CVPR 2023): Dropout3d on every skip.
    Deviation: torch's own Dropout3d takes (B, C, X, Y) for one sample without batch, so the masks are drawn here.
    """
    masks = []
    for skip in skips:
        kept = torch.rand(skip.shape[:2], device=skip.device) >= rate
        masks.append((kept.to(skip.dtype) / (1 - rate)).reshape(*kept.shape, *[1] * (skip.ndim - 2)))
    return masks


def drop_channels(skips: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    """Apply the masks of :func:`draw_channel_masks`; also in evaluation mode."""
    return [skip * mask for skip, mask in zip(skips, masks, strict=True)]
