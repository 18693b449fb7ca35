"""Contrast between two sets of embeddings: each is to recognise its partner among all others."""

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(anchors: Tensor, keys: Tensor, temperature: float, normalize: bool = True) -> Tensor:
    """Mean over groups and rows i of -log(exp(a_i . k_i / t) / sum_j exp(a_i . k_j / t)), in fp32.

    Args:
        anchors: (G, N, F) float; groups do not see each other.
        keys: the same shape; row i is the positive of anchor i, the other rows of the group are its negatives.
        temperature: t, above 0.
        normalize: scale every row to length 1 first, so that products are cosines.

    Returns:
        Scalar, 0 or more; log N if all rows are equal.

    Reference: van den Oord et al., arXiv 1807.03748, equation 4.
    """
    products = _products(anchors, keys, normalize) / temperature
    positives = torch.arange(products.shape[1], device=products.device).expand(products.shape[:2])
    return F.cross_entropy(products.flatten(0, 1), positives.flatten())


def symmetric_info_nce(student: Tensor, teacher: Tensor, temperature: float, normalize: bool = True) -> Tensor:
    """Sum of both directions of :func:`info_nce`: teacher rows seek the student's, student rows the teacher's."""
    return info_nce(teacher, student, temperature, normalize) + info_nce(student, teacher, temperature, normalize)


@torch.no_grad()
def share_matched(student: Tensor, teacher: Tensor) -> Tensor:
    """Share of student rows (G, N, F) whose most similar teacher row, by cosine, is their own; 1 / N by chance."""
    nearest = _products(student, teacher, normalize=True).argmax(2)
    return (nearest == torch.arange(nearest.shape[1], device=nearest.device)).float().mean()


def _products(anchors: Tensor, keys: Tensor, normalize: bool) -> Tensor:
    """(G, N, F) twice -> (G, N, N) float32 of all dot products within a group."""
    with torch.autocast(anchors.device.type, enabled=False):
        anchors, keys = anchors.float(), keys.float()
        if normalize:
            anchors, keys = F.normalize(anchors, dim=2), F.normalize(keys, dim=2)
        return anchors @ keys.transpose(1, 2)
