"""Names of trainers: the suffix with the number of epochs, and what a typo was meant to be."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

from nnunetv2_semisup.errors import InputError

PREFIX = "nnunettrainer"


def split_epochs(name: str) -> tuple[str, int | None]:
    """``nnUNetTrainerX_20epochs`` -> ``("nnUNetTrainerX", 20)``; no suffix -> ``(name, None)``.

    As in nnU-Net the singular belongs to 1 alone: ``_1epoch``, ``_20epochs``.
    """
    match = re.fullmatch(r"(\w+?)_(1epoch|([2-9]|[1-9]\d+)epochs)", name)
    return (match[1], int(match[3] or 1)) if match else (name, None)


def nearest(name: str, known: Collection[str]) -> str | None:
    """The name in ``known`` that ``name`` was most likely meant to be, with its epoch suffix; None if none is near."""
    wrong_plural = re.fullmatch(r"(\w+?)_([1-9]\d*)epochs?", name)
    stem, epochs = (wrong_plural[1], int(wrong_plural[2])) if wrong_plural else split_epochs(name)
    by_key = {n.lower().removeprefix(PREFIX): n for n in known}
    match = difflib.get_close_matches(stem.lower().removeprefix(PREFIX), by_key, n=1, cutoff=0.6)
    if not match:
        return None
    return by_key[match[0]] + ("" if epochs is None else "_1epoch" if epochs == 1 else f"_{epochs}epochs")


def require_known(name: str, known: Collection[str]) -> None:
    """Raise an InputError that suggests the nearest name unless ``name``, without epoch suffix, is in ``known``."""
    if name in known:
        return
    near = nearest(split_epochs(name)[0], known)
    hint = f"did you mean {near}?" if near else f"there are {', '.join(sorted(known))}"
    raise InputError(f"unknown trainer {name!r} (to be named without _<N>epochs): {hint}")
