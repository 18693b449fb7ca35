"""What the tests of all converters need."""

from __future__ import annotations

import json
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.experiment_planning import verify_dataset_integrity
from nnunetv2.utilities import utils

from nnunetv2_semisup.errors import InputError

REAL_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def write_list(file: Path, names) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("# a source\n" + "".join(f"{name}\n" for name in names), encoding="utf-8")
    return file


def names(folder: Path) -> set[str]:
    """Names of the files in ``folder`` without endings and channel."""
    return {path.name.split(".")[0].removesuffix("_0000") for path in folder.iterdir()}


def read(path: Path) -> tuple[np.ndarray, sitk.Image]:
    """The array in axis order (x, y, z), and the image."""
    image = sitk.ReadImage(str(path))
    return sitk.GetArrayFromImage(image).T, image


def refuse(raw: Path, match: str, function, *arguments, **options) -> None:
    """``function`` must raise an InputError of one line, and no dataset may have appeared."""
    with pytest.raises(InputError, match=match) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    assert not list(raw.glob("Dataset*"))


def verify(dataset: Path) -> dict:
    """nnU-Net's own integrity check, in this process; returns dataset.json."""
    context = SimpleNamespace(Pool=ThreadPool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "Pool", ThreadPool)  # processes forked beside threads may hang
        patch.setattr(verify_dataset_integrity, "multiprocessing", SimpleNamespace(get_context=lambda method: context))
        verify_dataset_integrity.verify_dataset_integrity(str(dataset), 1)
    return json.loads((dataset / "dataset.json").read_text())
