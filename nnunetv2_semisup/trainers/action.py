"""ACTION: the similarities of an image to other images are distilled first, then anatomical classes are contrasted.

Reference: You, Dai, Min, Staib & Duncan, "Bootstrapping Semi-supervised Medical Image Segmentation with
Anatomical-Aware Contrastive Distillation", IPMI 2023, doi 10.1007/978-3-031-34048-2_49, arXiv 2206.02307; released
code. Readings and deviations: docs/methods/action.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from nnunetv2_semisup.labels import class_indices, disjoint_classes
from nnunetv2_semisup.losses.anatomical import anatomical_contrast, draw_voxels
from nnunetv2_semisup.losses.consistency import probabilities
from nnunetv2_semisup.losses.pseudo_label import PseudoLabel, confidence_weighted_cross_entropy, mix, pseudo_label
from nnunetv2_semisup.losses.soft_negatives import soft_negative_distillation
from nnunetv2_semisup.memory.queue import Queue, random_unit_rows
from nnunetv2_semisup.memory.sampling import sample_size
from nnunetv2_semisup.network import taps
from nnunetv2_semisup.network.embedding_heads import (
    RepresentationHead,
    coarse_means,
    mlp,
    pool_cells,
    window_edges,
    windows,
)
from nnunetv2_semisup.network.teacher import MovingAverage, Teacher
from nnunetv2_semisup.perturbations.jitter import apply_jitter, draw_jitter
from nnunetv2_semisup.perturbations.mixing import draw_class_masks, draw_half_plane_boxes
from nnunetv2_semisup.schedules import stage_bounds
from nnunetv2_semisup.settings import SemiSupSettings, setting
from nnunetv2_semisup.trainers.base import nnUNetTrainerSemiSup
from nnunetv2_semisup.trainers.method import Group, SemiSupMethod, TaskInfo
from nnunetv2_semisup.training.distributed import gather_rows

QUERIES, ONE_IN = 256, 256  # voxels per class: as many, and at most one voxel of the grid in so many
CANDIDATES = 8  # per query: voxels of a class from which a step's negatives are drawn
LOCAL_WIDTH = (
    32  # at least, of the local heads' hidden layers: 2 units (2 classes) behind a ReLU are often off for good
)


@dataclass(frozen=True)
class ACTIONSettings(SemiSupSettings):
    """The paper's values where it has them, else those of the released code; docs/methods/action.md compares them."""

    stage_fractions: tuple[float, ...] = setting(
        (0.0, 1 / 3, 2 / 3), "published: 0.25, 0.25, 0.5; see docs/methods/action.md", "share", within="[0, 1]"
    )
    lr_restart: bool = setting(False, "published: true, each stage has its own poly curve; false: one for the run")
    stage1_supervised: bool = setting(False, "paper, code; true adds the supervised loss if stage one is unstable")
    w_global: float = setting(1.0, "code: weight of the global distillation, stages one and two", within="[0, inf)")
    w_local: float = setting(1.0, "code: weight of the local distillation, stage two", within="[0, inf)")
    w_unsup: float = setting(1.0, "code: weight of the pseudo-label loss, stage three", within="[0, inf)")
    w_anco: float = setting(
        0.01, "code; also tuned so in ARCO: weight of the anatomical contrast, stage three", within="[0, inf)"
    )
    teacher_decay: float = setting(0.99, "paper, code; no warm-up", "per step", within="[0, 1)")
    tau_s: float = setting(0.1, "paper: temperature of the student in the distillation", within="(0, inf)")
    tau_t: float = setting(0.01, "paper; the 3D scripts have 0.6, softer than the student", within="(0, inf)")
    queue_size: int = setting(36, "paper, code", "images", within="[1, inf)")
    strong_on: Literal["student", "teacher"] = setting("student", "best in the paper; the code's 2D default is teacher")
    local_mode: Literal["same_window", "pooled"] = setting("same_window", "paper; pooled: random windows as anchors")
    head_activation: Literal["relu", "none"] = setting("relu", "ARCO: non-linear; none: code")
    global_cells: int = setting(
        2,
        "ours, see docs: instance norm leaves no mean to compare; 1: global average, paper and code",
        "per axis",
        within="[1, inf)",
    )
    global_features: int = setting(128, "3D code; 2D code: 512", "channels", within="[1, inf)")
    representation_features: int = setting(128, "3D code; 2D code: 512", "channels", within="[1, inf)")
    jitter_probability: float = setting(
        0.5, "code: brightness and contrast of the strong view", "probability", within="[0, 1]"
    )
    jitter_strength: float = setting(
        0.25, "nnU-Net's range and the 2D code's of stage three; 3D code: 0.02", "factor", within="[0, 1)"
    )
    blur_probability: float = setting(0.5, "code: blur of the strong view", "probability", within="[0, 1]")
    mix: Literal["cutmix", "classmix", "none"] = setting("cutmix", "2D scripts; 3D default of the code: classmix")
    confident: float = setting(
        0.97, "paper, code: share of such voxels is a patch's weight", "probability", within="[0, 1]"
    )
    weak_threshold: float = setting(
        0.7, "code: unlabelled voxels of the contrast need it", "probability", within="[0, 1]"
    )
    hard_threshold: float = setting(
        0.97, "code: queries are voxels whose student is below it", "probability", within="[0, 1]"
    )
    tau_anco: float = setting(0.5, "paper, code: temperature of the contrast", within="(0, inf)")
    queries: int | None = setting(
        None, "null: 256, paper and code, on small patches one voxel in 256", "voxels per class", within="[1, inf)"
    )
    negatives: int = setting(512, "paper, code", "voxels per query", within="[1, inf)")
    tau_classes: float = setting(0.5, "code: temperature of the classes of negatives", within="(0, inf)")

    published: ClassVar[dict[str, Any]] = {
        **SemiSupSettings.published,
        "stage_fractions": (0.25, 0.25, 0.5),
        "lr_restart": True,
        "global_cells": 1,
        "queries": QUERIES,
    }

    def __post_init__(self):
        super().__post_init__()
        s = self.stage_fractions
        shares = len(s) == 3 and all(share == 0 or share >= 0.001 for share in s) and abs(sum(s) - 1) < 1e-6
        self.require(shares and s[2] > 0, "stage_fractions", "three shares with the sum 1, the first two may be 0")
        enough = next(n for n in count(self.num_epochs) if self._each_stage_has_an_epoch(n))
        self.require(
            enough == self.num_epochs, "num_epochs", f"such that each stage has an epoch; the next such is {enough}"
        )
        early = self.lr_restart or (s[0] > 0 and not self.stage1_supervised)
        self.require(
            self.start_dice == 0 or not early, "start_dice", "0 with lr_restart or with a stage one without labels"
        )
        if s[0] > 0 and not self.stage1_supervised:
            self.require(self.w_global > 0, "w_global", "above 0, as stage one has no other loss")

    def _each_stage_has_an_epoch(self, epochs: int) -> bool:
        lengths = (end - start for start, end in pairwise(stage_bounds(self.stage_fractions, epochs)))
        return all(length > 0 for length, share in zip(lengths, self.stage_fractions, strict=True) if share > 0)


class Voxels(NamedTuple):
    """The voxels of labelled and mixed patches, in this order (B in all), on the grid of the second decoder level.

    Attributes:
        maps: of the decoder levels, what the representation head works on; carry the gradient.
        members: (K, B * x * y * z) bool, voxels of each class; voxels without label or confidence are in none.
        hard: the same shape, those that the student gives to their class with less than hard_threshold.
    """

    maps: list[Tensor]
    members: Tensor
    hard: Tensor


class ACTION(SemiSupMethod[ACTIONSettings]):
    """Three stages, a function of the epoch; teacher and student are compared on all patches.

    ===== ============================================================ =======================================
    stage groups                                                       counted cost in supervised steps
    ===== ============================================================ =======================================
    1     global_<stream>, for each stream                             4/3, encoder only
    2     global_<stream>, local_<stream>, labelled: supervised        8/3
    3     one: supervised, pseudo_label, anatomical                    7/3 + representation head
    ===== ============================================================ =======================================
    """

    settings_class = ACTIONSettings
    cost, memory_gib, use = 2.4, 8.5, "gained as much as PasteMatch, on the one subset measured"
    unsupervised_weights: ClassVar[tuple[str, ...]] = ("w_global", "w_local", "w_unsup", "w_anco")
    alters_supervision = {"stage1_supervised": True, "lr_restart": False}  # noqa: RUF012 - typed in the base class

    def __init__(self, network: nn.Module, task: TaskInfo, settings: ACTIONSettings):
        super().__init__(network, task, settings)
        s = settings
        self.bounds = stage_bounds(s.stage_fractions, s.num_epochs)
        if s.lr_restart:
            self.learning_rate_starts = tuple(sorted(set(self.bounds[:-1])))
        self.first_supervised_epoch = 0 if s.stage1_supervised else self.bounds[1]
        self.classes = task.num_heads + task.has_regions  # of the contrast: with regions they have no background
        self.window_edges = window_edges(task.patch_size)

        relu, bottleneck = s.head_activation == "relu", taps.bottleneck_channels(network)
        d, c, cells = s.global_features, task.num_heads, s.global_cells ** len(task.patch_size)
        self.projectors = nn.ModuleDict(
            {"global": mlp(bottleneck * cells, bottleneck, d, relu), "local": mlp(c, max(2 * c, LOCAL_WIDTH), c, relu)}
        )
        self.predictors = nn.ModuleDict({"global": mlp(d, d, d, relu), "local": mlp(c, max(c, LOCAL_WIDTH), c, relu)})
        self.representation = RepresentationHead(
            taps.level_channels(network), taps.first_stride(network), s.representation_features
        )
        self.teacher = Teacher(network, s.teacher_decay).without_warm_up()
        self.teacher_projectors = MovingAverage(self.projectors, s.teacher_decay).without_warm_up()

        with torch.no_grad():
            example = windows(pool_cells(torch.zeros(1, c, *task.patch_size), self.window_edges))
        self.all_windows, width = example.shape[1:]
        kept = self.all_windows if s.local_mode == "same_window" else 1
        self.queues = nn.ModuleDict(
            {
                "global": Queue(random_unit_rows(s.queue_size, 1, d)),
                "local": Queue(random_unit_rows(s.queue_size, kept, width, dtype=torch.float16)),
            }
        )
        self._to_queue: dict[str, list[Tensor]] = {}

    def unfit_batch(self, labelled: int, unlabelled: int) -> str | None:
        if unlabelled >= 2 or self.settings.mix == "none" or not any(self.stage_weights(3).values()):
            return None
        mix = self.settings.mix
        return f"mix = {mix} needs 2 unlabelled patches per GPU: raise unlabeled_batch_size, or set mix to none"

    # --------------------------------------------------------------------------------------------------------- stages

    def epoch(self, progress: float) -> float:
        """Epochs done."""
        return progress * self.bounds[-1] + 1e-6  # against rounding; far below the share of one step

    def stage(self, progress: float) -> int:
        """1, 2 or 3."""
        return 1 + sum(self.epoch(progress) >= start for start in self.bounds[1:-1])

    def stage_weights(self, stage: int) -> dict[str, float]:
        """Unsupervised terms of a stage."""
        s = self.settings
        distillation = {"global": s.w_global} if stage == 1 else {"global": s.w_global, "local": s.w_local}
        return {"pseudo_label": s.w_unsup, "anatomical": s.w_anco} if stage == 3 else distillation

    def losses(self, network: nn.Module, labelled: dict, unlabelled: dict, progress: float) -> Iterator[Group]:
        stage = self.stage(progress)
        self._to_queue = {}
        if not any(self.stage_weights(stage).values()):
            yield self.supervised(network, labelled)
        elif stage == 3:
            yield self._fine_tuning(network, labelled, unlabelled["data"], progress)
        else:
            share = labelled["data"].shape[0] / (labelled["data"].shape[0] + unlabelled["data"].shape[0])
            yield self._pre_training(network, unlabelled["data"], 1 - share, "unlabelled", progress)
            yield self._pre_training(network, labelled["data"], share, "labelled", progress, labelled["target"])

    def enter_stage(self, network: nn.Module, stage: int) -> None:
        if stage == 3:
            self._reset_teacher(network)

    def reset(self, network: nn.Module) -> None:
        self._reset_teacher(network)

    def after_step(self, network: nn.Module) -> None:
        self.teacher.update_parameters(network)
        self.teacher_projectors.update_parameters(self.projectors)
        gathered = gather_rows(*(torch.cat(rows) for rows in self._to_queue.values()))
        for name, rows in zip(self._to_queue, gathered, strict=True):
            self.queue(name).push(rows)

    def queue(self, name: str) -> Queue:
        """Of earlier embeddings of the teacher."""
        return cast(Queue, self.queues[name])

    def _reset_teacher(self, network: nn.Module) -> None:
        self.teacher.reset(network)
        self.teacher_projectors.reset(self.projectors)

    # ---------------------------------------------------------------------------------------------- stages one and two

    def _pre_training(
        self,
        network: nn.Module,
        images: Tensor,
        share: float,
        stream: str,
        progress: float,
        target: Tensor | list[Tensor] | None = None,
    ) -> Group:
        """Distillation on ``share`` of the patches, and the supervised loss if there are labels; one student pass."""
        s, stage = self.settings, self.stage(progress)
        weights = {name: share * weight for name, weight in self.stage_weights(stage).items() if weight > 0}
        known = target if stage == 2 or s.stage1_supervised else None

        strong = self._strong_view(images)
        for_student, for_teacher = (strong, images) if s.strong_on == "student" else (images, strong)
        with torch.no_grad():
            skips = taps.encode(self.teacher.module, for_teacher)
            logits = taps.logits_of(self.teacher.module, skips) if "local" in weights else None
            teacher = self._embeddings(weights, skips[-1], logits, self.teacher_projectors.module)
        skips = taps.encode(network, for_student)
        decodes = "local" in weights or known is not None
        output = taps.decode(network, skips, deep_supervision=known is not None)[0] if decodes else None
        logits = None if output is None else taps.full_resolution(output)
        student = self._embeddings(weights, skips[-1], logits, self.projectors, self.predictors)

        terms: Group = {}
        for name, weight in weights.items():
            temperatures = self.distillation_temperatures(progress)
            value, alike = soft_negative_distillation(
                student[name], teacher[name], self.queue(name).rows, *temperatures
            )
            # Against the random rows that a queue starts with, the first gradients would be by far the largest, and
            # nnU-Net's momentum would keep them for a hundred steps.
            terms[f"{name}_{stream}"] = (weight, value * self.queue(name).is_full())
            self.diagnostics[f"share_same_nearest_{name}_{stream}"] = alike
            self._to_queue.setdefault(name, []).append(self._kept_windows(name, teacher[name]))
        if output is not None and known is not None:
            terms["supervised"] = (1.0, self.task.supervised_loss(output, known))
        return terms

    def distillation_temperatures(self, progress: float) -> tuple[float, float]:
        """Of student and teacher."""
        return self.settings.tau_s, self.settings.tau_t

    def _embeddings(
        self,
        names: dict[str, float],
        bottleneck: Tensor,
        logits: Tensor | None,
        projectors: nn.ModuleDict,
        predictors: nn.ModuleDict | None = None,
    ) -> dict[str, Tensor]:
        """(B, 1, F) global and (B, P, F) local embeddings, as far as named; float32."""
        inputs = {}
        with torch.autocast(bottleneck.device.type, enabled=False):
            if "global" in names:
                inputs["global"] = coarse_means(bottleneck.float(), self.settings.global_cells)[:, None]
            if "local" in names and logits is not None:
                inputs["local"] = pool_cells(logits.float(), self.window_edges)
            embedded = {name: projectors[name](value) for name, value in inputs.items()}
            if predictors is not None:
                embedded = {name: predictors[name](value) for name, value in embedded.items()}
            if "local" in embedded:
                embedded["local"] = windows(embedded["local"])
        return embedded

    def _kept_windows(self, name: str, rows: Tensor) -> Tensor:
        """What of (B, P, F) enters the queue: everything, or one random window per patch. Unit vectors."""
        if self.queue(name).rows.shape[1] < rows.shape[1]:
            drawn = torch.randint(rows.shape[1], (rows.shape[0],), device=rows.device)
            rows = rows[torch.arange(rows.shape[0], device=rows.device), drawn][:, None]
        return nn.functional.normalize(rows, dim=2)

    # ---------------------------------------------------------------------------------------------------- stage three

    def _fine_tuning(self, network: nn.Module, labelled: dict, images: Tensor, progress: float) -> Group:
        """Supervised loss, pseudo-label loss on mixed patches, and the contrast between the voxels of both."""
        s, regions = self.settings, self.task.has_regions
        with torch.no_grad():
            label = pseudo_label(taps.logits(self.teacher.module, images), regions)
            self.note_pseudo_labels(label.label > 0 if regions else label.label[:, 0])
            mixed, label = self._mixed(images, label)
            mixed = self._strong_view(mixed)
            labelled_classes = self.representation.thin(
                class_indices(labelled["target"], regions, self.task.ignore_label)
            )
            reference = self._reference(labelled["data"], labelled_classes)  # before the student's graphs fill memory
        output, levels = taps.decode_levels(network, taps.encode(network, labelled["data"]))
        mixed_output, mixed_levels = taps.decode_levels(network, taps.encode(network, mixed), deep_supervision=False)
        mixed_logits = taps.full_resolution(mixed_output)
        terms: Group = {}
        if s.w_unsup:
            weights = self.head_weights
            value, confident = confidence_weighted_cross_entropy(mixed_logits, label, s.confident, weights, regions)
            terms["pseudo_label"] = (s.w_unsup, value)
            self.diagnostics["share_confident"] = confident.mean()
        contrasted = {k: w for k, w in self.stage_weights(3).items() if w > 0 and k != "pseudo_label"}
        if contrasted:
            thin = self.representation.thin
            logits = torch.cat((thin(taps.full_resolution(output)), thin(mixed_logits))).detach()
            classes = torch.cat((labelled_classes, thin(self._pseudo_classes(label))))
            voxels = self._voxels(levels, mixed_levels, classes, logits)
            values = self._contrasts(voxels, reference, contrasted, progress)
            terms |= {name: (contrasted[name], value) for name, value in values.items()}
        terms["supervised"] = (1.0, self.task.supervised_loss(output, labelled["target"]))
        return terms

    def _strong_view(self, images: Tensor) -> Tensor:
        s = self.settings
        return apply_jitter(images, draw_jitter(images, s.jitter_probability, s.jitter_strength, s.blur_probability))

    def _mixed(self, images: Tensor, label: PseudoLabel) -> tuple[Tensor, PseudoLabel]:
        """Parts of each patch and of its pseudo-label replaced by those of the next patch; a single one stays."""
        if self.settings.mix == "none":
            return images, label
        if self.settings.mix == "cutmix":
            replaced = draw_half_plane_boxes(images)
        else:
            classes = disjoint_classes(label.label > 0) if self.task.has_regions else label.label[:, 0]
            replaced = draw_class_masks(classes[:, None], self.classes)
        partner = PseudoLabel(*(part.roll(-1, 0) for part in label))
        return torch.where(replaced, images.roll(-1, 0), images), mix(partner, label, replaced)

    def _pseudo_classes(self, label: PseudoLabel) -> Tensor:
        """(B, X, Y, Z) int64 classes of a pseudo-label, -1 where it is not confident enough to be contrasted."""
        known = label.confidence.amin(1) >= self.settings.weak_threshold
        if self.task.has_regions:
            known = known & (self.head_weights > 0).all()
            return torch.where(known, disjoint_classes(label.label > 0), -1)
        classes = label.label[:, 0]
        return torch.where(known & (self.head_weights[classes.clamp(min=0)] > 0), classes, -1)

    def _voxels(self, levels: list[Tensor], mixed_levels: list[Tensor], classes: Tensor, logits: Tensor) -> Voxels:
        """Of both streams; ``classes`` (B, x, y, z) and ``logits`` are on the grid of the second decoder level."""
        head = self.representation
        maps = [torch.cat(pair) for pair in zip(thinned(head, levels), thinned(head, mixed_levels), strict=True)]
        members = self._members(classes)
        p = class_probabilities(probabilities(logits, self.task.has_regions), self.task.has_regions)
        own = p.gather(1, classes.clamp(min=0)[:, None])[:, 0]
        hard = members & (own < self.settings.hard_threshold).flatten()
        return Voxels(maps, members, hard)

    def _members(self, classes: Tensor) -> Tensor:
        """(K, B * x * y * z) bool: the voxels of each class, of (B, x, y, z) classes on the grid."""
        return classes.flatten() == torch.arange(self.classes, device=classes.device)[:, None]

    def _reference(self, images: Tensor, classes: Tensor):
        """What :meth:`_contrasts` needs of the teacher on the labelled patches; (B, x, y, z) classes on the grid."""
        return None

    def _contrasts(self, voxels: Voxels, reference, names: dict[str, float], progress: float) -> dict[str, Tensor]:
        """The contrasts that ``names`` asks for; ``reference`` is that of :meth:`_reference`."""
        return {"anatomical": self._anatomical_contrast(voxels, progress)} if "anatomical" in names else {}

    def contrast_temperature(self, progress: float) -> float:
        """Of the contrasts between voxels."""
        return self.settings.tau_anco

    def classes_temperature(self, progress: float) -> float:
        """Of the choice of the classes that negatives are drawn from."""
        return self.settings.tau_classes

    def _anatomical_contrast(self, voxels: Voxels, progress: float) -> Tensor:
        s, head = self.settings, self.representation
        number = sample_size(s.queries, QUERIES, voxels.members.shape[1], ONE_IN)
        chosen, has_queries = draw_voxels(voxels.hard, number)
        with torch.no_grad():
            pool, present = draw_voxels(voxels.members, CANDIDATES * number)
            candidates = head.rows(voxels.maps, pool)
            means = head.class_means(voxels.maps, voxels.members)
        queries = head.rows(voxels.maps, chosen)
        self.diagnostics["share_hard"] = voxels.hard.sum() / voxels.members.sum().clamp(min=1)
        self.diagnostics["share_of_classes_present"] = present.float().mean()
        tau, tau_classes = self.contrast_temperature(progress), self.classes_temperature(progress)
        return anatomical_contrast(queries, has_queries, means, candidates, present, tau, s.negatives, tau_classes)


def class_probabilities(p: Tensor, regions: bool) -> Tensor:
    """(B, K, X, Y, Z): of each class of the contrast; p itself, or for regions (K = heads + 1) the probability of the
    least certain of the decisions that make up the class: in region c, in no later one."""
    if not regions:
        return p
    none_from = [torch.ones_like(p[:, 0])]  # in no region from c on, for c = R, R - 1, ..., 0
    for region in p.unbind(1)[::-1]:
        none_from.append(torch.minimum(none_from[-1], 1 - region))
    later = torch.stack(none_from[::-1], 1)  # (B, R + 1, ...)
    return torch.cat((later[:, :1], torch.minimum(p, later[:, 1:])), 1)


def thinned(head: RepresentationHead, levels: list[Tensor]) -> list[Tensor]:
    return [head.thin(levels[0]), *levels[1:]]


class nnUNetTrainerACTION(nnUNetTrainerSemiSup):
    method_class = ACTION
