"""Predict a folder as nnU-Net does, or as the semi-supervised literature does.

===============  ===============================  ==========================================
..               ``nnunet``                       ``literature``
===============  ===============================  ==========================================
stride           at most half a patch             18/112, 18/112, 4/80 of the patch (x, y, z)
window starts    evenly spaced                    min(i * stride, size - patch)
averaged         logits, Gaussian weights         probabilities, all windows count the same
mirroring        on, where training mirrored      off
===============  ===============================  ==========================================

Reference: sliding window of UA-MT, SASSNet, DTC, MC-Net, SS-Net and BCP on the left atrium (``test_all_case`` with
stride_xy 18, stride_z 4 and patch 112 x 112 x 80). The strides are kept as fractions of the patch, because nnU-Net
plans a patch of its own. Preprocessing, and the way back to the image's own grid, are nnU-Net's in both.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder
from torch import Tensor, nn
from tqdm import tqdm

from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.files import write_json

LA_STRIDE_FRACTION = (18 / 112, 18 / 112, 4 / 80)  # x, y, z

_SMALLEST_PROBABILITY = 1e-7


def predict_folder(
    model_folder: Path,
    images: Path,
    output: Path,
    inference: str,
    device: torch.device | str,
    checkpoint: str = "checkpoint_final.pth",
    folds: Sequence[int | str] = ("all",),
    stride_fraction: tuple[float, ...] | None = None,
) -> None:
    """Segment every image of a folder with a trained model, one after the other in this process.

    Args:
        model_folder: ``Trainer__Plans__Configuration``, with ``plans.json``, ``dataset.json`` and ``fold_*``.
        images: folder of ``CASE_0000...`` files.
        output: created; receives the segmentations, nnU-Net's json files, and ``inference.json``: how they were made.
        inference: ``nnunet`` or ``literature``, see the table above.
        device: where the network runs.
        checkpoint: file in every fold's folder.
        folds: averaged by nnU-Net.
        stride_fraction: for ``literature`` only: stride as a share of the patch, in the order x, y, z (2D: x, y) of the
            image; None for the papers' on the left atrium, in 3D.

    Raises:
        InputError: no such model or images, a cascade's second stage, or a stride that does not fit.
    """
    model_folder, images, output, device = Path(model_folder), Path(images), Path(output), torch.device(device)
    if inference == "literature":
        predictor = LiteraturePredictor(device, stride_fraction)
    elif inference == "nnunet" and stride_fraction is None:
        predictor = nnUNetPredictor(device=device, perform_everything_on_device=device.type == "cuda")
    else:
        what = "has a step of its own: leave stride_fraction out" if inference == "nnunet" else "is unknown"
        raise InputError(f"inference {inference!r} {what}; known are nnunet and literature")
    _initialize(predictor, model_folder, checkpoint, folds)
    how = {"inference": inference, "model_folder": str(model_folder), "checkpoint": checkpoint, "folds": list(folds)}
    if isinstance(predictor, LiteraturePredictor):
        how["stride_voxels"] = list(predictor.stride)
    cases = images.is_dir() and create_lists_from_splitted_dataset_folder(
        str(images), predictor.dataset_json["file_ending"]
    )
    if not cases:
        raise InputError(f"{images} holds no image named CASE_0000{predictor.dataset_json['file_ending']}")
    output.mkdir(parents=True, exist_ok=True)
    predictor.predict_from_files_sequential(str(images), str(output))
    write_json(output / "inference.json", how)


class LiteraturePredictor(nnUNetPredictor):
    """nnU-Net's predictor with the literature's sliding window.

    Args:
        device: where the network runs.
        stride_fraction: as in :func:`predict_folder`.
    """

    def __init__(self, device: torch.device, stride_fraction: tuple[float, ...] | None = None):
        super().__init__(
            use_gaussian=False,
            use_mirroring=False,
            perform_everything_on_device=device.type == "cuda",
            device=device,
        )
        self.stride_fraction = stride_fraction

    @property
    def stride(self) -> tuple[int, ...]:
        """Voxels per axis of the patch, at least 1."""
        patch = self.configuration_manager.patch_size
        fraction = self.stride_fraction
        if fraction is None:
            if len(patch) != 3:
                raise InputError(
                    "the literature has no sliding window in 2D: give stride_fraction for a 2d configuration"
                )
            fraction = LA_STRIDE_FRACTION
        if len(fraction) != len(patch) or not all(0 < f <= 1 for f in fraction):
            raise InputError(f"stride_fraction {tuple(fraction)} must be {len(patch)} numbers above 0 and at most 1")
        fraction = fraction[::-1]  # arrays are (z, y, x)
        if len(patch) == 3:
            fraction = tuple(fraction[axis] for axis in self.plans_manager.transpose_forward)
        return tuple(max(1, round(f * size)) for f, size in zip(fraction, patch, strict=True))

    @torch.inference_mode()
    def predict_sliding_window_return_logits(self, input_image: Tensor) -> Tensor:
        """Log-odds of the averaged probabilities, so that nnU-Net's softmax or sigmoid gives these probabilities back.

        Args:
            input_image: (C, X, Y, Z) float, preprocessed; a 2d configuration goes through X slice by slice.

        Returns:
            (heads, X, Y, Z) float32.
        """
        network = self.network.to(self.device).eval()
        patch = tuple(self.configuration_manager.patch_size)
        data, inside = pad_nd_image(input_image, patch, "constant", {"value": 0}, True)
        try:
            mean = self._average(network, data, patch, self.device)
        except torch.cuda.OutOfMemoryError:
            mean = self._average(network, data, patch, torch.device("cpu"))
        mean = mean[(slice(None), *inside[1:])]
        if self.label_manager.has_regions:
            return torch.logit(mean, _SMALLEST_PROBABILITY)
        return mean.clamp_min(_SMALLEST_PROBABILITY).log()

    def _average(self, network: nn.Module, data: Tensor, patch: tuple[int, ...], results: torch.device) -> Tensor:
        """Mean probability of the windows over each voxel, (heads, X, Y, Z) float32 on ``results``."""
        total = torch.zeros((self.label_manager.num_segmentation_heads, *data.shape[1:]), device=results)
        visits = torch.zeros(data.shape[1:], device=results)
        windows = list(sliding_windows(data.shape[1:], patch, self.stride))
        for window in tqdm(windows, disable=None if self.allow_tqdm else True):
            tile = data[(slice(None), *window)][None].to(self.device)
            with torch.autocast("cuda", enabled=self.device.type == "cuda"):
                logits = network(tile)[0]
            total[(slice(None), *window)] += self.label_manager.apply_inference_nonlin(logits).to(results)
            visits[window] += 1
        return total / visits


def sliding_windows(
    shape: Sequence[int], patch: Sequence[int], stride: Sequence[int]
) -> Iterator[tuple[int | slice, ...]]:
    """Windows that start at min(i * stride, size - patch), i = 0 .. ceil((size - patch) / stride), along each axis.

    Args:
        shape: (X, Y, Z) or (X, Y) voxels, nowhere smaller than the patch.
        patch: voxels; one axis shorter than ``shape`` for 2D windows in each slice of the first axis.
        stride: voxels, as many as ``patch``.
    """
    slices = [range(shape[0])] if len(patch) == len(shape) - 1 else []
    starts = [
        [min(i * step, size - length) for i in range(math.ceil((size - length) / step) + 1)]
        for size, length, step in zip(shape[len(slices) :], patch, stride, strict=True)
    ]
    for position in itertools.product(*slices):
        for corner in itertools.product(*starts):
            yield (*position, *(slice(start, start + length) for start, length in zip(corner, patch, strict=True)))


def _initialize(predictor: nnUNetPredictor, model_folder: Path, checkpoint: str, folds: Sequence[int | str]) -> None:
    files = [model_folder / "plans.json", model_folder / "dataset.json"]
    files += [model_folder / f"fold_{fold}" / checkpoint for fold in folds]
    for file in files:
        if not file.is_file():
            raise InputError(
                f"{file} does not exist: train the model first, or name another folder, fold or checkpoint"
            )
    predictor.initialize_from_trained_model_folder(str(model_folder), tuple(folds), checkpoint)
    if predictor.configuration_manager.previous_stage_name is not None:
        raise InputError(
            f"{model_folder} is the second stage of a cascade, which is not supported: use nnUNetv2_predict"
        )
