"""Masked batch norm against torch's own on the valid rows."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nnunetv2_semisup.network.heads import MaskedBatchNorm1d, MLPHead


def torch_head(head: MLPHead) -> nn.Sequential:
    """The same head of torch's own layers, with the same weights."""
    layers = [copy.deepcopy(head.first), nn.BatchNorm1d(head.first.out_features)]
    layers[1].load_state_dict(head.norm.state_dict())
    activation = nn.LeakyReLU(head.negative_slope) if head.negative_slope else nn.ReLU()
    return nn.Sequential(*layers, activation, copy.deepcopy(head.last))


@settings(max_examples=30)
@given(st.integers(2, 40), st.integers(0, 30), st.sampled_from([0.0, 0.2]), st.integers(0, 999))
def test_equals_torchs_layers_on_the_valid_rows(valid_rows, other_rows, slope, seed):
    torch.manual_seed(seed)
    head = MLPHead(5, 8, 3, slope)
    nn.init.normal_(head.norm.weight)
    reference = torch_head(head)
    for _ in range(2):  # the running statistics of the first call are those that the second one moves
        valid = torch.tensor([True] * valid_rows + [False] * other_rows)[torch.randperm(valid_rows + other_rows)]
        rows = (3 + 2 * torch.randn(len(valid), 5)).requires_grad_(True)
        output, expected = head(rows, valid)[valid], reference(rows[valid])
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        pull = torch.randn_like(output)
        (mine,) = torch.autograd.grad((output * pull).sum(), rows)
        (theirs,) = torch.autograd.grad((expected * pull).sum(), rows)
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
        assert not mine[~valid].any()
        for key, value in reference[1].state_dict().items():
            torch.testing.assert_close(head.norm.state_dict()[key], value, msg=key)
    torch.testing.assert_close(head(rows), reference.eval()(rows))  # running statistics, whatever the mode


@pytest.mark.parametrize("valid_rows", [0, 1])
def test_too_few_rows_for_statistics_change_nothing_and_stay_finite(valid_rows):
    norm = MaskedBatchNorm1d(4)
    before = copy.deepcopy(norm.state_dict())
    rows = torch.randn(6, 4, requires_grad=True)
    output = norm(rows, torch.arange(6) < valid_rows)
    assert all(torch.equal(before[k], v) for k, v in norm.state_dict().items())
    assert torch.equal(output[:valid_rows], norm.bias.expand(valid_rows, 4)) and torch.isfinite(output).all()
    output[:valid_rows].sum().backward()
    assert not rows.grad.any()
