"""The direction of virtual adversarial training against closed forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_semisup.losses.consistency import probabilities, squared_dice
from nnunetv2_semisup.perturbations.adversarial import adversarial_directions, draw_directions


def lengths(directions):
    return torch.linalg.vector_norm(directions.flatten(1).double(), dim=1)


def unit(vectors):
    return vectors / lengths(vectors).float().reshape(-1, *[1] * (vectors.ndim - 1))


@pytest.mark.parametrize("shape", [(3, 2, 5, 6), (2, 1, 4, 5, 6)])
def test_random_directions_are_unit_vectors_of_uniform_noise(shape):
    directions = draw_directions(torch.empty(shape))
    assert directions.shape == shape and directions.dtype == torch.float32
    torch.testing.assert_close(lengths(directions), torch.ones(shape[0]).double(), rtol=1e-6, atol=0)
    assert not torch.equal(directions[0], directions[1])
    many = draw_directions(torch.empty(1, 1, 100, 100)).flatten()
    many = many / many.abs().max()  # uniform in [-1, 1]: mean 0, mean square 1 / 3
    assert abs(float(many.mean())) < 0.03 and float(many.square().mean()) == pytest.approx(1 / 3, abs=0.01)


@settings(max_examples=40)
@given(st.floats(-30, 30), st.sampled_from([1.0, -1.0]), st.booleans(), st.integers(0, 99))
def test_linear_discrepancy_gives_its_slope(exponent, sign, last, seed):
    """Length 1 whatever scale and sign of the discrepancy and wherever in the batch the sample is."""
    torch.manual_seed(seed)
    slope = torch.randn(2, 2, 3, 4)
    factors = torch.tensor([10.0**exponent, 1.0] if last else [1.0, 10.0**exponent]).reshape(2, 1, 1, 1)
    directions, found = adversarial_directions(
        lambda noise: (sign * factors * slope * noise).sum(), draw_directions(slope), 10.0
    )
    assert found.all() and not directions.requires_grad
    torch.testing.assert_close(lengths(directions), torch.ones(2).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(directions, sign * unit(slope), rtol=1e-4, atol=1e-6)


def test_gradient_is_taken_at_the_trial_noise():
    start = draw_directions(torch.empty(2, 1, 4, 4))
    seen = []

    def discrepancy(noise):
        seen.append(noise.detach())
        return (noise**4).sum()

    directions, _ = adversarial_directions(discrepancy, start, 7.0)
    assert len(seen) == 1, "one power iteration"
    torch.testing.assert_close(seen[0], 7 * start)
    torch.testing.assert_close(directions, unit(start**3), rtol=1e-4, atol=1e-6)


def test_loss_scale_does_not_matter_in_fp32():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(4, 3, 1))
    images, start = torch.randn(2, 1, 8, 8), draw_directions(torch.empty(2, 1, 8, 8))
    clean = probabilities(network(images), False).detach()
    for parameter in list(network.parameters())[:2]:
        parameter.grad = torch.ones_like(parameter)

    def discrepancy(noise):
        return squared_dice(probabilities(network(images + noise), False), clean, 1e-5).mean()

    one, found = adversarial_directions(discrepancy, start, 1.0, loss_scale=1.0)
    large, _ = adversarial_directions(discrepancy, start, 1.0, loss_scale=65536.0)
    assert found.all() and not torch.equal(one, start)
    torch.testing.assert_close(one, large, rtol=1e-6, atol=1e-8)
    grads = [p.grad for p in network.parameters()]
    assert all(torch.equal(g, torch.ones_like(g)) for g in grads[:2]) and grads[2:] == [None, None]


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_without_a_usable_gradient_the_random_direction_stays(bad):
    slope = torch.randn(3, 1, 4, 4)
    slope[1, 0, 2, 2] = bad
    if bad == 0:
        slope[1] = 0
    start = draw_directions(slope)
    directions, found = adversarial_directions(lambda noise: (slope * noise).sum(), start, 1.0)
    assert found.tolist() == [True, False, True]
    assert torch.equal(directions[1], start[1]) and torch.isfinite(directions).all()
    torch.testing.assert_close(directions[::2], unit(slope[::2]), rtol=1e-4, atol=1e-6)


def test_half_precision_does_not_flush_it_to_zero():
    """A slope of up to 1e-8 per voxel, as a Dice over millions of voxels has it, passed back through a half tensor."""
    slope = 2 * torch.rand(2, 1, 8, 8) - 1

    def discrepancy(noise):
        return (1e-8 * slope * noise.half().float()).sum()

    start = draw_directions(slope)
    directions, found = adversarial_directions(discrepancy, start, 1.0)
    assert found.all()
    torch.testing.assert_close(directions, unit(slope), rtol=2e-3, atol=1e-4)
    flushed, found = adversarial_directions(discrepancy, start, 1.0, loss_scale=1.0)
    assert not found.any() and torch.equal(flushed, start)
