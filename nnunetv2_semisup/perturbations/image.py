"""Strong views of image patches: bias field, gamma, blur; and boxes for CutMix.

Parameters are drawn apart from their application, on the images' device, without a word to the host. Everything runs in
fp32 without gradient, batched over samples, at a cost linear in the number of voxels. Shapes are for 3D; 2D drops Z.

Reference: Zhao, Wang & Ding, "CrossMatch", IEEE JBHI 2024 (released code), which takes bias field, gamma and blur from
TorchIO and boxes from UniMatch (Yang et al., CVPR 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nnunetv2_semisup.perturbations.mixing import place_boxes

BIAS_FIELD_ORDER = 3
BLUR_RADIUS = 8  # voxels: 4 standard deviations of the widest blur


@dataclass(frozen=True)
class StrongView:
    """Parameters of one strong view of a batch.

    Attributes:
        intensity: (B,) bool, which samples get bias field and gamma.
        bias_field: (B, 4, 4, 4) polynomial coefficients, zero above order 3; None switches the field off.
        gamma: (B, C) exponents.
        blur: (B,) bool, which samples are blurred.
        sigma: (B, 3) standard deviation of the blur per axis, in voxels.
    """

    intensity: Tensor
    bias_field: Tensor | None
    gamma: Tensor
    blur: Tensor
    sigma: Tensor


def draw_strong_view(
    images: Tensor, intensity_probability: float, blur_probability: float, bias_field: bool
) -> StrongView:
    """Draw a strong view for each sample.

    Args:
        images: (B, C, X, Y, Z); gives shape and device.
        intensity_probability: of bias field and gamma together, per sample.
        blur_probability: of the blur, per sample.
        bias_field: False leaves gamma and blur (CT has no bias field).

    Returns:
        Coefficients uniform in [-0.5, 0.5], gamma = exp(uniform in [-0.5, 0.5]), sigma uniform in [0.1, 2] voxels.
    """
    batch, channels, dims = images.shape[0], images.shape[1], images.ndim - 2

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, device=images.device)

    coefficients = None
    if bias_field:
        side = BIAS_FIELD_ORDER + 1
        powers = torch.meshgrid(*[torch.arange(side, device=images.device)] * dims, indexing="ij")
        allowed = torch.stack(powers).sum(0) <= BIAS_FIELD_ORDER
        coefficients = uniform(-0.5, 0.5, batch, *(side,) * dims) * allowed
    return StrongView(
        intensity=torch.rand(batch, device=images.device) < intensity_probability,
        bias_field=coefficients,
        gamma=torch.exp(uniform(-0.5, 0.5, batch, channels)),
        blur=torch.rand(batch, device=images.device) < blur_probability,
        sigma=uniform(0.1, 2.0, batch, dims),
    )


@torch.no_grad()
def apply_strong_view(images: Tensor, view: StrongView) -> Tensor:
    """Bias field, then gamma, then blur, each where ``view`` says so. Zeros stay zero but for the blur.

    Args:
        images: (B, C, X, Y, Z) float.
        view: as :func:`draw_strong_view` returns it.

    Returns:
        (B, C, X, Y, Z) float32; ``images`` is not changed.
    """
    images = images.float()
    changed = images
    if view.bias_field is not None:
        changed = changed * bias_field(view.bias_field, images.shape[2:])
    gamma = view.gamma.reshape(*view.gamma.shape, *[1] * (images.ndim - 2))
    changed = torch.sign(changed) * changed.abs() ** gamma
    images = torch.where(_per_sample(view.intensity, images), changed, images)
    return torch.where(_per_sample(view.blur, images), gaussian_blur(images, view.sigma), images)


def bias_field(coefficients: Tensor, shape: tuple[int, ...]) -> Tensor:
    """exp of a polynomial of the voxel centres, scaled to [-1, 1] on each axis.

    Args:
        coefficients: (B, 4, 4, 4), entry (i, j, k) belongs to X^i Y^j Z^k.
        shape: (X, Y, Z).

    Returns:
        (B, 1, X, Y, Z) float32, positive.
    """
    powers = torch.arange(coefficients.shape[-1], device=coefficients.device)
    field = coefficients
    # Axis by axis, so that the cost is that of the last one: order + 1 products per voxel.
    with torch.autocast(coefficients.device.type, enabled=False):
        for size in shape:
            centres = torch.linspace(-1, 1, size, device=coefficients.device)
            field = torch.tensordot(field, centres[:, None] ** powers, dims=([1], [1]))
    return torch.exp(field)[:, None]


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Separable Gaussian blur with a width for each sample and axis; the border is reflected (d c b a|a b c d).

    Args:
        images: (B, C, X, Y, Z) float32.
        sigma: (B, 3) standard deviations in voxels, above 0.

    Returns:
        (B, C, X, Y, Z) float32.
    """
    offsets = torch.arange(BLUR_RADIUS + 1, device=images.device)
    weights = torch.exp(-0.5 * (offsets / sigma[..., None]) ** 2)  # (B, 3, radius + 1), one side
    weights = weights / (2 * weights.sum(-1, keepdim=True) - weights[..., :1])
    for axis, size in enumerate(images.shape[2:]):
        # Reflection has the period 2 * size.
        index = torch.arange(-BLUR_RADIUS, size + BLUR_RADIUS, device=images.device) % (2 * size)
        padded = images.index_select(axis + 2, torch.where(index < size, index, 2 * size - 1 - index))
        blurred = images * _per_sample(weights[:, axis, 0], images)
        for offset in range(1, BLUR_RADIUS + 1):
            pair = padded.narrow(axis + 2, BLUR_RADIUS - offset, size)
            pair = pair + padded.narrow(axis + 2, BLUR_RADIUS + offset, size)
            blurred.addcmul_(pair, _per_sample(weights[:, axis, offset], images))
        images = blurred
    return images


def draw_boxes(images: Tensor, probability: float, volume: Sequence[float]) -> Tensor:
    """One box per sample for CutMix.

    The box has the share f of the patch, uniform in ``volume``, and the aspect r, uniform in [0.3, 1 / 0.3]; its sides
    are floor(P f^(1/3) (r^(-1/3), r^(1/3), 1)) of the patch's edges P, in 2D floor(P f^(1/2) (r^(-1/2), r^(1/2))), at
    least 1 and at most the edge; its place is uniform.

    Args:
        images: (B, C, X, Y, Z); gives shape and device.
        probability: of a sample to have a box at all.
        volume: smallest and largest share of the patch.

    Returns:
        (B, 1, X, Y, Z) bool, True inside.

    Deviation: published sides are those of a cube, f V^(1/3), which leave flat patches; the published 3D code also
    writes the ranges on the wrong axes. For cubic patches these are the published sides. Boxes that would not fit are
    cut to the edge; the published 2D code draws again instead.
    """
    batch, shape, device = images.shape[0], images.shape[2:], images.device
    dims = len(shape)
    low, high = volume
    share = (low + (high - low) * torch.rand(batch, device=device)) ** (1 / dims)
    aspect = (0.3 + (1 / 0.3 - 0.3) * torch.rand(batch, device=device)) ** (1 / dims)
    factors = (1 / aspect, aspect, torch.ones_like(aspect))
    chosen = torch.rand(batch, device=device) < probability
    sides = [torch.floor(size * share * factor) for size, factor in zip(shape, factors[:dims], strict=True)]
    return place_boxes(sides, images) & _per_sample(chosen, images)


@torch.no_grad()
def mixed_strong_view(
    images: Tensor,
    partners: Tensor,
    intensity_probability: float,
    blur_probability: float,
    bias_field: bool,
    box_probability: float,
    box_volume: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """A strong view of ``images`` with a box of a strong view of ``partners``, and the box; the geometry stays.

    Args:
        images, partners: (B, C, X, Y, Z).
        intensity_probability, blur_probability, bias_field: see :func:`draw_strong_view`.
        box_probability, box_volume: see :func:`draw_boxes`.

    Returns:
        (B, C, X, Y, Z) float32 and (B, 1, X, Y, Z) bool, True inside the box.
    """

    def strong(patches: Tensor) -> Tensor:
        return apply_strong_view(
            patches, draw_strong_view(patches, intensity_probability, blur_probability, bias_field)
        )

    inside, outside = strong(partners), strong(images)
    box = draw_boxes(images, box_probability, box_volume)
    return torch.where(box, inside, outside), box


def _per_sample(values: Tensor, images: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1, 1)."""
    return values.reshape(-1, *[1] * (images.ndim - 1))
