"""UniMatch: strong image views and a feature view of an unlabelled patch learn from its weak view; FixMatch too.

Reference: Yang, Qi, Feng, Zhang & Shi, "Revisiting Weak-to-Strong Consistency in Semi-Supervised Semantic
Segmentation", CVPR 2023, arXiv 2208.09910; the released code for ACDC. FixMatch: Sohn et al., NeurIPS 2020.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from nnunetv2_semisup.losses.consistency import probabilities
from nnunetv2_semisup.losses.pseudo_label import PseudoLabel, kept, masked_dice, mix, pseudo_label
from nnunetv2_semisup.network import taps
from nnunetv2_semisup.perturbations.feature import draw_channel_masks, drop_channels
from nnunetv2_semisup.perturbations.image import mixed_strong_view
from nnunetv2_semisup.settings import SemiSupSettings, setting
from nnunetv2_semisup.trainers.base import nnUNetTrainerSemiSup
from nnunetv2_semisup.trainers.method import Group, SemiSupMethod, TaskInfo


@dataclass(frozen=True)
class UniMatchSettings(SemiSupSettings):
    """The released code's values for ACDC. Weights are four times the published ones: so is nnU-Net's CE + Dice.

    FixMatch: ``strong_views = 1``, ``w_strong = 2``, ``w_feature = 0``. Plain online self-training, as in nnFilterMatch
    without its filter: these, ``threshold = 0`` and ``box_probability = 0``.
    """

    w_strong: float = setting(1.0, "code: 0.25, of all strong views together", within="[0, inf)")
    w_feature: float = setting(1.0, "code: 0.25, of the feature view", within="[0, inf)")
    strong_views: Literal[1, 2] = setting(2, "paper: dual-stream perturbations; FixMatch: 1")
    threshold: float = setting(0.95, "paper and code", "probability", within="[0, 1]")
    feature_dropout: float = setting(0.5, "paper and code: of a channel of any skip", "probability", within="[0, 1)")
    strong_intensity_probability: float = setting(0.8, "code: jitter; here bias field and gamma", within="[0, 1]")
    strong_blur_probability: float = setting(0.5, "code", "probability", within="[0, 1]")
    strong_bias_field: bool | None = setting(None, "ours; null: unless nnU-Net normalises the images as CT")
    box_probability: float = setting(0.5, "code: CutMix", "probability", within="[0, 1]")
    box_volume: tuple[float, ...] = setting(
        (0.02, 0.4), "code: smallest and largest box", "share of the patch", within="(0, 1]"
    )
    dice_smooth: float = setting(1e-5, "CrossMatch's code for LA", within="(0, inf)")

    def __post_init__(self):
        super().__post_init__()
        in_order = len(self.box_volume) == 2 and self.box_volume[0] <= self.box_volume[1]
        self.require(in_order, "box_volume", "smallest and largest share")


class UniMatch(SemiSupMethod[UniMatchSettings]):
    """A group for the feature view, one for each strong view, then the stock supervised loss.

    Every term is a Dice on the confident voxels against the weak view's decision, which has no gradient. A strong view
    has a box of another unlabelled patch in it, its pseudo-label too.

    Deviations: strong views are CrossMatch's for 3D (bias field and gamma for the colour jitter); a box that would not
    fit is cut to the patch, not drawn again; the weak view is nnU-Net's spatial augmentation.
    """

    settings_class = UniMatchSettings
    unsupervised_weights = ("w_strong", "w_feature")

    def __init__(self, network: nn.Module, task: TaskInfo, settings: UniMatchSettings):
        super().__init__(network, task, settings)
        bias_field = settings.strong_bias_field
        self.bias_field = not task.is_ct if bias_field is None else bias_field
        self.wants_partners = settings.w_strong > 0 and settings.box_probability > 0

    def losses(self, network: nn.Module, labelled: dict, unlabelled: dict, progress: float) -> Iterator[Group]:
        s, images = self.settings, unlabelled["data"]
        if s.w_strong or s.w_feature:
            own, feature = self._weak_view(network, images)
            if feature is not None:
                yield {"feature": (s.w_feature, feature)}
        if s.w_strong:
            partners = unlabelled["partners"] if self.wants_partners else images
            others = self._label(network, partners) if self.wants_partners else own
            for view in range(1, s.strong_views + 1):
                loss = self._strong_view(network, images, partners, own, others)
                yield {f"strong_{view}": (s.w_strong / s.strong_views, loss)}
        yield self.supervised(network, labelled)

    def _weak_view(self, network: nn.Module, images: Tensor) -> tuple[PseudoLabel, Tensor | None]:
        """Pseudo-label of the patches, and the feature view's term where it has a weight; the encoder runs once."""
        s = self.settings
        if s.w_feature == 0:
            own = self._label(network, images)
        else:
            skips = taps.encode(network, images)
            with torch.no_grad():
                own = pseudo_label(taps.logits_of(network, [x.detach() for x in skips]), self.task.has_regions)
        self.note_pseudo_labels(own.label > 0 if self.task.has_regions else own.label[:, 0])
        self.diagnostics["share_confident"] = (own.confidence >= s.threshold).float().mean()
        if s.w_feature == 0:
            return own, None
        dropped = drop_channels(skips, draw_channel_masks(skips, s.feature_dropout))
        return own, self._dice(taps.logits_of(network, dropped), own)

    @torch.no_grad()
    def _label(self, network: nn.Module, images: Tensor) -> PseudoLabel:
        return pseudo_label(taps.logits(network, images), self.task.has_regions)

    def _strong_view(
        self, network: nn.Module, images: Tensor, partners: Tensor, own: PseudoLabel, others: PseudoLabel
    ) -> Tensor:
        s = self.settings
        chances = s.strong_intensity_probability, s.strong_blur_probability
        view, box = mixed_strong_view(images, partners, *chances, self.bias_field, s.box_probability, s.box_volume)
        return self._dice(taps.logits(network, view), mix(others, own, box))

    def _dice(self, logits: Tensor, target: PseudoLabel) -> Tensor:
        s, regions = self.settings, self.task.has_regions
        keep = kept(target, s.threshold, self.head_weights, regions)
        student = probabilities(logits, regions)
        return masked_dice(student, target, keep, self.head_weights, regions, True, s.dice_smooth, skip_absent=s.guards)


class nnUNetTrainerUniMatch(nnUNetTrainerSemiSup):
    method_class = UniMatch
