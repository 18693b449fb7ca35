"""UniMatch: strong image views and a perturbed feature view of an unlabelled patch learn from its weak view.

Reference: Yang et al., "Revisiting Weak-to-Strong Consistency in Semi-Supervised Semantic Segmentation", CVPR 2023,
arXiv 2208.09910; released code, medical branch. With other settings it is FixMatch (Sohn et al., NeurIPS 2020, arXiv
2001.07685) or online self-training without a threshold: docs/methods/unimatch.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from nnunetv2_semisup.losses.consistency import probabilities
from nnunetv2_semisup.losses.pseudo_label import (
    PseudoLabel,
    kept,
    masked_cross_entropy,
    masked_dice,
    mix,
    pseudo_label,
)
from nnunetv2_semisup.network import taps
from nnunetv2_semisup.perturbations.feature import draw_channel_masks, drop_channels
from nnunetv2_semisup.perturbations.image import apply_strong_view, draw_strong_view, mixed_strong_view
from nnunetv2_semisup.settings import SemiSupSettings, setting
from nnunetv2_semisup.trainers.base import nnUNetTrainerSemiSup
from nnunetv2_semisup.trainers.method import Group, SemiSupMethod, TaskInfo

DICE_SMOOTH = 1e-5  # released code


@dataclass(frozen=True)
class UniMatchSettings(SemiSupSettings):
    """The released medical version, its weights doubled: nnU-Net's CE + Dice is twice the published supervised loss."""

    image_weight: float = setting(
        1.0, "released code: 0.25 for each of two views, doubled; of all together", within="[0, inf)"
    )
    strong_views: int = setting(2, "paper; 1: FixMatch", "views", within="[1, inf)")
    feature_weight: float = setting(1.0, "released code: 0.5, doubled; 0: FixMatch", within="[0, inf)")
    feature_dropout: float = setting(0.5, "paper: channel dropout on every skip", "probability", within="[0, 1)")
    threshold: float = setting(0.95, "released code: confidence a voxel needs", "probability", within="[0, 1]")
    loss: Literal["dice", "cross_entropy", "nnunet"] = setting(
        "dice", "released medical code; cross_entropy: FixMatch; nnunet: its own loss with deep supervision"
    )
    intensity_probability: float = setting(0.8, "released code", "probability", within="[0, 1]")
    blur_probability: float = setting(0.5, "released code", "probability", within="[0, 1]")
    bias_field: bool | None = setting(None, "strong view of MRI; null: unless nnU-Net normalises the images as CT")
    box_probability: float = setting(0.5, "released code: CutMix; 0: no partners", "probability", within="[0, 1]")
    box_volume: tuple[float, ...] = setting(
        (0.02, 0.4), "released code: smallest and largest box", "share of the patch", within="(0, 1]"
    )

    def __post_init__(self):
        super().__post_init__()
        in_order = len(self.box_volume) == 2 and self.box_volume[0] <= self.box_volume[1]
        self.require(in_order, "box_volume", "smallest and largest share")


class UniMatch(SemiSupMethod[UniMatchSettings]):
    """A group for the feature view, one for each strong view, then the stock supervised loss.

    The pseudo-label is the prediction on the clean weak view, without gradient; a box of a strong view comes from the
    partner's strong view, its pseudo-label from the partner's weak view.

    Deviation: labelled and unlabelled patches are passes of their own, equal for networks without batch statistics
    (nnU-Net's default is InstanceNorm).
    """

    settings_class = UniMatchSettings
    cost, memory_gib, use = 4.6, 4.8, "FixMatch and online self-training are settings of it"
    unsupervised_weights = ("image_weight", "feature_weight")

    def __init__(self, network: nn.Module, task: TaskInfo, settings: UniMatchSettings):
        super().__init__(network, task, settings)
        self.bias_field = not task.is_ct if settings.bias_field is None else settings.bias_field
        self.wants_partners = settings.box_probability > 0

    def losses(self, network: nn.Module, labelled: dict, unlabelled: dict, progress: float) -> Iterator[Group]:
        s = self.settings
        if s.image_weight or s.feature_weight:
            patches = unlabelled["data"]
            # Each call returns before its group is yielded, so that no feature map outlives its group.
            own, value = self._weak_view(network, patches)
            if value is not None:
                yield {"feature": (s.feature_weight, value)}
            if s.image_weight:
                partners = unlabelled["partners"] if self.wants_partners else None
                others = self._labels_of_partners(network, partners)
                for view in range(1, s.strong_views + 1):
                    value = self._strong_view_loss(network, patches, own, partners, others)
                    yield {f"image_{view}": (s.image_weight / s.strong_views, value)}
        yield self.supervised(network, labelled)

    def confidence_needed(self, progress: float) -> tuple[float, float]:
        return self.settings.threshold, self.settings.threshold

    def _weak_view(self, network: nn.Module, patches: Tensor) -> tuple[PseudoLabel, Tensor | None]:
        """The pseudo-label of the patches, and the loss of their perturbed features; None without that term."""
        s = self.settings
        with torch.set_grad_enabled(s.feature_weight > 0):
            skips = taps.encode(network, patches)
        with torch.no_grad():
            clean = taps.logits_of(network, [skip.detach() for skip in skips])
        target = pseudo_label(clean, self.task.has_regions)
        self.note_pseudo_labels(target.label.bool() if self.task.has_regions else target.label[:, 0])
        self.diagnostics["share_confident"] = (target.confidence >= s.threshold).float().mean()
        if not s.feature_weight:
            return target, None
        output, _ = taps.decode(network, drop_channels(skips, draw_channel_masks(skips, s.feature_dropout)))
        return target, self._loss(output, target)

    @torch.no_grad()
    def _labels_of_partners(self, network: nn.Module, partners: Tensor | None) -> PseudoLabel | None:
        return None if partners is None else pseudo_label(taps.logits(network, partners), self.task.has_regions)

    def _strong_view_loss(
        self,
        network: nn.Module,
        patches: Tensor,
        own: PseudoLabel,
        partners: Tensor | None,
        others: PseudoLabel | None,
    ) -> Tensor:
        """Of a new strong view of the patches, with a box of the partners' if there are any."""
        s = self.settings
        chances = s.intensity_probability, s.blur_probability, self.bias_field
        if partners is None or others is None:
            images, target = apply_strong_view(patches, draw_strong_view(patches, *chances)), own
        else:
            images, box = mixed_strong_view(patches, partners, *chances, s.box_probability, s.box_volume)
            target = mix(others, own, box)
        output, _ = taps.decode(network, taps.encode(network, images))
        return self._loss(output, target)

    def _loss(self, output: Tensor | list[Tensor], target: PseudoLabel) -> Tensor:
        """Of the network's output, deep supervision and all, against a pseudo-label of the full resolution."""
        s, regions = self.settings, self.task.has_regions
        keep = kept(target, s.threshold, self.head_weights, regions)
        if s.loss == "nnunet":
            return self.task.supervised_loss.weighted(output, target.label, keep, self.head_weights)
        logits = taps.full_resolution(output)
        if s.loss == "cross_entropy":
            return masked_cross_entropy(logits, target, keep, regions)
        student = probabilities(logits, regions)
        return masked_dice(student, target, keep, self.head_weights, regions, True, DICE_SMOOTH, skip_absent=s.guards)


class nnUNetTrainerUniMatch(nnUNetTrainerSemiSup):
    method_class = UniMatch
