"""The folds of a data set, for another one that keeps some of its labelled cases."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from nnunetv2_semisup.data import splits
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.files import PREPROCESSED

WORDS = {"train": "train on", "val": "validate on"}


def kept_folds(
    source: Path, cases: list[str], patient_of: dict[str, str], kept: Sequence[str]
) -> list[dict[str, list[str]]] | None:
    """The source's own folds restricted to ``kept``; None where it has none, or those that nnU-Net or we would make.

    They lie in the raw folder or, as nnU-Net uses them, in the preprocessed one.

    Args:
        source: raw folder.
        cases: all labelled cases of the source.
        patient_of: case -> patient.
        kept: cases that keep their labels.

    Raises:
        InputError: a fold would have nothing to train on or nothing to validate on.
    """
    preprocessed = Path(os.environ.get(PREPROCESSED, "")) / source.name
    file = next((f / "splits_final.json" for f in (source, preprocessed) if (f / "splits_final.json").is_file()), None)
    if file is None:
        return None
    folds = splits.read_folds(file, cases)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one patient only
        if folds in (splits.make_splits(cases), splits.make_splits(cases, patient_of)):
            return None
    chosen = set(kept)
    hidden = [case for case in cases if case not in chosen]
    new = []
    for number, fold in enumerate(folds):
        restricted = {key: [case for case in fold[key] if case in chosen] for key in ("train", "val")}
        if empty := [key for key, names in restricted.items() if not names]:
            raise InputError(
                f"{file}: fold {number} would have no case left to {' and '.join(WORDS[key] for key in empty)}; choose "
                f"other or more labelled cases, or give --patient_pattern for new folds (REGEX '.+': every case is a "
                f"patient)"
            )
        if "unlabeled" in fold:
            restricted["unlabeled"] = sorted({*fold["unlabeled"], *hidden})
        new.append(restricted)
    return new
