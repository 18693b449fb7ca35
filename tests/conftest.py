"""The environment of all tests, and fixtures around the tiny data sets of ``helpers.py``."""

from __future__ import annotations

import os
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
