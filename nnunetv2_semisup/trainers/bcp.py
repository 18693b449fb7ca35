"""BCP: labelled patches in unlabelled ones and the reverse; a mean teacher labels the unlabelled part.

Reference: Bai, Chen, Li, Shen & Wang, "Bidirectional Copy-Paste for Semi-Supervised Medical Image Segmentation", CVPR
2023, arXiv 2305.00673; released code for LA.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from nnunetv2_semisup.labels import partly_known
from nnunetv2_semisup.losses.consistency import decide, probabilities
from nnunetv2_semisup.network import taps
from nnunetv2_semisup.network.teacher import Teacher
from nnunetv2_semisup.settings import SemiSupSettings, setting
from nnunetv2_semisup.trainers.base import nnUNetTrainerSemiSup
from nnunetv2_semisup.trainers.method import Group, SemiSupMethod, TaskInfo


@dataclass(frozen=True)
class BCPSettings(SemiSupSettings):
    """The released code's values for LA. Its two mixed patches count half each: nnU-Net's CE + Dice is not halved."""

    u_weight: float = setting(0.5, "paper (alpha) and code: of the pseudo-labelled part", within="[0, inf)")
    box_share: float = setting(2 / 3, "paper (beta) and code: of the patch's edges", "share", within="(0, 1)")
    pretrain_share: float = setting(
        0.0, "copy-paste among labelled patches first; published: 2,000 of 17,000 iterations", "share", within="[0, 1)"
    )
    largest_component: bool = setting(
        False, "code: true, of every class in a patch, on the CPU; wrong where a class has several parts"
    )
    teacher_decay: float = setting(0.99, "code, without warm-up", "per step", within="[0, 1)")

    published: ClassVar[dict[str, Any]] = {
        **SemiSupSettings.published,
        "pretrain_share": 2 / 17,
        "largest_component": True,
    }


class BCP(SemiSupMethod[BCPSettings]):
    """One group per step, both batches of mixed patches, and no pass over the labelled patches alone.

    With M 1 outside a box and 0 in it, l_a, l_b the halves of the labelled patches and u_a, u_b of the unlabelled ones:
    ``in`` is l_a M + u_a (1 - M), ``out`` is u_b M + l_b (1 - M). Each side of a box has a loss of its own; that of the
    pseudo-labelled side has the weight ``u_weight``, which the trainer's ramp raises. In the pre-training ``in`` is
    l_a M + l_b (1 - M), ``out`` the reverse.

    Deviations: a region's loss is nnU-Net's own, with deep supervision, in place of the code's CE and Dice with the
    background; the second phase goes on from the last weights of the first, not from the best.
    """

    settings_class = BCPSettings
    unsupervised_weights = ("u_weight",)

    def __init__(self, network: nn.Module, task: TaskInfo, settings: BCPSettings):
        super().__init__(network, task, settings)
        self.teacher = Teacher(network, settings.teacher_decay).without_warm_up()

    def unfit_batch(self, labelled: int, unlabelled: int) -> str | None:
        if min(labelled, unlabelled) >= 2 or not self.settings.u_weight:
            return None
        return "it mixes two labelled with two unlabelled patches: raise batch_size and unlabeled_batch_size to 2"

    def stage(self, progress: float) -> int:
        return 1 if progress < self.settings.pretrain_share else 2

    def enter_stage(self, network: nn.Module, stage: int) -> None:
        self.teacher.reset(network)

    def losses(self, network: nn.Module, labelled: dict, unlabelled: dict, progress: float) -> Iterator[Group]:
        if not self.settings.u_weight:
            yield self.supervised(network, labelled)
            return
        images = labelled["data"]
        of_task = self.task.has_regions, self.task.ignore_label
        true = (images, *partly_known(labelled["target"], *of_task), 1.0, torch.ones_like(self.head_weights))
        if self.stage(progress) == 1:
            other = true
        else:
            pseudo = self._pseudo_labels(unlabelled["data"])
            other = (unlabelled["data"], *pseudo, self.settings.u_weight * self.ramp, self.head_weights)
        half = min(len(images), len(other[0])) // 2
        outside = outside_box(images, self.settings.box_share)
        halves = slice(0, half), slice(half, 2 * half)
        (la, lb), (ua, ub) = ([(*(t[h] for t in side[:3]), *side[3:]) for h in halves] for side in (true, other))
        if other is true:
            ua, ub = lb, la
        yield self._mixed_losses(network, (la, ub), (ua, lb), outside)

    def _mixed_losses(self, network: nn.Module, outer: tuple, inner: tuple, outside: Tensor) -> Group:
        """Losses of two mixed batches in one pass: each of ``outer`` with a box of its ``inner`` in it.

        Args:
            outer, inner: of ``in`` and of ``out``: images, label and weight of their voxels, the part's weight, and its
                heads' weights.
            outside: (1, 1, X, Y, Z) bool, False in the box.
        """
        images = torch.cat([torch.where(outside, a[0], b[0]) for a, b in zip(outer, inner, strict=True)])
        output, _ = taps.decode(network, taps.encode(network, images))
        levels = [level.chunk(2) for level in (output if isinstance(output, list) else [output])]
        shares = (
            outside.float().mean(),
            (~outside).float().mean(),
        )  # so that the cross-entropy is a mean over the region
        group: Group = {}
        for i, (name, a, b) in enumerate(zip(("supervised_in", "supervised_out"), outer, inner, strict=True)):
            label = torch.where(outside, a[1], b[1])
            total = images.new_zeros(())
            for (_, _, known, weight, heads), region, share in zip((a, b), (outside, ~outside), shares, strict=True):
                of_half = [level[i] for level in levels]
                loss = self.task.supervised_loss.weighted(of_half, label, known * region / share, heads)
                total = total + weight * loss
            group[name] = (0.5, total)
        return group

    @torch.no_grad()
    def _pseudo_labels(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Decision of the teacher and weight of each voxel, as :func:`partly_known` gives those of labelled patches."""
        regions = self.task.has_regions
        label = decide(probabilities(taps.logits(self.teacher.module, images), regions), regions)
        if self.settings.largest_component:
            label = largest_components(label, self.task.num_heads)
        self.note_pseudo_labels(label)
        if regions:
            return label, self.head_weights.reshape(1, -1, *[1] * (label.ndim - 2)).expand(label.shape)
        return label[:, None], self.head_weights[label][:, None]

    def after_step(self, network: nn.Module) -> None:
        self.teacher.update_parameters(network)

    def reset(self, network: nn.Module) -> None:
        self.teacher.reset(network)


def outside_box(images: Tensor, share: float) -> Tensor:
    """(1, 1, X, Y, Z) bool: False in a box of floor(share * edge) voxels a side, anywhere in the patch; of all patches.

    Args:
        images: (B, C, X, Y, Z); gives shape and device.
        share: of the edges, in (0, 1).
    """
    shape, device = images.shape[2:], images.device
    inside = torch.ones(1, 1, *[1] * len(shape), dtype=torch.bool, device=device)
    for axis, size in enumerate(shape):
        side = max(1, int(share * size))
        start = torch.floor(torch.rand((), device=device) * (size - side))
        along = torch.arange(size, device=device)
        hit = (along >= start) & (along < start + side)
        inside = inside & hit.reshape(1, 1, *(size if i == axis else 1 for i in range(len(shape))))
    return ~inside


def largest_components(label: Tensor, heads: int) -> Tensor:
    """Each class of each patch reduced to its largest connected component; what is lost becomes background.

    Args:
        label: (B, X, Y, Z) int64 class; with regions (B, heads, X, Y, Z) bool.
        heads: number of classes.
    """
    array = label.cpu().numpy()
    kept = np.zeros_like(array)
    for patch, result in zip(array, kept, strict=True):
        for head in range(heads):
            mask = patch[head] if array.dtype == bool else patch == head
            if (array.dtype != bool and head == 0) or not mask.any():
                continue
            components, _ = ndimage.label(mask)
            largest = components == 1 + np.bincount(components.ravel())[1:].argmax()
            if array.dtype == bool:
                result[head] = largest
            else:
                result[largest] = head
    return torch.from_numpy(kept).to(label.device)


class nnUNetTrainerBCP(nnUNetTrainerSemiSup):
    method_class = BCP
