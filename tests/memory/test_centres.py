"""ACTION++'s class centres and their allocation, in closed form and against a search."""

from itertools import permutations

import pytest
import torch

from nnunetv2_semisup.memory.centres import allocate, simplex_centres


@pytest.mark.parametrize(("classes", "features"), [(2, 128), (4, 128), (5, 5), (15, 16)])
def test_a_regular_simplex(classes, features):
    centres = simplex_centres(classes, features)
    expected = torch.full((classes, classes), -1 / (classes - 1)).fill_diagonal_(1.0)
    torch.testing.assert_close(centres @ centres.T, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(centres.sum(0), torch.zeros(features), rtol=0, atol=1e-6)
    assert torch.equal(centres, simplex_centres(classes, features))


def test_allocation_is_the_best_permutation():
    cosines = torch.randn(5, 5)
    best = max(permutations(range(5)), key=lambda p: sum(cosines[c, j] for c, j in enumerate(p)))
    assert allocate(cosines).tolist() == list(best)


def test_centroids_equal_to_centres_keep_them():
    centres = simplex_centres(6, 16)
    assert torch.equal(allocate(centres @ centres.T), torch.arange(6))
    order = torch.randperm(6)
    assert torch.equal(allocate(centres[order] @ centres.T), order)
