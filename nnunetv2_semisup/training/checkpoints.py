"""Our part of nnU-Net's checkpoint files: the single extra key, writing without half files, refusing foreign ones."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from io import BytesIO
from pathlib import Path
from time import strftime
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.files import cannot_write, listed, whole_file

KEY = "semisup"
OWN_KEYS = ("settings", "method", "log", "training_weights")  # below it
STOCK_KEYS = ("network_weights", "optimizer_state", "current_epoch", "logging", "init_args")
_MULTIARRAY = "numpy._core.multiarray"


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
    """Write nnU-Net's checkpoint with our part so that a reader finds either the old file or the whole new one.

    Raises:
        InputError: it cannot be written, as on a full disk.
    """
    stock.seek(0)
    checkpoint = torch.load(stock, map_location="cpu", weights_only=False) | {KEY: ours}
    with whole_file(Path(filename), only_writer=True) as temporary:
        try:
            torch.save(checkpoint, temporary)
        except RuntimeError as error:  # of torch's writer, which does not say that the disk is full
            raise cannot_write(Path(filename), "torch could not write all of it") from error


def read_own_part(filename: str, trainer: str, epochs: int) -> dict[str, Any]:
    """What ``trainer`` (named without epoch suffix) saved under our key, having checked the rest as well.

    Only tensors and plain values are loaded, numpy's numbers included: a pickle could run code. What torch's writer
    noted of every part of the file (CRC-32) is compared, so that flipped bits are found.

    Args:
        filename: the checkpoint.
        trainer: that wants to go on from it.
        epochs: of the whole training.

    Raises:
        InputError: the file cannot be read, or is a checkpoint of another trainer.
    """
    checkpoint = load_plain(filename)
    writer = checkpoint.get("trainer_name")
    ours = checkpoint.get(KEY)
    if isinstance(ours, dict):
        writer = ours.get("trainer", writer)
    if not isinstance(ours, dict) or writer != trainer:
        raise InputError(
            f"{filename} is a checkpoint of {writer}, {trainer} cannot continue it: start a new run, "
            f"with -pretrained_weights {filename} if its network is to be the start"
        )
    missing = [key for key in STOCK_KEYS if key not in checkpoint] + [key for key in OWN_KEYS if key not in ours]
    if missing or not all(isinstance(ours[key], dict) for key in ("settings", "method")):
        raise InputError(f"{filename} is damaged, it lacks {listed(missing or ['settings'])}: copy it here again")
    epoch = checkpoint["current_epoch"]
    if not isinstance(epoch, int) or not 0 <= epoch <= epochs:
        raise InputError(f"{filename} is of epoch {epoch!r}, this training has {epochs}: take another checkpoint")
    if "stage" not in ours:  # version 0.1.0 had no burn-in; ACTION kept the stage itself, 0 before the first step
        ours["stage"] = max(1, int(ours["method"].pop("_extra_state", 1)))
    return ours


def load_plain(filename: str) -> dict[str, Any]:
    """Content of a checkpoint file of nnU-Net or ours, tensors and plain values only.

    Raises:
        InputError: it cannot be read, has changed since it was written, or holds more than that.
    """
    try:
        with zipfile.ZipFile(filename) as parts:
            if broken := parts.testzip():
                raise RuntimeError(f"its part {broken} has changed since it was written")
        with torch.serialization.safe_globals(_plain_types()):
            checkpoint = torch.load(filename, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = name[1] if name else " ".join(str(error).split())[:200]
        raise InputError(
            f"{filename} holds more than tensors and plain values ({what}), which could run code: if you trust it, "
            f"load it with torch.load(..., weights_only=False) and save it without"
        ) from error
    except (RuntimeError, ValueError, LookupError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{filename} cannot be read ({reason}): remove it, or copy it here again") from error
    if not isinstance(checkpoint, dict):
        raise InputError(f"{filename} is no checkpoint of nnU-Net: remove it, or copy it here again")
    return checkpoint


@cache
def _plain_types() -> list:
    """What numpy's numbers and arrays are pickled as; numpy 2 moved the functions, so both names are known."""
    number: Any = np.float64(0).__reduce__()[0]
    array: Any = np.empty(0).__reduce__()[0]
    moved = [
        _named(function, module) for function in (number, array) for module in ("numpy.core.multiarray", _MULTIARRAY)
    ]
    kinds = {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}
    return [*moved, np.ndarray, np.dtype, *kinds]


def _named(function: Callable, module: str) -> Callable:
    """``function`` under its name in ``module``."""

    def alias(*arguments):
        return function(*arguments)

    alias.__module__, alias.__name__, alias.__qualname__ = module, function.__name__, function.__name__
    return alias


def changed_settings(now: dict[str, Any], before: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> (value now, value in the checkpoint) where they differ; settings that it does not have are left out."""
    return {key: (value, before[key]) for key, value in now.items() if key in before and value != before[key]}


def set_aside(folder: Path, *patterns: str) -> list[tuple[Path, Path]]:
    """Rename what an earlier run left in ``folder`` under names that fit one of ``patterns``.

    ``--c`` would otherwise finish that run, and its pictures would lie among the new ones.

    Returns:
        (old, new) paths.
    """
    renamed = []
    for old in sorted(file for pattern in patterns for file in folder.glob(pattern)):
        new = old.with_name(f"previous_{strftime('%Y%m%d_%H%M%S')}_{old.name}")
        os.replace(old, new)
        renamed.append((old, new))
    return renamed
