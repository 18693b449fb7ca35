"""Which voxels of a patch are replaced by those of another patch. Shapes are for 3D; 2D drops X, the slices."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def draw_half_plane_boxes(images: Tensor) -> Tensor:
    """CutMix: one box per sample with half of the plane (Y, Z) and a quarter of the slices (X).

    The width along Z is uniform in (1/2, 1) of the edge, the height half the plane over it; the place is uniform.

    Args:
        images: (B, C, X, Y, Z); gives shape and device.

    Returns:
        (B, 1, X, Y, Z) bool, True inside.

    Reference: ACTION (You et al., IPMI 2023), released code.
    """
    batch, device = images.shape[0], images.device
    width = 0.5 + 0.5 * torch.rand(batch, device=device)
    shares = [torch.full_like(width, 0.25), 0.5 / width, width][-(images.ndim - 2) :]
    return place_boxes([(share * size).round() for size, share in zip(images.shape[2:], shares, strict=True)], images)


def draw_shared_box(images: Tensor, side: float) -> Tensor:
    """One box for the whole batch, of the share ``side`` of every edge, rounded down; its place is uniform.

    Args:
        images: (B, C, X, Y, Z); gives shape and device.
        side: in (0, 1].

    Returns:
        (1, 1, X, Y, Z) bool, True inside.

    Reference: BCP (Bai et al., CVPR 2023), released code. Deviation: there the box never reaches the far border.
    """
    sides = [math.floor(side * size + 1e-9) for size in images.shape[2:]]
    return place_boxes([torch.full((1,), float(n), device=images.device) for n in sides], images)


def place_boxes(sides: Sequence[Tensor], images: Tensor) -> Tensor:
    """Boxes of given sides at uniform places.

    Args:
        sides: (N,) of N boxes per axis, whole numbers of voxels, taken as at least 1 and at most the edge.
        images: (B, C, X, Y, Z); gives shape and device.

    Returns:
        (N, 1, X, Y, Z) bool, True inside.
    """
    count, device = len(sides[0]), images.device
    inside = torch.ones(count, *[1] * (images.ndim - 1), dtype=torch.bool, device=device)
    for axis, (size, side) in enumerate(zip(images.shape[2:], sides, strict=True), 2):
        side = side.clamp(1, size)
        start = torch.floor(torch.rand(count, device=device) * (size - side + 1))
        along = torch.arange(size, device=device)
        hit = (along >= start[:, None]) & (along < (start + side)[:, None])  # (N, size)
        inside = inside & hit.reshape(count, *(size if i == axis else 1 for i in range(1, images.ndim)))
    return inside


def draw_class_masks(labels: Tensor, classes: int) -> Tensor:
    """ClassMix: the voxels that do not belong to a random half (rounded down) of the classes present in the sample.

    Args:
        labels: (B, 1, X, Y, Z) int64 in [0, classes).
        classes: their number.

    Returns:
        (B, 1, X, Y, Z) bool, True where the partner replaces the sample.

    Reference: ClassMix (Olsson et al., WACV 2021), as in ReCo's code.
    """
    flat = labels.flatten(1)
    present = torch.zeros(len(flat), classes, dtype=torch.bool, device=labels.device)
    present.scatter_(1, flat, True)
    order = torch.where(present, torch.rand(present.shape, device=labels.device), 2.0).argsort(1).argsort(1)
    kept = order < present.sum(1, keepdim=True) // 2
    return ~kept.gather(1, flat).reshape(labels.shape)
