"""The one module that nnU-Net's trainer search reads: everything it offers lives in ``nnunetv2_semisup.trainers``."""

import sys

try:
    from nnunetv2_semisup import discovery, trainers
except ModuleNotFoundError as error:
    # A Python of another environment inherited nnUNet_extTrainer: there is nothing of ours for it.
    if error.name != "nnunetv2_semisup":
        raise
else:
    globals().update(trainers.TRAINERS)

    def __getattr__(name: str):
        """``nnUNetTrainer<Method>_<N>epochs`` for any N; a near miss is answered with the name that was meant."""
        try:
            return getattr(trainers, name)
        except AttributeError:
            near = discovery.nearest(name) if name.startswith("nnUNetTrainer") else None
            if near:
                print(f"nnunetv2_semisup has no trainer {name!r}. Did you mean {near}?", file=sys.stderr)
            raise
