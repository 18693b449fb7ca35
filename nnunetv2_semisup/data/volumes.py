"""How much of the labelled images each class takes."""

from __future__ import annotations

from math import prod

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.utilities.label_handling.label_handling import LabelManager

MAX_CASES = 20


def labelled_volumes(dataset: nnUNetBaseDataset, labels: LabelManager, patch_size: list[int]) -> list[float]:
    """Share of the voxels of each foreground class or region, mean over at most 20 of the cases.

    Args:
        dataset: preprocessed labelled cases.
        labels: nnU-Net's.
        patch_size: 2 or 3 axes; images are counted as padded to it, as patches are.
    """
    values = labels.foreground_regions if labels.has_regions else labels.foreground_labels
    cases = dataset.identifiers[:: -(-len(dataset.identifiers) // MAX_CASES)]
    shares = []
    for case in cases:
        segmentation = np.asarray(dataset.load_case(case)[1][0])
        size = segmentation.shape[-len(patch_size) :]
        padding = prod(max(n, p) for n, p in zip(size, patch_size, strict=True)) / prod(size)
        known = segmentation.size if labels.ignore_label is None else (segmentation != labels.ignore_label).sum()
        shares.append([np.isin(segmentation, value).sum() / max(1, known * padding) for value in values])
    return np.mean(shares, 0).tolist()
