"""EMA against a slow reference; the counter; buffers."""

import copy

import pytest
import torch
from torch import nn

from nnunetv2_semisup.network.teacher import MovingAverage, Teacher


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.decoder = nn.Linear(4, 2)
        self.decoder.deep_supervision = True


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.99])
def test_average_equals_a_slow_loop(decay):
    student = Network()
    teacher = Teacher(student, decay)
    reference = [p.detach().clone() for p in student.parameters()]
    for t in range(150):
        with torch.no_grad():
            for p in student.parameters():
                p.add_(torch.randn_like(p) * 0.1)
            student.encoder[1].running_mean.fill_(t)
        teacher.update_parameters(student)
        a = min(1 - 1 / (t + 1), decay)
        reference = [a * r + (1 - a) * p.detach() for r, p in zip(reference, student.parameters(), strict=True)]
        if t == 0:
            assert all(
                torch.equal(x, y) for x, y in zip(teacher.module.parameters(), student.parameters(), strict=True)
            )
        assert teacher.module.encoder[1].running_mean[0] == t
    for mine, expected in zip(teacher.module.parameters(), reference, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


def test_no_gradient_no_deep_supervision_student_untouched():
    student = Network()
    before = copy.deepcopy(student.state_dict())
    teacher = Teacher(student, 0.99)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.module.decoder.deep_supervision and student.decoder.deep_supervision
    assert all(p.requires_grad for p in student.parameters())
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


def test_reset_forgets_updates():
    student = Network()
    teacher = Teacher(student, 0.99)
    for _ in range(3):
        teacher.update_parameters(student)
    other = Network()
    teacher.reset(other)
    assert teacher.n_averaged == 0
    assert all(torch.equal(a, b) for a, b in zip(teacher.module.parameters(), other.parameters(), strict=True))


def test_counter_stays_on_the_cpu():
    teacher = Teacher(Network(), 0.99).to(torch.device("meta"))
    assert teacher.n_averaged.device.type == "cpu"


def test_moving_average_of_heads_reaches_its_decay():
    student = nn.Linear(3, 2)
    average = MovingAverage(student, 0.999)
    average.n_averaged.fill_(10**6)
    before = average.module.weight.clone()
    with torch.no_grad():
        student.weight.add_(1)
    average.update_parameters(student)
    torch.testing.assert_close(average.module.weight, 0.999 * before + 0.001 * student.weight.detach())


def test_without_warm_up_every_update_has_the_full_decay():
    student = Network()
    teacher = Teacher(student, 0.99).without_warm_up()
    before = copy.deepcopy(list(teacher.module.parameters()))
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1.0)
    teacher.update_parameters(student)
    for old, new, mine in zip(before, student.parameters(), teacher.module.parameters(), strict=True):
        torch.testing.assert_close(mine, 0.99 * old + 0.01 * new)
