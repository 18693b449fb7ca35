"""What nnU-Net's labelled targets say: class masks, known voxels, and the disjoint classes of regions.

A target is (B, 1, X, Y, Z) with a class value per voxel, or for region-based training (B, R, X, Y, Z) with one channel
per region, and one more for the ignore label if there is one. Under deep supervision it is a list, highest resolution
first, of which these functions read the first. 2D drops Z.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def known_voxels(target: Tensor | list[Tensor], has_regions: bool, ignore_label: int | None) -> Tensor:
    """(B, X, Y, Z) bool: voxels that have a label, background included."""
    target = _full_resolution(target)
    if ignore_label is None:
        return torch.ones_like(target[:, 0], dtype=torch.bool)
    return ~target[:, -1].bool() if has_regions else target[:, 0] != ignore_label


def class_masks(
    target: Tensor | list[Tensor], has_regions: bool, ignore_label: int | None, classes: Iterable[int]
) -> Tensor:
    """(B, K, X, Y, Z) bool: the known voxels of each of K classes; with regions their indices, from 0."""
    target, known = _full_resolution(target), known_voxels(target, has_regions, ignore_label)
    if has_regions:
        return torch.stack([target[:, index].bool() for index in classes], 1) & known[:, None]  # no index on the host
    return torch.stack([target[:, 0] == value for value in classes], 1) & known[:, None]


def region_masks(target: Tensor | list[Tensor], ignore_label: int | None) -> Tensor:
    """(B, R, X, Y, Z) bool: the regions of a region-based target, without the channel of the ignore label."""
    regions = _full_resolution(target).bool()
    return regions if ignore_label is None else regions[:, :-1]


def class_indices(target: Tensor | list[Tensor], has_regions: bool, ignore_label: int | None) -> Tensor:
    """(B, X, Y, Z) int64: the class of each voxel, -1 where it is not known; regions as :func:`disjoint_classes`."""
    known = known_voxels(target, has_regions, ignore_label)
    target = _full_resolution(target)
    if not has_regions:
        return torch.where(known, target[:, 0].long(), -1)
    return torch.where(known, disjoint_classes(region_masks(target, ignore_label)), -1)


def labels_and_weights(
    target: Tensor | list[Tensor], has_regions: bool, ignore_label: int | None
) -> tuple[Tensor, Tensor]:
    """A target as ``losses.partial`` takes it.

    Returns:
        The label: (B, 1, X, Y, Z) int64 class, 0 where it is not known; with regions (B, R, X, Y, Z) bool. And the
        weight, float of the same shape: 1 where the label is known, else 0.
    """
    if has_regions:
        label = region_masks(target, ignore_label)
    else:
        label = class_indices(target, has_regions, ignore_label).clamp(min=0)[:, None]
    return label, known_voxels(target, has_regions, ignore_label)[:, None].expand(label.shape).float()


def class_names(labels: dict[str, Any], foreground: Sequence[Any]) -> list[str]:
    """Names of nnU-Net's foreground labels or regions, in its order.

    Args:
        labels: of dataset.json: name to value, or to the values of a region.
        foreground: values, or tuples of values.
    """
    names = {_values(value): name for name, value in labels.items()}
    return [names.get(_values(value), str(value)) for value in foreground]


def _values(value: Any) -> tuple[int, ...]:
    return tuple(int(v) for v in value) if isinstance(value, (list, tuple)) else (int(value),)


def disjoint_classes(regions: Tensor) -> Tensor:
    """(B, R, X, Y, Z) bool to (B, X, Y, Z) int64 in [0, R]: 1 + the last region a voxel is in, as nnU-Net resolves."""
    numbers = torch.arange(1, regions.shape[1] + 1, device=regions.device)
    return (regions * numbers.reshape(-1, *[1] * (regions.ndim - 2))).amax(1)


def _full_resolution(target: Tensor | list[Tensor]) -> Tensor:
    return target[0] if isinstance(target, list) else target
