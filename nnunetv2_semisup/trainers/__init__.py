"""One file per method. Every ``nnUNetTrainer<Method>`` defined in a module of this package is a trainer of ours.

There is no list to edit: a new file is found by the loop below. ``nnUNetTrainer<Method>_<N>epochs`` exists for any N,
and so does stock nnU-Net's ``nnUNetTrainer_<N>epochs``.
"""

import importlib
import inspect
import pkgutil
import re

from nnunetv2_semisup.trainers import stock
from nnunetv2_semisup.trainers.base import nnUNetTrainerSemiSup

TRAINERS: dict[str, type[nnUNetTrainerSemiSup]] = {}

for _info in pkgutil.iter_modules(__path__):
    _module = importlib.import_module(f"{__name__}.{_info.name}")
    for _name, _class in inspect.getmembers(_module, inspect.isclass):
        if _class.__module__ == _module.__name__ and getattr(_class, "method_class", None) is not None:
            TRAINERS[_name] = globals()[_name] = _class


def split_epochs(name: str) -> tuple[str, int | None]:
    """``nnUNetTrainerX_20epochs`` -> ``("nnUNetTrainerX", 20)``; no suffix -> ``(name, None)``.

    As in nnU-Net the singular belongs to 1 alone: ``_1epoch``, ``_20epochs``.
    """
    match = re.fullmatch(r"(\w+?)_(1epoch|([2-9]|[1-9]\d+)epochs)", name)
    return (match[1], int(match[3] or 1)) if match else (name, None)


def __getattr__(name: str):
    """Create ``nnUNetTrainer<Method>_<N>epochs`` once; an attribute from then on, so that it pickles by name."""
    stem, epochs = split_epochs(name)
    if epochs is not None and stem in TRAINERS:
        trainer = type(name, (TRAINERS[stem],), {"__module__": __name__, "epochs_of_name": epochs})
    elif epochs is not None and stem == "nnUNetTrainer":
        trainer = stock.of_length(name, epochs, __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = trainer
    return trainer
