"""CPS: two networks of one architecture, each learning from the other's decisions on unlabelled patches.

Reference: Chen, Yuan, Zeng & Wang, "Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision", CVPR 2021,
arXiv 2106.01226; the form for medical images as in SSL4MIS.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunetv2_semisup.losses.consistency import agreement, decide, probabilities
from nnunetv2_semisup.network import taps
from nnunetv2_semisup.schedules import sigmoid_ramp_up
from nnunetv2_semisup.settings import SemiSupSettings, setting
from nnunetv2_semisup.trainers.base import nnUNetTrainerSemiSup
from nnunetv2_semisup.trainers.method import Group, SemiSupMethod, TaskInfo


@dataclass(frozen=True)
class CPSSettings(SemiSupSettings):
    """SSL4MIS's values, converted to nnU-Net's supervised loss."""

    cross_weight: float = setting(
        0.2, "0.1 beside (CE + Dice) / 2; doubled: nnU-Net's CE + Dice is not halved", within="[0, inf)"
    )
    ramp_fraction: float = setting(0.0, "a ramp of its own; published: the whole training", "share", within="[0, 1]")

    published: ClassVar[dict[str, Any]] = {**SemiSupSettings.published, "ramp_fraction": 1.0}


class CPS(SemiSupMethod[CPSSettings]):
    """Groups: both networks on the unlabelled patches, the second on the labelled ones, then the stock step.

    Prediction uses the first network. The second has initial weights of its own. With the burn-in it begins with the
    first one's encoder and a new decoder: two equal networks would teach each other nothing, and one that knows nothing
    would teach the background.

    Deviation: labelled patches are not cross-supervised, as in SSL4MIS.
    """

    settings_class = CPSSettings
    unsupervised_weights = ("cross_weight",)

    def __init__(self, network: nn.Module, task: TaskInfo, settings: CPSSettings):
        super().__init__(network, task, settings)
        self.second = copy.deepcopy(network)
        taps.reinitialise(self.second)

    def losses(self, network: nn.Module, labelled: dict, unlabelled: dict, progress: float) -> Iterator[Group]:
        weight = self.settings.cross_weight * sigmoid_ramp_up(progress, self.settings.ramp_fraction)
        if weight > 0:
            first, second = self._cross(network, unlabelled["data"])
            yield {"cross_1": (weight, first), "cross_2": (weight, second)}
            yield {"supervised_2": self.supervised(self.second, labelled)["supervised"]}
        yield self.supervised(network, labelled)

    def _cross(self, network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the first network against the second's decision, and the reverse."""
        regions = self.task.has_regions
        logits = [taps.logits(n, images) for n in (network, self.second)]
        p = [probabilities(z.detach(), regions) for z in logits]
        decided = [decide(x, regions) for x in p]
        self.note_pseudo_labels(decided[1])  # of what the network that predicts learns from
        self.diagnostics["share_agreement"] = agreement(p[0], p[1], regions)
        first = hard_cross_entropy(logits[0], decided[1], self.head_weights, regions)
        return first, hard_cross_entropy(logits[1], decided[0], self.head_weights, regions)

    def reset(self, network: nn.Module) -> None:
        if self.settings.start_dice > 0:
            self.second.load_state_dict(network.state_dict())
            taps.reinitialise(self.second, only_decoder=True)


def hard_cross_entropy(logits: Tensor, label: Tensor, weights: Tensor, regions: bool) -> Tensor:
    """Mean over voxels of w CE; with regions over voxels and heads of w times the binary one.

    Args:
        logits: (B, heads, X, Y, Z), carry the gradient.
        label: (B, X, Y, Z) int64; with regions (B, heads, X, Y, Z) bool.
        weights: w, (heads,) in [0, 1], of the label's class; with regions of the head.
    """
    with torch.autocast(logits.device.type, enabled=False):
        if regions:
            ce = F.binary_cross_entropy_with_logits(logits.float(), label.float(), reduction="none")
            return (ce * weights.reshape(1, -1, *[1] * (ce.ndim - 2))).mean()
        return (F.cross_entropy(logits.float(), label, reduction="none") * weights[label]).mean()


class nnUNetTrainerCPS(nnUNetTrainerSemiSup):
    method_class = CPS
