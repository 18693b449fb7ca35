"""PasteMatch: a teacher's confident labels, learned under a strong view on patches mixed with labelled ones.

Ours. Its parts are known: the moving-average teacher (Tarvainen & Valpola, NeurIPS 2017), hard pseudo-labels above a
threshold under strong views (FixMatch: Sohn et al., NeurIPS 2020), and patches pasted between labelled and unlabelled
images (BCP: Bai et al., CVPR 2023). docs/methods/paste_match.md says what is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nnunetv2_semisup.labels import labels_and_weights
from nnunetv2_semisup.losses.consistency import decide, probabilities
from nnunetv2_semisup.network import taps
from nnunetv2_semisup.network.teacher import Teacher
from nnunetv2_semisup.perturbations.image import apply_strong_view, draw_boxes, draw_strong_view
from nnunetv2_semisup.settings import SemiSupSettings, setting
from nnunetv2_semisup.trainers.base import nnUNetTrainerSemiSup
from nnunetv2_semisup.trainers.method import Group, SemiSupMethod, TaskInfo

INTENSITY_PROBABILITY, BLUR_PROBABILITY = 0.8, 0.5  # of a strong view; CrossMatch's


@dataclass(frozen=True)
class PasteMatchSettings(SemiSupSettings):
    """Nothing here has to be tuned for a data set."""

    weight: float = setting(1.0, "ours: of the mixed patches; the supervised loss has 1", within="[0, inf)")
    max_teacher_decay: float = setting(
        0.999, "ours: of min(this, 1 - 10 / steps of the training)", "per step", within="[0, 1)"
    )
    threshold: float = setting(0.7, "ours: confidence a foreground voxel needs", "probability", within="[0, 1]")
    background_threshold: float = setting(
        0.95, "ours: confidence a background voxel needs", "probability", within="[0, 1]"
    )
    paste_probability: float = setting(
        1.0, "ours: of a patch to be mixed with a labelled one", "probability", within="[0, 1]"
    )
    box_volume: tuple[float, ...] = setting(
        (0.1, 0.5), "ours: smallest and largest box", "share of the patch", within="(0, 1]"
    )
    bias_field: bool | None = setting(None, "strong view of MRI; null: unless nnU-Net normalises the images as CT")

    def __post_init__(self):
        super().__post_init__()
        in_order = len(self.box_volume) == 2 and self.box_volume[0] <= self.box_volume[1]
        self.require(in_order, "box_volume", "smallest and largest share")


class Patches(NamedTuple):
    """Images (B, C, X, Y, Z) with what is known of them.

    Attributes:
        label: (B, 1, X, Y, Z) int64 class; with regions (B, heads, X, Y, Z) bool.
        weight: float in [0, 1] of the label's shape, how much each voxel, with regions each head of it, counts.
    """

    images: Tensor
    label: Tensor
    weight: Tensor


class PasteMatch(SemiSupMethod[PasteMatchSettings]):
    """Two groups per step: the mixed patches, then the stock supervised loss; both divided by 1 + ramped weight.

    So a new term does not act as a jump of the learning rate. Cost: the teacher sees the unlabelled patches without
    gradient, the student the mixed ones: 7/3 stock steps.
    """

    settings_class = PasteMatchSettings
    cost, memory_gib, use = 2.3, 4.8, "the first to try where labels are few"
    unsupervised_weights = ("weight",)

    def __init__(self, network: nn.Module, task: TaskInfo, settings: PasteMatchSettings):
        super().__init__(network, task, settings)
        steps = settings.num_epochs * settings.num_iterations_per_epoch
        self.bias_field = not task.is_ct if settings.bias_field is None else settings.bias_field
        self.teacher = Teacher(network, max(0.0, min(settings.max_teacher_decay, 1 - 10 / steps)))

    def losses(self, network: nn.Module, labelled: dict, unlabelled: dict, progress: float) -> Iterator[Group]:
        weight = self.settings.weight
        share = 1 / (1 + weight * self.ramp)
        if weight > 0:
            yield {"mixed": (weight * share, self._mixed_loss(network, labelled, unlabelled["data"]))}
        yield {name: (share * w, value) for name, (w, value) in self.supervised(network, labelled).items()}

    def after_step(self, network: nn.Module) -> None:
        self.teacher.update_parameters(network)

    def reset(self, network: nn.Module) -> None:
        self.teacher.reset(network)

    def confidence_needed(self, progress: float) -> tuple[float, float]:
        return self.settings.threshold, self.settings.background_threshold

    def _mixed_loss(self, network: nn.Module, labelled: dict, images: Tensor) -> Tensor:
        s = self.settings
        with torch.no_grad():
            known = self._pseudo_labels(images)
            view = draw_strong_view(images, INTENSITY_PROBABILITY, BLUR_PROBABILITY, self.bias_field)
            known = known._replace(images=apply_strong_view(images, view))
            mixed = paste(known, self._true_labels(labelled, len(images)), s.paste_probability, s.box_volume)
        output, _ = taps.decode(network, taps.encode(network, mixed.images))
        return self.task.supervised_loss.weighted(output, mixed.label, mixed.weight, self.head_weights)

    def _pseudo_labels(self, images: Tensor) -> Patches:
        """What the teacher says of the patches; a voxel that is not confident enough weighs 0."""
        s, regions = self.settings, self.task.has_regions
        p = probabilities(taps.logits(self.teacher.module, images), regions)
        decided = decide(p, regions)
        self.note_pseudo_labels(decided)
        if regions:
            confidence, label = torch.maximum(p, 1 - p), decided
            trust = self.head_weights.reshape(1, -1, *[1] * (p.ndim - 2))
        else:
            confidence, label = p.amax(1, keepdim=True), decided[:, None]
            trust = self.head_weights[label]
        keep = confidence >= torch.where(label > 0, s.threshold, s.background_threshold)
        self.diagnostics["share_kept"] = keep.float().mean()
        return Patches(images, label, keep * trust)

    def _true_labels(self, labelled: dict, count: int) -> Patches:
        """``count`` labelled patches, the batch repeated where it is smaller."""
        label, known = labels_and_weights(labelled["target"], self.task.has_regions, self.task.ignore_label)
        chosen = torch.arange(count, device=label.device) % len(label)
        return Patches(labelled["data"][chosen], label[chosen], known[chosen])


def paste(unlabelled: Patches, labelled: Patches, probability: float, volume: tuple[float, ...]) -> Patches:
    """Mix pairs of patches: a box of one in the other, either way round; image, label and weight alike.

    Args:
        unlabelled, labelled: as many patches each.
        probability: of a pair to be mixed; else the unlabelled patch stays whole.
        volume: smallest and largest share of a box.
    """
    box = draw_boxes(unlabelled.images, probability, volume)
    any_box = box.flatten(1).any(1).reshape(-1, *[1] * (box.ndim - 1))
    turned = torch.rand(any_box.shape, device=box.device) < 0.5
    from_labelled = torch.where(turned & any_box, ~box, box)
    return Patches(*(torch.where(from_labelled, a, b) for a, b in zip(labelled, unlabelled, strict=True)))


class nnUNetTrainerPasteMatch(nnUNetTrainerSemiSup):
    method_class = PasteMatch
