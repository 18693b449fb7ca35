"""The signed-distance head, and the projection of slices with its dropout."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nnunetv2_semisup.network.heads import SignedDistanceHead, SliceProjection


@pytest.mark.parametrize("dimensions", [2, 3])
def test_signed_distance_head_is_a_linear_map_per_voxel(dimensions):
    head = SignedDistanceHead(4, 2, dimensions)
    features = torch.randn(3, 4, *[5] * dimensions)
    found = head(features)
    weight = head.convolution.weight.flatten(1)
    expected = torch.tanh(
        torch.einsum("oc,bc...->bo...", weight, features) + head.convolution.bias.reshape(2, *[1] * dimensions)
    )
    torch.testing.assert_close(found, expected)
    assert found.shape == (3, 2, *[5] * dimensions)


@pytest.mark.parametrize("size", [(5, 7), (16, 16), (20, 33)])
def test_projection_without_dropout_is_pooling_and_three_layers(size):
    head = SliceProjection(0.0, (8, 8), (6, 5), 3)
    linear = [layer for layer in head.layers if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in linear] == [6, 5, 3] and isinstance(head.layers[-1], nn.Linear)
    slices = torch.randn(2, 4, *size)
    found = head(slices)
    assert found.shape == (2, 4, 3)
    for group in range(2):
        for row in range(4):
            x = F.adaptive_avg_pool2d(slices[group, row][None], 8).flatten()
            expected = linear[2](F.relu(linear[1](F.relu(linear[0](x)))))
            torch.testing.assert_close(found[group, row], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head(slices), found)


def test_number_of_parameters_at_the_defaults():
    head = SliceProjection(0.1, (128, 128), (256, 256), 128)
    assert sum(p.numel() for p in head.parameters()) == 16384 * 256 + 256 + 256 * 256 + 256 + 256 * 128 + 128


def test_two_passes_differ_also_in_evaluation_mode():
    head = SliceProjection(0.1, (8, 8), (6,), 3)
    slices = torch.randn(1, 4, 8, 8)
    for module in (head.train(), head.eval()):
        assert not torch.equal(module(slices), module(slices))


def test_dropout_keeps_mean_and_variance(monkeypatch):
    """And its constants for p = 0.1: dropped voxels get -1.7581, then 0.92128 x + 0.16197."""
    head = SliceProjection(0.1, (8, 8), (6,), 3)
    seen = []
    pool = F.adaptive_avg_pool2d
    monkeypatch.setattr(F, "adaptive_avg_pool2d", lambda x, size: seen.append(x) or pool(x, size))
    slices = torch.randn(1, 4, 500, 500)
    head(slices)
    dropped = seen[0].flatten()
    assert dropped.numel() == 10**6
    assert abs(float(dropped.mean())) < 0.005 and abs(float(dropped.var()) - 1) < 0.01
    kept = torch.isclose(dropped, 0.92128 * slices.flatten() + 0.16197, atol=2e-5)
    assert abs(float(kept.float().mean()) - 0.9) < 0.002
    torch.testing.assert_close(dropped[~kept].mean(), torch.tensor(-1.7581 * 0.92128 + 0.16197), rtol=1e-3, atol=0.0)
