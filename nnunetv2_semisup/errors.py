"""The exceptions that this package raises on purpose."""


class InputError(SystemExit, ValueError):
    """Something the user gave is wrong: a file, a folder, a setting.

    The message names what is wrong and what to do, in one line. It is a ``ValueError`` for whoever calls us from
    Python, and a ``SystemExit`` for whoever typed a command: Python then prints the message alone and exits with a code
    that is not 0. That matters because ``nnUNetv2_train`` is not ours, so we cannot catch errors around it.
    """


class UnknownTrainer(InputError, RuntimeError):
    """nnU-Net's search would end without the trainer; nnU-Net's own error is a ``RuntimeError``, so this is one too."""


class TrainingFailed(RuntimeError):
    """Training met a value that is not finite, or a case that cannot be read, and stopped."""
