"""The environment of all tests, and fixtures around the tiny data sets of ``helpers.py``."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("nnUNet_def_n_proc", "1")
os.environ["nnUNet_n_proc_DA"] = "0"  # tests that want workers set it themselves

import numpy as np
import pytest
import torch
from helpers import LABELS, TinyDataset, make_dataset
from hypothesis import settings
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunetv2_semisup.files import read_json

settings.register_profile("machines differ", deadline=None)
settings.load_profile("machines differ")


@pytest.fixture(scope="session")
def datasets(tmp_path_factory):
    """``datasets("4 classes")`` is a session-wide data set with these labels; treat it as read-only."""
    made: dict[str, TinyDataset] = {}

    def get(kind: str) -> TinyDataset:
        if kind not in made:
            made[kind] = make_dataset(tmp_path_factory.mktemp("data"), LABELS[kind])
        return made[kind]

    return get


@pytest.fixture
def use(monkeypatch, tmp_path):
    """Point nnU-Net's variables at a data set, with a results folder of the test's own."""

    def point(dataset: TinyDataset) -> TinyDataset:
        for key, value in dataset.variables(tmp_path / "results").items():
            monkeypatch.setenv(key, value)
        return dataset

    return point


@pytest.fixture
def nnunet_raw(tmp_path, monkeypatch) -> Path:
    """nnU-Net's three folders, empty; returns nnUNet_raw."""
    for key in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / key).mkdir(exist_ok=True)
        monkeypatch.setenv(key, str(tmp_path / key))
    return tmp_path / "nnUNet_raw"


@pytest.fixture
def tiny(datasets, use):
    """The two-class data set, ready to train on."""
    return use(datasets("2 classes"))


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


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """Shells start background jobs with SIGINT ignored, and then Ctrl-C could not be tested."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def signal_handlers_stay():
    """A trainer that began and was not ended listens to SIGTERM; a forked pool of a later test could not be ended."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)
