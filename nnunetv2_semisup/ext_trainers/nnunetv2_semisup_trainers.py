"""The one module that nnU-Net's trainer search reads: everything it offers lives in ``nnunetv2_semisup.trainers``."""

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
            if not name.startswith("_"):
                discovery.refuse_near_miss(name)
            raise
