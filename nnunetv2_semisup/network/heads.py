"""Small heads on feature vectors. Methods keep them beside the network, never in it: prediction rebuilds only that."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaskedBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm1d whose batch statistics are those of the valid rows alone.

    For rows in arrays of fixed size of which only some are filled: with ``valid`` it equals ``BatchNorm1d`` in training
    mode on ``rows[valid]``, running statistics included, without the boolean index, whose size the GPU would have to
    report to the host. The other rows are normalised likewise, by statistics that they have no part in. One valid row
    is normalised to the bias, none changes nothing. Without ``valid`` it uses the running statistics, whatever the
    mode. Other processes are not asked: a class seen by one of them would hang them.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

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


class SignedDistanceHead(nn.Module):
    """1x1x1 convolution with bias, then tanh.

    Args:
        in_features: channels of the decoder's last features.
        classes: maps to predict, one per foreground class or region.
        dimensions: 2 or 3.

    Reference: the regression branch of SASSNet (Li et al., MICCAI 2020) and DTC (Luo et al., AAAI 2021).
    """

    def __init__(self, in_features: int, classes: int, dimensions: int):
        super().__init__()
        self.convolution = (nn.Conv3d if dimensions == 3 else nn.Conv2d)(in_features, classes, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(B, in_features, X, Y, Z) to (B, classes, X, Y, Z) float32 in [-1, 1]."""
        return torch.tanh(self.convolution(features).float())


class SliceProjection(nn.Module):
    """One vector per 2D slice: AlphaDropout, adaptive average pooling, then linear layers with ReLU between them.

    The dropout is the augmentation, so it is drawn anew at every call, in evaluation mode as well.

    Args:
        dropout: probability of a voxel to be set to SELU's lower limit, in [0, 1); mean and variance are kept.
        pool_size: rows and columns of the pooled slice; smaller slices are enlarged.
        hidden: widths of the hidden layers.
        out_features: length of the vector.

    Reference: SimCVD (You et al., IEEE TMI 2022), figure 1, sections III-D and IV-B.
    """

    def __init__(self, dropout: float, pool_size: tuple[int, int], hidden: tuple[int, ...], out_features: int):
        super().__init__()
        self.dropout = dropout
        self.pool_size = pool_size
        widths = [math.prod(pool_size), *hidden]
        layers = [part for pair in itertools.pairwise(widths) for part in (nn.Linear(*pair), nn.ReLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], out_features))

    def forward(self, slices: Tensor) -> Tensor:
        """(..., H, W) float32 to (..., out_features)."""
        # Contiguous: the mask follows the order in memory, which differs between precisions.
        dropped = F.alpha_dropout(slices.contiguous(), self.dropout, training=True)
        pooled = F.adaptive_avg_pool2d(dropped.flatten(0, -3), self.pool_size)
        return self.layers(pooled.flatten(1)).unflatten(0, slices.shape[:-2])
