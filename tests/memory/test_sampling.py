"""Systematic sampling of voxels by class against boolean indexing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_semisup.memory.sampling import rows_at, sample_positions, sample_rows, sample_size


@settings(max_examples=80)
@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 70))
def test_all_positions_or_distinct_ones(mask, size):
    mask = torch.tensor(mask)
    positions, valid = sample_positions(mask, size)
    members = mask.nonzero().flatten().tolist()
    drawn = positions[valid].tolist()
    assert positions.shape == valid.shape == (size,) and 0 <= int(positions.min()) <= int(positions.max()) < len(mask)
    assert len(set(drawn)) == len(drawn) == min(size, len(members)) and set(drawn) <= set(members)


def test_every_member_has_the_same_chance():
    mask = torch.rand(50) < 0.6
    n, size, draws = int(mask.sum()), 7, 4000
    hits = torch.zeros(50)
    for _ in range(draws):
        positions, _ = sample_positions(mask, size)
        hits[positions] += 1
    shares = hits / draws
    assert not shares[~mask].any()
    assert float((shares[mask] - size / n).abs().max()) < 5 * (size / n / draws) ** 0.5


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 2, 3, 4, 5)])
def test_rows_are_those_of_boolean_indexing(shape):
    features = torch.randn(shape, requires_grad=True)
    voxels = features[:, 0].numel()
    members = torch.rand(3, voxels) < 0.3
    members[2] = False
    rows, valid = sample_rows(features, members, 10 * voxels)
    assert rows.shape == (3, voxels, shape[1]) and valid.sum(1).tolist() == members.sum(1).tolist()
    flat = features.movedim(1, -1).reshape(voxels, -1)
    for k in range(3):
        assert torch.equal(rows[k][valid[k]], flat[members[k]])
    assert not rows[~valid].any()
    pull = torch.randn_like(rows)
    (gradient,) = torch.autograd.grad((rows * pull).sum(), features, retain_graph=True)
    expected = sum((flat[members[k]] * pull[k][valid[k]]).sum() for k in range(3))
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, features)[0])


def test_cap_keeps_rows_of_the_class():
    features = torch.arange(24.0).reshape(2, 1, 3, 4)  # each voxel is its own position
    members = torch.rand(2, 24) < 0.8
    rows, valid = sample_rows(features, members, 5)
    assert rows.shape == (2, 5, 1) and valid.all()
    assert all(members[k, int(position)] for k in range(2) for position in rows[k, :, 0])


def test_half_precision_features_and_their_overflow():
    features = torch.randn(1, 3, 4, 4).half()
    features[0, 1, 2, 2] = float("inf")
    features[0, 2, 3, 3] = float("nan")
    rows, valid = sample_rows(features, torch.ones(1, 16, dtype=torch.bool), 16)
    assert rows.dtype == torch.float32 and torch.isfinite(rows).all()
    assert (~valid[0]).nonzero().flatten().tolist() == [10, 15] and not rows[~valid].any()


def test_gradients_of_rows_taken_twice_are_the_same_in_every_run():
    rows, positions = torch.randn(4096, 16), torch.randint(0, 4096, (3, 8192))
    weights, gradients = torch.randn(3, 8192, 16), []
    for _ in range(10):
        x = rows.clone().requires_grad_()
        (rows_at(x, positions) * weights).sum().backward()
        gradients.append(x.grad)
    assert all(torch.equal(gradients[0], g) for g in gradients)
    expected = torch.zeros_like(rows).index_put_((positions.flatten(),), weights.flatten(0, 1), accumulate=True)
    torch.testing.assert_close(gradients[0], expected)


@pytest.mark.parametrize(
    ("wanted", "voxels", "expected"),
    [(None, 10**7, 8192), (None, 26_880, 1680), (None, 16 * 8192, 8192), (None, 10, 2), (12, 10**7, 12), (12, 20, 12)],
)
def test_sample_sizes_follow_the_patch_unless_given(wanted, voxels, expected):
    assert sample_size(wanted, 8192, voxels, 16) == expected
