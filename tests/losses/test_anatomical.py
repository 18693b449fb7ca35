"""Voxel contrasts of ACTION and ACTION++: closed-form values, sampling, slow loops, gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from nnunetv2_semisup.losses.anatomical import (
    adaptive_anatomical_contrast,
    anatomical_contrast,
    draw_negatives,
    draw_voxels,
    negative_class_probabilities,
    query_contrast,
)

BOTH = torch.tensor([True, True])


def contrast(queries, means, candidates, present=BOTH, has_queries=BOTH, negatives=512):
    return anatomical_contrast(queries, has_queries, means, candidates, present, 0.5, negatives, 0.5)


def test_query_at_the_mean_with_orthogonal_or_equal_negatives():
    """Two classes: all negatives of one are candidates of the other."""
    axes = torch.eye(4)[:2]
    apart = contrast(axes[:, None].repeat(1, 256, 1), axes, axes[:, None].repeat(1, 9, 1))
    assert float(apart) == pytest.approx(math.log(1 + 512 * math.exp(-2)), abs=1e-4)
    assert float(apart) == pytest.approx(4.25265, abs=1e-4)
    equal = axes[:1].repeat(2, 1)
    together = contrast(equal[:, None].repeat(1, 256, 1), equal, equal[:, None].repeat(1, 9, 1))
    assert float(together) == pytest.approx(math.log(513), abs=1e-4) == pytest.approx(6.24028, abs=1e-4)


def test_query_contrast_equals_cross_entropy():
    positive, negatives = torch.randn(7), torch.randn(7, 5)
    expected = F.cross_entropy(
        torch.cat((positive[:, None], negatives), 1) / 0.3, torch.zeros(7, dtype=torch.int64), reduction="none"
    )
    torch.testing.assert_close(query_contrast(positive, negatives, 0.3), expected)


def test_exactly_zero_without_a_second_class_or_without_hard_voxels():
    queries, means, candidates = torch.randn(2, 8, 4), torch.randn(2, 4), torch.randn(2, 8, 4)
    for present, has_queries in (([True, False], [True, True]), ([False] * 2, [True] * 2), ([True] * 2, [False] * 2)):
        queries.requires_grad_().grad = None
        value = contrast(queries, means, candidates, torch.tensor(present), torch.tensor(has_queries))
        value.backward()
        assert value.item() == 0 and not queries.grad.any()


def test_a_class_without_hard_voxels_counts_as_present():
    """Its share of the mean over classes is 0."""
    axes = torch.eye(4)[:2]
    arguments = axes[:, None].repeat(1, 6, 1), axes, axes[:, None].repeat(1, 9, 1)
    both, one = contrast(*arguments), contrast(*arguments, has_queries=torch.tensor([True, False]))
    torch.testing.assert_close(one, both / 2)


def test_invariant_to_the_length_of_queries_and_negatives():
    queries, means, candidates = torch.randn(3, 16, 8), torch.randn(3, 8), torch.randn(3, 32, 8)
    three = torch.tensor([True] * 3)
    values = []
    for scale_q, scale_n in ((torch.ones(3, 16, 1), torch.ones(3, 32, 1)), (torch.rand(3, 16, 1) + 0.1, 7.0)):
        torch.manual_seed(3)
        values.append(contrast(queries * scale_q, means, candidates * scale_n, three, three))
    torch.testing.assert_close(*values)


def test_only_queries_get_a_gradient():
    queries, means, candidates = (torch.randn(s, requires_grad=True) for s in ((2, 8, 4), (2, 4), (2, 9, 4)))
    contrast(queries, means, candidates).backward()
    assert queries.grad.abs().sum() > 0 and means.grad is None and candidates.grad is None


def test_voxels_are_drawn_uniformly_from_their_class():
    members = torch.zeros(3, 50, dtype=torch.bool)
    members[0, [3, 17, 49]] = members[1, 0] = True
    drawn, present = draw_voxels(members, 30_000)
    assert present.tolist() == [True, True, False] and drawn.shape == (3, 30_000)
    assert drawn[1].unique().tolist() == [0] and (drawn >= 0).all() and (drawn < 50).all()
    shares = torch.bincount(drawn[0], minlength=50)[[3, 17, 49]] / 30_000
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3), rtol=0, atol=0.02)


def test_negative_classes_follow_their_similarity():
    """Equal similarities: 1/2 each; a nearer class more often, as softmax(G / 0.5) says; absent ones and c never."""
    present = torch.tensor([True, True, True, False])
    equal = negative_class_probabilities(torch.eye(4), present, 0.5)
    torch.testing.assert_close(equal[0], torch.tensor([0, 0.5, 0.5, 0]))
    means = torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [0, 1, 0], [1, 1, 1]])
    shares = negative_class_probabilities(means, present, 0.5)[0]
    expected = torch.softmax(torch.tensor([0.8, 0.0]) / 0.5, 0)
    torch.testing.assert_close(shares[1:3], expected)
    drawn = draw_negatives(shares, 300, 512, pool=11)
    assert drawn.shape == (300, 512)
    counts = torch.bincount(drawn.flatten(), minlength=44).reshape(4, 11) / drawn.numel()
    assert not counts[0].any() and not counts[3].any()
    torch.testing.assert_close(counts.sum(1)[1:3], expected, rtol=0, atol=0.01)
    torch.testing.assert_close(counts[1], expected[:1].expand(11) / 11, rtol=0.05, atol=0)
    alone = negative_class_probabilities(means, torch.tensor([True, False, False, False]), 0.5)
    assert not alone[0].any() and torch.isfinite(alone).all()


def slow_adaptive(student, teacher, labels, queue, queue_labels, centres, tau, weight):
    total, n = 0.0, 0
    for phi, own, label in zip(student, teacher, labels.tolist(), strict=True):
        if label < 0:
            continue
        others = torch.cat((own[None], queue, centres))
        log_p = torch.log_softmax(F.cosine_similarity(phi[None], others) / tau, 0)
        positives = [0, *(1 + j for j, q in enumerate(queue_labels.tolist()) if q == label)]
        total += (log_p[positives].sum() + weight * log_p[1 + len(queue) + label]) / (len(positives) + 1)
        n += 1
    return -total / n


def adaptive_case(queue_labels):
    student, teacher = torch.randn(6, 8), torch.randn(6, 8)
    return student, teacher, torch.tensor([0, 1, 2, -1, 1, 0]), torch.randn(9, 8), queue_labels, torch.randn(3, 8)


def test_adaptive_contrast_equals_a_slow_loop():
    case = adaptive_case(torch.tensor([0, 0, 1, -1, 2, 2, 2, 1, -1]))
    torch.testing.assert_close(adaptive_anatomical_contrast(*case, 0.1, 0.2), slow_adaptive(*case, 0.1, 0.2))


def test_adaptive_contrast_with_an_empty_queue_is_half_info_nce():
    student, teacher, labels, queue, queue_labels, centres = adaptive_case(torch.full((9,), -1))
    value = adaptive_anatomical_contrast(student, teacher, labels, queue, queue_labels, centres, 0.1, 0.0)
    valid = labels >= 0
    others = torch.cat((queue, centres))
    logits = torch.cat(
        (
            F.cosine_similarity(student, teacher)[:, None],
            F.cosine_similarity(student[:, None], others[None], dim=2),
        ),
        1,
    )
    info_nce = F.cross_entropy(logits[valid] / 0.1, torch.zeros(int(valid.sum()), dtype=torch.int64))
    torch.testing.assert_close(value, info_nce / 2)


def test_adaptive_contrast_moves_the_student_alone_and_is_zero_without_labels():
    student, teacher, labels, queue, queue_labels, centres = adaptive_case(torch.randint(0, 3, (9,)))
    for x in (student, teacher, queue, centres):
        x.requires_grad_()
    adaptive_anatomical_contrast(student, teacher, labels, queue, queue_labels, centres, 0.1, 0.2).backward()
    assert student.grad[labels >= 0].any(1).all() and not student.grad[3].any()
    assert teacher.grad is None and queue.grad is None and centres.grad is None
    none = adaptive_anatomical_contrast(student, teacher, torch.full((6,), -1), queue, queue_labels, centres, 0.1, 0.2)
    assert none.item() == 0
