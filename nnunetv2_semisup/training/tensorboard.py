"""TensorBoard as one of the loggers to which nnU-Net's logger passes on what it logs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nnunetv2_semisup.errors import InputError

FOLDER = "semisup_tensorboard"  # in the fold's folder


def require_tensorboard() -> Any:
    """torch's writer of events; an InputError where the package tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            f"setting tensorboard = true, but TensorBoard cannot be imported ({error}): pip install tensorboard, or "
            f"leave the setting at false"
        ) from error
    return SummaryWriter


class TensorBoardLogger:
    """What nnU-Net expects of an entry of ``logger.loggers``, and pictures. What cannot be written warns once.

    Args:
        output_folder: the fold's.
        epoch: the first that will be logged; what an earlier process logged of it and of later ones is not shown.
        warn: called with one line.
    """

    def __init__(self, output_folder: str, epoch: int, warn: Callable[[str], None]):
        self._warn = warn
        self._failed = False
        self._writer = require_tensorboard()(str(Path(output_folder, FOLDER)), purge_step=epoch, flush_secs=30)

    def log(self, key: str, value: Any, step: int) -> None:
        """A scalar of an epoch. nnU-Net's times of day are left out: a curve of them says nothing."""
        if not key.endswith("_timestamps"):
            self._try(lambda: self._writer.add_scalar(key, value, step))

    def log_picture(self, key: str, file: Path, step: int) -> None:
        """A PNG of an epoch."""
        from matplotlib.image import imread

        self._try(lambda: self._writer.add_image(key, imread(file)[..., :3], step, dataformats="HWC"))

    def update_config(self, config: dict) -> None:
        """nnU-Net's plans and settings: they lie beside the events as files."""

    def log_summary(self, key: str, value: Any) -> None:
        """A value of the whole training."""
        self._try(lambda: self._writer.add_text(key, str(value)))

    def close(self) -> None:
        """Write what is left."""
        self._try(self._writer.close)

    def _try(self, write: Callable[[], None]) -> None:
        if self._failed:  # the writer's thread has ended, each further call would fail too
            return
        try:
            write()
        except Exception as error:
            self._failed = True
            self._warn(f"WARNING: TensorBoard gets nothing more, its events cannot be written: {error}")
