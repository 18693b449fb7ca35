"""Contrast between two sets of embeddings: each is to recognise its partner among all others."""

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(anchors: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Mean over groups and rows i of -log(exp(cos(a_i, k_i) / t) / sum_j exp(cos(a_i, k_j) / t)), in fp32.

    Args:
        anchors: (G, N, F) float; groups do not see each other.
        keys: the same shape; row i is the positive of anchor i, the other rows of the group are its negatives.
        temperature: t, above 0.

    Returns:
        Scalar, 0 or more; log N if all rows are equal.

    Reference: van den Oord et al., arXiv 1807.03748, equation 4.
    """
    cosines = _cosines(anchors, keys) / temperature
    positives = torch.arange(cosines.shape[1], device=cosines.device).expand(cosines.shape[:2])
    return F.cross_entropy(cosines.flatten(0, 1), positives.flatten())


def symmetric_info_nce(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Sum of both directions of :func:`info_nce`: teacher rows seek the student's, student rows the teacher's."""
    return info_nce(teacher, student, temperature) + info_nce(student, teacher, temperature)


@torch.no_grad()
def share_matched(student: Tensor, teacher: Tensor) -> Tensor:
    """Share of student rows (G, N, F) whose most similar teacher row, by cosine, is their own; 1 / N by chance."""
    nearest = _cosines(student, teacher).argmax(2)
    return (nearest == torch.arange(nearest.shape[1], device=nearest.device)).float().mean()


def _cosines(anchors: Tensor, keys: Tensor) -> Tensor:
    """(G, N, F) twice -> (G, N, N) float32 within each group."""
    with torch.autocast(anchors.device.type, enabled=False):
        return F.normalize(anchors.float(), dim=2) @ F.normalize(keys.float(), dim=2).transpose(1, 2)
