"""Our part of nnU-Net's checkpoint files: the single extra key, writing without half files, refusing foreign ones."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from time import strftime
from typing import Any

import torch

from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.files import whole_file

KEY = "semisup"


def write(checkpoint: dict[str, Any], filename: str) -> None:
    """Write so that a reader finds either the old file or the whole new one."""
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
    return checkpoint[KEY]


def set_aside(folder: Path) -> list[tuple[Path, Path]]:
    """Rename the checkpoints of an earlier run: ``--c`` would otherwise finish that one. Returns (old, new) paths."""
    renamed = []
    for old in sorted(folder.glob("checkpoint_*.pth")):
        new = old.with_name(f"previous_{strftime('%Y%m%d_%H%M%S')}_{old.name}")
        os.replace(old, new)
        renamed.append((old, new))
    return renamed
