"""What tests share: tiny real nnU-Net data sets, preprocessed by nnU-Net itself, trainers on them, and batches."""

from __future__ import annotations

import contextlib
import copy
import json
import resource
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_semisup import trainers

SHAPE = (20, 18, 22)  # z, y, x: different in all axes, so that a swap shows


def architecture(dim: int, residual: bool = False) -> dict:
    """A three-stage network of a few thousand parameters."""
    blocks = {"n_blocks_per_stage": [1, 1, 1]} if residual else {"n_conv_per_stage": [1, 1, 1]}
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet."
        + ("ResidualEncoderUNet" if residual else "PlainConvUNet"),
        "arch_kwargs": {
            "n_stages": 3,
            "features_per_stage": [4, 8, 8],
            "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
            "kernel_sizes": [[3] * dim] * 3,
            "strides": [[1] * dim, [2] * dim, [2] * dim],
            **blocks,
            "n_conv_per_stage_decoder": [1, 1],
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def make_configuration(dim: int, residual: bool = False) -> dict:
    resample = {"order_z": 0, "force_separate_z": None}
    return {
        "data_identifier": f"nnUNetPlans_{'2d' if dim == 2 else '3d_fullres'}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [16] * dim,
        "median_image_size_in_voxels": list(SHAPE[-dim:]),
        "spacing": [1.0] * dim,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, **resample},
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, **resample},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, **resample},
        "architecture": architecture(dim, residual),
        "batch_dice": dim == 2,
    }


def make_plans(dataset_name: str) -> dict:
    configurations = {"2d": make_configuration(2), "3d_fullres": make_configuration(3)}
    configurations["3d_resenc"] = make_configuration(3, residual=True)
    configurations["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "2d"}
    statistics = {"max": 3.0, "mean": 0.0, "median": 0.0, "min": -3.0, "percentile_00_5": -2.0, "percentile_99_5": 2.0}
    return {
        "dataset_name": dataset_name,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": list(SHAPE),
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": configurations,
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {**statistics, "std": 1.0}},
    }


LABELS = {
    "2 classes": {"background": 0, "organ": 1},
    "4 classes": {"background": 0, "a": 1, "b": 2, "c": 3},
    "regions": {"background": 0, "whole": [1, 2], "core": 2},
    "ignore": {"background": 0, "organ": 1, "ignore": 2},
    "regions and ignore": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3},
}


@dataclass(frozen=True)
class TinyDataset:
    """A raw and preprocessed data set below ``root``; ``labelled`` and ``unlabelled`` are case ids."""

    root: Path
    name: str
    labelled: tuple[str, ...]
    unlabelled: tuple[str, ...]

    @property
    def raw(self) -> Path:
        return self.root / "raw" / self.name

    @property
    def preprocessed(self) -> Path:
        return self.root / "preprocessed" / self.name

    @property
    def folder(self) -> Path:
        """Of the preprocessed unlabelled cases, 3d_fullres."""
        return self.preprocessed / "nnUNetPlans_3d_fullres_unlabeled"

    @property
    def manifest(self) -> Path:
        return self.preprocessed / "nnUNetPlans_3d_fullres_unlabeled.json"

    @property
    def plans_file(self) -> Path:
        return self.preprocessed / "nnUNetPlans.json"

    @property
    def plans(self) -> dict:
        return json.loads(self.plans_file.read_text())

    def edit_plans(self, change) -> None:
        plans = self.plans
        change(plans)
        self.plans_file.write_text(json.dumps(plans))

    @property
    def dataset_json(self) -> dict:
        return json.loads((self.preprocessed / "dataset.json").read_text())

    def images(self, case: str) -> list[str]:
        """The files of an unlabelled case, one per channel."""
        channels = range(len(self.dataset_json["channel_names"]))
        return [str(self.raw / "imagesUn" / f"{case}_{channel:04d}.nii.gz") for channel in channels]

    def variables(self, results: Path) -> dict[str, str]:
        folders = {"nnUNet_raw": self.root / "raw", "nnUNet_preprocessed": self.root / "preprocessed"}
        return {key: str(value) for key, value in {**folders, "nnUNet_results": results}.items()}

    def trainer(
        self, name: str, configuration: str = "3d_fullres", *, fold="all", resume=False, plans=None, **settings
    ):
        """A trainer on the CPU; keyword arguments are settings of its method.

        Its terms are on from the first step: the burn-in has tests of its own, which set ``start_dice``. It draws no
        patches: they take longer than a tiny training, and have tests of their own too, which set ``pictures``.
        """
        trainer_class = getattr(trainers, name)
        plans = copy.deepcopy(plans or self.plans)
        if settings or "semisup" not in plans:
            at_once = {"start_dice": 0.0, "ramp_share": 0.0, "pictures": 0}
            plans["semisup"] = {trainer_class.base_name(): {**at_once, **settings}}
        plans["continue_training"] = resume
        return trainer_class(plans, configuration, fold, self.dataset_json, torch.device("cpu"))


def write_image(file: Path, array: np.ndarray, spacing=(1.0, 1.0, 1.0)) -> None:
    """Write (Z, Y, X) with a spacing (x, y, z) in mm."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(file))


def make_dataset(root: Path, labels: dict, labelled: int = 3, unlabelled: int = 3, name: str = "Dataset901_Tiny"):
    """Balls of different brightness, one per label value; labelled cases preprocessed by nnU-Net for every data id."""
    rng = np.random.default_rng(0)
    values = sorted({v for entry in labels.values() for v in np.atleast_1d(entry)} - {0})
    dataset_json = {
        "channel_names": {"0": "MRI"},
        "labels": labels,
        "numTraining": labelled,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "SimpleITKIO",
    }
    if any(isinstance(v, list) for v in labels.values()):
        dataset_json["regions_class_order"] = [1, 2]
    dataset = TinyDataset(
        root, name, tuple(f"lab{i}" for i in range(labelled)), tuple(f"unl{i}" for i in range(unlabelled))
    )
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"))
    for case in (*dataset.labelled, *dataset.unlabelled):
        image = rng.normal(0, 0.3, SHAPE).astype(np.float32)
        segmentation = np.zeros(SHAPE, np.uint8)
        for value in values:
            centre = rng.uniform(4, 14, 3).reshape(3, 1, 1, 1)
            ball = ((grid - centre) ** 2).sum(0) < 25
            segmentation[ball] = value
            image[ball] += value
        folder = "imagesTr" if case in dataset.labelled else "imagesUn"
        write_image(dataset.raw / folder / f"{case}_0000.nii.gz", image)
        if case in dataset.labelled:
            write_image(dataset.raw / "labelsTr" / f"{case}.nii.gz", segmentation)
            write_image(dataset.preprocessed / "gt_segmentations" / f"{case}.nii.gz", segmentation)
    for folder in (dataset.raw, dataset.preprocessed):
        (folder / "dataset.json").write_text(json.dumps(dataset_json))
    (dataset.preprocessed / "dataset_fingerprint.json").write_text("{}")
    plans = make_plans(name)
    (dataset.preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans))
    manager = PlansManager(plans)
    for configuration in ("2d", "3d_fullres"):
        folder = dataset.preprocessed / f"nnUNetPlans_{configuration}"
        folder.mkdir()
        for case in dataset.labelled:
            DefaultPreprocessor(verbose=False).run_case_save(
                str(folder / case),
                [str(dataset.raw / "imagesTr" / f"{case}_0000.nii.gz")],
                str(dataset.raw / "labelsTr" / f"{case}.nii.gz"),
                manager,
                manager.get_configuration(configuration),
                dataset_json,
            )
    return dataset


def make_batch(trainer, seed: int = 0) -> dict:
    """A random batch as the loader gives it, with a valid target for the trainer's labels."""
    generator = torch.Generator().manual_seed(seed)
    size = (trainer.batch_size, trainer.num_input_channels, *trainer.configuration_manager.patch_size)
    scales = trainer._get_deep_supervision_scales()
    targets = []
    for scale in scales:
        shape = (size[0], 1, *(round(n * s) for n, s in zip(size[2:], scale, strict=True)))
        if trainer.label_manager.has_regions:
            heads = trainer.label_manager.num_segmentation_heads + trainer.label_manager.has_ignore_label
            targets.append(torch.rand((shape[0], heads, *shape[2:]), generator=generator) > 0.7)
        else:
            values = len(trainer.label_manager.all_labels) + trainer.label_manager.has_ignore_label
            targets.append(torch.randint(0, values, shape, generator=generator).to(torch.int16))
    keys = [f"case{i}" for i in range(size[0])]
    drawn = (trainer._unlabeled_batch_size(), *size[1:])
    labelled = {"data": torch.randn(size, generator=generator), "target": targets, "keys": keys}
    transform = trainer.method.labelled_transform()
    unlabelled = {"data": torch.randn(drawn, generator=generator), "keys": [f"ucase{i}" for i in range(drawn[0])]}
    if trainer.method.wants_partners:
        unlabelled["partners"] = torch.randn(drawn, generator=generator)
    return {**labelled, **({} if transform is None else transform(labelled)), "unlabelled": unlabelled}


@contextlib.contextmanager
def full_disk(room: int):
    """No file of this process can grow above ``room`` bytes: writing fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def run_rank(rank: int, world: int, folder: str, task, *args) -> None:
    """``task(rank, folder, *args)`` in a gloo process group."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        task(rank, Path(folder), *args)
    finally:
        dist.destroy_process_group()


def spawn(tmp_path, task, *args) -> None:
    """Run ``task`` in two processes of one group."""
    mp.spawn(run_rank, args=(2, str(tmp_path), task, *args), nprocs=2)


def counted_cost(dataset: TinyDataset, name: str, configuration: str = "3d_fullres", **settings) -> float:
    """Floating-point operations of a step of a trainer of ours over those of a stock step."""
    ours = dataset.trainer(name, configuration, **settings)
    plans = dataset.plans | {"continue_training": False}
    stock = nnUNetTrainer(plans, configuration, "all", dataset.dataset_json, torch.device("cpu"))
    ours.initialize()
    stock.initialize()
    counts = []
    for trainer in (ours, stock):
        with FlopCounterMode(display=False) as counter:
            trainer.train_step(make_batch(ours))
        counts.append(counter.get_total_flops())
    return counts[0] / counts[1]
