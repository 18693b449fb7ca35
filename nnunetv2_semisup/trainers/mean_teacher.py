"""Mean Teacher: the student agrees with the moving average of itself on noisy unlabelled patches.

Reference: Tarvainen & Valpola, "Mean teachers are better role models", NeurIPS 2017, arXiv 1703.01780; the form for
segmentation (noise, ramp, weights) as in the released code of UA-MT (Yu et al., MICCAI 2019) and SSL4MIS.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from nnunetv2_semisup.losses.consistency import agreement, decide, mean_squared_difference, probabilities
from nnunetv2_semisup.network import taps
from nnunetv2_semisup.network.teacher import Teacher
from nnunetv2_semisup.perturbations.noise import draw_clipped_noise
from nnunetv2_semisup.schedules import sigmoid_ramp_up
from nnunetv2_semisup.settings import SemiSupSettings, setting
from nnunetv2_semisup.trainers.base import nnUNetTrainerSemiSup
from nnunetv2_semisup.trainers.method import Group, SemiSupMethod, TaskInfo


@dataclass(frozen=True)
class MeanTeacherSettings(SemiSupSettings):
    """Defaults are the literature's, converted to nnU-Net's supervised loss."""

    consistency_weight: float = setting(
        0.2, "0.1 beside (CE + Dice) / 2; doubled: nnU-Net's CE + Dice is not halved", within="[0, inf)"
    )
    ramp_fraction: float = setting(
        0.0, "a ramp of its own; published: 0.4, 6,000 of 15,000 iterations on LA", "share", within="[0, 1]"
    )
    teacher_decay: float = setting(
        0.99, "UA-MT and SSL4MIS; 0.999 averages over a longer time", "per step", within="[0, 1)"
    )
    noise_std: float = setting(0.1, "UA-MT", "normalised intensity", within="[0, inf)")
    noise_limit: float = setting(0.2, "UA-MT", "normalised intensity", within="[0, inf)")
    inference_weights: Literal["student", "teacher"] = setting("student", "the released scripts test the student")

    published: ClassVar[dict[str, Any]] = {**SemiSupSettings.published, "ramp_fraction": 0.4}


class MeanTeacher(SemiSupMethod[MeanTeacherSettings]):
    """Two groups per step: consistency on the unlabelled patches, then the stock supervised loss.

    Deviation: the published student sees labelled and unlabelled patches in one batch. Here they are two passes, equal
    for networks without batch statistics (nnU-Net's default is InstanceNorm), at half the memory.
    """

    settings_class = MeanTeacherSettings
    cost, memory_gib, use = 2.3, 4.8, "the baseline that every paper has"
    unsupervised_weights = ("consistency_weight",)

    def __init__(self, network: nn.Module, task: TaskInfo, settings: MeanTeacherSettings):
        super().__init__(network, task, settings)
        self.teacher = Teacher(network, settings.teacher_decay)

    def losses(self, network: nn.Module, labelled: dict, unlabelled: dict, progress: float) -> Iterator[Group]:
        weight = self.settings.consistency_weight * sigmoid_ramp_up(progress, self.settings.ramp_fraction)
        if weight > 0:
            yield {"consistency": (weight, self._consistency(network, unlabelled["data"]))}
        yield self.supervised(network, labelled)

    def _consistency(self, network: nn.Module, images: Tensor) -> Tensor:
        """Student on clean images against teacher on noisy ones, over the full-resolution probabilities."""
        with torch.no_grad():
            noise = draw_clipped_noise(images, self.settings.noise_std, self.settings.noise_limit)
            target = probabilities(taps.logits(self.teacher.module, images + noise), self.task.has_regions)
        student = probabilities(taps.logits(network, images), self.task.has_regions)
        self.diagnostics["share_teacher_student_agreement"] = agreement(student, target, self.task.has_regions)
        self.note_pseudo_labels(decide(target, self.task.has_regions))
        return mean_squared_difference(student, target, self.head_weights)

    def after_step(self, network: nn.Module) -> None:
        self.teacher.update_parameters(network)

    def reset(self, network: nn.Module) -> None:
        self.teacher.reset(network)

    def inference_network(self, network: nn.Module) -> nn.Module:
        return self.teacher.module if self.settings.inference_weights == "teacher" else network


class nnUNetTrainerMeanTeacher(nnUNetTrainerSemiSup):
    method_class = MeanTeacher
