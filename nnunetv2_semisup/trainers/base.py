"""Everything that semi-supervised methods share: the only file here that talks to nnU-Net's trainer.

A method (``SemiSupMethod`` in ``method.py``) yields groups of loss terms; :class:`nnUNetTrainerSemiSup` does the rest.
A new method is one new file in this folder with a settings dataclass and a subclass of each; there is no list to edit.
"""

from __future__ import annotations

import contextlib
import io
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from time import time
from typing import ClassVar

import numpy as np
import torch
from nnunetv2.configuration import default_num_processes
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import autocast, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_semisup import __version__, files
from nnunetv2_semisup import settings as settings_module
from nnunetv2_semisup.data import folders, loader, preprocess, splits
from nnunetv2_semisup.data.volumes import labelled_volumes
from nnunetv2_semisup.errors import InputError, TrainingFailed
from nnunetv2_semisup.labels import class_names
from nnunetv2_semisup.network import taps
from nnunetv2_semisup.settings import SemiSupSettings
from nnunetv2_semisup.trainers.method import SemiSupMethod, TaskInfo
from nnunetv2_semisup.training import checkpoints, pictures, rehearsal, streams, tensorboard
from nnunetv2_semisup.training.distributed import broadcast_state, is_distributed, mean_over_processes
from nnunetv2_semisup.training.learning_rate import RestartingPolyLR
from nnunetv2_semisup.training.log import TrainingLog
from nnunetv2_semisup.training.ready import require_ready
from nnunetv2_semisup.training.start import Start
from nnunetv2_semisup.training.step import Group, StepResult, back_propagate, finish_step
from nnunetv2_semisup.training.stopping import StopRequest
from nnunetv2_semisup.training.supervised import SupervisedLoss

MAX_OVERFLOWS_IN_A_ROW = 20  # a GradScaler that starts at 2^16 has passed every sensible scale by then

TRAINERS: dict[str, type[nnUNetTrainerSemiSup]] = {}  # every trainer defined in this folder, by name


class nnUNetTrainerSemiSup(nnUNetTrainer):
    """nnU-Net's trainer with a second, unlabelled stream. Subclasses set ``method_class``, rarely more."""

    method_class: ClassVar[type[SemiSupMethod]]
    method: SemiSupMethod  # -> initialize
    _best_ema: float | None  # nnU-Net's
    epochs_of_name: ClassVar[int | None] = None  # set on nnUNetTrainer<Method>_<N>epochs

    def __init_subclass__(cls):
        super().__init_subclass__()
        if hasattr(cls, "method_class") and cls.__module__.startswith(f"{__package__}."):
            TRAINERS[cls.__name__] = cls  # not those with epochs: they belong to the package, to none of its modules

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's signature
    ):
        where = f"plans {plans.get('plans_name')}" if isinstance(plans, dict) else "the plans"
        preprocess.check_plans(plans, configuration, where, "plan again with nnUNetv2_plan_and_preprocess")
        self.settings = self._resolve_settings(plans)
        require_ready(plans, configuration, device)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = self.settings.num_epochs
        self.num_iterations_per_epoch = self.settings.num_iterations_per_epoch
        self.num_val_iterations_per_epoch = self.settings.num_val_iterations_per_epoch
        self.unlabeled_cases: list[str] = []  # -> on_train_start
        self.training_log = TrainingLog()
        self._resumed = False
        self._is_training = False
        self._steps_in_epoch = 0
        self._overflows_in_a_row = 0
        self._last_save = time()
        self._stop = StopRequest()
        self._weights = checkpoints.NetworkWeights()
        self._stage = 1  # the last one that the method entered
        self._labelled_volumes: list[float] = []  # -> get_tr_and_val_datasets
        manager = self.label_manager
        foreground = manager.foreground_regions if manager.has_regions else manager.foreground_labels
        names = class_names(dataset_json["labels"], foreground)
        s, shape = self.settings, self.configuration_manager
        self._start = Start(names, not manager.has_regions, s.start_dice, s.start_latest, s.ramp_share)
        self._pictures = pictures.PatchPictures(names, manager.has_regions, shape.patch_size, shape.spacing)
        self._tensorboard: tensorboard.TensorBoardLogger | None = None  # -> on_train_start

    # ---------------------------------------------------------------------------------------------------- set-up

    @classmethod
    def base_name(cls) -> str:
        """The trainer's name without the epoch suffix, the key of its settings."""
        return cls.__name__ if cls.epochs_of_name is None else cls.__mro__[1].__name__

    @classmethod
    def _resolve_settings(cls, plans: dict) -> SemiSupSettings:
        settings_class = cls.method_class.settings_class
        return settings_module.of_trainer(plans, cls.base_name(), settings_class, TRAINERS, cls.epochs_of_name)

    def initialize(self):
        if self.is_cascaded:
            raise NotImplementedError(
                f"{self.__class__.__name__} does not train the cascade's second stage ({self.configuration_name}): "
                f"its unlabelled images would need predictions of the first stage. Train 3d_fullres or 3d_lowres."
            )
        if self.settings.deterministic_seed is not None:
            torch.manual_seed(self.settings.deterministic_seed)
        super().initialize()
        taps.check_supported(self.bare_network)
        if self._do_i_compile():
            # In place: the keys stay stock. The taps serve training, the plain call serves validation.
            taps.compile_taps(self.bare_network)
            self.bare_network.compile()
        task = TaskInfo(
            supervised_loss=SupervisedLoss(self.loss, self.label_manager.ignore_label, self._num_regions),
            num_heads=self.label_manager.num_segmentation_heads,
            has_regions=self.label_manager.has_regions,
            ignore_label=self.label_manager.ignore_label,
            patch_size=tuple(self.configuration_manager.patch_size),
            spacing_mm=tuple(self.configuration_manager.spacing),
            is_ct="CTNormalization" in self.configuration_manager.normalization_schemes,
        )
        if reason := self.method_class.unsupported(task, self.settings):
            raise NotImplementedError(f"{self.base_name()}: {reason}")
        self.method = self.method_class(self.bare_network, task, self.settings).to(self.device)
        if self.method_parameters():
            self.optimizer.add_param_group({"params": self.method_parameters()})
        if len(self.method.learning_rate_starts) > 1:
            starts = self.method.learning_rate_starts
            self.lr_scheduler = RestartingPolyLR(self.optimizer, self.initial_lr, starts, self.num_epochs)
        if self._start.started:
            self._prepare_terms()

    @property
    def _num_regions(self) -> int:
        """Of region-based training; 0 for softmax."""
        return self.label_manager.num_segmentation_heads if self.label_manager.has_regions else 0

    def _do_i_compile(self):
        # nnU-Net asks this right after it has built the network, to wrap it whole. Answer no at that one place: we
        # compile in place in initialize(). _build_loss, which comes next, must hear the true value.
        wrapping_the_network = self.network is not None and self.optimizer is None
        return False if wrapping_the_network else super()._do_i_compile()

    @property
    def bare_network(self) -> nn.Module:
        """The planned network without the DistributedDataParallel wrapper."""
        return self.network.module if isinstance(self.network, DistributedDataParallel) else self.network

    def method_parameters(self) -> list[nn.Parameter]:
        """The method's own parameters that are trained (heads, a second network)."""
        return [p for p in self.method.parameters() if p.requires_grad]

    @property
    def is_supervised(self) -> bool:
        """True if the settings switch the whole method off: then each step is bit for bit nnU-Net's own."""
        weights, altered = self.method_class.unsupervised_weights, self.method_class.alters_supervision
        stock_else = all(getattr(self.settings, name) == value for name, value in altered.items())
        return bool(weights) and stock_else and not any(getattr(self.settings, name) for name in weights)

    @property
    def _steps(self) -> tuple[int, int]:
        """Optimiser steps done, and of the whole training."""
        done = self.current_epoch * self.num_iterations_per_epoch + self._steps_in_epoch
        return done, self.num_epochs * self.num_iterations_per_epoch

    @property
    def progress(self) -> float:
        """Share of the optimiser steps since the method's start that are done, in [0, 1)."""
        return self._start.progress(*self._steps)

    @property
    def _loader_seed(self) -> int | None:
        """Differs between processes and epochs; else a resumed run would draw the first epochs' patches again."""
        if self.settings.deterministic_seed is None:
            return None
        return (self.settings.deterministic_seed + 1000 * self.current_epoch + 1_000_003 * self.local_rank) % 2**31

    def _seed(self) -> None:
        """At every epoch's start: what a run draws then depends on no epoch before, so a resumed one draws it too."""
        if self._loader_seed is not None:
            random.seed(self._loader_seed)
            np.random.seed(self._loader_seed)
            torch.manual_seed(self._loader_seed)

    # ------------------------------------------------------------------------------------------------- the two streams

    def do_split(self):
        if self.fold != "all":
            identifiers = self.dataset_class.get_identifiers(self.preprocessed_dataset_folder)
            folder = Path(self.preprocessed_dataset_folder_base)
            splits.check_fold(folder, self.fold, identifiers)
            written = splits.ensure_splits(folder, identifiers)
            if written:
                self.print_to_log_file(f"Fewer than 5 labelled cases: wrote leave-one-out folds to {written}")
        return super().do_split()

    def _prepare_unlabeled_cases(self) -> list[str]:
        """Preprocess what is missing, then say which unlabelled cases this fold uses."""
        arguments = (self.plans_manager.dataset_name, self.plans_manager.plans_name, self.configuration_name)
        if is_distributed():
            pending = preprocess.pending_cases(*arguments)
            if pending:
                raise InputError(
                    f"{len(pending)} unlabelled cases are not preprocessed ({', '.join(pending[:3])}, ...), and that "
                    f"would outlast the time-out of several GPUs. Run first: nnUNetv2_semisup_preprocess "
                    f"-d {arguments[0]} -p {arguments[1]} -c {arguments[2]}"
                )
        available = preprocess.preprocess_unlabeled(*arguments, default_num_processes, log=self.print_to_log_file)
        cases = splits.unlabeled_of_fold(Path(self.preprocessed_dataset_folder_base), self.fold, available)
        self.print_to_log_file(f"{len(cases)} unlabelled cases serve fold {self.fold}.")
        return cases

    def get_tr_and_val_datasets(self):
        train, val = super().get_tr_and_val_datasets()
        if self.settings.guards and not self.is_supervised and self.label_manager.ignore_label is None:
            patch_size = self.configuration_manager.patch_size
            self._labelled_volumes = labelled_volumes(train, self.label_manager, patch_size)
        return train, val

    def get_dataloaders(self):
        # Stock builds its two loaders, transforms and all, without starting workers.
        with files.environment(nnUNet_n_proc_DA="0"):
            train, val = (augmenter.data_loader for augmenter in super().get_dataloaders())
        both = streams.two_streams(
            train,
            self._unlabeled_dataset(),
            self._unlabeled_batch_size(),
            self.label_manager,
            self.method.wants_partners,
            self.method.labelled_transform(),
        )
        workers = get_allowed_n_proc_DA()
        shared = {"seed": self._loader_seed, "pin_memory": self.device.type == "cuda"}
        return (
            streams.start_augmenter(both, workers, max(6, workers // 2), **shared),
            streams.start_augmenter(val, max(1, workers // 2) if workers else 0, max(3, workers // 4), **shared),
        )

    def _unlabeled_dataset(self) -> loader.UnlabeledDataset:
        identifier = self.configuration_manager.data_identifier
        folder = folders.unlabeled_folder(self.preprocessed_dataset_folder_base, identifier)
        return loader.UnlabeledDataset(folder, self.unlabeled_cases, any(self.configuration_manager.use_mask_for_norm))

    def _unlabeled_batch_size(self) -> int:
        """Unlabelled patches per step and process."""
        wanted = self.settings.unlabeled_batch_size
        if wanted is None:
            return self.batch_size
        return max(1, wanted // dist.get_world_size()) if is_distributed() else wanted

    # -------------------------------------------------------------------------------------------------------- training

    def run_training(self):
        try:
            super().run_training()
        except TrainingFailed:
            raise
        except RuntimeError as error:
            # SIGTERM to all processes ends the workers too; nnU-Net then reports them as dead.
            if self._stop.wanted:
                self._save_and_leave()
            reason = streams.loading_failed(error, self.dataloader_train, self.dataloader_val)
            if not reason:
                raise
            saved = self._save_interrupted_epoch() if self._is_training else ""
            raise TrainingFailed(f"{reason}. {saved}".rstrip()) from error
        finally:
            self._stop.stop_listening()
            streams.end_augmenters(self.dataloader_train, self.dataloader_val)
            if self._tensorboard is not None:
                self._tensorboard.close()
        if self.local_rank == 0:
            dice = self.logger.get_value("dice_per_class_or_region", -1)
            if not self.is_supervised and (unused := self._start.unused(dice)):
                self.print_to_log_file(unused)
            self.print_to_log_file(self._summary())
        if self._stop.wanted:
            self.print_to_log_file(f"{self._stop.name} came after the last step: nnU-Net's validation is not done")
            sys.exit(self._stop.exit_code)

    def _summary(self) -> str:
        """What came of the training, and the command that comes next."""
        row = self.training_log.rows[-1] if self.training_log.rows else {}
        on = "training cases" if self.fold == "all" else "validation cases"
        numbers = [f"online Dice {self.logger.get_value('mean_fg_dice', -1):.3f} on {on}"]
        if "share_kept" in row:
            numbers.append(f"{100 * row['share_kept']:.1f} % of the pseudo-labels kept")
        manager = self.plans_manager
        what = f"-d {manager.dataset_name} -c {self.configuration_name} -f {self.fold} -tr {self.__class__.__name__}"
        drawn = f", {pictures.FOLDER}" if self.settings.pictures else ""
        device = "" if self.device.type == "cuda" else f" -device {self.device.type}"
        return (
            f"Finished: {', '.join(numbers)}. Log and pictures: semisup_log.csv, semisup_progress.png{drawn} in "
            f"{self.output_folder}. Next: nnUNetv2_predict {what} -p {manager.plans_name}{device} -i IMAGES -o "
            f"PREDICTIONS"
        )

    def on_train_start(self):
        if not self.was_initialized:
            self.initialize()
        if reason := self.method.unfit_batch(self.batch_size, self._unlabeled_batch_size()):
            raise InputError(f"{self.base_name()}: {reason}")
        if self.settings.tensorboard:
            tensorboard.require_tensorboard()
        self.unlabeled_cases = self._prepare_unlabeled_cases()
        self._warn_of_memory()
        self._seed()
        if not self._resumed:
            self.method.reset(self.bare_network)
        broadcast_state(self.bare_network, self.method)
        super().on_train_start()
        if self.local_rank == 0:
            self._begin_output()
            self._write_settings()
        if self._start.step == 0 and not self._resumed and not self.is_supervised:
            self.print_to_log_file("The method's terms start with the first step.")
        self._last_save = time()
        self._stop.listen()
        self._is_training = True

    def _warn_of_memory(self) -> None:
        """Say now what would run out of memory hours later, when the terms or a later stage begin."""
        if self.device.type == "cuda" and not is_distributed():
            manager, available = self.plans_manager, torch.cuda.get_device_properties(self.device).total_memory
            what = f"-d {manager.dataset_name} -p {manager.plans_name}"
            if warning := rehearsal.memory_warning(self, available, what):
                self.print_to_log_file(warning)

    def _begin_output(self) -> None:
        """Keep apart from what an earlier run, or the epochs that a resumed run repeats, left in the folder."""
        if self._resumed:
            pictures.remove_from(self.output_folder, self.current_epoch)
        else:
            weights = () if self.disable_checkpointing else ("checkpoint_*.pth",)
            earlier = checkpoints.set_aside(Path(self.output_folder), pictures.FOLDER, tensorboard.FOLDER, *weights)
            for old, new in earlier:
                self.print_to_log_file(f"An earlier run left {old.name} here: renamed to {new.name}")
        if self.settings.tensorboard:
            self._tensorboard = tensorboard.TensorBoardLogger(
                self.output_folder, self.current_epoch, self.print_to_log_file
            )
            self.logger.loggers.append(self._tensorboard)

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self._seed()
        self.method.train()
        self._steps_in_epoch = 0
        self.training_log.start_epoch()

    def train_step(self, batch: dict) -> dict:
        labelled = streams.to_device(batch, self.device)
        unlabelled = labelled.pop("unlabelled")
        self.optimizer.zero_grad(set_to_none=True)
        self.method.diagnostics.clear()
        groups = self._groups(labelled, unlabelled)
        weights, values = back_propagate(groups, self._autocast, self.grad_scaler)
        result = finish_step(
            weights,
            values,
            self.method.diagnostics,
            self.bare_network.parameters(),
            self.method_parameters() if self._start.started else [],
            self.optimizer,
            self.grad_scaler,
            self._stop.wanted,
        )
        self._stop.agreed = result.stop
        self._check_finite(result, batch)
        if self._start.started and not result.overflow:
            self.method.after_step(self.bare_network)
        self._steps_in_epoch += 1
        self._log_step(result)
        if self._stop.agreed:
            self._save_and_leave()
        # nnU-Net plots this beside the validation loss, so it is the supervised term where there is one.
        return {"loss": np.float32(result.scalars.get("loss_supervised", result.total))}

    def _groups(self, labelled: dict, unlabelled: dict) -> Iterator[Group]:
        """nnU-Net's own step before the start, then the method's groups with their ramp."""
        if not self._start.started:
            yield self.method.supervised(self.bare_network, labelled)
            return
        self._enter_stage()
        self.method.ramp = ramp = self._start.ramp(*self._steps)
        unramped = self.method.supervised_terms
        for group in self.method.losses(self.bare_network, labelled, unlabelled, self.progress):
            yield {k: (w if k in unramped else w * ramp, value) for k, (w, value) in group.items()}

    def _enter_stage(self) -> None:
        stage = self.method.stage(self.progress)
        while self._stage < stage:
            self._stage += 1
            self.method.enter_stage(self.bare_network, self._stage)

    def _log_step(self, result: StepResult) -> None:
        # An overflow is counted; its infinities would spoil the epoch's means.
        step = {} if result.overflow else {**result.scalars, "loss_total": result.total}
        if not result.overflow:
            step |= {f"weight_{name}": weight for name, weight in result.weights.items()}
        self.training_log.add({**step, "overflows": float(result.overflow)})

    def _check_finite(self, result: StepResult, batch: dict) -> None:
        """Without a GradScaler a value that is not finite is fatal at once, with one after 20 steps in a row."""
        self._overflows_in_a_row = self._overflows_in_a_row + 1 if result.overflow else 0
        if self._overflows_in_a_row < (1 if self.grad_scaler is None else MAX_OVERFLOWS_IN_A_ROW):
            return
        bad = result.not_finite or ["a value on another process"]
        saved = self._save("checkpoint_failed.pth")
        if is_distributed():
            dist.barrier()  # as when it is stopped: the first to fail ends the others, rank 0 perhaps while it writes
        raise TrainingFailed(
            f"{', '.join(bad)} not finite in epoch {self.current_epoch}, step {self._steps_in_epoch}; labelled cases "
            f"{', '.join(map(str, batch['keys']))}; "
            f"unlabelled cases {', '.join(map(str, batch['unlabelled']['keys']))}. "
            f"{saved} checkpoint_latest.pth is as it was."
        )

    def _autocast(self):
        """As nnU-Net only on CUDA, but without the cache of cast weights.

        Before torch 2.11 that cache, once filled by a pass without gradient, hides the weights from later passes of the
        same block that need one (pytorch issue 112583); methods do both in one group.
        """
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        return autocast(self.device.type, cache_enabled=False)

    def on_epoch_end(self):
        steps, total = self._steps
        ramp, was_started = self._start.ramp(steps, total), self._start.started
        row = self.training_log.end_epoch(self.current_epoch, progress=steps / total, ramp=ramp, stage=self._stage)
        if not self.is_supervised:
            self._end_epoch_of_start(row)
        if self.local_rank == 0:
            self._write_log(terms_start=self._start.started and not was_started)
            for external in self.logger.loggers:
                for key, value in row.items():
                    external.log(f"semisup/{key}", value, self.current_epoch)
            self.print_to_log_file("semisup", {k: float(f"{v:.4g}") for k, v in row.items() if k != "epoch"})
        # nnU-Net saves checkpoint_latest every save_every epochs; ours counts minutes.
        due = time() - self._last_save >= 60 * self.settings.save_every_minutes
        self.save_every = 1 if due else sys.maxsize
        self._before_best_checkpoint()
        super().on_epoch_end()
        self._best_ema = None if self._best_ema == math.inf else self._best_ema
        if due:
            self._last_save = time()

    def _write_log(self, terms_start: bool) -> None:
        """Table and pictures. Whatever goes wrong is a warning: the checkpoint, which comes next, is worth more."""
        epoch, last, manager = self.current_epoch, self.num_epochs - 1, self.plans_manager
        what = f"{self.__class__.__name__}, {manager.dataset_name}, {self.configuration_name}, fold {self.fold}"
        first = int(not self.label_manager.has_regions)
        heads = dict(enumerate(self._start.names, first))
        dice = self.logger.get_value("dice_per_class_or_region", None)
        try:
            self.training_log.write_csv(Path(self.output_folder, "semisup_log.csv"))
            self.training_log.draw(
                Path(self.output_folder, "semisup_progress.png"),
                what,
                heads,
                dice,
                dice_of="training cases" if self.fold == "all" else "validation cases",
                threshold=0.0 if self.is_supervised else self._start.threshold,
                labelled_volumes=self._labelled_volumes,
            )
            if pictures.is_due(epoch, self.num_epochs, self.settings.pictures, terms_start):
                number = "the last" if epoch == last else f"the last is {last}"
                self._draw_patches(f"{what}\nafter epoch {epoch} ({number})")
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            self.print_to_log_file(f"WARNING: log or pictures of epoch {epoch} are incomplete: {reason}")

    def _draw_patches(self, title: str) -> None:
        student, (steps, total) = self.bare_network, self._steps
        begun = self._start.started  # until then a teacher is what it was at the beginning
        teacher = self.method.teacher_network(student) if begun else student
        state = f"the method's terms have started, ramp {self._start.ramp(steps, total):.2f}"
        stock = "the method has not started: steps are those of nnU-Net, pseudo-labels are the prediction"
        title += f"; {state if begun else stock}"
        file = pictures.file_of(self.output_folder, self.current_epoch, self.num_epochs)
        autocast, progress = self._autocast, steps / total
        needed = self.method.confidence_needed(self.progress) if begun else None
        cases, weights = self._unlabeled_dataset(), None if needed is None else self.method.head_weights
        self._pictures.draw(file, title, cases, student, teacher, self.device, autocast, progress, needed, weights)
        if self._tensorboard is not None:
            self._tensorboard.log_picture("semisup/patches", file, self.current_epoch)

    def _end_epoch_of_start(self, row: dict[str, float]) -> None:
        """Decide whether the method's terms start, and how much each class counts in the next epoch."""
        was_started = self._start.started
        dice = self.logger.get_value("dice_per_class_or_region", -1)
        messages = self._start.after_epoch(dice, *self._steps)
        first = int(not self.label_manager.has_regions)
        volumes = [row.get(f"share_volume_{first + i}", math.nan) for i in range(len(self._start.names))]
        if self._labelled_volumes and not any(map(math.isnan, volumes)):
            messages += self._start.note_volumes(mean_over_processes(volumes), self._labelled_volumes)
        if self._start.started and not was_started:
            self.begin_terms()
        else:
            self._weigh_heads()
        for message in messages:
            self.print_to_log_file(message)

    def begin_terms(self) -> None:
        """The next step is the first with the method's terms, of all classes if the burn-in has not decided that."""
        if not self._start.started:
            self._start.start_at(self._steps[0])
        self._prepare_terms()
        self.method.reset(self.bare_network)
        broadcast_state(self.bare_network, self.method)

    def _prepare_terms(self) -> None:
        """Before the first step with the method's terms. Until then the step is nnU-Net's, the weights' layout too."""
        if self.device.type == "cpu" and not self.is_supervised:
            taps.use_channels_last(self.bare_network, self.method)
        self._weigh_heads()

    def _weigh_heads(self) -> None:
        self.method.head_weights.copy_(torch.tensor(self._start.head_weights(*self._steps)))

    def _before_best_checkpoint(self) -> None:
        """Let nnU-Net's moving average of the Dice, which decides on the best checkpoint, start with the labels."""
        first = self.method.first_supervised_epoch
        if self.current_epoch < first:
            self._best_ema = math.inf
        elif self.current_epoch == first > 0:
            self._best_ema = None  # a checkpoint of the epoch before has infinity
            self.logger.get_value("ema_fg_dice", None)[first] = self.logger.get_value("mean_fg_dice", first)

    # ------------------------------------------------------------------------------------------------------ validation

    def _inference_network(self) -> nn.Module:
        """The student before the start: a teacher would be what it was at the beginning."""
        return self.method.inference_network(self.bare_network) if self._start.started else self.bare_network

    def on_validation_epoch_start(self):
        self._weights.use_inference(self.bare_network, self._inference_network())
        super().on_validation_epoch_start()

    def validation_step(self, batch: dict) -> dict:
        result = super().validation_step(batch)
        if self._stop.wanted and not is_distributed():
            self._save_and_leave()
        return result

    def on_validation_epoch_end(self, val_outputs: list[dict]):
        super().on_validation_epoch_end(val_outputs)
        self._weights.use_training(self.bare_network)

    def perform_actual_validation(self, save_probabilities: bool = False):
        with self._weights.inference(self.bare_network, self._inference_network()):
            super().perform_actual_validation(save_probabilities)

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def save_checkpoint(self, filename: str) -> None:
        if self.local_rank != 0 or self.disable_checkpointing:
            return super().save_checkpoint(filename)
        # nnU-Net builds the dictionary and writes it in one go, so let it write to memory.
        stock = io.BytesIO()
        with self._weights.inference(self.bare_network, self._inference_network()) as training_weights:
            super().save_checkpoint(stock)
        ours = {
            "trainer": self.base_name(),
            "version": __version__,
            "settings": settings_module.as_json(self.settings),
            "method": self.method.state_dict(),
            "stage": self._stage,
            "start": self._start.state(),
            "log": self.training_log.rows,
            "picture_slices": self._pictures.slices,
            "training_weights": training_weights,
        }
        checkpoints.write(stock, ours, filename)

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        ours = checkpoints.read_own_part(filename_or_checkpoint, self.base_name(), self.num_epochs)
        if not self.was_initialized:
            if "start" not in ours:  # version 0.1.0 had numbers where null follows the patch since
                self.settings = settings_module.with_numbers_of(self.settings, ours["settings"])
                self.print_to_log_file("A run of version 0.1.0: what is null in the plans keeps the checkpoint's value")
            self.initialize()
        changed = checkpoints.changed_settings(settings_module.as_json(self.settings), ours["settings"])
        was_started = self._start.started
        try:
            super().load_checkpoint(filename_or_checkpoint)
            self.method.load_state_dict(ours["method"])
            if "start" in ours:
                self._start.load(ours["start"], self._steps[0])
            else:  # version 0.1.0
                self._start.start_at(0)
            self._stage = min(ours["stage"], self.method.stage(self.progress))  # an interrupted epoch is repeated
        except (RuntimeError, ValueError) as error:
            if not changed:
                raise
            raise InputError(
                f"{filename_or_checkpoint} does not fit the plans' settings; changed since: {', '.join(changed)}"
            ) from error
        if ours["training_weights"] is not None:
            self.bare_network.load_state_dict(ours["training_weights"])
        if self._start.started and not was_started:
            self._prepare_terms()
        else:
            self._weigh_heads()
        self.training_log.rows = list(ours["log"])
        self._pictures.slices = dict(ours.get("picture_slices", {}))
        # A run that was stopped within an epoch repeats it: drop what nnU-Net's log has of it.
        for values in self.logger.local_logger.get_checkpoint().values():
            del values[self.current_epoch :]
        for key, (now, before) in changed.items():
            self.print_to_log_file(f"WARNING: setting {key} is now {now!r}, was {before!r} in {filename_or_checkpoint}")
        if self.current_epoch < self.num_epochs:
            terms = "have started" if self._start.started else "have not started yet"
            self.print_to_log_file(
                f"Going on from {filename_or_checkpoint}: {self.current_epoch} of {self.num_epochs} epochs are done, "
                f"the method's terms {terms}."
            )
        self._resumed = True

    def _save_and_leave(self) -> None:
        """Save so that ``--c`` repeats the interrupted epoch, then exit with 128 + the signal's number."""
        saved = self._save_interrupted_epoch()
        self.print_to_log_file(f"Stopped by {self._stop.name} in epoch {self.current_epoch}. {saved}")
        if self._stop.agreed and is_distributed():
            dist.barrier()  # when one process has left, the others are killed, rank 0 perhaps while it writes
        sys.exit(self._stop.exit_code)

    def _save_interrupted_epoch(self) -> str:
        self._weights.use_training(self.bare_network)
        self.current_epoch -= 1  # save_checkpoint writes current_epoch + 1
        saved = self._save("checkpoint_latest.pth")
        self.current_epoch += 1
        return f"{saved} The same command with --c repeats the epoch of the checkpoint and goes on."

    def _save(self, name: str) -> str:
        """Save into the output folder; returns a sentence that says so, or that checkpoints are switched off."""
        if self.disable_checkpointing:
            return "Nothing was saved (--disable_checkpointing)."
        file = Path(self.output_folder, name)
        self.save_checkpoint(str(file))
        return f"Saved {file}."

    def _write_settings(self) -> None:
        if self.is_supervised:
            weights = ", ".join(self.method.unsupervised_weights)
            self.print_to_log_file(f"WARNING: {weights} = 0: this run is supervised nnU-Net")
        content = {"trainer": self.base_name(), "version": __version__, **settings_module.as_json(self.settings)}
        files.write_json(Path(self.output_folder, "semisup_settings.json"), content, indent=2)
        self.print_to_log_file("semisup settings:", content)
