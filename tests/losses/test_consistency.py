import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_semisup.losses.consistency import (
    agreement,
    decide,
    joint_linear_dice,
    mean_squared_difference,
    probabilities,
    squared_dice,
    weighted_mean,
)


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
    assert float(mean_squared_difference(a, b, torch.ones(3))) == pytest.approx(slow, rel=1e-5)
    assert float(mean_squared_difference(a, a, torch.ones(3))) == 0
    opposite = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert float(mean_squared_difference(*opposite, torch.ones(2))) == 1
    assert float(mean_squared_difference(*opposite, torch.tensor([0.0, 0.5]))) == 0.25


def test_weighted_mean_counts_present_heads_alone():
    values, weights = torch.tensor([0.2, 0.4, 0.9]), torch.tensor([1.0, 0.5, 1.0])
    assert float(weighted_mean(values, weights)) == pytest.approx(1.3 / 3)
    assert float(weighted_mean(values, weights, torch.tensor([True, True, False]))) == pytest.approx(0.2)
    assert float(weighted_mean(values, weights, torch.zeros(3, dtype=torch.bool))) == 0


def test_agreement():
    student = torch.tensor([[[0.9, 0.2, 0.4], [0.1, 0.8, 0.6]]])  # (1, 2 heads, 3 voxels)
    teacher = torch.tensor([[[0.6, 0.7, 0.1], [0.4, 0.3, 0.9]]])
    assert float(agreement(student, teacher, regions=False)) == pytest.approx(2 / 3)
    assert float(agreement(student, teacher, regions=True)) == pytest.approx(4 / 6)


def test_decide():
    p = torch.rand(2, 3, 4, 5)
    assert torch.equal(decide(p, False), p.argmax(1)) and torch.equal(decide(p, True), p > 0.5)


def slow_squared_dice(p, q, smooth):
    losses = []
    for c in range(p.shape[1]):
        pc, qc = p[:, c].double().flatten().tolist(), q[:, c].double().flatten().tolist()
        overlap = sum(a * b for a, b in zip(pc, qc, strict=True))
        sizes = sum(a * a for a in pc) + sum(b * b for b in qc)
        losses.append(1 - (2 * overlap + smooth) / (sizes + smooth))
    return sum(losses) / len(losses)


@settings(max_examples=30)
@given(st.integers(2, 4), st.sampled_from([(3, 4), (3, 4, 2)]), st.booleans(), st.integers(0, 99))
def test_dice_between_predictions(heads, shape, regions, seed):
    torch.manual_seed(seed)
    p, q = (probabilities(2 * torch.randn(2, heads, *shape), regions) for _ in range(2))
    for smooth in (1e-5, 1.0):
        assert float(squared_dice(p, q, smooth).mean()) == pytest.approx(slow_squared_dice(p, q, smooth), abs=1e-6)
    linear = 1 - (2 * (p * q).sum() + 1.0) / (p.sum() + q.sum() + 1.0)
    ones = torch.ones(heads)
    assert float(joint_linear_dice(p, q, 1.0, ones)) == pytest.approx(float(linear), abs=1e-6)
    first = 1 - (2 * (p[:, 0] * q[:, 0]).sum() + 1.0) / (p[:, 0].sum() + q[:, 0].sum() + 1.0)
    assert float(joint_linear_dice(p, q, 1.0, torch.eye(heads)[0])) == pytest.approx(float(first), abs=1e-6)
    if not regions:  # softmax: 1 - mean over voxels of sum_c p_c q_c
        assert float(joint_linear_dice(p, q, 1e-8, ones)) == pytest.approx(float(1 - (p * q).sum(1).mean()), abs=1e-6)


def test_a_class_that_is_absent_in_both_costs_nothing():
    p = torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1).expand(1, 2, 3, 3)
    assert squared_dice(p, p, 1e-5).tolist() == [0, 0]


def test_equal_predictions():
    """The squared Dice is 0 and flat; the linear one is 1 - mean sum_c p_c^2, 0 only if every voxel is certain."""
    p = probabilities(torch.randn(2, 3, 5, 5), False).requires_grad_(True)
    equal = squared_dice(p, p.detach(), 1e-5).mean()
    equal.backward()
    assert abs(equal.item()) < 1e-6 and float(p.grad.abs().max()) < 1e-6
    linear = joint_linear_dice(p, p.detach(), 1e-8, torch.ones(3)).item()
    assert linear == pytest.approx((1 - p.square().sum(1).mean()).item(), abs=1e-6) and linear > 0.1
    certain = torch.nn.functional.one_hot(p.argmax(1), 3).movedim(-1, 1).float()
    assert float(joint_linear_dice(certain, certain, 1e-8, torch.ones(3))) == pytest.approx(0, abs=1e-6)
