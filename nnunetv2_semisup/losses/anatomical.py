"""Voxel contrast between anatomical classes: hard queries, class means, negatives from similar classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def draw_voxels(members: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Uniform draws with replacement among the voxels of each class.

    Args:
        members: (K, N) bool, the voxels of each class.
        size: draws per class.

    Returns:
        (K, size) int64 positions; and (K,) bool, False for classes without a voxel (their positions mean nothing).
    """
    # The r-th True is the first position of rank r, from 1. Row by row: a GPU scans one long row with all of its cores.
    ranks = torch.stack([row.cumsum(0, dtype=torch.int32) for row in members])
    counts = ranks[:, -1:]
    draws = (torch.rand(members.shape[0], size, device=members.device) * counts).int()
    positions = torch.searchsorted(ranks, torch.minimum(draws + 1, counts))
    return positions.clamp(max=members.shape[1] - 1), counts[:, 0] > 0


def negative_class_probabilities(means: Tensor, present: Tensor, temperature: float) -> Tensor:
    """(K, K): row c, the probability that a negative of class c is of class v: softmax of cosine / temperature.

    Args:
        means: (K, F) float32 class means.
        present: (K,) bool; other classes, and c itself, have the probability 0. Rows without any other class are 0.
        temperature: above 0.
    """
    unit = F.normalize(means, dim=1)
    allowed = present & ~torch.eye(len(present), dtype=torch.bool, device=present.device)
    logits = torch.where(allowed, unit @ unit.T / temperature, -torch.inf)
    return torch.softmax(logits, 1).nan_to_num(0.0)  # rows without any other class are NaN


def draw_negatives(probabilities: Tensor, queries: int, negatives: int, pool: int) -> Tensor:
    """(queries, negatives) int64 into the flattened (K * pool) candidates: first the class, then one of its candidates.

    Args:
        probabilities: (K,) of the classes.
        queries, negatives: numbers to draw.
        pool: candidates per class.
    """
    shape, device = (queries, negatives), probabilities.device
    steps = probabilities.cumsum(0)
    # Within (0, total]: a class of probability 0 is never the first to reach it.
    level = (1 - torch.rand(shape, device=device)) * steps[-1]
    classes = torch.searchsorted(steps, level).clamp(max=len(steps) - 1)
    return classes * pool + torch.randint(pool, shape, device=device)


def query_contrast(positive: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """(Q,): -log(exp(p / t) / (exp(p / t) + sum_n exp(n / t))) for cosines p (Q,) and n (Q, N)."""
    logits = torch.cat((positive[:, None], negatives), 1) / temperature
    return torch.logsumexp(logits, 1) - logits[:, 0]


def anatomical_contrast(
    queries: Tensor,
    has_queries: Tensor,
    means: Tensor,
    candidates: Tensor,
    present: Tensor,
    temperature: float,
    negatives: int,
    class_temperature: float,
) -> Tensor:
    """Sum over classes of the mean over queries of :func:`query_contrast`, over the number of classes present.

    Positive is the class mean. A negative's class is drawn by :func:`negative_class_probabilities`, its voxel uniformly
    from the class's candidates. All similarities are cosines, in fp32. Only the queries carry a gradient.

    Args:
        queries: (K, Q, F) float.
        has_queries: (K,) bool; classes without contribute 0.
        means: (K, F) class means.
        candidates: (K, P, F) uniform draws from each class; their embeddings as negatives.
        present: (K,) bool, classes with any voxel; fewer than two give exactly 0.
        temperature: of the contrast, above 0.
        negatives: per query.
        class_temperature: of the classes of negatives, above 0.

    Returns:
        Scalar, 0 or more.

    Reference: ACTION (You et al., IPMI 2023), after ReCo (Liu et al., ICLR 2022). Deviation: the queries of a step
    share the candidates; published code draws each query's negatives anew, which needs K * Q * N * F values.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries = F.normalize(queries.float(), dim=2)
        means = F.normalize(means.detach().float(), dim=1)
        pool = candidates.shape[1]
        flat = F.normalize(candidates.detach().float(), dim=2).flatten(0, 1)
        shares = negative_class_probabilities(means, present, class_temperature)
        values = []
        for unit, mean, share in zip(queries, means, shares, strict=True):
            drawn = draw_negatives(share, len(unit), negatives, pool)
            values.append(query_contrast(unit @ mean, (unit @ flat.T).gather(1, drawn), temperature).mean())
        count = present.sum()
        counted = present & has_queries & (count >= 2)
        return torch.where(counted, torch.stack(values), 0.0).sum() / count.clamp(min=1)


def adaptive_anatomical_contrast(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    queue: Tensor,
    queue_labels: Tensor,
    centres: Tensor,
    temperature: float,
    centre_weight: float,
) -> Tensor:
    """-(1/n) sum_i (1/n_i) (sum over positives log p + centre_weight log p(centre of i's class)), in fp32.

    p is the softmax of cosine / temperature over: the voxel's teacher embedding, the whole queue, all centres.
    Positives: the teacher embedding and queue rows of the same class; n_i is their number + 1.

    Args:
        student: (n, F) float, carries the gradient.
        teacher: (n, F), the same voxels.
        labels: (n,) int64 classes from 0; -1 rows do not count. Without any other the value is 0.
        queue: (M, F) earlier teacher embeddings.
        queue_labels: (M,) int64; -1: a negative for everyone.
        centres: (K, F), row c the centre of class c.
        temperature: above 0.
        centre_weight: lambda_a.

    Returns:
        Scalar, 0 or more.

    Reference: ACTION++ (You et al., MICCAI 2023), after TSC (Li et al., CVPR 2022), whose 1 / n_i the paper omits.
    """
    with torch.autocast(student.device.type, enabled=False):
        student = F.normalize(student.float(), dim=1) / temperature
        teacher, queue, centres = (F.normalize(x.detach().float(), dim=1) for x in (teacher, queue, centres))
        own = (student * teacher).sum(1)
        # The n * M products are the largest array of the step: in parts, made again in the backward pass.
        parts = [
            checkpoint(_log_sum_exp, part, queue, use_reentrant=False, preserve_rng_state=False)
            for part in torch.split(student, 128)
        ]
        total = torch.logaddexp(own, torch.cat(parts))
        total = torch.logaddexp(total, torch.logsumexp(student @ centres.T, 1))
        classes = torch.arange(len(centres), device=labels.device)
        queued = (queue_labels == classes[:, None]).float()  # (K, M)
        valid, c = labels >= 0, labels.clamp(min=0)
        # The sum of the positives' products is the product with their sum.
        positives = 1 + queued.sum(1)[c]
        similar = own + (student * (queued @ queue)[c]).sum(1)
        to_centre = (student * centres[c]).sum(1)
        log_p = similar - positives * total + centre_weight * (to_centre - total)
        losses = torch.where(valid, -log_p / (positives + 1), 0.0)
        return losses.sum() / valid.sum().clamp(min=1)


def _log_sum_exp(rows: Tensor, others: Tensor) -> Tensor:
    """(n, F), (M, F) -> (n,): log of the sum over ``others`` of exp of the product."""
    return torch.logsumexp(rows @ others.T, 1)
