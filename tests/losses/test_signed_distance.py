import math

import pytest
import torch

from nnunetv2_semisup.losses.signed_distance import mean_squared_error_where_known


def test_only_voxels_with_a_target_count():
    prediction = torch.tensor([[[0.5, -0.5, 0.9]]], requires_grad=True)
    target = torch.tensor([[[1.0, -1.0, math.nan]]])
    value = mean_squared_error_where_known(prediction, target)
    assert value.item() == pytest.approx(0.25)
    value.backward()
    assert prediction.grad.flatten().tolist() == pytest.approx([-0.5, 0.5, 0.0])


def test_without_any_target_it_is_zero_with_zero_gradient():
    prediction = torch.randn(2, 3, 4, requires_grad=True)
    value = mean_squared_error_where_known(prediction, torch.full((2, 3, 4), math.nan))
    value.backward()
    assert value.item() == 0 and float(prediction.grad.abs().max()) == 0


def test_with_all_targets_it_is_the_mean_squared_error():
    prediction, target = torch.rand(2, 2, 3, 4, 5)
    torch.testing.assert_close(
        mean_squared_error_where_known(prediction, target), torch.nn.functional.mse_loss(prediction, target)
    )
