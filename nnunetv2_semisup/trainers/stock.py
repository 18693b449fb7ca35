"""Stock nnU-Net at any length: it comes with 1, 5, 10, 20, 50, 100, 250 epochs and more, each a class of its own.

Baselines of equal compute need other lengths. nnU-Net looks in its own package first, so its own lengths stay its own.
"""

from __future__ import annotations

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


def of_length(name: str, epochs: int, module: str) -> type[nnUNetTrainer]:
    """A subclass of ``nnUNetTrainer`` like nnU-Net's ``nnUNetTrainer_Xepochs``: it sets the number of epochs alone.

    Args:
        name: of the class, from which nnU-Net makes the model folder's name, e.g. ``nnUNetTrainer_47epochs``.
        epochs: length of training.
        module: where the class will be found by its name.
    """

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's signature
    ):
        nnUNetTrainer.__init__(self, plans, configuration, fold, dataset_json, device)
        self.num_epochs = epochs

    return type(name, (nnUNetTrainer,), {"__module__": module, "__init__": __init__})
