import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_semisup.losses.consistency import agreement, mean_squared_difference, probabilities


@given(st.integers(1, 3), st.integers(1, 4), st.booleans(), st.sampled_from([2, 3]))
def test_probabilities(batch, heads, regions, dim):
    logits = torch.randn(batch, heads, *[3] * dim, dtype=torch.float16)
    p = probabilities(logits, regions)
    assert p.dtype == torch.float32 and p.shape == logits.shape and bool(((p >= 0) & (p <= 1)).all())
    if not regions:
        torch.testing.assert_close(p.sum(1), torch.ones_like(p[:, 0]))


def test_mean_squared_difference_against_a_loop_and_closed_form():
    a, b = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    slow = sum((float(x) - float(y)) ** 2 for x, y in zip(a.flatten(), b.flatten(), strict=True)) / a.numel()
    assert float(mean_squared_difference(a, b)) == pytest.approx(slow, rel=1e-5)
    assert float(mean_squared_difference(a, a)) == 0
    opposite = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert float(mean_squared_difference(*opposite)) == 1


def test_agreement():
    student = torch.tensor([[[0.9, 0.2, 0.4], [0.1, 0.8, 0.6]]])  # (1, 2 heads, 3 voxels)
    teacher = torch.tensor([[[0.6, 0.7, 0.1], [0.4, 0.3, 0.9]]])
    assert float(agreement(student, teacher, regions=False)) == pytest.approx(2 / 3)
    assert float(agreement(student, teacher, regions=True)) == pytest.approx(4 / 6)
