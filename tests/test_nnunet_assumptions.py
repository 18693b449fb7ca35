"""What our code takes for granted of nnU-Net without nnU-Net promising it; each test says what breaks otherwise.

Run this file first after an update of nnU-Net: what passes here need not be looked at again.
"""

import inspect
import io
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from helpers import architecture
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_semisup import plans
from nnunetv2_semisup.benchmark.speed import random_batch
from nnunetv2_semisup.data.preprocess import SUFFIXES
from nnunetv2_semisup.data.splits import MIN_CASES_OF_STOCK
from nnunetv2_semisup.settings import SemiSupSettings
from nnunetv2_semisup.trainers.base import nnUNetTrainerSemiSup

OURS = "nnUNetTrainerMeanTeacher"


def stock(dataset, configuration="3d_fullres", trainer_class=nnUNetTrainer, fold="all", **more_plans):
    """A trainer of nnU-Net's own, as ``nnUNetv2_train`` makes it."""
    content = {**dataset.plans, **more_plans, "continue_training": False}
    return trainer_class(content, configuration, fold, dataset.dataset_json, torch.device("cpu"))


# ------------------------------------------------------------------------------------------- constructor and initialize


def test_constructor_takes_what_nnunet_notes_in_the_checkpoint(tiny):
    """nnU-Net reads its arguments back by the names in our signature, and the plans hold one key more than the file."""
    ours, theirs = (inspect.signature(c.__init__).parameters for c in (nnUNetTrainerSemiSup, nnUNetTrainer))
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()], (
        "every trainer of ours would fail in the constructor, which looks our parameters up among its own variables"
    )
    given = {**tiny.plans, "continue_training": True}
    trainer = nnUNetTrainer(given, "3d_fullres", "all", tiny.dataset_json, torch.device("cpu"))
    assert trainer.logger.resume is True and "continue_training" not in given, (
        "helpers, benchmark and documentation that build trainers put this key into the plans"
    )
    assert trainer.grad_scaler is None, "train_step takes a GradScaler for mixed precision, which the CPU has not"


def test_unknown_keys_of_the_plans_are_kept(tiny):
    trainer = stock(tiny, semisup={OURS: {"teacher_decay": 0.5}})
    assert trainer.plans_manager.plans["semisup"] == {OURS: {"teacher_decay": 0.5}}, (
        "settings are stored under a key of the plans file that nnU-Net does not know"
    )


def test_defaults_of_a_training(tiny):
    trainer, ours = stock(tiny), SemiSupSettings()
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch) == (
        ours.num_epochs,
        ours.num_iterations_per_epoch,
        ours.num_val_iterations_per_epoch,
    ), "the settings promise nnU-Net's own length of a training"


@pytest.mark.parametrize("epochs", [1, 5, 10, 20, 50, 100, 250])  # nnU-Net has classes of its own for these
def test_stock_trainers_with_epochs_set_them_in_the_constructor(tiny, epochs):
    name = f"nnUNetTrainer_{epochs}epochs" if epochs > 1 else "nnUNetTrainer_1epoch"
    trainer = stock(tiny, trainer_class=recursive_find_trainer_class_by_name(name))
    assert type(trainer).__name__ == name and trainer.num_epochs == epochs, (
        "the baseline of demo and benchmark would train for another time than our trainer of the same suffix"
    )
    assert set(vars(type(trainer))) <= {"__init__", "__module__", "__doc__", "__firstlineno__", "__static_attributes__"}


def test_initialize_builds_asks_to_compile_optimises_builds_the_loss(tiny):
    events = []

    class Recorder(nnUNetTrainer):
        @staticmethod
        def build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
        ):
            events.append("network")
            return nnUNetTrainer.build_network_architecture(
                plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
            )

        def _do_i_compile(self):
            events.append(f"compile? network {self.network is not None}, optimizer {self.optimizer is not None}")
            return super()._do_i_compile()

        def configure_optimizers(self):
            events.append("optimizer")
            return super().configure_optimizers()

        def _build_loss(self):
            events.append("loss")
            return super()._build_loss()

    trainer = stock(tiny, trainer_class=Recorder)
    trainer.initialize()
    assert events == [
        "network",
        "compile? network True, optimizer False",
        "optimizer",
        "loss",
        "compile? network True, optimizer True",
    ], (
        "_do_i_compile of the base trainer answers no while there is a network and no optimiser: at another order the "
        "whole network would be wrapped by torch.compile, or the loss would not be compiled"
    )
    assert len(trainer.optimizer.param_groups) == 1, "a method's parameters become the second group"


def test_losses_differ_in_two_attributes_when_there_is_an_ignore_label(datasets, use):
    """SupervisedLoss sets on a copy of the loss what nnU-Net's constructors set for an ignore label."""

    def inner(labels):
        trainer = stock(use(datasets(labels)))
        trainer.initialize()
        return trainer.loss.loss

    without, with_ignore = inner("2 classes"), inner("ignore")
    assert without.ignore_label is None and with_ignore.ignore_label == with_ignore.ce.ignore_index == 2
    without, with_ignore = inner("regions"), inner("regions and ignore")
    assert (without.use_ignore_label, without.ce.reduction) == (False, "mean")
    assert (with_ignore.use_ignore_label, with_ignore.ce.reduction) == (True, "none")


def test_loss_has_a_weight_of_the_cross_entropy(datasets, use):
    for labels in ("2 classes", "regions"):
        trainer = stock(use(datasets(labels)))
        trainer.initialize()
        inner = trainer.loss.loss
        assert inner.weight_ce == 1, "SS-Net sets weight_ce on the loss that deep supervision wraps as .loss"
        batch = random_batch(trainer)
        with torch.no_grad():
            output = trainer.network(batch["data"])
            both = inner(output[0], batch["target"][0])
            inner.weight_ce = 0
            dice = inner(output[0], batch["target"][0])
        assert both > dice, "SS-Net's seg_ce_weight would have no effect"
        trainer.enable_deep_supervision = False
        assert trainer._build_loss().weight_ce == 1, "without deep supervision nothing wraps the loss"


# ---------------------------------------------------------------------------------------------------------- the loaders


@pytest.mark.parametrize(("configuration", "was_2d"), [("2d", True), ("3d_fullres", False)])
def test_loaders_without_workers_can_be_taken_apart(tiny, configuration, was_2d):
    """get_dataloaders of the base trainer takes loader, transforms and patch sizes out of nnU-Net's."""
    assert get_allowed_n_proc_DA() == 0, "nnUNet_n_proc_DA must be read at every call: we set it to 0 for a moment"
    trainer = stock(tiny, configuration)
    trainer.initialize()
    augmenters = trainer.get_dataloaders()
    assert isinstance(augmenters, tuple) and [type(a) for a in augmenters] == [SingleThreadedAugmenter] * 2
    assert all(type(a.data_loader) is nnUNetDataLoader and a.transform is None for a in augmenters), (
        "the labelled stream must be nnU-Net's loader itself, with its transforms inside"
    )
    loader = augmenters[0].data_loader
    assert isinstance(loader.transforms, ComposeTransforms) and loader.transforms.transforms, (
        "geometric_part picks from this list"
    )
    assert loader.patch_size_was_2d is was_2d and len(loader.patch_size) == len(loader.final_patch_size) == 3, (
        "a 2d patch has a first axis of length 1, which we cut off before we build the unlabelled loader"
    )
    assert list(loader.final_patch_size)[was_2d:] == trainer.configuration_manager.patch_size
    assert not was_2d or (loader.patch_size[0], loader.final_patch_size[0]) == (1, 1)
    assert loader.has_ignore is False and callable(loader.set_thread_id), "used in UnlabeledDataLoader, TwoStreamLoader"
    batch = next(loader)
    assert list(batch) == ["data", "target", "keys"] and isinstance(batch["target"], list), (
        "methods, TwoStreamLoader and signed distance maps read these keys"
    )


@pytest.mark.parametrize("workers", [1, 2, 12, 40])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_our_augmenters_are_built_as_nnunets(tiny, monkeypatch, workers, device):
    """Number of workers, cached batches, waiting time and pinned memory are copied from nnU-Net's get_dataloaders."""
    built = []
    signature = inspect.signature(NonDetMultiThreadedAugmenter.__init__)

    def note(*arguments, **named):
        given = signature.bind(*arguments, **named).arguments
        built.append({key: given.get(key) for key in signature.parameters if key not in ("self", "data_loader")})

    monkeypatch.setattr(NonDetMultiThreadedAugmenter, "__init__", note)
    monkeypatch.setattr(NonDetMultiThreadedAugmenter, "__next__", lambda self: None)
    monkeypatch.setattr(NonDetMultiThreadedAugmenter, "__del__", lambda self: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for trainer in (stock(tiny), tiny.trainer(OURS)):
        trainer.initialize()
        trainer.unlabeled_cases = list(tiny.labelled)  # no image is read
        trainer.device = torch.device(device)
        monkeypatch.setenv("nnUNet_n_proc_DA", str(workers))
        trainer.get_dataloaders()
    assert len(built) == 4 and built[:2] == built[2:], "copy nnU-Net's new values to where we build the augmenters"


class Numbers:
    """Endless batches, with no more of a loader than TwoStreamLoader has."""

    def set_thread_id(self, thread_id):
        pass

    def __next__(self):
        return {"data": 1.0}


def test_finish_ends_the_workers_of_an_augmenter():
    augmenter = NonDetMultiThreadedAugmenter(Numbers(), None, 1, 1, seeds=[3], wait_time=0.002)
    next(augmenter)
    (worker,) = augmenter._processes
    assert worker.is_alive()
    augmenter._finish()
    assert not worker.is_alive() and augmenter._processes == [], "_end_workers would leave processes behind"
    augmenter._finish()  # on every way out, also after on_train_end


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_worker_is_a_runtime_error():
    augmenter = NonDetMultiThreadedAugmenter(Numbers(), None, 1, 1, wait_time=0.002)
    next(augmenter)
    os.kill(augmenter._processes[0].pid, signal.SIGKILL)
    deadline = time.time() + 10
    with pytest.raises(RuntimeError, match="background workers"):
        while time.time() < deadline:
            next(augmenter)
    augmenter._finish()
    # run_training takes it for Ctrl-C, which reaches the workers first, and saves


# ---------------------------------------------------------------------------------------------------- preprocessed data


def test_a_case_without_segmentation_gets_the_nonzero_mask_and_three_files(tiny, tmp_path):
    manager = PlansManager(tiny.plans)
    files = [str(tiny.raw / "imagesUn" / f"{tiny.unlabelled[0]}_0000.nii.gz")]
    arguments = (manager, manager.get_configuration("3d_fullres"), tiny.dataset_json)
    _, mask, properties = DefaultPreprocessor(verbose=False).run_case(files, None, *arguments)
    assert mask.shape[0] == 1 and set(np.unique(mask)) <= {-1, 0}, "the mask of the unlabelled loader: 0 in, -1 out"
    assert "class_locations" not in properties, "nothing that is derived from a label"
    DefaultPreprocessor(verbose=False).run_case_save(str(tmp_path / "case"), files, None, *arguments)
    assert {f.name for f in tmp_path.iterdir()} == {f"case{suffix}" for suffix in SUFFIXES}, (
        "a preprocessed case is complete once these files are there"
    )
    case = nnUNetDatasetBlosc2(str(tmp_path)).load_case("case")
    assert len(case) == 4 and case[2] is None, "UnlabeledDataset unpacks image, mask, previous stage, properties"


def test_run_case_save_goes_through_the_methods_that_we_check_in(tiny, tmp_path):
    called = []

    class Recorder(DefaultPreprocessor):
        def run_case(self, image_files, *args, **kwargs):
            called.append("run_case")
            return super().run_case(image_files, *args, **kwargs)

        def run_case_npy(self, data, seg, properties, plans_manager, configuration_manager, dataset_json):
            called.append("run_case_npy")
            return super().run_case_npy(data, seg, properties, plans_manager, configuration_manager, dataset_json)

    manager = PlansManager(tiny.plans)
    files = [str(tiny.raw / "imagesUn" / f"{tiny.unlabelled[0]}_0000.nii.gz")]
    arguments = (manager, manager.get_configuration("3d_fullres"), tiny.dataset_json)
    Recorder(verbose=False).run_case_save(str(tmp_path / "case"), files, None, *arguments)
    assert called == ["run_case", "run_case_npy"], "damaged unlabelled images would not be found"


def test_the_folder_of_a_data_set_must_hold_cases_only(tiny, tmp_path):
    for name in ("a.b2nd", "a_seg.b2nd", "a.pkl"):
        (tmp_path / name).touch()
    assert infer_dataset_class(str(tmp_path)) is nnUNetDatasetBlosc2, "we read and write this class alone"
    assert nnUNetDatasetBlosc2.get_identifiers(str(tmp_path)) == ["a"], "a case must not be named ..._seg"
    (tmp_path / "manifest.json").touch()
    with pytest.raises(AssertionError):  # so our manifest lies beside the folder; if this passes it may lie in it
        infer_dataset_class(str(tmp_path))


def test_folders_are_read_from_the_environment_at_every_use(monkeypatch):
    monkeypatch.setenv("nnUNet_preprocessed", "/one")
    assert Path(nnUNet_preprocessed) == Path("/one")
    monkeypatch.setenv("nnUNet_preprocessed", "/two")
    assert Path(nnUNet_preprocessed) == Path("/two"), "benchmark and step times point nnU-Net at folders of their own"


# ------------------------------------------------------------------------------------------------------ folds and plans


@pytest.fixture
def planner(tiny, tmp_path, monkeypatch):
    """``planner(splits)`` is nnU-Net's planner for a raw data set that holds these splits, and where it copies to."""

    def make(splits: str):
        raw, preprocessed = tmp_path / "raw" / tiny.name, tmp_path / "preprocessed" / tiny.name
        for file in [*tiny.raw.glob("*Tr/*"), tiny.raw / "dataset.json"]:
            (raw / file.relative_to(tiny.raw)).parent.mkdir(parents=True, exist_ok=True)
            (raw / file.relative_to(tiny.raw)).symlink_to(file)
        preprocessed.mkdir(parents=True)
        (preprocessed / "dataset_fingerprint.json").write_text("{}")
        (raw / "splits_final.json").write_text(splits)
        monkeypatch.setenv("nnUNet_raw", str(raw.parent))
        monkeypatch.setenv("nnUNet_preprocessed", str(preprocessed.parent))
        return ExperimentPlanner(tiny.name), preprocessed / "splits_final.json"

    return make


def test_planner_copies_the_folds_of_the_raw_data_and_has_our_constants(planner):
    splits = '[{"train": ["lab0"], "val": ["lab1"], "unlabeled": ["unl0"]}]'
    made, copied = planner(splits)
    assert copied.read_text() == splits, "patient-wise folds of converters and hide_labels would be lost"
    assert made.UNet_featuremap_min_edge_length == plans.MIN_EDGE
    source = inspect.getsource(ExperimentPlanner)
    assert str(plans.MAX_POOLINGS) in source and "256 ** 3" in source and "2048 ** 2" in source, (
        "cpu_preset repeats the planner's first guess of a patch: MAX_POOLINGS, LARGEST_PATCH in plans.py"
    )


def test_a_fold_may_have_keys_of_ours(tiny, tmp_path):
    (tmp_path / "splits_final.json").write_text('[{"train": ["lab0"], "val": ["lab1"], "unlabeled": ["unl0"]}]')
    trainer = stock(tiny, fold=0)
    trainer.preprocessed_dataset_folder_base = str(tmp_path)
    assert trainer.do_split() == (["lab0"], ["lab1"]), "a fold's list of unlabelled cases lies beside train and val"


def test_nnunet_makes_no_folds_of_fewer_than_five_cases():
    cases = [f"case{i}" for i in range(MIN_CASES_OF_STOCK)]
    assert len(generate_crossval_split(cases)) == MIN_CASES_OF_STOCK
    with pytest.raises(ValueError):  # else ensure_splits may go
        generate_crossval_split(cases[1:])


def test_topology_is_a_tuple_of_five():
    poolings, strides, kernels, patch, divisor = get_pool_and_conv_props([1.0, 2.0, 1.0], [20, 14, 33], 4, 999999)
    assert len(strides) == len(kernels) == max(poolings) + 1, "plan_patch takes one stride and one kernel per stage"
    assert list(strides[0]) == [1, 1, 1] and np.prod(strides, axis=0).tolist() == list(divisor)
    assert all(n % d == 0 and n >= m for n, d, m in zip(patch, divisor, [20, 14, 33], strict=True)), (
        "plan_patch takes the padded patch from the fourth place"
    )


# ---------------------------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dim", [2, 3])
def test_networks_have_the_parts_that_the_taps_walk_through(dim, residual):
    spec = architecture(dim, residual)
    names = ("network_class_name", "arch_kwargs", "_kw_requires_import")
    network = get_network_from_plans(*(spec[n] for n in names), 1, 3, allow_init=True, deep_supervision=True)
    images = torch.randn(1, 1, *[16] * dim)
    encoder, decoder = network.encoder, network.decoder
    skips = encoder(images)
    channels = [4, 8, 8]
    assert isinstance(skips, list) and [s.shape[1] for s in skips] == channels, "taps.encode returns the skips"
    assert list(encoder.output_channels) == channels, "taps.bottleneck_channels"
    assert len(decoder.stages) == len(decoder.transpconvs) == len(decoder.seg_layers) == 2, "taps._decode_levels"
    assert [layer.in_channels for layer in decoder.seg_layers] == channels[1::-1], "taps.level_channels"
    assert tuple(decoder.transpconvs[-1].stride) == (2,) * dim, "taps.first_stride"
    with torch.no_grad():
        outputs = network(images)
        decoder.deep_supervision = False
        output = network(images)
    assert isinstance(outputs, list) and len(outputs) == 2 and torch.equal(outputs[0], output), (
        "decoder.deep_supervision decides between a list and a tensor, which Teacher and taps.decode rely on"
    )


# --------------------------------------------------------------------------------------------- the course of a training


def test_order_of_a_training(tiny):
    events = []
    hooks = (
        *("on_train_start", "on_epoch_start", "on_train_epoch_start", "train_step", "on_train_epoch_end"),
        *("on_validation_epoch_start", "validation_step", "on_validation_epoch_end", "on_epoch_end", "on_train_end"),
    )

    def noting(name):
        def hook(self, *arguments):
            events.append((name, torch.is_grad_enabled()))
            if name == "on_train_start":
                self.dataloader_train = self.dataloader_val = iter(range(9))

        return hook

    trainer = stock(tiny, trainer_class=type("Recorder", (nnUNetTrainer,), {name: noting(name) for name in hooks}))
    trainer.num_epochs = trainer.num_iterations_per_epoch = trainer.num_val_iterations_per_epoch = 1
    trainer.run_training()
    assert [name for name, _ in events] == list(hooks), (
        "the base trainer prepares the unlabelled stream in on_train_start, validates between its two hooks with the "
        "inference weights, and closes the epoch's row of the log in on_epoch_end"
    )
    assert [enabled for _, enabled in events] == ["validation" not in name for name in hooks]


@pytest.fixture
def after_an_epoch(tiny):
    """A trainer at the end of its first epoch of three; ``saved`` are the names of the checkpoints it has written."""
    trainer = stock(tiny)
    trainer.initialize()
    trainer.num_epochs = 3
    trainer.saved = []
    trainer.save_checkpoint = lambda file: trainer.saved.append(os.path.basename(file))
    trainer.logger.plot_progress_png = lambda folder: None

    def end_epoch(dice: float) -> list[str]:
        values = {"train_losses": 0.0, "val_losses": 0.0, "lrs": 0.01, "epoch_start_timestamps": 0.0}
        values |= {"mean_fg_dice": dice, "dice_per_class_or_region": [dice]}
        for key, value in values.items():
            trainer.logger.log(key, value, trainer.current_epoch)
        trainer.saved.clear()
        trainer.on_epoch_end()
        return trainer.saved

    trainer.end_epoch = end_epoch
    return trainer


def test_save_every_is_asked_at_each_epochs_end(after_an_epoch):
    trainer = after_an_epoch
    trainer.save_every = 1
    assert "checkpoint_latest.pth" in trainer.end_epoch(0.5), "save_every_minutes would save nothing"
    assert trainer.current_epoch == 1, "progress counts epochs that are over"
    trainer.save_every = sys.maxsize
    assert "checkpoint_latest.pth" not in trainer.end_epoch(0.5), "it would save at every epoch"
    trainer.save_every = 1
    assert "checkpoint_latest.pth" not in trainer.end_epoch(0.5), "after the last epoch comes checkpoint_final"


def test_best_ema_decides_on_the_best_checkpoint(after_an_epoch):
    trainer = after_an_epoch
    trainer._best_ema = float("inf")
    assert trainer.end_epoch(0.5) == [] and trainer._best_ema == float("inf"), "ACTION's first stage has no best one"
    trainer._best_ema = None
    assert trainer.end_epoch(0.1) == ["checkpoint_best.pth"], "after it the first is the best so far"
    assert trainer._best_ema == trainer.logger.get_value("ema_fg_dice", -1) == pytest.approx(0.5 * 0.9 + 0.1 * 0.1)


def test_lists_of_the_local_logger_are_the_live_ones(tiny):
    logger = stock(tiny).logger
    for epoch in range(3):
        logger.log("mean_fg_dice", 0.1 * epoch, epoch)
    values = logger.local_logger.get_checkpoint()
    assert len(values["ema_fg_dice"]) == 3, "mean_fg_dice enters the moving average by itself"
    for series in values.values():
        del series[2:]
    assert logger.get_value("mean_fg_dice", None) == [0.0, 0.1], "a resumed run drops what is logged of its epoch"
    logger.get_value("ema_fg_dice", None)[1] = 0.7
    assert logger.get_value("ema_fg_dice", 1) == 0.7, "the average is to start anew after a stage without labels"
    with pytest.raises(AssertionError):  # if this passes, semisup_log.csv may become part of nnU-Net's log
        logger.log("loss_consistency", 0.0, 0)
    assert logger.loggers == [], "the log goes to each of these, W&B where it is on, by log(key, value, step)"


@pytest.mark.parametrize(("labels", "classes"), [("2 classes", 1), ("4 classes", 3), ("regions", 2), ("ignore", 1)])
def test_online_dice_is_logged_per_class_without_background(datasets, use, labels, classes):
    trainer = stock(use(datasets(labels)))
    trainer.initialize()
    trainer.network.eval()
    with torch.no_grad():
        outputs = [trainer.validation_step(random_batch(trainer, seed)) for seed in range(2)]
    trainer.on_validation_epoch_end(outputs)
    dice = trainer.logger.get_value("dice_per_class_or_region", -1)
    assert isinstance(dice, list) and len(dice) == classes and all(0 <= d <= 1 for d in dice), (
        "whether the network knows every class is decided by this list"
    )
    assert trainer.logger.get_value("mean_fg_dice", -1) == pytest.approx(np.mean(dice))
    counts = {key: sum(o[key] for o in outputs) for key in ("tp_hard", "fp_hard", "fn_hard")}
    expected = 2 * counts["tp_hard"] / (2 * counts["tp_hard"] + counts["fp_hard"] + counts["fn_hard"])
    assert dice == pytest.approx(expected.tolist()), "pooled over all validation patches of the epoch"


def test_online_dice_lists_classes_by_value_and_regions_as_dataset_json(tiny):
    """labels.class_names names the entries of that list."""

    def manager(labels, **more):
        return PlansManager(tiny.plans).get_label_manager({**tiny.dataset_json, "labels": labels, **more})

    assert manager({"background": 0, "b": 2, "ignore": 3, "a": 1}).foreground_labels == [1, 2]
    labels = {"background": 0, "core": [2], "whole": [1, 2], "ignore": 3}
    regions = manager(labels, regions_class_order=[1, 2]).foreground_regions
    assert [np.atleast_1d(region).tolist() for region in regions] == [[2], [1, 2]]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_online_dice_of_a_class_that_is_nowhere_is_nan(tiny):
    trainer = stock(tiny)
    counts = {"tp_hard": [4.0, 0.0], "fp_hard": [2.0, 0.0], "fn_hard": [2.0, 0.0]}
    trainer.on_validation_epoch_end([{"loss": np.float32(1), **{k: np.array(v) for k, v in counts.items()}}])
    first, absent = trainer.logger.get_value("dice_per_class_or_region", -1)
    assert first == pytest.approx(2 / 3) and np.isnan(absent), "a class that no patch showed says nothing, not 0"
    assert trainer.logger.get_value("mean_fg_dice", -1) == pytest.approx(2 / 3)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def test_save_checkpoint_takes_a_file_object_and_counts_an_epoch_on(tiny):
    trainer = stock(tiny)
    trainer.initialize()
    trainer.current_epoch = 4
    buffer = io.BytesIO()
    trainer.save_checkpoint(buffer)
    buffer.seek(0)
    checkpoint = torch.load(buffer, weights_only=False)
    assert checkpoint["trainer_name"] == "nnUNetTrainer" and checkpoint["network_weights"].keys() == (
        trainer.network.state_dict().keys()
    ), "we let nnU-Net write into memory, then exchange network_weights and add our key"
    assert checkpoint["current_epoch"] == 5, "to repeat an interrupted epoch we save with the epoch before it"


def test_checkpoint_with_a_key_of_ours_is_loaded(tiny, tmp_path):
    trainer = stock(tiny)
    trainer.initialize()
    trainer.save_checkpoint(str(tmp_path / "a.pth"))
    torch.save(torch.load(tmp_path / "a.pth", weights_only=False) | {"semisup": {"version": 1}}, tmp_path / "b.pth")
    other = stock(tiny)
    other.load_checkpoint(str(tmp_path / "b.pth"))
    assert other.current_epoch == 1 and all(
        torch.equal(value, other.network.state_dict()[key]) for key, value in trainer.network.state_dict().items()
    ), "everything of ours lies under one key more"


def test_resume_prefers_the_final_checkpoint_and_passes_its_name_alone(tmp_path):
    loaded = []
    trainer = SimpleNamespace(output_folder=str(tmp_path), load_checkpoint=lambda file, /: loaded.append(file))
    for kind in ("best", "latest", "final"):
        (tmp_path / f"checkpoint_{kind}.pth").touch()
        maybe_load_checkpoint(trainer, continue_training=True, validation_only=False)
    assert [os.path.basename(file) for file in loaded] == [
        f"checkpoint_{k}.pth" for k in ("best", "latest", "final")
    ], "set_aside renames all of an earlier run's checkpoints, since --c would finish that one"
    assert all(type(file) is str for file in loaded), "load_checkpoint of the base trainer reads a file"
