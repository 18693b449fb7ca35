"""Tiny data with test cases."""

from __future__ import annotations

import shutil

import pytest
from helpers import LABELS, make_dataset


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
