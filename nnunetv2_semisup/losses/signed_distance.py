"""Regression of signed distance maps."""

import torch
from torch import Tensor


def mean_squared_error_where_known(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of (prediction - target)^2 over the voxels and classes that have a target; 0 if none has.

    Args:
        prediction: (B, classes, X, Y, Z) float, carries the gradient.
        target: the same shape, float32; NaN where there is no target.

    Returns:
        Scalar, 0 or more.
    """
    known = ~torch.isnan(target)
    squares = (prediction.float() - target.nan_to_num()).square() * known
    return squares.sum() / known.sum().clamp(min=1)
