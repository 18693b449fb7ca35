"""Brightness, contrast and blur of image patches. Parameters are drawn apart from their application, on the device.

Reference: ACTION (You et al., IPMI 2023), released code. Deviation: that clamps to [0, 1] and, in 3D, blurs through
8-bit images; z-scored images survive neither. Here brightness and contrast are nnU-Net's, without its clipping.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nnunetv2_semisup.perturbations.image import gaussian_blur


@dataclass(frozen=True)
class Jitter:
    """Parameters for a batch.

    Attributes:
        brightness: (B, C) factors of the intensity; 1 changes nothing.
        contrast: (B, C) factors of the distance to the patch's mean; 1 changes nothing.
        blur: (B,) bool, which samples are blurred.
        sigma: (B, 3) standard deviation of the blur per axis, in voxels.
    """

    brightness: Tensor
    contrast: Tensor
    blur: Tensor
    sigma: Tensor


def draw_jitter(images: Tensor, probability: float, strength: float, blur_probability: float) -> Jitter:
    """Draw for each sample; factors uniform in [1 - strength, 1 + strength], sigma in [0.15, 1.15] voxels on all axes.

    Args:
        images: (B, C, X, Y, Z); gives shape and device.
        probability: of brightness and contrast, per sample.
        strength: in [0, 1).
        blur_probability: per sample.
    """
    batch, channels, device = images.shape[0], images.shape[1], images.device
    chosen = (torch.rand(batch, 1, device=device) < probability).float()
    brightness, contrast = 1 + strength * chosen * (2 * torch.rand(2, batch, channels, device=device) - 1)
    sigma = 0.15 + torch.rand(batch, 1, device=device)
    blur = torch.rand(batch, device=device) < blur_probability
    return Jitter(brightness, contrast, blur, sigma.expand(-1, images.ndim - 2))


@torch.no_grad()
def apply_jitter(images: Tensor, jitter: Jitter) -> Tensor:
    """Brightness, then contrast, then blur, as (B, C, X, Y, Z) float32; ``images`` is not changed."""
    images = images.float()
    ones = [1] * (images.ndim - 2)
    images = images * jitter.brightness.reshape(*images.shape[:2], *ones)
    mean = images.mean(list(range(2, images.ndim)), keepdim=True)
    images = mean + (images - mean) * jitter.contrast.reshape(*images.shape[:2], *ones)
    return torch.where(jitter.blur.reshape(-1, 1, *ones), gaussian_blur(images, jitter.sigma), images)
