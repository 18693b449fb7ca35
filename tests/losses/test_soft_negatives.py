"""ACTION's distillation: closed-form values, invariances, a slow loop, gradients."""

import math

import pytest
import torch

from nnunetv2_semisup.losses.soft_negatives import soft_negative_distillation


def rows(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_zero_for_equal_embeddings_and_temperatures_only():
    x, anchors = rows(3, 4, 8), rows(6, 4, 8)
    loss, alike = soft_negative_distillation(x, x, anchors, 0.1, 0.1)
    assert abs(loss) < 1e-6 and alike == 1
    assert soft_negative_distillation(x, x, anchors, 0.1, 0.01)[0] > 1e-3
    equal = anchors[:1].expand(6, -1, -1)  # all similarities alike: every temperature gives the same distribution
    assert abs(soft_negative_distillation(x, x, equal, 0.1, 0.01)[0]) < 1e-6


@pytest.mark.parametrize(("tau_t", "expected"), [(0.01, 2.2697e-4), (0.6, 3.38276)])
def test_query_equal_to_one_of_six_orthonormal_anchors(tau_t, expected):
    anchors = torch.eye(6)[:, None]
    loss, _ = soft_negative_distillation(anchors[:1], anchors[:1], anchors, 0.1, tau_t)
    assert float(loss) == pytest.approx(expected, rel=1e-3)
    p_t, p_s = (1 / (1 + 5 * math.exp(-1 / tau)) for tau in (tau_t, 0.1))
    closed = p_t * math.log(p_t / p_s) + (1 - p_t) * math.log((1 - p_t) / (1 - p_s)) if p_t < 1 else -math.log(p_s)
    assert float(loss) == pytest.approx(closed, rel=1e-3)


def test_equals_a_slow_loop():
    student, teacher, anchors = rows(2, 3, 5), rows(2, 3, 6)[..., :5], rows(4, 3, 5)
    total = 0.0
    for b in range(2):
        for p in range(3):
            cos = torch.nn.functional.cosine_similarity
            s = torch.stack([cos(student[b, p], anchors[k, p], dim=0) for k in range(4)]) / 0.1
            t = torch.stack([cos(teacher[b, p], anchors[k, p], dim=0) for k in range(4)]) / 0.05
            p_t, p_s = t.softmax(0), s.softmax(0)
            total += float((p_t * (p_t / p_s).log()).sum())
    loss, _ = soft_negative_distillation(student, teacher, anchors, 0.1, 0.05)
    assert float(loss) == pytest.approx(total / 6, rel=1e-4)


def test_invariant_to_lengths_and_to_the_order_of_anchors():
    student, teacher, anchors = rows(2, 3, 8), rows(2, 3, 9)[..., :8], rows(6, 3, 8)
    expected, _ = soft_negative_distillation(student, teacher, anchors, 0.1, 0.01)
    scaled = (x * (0.1 + 5 * torch.rand(*x.shape[:2], 1)) for x in (student, teacher, anchors[torch.randperm(6)]))
    torch.testing.assert_close(soft_negative_distillation(*scaled, 0.1, 0.01)[0], expected, rtol=1e-4, atol=1e-6)


def test_one_anchor_for_all_windows_is_the_same_anchor_at_each():
    student, teacher, anchors = rows(2, 3, 8), rows(2, 3, 9)[..., :8], rows(6, 1, 8)
    pooled, _ = soft_negative_distillation(student, teacher, anchors, 0.1, 0.01)
    torch.testing.assert_close(
        pooled, soft_negative_distillation(student, teacher, anchors.repeat(1, 3, 1), 0.1, 0.01)[0]
    )


def test_the_student_alone_gets_a_gradient():
    student, teacher, anchors = (rows(*s).requires_grad_() for s in ((2, 3, 8), (2, 3, 9), (6, 3, 8)))
    loss, _ = soft_negative_distillation(student, teacher[..., :8], anchors.detach().half(), 0.1, 0.01)
    loss.backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None and torch.isfinite(student.grad).all()
