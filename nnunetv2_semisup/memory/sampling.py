"""Feature vectors of chosen voxels, in arrays of fixed size, so that a GPU need not report any count to the host."""

import torch
from torch import Tensor


def sample_positions(mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Positions where ``mask`` is True: all of them if they are at most ``size``, else that many of them.

    Systematic sampling: every n / size-th from a random start, so each has the same chance and none is drawn twice.

    Args:
        mask: (N,) bool, N below 2^31.
        size: of the result.

    Returns:
        (size,) int64 positions, and (size,) bool, False for the places that stay empty (their position means nothing).
    """
    ranks = mask.cumsum(0, dtype=torch.int32)  # the r-th True is the first position of rank r, from 1
    count = ranks[-1].long()
    slots = torch.arange(size, device=mask.device)
    start = (torch.rand((), device=mask.device) * count).long()
    wanted = torch.where(count <= size, slots, (slots * count + start) // size)
    positions = torch.searchsorted(ranks, wanted.int() + 1)
    return positions.clamp(max=mask.numel() - 1), slots < count


def sample_size(wanted: int | None, most: int, voxels: int, one_in: int) -> int:
    """How many voxels to sample: small patches need fewer, or they would cost more than the network.

    Args:
        wanted: a user's number, which is taken as it is, or None.
        most: what large patches get.
        voxels: that there are.
        one_in: without ``wanted``, at most one voxel in so many, but 2.
    """
    return min(most, max(2, voxels // one_in)) if wanted is None else wanted


def random_choice(number: int, size: int, device: torch.device) -> Tensor:
    """(size,) int64: as many of 0 to number - 1, each at most once, in random order.

    Not ``randperm``, which a GPU makes the host wait for.
    """
    return torch.rand(number, device=device).argsort()[:size]


def rows_at(rows: Tensor, positions: Tensor) -> Tensor:
    """(*positions.shape, F): ``rows`` (N, F) at ``positions`` int64.

    Not ``rows[positions]``: on a CPU its backward pass is slower, and where a position comes twice its sums differ in
    their last digits from run to run.
    """
    return rows.index_select(0, positions.flatten()).reshape(*positions.shape, rows.shape[1])


def sample_rows(features: Tensor, members: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Feature vectors of at most ``size`` voxels per class.

    Args:
        features: (B, F, X, Y, Z) float.
        members: (K, B * X * Y * Z) bool, the voxels of each class; a voxel may belong to several.
        size: rows per class, cut to the number of voxels.

    Returns:
        Rows (K, size, F) float32 that carry the gradient, zero where they are not valid; and valid (K, size) bool. Rows
        of an overflow in half precision (not finite) are not valid.
    """
    size = min(size, members.shape[1])
    positions, valid = (torch.stack(part) for part in zip(*(sample_positions(m, size) for m in members), strict=True))
    rows = rows_at(features.movedim(1, -1).flatten(0, -2), positions).float()
    valid = valid & torch.isfinite(rows.detach()).all(-1)
    return torch.where(valid[..., None], rows, 0.0), valid
