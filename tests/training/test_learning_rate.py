"""nnU-Net's curve, once per stage."""

import pytest
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

from nnunetv2_semisup.training.learning_rate import RestartingPolyLR


def optimizer():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(2)]
    return torch.optim.SGD(groups, 0.01)


def rates(scheduler, epochs) -> list[float]:
    values = []
    for epoch in epochs:
        scheduler.step(epoch)
        first, second = (group["lr"] for group in scheduler.optimizer.param_groups)
        assert first == second
        values.append(first)
    return values


def test_each_stage_is_nnunets_curve_of_its_own_length():
    mine = rates(RestartingPolyLR(optimizer(), 0.01, (0, 3, 5), 12), range(12))
    stock = [rates(PolyLRScheduler(optimizer(), 0.01, n), range(n)) for n in (3, 2, 7)]
    assert mine == [*stock[0], *stock[1], *stock[2]]
    assert mine[3] == mine[5] == 0.01 and mine[6] == pytest.approx(0.01 * (6 / 7) ** 0.9)


def test_any_epoch_first_as_after_a_resume():
    scheduler = RestartingPolyLR(optimizer(), 0.01, (0, 3, 5), 12)
    assert rates(scheduler, [0]) == [0.01]
    assert rates(RestartingPolyLR(optimizer(), 0.01, (0, 3, 5), 12), [8]) == rates(scheduler, [8])
