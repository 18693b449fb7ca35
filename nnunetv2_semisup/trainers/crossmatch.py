"""CrossMatch: strong image views and strong feature views of an unlabelled patch learn from its weak view.

Reference: Zhao, Wang & Ding, "CrossMatch: Enhance Semi-Supervised Medical Image Segmentation with Perturbation
Strategies and Knowledge Distillation", IEEE JBHI 2024, doi 10.1109/JBHI.2024.3463711, arXiv 2405.00354; released code.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from nnunetv2_semisup.losses.consistency import probabilities
from nnunetv2_semisup.losses.pseudo_label import PseudoLabel, kept, masked_dice, mix, pseudo_label
from nnunetv2_semisup.network import taps
from nnunetv2_semisup.perturbations.feature import draw_channel_masks, drop_channels
from nnunetv2_semisup.perturbations.image import mixed_strong_view
from nnunetv2_semisup.schedules import sigmoid_ramp_up
from nnunetv2_semisup.settings import SemiSupSettings, setting
from nnunetv2_semisup.trainers.base import nnUNetTrainerSemiSup
from nnunetv2_semisup.trainers.method import Group, SemiSupMethod, TaskInfo

Dice = partial  # (logits, pseudo-label) -> loss, with the step's threshold


@dataclass(frozen=True)
class CrossMatchSettings(SemiSupSettings):
    """Published versions, converted to nnU-Net's CE + Dice, which is twice the published supervised loss.

    Released code for ACDC: w_s1, w_s2, w_kd = 0.5, 0.5, 1 (default). For LA: 0.5, 0.5, 2, conf_mode ramp_ln2,
    conf_tau 0.75, dice_include_background false. First release (2024) and paper: 1, 1, 2.
    """

    w_s1: float = setting(0.5, "released ACDC code: 0.25, doubled", within="[0, inf)")
    w_s2: float = setting(0.5, "released ACDC code: 0.25, doubled", within="[0, inf)")
    w_kd: float = setting(1.0, "released ACDC code: 0.5, doubled", within="[0, inf)")
    eta: float = setting(0.3, "paper and code: share of the decoder distillation in w_kd", "share", within="[0, 1]")
    conf_mode: Literal["fixed", "ramp_ln2"] = setting("fixed", "ACDC code; ramp_ln2: LA code, an entropy's threshold")
    conf_tau: float = setting(
        0.85, "paper's ablation; meaningful for any number of classes", "probability", within="[0, 1]"
    )
    conf_ramp_fraction: float = setting(
        17 / 14, "LA code: 17,000 of 14,000 iterations; ramp_ln2", "share of training", within="[0, inf)"
    )
    p_weak: float = setting(0.25, "code: channel dropout of the weak feature view", "probability", within="[0, 1)")
    p_strong: float = setting(0.75, "code: channel dropout of the strong feature view", "probability", within="[0, 1)")
    strong_intensity_probability: float = setting(0.8, "LA code: bias field and gamma", "probability", within="[0, 1]")
    strong_blur_probability: float = setting(0.5, "code", "probability", within="[0, 1]")
    strong_bias_field: bool = setting(True, "LA code; switch off for CT, which has none")
    box_probability: float = setting(0.5, "code: CutMix", "probability", within="[0, 1]")
    box_volume: tuple[float, ...] = setting(
        (0.02, 0.4), "code: smallest and largest box", "share of the patch", within="(0, 1]"
    )
    mix_source: Literal["loader", "batch_roll"] = setting("loader", "code; batch_roll: the next patch, much cheaper")
    dice_include_background: bool = setting(True, "ACDC code; LA code: false")
    dice_smooth: float = setting(1e-5, "LA code; ACDC code: 1e-4", within="(0, inf)")

    published: ClassVar[dict[str, Any]] = {**SemiSupSettings.published, "w_s1": 1.0, "w_s2": 1.0, "w_kd": 2.0}

    def __post_init__(self):
        super().__post_init__()
        in_order = len(self.box_volume) == 2 and self.box_volume[0] <= self.box_volume[1]
        self.require(in_order, "box_volume", "smallest and largest share")


class CrossMatch(SemiSupMethod[CrossMatchSettings]):
    """Each term is a masked Dice against a pseudo-label without gradient; the labelled stream comes last.

    A group for each decoder pass: those of one encoder pass share it, and it is back-propagated once, after them. So no
    more than one encoder's and one decoder's feature maps are held, as in a stock step. With u the unlabelled patch, m
    the patch that CutMix takes boxes from, s1, s2 strong views of u with boxes of m's:

    ========= ====================== =============================================================
    term      student                pseudo-label
    ========= ====================== =============================================================
    image_1   s1                     of u, inside box 1 of m
    image_2   s2                     of u, inside box 2 of m
    teacher_1 u, weak features       of u
    teacher_2 u, strong features     of u
    teacher_3 s2, weak features      of u, inside box 2 of m
    teacher_4 s2, strong features    of u, inside box 2 of m
    decoder_1 s2, weak features      of u with weak features, inside box 2 of m with weak features
    decoder_2 s2, strong features    of u with strong features, inside box 2 of m with strong features
    ========= ====================== =============================================================

    Deviations: passes whose result the released code throws away are left out, which changes no gradient; the
    unsupervised terms use the full resolution only; nnU-Net's networks have no dropout of their own.
    """

    settings_class = CrossMatchSettings
    cost, memory_gib, use = 7.2, 5.7, "gained a little more than PasteMatch, at 3 times the cost"
    unsupervised_weights = ("w_s1", "w_s2", "w_kd")

    def __init__(self, network: nn.Module, task: TaskInfo, settings: CrossMatchSettings):
        super().__init__(network, task, settings)
        self.wants_partners = settings.mix_source == "loader"

    def unfit_batch(self, labelled: int, unlabelled: int) -> str | None:
        if self.wants_partners or unlabelled >= 2:
            return None
        return "mix_source = batch_roll needs 2 unlabelled patches per GPU: raise unlabeled_batch_size, or use loader"

    def losses(self, network: nn.Module, labelled: dict, unlabelled: dict, progress: float) -> Iterator[Group]:
        s = self.settings
        if s.w_s1 or s.w_s2 or s.w_kd:
            teacher, decoder = s.w_kd * (1 - s.eta) / 4, s.w_kd * s.eta / 2
            dice = partial(self._dice, threshold=self.threshold(progress))
            patches = unlabelled["data"]
            partners = unlabelled["partners"] if self.wants_partners else patches.roll(1, 0)
            own = yield from self._weak_view(network, patches, dice, teacher)
            others = self._labels_of_partners(network, partners, own)
            # The call returns before its group is yielded, so that no feature map outlives it.
            yield {"image_1": (s.w_s1, self._first_strong_view(network, patches, partners, own, others, dice))}
            weights = {"image": s.w_s2, "teacher": teacher, "decoder": decoder}
            yield from self._second_strong_view(network, patches, partners, own, others, dice, weights)
        yield self.supervised(network, labelled)

    def threshold(self, progress: float) -> float:
        """Confidence a voxel needs; constant, or LA's ramp from tau (first step) over 0.52 to 0.67 for tau 0.75."""
        s = self.settings
        if s.conf_mode == "fixed" or progress == 0:
            return s.conf_tau
        return (s.conf_tau + (1 - s.conf_tau) * sigmoid_ramp_up(progress, s.conf_ramp_fraction)) * math.log(2)

    def confidence_needed(self, progress: float) -> tuple[float, float]:
        return self.threshold(progress), self.threshold(progress)

    def _weak_view(
        self, network: nn.Module, patches: Tensor, dice: Dice, weight: float
    ) -> Generator[Group, None, list[PseudoLabel]]:
        """The groups teacher_1 and teacher_2; returns pseudo-labels of u (clean, weak and strong features)."""
        regions = self.task.has_regions
        skips = taps.encode(network, patches)
        shared, masks = taps.share(skips), self._channel_masks(skips)
        with torch.no_grad():
            labels = [pseudo_label(taps.logits_of(network, shared), regions)]
        for name, mask in zip(("teacher_1", "teacher_2"), masks, strict=True):
            logits = taps.logits_of(network, drop_channels(shared, mask))
            labels.append(pseudo_label(logits, regions))
            yield {name: (weight, dice(logits, labels[0]))}
        taps.back_propagate_shared(skips, shared)
        self.note_pseudo_labels(labels[0].label > 0 if regions else labels[0].label[:, 0])
        self._note(labels, dice.keywords["threshold"])
        return labels

    @torch.no_grad()
    def _labels_of_partners(self, network: nn.Module, partners: Tensor, own: list[PseudoLabel]) -> list[PseudoLabel]:
        """Pseudo-labels of m (clean, weak and strong features)."""
        if self.settings.mix_source == "batch_roll":
            return [PseudoLabel(*(part.roll(1, 0) for part in label)) for label in own]
        skips = taps.encode(network, partners)
        views = (skips, *(drop_channels(skips, mask) for mask in self._channel_masks(skips)))
        return [pseudo_label(taps.logits_of(network, view), self.task.has_regions) for view in views]

    def _first_strong_view(self, network, patches, partners, own, others, dice: Dice) -> Tensor:
        """The term image_1."""
        images, box = self._strong_view(patches, partners)
        return dice(taps.logits(network, images), mix(others[0], own[0], box))

    def _second_strong_view(
        self, network, patches, partners, own, others, dice: Dice, weights: dict[str, float]
    ) -> Iterator[Group]:
        """The terms image_2, teacher_3, teacher_4, decoder_1 and decoder_2; a group for each decoder pass."""
        images, box = self._strong_view(patches, partners)
        clean, weak, strong = (mix(other, mine, box) for other, mine in zip(others, own, strict=True))
        skips = taps.encode(network, images)
        shared, masks = taps.share(skips), self._channel_masks(skips)
        learned = {"image_2": clean}, {"teacher_3": clean, "decoder_1": weak}, {"teacher_4": clean, "decoder_2": strong}
        for mask, targets in zip((None, *masks), learned, strict=True):
            logits = taps.logits_of(network, shared if mask is None else drop_channels(shared, mask))
            yield {name: (weights[name.split("_")[0]], dice(logits, label)) for name, label in targets.items()}
        taps.back_propagate_shared(skips, shared)

    def _strong_view(self, patches: Tensor, partners: Tensor) -> tuple[Tensor, Tensor]:
        """A strong view of u with a box of a strong view of m, and the box."""
        s = self.settings
        probabilities = s.strong_intensity_probability, s.strong_blur_probability
        return mixed_strong_view(
            patches, partners, *probabilities, s.strong_bias_field, s.box_probability, s.box_volume
        )

    def _channel_masks(self, skips: list[Tensor]) -> list[list[Tensor]]:
        """Of weak and of strong channel dropout."""
        return [draw_channel_masks(skips, rate) for rate in (self.settings.p_weak, self.settings.p_strong)]

    def _dice(self, logits: Tensor, target: PseudoLabel, threshold: float) -> Tensor:
        s, regions = self.settings, self.task.has_regions
        student = probabilities(logits, regions)
        keep = kept(target, threshold, self.head_weights, regions)
        background, smooth = s.dice_include_background, s.dice_smooth
        return masked_dice(student, target, keep, self.head_weights, regions, background, smooth, skip_absent=s.guards)

    def _note(self, labels: list[PseudoLabel], threshold: float) -> None:
        for name, label in zip(("clean", "weak_features", "strong_features"), labels, strict=True):
            self.diagnostics[f"share_confident_{name}"] = (label.confidence >= threshold).float().mean()


class nnUNetTrainerCrossMatch(nnUNetTrainerSemiSup):
    method_class = CrossMatch
    settings: CrossMatchSettings

    def initialize(self):
        super().initialize()
        if self.settings.strong_bias_field and "CTNormalization" in self.configuration_manager.normalization_schemes:
            self.print_to_log_file(
                "strong_bias_field is on, but CT images have no bias field: consider nnUNetv2_semisup_plans --set "
                "nnUNetTrainerCrossMatch.strong_bias_field=false"
            )
