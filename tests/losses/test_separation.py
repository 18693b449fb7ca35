"""The factorised cosine distance against the double sum over all pairs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_semisup.losses.separation import cosine_distance_to_prototypes


def double_sum(queries, weights, prototypes, prototype_weights):
    """Per class: 1 / (M N) sum_ij w_j u_i (1 - cos), weights normalised to a mean of 1 over what is there."""
    distances = []
    for e, w, z, u in zip(queries, weights, prototypes, prototype_weights, strict=True):
        e, w, z, u = e[w > 0], w[w > 0], z[u > 0], u[u > 0]
        w, u = len(w) * w / w.sum(), len(u) * u / u.sum()
        assert torch.isclose(w.sum(), torch.tensor(float(len(w)), dtype=w.dtype))
        total = 0 * (e.sum() + w.sum() + z.sum() + u.sum())
        for j in range(len(e)):
            for i in range(len(z)):
                total = total + w[j] * u[i] * (1 - e[j] @ z[i] / (e[j].norm() * z[i].norm()))
        distances.append(total / (len(e) * len(z)) if len(e) and len(z) else total)
    return torch.stack(distances)


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(1, 8), st.integers(1, 6), st.integers(0, 999))
def test_equals_the_double_sum_with_its_gradients(classes, m, n, seed):
    torch.manual_seed(seed)
    e, z = torch.randn(classes, m, 4), torch.randn(classes, n, 4)
    w = torch.rand(classes, m) * (torch.rand(classes, m) < 0.7)
    u = torch.rand(classes, n) * (torch.rand(classes, n) < 0.7)
    inputs = [t.requires_grad_(True) for t in (e, w, z, u)]
    mine = cosine_distance_to_prototypes(*inputs)
    slow_inputs = [t.detach().double().requires_grad_(True) for t in inputs]
    slow = double_sum(*slow_inputs)
    torch.testing.assert_close(mine.double(), slow, rtol=1e-6, atol=1e-6)
    pull = torch.randn(classes)
    gradients = torch.autograd.grad((mine * pull).sum(), inputs)
    expected = torch.autograd.grad((slow * pull).sum(), slow_inputs, allow_unused=True)
    for part, gradient, slow_gradient in zip((0, 2), gradients[::2], expected[::2], strict=True):
        slow_gradient = torch.zeros_like(gradient) if slow_gradient is None else slow_gradient.float()
        torch.testing.assert_close(gradient, slow_gradient, rtol=1e-4, atol=1e-5, msg=f"input {part}")
    torch.testing.assert_close(gradients[1][w > 0], expected[1].float()[w > 0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("sign", "expected"), [(1.0, 0.0), (-1.0, 2.0)])
def test_parallel_is_0_and_antiparallel_2(sign, expected):
    direction = torch.randn(4)
    queries = direction * torch.rand(1, 7, 1).add(0.1)
    prototypes = sign * direction * torch.rand(1, 5, 1).add(0.1)
    distance = cosine_distance_to_prototypes(queries, torch.ones(1, 7), prototypes, torch.ones(1, 5))
    assert float(distance) == pytest.approx(expected, abs=1e-6)


@given(st.floats(1e-3, 1e3), st.integers(0, 99))
@settings(max_examples=30)
def test_only_ratios_of_weights_matter_and_the_range_is_0_to_2(factor, seed):
    torch.manual_seed(seed)
    e, z, w, u = torch.randn(2, 9, 4), torch.randn(2, 5, 4), torch.rand(2, 9), torch.rand(2, 5)
    distance = cosine_distance_to_prototypes(e, w, z, u)
    torch.testing.assert_close(cosine_distance_to_prototypes(e, factor * w, z, factor * u), distance)
    assert ((distance >= 0) & (distance <= 2)).all()


def test_a_class_without_queries_or_prototypes_is_0_without_gradient():
    e, z = torch.randn(2, 3, 4, requires_grad=True), torch.zeros(2, 5, 4)
    w, u = torch.tensor([[0.0] * 3, [1.0] * 3]), torch.tensor([[1.0] * 5, [0.0] * 5])
    distance = cosine_distance_to_prototypes(e, w, z, u)
    distance.sum().backward()
    assert distance.tolist() == [0, 0] and not e.grad.any()
