"""Our part of nnU-Net's checkpoint files: the single extra key, writing without half files, refusing foreign ones."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from time import strftime
from typing import Any

import torch
from torch import Tensor, nn

from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.files import whole_file

KEY = "semisup"


class NetworkWeights:
    """Which weights lie in the network: those in training, or for a while those that prediction will use."""

    def __init__(self):
        self._training: dict[str, Tensor] | None = None

    def use_inference(self, network: nn.Module, inference: nn.Module) -> None:
        """Put the weights of ``inference`` into ``network``; undone by :meth:`use_training`, doing it twice is one."""
        if inference is not network and self._training is None:
            self._training = {key: value.clone() for key, value in network.state_dict().items()}
            network.load_state_dict(inference.state_dict())

    def use_training(self, network: nn.Module) -> None:
        """Put the weights in training back."""
        if self._training is not None:
            network.load_state_dict(self._training)
            self._training = None

    @contextlib.contextmanager
    def inference(self, network: nn.Module, inference: nn.Module) -> Iterator[dict[str, Tensor] | None]:
        """The weights of ``inference`` in ``network`` for a while; yields those in training, None if they are these."""
        self.use_inference(network, inference)
        try:
            yield self._training
        finally:
            self.use_training(network)


def write(stock: BytesIO, ours: dict[str, Any], filename: str) -> None:
    """Write nnU-Net's checkpoint with our part so that a reader finds either the old file or the whole new one."""
    stock.seek(0)
    checkpoint = torch.load(stock, map_location="cpu", weights_only=False) | {KEY: ours}
    with whole_file(Path(filename), only_writer=True) as temporary:
        torch.save(checkpoint, temporary)


def read_own_part(filename: str, trainer: str) -> dict[str, Any]:
    """What ``trainer`` (named without epoch suffix) saved under our key.

    Raises:
        InputError: the file cannot be read, or is a checkpoint of another trainer.
    """
    try:
        checkpoint = torch.load(filename, map_location="cpu", weights_only=False)
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{filename} cannot be read ({reason}): remove it, or copy it here again") from error
    writer = checkpoint.get(KEY, {}).get("trainer", checkpoint.get("trainer_name"))
    if KEY not in checkpoint or writer != trainer:
        raise InputError(
            f"{filename} is a checkpoint of {writer}, {trainer} cannot continue it: start a new run, "
            f"with -pretrained_weights {filename} if its network is to be the start"
        )
    ours = checkpoint[KEY]
    if "stage" not in ours:  # version 0.1.0 had no burn-in; ACTION kept the stage itself, 0 before the first step
        ours["stage"] = max(1, int(ours["method"].pop("_extra_state", 1)))
    return ours


def changed_settings(now: dict[str, Any], before: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> (value now, value in the checkpoint) where they differ; a setting that is new is None there."""
    return {key: (value, before.get(key)) for key, value in now.items() if value != before.get(key)}


def set_aside(folder: Path) -> list[tuple[Path, Path]]:
    """Rename the checkpoints of an earlier run: ``--c`` would otherwise finish that one. Returns (old, new) paths."""
    renamed = []
    for old in sorted(folder.glob("checkpoint_*.pth")):
        new = old.with_name(f"previous_{strftime('%Y%m%d_%H%M%S')}_{old.name}")
        os.replace(old, new)
        renamed.append((old, new))
    return renamed
