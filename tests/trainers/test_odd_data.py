"""Data that is small, empty or oddly named and yet sound: whole trainings on it."""

import csv
import math
import os
from pathlib import Path

import numpy as np
import pytest
from helpers import LABELS, SHAPE, make_dataset, write_image
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

SHORT = {"num_epochs": 1, "num_iterations_per_epoch": 3, "num_val_iterations_per_epoch": 1}


def relabel(dataset, case, image, label) -> None:
    """Write a labelled case anew and let nnU-Net preprocess it."""
    file = dataset.raw / "imagesTr" / f"{case}_0000.nii.gz"
    write_image(file, image)
    write_image(dataset.raw / "labelsTr" / f"{case}.nii.gz", label)
    write_image(dataset.preprocessed / "gt_segmentations" / f"{case}.nii.gz", label)
    manager = PlansManager(dataset.plans)
    for configuration in ("2d", "3d_fullres"):
        target = dataset.preprocessed / f"nnUNetPlans_{configuration}" / case
        for old in target.parent.glob(f"{case}[._]*"):
            old.unlink()
        label_file = str(dataset.raw / "labelsTr" / f"{case}.nii.gz")
        preprocessor = DefaultPreprocessor(verbose=False)
        found = manager.get_configuration(configuration)
        preprocessor.run_case_save(str(target), [str(file)], label_file, manager, found, dataset.dataset_json)


def noise(shape) -> np.ndarray:
    return np.random.default_rng(1).normal(0, 1, shape).astype(np.float32)


def without_foreground(dataset):
    relabel(dataset, "lab0", noise(SHAPE), np.zeros(SHAPE, np.uint8))


def smaller_than_the_patch(dataset):
    label = np.zeros((5, 6, 7), np.uint8)
    label[2] = 1
    relabel(dataset, "lab0", noise(label.shape), label)


def one_voxel(dataset):
    write_image(dataset.raw / "imagesUn" / "unl0_0000.nii.gz", np.full((1, 1, 1), 3, np.float32))


def named(name):
    def rename(dataset):
        os.rename(dataset.raw / "imagesUn" / "unl0_0000.nii.gz", dataset.raw / "imagesUn" / f"{name}_0000.nii.gz")

    return rename


def linked(dataset):
    for file in (dataset.raw / "imagesUn").iterdir():
        file.rename(dataset.root / file.name)
        file.symlink_to(dataset.root / file.name)


@pytest.mark.robustness
@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize(
    "change",
    [
        without_foreground,
        smaller_than_the_patch,
        one_voxel,
        linked,
        named("Ünal, M. 7"),
        named("it's"),
        named("李明"),
        named("a.b-c_0001"),
    ],
)
def test_odd_but_sound_data_trains(tmp_path, use, change, configuration):
    """Input: a labelled case without foreground or smaller than the patch, an unlabelled image of one voxel,
    linked files, names in other scripts or with quotes. Answer: training runs, with finite losses.
    """
    dataset = use(make_dataset(tmp_path, LABELS["2 classes"]))
    change(dataset)
    trainer = dataset.trainer("nnUNetTrainerMeanTeacher", configuration, **SHORT)
    trainer.run_training()
    assert len(trainer.unlabeled_cases) == 3
    assert Path(trainer.output_folder, "checkpoint_final.pth").is_file()
    with open(Path(trainer.output_folder, "semisup_log.csv"), encoding="utf-8") as file:
        [row] = csv.DictReader(file)
    assert all(math.isfinite(float(value)) for key, value in row.items() if key.startswith("loss_"))
