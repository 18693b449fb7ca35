"""CPU time of a batch of each stream, in one process and one thread: labelled, unlabelled, and unlabelled as nnU-Net's
loader would read it, with the masks. The last over the second is what reading without masks saves.

    python -m tools.loader_speed DATASET_ID CONFIGURATION PLANS [BATCHES]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from statistics import median
from time import process_time
from typing import Any

import torch
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

TRAINER = "nnUNetTrainerPasteMatch"
ROUNDS = 5


def milliseconds(streams: dict[str, Callable[[], Any]], batches: int) -> dict[str, float]:
    """Median over rounds of the mean over ``batches``; the streams take turns."""
    times: dict[str, list[float]] = {name: [] for name in streams}
    for _ in range(ROUNDS):
        for name, make in streams.items():
            start = process_time()
            for _ in range(batches):
                make()
            times[name].append(1000 * (process_time() - start) / batches)
    return {name: median(values) for name, values in times.items()}


def main(dataset: str, configuration: str, plans: str, batches: str = "20") -> None:
    os.environ["nnUNet_n_proc_DA"] = "0"  # everything in this process
    torch.set_num_threads(1)
    trainer = get_trainer_from_args(dataset, configuration, "all", TRAINER, plans, device=torch.device("cpu"))
    trainer.initialize()
    trainer.unlabeled_cases = trainer._prepare_unlabeled_cases()
    both = trainer.get_dataloaders()[0].data_loader.loader
    unlabelled = both.unlabelled
    needed = unlabelled._data.dataset.masks

    def with_masks() -> None:
        unlabelled._data.dataset.masks = True
        nnUNetDataLoader.generate_train_batch(unlabelled)
        unlabelled._data.dataset.masks = needed

    streams = {
        "labelled": lambda: next(both.labelled),
        "unlabelled": lambda: next(unlabelled),
        "with masks": with_masks,
    }
    found = milliseconds(streams, int(batches))
    print(f"\n{dataset} {configuration} {plans}, batch of {unlabelled.batch_size}, masks needed: {needed}")
    for name, value in found.items():
        print(f"{name:12} {value:8.1f} ms   {value / found['labelled']:.2f} of the labelled batch")


if __name__ == "__main__":
    main(*sys.argv[1:])
