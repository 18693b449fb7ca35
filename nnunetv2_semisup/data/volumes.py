"""How much of random patches of the labelled images each class takes."""

from __future__ import annotations

from functools import reduce

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.utilities.label_handling.label_handling import LabelManager

MAX_CASES = 20


def labelled_volumes(dataset: nnUNetBaseDataset, labels: LabelManager, patch_size: list[int]) -> list[float]:
    """Share of the voxels of uniformly random patches that each foreground class or region takes.

    It is the mean over at most 20 cases of the expectation over all places of the patch, in which the voxels at the
    border of an image count less than those in its middle.

    Args:
        dataset: preprocessed labelled cases, without an ignore label: what is annotated may be no fair share.
        labels: nnU-Net's.
        patch_size: 2 or 3 axes; an image that is smaller counts as padded.
    """
    values = labels.foreground_regions if labels.has_regions else labels.foreground_labels
    cases = dataset.identifiers[:: -(-len(dataset.identifiers) // MAX_CASES)]
    shares = []
    for case in cases:
        segmentation = np.maximum(np.asarray(dataset.load_case(case)[1][0]), 0).astype(np.int64)
        patch = (*[1] * (segmentation.ndim - len(patch_size)), *patch_size)  # 2d patches are slices of a volume
        often = [_how_often(n, p) for n, p in zip(segmentation.shape, patch, strict=True)]
        counts = np.bincount(segmentation.ravel(), reduce(np.multiply.outer, often).ravel(), max(labels.all_labels) + 1)
        shares.append([counts[np.atleast_1d(value)].sum() for value in values])
    return np.mean(shares, 0).tolist()


def _how_often(size: int, patch: int) -> np.ndarray:
    """(size,): share of a random patch's voxels along an axis that lie at each position of the image."""
    places = max(1, size - patch + 1)
    positions = np.arange(size)
    return np.minimum.reduce([positions + 1, size - positions, np.full(size, min(patch, places))]) / (places * patch)
