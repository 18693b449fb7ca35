"""UA-MT: a mean teacher that teaches only where repeated noisy predictions of it are certain.

Reference: Yu, Wang, Li, Fu & Heng, "Uncertainty-Aware Self-Ensembling Model for Semi-Supervised 3D Left Atrium
Segmentation", MICCAI 2019, arXiv 1907.07034; released code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nnunetv2_semisup.losses.consistency import decide, probabilities
from nnunetv2_semisup.network import taps
from nnunetv2_semisup.network.teacher import Teacher
from nnunetv2_semisup.perturbations.feature import draw_channel_masks, drop_channels
from nnunetv2_semisup.perturbations.noise import draw_clipped_noise
from nnunetv2_semisup.schedules import sigmoid_ramp_up
from nnunetv2_semisup.settings import SemiSupSettings, setting
from nnunetv2_semisup.trainers.base import nnUNetTrainerSemiSup
from nnunetv2_semisup.trainers.method import Group, SemiSupMethod, TaskInfo


@dataclass(frozen=True)
class UAMTSettings(SemiSupSettings):
    """The released code's values for LA, converted to nnU-Net's supervised loss."""

    consistency_weight: float = setting(
        0.2, "0.1 beside (CE + Dice) / 2; doubled: nnU-Net's CE + Dice is not halved", within="[0, inf)"
    )
    ramp_fraction: float = setting(0.0, "a ramp of its own; published: the whole training", "share", within="[0, 1]")
    samples: int = setting(8, "paper and code: stochastic predictions of the teacher", "passes", within="[2, inf)")
    first_threshold: float = setting(
        0.75,
        "paper and code: of the uncertainty at the start; it rises to 1",
        "of the largest entropy",
        within="[0, 1]",
    )
    dropout: float = setting(
        0.5, "paper and code: of a channel at the bottleneck and before the last convolution", within="[0, 1)"
    )
    teacher_decay: float = setting(0.99, "paper and code", "per step", within="[0, 1)")
    noise_std: float = setting(0.1, "code", "normalised intensity", within="[0, inf)")
    noise_limit: float = setting(0.2, "code", "normalised intensity", within="[0, inf)")

    published: ClassVar[dict[str, Any]] = {**SemiSupSettings.published, "ramp_fraction": 1.0}


class UAMT(SemiSupMethod[UAMTSettings]):
    """Two groups per step: consistency where the teacher is certain, then the stock supervised loss.

    Deviations: the supervised pass has no dropout, so that it is nnU-Net's; for C classes ln 2 and the divisor 2 of the
    binary code become ln C and C; with regions each head has an entropy and a mask of its own.
    """

    settings_class = UAMTSettings
    unsupervised_weights = ("consistency_weight",)

    def __init__(self, network: nn.Module, task: TaskInfo, settings: UAMTSettings):
        super().__init__(network, task, settings)
        self.teacher = Teacher(network, settings.teacher_decay)

    def losses(self, network: nn.Module, labelled: dict, unlabelled: dict, progress: float) -> Iterator[Group]:
        weight = self.settings.consistency_weight * sigmoid_ramp_up(progress, self.settings.ramp_fraction)
        if weight > 0:
            yield {"consistency": (weight, self._consistency(network, unlabelled["data"], progress))}
        yield self.supervised(network, labelled)

    def threshold(self, progress: float) -> float:
        """Share of the largest entropy below which a voxel counts: from 0.7517 up to 1 (code)."""
        first = self.settings.first_threshold
        return first + (1 - first) * sigmoid_ramp_up(progress, 1.0)

    def _consistency(self, network: nn.Module, images: Tensor, progress: float) -> Tensor:
        regions = self.task.has_regions
        with torch.no_grad():
            target = self._noisy(images)
            mean = self._noisy(images)
            for _ in range(self.settings.samples - 1):
                mean = mean + self._noisy(images)
            certain = relative_entropy(mean / self.settings.samples, regions) < self.threshold(progress)
            self.note_pseudo_labels(decide(target, regions))
            self.diagnostics["share_certain"] = certain.float().mean()
        student = probabilities(self._dropped_logits(network, images), regions)
        return certain_squared_difference(student, target, certain, self.head_weights)

    def _noisy(self, images: Tensor) -> Tensor:
        """Probabilities of the teacher under fresh noise and dropout."""
        noise = draw_clipped_noise(images, self.settings.noise_std, self.settings.noise_limit)
        return probabilities(self._dropped_logits(self.teacher.module, images + noise), self.task.has_regions)

    def _dropped_logits(self, network: nn.Module, images: Tensor) -> Tensor:
        rate = self.settings.dropout
        *skips, bottleneck = taps.encode(network, images)
        skips += drop_channels([bottleneck], draw_channel_masks([bottleneck], rate))
        features = [taps.decode(network, skips)[1]]
        return taps.segment(network, drop_channels(features, draw_channel_masks(features, rate))[0])

    def after_step(self, network: nn.Module) -> None:
        self.teacher.update_parameters(network)

    def reset(self, network: nn.Module) -> None:
        self.teacher.reset(network)


def relative_entropy(p: Tensor, regions: bool) -> Tensor:
    """Entropy over the largest possible one, in [0, 1]: (B, 1, X, Y, Z); with regions of each head, of p's shape.

    Args:
        p: (B, heads, X, Y, Z) probabilities.
        regions: True: each head is a binary decision.
    """
    if regions:
        return -(p * torch.log(p + 1e-6) + (1 - p) * torch.log(1 - p + 1e-6)) / math.log(2)
    return -(p * torch.log(p + 1e-6)).sum(1, keepdim=True) / math.log(p.shape[1])


def certain_squared_difference(student: Tensor, teacher: Tensor, certain: Tensor, weights: Tensor) -> Tensor:
    """sum m w (p_s - p_t)^2 / sum m over all heads; 0 where no voxel is certain.

    Args:
        student, teacher: (B, heads, X, Y, Z) probabilities; the student's carry the gradient.
        certain: m, (B, 1, X, Y, Z) or (B, heads, X, Y, Z) bool.
        weights: w, (heads,) in [0, 1].
    """
    weights = weights.reshape(1, -1, *[1] * (student.ndim - 2))
    squares = torch.where(certain, weights * (student - teacher) ** 2, 0)
    return squares.sum() / certain.expand_as(squares).sum().clamp(min=1)


class nnUNetTrainerUAMT(nnUNetTrainerSemiSup):
    method_class = UAMT
