"""Patches of unlabelled images, and both streams as one loader for nnU-Net's augmenters."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from batchgenerators.dataloading.data_loader import DataLoader
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

GEOMETRIC = (Convert3DTo2DTransform, SpatialTransform, Convert2DTo3DTransform, MirrorTransform, MaskImageTransform)


class UnlabeledDataset(nnUNetDatasetBlosc2):
    """Cases of the unlabelled folder. Where nnU-Net has a segmentation, these have the nonzero mask (0 in, -1 out).

    Args:
        folder: of the preprocessed cases.
        identifiers: of the cases to use; None for all.
        masks: False where no transform needs them; then they are not opened.
    """

    def __init__(self, folder: Path | str, identifiers: list[str] | None = None, masks: bool = True):
        super().__init__(str(folder), None if identifiers is None else list(identifiers))
        self.masks = masks

    def load_case(self, identifier: str) -> tuple[Any, Any, None, dict]:
        """Image (C, X, Y, Z) and mask (1, X, Y, Z) or None, both on disk; no previous stage, no class locations.

        The properties file is not opened: nothing in it is needed, and a pickle from elsewhere could run code.
        """
        mask = self._open(f"{identifier}_seg.b2nd") if self.masks else None
        return self._open(f"{identifier}.b2nd"), mask, None, {"class_locations": None}

    def _open(self, name: str) -> Any:
        file = os.path.join(self.source_folder, name)
        return blosc2.open(urlpath=file, mode="r", dparams={"nthreads": 1}, **self.mmap_kwargs)


class UnlabeledDataLoader(nnUNetDataLoader):
    """nnU-Net's loader with uniformly random patches, also where the task has an ignore label.

    Args:
        data: the unlabelled cases.
        batch_size: patches per batch.
        patch_size: voxels per axis read from the case, 2 or 3 entries.
        final_patch_size: voxels per axis after ``transforms``.
        label_manager: nnU-Net's; it decides nothing here.
        transforms: applied to the image, and to the mask if ``data`` has masks; see :func:`geometric_part`.
    """

    def __init__(
        self,
        data: UnlabeledDataset,
        batch_size: int,
        patch_size: tuple[int, ...] | list[int] | np.ndarray,
        final_patch_size: tuple[int, ...] | list[int] | np.ndarray,
        label_manager: LabelManager,
        transforms: BasicTransform | None = None,
    ):
        super().__init__(
            data,
            batch_size,
            patch_size,
            final_patch_size,
            label_manager,
            oversample_foreground_percent=0,
            transforms=transforms,
        )
        self.has_ignore = False  # otherwise nnU-Net looks for annotated voxels

    def generate_train_batch(self) -> dict[str, Any]:
        """Returns: ``data`` (B, C, X, Y, Z) float32 (2D drops Z) and ``keys``, the case of each patch."""
        cases = self.get_indices()
        return {"data": torch.stack([self._patch(case) for case in cases]), "keys": cases}

    def _patch(self, case: str) -> Tensor:
        """The patch that nnU-Net's own loader would make from the same random numbers, without a target."""
        image, mask, _, _ = self._data.load_case(case)
        box = [list(ends) for ends in zip(*self.get_bbox(image.shape[1:], False, None), strict=True)]
        sample = {"image": torch.from_numpy(crop_and_pad_nd(image, box, 0)).float()}
        if mask is not None:
            sample["segmentation"] = torch.from_numpy(crop_and_pad_nd(mask, box, -1)).to(torch.int16)
        if self.patch_size_was_2d:
            sample = {key: value[:, 0] for key, value in sample.items()}
        return (sample if self.transforms is None else self.transforms(**sample))["image"]


def geometric_part(transforms: ComposeTransforms) -> ComposeTransforms:
    """Those of nnU-Net's training transforms that move voxels, and the masking; the same objects in the same order."""
    return ComposeTransforms([transform for transform in transforms.transforms if isinstance(transform, GEOMETRIC)])


class RememberingDataset:
    """A data set of nnU-Net's that notes which case was opened last, so that an error can name it."""

    def __init__(self, dataset: Any):
        self.dataset = dataset
        self.identifiers = dataset.identifiers
        self.last = ""

    def load_case(self, identifier: str) -> tuple:
        self.last = identifier
        return self.dataset.load_case(identifier)


class TwoStreamLoader:
    """A labelled and an unlabelled batch at a time, so that both share the workers of one augmenter.

    Args:
        labelled: nnU-Net's own loader.
        unlabelled: ours.
        partners: draw another unlabelled batch of the same size, for methods that mix patches with each other.
        labelled_transform: further tensors from an augmented labelled batch, or None; see ``SemiSupMethod``.
    """

    def __init__(
        self,
        labelled: DataLoader,
        unlabelled: UnlabeledDataLoader,
        partners: bool = False,
        labelled_transform: Callable[[dict], dict[str, Tensor]] | None = None,
    ):
        self.labelled = labelled
        self.unlabelled = unlabelled
        self.partners = partners
        self.labelled_transform = labelled_transform

    def set_thread_id(self, thread_id: int) -> None:
        """Called by the augmenter in each worker."""
        self.labelled.set_thread_id(thread_id)
        self.unlabelled.set_thread_id(thread_id)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        """Returns: the labelled batch with what the transform adds, and under "unlabelled" the other.

        The unlabelled batch has ``data`` and ``keys``, and with partners ``partners``, shaped as ``data``.
        """
        labelled = next(self.labelled)
        added = {} if self.labelled_transform is None else self.labelled_transform(labelled)
        unlabelled = next(self.unlabelled)
        if self.partners:
            second = next(self.unlabelled)
            unlabelled = {
                "data": unlabelled["data"],
                "partners": second["data"],
                "keys": [*unlabelled["keys"], *second["keys"]],
            }
        return {**labelled, **added, "unlabelled": unlabelled}
