"""nnU-Net's supervised loss, also on patches of which only some voxels are known."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunetv2_semisup.losses.partial import partial_dice_cross_entropy

UNKNOWN = -1  # target value of voxels that are not known, where the task has no ignore label of its own


class SupervisedLoss:
    """nnU-Net's loss as a function of (logits, target) and, for partly known patches, of a mask.

    Args:
        loss: as ``nnUNetTrainer._build_loss`` makes it, with or without deep supervision.
        ignore_label: of the task, or None.
        num_regions: channels of the target of region-based training, without that of the ignore label; 0 for softmax.
    """

    def __init__(self, loss: nn.Module, ignore_label: int | None, num_regions: int):
        self.loss = loss
        self.ignore_label = ignore_label
        self.has_regions = num_regions > 0
        self._partial = loss if ignore_label is not None else _with_ignored_voxels(loss, num_regions)

    def __call__(self, output: Tensor | list[Tensor], target: Tensor | list[Tensor], known: Tensor | None = None):
        """The loss, a scalar.

        Args:
            output: logits (B, heads, X, Y, Z), or under deep supervision a list, highest resolution first.
            target: of the same resolutions, as nnU-Net's loader gives it.
            known: (B, 1, X, Y, Z) bool at the highest resolution; voxels that are False count nowhere, as nnU-Net
                treats its ignore label. With all True the loss is nnU-Net's: bit for bit with softmax, up to rounding
                with regions, whose cross-entropy nnU-Net averages in another order when there is a mask.
        """
        if known is None:
            return self.loss(output, target)
        if isinstance(target, list):
            return self._partial(output, [self._mark(level, known) for level in target])
        return self._partial(output, self._mark(target, known))

    def weighted(self, output: Tensor | list[Tensor], label: Tensor, weight: Tensor, factors: Tensor) -> Tensor:
        """The loss of patches whose voxels are known to different degrees, with nnU-Net's deep supervision.

        Several processes: each computes the Dice of its own patches, also where nnU-Net pools them.

        Args:
            output: as above.
            label, weight: at the highest resolution, as :func:`partial_dice_cross_entropy` takes them.
            factors: of the classes in the Dice, likewise.

        Returns:
            A scalar; for several weightings one value each.
        """
        outputs = output if isinstance(output, list) else [output]
        levels = getattr(self.loss, "weight_factors", (1.0,))
        dice = _without_deep_supervision(self.loss).dc
        total = output[0].new_zeros((), dtype=torch.float32)
        for level, logits in zip(levels, outputs, strict=True):
            if level == 0:
                continue
            size = logits.shape[2:]
            total = total + float(level) * partial_dice_cross_entropy(
                logits,
                _resized(label, size),
                _resized(weight, size),
                factors,
                self.has_regions,
                dice.batch_dice,
                dice.do_bg,
                dice.smooth,
            )
        return total

    def _mark(self, target: Tensor, known: Tensor) -> Tensor:
        known = _resized(known, target.shape[2:])
        if not self.has_regions:
            return torch.where(known, target, UNKNOWN if self.ignore_label is None else self.ignore_label)
        if self.ignore_label is None:
            return torch.cat([target.bool(), ~known], 1)
        return torch.cat([target[:, :-1].bool(), target[:, -1:].bool() | ~known], 1)


def _resized(values: Tensor, size: torch.Size) -> Tensor:
    """(..., B, K, X, Y, Z) with the nearest voxel's value on a grid of another size; the type stays."""
    before = values.shape[: -len(size)]
    if values.shape[len(before) :] == size:
        return values
    flat = values.reshape(-1, *values.shape[len(before) - 1 :])
    return F.interpolate(flat.float(), size, mode="nearest-exact").to(values.dtype).reshape(*before, *size)


def _without_deep_supervision(loss: nn.Module) -> Any:
    """The part that nnU-Net's deep supervision wraps; nnU-Net's losses have no types."""
    return getattr(loss, "loss", loss)


def _with_ignored_voxels(loss: nn.Module, num_regions: int) -> nn.Module:
    """A copy of nnU-Net's loss that knows an ignore label: its own mechanism, for losses built without one."""
    partial = copy.deepcopy(loss)
    inner = _without_deep_supervision(partial)
    if num_regions:
        inner.use_ignore_label, inner.ce.reduction = True, "none"
        inner.weight_ce /= num_regions  # with a mask nnU-Net sums over the regions, without one it takes their mean
    else:
        inner.ignore_label = inner.ce.ignore_index = UNKNOWN
    return partial
