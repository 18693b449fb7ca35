"""nnU-Net's learning-rate curve, for methods with stages."""

from bisect import bisect_right
from collections.abc import Sequence

from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch.optim import Optimizer


class RestartingPolyLR(PolyLRScheduler):
    """nnU-Net's curve, initial_lr * (1 - epoch / epochs)^0.9, run through once per stage.

    Args:
        optimizer: whose parameter groups all get the one value.
        initial_lr: at the start of each stage.
        starts: first epoch of each stage, ascending from 0.
        num_epochs: end of the last stage.
    """

    def __init__(self, optimizer: Optimizer, initial_lr: float, starts: Sequence[int], num_epochs: int):
        self.bounds = (*starts, num_epochs)
        super().__init__(optimizer, initial_lr, num_epochs)

    def step(self, current_step: int | None = None) -> None:
        """Set the learning rate of epoch ``current_step``; None, only while torch builds the scheduler, is epoch 0."""
        epoch = current_step or 0
        stage = bisect_right(self.bounds, epoch) - 1
        self.max_steps = self.bounds[stage + 1] - self.bounds[stage]
        super().step(epoch - self.bounds[stage])
