"""SimCVD: slices of image + signed distance map, under two dropout masks, recognise each other in student and teacher.

Reference: You, Zhou, Zhao, Staib & Duncan, "SimCVD: Simple Contrastive Voxel-Wise Representation Distillation for
Semi-Supervised Medical Image Segmentation", IEEE TMI 41(9), 2022, doi 10.1109/TMI.2022.3161829, arXiv 2108.06227.
No code was published; docs/methods/simcvd.md lists what the paper leaves open, our reading and its reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from nnunetv2_semisup.data.sdm import SignedDistanceMaps
from nnunetv2_semisup.losses.consistency import agreement, decide, mean_squared_difference, probabilities
from nnunetv2_semisup.losses.contrastive import share_matched, symmetric_info_nce
from nnunetv2_semisup.losses.pair_distillation import pair_distillation, voxel_vectors
from nnunetv2_semisup.losses.signed_distance import mean_squared_error_where_known
from nnunetv2_semisup.memory.sampling import random_choice
from nnunetv2_semisup.network import taps
from nnunetv2_semisup.network.heads import SignedDistanceHead, SliceProjection
from nnunetv2_semisup.network.teacher import MovingAverage, Teacher
from nnunetv2_semisup.perturbations.feature import draw_channel_masks, drop_channels
from nnunetv2_semisup.perturbations.noise import draw_clipped_noise
from nnunetv2_semisup.schedules import sigmoid_ramp_up
from nnunetv2_semisup.settings import SemiSupSettings, setting
from nnunetv2_semisup.trainers.base import nnUNetTrainerSemiSup
from nnunetv2_semisup.trainers.method import Group, SemiSupMethod, TaskInfo

PAPERS_POOL = 128  # voxels per axis of a pooled slice


@dataclass(frozen=True)
class SimCVDSettings(SemiSupSettings):
    """Defaults are the paper's where it has one; the others with their reasons in docs/methods/simcvd.md."""

    alpha: float = setting(0.1, "paper, eq. 1: weight of the SDM regression", within="[0, inf)")
    lam: float = setting(0.5, "paper, eq. 6: lambda, weight of the contrast", within="[0, inf)")
    beta: float = setting(0.1, "paper, eq. 6: weight of the pair distillation", within="[0, inf)")
    gamma: float = setting(0.1, "paper, eq. 6: weight of the consistency", within="[0, inf)")
    tau: float = setting(0.5, "paper: temperature of the contrast", within="(0, inf)")
    ramp_terms: tuple[Literal["contrast", "pd", "con"], ...] = setting(("con",), "open: the subscript says con")
    ramp_length: float = setting(
        0.0, "a ramp of their own; published: 1, all of the training", "share of training", within="[0, 1]"
    )
    teacher_decay: float = setting(0.999, "paper", "per step", within="[0, 1)")
    noise_std: float = setting(0.1, "not given; UA-MT", "normalised intensity", within="[0, inf)")
    noise_clip: float = setting(0.2, "not given; UA-MT", "normalised intensity", within="[0, inf)")
    sdm_norm: Literal["patch_max", "truncated_mm"] = setting("patch_max", "SASSNet and DTC code")
    sdm_truncation_mm: float = setting(20.0, "ours: about half an atrium; truncated_mm alone", "mm", within="(0, inf)")
    sdm_empty: Literal["one", "zero", "mask"] = setting("one", "ours; zero: SASSNet; mask: no target")
    sdm_fusion: Literal["per_class", "union"] = setting(
        "per_class", "ours, paper is binary; union: minimum over classes"
    )
    max_classes: int = setting(4, "ours: contrasted in a step, drawn at random", "classes", within="[1, inf)")
    slice_axis: int = setting(
        0, "nnU-Net's axis of the largest spacing; 2d: the images are the slices", "axis", within="[0, 2]"
    )
    num_slices: int | None = setting(None, "not given; null: all of the step", "slices", within="[2, inf)")
    proj_dropout: float = setting(0.1, "paper", "probability", within="[0, 1)")
    proj_pool: int | None = setting(
        None, "null: 128, paper, but no more than the slice has; published: 128", "voxels per axis", within="[1, inf)"
    )
    proj_hidden: tuple[int, ...] = setting(
        (256, 256), "not given; the paper has three layers", "features", within="[1, inf)"
    )
    proj_dim: int = setting(128, "not given", "features", within="[1, inf)")
    pd_max_tokens: int = setting(
        2048, "ours: bottleneck voxels, averaged down to at most this many", "voxels", within="[1, inf)"
    )
    backbone_dropout: float = setting(
        0.0, "not mentioned; UA-MT's V-Net has 0.5 at the bottleneck", "probability", within="[0, 1)"
    )

    published: ClassVar[dict[str, Any]] = {**SemiSupSettings.published, "ramp_length": 1.0, "proj_pool": 128}


class Prediction(NamedTuple):
    """What one pass gives: logits (a list under deep supervision), last features, and bottleneck features."""

    output: Tensor | list[Tensor]
    features: Tensor
    bottleneck: Tensor

    @property
    def logits(self) -> Tensor:
        """(B, heads, X, Y, Z) at full resolution."""
        return taps.full_resolution(self.output)


class SimCVD(SemiSupMethod[SimCVDSettings]):
    """Two groups per step: all unsupervised terms from one noisy pass of student and teacher, then the labelled one.

    Deviations: the student's labelled and unlabelled patches are two passes (see Mean Teacher); unlabelled patches get
    nnU-Net's geometric augmentation and the noise, no other intensity augmentation, as in the paper.
    """

    settings_class = SimCVDSettings
    cost, memory_gib, use = 2.3, 4.9, "to compare with the paper"
    unsupervised_weights = ("alpha", "lam", "beta", "gamma")

    def __init__(self, network: nn.Module, task: TaskInfo, settings: SimCVDSettings):
        super().__init__(network, task, settings)
        s = settings
        self.classes = task.num_heads if task.has_regions else task.num_heads - 1
        self.teacher = Teacher(network, s.teacher_decay)
        self.heads = nn.ModuleDict(
            {
                "projection": SliceProjection(s.proj_dropout, self._pooled_slice(), s.proj_hidden, s.proj_dim),
                "sdm": SignedDistanceHead(taps.feature_channels(network), self.classes, len(task.patch_size)),
            }
        )
        self.teacher_heads = MovingAverage(self.heads, s.teacher_decay)

    def _pooled_slice(self) -> tuple[int, int]:
        """Rows and columns that the projection pools a slice to. Enlarging it would add weights and no information."""
        size = list(self.task.patch_size)
        if len(size) == 3:
            del size[self.settings.slice_axis]
        given = self.settings.proj_pool
        rows, columns = (min(PAPERS_POOL, n) if given is None else given for n in size)
        return rows, columns

    def unfit_batch(self, labelled: int, unlabelled: int) -> str | None:
        slices = unlabelled if len(self.task.patch_size) == 2 else self.task.patch_size[self.settings.slice_axis]
        if slices * unlabelled >= 2 or not self.settings.lam:
            return None
        return "the contrast of one slice is constant: raise unlabeled_batch_size to 2 per GPU, or set lam to 0"

    def losses(self, network: nn.Module, labelled: dict, unlabelled: dict, progress: float) -> Iterator[Group]:
        s = self.settings
        if not (s.alpha or s.lam or s.beta or s.gamma):
            yield self.supervised(network, labelled)
            return
        ramp = sigmoid_ramp_up(progress, s.ramp_length)
        weights = {"contrast": s.lam, "pd": s.beta, "con": s.gamma}
        weights = {k: w * ramp if k in s.ramp_terms else w for k, w in weights.items() if w > 0}
        if weights:
            yield self._unlabelled_terms(network, unlabelled["data"], weights)
        yield self._labelled_terms(network, labelled)

    def labelled_transform(self) -> SignedDistanceMaps | None:
        s, task = self.settings, self.task
        if s.alpha == 0:
            return None
        spacing = task.spacing_mm[-len(task.patch_size) :]
        return SignedDistanceMaps(
            self.classes, task.has_regions, task.ignore_label, spacing, s.sdm_norm, s.sdm_empty, s.sdm_truncation_mm
        )

    def after_step(self, network: nn.Module) -> None:
        self.teacher.update_parameters(network)
        self.teacher_heads.update_parameters(self.heads)

    def reset(self, network: nn.Module) -> None:
        self.teacher.reset(network)
        self.teacher_heads.reset(self.heads)

    def _labelled_terms(self, network: nn.Module, labelled: dict) -> Group:
        """Equation 1."""
        prediction = self._forward(network, labelled["data"], deep_supervision=True)
        terms = {"supervised": (1.0, self.task.supervised_loss(prediction.output, labelled["target"]))}
        if self.settings.alpha > 0:
            error = mean_squared_error_where_known(self.heads["sdm"](prediction.features), labelled["sdm"])
            terms["sdm"] = (self.settings.alpha, error)
        return terms

    def _unlabelled_terms(self, network: nn.Module, images: Tensor, weights: dict[str, float]) -> Group:
        """Those of equations 3 to 5 that ``weights`` names."""
        regions = self.task.has_regions
        with torch.no_grad():
            teacher = self._forward(self.teacher.module, images + self._noise(images))
            teacher_sdm = self.teacher_heads.module["sdm"](teacher.features)
            teacher_probabilities = probabilities(teacher.logits, regions)
        student = self._forward(network, images + self._noise(images))
        student_sdm = self.heads["sdm"](student.features)
        student_probabilities = probabilities(student.logits, regions)
        self.note_pseudo_labels(decide(teacher_probabilities, regions))
        agreeing = agreement(student_probabilities, teacher_probabilities, regions)
        self.diagnostics["share_teacher_student_agreement"] = agreeing
        terms = {}
        if "contrast" in weights:
            terms["contrast"] = self._contrast(images, student_sdm, teacher_sdm)
        if "pd" in weights:
            terms["pd"] = self._pair_distillation(student.bottleneck, teacher.bottleneck)
        if "con" in weights:
            terms["con"] = mean_squared_difference(student_probabilities, teacher_probabilities, self.head_weights)
        return {name: (weights[name], value) for name, value in terms.items()}

    def _forward(self, network: nn.Module, images: Tensor, deep_supervision: bool = False) -> Prediction:
        skips = taps.encode(network, images)
        if self.settings.backbone_dropout > 0:
            last = skips[-1:]
            skips = [*skips[:-1], *drop_channels(last, draw_channel_masks(last, self.settings.backbone_dropout))]
        return Prediction(*taps.decode(network, skips, deep_supervision), skips[-1])

    def _noise(self, images: Tensor) -> Tensor:
        return draw_clipped_noise(images, self.settings.noise_std, self.settings.noise_clip)

    def _contrast(self, images: Tensor, student_sdm: Tensor, teacher_sdm: Tensor) -> Tensor:
        """Equations 2 and 3, the mean over classes; the image under both maps is the clean one."""
        s = self.settings
        if s.sdm_fusion == "union":
            student_sdm, teacher_sdm = student_sdm.amin(1, keepdim=True), teacher_sdm.amin(1, keepdim=True)
        elif self.classes > s.max_classes:
            drawn = random_choice(self.classes, s.max_classes, images.device)
            student_sdm, teacher_sdm = student_sdm[:, drawn], teacher_sdm[:, drawn]
        image = images.mean(1, keepdim=True)
        student, teacher = self._slices(image + student_sdm), self._slices(image + teacher_sdm)
        if s.num_slices is not None and s.num_slices < student.shape[1]:
            drawn = random_choice(student.shape[1], s.num_slices, images.device)
            student, teacher = student[:, drawn], teacher[:, drawn]
        student = self.heads["projection"](student)
        with torch.no_grad():
            teacher = self.teacher_heads.module["projection"](teacher)
        self.diagnostics["share_slices_matched"] = share_matched(student, teacher)
        return symmetric_info_nce(student, teacher, s.tau)

    def _slices(self, volumes: Tensor) -> Tensor:
        """(B, K, X, Y, Z) -> (K, B * X, Y, Z) for slice_axis 0; (B, K, X, Y) -> (K, B, X, Y)."""
        volumes = volumes.transpose(0, 1)
        return volumes if volumes.ndim == 4 else volumes.movedim(2 + self.settings.slice_axis, 2).flatten(1, 2)

    def _pair_distillation(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Equation 4."""
        limit = self.settings.pd_max_tokens
        return pair_distillation(voxel_vectors(student, limit), voxel_vectors(teacher, limit))


class nnUNetTrainerSimCVD(nnUNetTrainerSemiSup):
    method_class = SimCVD
