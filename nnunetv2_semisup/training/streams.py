"""The labelled and the unlabelled stream in nnU-Net's augmenters, and their batches on the device."""

from __future__ import annotations

import multiprocessing
import os
import signal
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

from nnunetv2_semisup.data.loader import (
    RememberingDataset,
    TwoStreamLoader,
    UnlabeledDataLoader,
    UnlabeledDataset,
    geometric_part,
)

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
    watched = Watched(loader)
    if workers == 0:
        return SingleThreadedAugmenter(watched, None)
    seeds = None if seed is None else [seed + i for i in range(workers)]
    augmenter = NonDetMultiThreadedAugmenter(
        watched, None, workers, cached, seeds=seeds, pin_memory=pin_memory, wait_time=WAIT_SECONDS
    )
    augmenter.data_loader = watched  # as the other augmenter calls it
    next(augmenter)
    return augmenter


class LoaderFailed(RuntimeError):
    """A batch could not be made; the text names the case that was being read."""


class Watched:
    """``loader`` as an augmenter takes it. In a worker process it ends with its parent: after ``kill -9`` nobody else
    tells it to. What goes wrong is noted where the parent can read it."""

    def __init__(self, loader: DataLoader):
        self.loader = loader
        forkserver = multiprocessing.get_start_method() == "forkserver"  # there the server is the workers' parent
        self.parent = None if forkserver else os.getpid()  # noted here: it may be gone when the worker starts
        self._failure: Any = multiprocessing.Array("c", 1000)
        self._datasets = []
        for part in (loader.labelled, loader.unlabelled) if isinstance(loader, TwoStreamLoader) else (loader,):
            part._data = RememberingDataset(part._data)
            self._datasets.append(part._data)

    def set_thread_id(self, thread_id: int) -> None:
        """The first call that batchgenerators makes in the worker."""
        self.loader.was_initialized = False  # as batchgenerators does for a loader of its own class
        self.loader.set_thread_id(thread_id)
        if os.getpid() != self.parent:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all: the training ends us when it has saved
            threading.Thread(target=_exit_with_parent, args=(self.parent or os.getppid(),), daemon=True).start()

    def __iter__(self) -> Watched:
        return self

    def __next__(self) -> dict[str, Any]:
        try:
            return next(self.loader)
        except Exception as error:
            cases = " or ".join(dataset.last for dataset in self._datasets if dataset.last)
            reason = " ".join(str(error).split()) or type(error).__name__
            text = f"case {cases} cannot be loaded ({reason}): preprocess it again"
            self._failure.value = text.encode()[:999]
            raise LoaderFailed(text) from error

    @property
    def failure(self) -> str:
        """What went wrong, in whichever process; empty if nothing was noted."""
        return self._failure.value.decode(errors="replace")


def loading_failed(error: RuntimeError, *augmenters: Augmenter | None) -> str:
    """What to tell of ``error`` if it comes from the loading of patches, else an empty text."""
    died = "background workers are no longer alive" in str(error)
    if not died and not isinstance(error, LoaderFailed):
        return ""
    noted = [augmenter.data_loader.failure for augmenter in augmenters if augmenter is not None]
    killed = "a process that loads patches was killed, perhaps for lack of memory: try a smaller nnUNet_n_proc_DA"
    return next(filter(None, noted), killed)


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
