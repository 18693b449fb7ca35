"""What is to be run, as data: a list of blocks, each a product of data sets, trainers, lengths and seeds.

- datasets: [704, 714]      # one labelled subset = one data set
  trainers: [nnUNetTrainer, nnUNetTrainerCrossMatch]
  epochs: 5
  seeds: [0, 1, 2]
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from nnunetv2_semisup.errors import InputError

BASELINE = "nnUNetTrainer"
INFERENCES = ("nnunet", "literature")
_REQUIRED = object()
_AXES = {  # key -> (type, default); every key takes one value or a list
    "datasets": (str, _REQUIRED),
    "seeds": (int, 0),
    "trainers": (str, _REQUIRED),
    "epochs": (int, _REQUIRED),
    "configuration": (str, "3d_fullres"),
    "plans": (str, "nnUNetPlans"),
    "fold": (str, "all"),
}


@dataclass(frozen=True)
class Run:
    """One training and its predictions of the test images.

    Attributes:
        dataset: full name, ``DatasetXXX_Name``; it stands for the labelled budget and the labelled subset.
        trainer: without epoch suffix.
        seed: of the process, so of the initial weights; exact repetition needs ``nnUNet_n_proc_DA=0``.
        fold: ``all`` or a number.
        inference: what to predict with, each gives one row of results; training is shared.
    """

    dataset: str
    seed: int
    trainer: str
    epochs: int
    configuration: str
    plans: str
    fold: str
    inference: tuple[str, ...]

    @property
    def trainer_name(self) -> str:
        """The name nnU-Net knows, e.g. ``nnUNetTrainer_5epochs``."""
        if self.trainer == BASELINE and self.epochs == 1000:
            return self.trainer  # nnU-Net's default length has no class of its own
        return f"{self.trainer}_1epoch" if self.epochs == 1 else f"{self.trainer}_{self.epochs}epochs"

    @property
    def family(self) -> str:
        return family(self.dataset)

    @property
    def id(self) -> str:
        """Name of the run's files; all axes but the inference."""
        model = f"{self.trainer_name}__{self.plans}__{self.configuration}"
        return f"{self.dataset}__{model}__fold_{self.fold}__seed{self.seed}"


def family(dataset: str) -> str:
    """The name without number: data sets that differ in their labelled cases alone share it."""
    return dataset.split("_", 1)[1]


def read(file: Path) -> list[dict]:
    """The blocks of a YAML file, not yet checked."""
    try:
        import yaml
    except ModuleNotFoundError:
        raise InputError('reading a grid needs PyYAML: pip install "nnunetv2-semisup[bench]"') from None
    try:
        blocks = yaml.load(file.read_text(encoding="utf-8"), yaml.BaseLoader)  # all text: 027 is no octal number
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks) or not blocks:
        raise InputError(f'{file}: expected a list of blocks, the first line like "- datasets: [508]"')
    return blocks


def expand(blocks: list[dict], full_name: Callable[[str], str], where: str) -> list[Run]:
    """All runs of ``blocks`` in the order in which they should run, each once.

    Args:
        blocks: key -> one value or a list of values.
        full_name: data set as given (``504`` or ``Dataset504_LA``) -> full name.
        where: what to name in an error.

    Raises:
        InputError: unknown or missing key, wrong type, or what ``full_name`` raises.
    """
    runs: dict[str, Run] = {}
    for number, block in enumerate(blocks, 1):
        axes = _axes(block, f"{where}, block {number}")
        inference = axes.pop("inference")
        names = dict.fromkeys(full_name(dataset) for dataset in axes.pop("datasets"))
        for values in product(names, *axes.values(), [inference]):
            run = Run(*values)
            if run.id in runs:  # two blocks that overlap
                both = dict.fromkeys((*runs[run.id].inference, *inference))
                run = dataclasses.replace(run, inference=tuple(both))
            runs[run.id] = run
    return list(runs.values())


def _axes(block: dict, where: str) -> dict[str, tuple]:
    """The block with defaults, every value a tuple, in the order of :class:`Run`'s fields."""
    if unknown := sorted(set(map(str, block)) - {*_AXES, "inference"}):
        raise InputError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join((*_AXES, 'inference'))}")
    axes = {}
    for key, (kind, default) in _AXES.items():
        if key not in block and default is _REQUIRED:
            raise InputError(f"{where}: {key} is missing")
        values = block.get(key, default)
        axes[key] = tuple(_checked(v, kind, f"{where}: {key}") for v in _listed(values, f"{where}: {key}"))
    if bad := [n for n in axes["epochs"] if n < 1]:
        raise InputError(f"{where}: epochs: {bad[0]} is less than 1")
    if bad := [n for n in axes["seeds"] if n < 0]:
        raise InputError(f"{where}: seeds: {bad[0]} is negative")
    if bad := [f for f in axes["fold"] if not re.fullmatch(r"all|\d+", f)]:
        raise InputError(f'{where}: fold: {bad[0]!r} is neither "all" nor a number')
    if bad := [t for t in axes["trainers"] if re.search(r"_\d+epochs?$", t)]:
        raise InputError(f"{where}: trainers: give {bad[0]} without its suffix, the length is the key epochs")
    inference = tuple(_listed(block.get("inference", INFERENCES[0]), f"{where}: inference"))
    if bad := [i for i in inference if i not in INFERENCES]:
        raise InputError(f"{where}: inference: {bad[0]!r} is none of {', '.join(INFERENCES)}")
    return {**axes, "inference": inference}


def _listed(values, where: str) -> list:
    values = values if isinstance(values, list) else [values]
    if nested := [value for value in values if isinstance(value, (list, dict))]:
        raise InputError(f"{where}: {nested[0]} is not a single value")
    if not values:
        raise InputError(f"{where}: the list is empty")
    return list(dict.fromkeys(values))


def _checked(value, kind: type, where: str):
    if kind is str and type(value) in (str, int) and value != "":
        return str(value)
    if kind is int and re.fullmatch(r"[+-]?\d+", str(value)):
        return int(value)
    raise InputError(f"{where}: {value!r} is not {'a whole number' if kind is int else 'a name'}")
