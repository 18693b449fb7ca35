"""The labelled and the unlabelled stream in nnU-Net's augmenters, and their batches on the device."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from time import sleep
from typing import Any, TypeAlias

import torch
from batchgenerators.dataloading.data_loader import DataLoader
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from nnunetv2_semisup.data.loader import TwoStreamLoader, UnlabeledDataLoader, UnlabeledDataset, geometric_part

WAIT_SECONDS = 0.002  # nnU-Net's value
PARENT_SECONDS = 1.0  # between two looks of a worker at whether the training still runs

Augmenter: TypeAlias = SingleThreadedAugmenter | NonDetMultiThreadedAugmenter


def two_streams(
    labelled: nnUNetDataLoader,
    unlabelled: UnlabeledDataset,
    batch_size: int,
    label_manager: LabelManager,
    partners: bool = False,
    labelled_transform: Callable[[dict], dict[str, Tensor]] | None = None,
) -> TwoStreamLoader:
    """nnU-Net's own training loader, and beside it unlabelled patches of the same size, moved by the same transforms.

    Args:
        labelled: as ``nnUNetTrainer.get_dataloaders`` makes it.
        unlabelled: the cases to draw from.
        batch_size: unlabelled patches per batch.
        label_manager: nnU-Net's.
        partners: draw a second unlabelled batch for each step, see :class:`TwoStreamLoader`.
        labelled_transform: see ``SemiSupMethod.labelled_transform``.
    """
    axes = slice(1, None) if labelled.patch_size_was_2d else slice(None)
    loader = UnlabeledDataLoader(
        unlabelled,
        batch_size,
        labelled.patch_size[axes],
        labelled.final_patch_size[axes],
        label_manager,
        transforms=geometric_part(labelled.transforms),
    )
    return TwoStreamLoader(labelled, loader, partners, labelled_transform)


def start_augmenter(loader: DataLoader, workers: int, cached: int, seed: int | None, pin_memory: bool) -> Augmenter:
    """nnU-Net's own augmenter around ``loader``, already running.

    Args:
        loader: whose batches are wanted.
        workers: processes; 0 for none.
        cached: batches that wait for the training.
        seed: of the first worker, or None for a random one.
        pin_memory: for CUDA.
    """
    if workers == 0:
        return SingleThreadedAugmenter(loader, None)
    seeds = None if seed is None else [seed + i for i in range(workers)]
    augmenter = NonDetMultiThreadedAugmenter(
        EndsWithParent(loader), None, workers, cached, seeds=seeds, pin_memory=pin_memory, wait_time=WAIT_SECONDS
    )
    next(augmenter)
    return augmenter


class EndsWithParent:
    """``loader`` in a worker process that ends with its parent: after ``kill -9`` nobody else tells it to."""

    def __init__(self, loader: DataLoader):
        self.loader = loader
        forkserver = multiprocessing.get_start_method() == "forkserver"  # there the server is the workers' parent
        self.parent = None if forkserver else os.getpid()  # noted here: it may be gone when the worker starts

    def set_thread_id(self, thread_id: int) -> None:
        """The first call that batchgenerators makes in the worker."""
        self.loader.was_initialized = False  # as batchgenerators does for a loader of its own class
        self.loader.set_thread_id(thread_id)
        threading.Thread(target=_exit_with_parent, args=(self.parent or os.getppid(),), daemon=True).start()

    def __next__(self) -> dict[str, Any]:
        return next(self.loader)


def _exit_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        sleep(PARENT_SECONDS)
    os._exit(1)


def end_augmenters(*augmenters: Augmenter | None) -> None:
    """End the workers."""
    for augmenter in augmenters:
        if isinstance(augmenter, NonDetMultiThreadedAugmenter):
            augmenter._finish()


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors, also those in lists and nested batches, on ``device``; all else as it is."""

    def move(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: move(item) for key, item in value.items()}
        if isinstance(value, list):
            return [move(item) for item in value]
        return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

    return {key: move(value) for key, value in batch.items()}
