"""CPS: two networks with different initialisations learn from each other's decisions.

Reference: Chen et al., "Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision", CVPR 2021, arXiv
2106.01226; the form for medical images as in the released code of SSL4MIS.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nnunetv2_semisup.labels import labels_and_weights
from nnunetv2_semisup.losses.consistency import agreement, decide, probabilities
from nnunetv2_semisup.losses.pseudo_label import kept, masked_cross_entropy, pseudo_label
from nnunetv2_semisup.network import taps
from nnunetv2_semisup.schedules import sigmoid_ramp_up
from nnunetv2_semisup.settings import SemiSupSettings, setting
from nnunetv2_semisup.trainers.base import nnUNetTrainerSemiSup
from nnunetv2_semisup.trainers.method import Group, SemiSupMethod, TaskInfo

DICE_MEMORY = 0.99  # per step, of the moving sums behind the second network's Dice


@dataclass(frozen=True)
class CPSSettings(SemiSupSettings):
    """SSL4MIS' values, converted to nnU-Net's supervised loss."""

    cross_weight: float = setting(
        0.2, "0.1 beside (CE + Dice) / 2; doubled: nnU-Net's CE + Dice is not halved", within="[0, inf)"
    )
    ramp_fraction: float = setting(
        0.0, "a ramp of its own; published: 1, all 30,000 iterations", "share", within="[0, 1]"
    )

    published: ClassVar[dict[str, Any]] = {**SemiSupSettings.published, "ramp_fraction": 1.0}


class CPS(SemiSupMethod[CPSSettings]):
    """Two groups per step, each with a term for either network: labels, then the other network's decision.

    The second network exists during training alone. It begins to learn when the burn-in ends, and the first network
    learns from it a class at a time: as far as its Dice on labelled patches has reached the burn-in's ``start_dice``.
    """

    settings_class = CPSSettings
    cost, memory_gib, use = 4.0, 8.4, "a baseline with two networks"
    unsupervised_weights = ("cross_weight",)
    supervised_terms = ("supervised", "supervised_2")

    overlap: Tensor
    volume: Tensor

    def __init__(self, network: nn.Module, task: TaskInfo, settings: CPSSettings):
        super().__init__(network, task, settings)
        second: Any = copy.deepcopy(network)
        self.second: nn.Module = second.apply(second.initialize)  # as nnU-Net initialises what it builds
        self.register_buffer("overlap", torch.zeros(task.num_heads))
        self.register_buffer("volume", torch.zeros(task.num_heads))

    def losses(self, network: nn.Module, labelled: dict, unlabelled: dict, progress: float) -> Iterator[Group]:
        s = self.settings
        if not s.cross_weight:
            yield self.supervised(network, labelled)
            return
        yield {**self.supervised(network, labelled), "supervised_2": (1.0, self._second_supervised(labelled))}
        weight = s.cross_weight * sigmoid_ramp_up(progress, s.ramp_fraction)
        first, second = self._cross_losses(network, unlabelled["data"])
        yield {"cross_1": (weight, first), "cross_2": (weight, second)}

    def teacher_network(self, network: nn.Module) -> nn.Module:
        return self.second

    def _second_supervised(self, labelled: dict) -> Tensor:
        output, _ = taps.decode(self.second, taps.encode(self.second, labelled["data"]))
        self._note_dice(taps.full_resolution(output).detach(), labelled["target"])
        return self.task.supervised_loss(output, labelled["target"])

    def _cross_losses(self, network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each network against what the other one decides; no gradient through the decision."""
        regions = self.task.has_regions
        logits = [taps.logits(each, images) for each in (network, self.second)]
        decided = [pseudo_label(each, regions) for each in logits]
        trust = self._trust_in_second()
        keep = [
            kept(decided[0], 0.0, self.head_weights, regions),
            kept(decided[1], 0.0, self.head_weights * trust, regions),
        ]
        self._note(decided[0].label, [each.detach() for each in logits], trust)
        return (
            masked_cross_entropy(logits[0], decided[1], keep[1], regions),
            masked_cross_entropy(logits[1], decided[0], keep[0], regions),
        )

    def _trust_in_second(self) -> Tensor:
        """(heads,) in [0, 1]: its Dice over ``start_dice``, at most 1; the background as little as any class."""
        if not self.settings.start_dice:
            return torch.ones_like(self.overlap)
        dice = 2 * self.overlap / self.volume.clamp(min=1e-6)
        trust = (dice / self.settings.start_dice).clamp(max=1)
        if not self.task.has_regions:
            trust[0] = trust[1:].min()
        return trust

    @torch.no_grad()
    def _note_dice(self, logits: Tensor, target: Tensor | list[Tensor]) -> None:
        """Keep moving sums of what the second network's Dice on labelled patches is made of."""
        regions = self.task.has_regions
        label, known = labels_and_weights(target, regions, self.task.ignore_label)
        decided = decide(probabilities(logits, regions), regions)
        if not regions:
            heads = torch.arange(self.task.num_heads, device=label.device).reshape(1, -1, *[1] * (label.ndim - 2))
            decided, label = decided[:, None] == heads, label == heads
        axes = [0, *range(2, label.ndim)]
        self.overlap.lerp_((known * (decided & label)).sum(axes), 1 - DICE_MEMORY)
        self.volume.lerp_((known * decided + known * label).sum(axes), 1 - DICE_MEMORY)

    def _note(self, label: Tensor, logits: list[Tensor], trust: Tensor) -> None:
        regions = self.task.has_regions
        self.note_pseudo_labels(label.bool() if regions else label[:, 0])
        p, q = (probabilities(each, regions) for each in logits)
        self.diagnostics["share_disagreement"] = 1 - agreement(p, q, regions)
        for head, value in enumerate(trust.unbind()):
            self.diagnostics[f"share_trust_{head}"] = value


class nnUNetTrainerCPS(nnUNetTrainerSemiSup):
    method_class = CPS
