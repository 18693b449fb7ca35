"""Closed forms and a slow loop for the contrast between two sets of embeddings."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_semisup.losses.contrastive import info_nce, share_matched, symmetric_info_nce


def slow_info_nce(anchors, keys, temperature):
    losses = []
    for group_a, group_k in zip(anchors.double(), keys.double(), strict=True):
        group_a, group_k = (x / x.norm(dim=1, keepdim=True) for x in (group_a, group_k))
        for i, a in enumerate(group_a):
            scores = [math.exp(float(a @ k) / temperature) for k in group_k]
            losses.append(-math.log(scores[i] / sum(scores)))
    return sum(losses) / len(losses)


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), st.sampled_from([0.1, 0.5, 2.0]))
def test_equals_a_slow_loop(groups, rows, features, temperature):
    generator = torch.Generator().manual_seed(rows)
    anchors, keys = torch.randn(2, groups, rows, features, generator=generator)
    value = float(info_nce(anchors, keys, temperature))
    assert value == pytest.approx(slow_info_nce(anchors, keys, temperature), rel=1e-4, abs=1e-5)
    both = value + slow_info_nce(keys, anchors, temperature)
    assert float(symmetric_info_nce(keys, anchors, temperature)) == pytest.approx(both, rel=1e-4, abs=1e-5)


def test_equal_orthonormal_rows():
    rows = torch.eye(7)[None]
    assert float(info_nce(rows, rows, 0.5)) == pytest.approx(0.59444, abs=5e-6)
    assert float(info_nce(rows, rows, 0.5)) == pytest.approx(math.log(1 + 6 * math.exp(-2)))
    assert float(symmetric_info_nce(rows, rows, 0.5)) == pytest.approx(1.18888, abs=5e-6)


@pytest.mark.parametrize("rows", [1, 2, 160])
def test_collapse_is_log_n(rows):
    equal = torch.randn(1, 1, 5).expand(2, rows, 5)
    assert float(info_nce(equal, equal, 0.5)) == pytest.approx(math.log(rows), abs=1e-5)
    assert float(symmetric_info_nce(equal, equal, 0.5)) == pytest.approx(2 * math.log(rows), abs=1e-5)


def test_symmetries():
    student, teacher = torch.randn(2, 3, 8, 5)
    value = symmetric_info_nce(student, teacher, 0.5)
    torch.testing.assert_close(symmetric_info_nce(teacher, student, 0.5), value)
    order = torch.randperm(8)
    torch.testing.assert_close(symmetric_info_nce(student[:, order], teacher[:, order], 0.5), value)
    other = symmetric_info_nce(student[:, order], teacher, 0.5)
    assert not torch.allclose(other, value)
    scale = torch.rand(3, 8, 1) * 10 + 0.1
    torch.testing.assert_close(symmetric_info_nce(student * scale, teacher, 0.5), value)
    torch.testing.assert_close(symmetric_info_nce(student, teacher * scale, 0.5), value)


def test_in_fp32_under_autocast():
    """In half precision the squares of rows of length 1000 would be infinite."""
    student, teacher = 1000 * F.normalize(torch.randn(2, 1, 6, 4), dim=3)
    student.requires_grad_()
    with torch.autocast("cpu", torch.float16):
        value = symmetric_info_nce(student, teacher, 0.5)
        rounded = symmetric_info_nce(student.half(), teacher.half(), 0.5)
    assert value.dtype == rounded.dtype == torch.float32
    assert torch.equal(value, symmetric_info_nce(student, teacher, 0.5))
    torch.testing.assert_close(rounded, value, rtol=1e-2, atol=1e-2)
    value.backward()
    assert torch.isfinite(student.grad).all()


def test_gradient_pulls_partners_together():
    student, teacher = torch.randn(2, 1, 6, 4)
    student.requires_grad_()
    value = symmetric_info_nce(student, teacher, 0.5)
    value.backward()
    with torch.no_grad():
        assert symmetric_info_nce(student - 0.1 * student.grad, teacher, 0.5) < value


def test_share_matched():
    rows = torch.eye(4)[None]
    assert float(share_matched(rows, rows)) == 1
    assert float(share_matched(rows, rows[:, [1, 0, 2, 3]])) == 0.5
