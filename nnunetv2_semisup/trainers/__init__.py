"""One file per method. Every ``nnUNetTrainer<Method>`` defined in a module of this package is a trainer of ours.

There is no list to edit: a new file is found by the loop below. ``nnUNetTrainer<Method>_<N>epochs`` exists for any N.
"""

import importlib
import pkgutil

from nnunetv2_semisup.names import split_epochs
from nnunetv2_semisup.trainers.base import TRAINERS

for _info in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_info.name}")  # its trainer enters itself into TRAINERS
globals().update(TRAINERS)


def __getattr__(name: str):
    """Create ``nnUNetTrainer<Method>_<N>epochs`` once; an attribute from then on, so that it pickles by name."""
    stem, epochs = split_epochs(name)
    if epochs is None or stem not in TRAINERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    trainer = type(name, (TRAINERS[stem],), {"__module__": __name__, "epochs_of_name": epochs})
    globals()[name] = trainer
    return trainer
