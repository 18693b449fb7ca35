"""Predictions of the unlabelled cases by nnU-Net's predictor, each file whole or not there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from tqdm import tqdm

from nnunetv2_semisup.selftrain.agreement import unsure


def predict_cases(
    model: Path, folds: tuple[str, ...], cases: dict[str, list[str]], output: Path, device: str, threshold: float | None
) -> None:
    """Write ``CASE<ending>`` into ``output`` for the cases that are not there yet.

    Args:
        model: nnU-Net's model folder.
        folds: whose networks are averaged, as nnU-Net does.
        cases: case -> image files in channel order.
        output: made if needed.
        device: cuda, cpu or mps.
        threshold: write ``CASE.unsure.npz`` too, the voxels of less confidence; None: do not.
    """
    output.mkdir(parents=True, exist_ok=True)
    predictor = nnUNetPredictor(device=torch.device(device), perform_everything_on_device=device == "cuda")
    predictor.initialize_from_trained_model_folder(str(model), folds, "checkpoint_final.pth")
    ending = predictor.dataset_json["file_ending"]
    todo = [case for case in cases if not (output / f"{case}{ending}").is_file()]
    temporary = output / ".unfinished"
    for case in tqdm(todo, desc=f"Predicting, fold {' '.join(folds)}", unit="case", disable=None):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        probabilities = threshold is not None
        predictor.predict_from_files_sequential([cases[case]], [str(temporary / case)], probabilities)
        if threshold is not None:
            with np.load(temporary / f"{case}.npz") as saved:
                mask = unsure(saved["probabilities"], threshold, predictor.label_manager.has_regions)
            np.savez_compressed(temporary / "mask.npz", unsure=mask)
            os.replace(temporary / "mask.npz", unsure_file(output, case))
        os.replace(temporary / f"{case}{ending}", output / f"{case}{ending}")  # last: it says that the case is done
    shutil.rmtree(temporary, ignore_errors=True)


def unsure_file(folder: Path, case: str) -> Path:
    """Where :func:`predict_cases` writes the voxels of less confidence."""
    return folder / f"{case}.unsure.npz"
