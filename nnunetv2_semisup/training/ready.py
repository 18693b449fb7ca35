"""What a training needs before it writes anything: what is easily forgotten, each with the command that mends it."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.files import PREPROCESSED, RESULTS, require_preprocessed


def require_ready(plans: dict, configuration: str, device: torch.device) -> None:
    """Raise an InputError unless nnU-Net's folders are named, the device exists and labelled cases are preprocessed.

    Args:
        plans: content of a plans file, which has the configuration.
        configuration: e.g. ``2d``.
        device: to train on.
    """
    for variable in (PREPROCESSED, RESULTS):
        if not os.environ.get(variable):
            raise InputError(f"{variable} is not set: export {variable}=FOLDER")
    require_device(device.type)
    manager = PlansManager(plans)
    identifier = manager.get_configuration(configuration).data_identifier
    folder = Path(os.environ[PREPROCESSED], manager.dataset_name)
    require_preprocessed(folder, identifier, manager.plans_name, configuration)


def require_device(device: str) -> None:
    """Raise an InputError where ``device`` is cuda, the default of all commands, and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("torch finds no CUDA GPU here: add -device cpu, or install the driver and a torch for CUDA")
