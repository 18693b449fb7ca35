"""Closed forms and invariances of the pair-wise distillation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_semisup.losses.pair_distillation import pair_distillation, voxel_vectors


def cosine(a, b):
    return float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))


def test_against_slow_loops():
    student, teacher = torch.randn(2, 2, 5, 3)
    volumes = []
    for s, t in zip(student, teacher, strict=True):
        total = 0.0
        for j in range(5):
            scores = [math.exp(cosine(s[j], t[k])) for k in range(5)]
            total -= math.log(scores[j] / sum(scores))
        volumes.append(total)
    assert float(pair_distillation(student, teacher)) == pytest.approx(sum(volumes) / 10, rel=1e-5)


def test_orthonormal_features_are_not_zero():
    rows = torch.eye(7).expand(2, 7, 7)
    assert float(pair_distillation(rows, rows)) == pytest.approx(1.16542, abs=5e-6)
    assert float(pair_distillation(rows, rows)) == pytest.approx(math.log(math.e + 6) - 1)


@pytest.mark.parametrize("n", [1, 7, 245])
def test_equal_features_give_log_n(n):
    rows = torch.randn(2, 1, 4).expand(2, n, 4)
    assert float(pair_distillation(rows, rows)) == pytest.approx(math.log(n), abs=1e-5)


@given(st.integers(1, 8), st.integers(1, 4))
def test_scale_and_lower_bound(n, features):
    generator = torch.Generator().manual_seed(n)
    student, teacher = torch.randn(2, 2, n, features, generator=generator)
    scale = torch.rand(2, n, 1, generator=generator) * 5 + 0.1
    value = pair_distillation(student, teacher)
    torch.testing.assert_close(pair_distillation(student * scale, teacher), value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pair_distillation(student, teacher * scale), value, rtol=1e-4, atol=1e-5)
    assert float(value) >= math.log(1 + (n - 1) * math.exp(-2)) - 1e-6


def test_the_lower_bound_is_reached():
    rows = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    assert float(pair_distillation(rows, rows)) == pytest.approx(math.log(1 + math.exp(-2)))


def test_volumes_do_not_see_each_other():
    student, teacher = torch.randn(2, 2, 6, 3)
    apart = [pair_distillation(s[None], t[None]) for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(pair_distillation(student, teacher), sum(apart) / 2)


def test_voxel_vectors():
    features = torch.arange(2 * 3 * 4 * 2 * 2).reshape(2, 3, 4, 2, 2).float()
    rows = voxel_vectors(features, 16)
    assert rows.shape == (2, 16, 3)
    assert torch.equal(rows[1, 5], features[1, :, 1, 0, 1])  # voxel (1, 0, 1) is number 1 * 4 + 0 * 2 + 1
    pooled = voxel_vectors(features, 8)  # the longest axis is halved: means of neighbours along it
    assert pooled.shape == (2, 8, 3)
    assert torch.equal(pooled[1, 3], features[1, :, :2, 1, 1].mean(1))
    assert voxel_vectors(features, 1).shape == (2, 1, 3)
    torch.testing.assert_close(voxel_vectors(features, 1)[:, 0], features.mean((2, 3, 4)))
    assert voxel_vectors(torch.randn(2, 3, 9, 5).half(), 20).shape == (2, 20, 3)
