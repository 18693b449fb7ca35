"""Virtual adversarial noise: the direction in image space that changes the prediction most, found by one gradient step.

Reference: Miyato et al., "Virtual adversarial training", IEEE TPAMI 2019, arXiv 1704.03976; soft Dice in place of the
KL divergence as in SS-Net (Wu et al., MICCAI 2022).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Factor on the discrepancy before its gradient is taken. The gradient per voxel is about 1 / voxels, 1e-8 at usual
#: patch sizes, which half precision flushes to zero; the direction does not depend on the factor.
LOSS_SCALE = 2.0**16


def draw_directions(images: Tensor) -> Tensor:
    """Random unit vectors, one per sample: uniform in [-0.5, 0.5] per voxel, normalised over channels and voxels.

    Args:
        images: (B, C, X, Y, Z); gives shape and device.

    Returns:
        (B, C, X, Y, Z) float32 of length 1 per sample.
    """
    noise = torch.rand(images.shape, device=images.device, dtype=torch.float32) - 0.5
    return noise / _per_sample(torch.linalg.vector_norm(noise.flatten(1), dim=1), noise)


def adversarial_directions(
    discrepancy: Callable[[Tensor], Tensor], start: Tensor, step: float, loss_scale: float = LOSS_SCALE
) -> tuple[Tensor, Tensor]:
    """One power iteration: the normalised gradient of the discrepancy at ``step * start``.

    No parameter's ``.grad`` is touched. Freeze the parameters (``network/freeze.py``) to save their part of the work.

    Args:
        discrepancy: noise (B, C, X, Y, Z) -> scalar, how far the prediction has moved.
        start: (B, C, X, Y, Z) float32, length 1 per sample.
        step: xi, length of the trial noise per sample, in units of the normalised intensity.
        loss_scale: factor on the discrepancy against underflow in half precision.

    Returns:
        Directions (B, C, X, Y, Z) float32 of length 1 per sample without gradient; and (B,) bool, False where the
        gradient was zero or not finite and the direction is ``start``.
    """
    noise = (step * start).detach().requires_grad_(True)
    scaled = discrepancy(noise) * loss_scale
    with torch.autocast(noise.device.type, enabled=False):  # a backward must not run under autocast
        (gradient,) = torch.autograd.grad(scaled, noise)
    # By the largest entry first: squares of small gradients would vanish. No epsilon, which would let the scale matter.
    largest = gradient.flatten(1).abs().amax(1)
    found = torch.isfinite(largest) & (largest > 0)
    gradient = gradient / _per_sample(largest, gradient)
    gradient = gradient / _per_sample(torch.linalg.vector_norm(gradient.flatten(1), dim=1), gradient)
    return torch.where(_per_sample(found, gradient), gradient, start), found


def _per_sample(values: Tensor, images: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1, 1)."""
    return values.reshape(-1, *[1] * (images.ndim - 1))
