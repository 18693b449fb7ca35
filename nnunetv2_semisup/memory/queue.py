"""First in, first out: the most recent rows, e.g. embeddings of the images of the last steps."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Queue(nn.Module):
    """Ring buffer of fixed size, saved with its pointer. It is never empty: what was not replaced yet is the start.

    Buffers: ``rows`` (size, *shape), ``pointer`` int64, the next place to be written, ``count`` int64 of the rows that
    were written so far, at most size. They never leave their device.

    Args:
        start: (size, *shape) content until rows are pushed; its type is the type rows are stored in.

    Reference: MoCo (He et al., CVPR 2020), without its condition that the batch divides the size.
    """

    rows: Tensor
    pointer: Tensor
    count: Tensor

    def __init__(self, start: Tensor):
        super().__init__()
        self.register_buffer("rows", start.clone())
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def is_full(self) -> Tensor:
        """Scalar bool: nothing of the start is left."""
        return self.count == self.rows.shape[0]

    @torch.no_grad()
    def push(self, rows: Tensor, valid: Tensor | None = None) -> None:
        """Replace the oldest rows.

        Args:
            rows: (N, *shape), the oldest first; of more than ``size`` the last ones stay.
            valid: (N,) bool; other rows are skipped. None: all of them.
        """
        size = self.rows.shape[0]
        if valid is None:
            valid = torch.ones(rows.shape[0], dtype=torch.bool, device=rows.device)
        for chunk, keep in zip(torch.split(rows, size), torch.split(valid, size), strict=True):
            # How many rows are valid stays on the device: they come first; behind them the old content is written back.
            order = torch.argsort((~keep).int(), stable=True)
            places = (self.pointer + torch.arange(chunk.shape[0], device=rows.device)) % size
            keep = keep[order].reshape(-1, *[1] * (rows.ndim - 1))
            self.rows[places] = torch.where(keep, chunk[order].to(self.rows.dtype), self.rows[places])
            self.pointer.copy_((self.pointer + keep.sum()) % size)
            self.count.copy_((self.count + keep.sum()).clamp(max=size))


def random_unit_rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random vectors of length 1 along the last axis."""
    return F.normalize(torch.randn(shape), dim=-1).to(dtype)
