"""Window pooling against sliding windows; the representation head against its plain definition."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nnunetv2_semisup.network.embedding_heads import (
    RepresentationHead,
    coarse_means,
    mlp,
    pool_cells,
    window_edges,
    windows,
)

LAST = {2: torch.channels_last, 3: torch.channels_last_3d}  # by number of axes


def sliding_windows(logits, edge):
    """Every window of ``edge`` voxels, half a window apart, pooled to 4 cells per axis: (B, P, C * 64)."""
    starts = [range(0, size - edge + 1, edge // 2) for size in logits.shape[2:]]
    pooled = []
    for x in starts[0]:
        for y in starts[1]:
            for z in starts[2]:
                window = logits[:, :, x : x + edge, y : y + edge, z : z + edge]
                pooled.append(F.adaptive_avg_pool3d(window, 4).flatten(1))
    return torch.stack(pooled, 1)


def test_cells_tell_apart_what_instance_norm_gives_one_mean():
    """After instance norm the mean of a channel is its bias, whatever the image; the means of its parts are not."""
    torch.manual_seed(0)
    features = nn.InstanceNorm3d(3)(torch.randn(2, 3, 4, 4, 4).cumsum(2))
    whole, parts = coarse_means(features, 1), coarse_means(features, 2)
    torch.testing.assert_close(whole, features.mean((2, 3, 4)))
    assert float(whole.abs().max()) < 1e-6
    assert parts.shape == (2, 24) and float(parts[0].dot(parts[1]) / parts.norm(dim=1).prod()) < 0.99
    first = features[:, :, :2, :2, :2].mean((2, 3, 4))
    torch.testing.assert_close(parts.unflatten(1, (3, 8))[:, :, 0], first)
    assert coarse_means(features[..., 0], 2).shape == (2, 12)


def test_windows_equal_sliding_windows_of_the_published_crop():
    logits = torch.randn(1, 2, 112, 112, 80)
    mine = windows(pool_cells(logits, (20, 20, 20)))
    assert mine.shape == (1, 700, 128)
    torch.testing.assert_close(mine, sliding_windows(logits, 20), rtol=0, atol=1e-5)


def test_a_head_on_cells_is_the_same_head_on_windows():
    head, logits = mlp(3, 6, 3, relu=True), torch.randn(2, 3, 16, 16, 16)
    pooled = sliding_windows(logits, 8).unflatten(2, (3, 64)).transpose(2, 3)
    expected = head(pooled).transpose(2, 3).flatten(2)
    torch.testing.assert_close(windows(head(pool_cells(logits, (8, 8, 8)))), expected)


def test_window_edges():
    assert window_edges((112, 112, 80)) == (20, 20, 16) and window_edges((128,) * 3) == (24,) * 3
    assert window_edges((32, 48, 64)) == (4, 8, 12) and window_edges((8, 256)) == (4, 44)
    cells = pool_cells(torch.zeros(1, 1, *(128,) * 3), (24,) * 3)
    assert cells.shape == (1, 21, 21, 21, 1) and windows(cells).shape == (1, 729, 64)
    assert windows(pool_cells(torch.zeros(2, 5, 256, 256), (44, 44))).shape[2] == 80


def test_mlp_activation():
    assert isinstance(mlp(2, 3, 4, True)[1], nn.ReLU) and isinstance(mlp(2, 3, 4, False)[1], nn.Identity)


@pytest.mark.parametrize(("channels", "step"), [((4, 8, 6), (2, 2, 2)), ((9, 8, 16), (1, 2, 2)), ((4, 5), (2, 2))])
def test_representation_head_is_interpolate_concatenate_then_a_layer_per_voxel(channels, step):
    """Levels wider than the embedding are projected before the interpolation, which changes nothing."""
    head = RepresentationHead(channels, step, 8)
    full = tuple(8 * s for s in step)
    maps = [torch.randn(2, width, *(size // s**i for size, s in zip(full, step, strict=True)), requires_grad=True)
            for i, width in enumerate(channels)]  # fmt: skip
    thinned = [head.thin(maps[0]), *maps[1:]]
    grid = maps[1].shape[2:]
    assert thinned[0].shape[2:] == grid
    mode = "trilinear" if len(step) == 3 else "bilinear"
    whole = [F.interpolate(m, grid, mode=mode, align_corners=False) for m in thinned]
    narrow = [m for m, wide in zip(whole, head.is_wide, strict=True) if not wide]
    wide = [m for m, wide in zip(whole, head.is_wide, strict=True) if wide]
    weight = torch.cat([head.narrow.weight, *(layer.weight for layer in head.wide)], 1)
    rows = torch.cat(narrow + wide, 1).movedim(1, -1).flatten(0, -2)
    expected = head.last(torch.relu(rows @ weight.T + head.narrow.bias))
    for maps_of_all_layouts in (thinned, [m.contiguous(memory_format=LAST[len(step)]) for m in thinned]):
        found = head.rows(maps_of_all_layouts, torch.arange(len(rows)))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        gradients = (torch.autograd.grad((x**2).sum(), maps, retain_graph=True) for x in (found, expected))
        for mine, plain in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-4)
    members = torch.rand(3, len(rows)) < 0.3
    members[2] = False
    means = head.class_means(thinned, members)
    torch.testing.assert_close(means[0], expected[members[0]].mean(0), rtol=1e-4, atol=1e-5)
    assert torch.isfinite(means).all()


def test_a_wide_highest_level_is_kept_as_it_is():
    assert RepresentationHead((9, 9), (2, 2), 8).is_wide == [False, True]
