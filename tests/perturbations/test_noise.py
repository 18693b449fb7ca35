import math

import numpy as np
import torch

from nnunetv2_semisup.perturbations.noise import draw_clipped_noise


def test_range_moments_and_replay():
    images = torch.zeros(2, 1, 40, 40, 40)
    torch.manual_seed(3)
    noise = draw_clipped_noise(images, 0.1, 0.2)
    torch.manual_seed(3)
    assert torch.equal(noise, draw_clipped_noise(images, 0.1, 0.2))
    limit = noise.abs().max()
    assert float(limit) == np.float32(0.2)
    # a normal variable clipped at two standard deviations: share beyond, and second moment in closed form
    beyond = math.erfc(2 / math.sqrt(2))
    inside = 1 - beyond - 2 * 2 * math.exp(-2) / math.sqrt(2 * math.pi)
    assert abs(float((noise.abs() == limit).float().mean()) - beyond) < 0.002
    assert abs(float(noise.square().mean()) - 0.01 * (inside + 4 * beyond)) < 5e-5
    assert abs(float(noise.mean())) < 0.001


def test_zero_strength_is_identity():
    assert not draw_clipped_noise(torch.zeros(1, 1, 4, 4), 0.0, 0.2).any()
    assert not draw_clipped_noise(torch.zeros(1, 1, 4, 4), 0.1, 0.0).any()
