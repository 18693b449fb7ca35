"""Small heads on feature vectors. Methods keep them beside the network, never in it: prediction rebuilds only that."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaskedBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm1d whose batch statistics are those of the valid rows alone.

    For rows in arrays of fixed size of which only some are filled: with ``valid`` it equals ``BatchNorm1d`` in training
    mode on ``rows[valid]``, running statistics included, without the boolean index, whose size the GPU would have to
    report to the host. One valid row is normalised to the bias, none changes nothing. Without ``valid`` it uses the
    running statistics, whatever the mode. Other processes are not asked: a class seen by one of them would hang them.
    """

    def forward(self, rows: Tensor, valid: Tensor | None = None) -> Tensor:
        """Normalise ``rows`` (N, F) float32; ``valid`` (N,) bool or None."""
        if valid is None:
            return F.batch_norm(rows, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        valid = valid.to(rows.dtype)[:, None]
        count = valid.sum()
        mean = (rows * valid).sum(0) / count.clamp(min=1)
        variance = ((rows - mean).square() * valid).sum(0) / count.clamp(min=1)
        with torch.no_grad():
            momentum = self.momentum * (count > 1).to(rows.dtype)
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), momentum)
            self.num_batches_tracked += count > 1
        return (rows - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias


class MLPHead(nn.Module):
    """Linear, batch norm over the valid rows, ReLU or LeakyReLU, Linear.

    Args:
        in_features, hidden_features, out_features: channels.
        negative_slope: of the LeakyReLU; 0 is a ReLU.
    """

    def __init__(self, in_features: int, hidden_features: int, out_features: int, negative_slope: float = 0.0):
        super().__init__()
        self.first = nn.Linear(in_features, hidden_features)
        self.norm = MaskedBatchNorm1d(hidden_features)
        self.last = nn.Linear(hidden_features, out_features)
        self.negative_slope = negative_slope

    def forward(self, rows: Tensor, valid: Tensor | None = None) -> Tensor:
        """(N, in) float32 to (N, out); ``valid`` as in :class:`MaskedBatchNorm1d`: None uses running statistics."""
        return self.last(F.leaky_relu(self.norm(self.first(rows), valid), self.negative_slope))
