"""One file per method. Every ``nnUNetTrainer<Method>`` defined in a module of this package is a trainer of ours.

There is no list to edit: a new file is found by the loop below. ``nnUNetTrainer<Method>_<N>epochs`` exists for any N,
and so does stock nnU-Net's ``nnUNetTrainer_<N>epochs``.
"""

import importlib
import pkgutil

from nnunetv2_semisup.names import split_epochs
from nnunetv2_semisup.trainers import stock
from nnunetv2_semisup.trainers.base import TRAINERS

for _info in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_info.name}")  # its trainer enters itself into TRAINERS
globals().update(TRAINERS)


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
