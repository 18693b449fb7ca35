"""The exponential moving average of the student's weights."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

Student = TypeVar("Student", bound=nn.Module)


class MovingAverage(AveragedModel, Generic[Student]):
    """EMA copy of a module: no gradient, warm-up of the decay.

    After the t-th update (t from 0) the weights are ``a * teacher + (1 - a) * student`` with
    ``a = min(1 - 1 / (t + 1), decay)``: the first update copies the student, 0.99 is reached at t = 99. Buffers
    (statistics of a BatchNorm plan) are copied from the student.

    Args:
        network: the student (network or heads), not compiled and not wrapped.
        decay: in [0, 1).

    Reference: Tarvainen & Valpola, NeurIPS 2017, section 2; warm-up as in its released code.
    """

    module: Student

    def __init__(self, network: Student, decay: float):
        super().__init__(network)
        self.decay = decay
        self.warm_up = True
        self.requires_grad_(False)

    @torch.no_grad()
    def update_parameters(self, network: nn.Module) -> None:
        """One update towards ``network``. AveragedModel's own moves its counter to the GPU, which stalls it."""
        decay = min(1.0 - 1.0 / (int(self.n_averaged) + 1), self.decay) if self.warm_up else self.decay
        torch._foreach_lerp_(list(self.module.parameters()), list(network.parameters()), 1.0 - decay)
        for mine, students in zip(self.module.buffers(), network.buffers(), strict=True):
            mine.copy_(students)
        self.n_averaged += 1

    def without_warm_up(self) -> MovingAverage[Student]:
        """Use the full decay from the first update on."""
        self.warm_up = False
        return self

    def reset(self, network: nn.Module) -> None:
        """Become a copy of ``network`` and forget how many updates there were."""
        self.module.load_state_dict(network.state_dict())
        self.n_averaged.zero_()

    def _apply(self, fn, recurse: bool = True):
        # The counter stays on the CPU: reading it at every update would stall a GPU.
        counter = self.n_averaged
        super()._apply(fn, recurse)
        self.n_averaged = counter
        return self


class Teacher(MovingAverage[nn.Module]):
    """EMA copy of the planned network, without deep supervision."""

    def __init__(self, network: nn.Module, decay: float):
        super().__init__(network, decay)
        decoder: Any = self.module.decoder
        decoder.deep_supervision = False
