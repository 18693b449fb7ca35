"""BCP: labelled patches with a box of an unlabelled one, and unlabelled patches with a box of a labelled one.

Reference: Bai et al., "Bidirectional Copy-Paste for Semi-Supervised Medical Image Segmentation", CVPR 2023, arXiv
2305.00673; released code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nnunetv2_semisup.labels import labels_and_weights
from nnunetv2_semisup.losses.consistency import decide, probabilities
from nnunetv2_semisup.losses.pseudo_label import largest_components
from nnunetv2_semisup.network import taps
from nnunetv2_semisup.network.teacher import Teacher
from nnunetv2_semisup.perturbations.mixing import draw_shared_box
from nnunetv2_semisup.settings import SemiSupSettings, setting
from nnunetv2_semisup.trainers.base import nnUNetTrainerSemiSup
from nnunetv2_semisup.trainers.method import Group, SemiSupMethod, TaskInfo


@dataclass(frozen=True)
class BCPSettings(SemiSupSettings):
    """The released code's values; its supervised loss, the sum over two images of (CE + Dice) / 2, is as large as ours.

    With ``preset = published`` the run begins with the released code's first phase.
    """

    pseudo_weight: float = setting(
        0.5, "paper: alpha, of regions with pseudo-labels; true labels have 1. 0: nnU-Net's own step", within="[0, inf)"
    )
    box_side: float = setting(2 / 3, "paper: beta", "share of each edge", within="(0, 1]")
    teacher_decay: float = setting(0.99, "released code, without warm-up", "per step", within="[0, 1)")
    pretraining_fraction: float = setting(
        0.0, "the burn-in takes its place; published: 0.12, 2,000 of 17,000 iterations on LA", "share", within="[0, 1]"
    )
    largest_component: bool = setting(
        False, "published: true. Pseudo-labels keep the largest component of a class; not for lesions"
    )

    published: ClassVar[dict[str, Any]] = {
        **SemiSupSettings.published,
        "pretraining_fraction": 0.12,
        "largest_component": True,
    }


class BCP(SemiSupMethod[BCPSettings]):
    """One group per step.

    Stage 1, the share ``pretraining_fraction``: labelled patches with a box of other labelled ones. Stage 2: patches
    mixed of labelled and unlabelled ones, of which the regions with true labels are the term "supervised". Its cost is
    that of the teacher's pass on the unlabelled patches: 4/3 stock steps.
    """

    settings_class = BCPSettings
    cost, memory_gib, use = 1.3, 4.7, "the cheapest; lost a point in our first run"
    unsupervised_weights = ("pseudo_weight",)
    alters_supervision: ClassVar[dict[str, Any]] = {"pretraining_fraction": 0.0}

    def __init__(self, network: nn.Module, task: TaskInfo, settings: BCPSettings):
        super().__init__(network, task, settings)
        self.teacher = Teacher(network, settings.teacher_decay)
        self.teacher.without_warm_up()

    def unfit_batch(self, labelled: int, unlabelled: int) -> str | None:
        return None if labelled >= 2 else "patches are mixed in pairs: raise the plans' batch_size to 2 per GPU or more"

    def losses(self, network: nn.Module, labelled: dict, unlabelled: dict, progress: float) -> Iterator[Group]:
        weight = self.settings.pseudo_weight
        if self.stage(progress) == 1:
            yield {"supervised": (1.0, self._labelled_with_labelled(network, labelled))}
        elif weight > 0:
            true, pseudo = self._labelled_with_unlabelled(network, labelled, unlabelled["data"])
            yield {"supervised": (1.0, true), "pasted": (weight, pseudo)}
        else:
            yield self.supervised(network, labelled)

    def stage(self, progress: float) -> int:
        return 1 if progress < self.settings.pretraining_fraction else 2

    def enter_stage(self, network: nn.Module, stage: int) -> None:
        """The teacher of stage 2 begins as the student that stage 1, or the burn-in, leaves."""
        self.teacher.reset(network)

    def after_step(self, network: nn.Module) -> None:
        self.teacher.update_parameters(network)

    def _labelled_with_labelled(self, network: nn.Module, labelled: dict) -> Tensor:
        """nnU-Net's loss on labelled patches, each with a box of the one before it."""
        patches = (labelled["data"], *self._true_labels(labelled))
        box = draw_shared_box(labelled["data"], self.settings.box_side)
        images, label, weight = (torch.where(box, part.roll(1, 0), part) for part in patches)
        output, _ = taps.decode(network, taps.encode(network, images))
        return self.task.supervised_loss.weighted(output, label, weight, torch.ones_like(self.head_weights))

    def _labelled_with_unlabelled(
        self, network: nn.Module, labelled: dict, unlabelled: Tensor
    ) -> tuple[Tensor, Tensor]:
        """nnU-Net's loss on the regions with true labels and on those with pseudo-labels, means over their voxels.

        Even patches are labelled outside the box, odd ones inside it; a loss is the mean of theirs. Of two batches the
        smaller one is repeated.
        """
        every = torch.arange(max(len(labelled["data"]), len(unlabelled)), device=unlabelled.device)
        true = [part[every % len(part)] for part in (labelled["data"], *self._true_labels(labelled))]
        pseudo = [part[every % len(part)] for part in (unlabelled, *self._pseudo_labels(unlabelled))]
        odd = (every % 2 == 1).reshape(-1, *[1] * (unlabelled.ndim - 1))
        is_true = draw_shared_box(unlabelled, self.settings.box_side) == odd
        images, label, _ = (torch.where(is_true, a, b) for a, b in zip(true, pseudo, strict=True))
        output, _ = taps.decode(network, taps.encode(network, images))
        known = is_true & (true[2][:, :1] > 0)
        regions = torch.stack([known & ~odd, known & odd, ~is_true & ~odd, ~is_true & odd]).float()
        shares = regions.flatten(1).mean(1).clamp(min=1e-6)  # an empty region has no weight either
        weights = torch.stack([true[2].expand_as(pseudo[2])] * 2 + [pseudo[2]] * 2)
        weights = weights * regions / shares.reshape(-1, *[1] * images.ndim)
        ones = torch.ones_like(self.head_weights)
        factors = torch.stack([ones, ones, self.head_weights, self.head_weights])
        losses = self.task.supervised_loss.weighted(output, label, weights, factors)
        return losses[:2].mean(), losses[2:].mean()

    def _true_labels(self, labelled: dict) -> tuple[Tensor, Tensor]:
        return labels_and_weights(labelled["target"], self.task.has_regions, self.task.ignore_label)

    @torch.no_grad()
    def _pseudo_labels(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's decision, and how much its class counts."""
        regions = self.task.has_regions
        decided = decide(probabilities(taps.logits(self.teacher.module, images), regions), regions)
        label = decided if regions else decided[:, None]
        if self.settings.largest_component:
            label = largest_components(label)
        self.note_pseudo_labels(label if regions else label[:, 0])
        if regions:
            return label, self.head_weights.reshape(1, -1, *[1] * (images.ndim - 2)).expand(label.shape)
        return label, self.head_weights[label]


class nnUNetTrainerBCP(nnUNetTrainerSemiSup):
    method_class = BCP
