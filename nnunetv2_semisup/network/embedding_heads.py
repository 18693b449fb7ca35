"""Heads that turn features of the planned network into embeddings; a method keeps them beside the network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunetv2_semisup.memory.sampling import rows_at

ROWS_AT_ONCE = 16384  # of the grid, where all of them are needed


def mlp(in_features: int, hidden_features: int, out_features: int, relu: bool) -> nn.Sequential:
    """Linear, ReLU or nothing, Linear."""
    activation = nn.ReLU() if relu else nn.Identity()
    return nn.Sequential(nn.Linear(in_features, hidden_features), activation, nn.Linear(hidden_features, out_features))


def coarse_means(features: Tensor, cells: int) -> Tensor:
    """(B, C, X, Y, Z) to (B, C * cells^3), 2D (B, C * cells^2): means over as many equal parts of each axis."""
    pool = F.adaptive_avg_pool3d if features.ndim == 5 else F.adaptive_avg_pool2d
    return pool(features, cells).flatten(1)


def window_edges(patch_size: Sequence[int]) -> tuple[int, ...]:
    """Edge of a window per axis, in voxels: the multiple of 4 nearest to patch / 5.6, at least 4.

    Reference: ACTION (You et al., IPMI 2023), released code: 20 of 112 voxels.
    """
    return tuple(max(4, 4 * round(size / 22.4)) for size in patch_size)


def pool_cells(logits: Tensor, edges: Sequence[int]) -> Tensor:
    """(B, C, X, Y, Z) to (B, cells X, cells Y, cells Z, C): means over cells with a quarter of the window's edges."""
    pool = F.avg_pool3d if logits.ndim == 5 else F.avg_pool2d
    return pool(logits, [edge // 4 for edge in edges]).movedim(1, -1)


def windows(cells: Tensor) -> Tensor:
    """All windows of 4 cells per axis, every second cell one: (B, X, Y, Z, C) to (B, P, C * 64), 2D (B, P, C * 16).

    An axis of fewer cells, as of a patch of two slices, is in every window whole.
    """
    dims = cells.ndim - 2
    for axis in range(1, dims + 1):
        cells = cells.unfold(axis, min(4, cells.shape[axis]), 2)
    return cells.flatten(1, dims).flatten(2)


class RepresentationHead(nn.Module):
    """An embedding per voxel of the grid of the second highest decoder level, from all decoder levels.

    All levels are interpolated linearly to the grid; then per voxel: linear layer to F channels, ReLU, linear layer.

    Args:
        channels: of the decoder levels, highest resolution first.
        step: voxels of the highest level per voxel of the grid, on each axis.
        features: F.

    Deviation from ACTION (You et al., IPMI 2023): that works at full resolution and begins with a 3x3x3 convolution,
    which needs gigabytes for nnU-Net's patches.
    """

    def __init__(self, channels: Sequence[int], step: Sequence[int], features: int):
        super().__init__()
        self.step = tuple(step)
        # Interpolation and a linear layer commute: what has fewer channels is interpolated.
        self.is_wide = [level > 0 and width > features for level, width in enumerate(channels)]
        narrow = sum(width for width, wide in zip(channels, self.is_wide, strict=True) if not wide)
        self.narrow = nn.Linear(narrow, features)
        self.wide = nn.ModuleList(
            nn.Linear(width, features, bias=False) for width, wide in zip(channels, self.is_wide, strict=True) if wide
        )
        self.last = nn.Linear(features, features)

    def thin(self, full: Tensor) -> Tensor:
        """Every ``step``-th voxel of (B, ..., X, Y, Z): from full resolution to the grid."""
        thin: tuple[Any, ...] = (..., *(slice(None, None, step) for step in self.step))
        return full[thin]

    @torch.no_grad()
    def class_means(self, maps: list[Tensor], members: Tensor) -> Tensor:
        """Mean embedding of the voxels of each class, (K, F) float32.

        Without gradient: it needs every voxel. The last layer is linear, so it is applied to the means.

        Args:
            maps: decoder levels (B, C, X, Y, Z), the highest one first and already thinned, so on the grid.
            members: (K, B * x * y * z) bool.
        """
        grid = maps[0].shape[2:]
        narrow, wide = self._by_width([m.detach() for m in maps])
        rows = _rows(torch.cat([_resize(m, grid) for m in narrow], 1))
        projected = [_rows(_resize(_over_channels(layer, m), grid)) for layer, m in zip(self.wide, wide, strict=True)]
        sums = torch.zeros(len(members), self.narrow.out_features, device=members.device)
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            hidden = self.narrow(rows[part])
            for more in projected:
                hidden += more[part]
            with torch.autocast(hidden.device.type, enabled=False):
                sums += members[:, part].float() @ torch.relu_(hidden).float()
        with torch.autocast(sums.device.type, enabled=False):
            return self.last(sums / members.sum(1, keepdim=True).clamp(min=1))

    def rows(self, maps: list[Tensor], positions: Tensor) -> Tensor:
        """(*positions.shape, F) float32 embeddings at ``positions`` int64 in [0, B * x * y * z) of the grid.

        Levels are interpolated there alone: with few positions that costs next to nothing, also in the backward pass.

        Args:
            maps: as for :meth:`class_means`.
            positions: int64 of any shape.
        """
        grid = maps[0].shape[2:]
        with torch.autocast(positions.device.type, enabled=False):
            narrow, wide = (
                [_rows_between(m, grid, positions.flatten()) for m in part] for part in self._by_width(maps)
            )
            hidden = self.narrow(torch.cat(narrow, 1))
            for layer, level in zip(self.wide, wide, strict=True):
                hidden = hidden + layer(level)
            return self.last(torch.relu(hidden)).reshape(*positions.shape, -1)

    def _by_width(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        pairs = list(zip(maps, self.is_wide, strict=True))
        return [m for m, wide in pairs if not wide], [m for m, wide in pairs if wide]


def _over_channels(layer: nn.Module, maps: Tensor) -> Tensor:
    """``layer`` of every voxel of (B, C, X, Y, Z)."""
    return layer(maps.movedim(1, -1)).movedim(-1, 1)


def _rows(maps: Tensor) -> Tensor:
    """(B, C, X, Y, Z) to (B * X * Y * Z, C)."""
    return maps.movedim(1, -1).flatten(0, -2)


def _resize(maps: Tensor, grid: Sequence[int]) -> Tensor:
    """Linear interpolation of (B, C, X, Y, Z) to (B, C, *grid)."""
    if maps.shape[2:] == grid:
        return maps
    return F.interpolate(maps, grid, mode="trilinear" if maps.ndim == 5 else "bilinear", align_corners=False)


def _rows_between(maps: Tensor, grid: Sequence[int], positions: Tensor) -> Tensor:
    """(N, C) float32: what :func:`_resize` gives at ``positions`` (N,), of (B, C, X, Y, Z)."""
    corners: list[tuple[Any, Any]] = [(0, 1.0)]  # place in a row of voxels, and weight
    rest, stride = positions, 1
    for coarse, fine in zip(maps.shape[:1:-1], grid[::-1], strict=True):  # the last axis first
        place = (((rest % fine) + 0.5) * (coarse / fine) - 0.5).clamp(min=0)
        low = place.long().clamp(max=coarse - 1)
        share = place - low
        ends = [(low, 1 - share)] if coarse == fine else [(low, 1 - share), ((low + 1).clamp(max=coarse - 1), share)]
        corners = [(at + stride * end, weight * part) for at, weight in corners for end, part in ends]
        rest, stride = rest // fine, stride * coarse
    rows = _rows(maps)
    parts = (rows_at(rows, at + stride * rest).float() * weight[:, None] for at, weight in corners)  # rest: the patch
    return sum(parts, torch.zeros((), device=maps.device))
