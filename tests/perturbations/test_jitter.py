"""Brightness, contrast and blur against the formula, their ranges, and what they leave alone."""

import pytest
import torch

from nnunetv2_semisup.perturbations.image import gaussian_blur
from nnunetv2_semisup.perturbations.jitter import Jitter, apply_jitter, draw_jitter


@pytest.mark.parametrize("shape", [(6, 7, 8), (7, 8)])
def test_equals_the_formula_sample_by_sample(shape):
    images = torch.randn(4, 2, *shape)
    before = images.clone()
    jitter = draw_jitter(images, 1.0, 0.25, 0.5)
    result = apply_jitter(images, jitter)
    for b in range(4):
        expected = images[b].clone()
        for c in range(2):
            bright = images[b, c] * jitter.brightness[b, c]
            expected[c] = bright.mean() + (bright - bright.mean()) * jitter.contrast[b, c]
        if jitter.blur[b]:
            expected = gaussian_blur(expected[None], jitter.sigma[b : b + 1])[0]
        torch.testing.assert_close(result[b], expected)
    assert torch.equal(images, before)


def test_ranges_and_probabilities():
    jitter = draw_jitter(torch.zeros(4000, 1, 2, 2), 0.5, 0.25, 0.3)
    for factors in (jitter.brightness, jitter.contrast):
        assert factors.min() >= 0.75 and factors.max() <= 1.25 and factors.max() > 1.24
        assert 0.45 < (factors == 1).float().mean() < 0.55
    assert torch.equal(jitter.brightness == 1, jitter.contrast == 1)
    assert 0.27 < jitter.blur.float().mean() < 0.33
    assert jitter.sigma.shape == (4000, 2) and jitter.sigma.min() >= 0.15 and jitter.sigma.max() <= 1.15


def test_nothing_at_probability_zero():
    images = torch.randn(3, 1, 5, 5, 5)
    torch.testing.assert_close(apply_jitter(images, draw_jitter(images, 0.0, 0.25, 0.0)), images)


def test_a_constant_patch_stays_constant_and_z_scores_stay_signed():
    ones = torch.ones(1, 1)
    jitter = Jitter(1.2 * ones, 0.8 * ones, torch.tensor([False]), torch.ones(1, 2))
    torch.testing.assert_close(apply_jitter(torch.full((1, 1, 4, 4), -2.0), jitter), torch.full((1, 1, 4, 4), -2.4))
