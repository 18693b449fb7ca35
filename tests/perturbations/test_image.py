"""Strong views against slow references, boxes against their definition."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from nnunetv2_semisup.perturbations.image import (
    BLUR_RADIUS,
    StrongView,
    apply_strong_view,
    bias_field,
    draw_boxes,
    draw_strong_view,
    gaussian_blur,
)

SHAPES = st.lists(st.integers(3, 14), min_size=2, max_size=3).map(tuple)
BOTH = pytest.mark.parametrize("shape", [(9, 12), (8, 11, 6)], ids=["2d", "3d"])


def draw(images, bias=True, intensity=1.0, blur=1.0) -> StrongView:
    return draw_strong_view(images, intensity, blur, bias)


@BOTH
def test_bias_field_equals_the_polynomial(shape):
    dims = len(shape)
    images = torch.zeros(3, 1, *shape)
    coefficients = draw(images).bias_field
    assert coefficients.abs().max() <= 0.5
    field = bias_field(coefficients, shape)
    assert field.shape == (3, 1, *shape)
    axes = [np.linspace(-1, 1, n) for n in shape]
    for sample, *voxel in [(0, *[0] * dims), (1, *(n - 1 for n in shape)), (2, *(n // 2 for n in shape))]:
        position = [axis[i] for axis, i in zip(axes, voxel, strict=True)]
        exponent, terms = 0.0, 0
        for powers in product(range(4), repeat=dims):
            coefficient = float(coefficients[(sample, *powers)])
            if sum(powers) > 3:
                assert coefficient == 0
                continue
            terms += 1
            exponent += coefficient * np.prod([x**p for x, p in zip(position, powers, strict=True)])
        assert terms == {2: 10, 3: 20}[dims]
        assert float(field[(sample, 0, *voxel)]) == pytest.approx(np.exp(exponent), rel=1e-5)


@settings(max_examples=40)
@given(SHAPES, st.integers(0, 1000))
def test_blur_equals_scipy(shape, seed):
    torch.manual_seed(seed)
    images = torch.randn(2, 2, *shape)
    sigma = torch.rand(2, len(shape)) * 1.9 + 0.1
    blurred = gaussian_blur(images, sigma)
    for sample, channel in product(range(2), range(2)):
        expected = images[sample, channel].double().numpy()
        for axis in range(len(shape)):
            expected = ndimage.gaussian_filter1d(
                expected, float(sigma[sample, axis]), axis, mode="reflect", radius=BLUR_RADIUS
            )
        np.testing.assert_allclose(blurred[sample, channel].numpy(), expected, atol=2e-6)


@BOTH
def test_order_signs_and_zeros(shape):
    """Bias, then gamma: sign(I b) |I b|^g per channel; the field is shared by the channels; zeros stay zero."""
    images = torch.randn(2, 3, *shape)
    images[:, :, :2] = 0
    view = draw(images, blur=0.0)
    changed = apply_strong_view(images, view)
    field = bias_field(view.bias_field, shape)
    for sample, channel in product(range(2), range(3)):
        product_ = (images[sample, channel] * field[sample, 0]).double()
        expected = product_.sign() * product_.abs() ** float(view.gamma[sample, channel])
        torch.testing.assert_close(changed[sample, channel].double(), expected, rtol=1e-4, atol=1e-6)
    assert not changed[:, :, :2].any()
    assert (changed.sign() == images.sign()).all()


@BOTH
def test_batch_equals_elements_and_input_is_untouched(shape):
    images = torch.randn(4, 2, *shape)
    before = images.clone()
    view = draw(images, intensity=0.5, blur=0.5)
    together = apply_strong_view(images, view)
    assert torch.equal(images, before) and not together.requires_grad
    for i in range(4):
        one = StrongView(*(None if v is None else v[i : i + 1] for v in vars(view).values()))
        torch.testing.assert_close(apply_strong_view(images[i : i + 1], one), together[i : i + 1])
        if not view.intensity[i] and not view.blur[i]:
            assert torch.equal(together[i], images[i])


def test_switched_off_is_identity_and_seed_repeats():
    images = torch.randn(3, 1, 8, 8, 8)
    assert torch.equal(apply_strong_view(images, draw(images, intensity=0.0, blur=0.0)), images)
    views = []
    for _ in range(2):
        torch.manual_seed(4)
        views.append(apply_strong_view(images, draw(images)))
    assert torch.equal(*views)
    assert not torch.equal(views[0], apply_strong_view(images, draw(images)))
    assert draw(images, bias=False).bias_field is None


def test_ranges():
    view = draw(torch.zeros(20000, 1, 2, 2), intensity=0.8, blur=0.5)
    assert abs(float(view.intensity.float().mean()) - 0.8) < 0.01 and abs(float(view.blur.float().mean()) - 0.5) < 0.015
    log_gamma = view.gamma.log()
    assert -0.5 <= float(log_gamma.min()) < -0.49 and 0.49 < float(log_gamma.max()) <= 0.5
    assert 0.1 <= float(view.sigma.min()) < 0.11 and 1.99 < float(view.sigma.max()) <= 2.0


@settings(max_examples=60)
@given(SHAPES, st.integers(0, 10**6))
def test_a_box_is_one_cuboid_inside_the_patch(shape, seed):
    torch.manual_seed(seed)
    mask = draw_boxes(torch.zeros(5, 2, *shape), 1.0, (0.02, 0.4))
    assert mask.shape == (5, 1, *shape) and mask.dtype == torch.bool
    for sample in mask[:, 0]:
        inside = np.argwhere(sample.numpy())
        low, high = inside.min(0), inside.max(0)
        assert len(inside) == np.prod(high - low + 1), "not one axis-aligned cuboid"
        sides = high - low + 1
        # rounding down never enlarges; only the clamp to one voxel can
        if (sides > 1).all():
            assert sample.float().mean() <= 0.4 + 1e-6


def test_box_statistics_on_a_flat_patch():
    """Frequency, volume, both ends of every axis reached: each side is drawn against its own edge."""
    shape = (60, 40, 20)
    torch.manual_seed(0)
    mask = draw_boxes(torch.zeros(3000, 1, *shape), 0.5, (0.02, 0.4))[:, 0]
    volume = mask.float().mean((1, 2, 3))
    drawn = volume > 0
    assert abs(float(drawn.float().mean()) - 0.5) < 0.03
    assert float(volume.max()) <= 0.4
    # uniform share between 0.02 and 0.4 has mean 0.21; rounding down loses a little
    assert 0.18 < float(volume[drawn].mean()) < 0.21
    for axis in range(3):
        others = tuple(i + 1 for i in range(3) if i != axis)
        profile = mask[drawn].any(others[1]).any(others[0]).float().mean(0)
        assert profile[0] > 0.02 and profile[-1] > 0.02 and abs(float(profile[0] - profile[-1])) < 0.05


def test_cubic_patch_follows_the_published_formula(monkeypatch):
    """Sides floor((V f / r)^(1/3)), floor((V f r)^(1/3)), floor((V f)^(1/3)) with the same random numbers."""
    size = 50
    torch.manual_seed(9)
    mask = draw_boxes(torch.zeros(200, 1, size, size, size), 1.0, (0.02, 0.4))[:, 0]
    torch.manual_seed(9)
    share, aspect = 0.02 + 0.38 * torch.rand(200).double(), 0.3 + (1 / 0.3 - 0.3) * torch.rand(200).double()
    for i in range(200):
        volume = float(share[i]) * size**3
        r = float(aspect[i])
        expected = [(volume / r) ** (1 / 3), (volume * r) ** (1 / 3), volume ** (1 / 3)]
        sides = [int(mask[i].any(a).any(b).sum()) for a, b in ((2, 1), (2, 0), (1, 0))]
        for side, value in zip(sides, expected, strict=True):
            assert side == min(int(value + 1e-4), size) or side == min(int(value - 1e-4), size)
