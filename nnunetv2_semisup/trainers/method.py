"""What a method provides. The trainer that runs it is :class:`nnunetv2_semisup.trainers.base.nnUNetTrainerSemiSup`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from nnunetv2_semisup.network import taps
from nnunetv2_semisup.network.teacher import MovingAverage
from nnunetv2_semisup.settings import SemiSupSettings
from nnunetv2_semisup.training.step import Group
from nnunetv2_semisup.training.supervised import SupervisedLoss

Settings = TypeVar("Settings", bound=SemiSupSettings)


@dataclass(frozen=True)
class TaskInfo:
    """What a method may know about the task. It never sees paths, the optimiser, processes or mixed precision.

    Attributes:
        supervised_loss: nnU-Net's loss as a function of (logits, target), each a list under deep supervision; with a
            mask of the voxels that are known it learns from these alone.
        num_heads: output channels; with softmax they include the background.
        has_regions: True for region-based (sigmoid) training.
        ignore_label: value in the labelled target that carries no label, or None. Predictions never contain it.
        patch_size: voxels per axis, 2 or 3 entries.
        spacing_mm: voxel size per axis of the patch.
        is_ct: nnU-Net normalises a channel as CT.
    """

    supervised_loss: SupervisedLoss
    num_heads: int
    has_regions: bool
    ignore_label: int | None
    patch_size: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    is_ct: bool


class SemiSupMethod(nn.Module, Generic[Settings]):
    """What a method is: loss terms, and whatever it needs beside the network (teacher, heads, banks).

    The network is an argument of every function and never a submodule, or it would be saved and optimised twice.
    Parameters that require a gradient are optimised and everything in the state dict is saved.

    Attributes:
        diagnostics: scalars of the step for the log, no gradient; shares in [0, 1] are named ``share_<what>``. The
            trainer empties it before each step.
        ramp: of the step, in [0, 1]; the trainer multiplies the weights of all terms but ``supervised_terms`` with it.
        head_weights: (heads,) in [0, 1]: how much each head counts in the terms that rest on predictions. All 1 unless
            the trainer's burn-in or guards say otherwise; the trainer sets and saves it.
    """

    settings_class: ClassVar[type[SemiSupSettings]] = SemiSupSettings
    #: Settings that, all at zero, leave exactly nnU-Net's own step.
    unsupervised_weights: ClassVar[tuple[str, ...]] = ()
    #: Settings that switch off what else differs from nnU-Net's step: a stage without labels, another learning rate.
    alters_supervision: ClassVar[dict[str, Any]] = {}
    #: First epochs of the stages, each of which goes through nnU-Net's learning-rate curve; a method may set its own.
    learning_rate_starts: tuple[int, ...] = (0,)
    #: Before this epoch nothing is learned from labels: Dice means nothing and there is no best checkpoint.
    first_supervised_epoch: int = 0
    #: Terms that rest on labels alone: the trainer's ramp leaves their weights as they are.
    supervised_terms: ClassVar[tuple[str, ...]] = ("supervised",)
    #: True: the unlabelled batch has ``partners``, another draw of as many patches to mix with.
    wants_partners: bool = False

    #: For ``nnUNetv2_semisup_trainers --list``: stock steps a step costs, and GiB of live tensors (stock: 4.6), both
    #: counted with 128 x 128 x 128 voxels, batch 2 and fp16; and when to use the method.
    cost: ClassVar[float]
    memory_gib: ClassVar[float]
    use: ClassVar[str]

    head_weights: Tensor

    def __init__(self, network: nn.Module, task: TaskInfo, settings: Settings):
        """Build what is needed beside ``network``, which may be looked at and copied but not kept."""
        super().__init__()
        self.task = task
        self.settings = settings
        self.diagnostics: dict[str, Tensor] = {}
        self.ramp = 1.0
        self.register_buffer("head_weights", torch.ones(task.num_heads), persistent=False)

    @classmethod
    def unsupported(cls, task: TaskInfo, settings: Settings) -> str | None:
        """Why the method cannot train on this task, ending with what to do; None if it can. Asked before all work."""
        return None

    def unfit_batch(self, labelled: int, unlabelled: int) -> str | None:
        """Why the method cannot work with so many patches per GPU, ending with what to do; None if it can.

        Asked before any unlabelled case is preprocessed.
        """
        return None

    def losses(self, network: nn.Module, labelled: dict, unlabelled: dict, progress: float) -> Iterator[Group]:
        """Yield groups of terms ``{name: (weight, value)}``; the groups share no graph, but see ``taps.share``.

        The trainer back-propagates each group before it asks for the next, so peak memory is that of the largest one.
        Never yield inside ``torch.no_grad()`` or ``autocast``: the mode would leak into the trainer's backward.

        Args:
            network: the planned network, in training mode.
            labelled: ``data`` (B, C, X, Y, Z) float32; ``target`` as the supervised loss takes it; ``keys``: ids; and
                what :meth:`labelled_transform` adds.
            unlabelled: ``data`` (U, C, X, Y, Z) float32, spatially augmented only; ``keys``; with ``wants_partners``
                also ``partners``, shaped as ``data``. There is no target.
            progress: share of the optimiser steps since the method's start that are done, in [0, 1).
        """
        raise NotImplementedError

    def labelled_transform(self) -> Callable[[dict], dict[str, Tensor]] | None:
        """A function that the loader's workers call with each augmented labelled batch, or None.

        It returns further tensors for the batch, under keys of its own; they reach :meth:`losses` in ``labelled``. It
        must be picklable, must not change the batch, and must draw no random numbers from the global generators.
        """
        return None

    def supervised(self, network: nn.Module, labelled: dict) -> Group:
        """The stock step's loss as a group of its own; most methods yield it last."""
        output, _ = taps.decode(network, taps.encode(network, labelled["data"]))
        return {"supervised": (1.0, self.task.supervised_loss(output, labelled["target"]))}

    def note_pseudo_labels(self, decided: Tensor) -> None:
        """Log how much of the unlabelled patches each class takes: the trainer's guard against vanishing reads it.

        Args:
            decided: (B, X, Y, Z) int64 class of what the terms learn from; with regions (B, heads, X, Y, Z) bool.
        """
        for head in range(0 if self.task.has_regions else 1, self.task.num_heads):
            mask = decided[:, head] if self.task.has_regions else decided == head
            self.diagnostics[f"share_volume_{head}"] = mask.float().mean()

    def stage(self, progress: float) -> int:
        """The stage at ``progress``, from 1; most methods have one."""
        return 1

    def enter_stage(self, network: nn.Module, stage: int) -> None:
        """Called once before the first step of each stage after the first; not again by a resumed run."""

    def after_step(self, network: nn.Module) -> None:
        """Update teacher or banks after the optimiser's step; skipped when the step was."""

    def reset(self, network: nn.Module) -> None:
        """Called once before the first step with the method's terms, when ``network`` has the weights to start from."""

    def teacher_network(self, network: nn.Module) -> nn.Module:
        """The network, shaped as ``network``, from whose decision ``network`` learns on unlabelled patches.

        It is ``self.teacher``, where the method has one, else ``network`` itself. For pictures of the pseudo-labels.
        """
        teacher = getattr(self, "teacher", None)
        return teacher.module if isinstance(teacher, MovingAverage) else network

    def confidence_needed(self, progress: float) -> tuple[float, float] | None:
        """Confidence from which a foreground and a background voxel of the pseudo-label count, in [0, 1].

        None where a voxel's confidence does not decide that. For pictures of the pseudo-labels.

        Args:
            progress: as :meth:`losses` has it.
        """
        return None

    def inference_network(self, network: nn.Module) -> nn.Module:
        """The network whose weights are validated and written for prediction; same keys as ``network``."""
        return network
