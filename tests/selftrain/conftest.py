"""Real nnU-Net trainings of one step, in this process, on tiny data with test cases."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import LABELS, make_dataset
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunetv2_semisup.files import read_json


@pytest.fixture
def data(tmp_path, monkeypatch):
    """``data("regions", root)``: a data set of one's own with test cases, to which nnU-Net's variables point."""

    def make(labels: str = "2 classes", folder: str = "data", unlabelled: int = 3):
        dataset = make_dataset(tmp_path / folder, LABELS[labels], unlabelled=unlabelled)
        for name in ("images", "labels"):
            shutil.copytree(dataset.raw / f"{name}Tr", dataset.raw / f"{name}Ts")
        for key, value in dataset.variables(dataset.root / "results").items():
            monkeypatch.setenv(key, value)
        (dataset.root / "results").mkdir()
        return dataset

    return make


@pytest.fixture
def short_steps(monkeypatch):
    """Trainings of one seeded step without nnU-Net's validation afterwards; preprocessing in this process."""
    train = nnUNetTrainer.run_training

    def one_step(self):
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(int(self.fold != "all"))
        self.num_iterations_per_epoch = self.num_val_iterations_per_epoch = self.num_epochs = 1
        train(self)

    def in_this_process(self, dataset_name, configuration, plans_name, num_processes):
        from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
        from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

        name = maybe_convert_to_dataset_name(dataset_name)
        folder = f"{nnUNet_preprocessed}/{name}"
        manager = PlansManager(f"{folder}/{plans_name}.json")
        configuration = manager.get_configuration(configuration)
        output = f"{folder}/{configuration.data_identifier}"
        dataset_json = read_json(Path(folder, "dataset.json"), "")
        Path(output).mkdir(exist_ok=True)
        for case, files in get_filenames_of_train_images_and_targets(f"{nnUNet_raw}/{name}", dataset_json).items():
            self.run_case_save(
                f"{output}/{case}", files["images"], files["label"], manager, configuration, dataset_json
            )

    monkeypatch.setattr(nnUNetTrainer, "run_training", one_step)
    monkeypatch.setattr(MetaLogger, "plot_progress_png", lambda *args: None)
    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", lambda self, npz: None)
    monkeypatch.setattr(nnUNetTrainer, "plot_network_architecture", lambda self: None)
    monkeypatch.setattr(DefaultPreprocessor, "run", in_this_process)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of images this small, more threads only wait for each other
    yield
    torch.set_num_threads(threads)
