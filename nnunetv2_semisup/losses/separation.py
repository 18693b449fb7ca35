"""Distance of features to the prototypes of their class."""

import torch.nn.functional as F
from torch import Tensor


def cosine_distance_to_prototypes(
    queries: Tensor, query_weights: Tensor, prototypes: Tensor, prototype_weights: Tensor
) -> Tensor:
    """Weighted mean over all pairs of 1 - cosine, per class.

    For class k: sum_ij w_j u_i (1 - cos(e_j, z_i)) / (sum_j w_j sum_i u_i). A cosine is linear in either unit vector,
    so this is 1 minus the product of two weighted means of unit vectors; no matrix of pairs is needed.

    Args:
        queries: (K, M, F) float32, e.
        query_weights: (K, M), w, 0 or more; 0 for places that hold no query. Only their ratios matter.
        prototypes: (K, N, F) float32, z.
        prototype_weights: (K, N), u, likewise.

    Returns:
        (K,) in [0, 2]; 0 without gradient where a class has no query or no prototype.

    Reference: SS-Net (Wu et al., MICCAI 2022), released code; its weights w_j M / sum w give the same.
    """
    distance = 1 - (_mean_direction(queries, query_weights) * _mean_direction(prototypes, prototype_weights)).sum(1)
    return distance * ((query_weights.detach() > 0).any(1) & (prototype_weights.detach() > 0).any(1))


def _mean_direction(vectors: Tensor, weights: Tensor) -> Tensor:
    """(K, N, F), (K, N) -> (K, F): weighted mean of the normalised vectors; 0 if all weights are."""
    total = weights.sum(1, keepdim=True)
    shares = weights / total.where(total > 0, 1.0)
    return (F.normalize(vectors, dim=2) * shares[..., None]).sum(1)
