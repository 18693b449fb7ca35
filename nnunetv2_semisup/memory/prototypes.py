"""A few feature vectors per class, replaced as a whole whenever the class is seen."""

import torch
from torch import Tensor, nn


class PrototypeMemory(nn.Module):
    """Buffers ``rows`` (K, size, F) float32 and ``count`` (K,) int64, both saved; rows from ``count`` on are zero.

    Args:
        classes: K.
        size: most prototypes per class.
        features: F.

    Reference: SS-Net (Wu et al., MICCAI 2022), after Alonso et al. (ICCV 2021) without its queue.
    """

    rows: Tensor
    count: Tensor

    def __init__(self, classes: int, size: int, features: int):
        super().__init__()
        self.size = size
        self.register_buffer("rows", torch.zeros(classes, size, features))
        self.register_buffer("count", torch.zeros(classes, dtype=torch.int64))

    def filled(self) -> Tensor:
        """(K, size) bool: which rows hold a prototype."""
        return torch.arange(self.size, device=self.count.device) < self.count[:, None]

    @torch.no_grad()
    def update(self, candidates: Tensor, valid: Tensor, scores: Tensor) -> None:
        """Replace each class by its candidates, the best ones if there are more than fit; without any it stays.

        Args:
            candidates: (K, S, F) float.
            valid: (K, S) bool; other candidates do not exist.
            scores: (K, S) float, finite; the highest are kept.
        """
        best = torch.where(valid, scores, float("-inf")).topk(min(self.size, valid.shape[1]), dim=1).indices
        best = best[..., None].expand(-1, -1, self.rows.shape[2])
        rows = torch.zeros_like(self.rows)
        rows[:, : best.shape[1]] = torch.where(valid[..., None], candidates, 0.0).gather(1, best)
        seen = valid.any(1)
        self.rows.copy_(torch.where(seen[:, None, None], rows, self.rows))
        self.count.copy_(torch.where(seen, valid.sum(1).clamp(max=self.size), self.count))
