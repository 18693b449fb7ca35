"""Additive noise on images. Drawn apart from its use, so that a test can replay it and two views can share it."""

import torch
from torch import Tensor


def draw_clipped_noise(images: Tensor, std: float, limit: float) -> Tensor:
    """Gaussian noise clipped to [-limit, limit].

    Args:
        images: (B, C, X, Y, Z) float; gives shape and device.
        std: standard deviation before clipping, in units of the normalised intensity.
        limit: largest absolute value.

    Returns:
        (B, C, X, Y, Z) float32.

    Reference: Yu et al., MICCAI 2019 (released code): clip(0.1 N(0, 1), -0.2, 0.2).
    """
    noise = torch.randn(images.shape, device=images.device, dtype=torch.float32)
    return noise.mul_(std).clamp_(-limit, limit)
