"""UA-MT: Mean Teacher that learns only where the teacher, asked several times, is certain.

Reference: Yu et al., "Uncertainty-Aware Self-Ensembling Model for Semi-Supervised 3D Left Atrium Segmentation", MICCAI
2019, arXiv 1907.07034; released code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nnunetv2_semisup.losses.consistency import (
    agreement,
    decide,
    entropy,
    mean_squared_difference,
    probabilities,
)
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
    """Defaults are the paper's, converted to nnU-Net's supervised loss."""

    consistency_weight: float = setting(
        0.2, "0.1 beside (CE + Dice) / 2; doubled: nnU-Net's CE + Dice is not halved", within="[0, inf)"
    )
    ramp_fraction: float = setting(
        0.0, "a ramp of its own; published: 1, all 6,000 iterations", "share", within="[0, 1]"
    )
    teacher_decay: float = setting(0.99, "released code", "per step", within="[0, 1)")
    samples: int = setting(
        8, "paper: T, passes of the teacher that measure its uncertainty", "passes", within="[1, inf)"
    )
    dropout: float = setting(
        0.5, "released network: channels at the bottleneck and before the output", "probability", within="[0, 1)"
    )
    noise_std: float = setting(0.1, "released code", "normalised intensity", within="[0, inf)")
    noise_limit: float = setting(0.2, "released code", "normalised intensity", within="[0, inf)")
    threshold_start: float = setting(
        0.75, "paper: of the largest entropy, to which the threshold rises", "share", within="[0, 1]"
    )

    published: ClassVar[dict[str, Any]] = {**SemiSupSettings.published, "ramp_fraction": 1.0}


class UAMT(SemiSupMethod[UAMTSettings]):
    """Two groups per step: consistency where the teacher is certain, then the stock supervised loss.

    Deviations: the planned network has no dropout; channels are dropped in all passes on unlabelled patches and not in
    the labelled one, which stays nnU-Net's. The ln 2 of the threshold is ln C for C classes.
    """

    settings_class = UAMTSettings
    cost, memory_gib, use = 5.0, 4.8, "a baseline of the literature"
    unsupervised_weights = ("consistency_weight",)

    def __init__(self, network: nn.Module, task: TaskInfo, settings: UAMTSettings):
        super().__init__(network, task, settings)
        self.teacher = Teacher(network, settings.teacher_decay)

    def losses(self, network: nn.Module, labelled: dict, unlabelled: dict, progress: float) -> Iterator[Group]:
        weight = self.settings.consistency_weight * sigmoid_ramp_up(progress, self.settings.ramp_fraction)
        if weight > 0:
            yield {"consistency": (weight, self._consistency(network, unlabelled["data"], self.threshold(progress)))}
        yield self.supervised(network, labelled)

    def after_step(self, network: nn.Module) -> None:
        self.teacher.update_parameters(network)

    def reset(self, network: nn.Module) -> None:
        self.teacher.reset(network)

    def threshold(self, progress: float) -> float:
        """Entropy below which a voxel is certain; it rises to that of the uniform distribution."""
        start = self.settings.threshold_start
        largest = math.log(2 if self.task.has_regions else self.task.num_heads)
        return (start + (1 - start) * sigmoid_ramp_up(progress, 1.0)) * largest

    def _consistency(self, network: nn.Module, images: Tensor, threshold: float) -> Tensor:
        """Student on clean images against one pass of the teacher, over the voxels where the teacher is certain."""
        regions = self.task.has_regions
        with torch.no_grad():
            target = self._teacher(images)
            certain = entropy(self._teachers_mean(images), regions) < threshold
        student = probabilities(self._logits(network, images), regions)
        self.diagnostics["share_certain"] = certain.float().mean()
        self.diagnostics["share_teacher_student_agreement"] = agreement(student, target, regions)
        self.note_pseudo_labels(decide(target, regions))
        return mean_squared_difference(student, target, self.head_weights, certain)

    def _teachers_mean(self, images: Tensor) -> Tensor:
        """Mean probabilities over the samples, one after the other to save memory."""
        total = self._teacher(images)
        for _ in range(self.settings.samples - 1):
            total += self._teacher(images)
        return total / self.settings.samples

    def _teacher(self, images: Tensor) -> Tensor:
        """Probabilities under noise and dropout, new in each call."""
        noise = draw_clipped_noise(images, self.settings.noise_std, self.settings.noise_limit)
        return probabilities(self._logits(self.teacher.module, images + noise), self.task.has_regions)

    def _logits(self, network: nn.Module, images: Tensor) -> Tensor:
        """Full-resolution logits with channels dropped at the bottleneck and before the output layer."""
        *skips, bottleneck = taps.encode(network, images)
        _, features = taps.decode(network, [*skips, self._drop(bottleneck)], deep_supervision=False)
        return taps.segment(network, self._drop(features))

    def _drop(self, features: Tensor) -> Tensor:
        (dropped,) = drop_channels([features], draw_channel_masks([features], self.settings.dropout))
        return dropped


class nnUNetTrainerUAMT(nnUNetTrainerSemiSup):
    method_class = UAMT
