"""One tiny dataset in nnU-Net's layout, planned and preprocessed by nnU-Net itself within this process."""

import json
import multiprocessing
import shutil
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import TinyDataset, write_image
from nnunetv2.utilities import utils as nnunet_utils

NAME = "Dataset508_Tiny"
LABELLED = ("lab_0", "lab_1", "lab_2")
UNLABELLED = ("un_0", "un_1", "un_2")
SHAPES = [(24, 20, 16), (22, 20, 14), (26, 18, 16)]  # x, y, z
SPACINGS = [(1.0, 1.0, 1.5), (1.0, 1.2, 1.5), (1.2, 1.2, 1.6)]  # mm; their median is the plans' spacing (1, 1.2, 1.5)


def _make_case(generator: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An ellipsoid in a zero surrounding with a brighter ball in it: MR, CT and label, each (Z, Y, X)."""
    axes = [np.linspace(-1.3, 1.3, length) for length in shape[::-1]]
    radius = np.sqrt(sum(axis**2 for axis in np.meshgrid(*axes, indexing="ij")))
    body, ball = radius < 1, radius < 0.5
    mr = np.where(body, 100 + 80 * ball + generator.normal(0, 10, body.shape), 0)
    ct = np.where(body, 40 + 120 * ball + generator.normal(0, 15, body.shape), 0)
    return mr.astype(np.float32), ct.astype(np.float32), ball.astype(np.uint8)


def _write_raw(dataset: TinyDataset) -> None:
    generator = np.random.default_rng(0)
    for folder, cases in (("imagesTr", LABELLED), ("imagesUn", UNLABELLED)):
        for case, shape, spacing in zip(cases, SHAPES, SPACINGS, strict=True):
            mr, ct, label = _make_case(generator, shape)
            for channel, image in enumerate((mr, ct)):
                write_image(dataset.raw / folder / f"{case}_{channel:04d}.nii.gz", image, spacing)
            if folder == "imagesTr":
                write_image(dataset.raw / "labelsTr" / f"{case}.nii.gz", label, spacing)
    content = {
        "channel_names": {"0": "MR", "1": "CT"},
        "labels": {"background": 0, "ball": 1},
        "numTraining": len(LABELLED),
        "file_ending": ".nii.gz",
    }
    (dataset.raw / "dataset.json").write_text(json.dumps(content))


def _plan_and_preprocess(dataset: TinyDataset) -> None:
    """nnU-Net's own fingerprint, planner and preprocessor, with threads where it starts processes."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "get_context", lambda method: SimpleNamespace(Pool=ThreadPool))
        patch.setattr(nnunet_utils, "Pool", ThreadPool)
        patch.setenv("nnUNet_n_proc_DA", "1")  # planning needs at least one
        extractor = DatasetFingerprintExtractor(dataset.name, 1)
        extractor.num_foreground_voxels_for_intensitystats = 3000  # nnU-Net's 10^8 take seconds
        extractor.run()
        ExperimentPlanner(dataset.name).plan_experiment()
        for configuration in ("3d_fullres", "2d"):
            DefaultPreprocessor(verbose=False).run(dataset.name, configuration, "nnUNetPlans", 1)


@pytest.fixture(scope="session")
def planned_dataset(tmp_path_factory) -> TinyDataset:
    """The dataset with its labelled cases preprocessed; tests must not change it."""
    dataset = TinyDataset(tmp_path_factory.mktemp("planned"), NAME, LABELLED, UNLABELLED)
    _write_raw(dataset)
    with pytest.MonkeyPatch.context() as patch:
        for key, value in dataset.variables(dataset.root / "results").items():
            patch.setenv(key, value)
        _plan_and_preprocess(dataset)
    return dataset


@pytest.fixture
def dataset(planned_dataset, tmp_path, use) -> TinyDataset:
    """A copy of the dataset that a test may change; nnU-Net's variables point to it."""
    copy = replace(planned_dataset, root=tmp_path / "nnunet")
    shutil.copytree(planned_dataset.root, copy.root)
    return use(copy)
