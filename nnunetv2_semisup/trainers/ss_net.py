"""SS-Net: predictions that adversarial noise cannot move, and features that gather around prototypes of their class.

Reference: Wu, Wu, Wu, Ge & Cai, "Exploring Smoothness and Class-Separation for Semi-supervised Medical Image
Segmentation", MICCAI 2022, doi 10.1007/978-3-031-16443-9_4, arXiv 2203.01324; released code. Readings and
deviations: docs/methods/ss_net.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from nnunetv2_semisup import labels
from nnunetv2_semisup.losses.consistency import (
    agreement,
    decide,
    joint_linear_dice,
    probabilities,
    squared_dice,
    weighted_mean,
)
from nnunetv2_semisup.losses.separation import cosine_distance_to_prototypes
from nnunetv2_semisup.memory.prototypes import PrototypeMemory
from nnunetv2_semisup.memory.sampling import sample_rows, sample_size
from nnunetv2_semisup.network import taps
from nnunetv2_semisup.network.freeze import frozen_parameters, frozen_statistics
from nnunetv2_semisup.network.heads import MLPHead
from nnunetv2_semisup.perturbations.adversarial import adversarial_directions, draw_directions
from nnunetv2_semisup.schedules import sigmoid_ramp_up
from nnunetv2_semisup.settings import SemiSupSettings, setting
from nnunetv2_semisup.trainers.base import nnUNetTrainerSemiSup
from nnunetv2_semisup.trainers.method import Group, SemiSupMethod, TaskInfo

WIDTH = 32  # of the projected features and the heads; paper and code
PROTOTYPES = 32  # per class; paper and code
ROWS, ONE_IN = 8192, 32  # features per class, stream and step: as many, and at most one voxel in so many


@dataclass(frozen=True)
class SSNetSettings(SemiSupSettings):
    """Where paper and code differ: the paper's intent where the code contradicts its own comments, else the code.

    Released code for LA: lds_dice joint_linear, lds_smooth 1e-8, proto_select lowest, seg_ce_weight 0. For ACDC:
    lambda_max 0.1, ramp_fraction 1, lds_smooth 1e-10, vat_eps 6, vat_xi 10 (on intensities in [0, 1], where nnU-Net has
    z-scores), proto_select lowest, seg_ce_weight 0.
    """

    lambda_max: float = setting(1.0, "LA code; ACDC code: 0.1. Weight of both terms after the ramp", within="[0, inf)")
    lds_ratio: float = setting(
        1.0, "paper, code: weight of the smoothness term as a share of lambda", "share", within="[0, inf)"
    )
    cs_ratio: float = setting(
        0.1, "code: weight of the separation term as a share of lambda", "share", within="[0, inf)"
    )
    ramp_fraction: float = setting(
        0.0, "a ramp of its own; published: 0.4, LA code, or 1, ACDC code", "share", within="[0, 1]"
    )
    lds_dice: Literal["per_class_squared", "joint_linear"] = setting("per_class_squared", "paper, ACDC code; LA code")
    lds_smooth: float = setting(
        1e-5, "ours: 1e-10 (ACDC code) makes the Dice of an absent class pure noise", within="(0, inf)"
    )
    vat_eps_rms: float = setting(
        0.01, "LA code: length 10 for 112 x 112 x 80 voxels", "normalised intensity", within="(0, inf)"
    )
    vat_xi_rms: float = setting(0.01, "likewise, of the trial noise that the gradient is taken at", within="(0, inf)")
    vat_eps: float | None = setting(
        None, "code: 10 (LA), 6 (ACDC) whatever the patch; beats vat_eps_rms", "L2 norm", within="(0, inf)"
    )
    vat_xi: float | None = setting(None, "code: 10; beats vat_xi_rms", "L2 norm", within="(0, inf)")
    proto_select: Literal["highest", "lowest"] = setting("highest", "paper; the code sorts the wrong way round")
    proto_attention: Literal["none", "normalised"] = setting("none", "code, by a wrong axis; normalised: the paper")
    proto_include_background: bool = setting(False, "code; the paper does not exclude it. No effect with regions")
    cs_max_rows: int | None = setting(
        None,
        "ours: features per class, stream and step; null: 8192, on small patches one in 32. Code: all",
        "voxels",
        within="[2, inf)",
    )
    seg_ce_weight: float = setting(1.0, "nnU-Net; paper and code: 0, Dice alone", within="[0, inf)")

    published: ClassVar[dict[str, Any]] = {  # the released code for LA
        **SemiSupSettings.published,
        "ramp_fraction": 0.4,
        "lds_dice": "joint_linear",
        "lds_smooth": 1e-8,
        "proto_select": "lowest",
        "seg_ce_weight": 0.0,
        "cs_max_rows": ROWS,
    }

    def __post_init__(self):
        super().__post_init__()
        self.require(
            self.lds_ratio + self.cs_ratio > 0, "lds_ratio", "above 0 if cs_ratio is 0; or set lambda_max to 0"
        )


class SSNet(SemiSupMethod[SSNetSettings]):
    """Four groups per step, the labelled one last. ``lambda`` is the ramped ``lambda_max``.

    ===================== ============ ==========================================================================
    term                  weight       what
    ===================== ============ ==========================================================================
    separation_unlabelled 0.1 lambda   features of foreground voxels (arg max) to the prototypes of their class
    smoothness_unlabelled lambda share Dice of the prediction under adversarial noise against the clean one
    smoothness_labelled   lambda share the same for the labelled patches, without their labels
    separation_labelled   0.1 lambda   as above, the class is the label
    supervised            1            nnU-Net's own loss
    ===================== ============ ==========================================================================

    ``share`` is the stream's share of the patches. The prototypes are the projected features of at most 32 correctly
    predicted labelled foreground voxels per class, renewed at every step before any other term is computed. Therefore
    the labelled pass comes first and is back-propagated last; its graph waits, so peak memory is twice a stock step's
    activations. Cost: a clean pass (3 units per patch), the search of the noise (2, no weight gradients) and a pass
    under noise (3), on twice the patches: 16/3 = 5.3 stock steps.
    """

    settings_class = SSNetSettings
    cost, memory_gib, use = 5.3, 8.3, "to compare with the paper"
    unsupervised_weights = ("lambda_max",)
    alters_supervision = {"seg_ce_weight": 1.0}  # noqa: RUF012

    def __init__(self, network: nn.Module, task: TaskInfo, settings: SSNetSettings):
        super().__init__(network, task, settings)
        with_class_0 = task.has_regions or settings.proto_include_background
        self.classes = range(0 if with_class_0 else 1, task.num_heads)
        self.projection = MLPHead(taps.feature_channels(network), WIDTH, WIDTH)
        self.prediction = MLPHead(WIDTH, WIDTH, WIDTH)
        self.selectors = self._selectors()
        self.prototype_selectors = self._selectors() if settings.proto_attention == "normalised" else None
        self.memory = PrototypeMemory(len(self.classes), PROTOTYPES, WIDTH)

    def _selectors(self) -> nn.ModuleList:
        """One per class: a feature vector to how much it should count, before the sigmoid."""
        return nn.ModuleList(MLPHead(WIDTH, WIDTH, 1, negative_slope=0.2) for _ in self.classes)

    def losses(self, network: nn.Module, labelled: dict, unlabelled: dict, progress: float) -> Iterator[Group]:
        s = self.settings
        if not s.lambda_max:
            yield self.supervised(network, labelled)
            return
        weight = s.lambda_max * sigmoid_ramp_up(progress, s.ramp_fraction)
        share = labelled["data"].shape[0] / (labelled["data"].shape[0] + unlabelled["data"].shape[0])
        # Each call returns before its group is yielded, so that no feature map outlives its group.
        output, target, labelled_group = self._labelled_pass(network, labelled, weight * s.cs_ratio)
        separation, unlabelled_target = self._unlabelled_pass(network, unlabelled["data"], weight * s.cs_ratio)
        if separation:
            yield separation
        if s.lds_ratio:
            value = self._smoothness(network, unlabelled["data"], unlabelled_target, "unlabelled")
            yield {"smoothness_unlabelled": (weight * s.lds_ratio * (1 - share), value)}
            value = self._smoothness(network, labelled["data"], target, "labelled")
            yield {"smoothness_labelled": (weight * s.lds_ratio * share, value)}
        yield {**labelled_group, "supervised": (1.0, self.task.supervised_loss(output, labelled["target"]))}

    # ------------------------------------------------------------------------------------------------- the two streams

    def _labelled_pass(self, network: nn.Module, labelled: dict, weight: float):
        """Network output, clean probabilities without gradient, the separation term; renews the prototypes."""
        output, features = taps.decode(network, taps.encode(network, labelled["data"]))
        clean = self._clean(output)
        if not weight:
            return output, clean, {}
        truth = self._labelled_voxels(labelled["target"])
        self._renew_prototypes(features, truth & self._predicted_voxels(clean))
        value = self._separation(features, truth, self._known_voxels(labelled["target"]))
        return output, clean, {"separation_labelled": (weight, value)}

    def _unlabelled_pass(self, network: nn.Module, images: Tensor, weight: float) -> tuple[Group, Tensor]:
        """The separation term and the clean probabilities without gradient."""
        with torch.set_grad_enabled(weight > 0):
            output, features = taps.decode(network, taps.encode(network, images), deep_supervision=False)
        clean = self._clean(output)
        self.note_pseudo_labels(decide(clean, self.task.has_regions))
        if not weight:
            return {}, clean
        predicted = self._predicted_voxels(clean)
        value = self._separation(features, predicted, torch.ones_like(predicted[0]))
        return {"separation_unlabelled": (weight, value)}, clean

    def _clean(self, output: Tensor | list[Tensor]) -> Tensor:
        return probabilities(taps.full_resolution(output).detach(), self.task.has_regions)

    def _predicted_voxels(self, clean: Tensor) -> Tensor:
        """(K, B * voxels) bool: the voxels that probabilities (B, heads, X, Y, Z) give to each class."""
        decided = decide(clean, self.task.has_regions)
        masks = decided if self.task.has_regions else torch.stack([decided == c for c in self.classes], 1)
        return masks.movedim(1, 0).flatten(1)

    def _labelled_voxels(self, target: Tensor | list[Tensor]) -> Tensor:
        """(K, B * voxels) bool: the voxels that the full-resolution target gives to each class."""
        masks = labels.class_masks(target, self.task.has_regions, self.task.ignore_label, self.classes)
        return masks.movedim(1, 0).flatten(1)

    def _sampled(self, features: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
        """See :func:`sample_rows`."""
        return sample_rows(features, members, sample_size(self.settings.cs_max_rows, ROWS, members.shape[1], ONE_IN))

    def _known_voxels(self, target: Tensor | list[Tensor]) -> Tensor:
        """(B * voxels,) bool."""
        return labels.known_voxels(target, self.task.has_regions, self.task.ignore_label).flatten()

    # ------------------------------------------------------------------------------------------------------ separation

    @torch.no_grad()
    def _renew_prototypes(self, features: Tensor, candidates: Tensor) -> None:
        """Replace the prototypes of every class that has candidates (K, B * voxels) bool."""
        with torch.autocast(features.device.type, enabled=False):
            rows, valid = self._sampled(features, candidates)
            projected = self.projection(rows.flatten(0, 1)).unflatten(0, valid.shape)  # with running statistics
            scores = self._scores(self.selectors, projected, valid)
        self.memory.update(projected, valid, scores if self.settings.proto_select == "highest" else -scores)
        self.diagnostics["share_of_prototypes_filled"] = self.memory.filled().float().mean()

    def _separation(self, features: Tensor, voxels: Tensor, normalising: Tensor) -> Tensor:
        """Mean over the classes, background counted, of the distance of their voxels (K, B * voxels) to prototypes.

        The heads' batch norm takes its statistics from the voxels ``normalising`` (B * voxels,), which are not those of
        the classes alone: normalised by itself, a single foreground class could move as a whole without any change of
        the loss, and so would get no gradient against the background.
        """
        with torch.autocast(features.device.type, enabled=False):
            rows, valid = self._sampled(features, torch.cat([voxels, normalising[None]]))
            statistics = torch.cat([torch.zeros_like(valid[:-1]), valid[-1:]]).flatten()
            projected = self.projection(rows.flatten(0, 1), statistics)
            queries = self.prediction(projected, statistics).unflatten(0, valid.shape)[:-1]
            contributes = (valid[:-1].sum(1) >= 2) & (self.memory.count >= 2)
            valid = valid[:-1] & contributes[:, None]
            weights = torch.sigmoid(self._scores(self.selectors, queries.detach(), valid)) * valid
            prototypes, filled = self.memory.rows, self.memory.filled()
            prototype_weights = filled.float()
            if self.prototype_selectors is not None:
                unit = nn.functional.normalize(prototypes, dim=2)
                scores = self._scores(self.prototype_selectors, unit, filled)
                prototype_weights = torch.sigmoid(scores) * filled
            distances = cosine_distance_to_prototypes(queries, weights, prototypes, prototype_weights)
            return (self.head_weights[self.classes.start :] * distances).sum() / self.task.num_heads

    def _scores(self, selectors: nn.ModuleList, rows: Tensor, valid: Tensor) -> Tensor:
        """(K, S): each class's selector on its rows (K, S, F), normalised over the valid ones (K, S)."""
        return torch.stack([selector(r, v)[:, 0] for selector, r, v in zip(selectors, rows, valid, strict=True)])

    # ------------------------------------------------------------------------------------------------------ smoothness

    def _smoothness(self, network: nn.Module, images: Tensor, target: Tensor, stream: str) -> Tensor:
        """Discrepancy to ``target``, the clean probabilities, under the noise that makes it largest."""
        noise, found = self._adversarial_noise(network, images, target)
        noisy = self._under_noise(network, images, noise)
        self.diagnostics[f"share_direction_found_{stream}"] = found.float().mean()
        self.diagnostics[f"share_unmoved_{stream}"] = agreement(noisy, target, self.task.has_regions)
        return self._dice(noisy, target)

    def _dice(self, student: Tensor, target: Tensor) -> Tensor:
        """The chosen Dice against probabilities; with guards without classes that the target decides for nowhere."""
        s, regions = self.settings, self.task.has_regions
        if s.lds_dice == "joint_linear":
            return joint_linear_dice(student, target, s.lds_smooth, self.head_weights)
        present = None
        if s.guards:
            decided = decide(target, regions)
            masks = decided if regions else torch.stack([decided == c for c in range(self.task.num_heads)], 1)
            present = masks.any(0).flatten(1).any(1)
        return weighted_mean(squared_dice(student, target, s.lds_smooth), self.head_weights, present)

    def _adversarial_noise(self, network: nn.Module, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Noise (B, C, X, Y, Z) of one length per sample, no gradient; and where a direction was found, (B,) bool."""
        s, scale = self.settings, math.sqrt(images[0].numel())
        epsilon = s.vat_eps_rms * scale if s.vat_eps is None else s.vat_eps
        xi = s.vat_xi_rms * scale if s.vat_xi is None else s.vat_xi

        def discrepancy(noise: Tensor) -> Tensor:
            return self._dice(self._under_noise(network, images, noise), target)

        with frozen_parameters(network):
            directions, found = adversarial_directions(discrepancy, draw_directions(images), xi)
        return epsilon * directions, found

    def _under_noise(self, network: nn.Module, images: Tensor, noise: Tensor) -> Tensor:
        """Probabilities of the noisy images."""
        with frozen_statistics(network):
            return probabilities(taps.logits(network, images + noise), self.task.has_regions)


class nnUNetTrainerSSNet(nnUNetTrainerSemiSup):
    method_class = SSNet
    settings: SSNetSettings

    def _build_loss(self):
        loss = super()._build_loss()
        getattr(loss, "loss", loss).weight_ce = self.settings.seg_ce_weight  # the part that deep supervision wraps
        return loss
