"""Records of runs that never ran, with numbers that are easy to check."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from helpers import LABELS, make_dataset

from nnunetv2_semisup.benchmark import records
from nnunetv2_semisup.benchmark.grid import Run
from nnunetv2_semisup.evaluation.metrics import METRICS

CASES = [f"case{i:02d}" for i in range(12)]


def make_run(**changes) -> Run:
    values = {"dataset": "Dataset904_Tiny", "seed": 0, "trainer": "nnUNetTrainer", "epochs": 5, "fold": "all"}
    values |= {"configuration": "3d_fullres", "plans": "cpu", "inference": ("nnunet",)}
    return Run(**{**values, **changes})


def make_cases(dice) -> list[dict]:
    """Rows as the evaluation gives them, with and without the largest component; a Dice of 0 is a failure."""
    rows = []
    for case, value in zip(CASES, dice, strict=False):
        values = dict.fromkeys(METRICS, None if value == 0 else 10 * (1 - value))
        values |= {"dice": value, "jaccard": value / (2 - value)}
        for postprocessing in ("none", "largest_component"):
            voxels = {"voxels_prediction": 0 if value == 0 else 90, "voxels_reference": 100}
            rows.append({"case": case, "label": "organ", "postprocessing": postprocessing, **values, **voxels})
    return rows


def make_record(run: Run, dice, *, labeled: int = 4, seconds_per_step: float = 0.2, **changes) -> dict:
    part = {"predict_seconds": 20.0, "evaluate_seconds": 5.0, "cases": make_cases(dice)}
    record = {
        "format": records.FORMAT,
        "run": run.id,
        **{key: value for key, value in vars(run).items() if key != "inference"},
        "labeled": labeled,
        "started": "2026-01-02T03:04:05+00:00",
        "device": "cpu",
        "hardware": "A processor, 2 cores",
        "commit": "0123456789",
        "versions": {"python": "3.11.7", "torch": "2.15.0"},
        "steps": 250 * run.epochs,
        "seconds_per_step": seconds_per_step,
        "train_seconds": 300.0,
        "peak_memory_mb": 1000,
        "threads": 1,
        "loader_processes": 0,
        "evaluations": dict.fromkeys(run.inference, part),
    }
    return {**record, **changes}


@pytest.fixture
def work(tmp_path):
    """An empty work folder."""
    return records.WorkFolder(tmp_path / "work")


@pytest.fixture
def filled(work):
    """Three trainers; 4 labelled cases with three seeds, 8 with one, 80 with one of the baseline."""
    rng = np.random.default_rng(0)
    gain = {"nnUNetTrainer": 0.0, "nnUNetTrainerMeanTeacher": 0.01, "nnUNetTrainerCrossMatch": 0.06}
    quality = {4: 0.74, 8: 0.80, 80: 0.88}
    for labeled, seeds in ((4, (0, 1, 2)), (8, (0,)), (80, (0,))):
        cases = rng.normal(0, 0.05, len(CASES))
        for trainer, more in gain.items():
            for seed in seeds:
                if labeled == 80 and more:
                    continue
                dice = np.clip(quality[labeled] + more + cases + rng.normal(0, 0.02, len(CASES)), 0, 0.99)
                inference = ("nnunet", "literature")
                run = make_run(dataset=f"Dataset9{labeled:02d}_Tiny", trainer=trainer, seed=seed, inference=inference)
                records.write(work.record(run), make_record(run, dice.tolist(), labeled=labeled))
    return work


@pytest.fixture
def benchmark_data(tmp_path):
    """A real data set with test cases, whose semi-supervised trainings take 4 steps an epoch."""
    dataset = make_dataset(tmp_path / "data", LABELS["2 classes"])
    for folder in ("images", "labels"):
        shutil.copytree(dataset.raw / f"{folder}Tr", dataset.raw / f"{folder}Ts")
    settings = {"num_iterations_per_epoch": 4, "num_val_iterations_per_epoch": 1}
    plans = dataset.plans | {"semisup": {"nnUNetTrainerMeanTeacher": settings}}
    (dataset.preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans))
    return dataset
