"""ACTION++: ACTION with labelled voxels drawn to evenly spread class centres, and a cosine temperature schedule.

Reference: You, Dai, Min, Staib, Sekhon & Duncan, "ACTION++: Improving Semi-supervised Medical Image Segmentation with
Adaptive Anatomical Contrast", MICCAI 2023, doi 10.1007/978-3-031-43901-8_19, arXiv 2304.02689; released code. Readings
and deviations: docs/methods/action.md.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunetv2_semisup.losses.anatomical import adaptive_anatomical_contrast, draw_voxels
from nnunetv2_semisup.memory.centres import allocate, simplex_centres
from nnunetv2_semisup.memory.queue import Queue, random_unit_rows
from nnunetv2_semisup.memory.sampling import sample_size
from nnunetv2_semisup.network import taps
from nnunetv2_semisup.network.teacher import MovingAverage
from nnunetv2_semisup.schedules import cosine_temperature
from nnunetv2_semisup.settings import SemiSupSettings, setting
from nnunetv2_semisup.trainers.action import ACTION, ONE_IN, QUERIES, ACTIONSettings, Voxels, thinned
from nnunetv2_semisup.trainers.base import nnUNetTrainerSemiSup
from nnunetv2_semisup.trainers.method import TaskInfo
from nnunetv2_semisup.training.distributed import gather_rows

QUEUE = 12288  # of voxels; code


@dataclass(frozen=True)
class ACTIONPlusPlusSettings(ACTIONSettings):
    """ACTION's, and those of the additions. The schedule replaces tau_s, tau_t, tau_anco and tau_classes, which must
    keep their defaults."""

    stage_fractions: tuple[float, ...] = setting(
        (0.0, 0.25, 0.75), "paper: joint pre-training, LA 5k + 15k iterations", within="[0, 1]"
    )
    w_aaco: float = setting(0.01, "code: weight of the adaptive anatomical contrast, stage three", within="[0, inf)")
    lambda_a: float = setting(0.2, "paper, TSC; 2D script: 0.1. Weight of the own class centre", within="[0, inf)")
    tau_min: float = setting(0.1, "paper: lowest temperature, at half time of a stage", within="(0, inf)")
    tau_max: float = setting(1.0, "paper: temperature at both ends of a stage", within="(0, inf)")
    teacher_sharpness: float = setting(
        0.1, "ours: teacher's over student's temperature, ACTION's 0.01 : 0.1", "factor", within="(0, inf)"
    )
    voxels: int | None = setting(
        None, "null: 256, code, on small patches one in 256: labelled voxels per class and step", within="[1, inf)"
    )
    voxel_queue_size: int | None = setting(
        None,
        "null: 12288, code, on small patches 4 patches: earlier teacher embeddings",
        "voxels",
        within="[1, inf)",
    )
    centroid_decay: float = setting(0.9, "code: moving average of the class means", "per step", within="[0, 1)")

    published: ClassVar[dict[str, Any]] = {
        **SemiSupSettings.published,
        "lr_restart": True,
        "global_cells": 1,
        "queries": QUERIES,
        "voxels": QUERIES,
        "voxel_queue_size": QUEUE,
    }

    def __post_init__(self):
        super().__post_init__()
        self.require(self.tau_min <= self.tau_max, "tau_min", "at most tau_max")
        for key in ("tau_s", "tau_t", "tau_anco", "tau_classes"):
            default = type(self).__dataclass_fields__[key].default
            self.require(getattr(self, key) == default, key, "left alone: tau_min and tau_max replace it")


class Reference(NamedTuple):
    """Voxels drawn from the labelled patches, with replacement, V per class.

    Attributes:
        positions: (K, V) int64 on the grid.
        present: (K,) bool, classes with any labelled voxel; the positions of others mean nothing.
        rows: (K, V, F) unit embeddings of the teacher.
    """

    positions: Tensor
    present: Tensor
    rows: Tensor


class ACTIONPlusPlus(ACTION):
    """ACTION's stages two and three (8/3 supervised steps each) with one more term in stage three: ``adaptive``."""

    settings_class = ACTIONPlusPlusSettings
    cost, memory_gib, use = 2.7, 8.5, "to compare with the paper"
    unsupervised_weights = (*ACTION.unsupervised_weights, "w_aaco")

    settings: ACTIONPlusPlusSettings
    centres: Tensor
    centroids: Tensor
    allocation: Tensor

    def __init__(self, network: nn.Module, task: TaskInfo, settings: ACTIONPlusPlusSettings):
        super().__init__(network, task, settings)
        s, width = settings, settings.representation_features
        s.require(width >= self.classes, "representation_features", f"at least {self.classes}, the number of classes")
        self.teacher_representation = MovingAverage(self.representation, s.teacher_decay).without_warm_up()
        grid = self.representation.thin(torch.empty(task.patch_size)).numel()
        size = min(QUEUE, 4 * grid) if s.voxel_queue_size is None else s.voxel_queue_size
        self.queues["voxels"] = Queue(random_unit_rows(size, width))
        self.queues["voxel_labels"] = Queue(torch.full((size,), -1))
        self.register_buffer("centres", simplex_centres(self.classes, width))
        self.register_buffer("centroids", torch.zeros(self.classes, width))
        self.register_buffer("allocation", torch.arange(self.classes))
        self._cosines: Tensor | None = None  # of centroids and centres, on the CPU
        self._contrasted: tuple[Tensor, ...] | None = None  # of the step

    def stage_weights(self, stage: int) -> dict[str, float]:
        more = {"adaptive": self.settings.w_aaco} if stage == 3 else {}
        return super().stage_weights(stage) | more

    # -------------------------------------------------------------------------------------------------- temperatures

    def scheduled_temperature(self, progress: float) -> float:
        """One period of the cosine per stage."""
        epoch = min(self.epoch(progress), self.bounds[-1] - 1e-6)
        i = bisect_right(self.bounds, epoch)
        start, end = self.bounds[i - 1], self.bounds[i]
        return cosine_temperature((epoch - start) / (end - start), self.settings.tau_min, self.settings.tau_max)

    def distillation_temperatures(self, progress: float) -> tuple[float, float]:
        tau = self.scheduled_temperature(progress)
        return tau, self.settings.teacher_sharpness * tau

    def contrast_temperature(self, progress: float) -> float:
        return self.scheduled_temperature(progress)

    def classes_temperature(self, progress: float) -> float:
        return self.scheduled_temperature(progress)

    # ------------------------------------------------------------------------------------ adaptive anatomical contrast

    def _reference(self, images: Tensor, classes: Tensor) -> Reference | None:
        if not self.settings.w_aaco:
            return None
        members = self._members(classes)
        positions, present = draw_voxels(members, sample_size(self.settings.voxels, QUERIES, members.shape[1], ONE_IN))
        head = self.teacher_representation.module
        _, levels = taps.decode_levels(self.teacher.module, taps.encode(self.teacher.module, images))
        rows = head.rows(thinned(head, levels), positions)
        return Reference(positions, present, F.normalize(rows, dim=2))

    def _contrasts(
        self, voxels: Voxels, reference: Reference | None, names: dict[str, float], progress: float
    ) -> dict[str, Tensor]:
        values = super()._contrasts(voxels, reference, names, progress)
        self._contrasted = None
        if reference is not None:
            values["adaptive"] = self._adaptive_contrast(voxels, reference, self.contrast_temperature(progress))
        return values

    def _adaptive_contrast(self, voxels: Voxels, reference: Reference, temperature: float) -> Tensor:
        """Voxels of the labelled patches: teacher embeddings of the same class and the class's centre attract."""
        positions, present, teacher = reference
        student = self.representation.rows(voxels.maps, positions)  # labelled patches come first there
        classes = torch.arange(self.classes, device=present.device)
        labels = torch.where(present, classes, -1)[:, None].expand(positions.shape)
        self._contrasted = (F.normalize(student.detach(), dim=2).sum(1) * present[:, None], present, teacher, labels)
        return adaptive_anatomical_contrast(
            student.flatten(0, 1),
            teacher.flatten(0, 1),
            labels.flatten(),
            self.queue("voxels").rows,
            self.queue("voxel_labels").rows,
            self.centres[self.allocation],
            temperature,
            self.settings.lambda_a,
        )

    def after_step(self, network: nn.Module) -> None:
        super().after_step(network)
        self.teacher_representation.update_parameters(self.representation)
        if self._contrasted is None:
            return
        sums, present, teacher, labels = self._contrasted
        # Class after class would let the last classes push the first ones out of a queue that is too short for all.
        by_draw = (x.transpose(0, 1).flatten(0, 1) for x in (teacher, labels))
        rows, labels, sums, present = gather_rows(*by_draw, sums[None], present[None])
        self.queue("voxels").push(rows, labels >= 0)
        self.queue("voxel_labels").push(labels, labels >= 0)
        # The allocation of the centroids so far: the copy to the CPU is over by now, so that a GPU need not be awaited.
        if self._cosines is None:
            self._cosines = (self.centroids @ self.centres.T).cpu()
        self.allocation.copy_(allocate(self._cosines), non_blocking=True)
        self._update_centroids(sums.sum(0), present.any(0))
        self._cosines = (self.centroids @ self.centres.T).to("cpu", non_blocking=True)

    def _update_centroids(self, sums: Tensor, present: Tensor) -> None:
        """Moving averages on the sphere, of the classes present alone; a class's first mean is taken as it is."""
        decay = self.settings.centroid_decay
        moved = F.normalize(decay * self.centroids + (1 - decay) * F.normalize(sums, dim=1), dim=1)
        self.centroids.copy_(torch.where(present[:, None], moved, self.centroids))

    def _reset_teacher(self, network: nn.Module) -> None:
        super()._reset_teacher(network)
        self.teacher_representation.reset(self.representation)


class nnUNetTrainerACTIONPlusPlus(nnUNetTrainerSemiSup):
    method_class = ACTIONPlusPlus
