"""Stop cleanly on SIGINT (Ctrl-C) and SIGTERM (a cluster's job limit): note the wish, act between two steps."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import Any


class StopRequest:
    """Remembers the first SIGINT or SIGTERM. A second SIGINT (Ctrl-C twice) interrupts at once, as without us.

    A SIGINT after a SIGTERM does not: the processes of a run on several GPUs get both when their parent is terminated.

    Attributes:
        agreed: set by the trainer once every process knows that one of them was asked to stop.
    """

    def __init__(self):
        self.agreed = False
        self._signal: signal.Signals | None = None
        self._previous: dict[int, Any] = {}

    @property
    def wanted(self) -> bool:
        """This process was asked to stop."""
        return self._signal is not None

    @property
    def name(self) -> str:
        """What stopped us, for the log."""
        return self._signal.name if self._signal else "a signal to another process"

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it."""
        return 128 + (self._signal or signal.SIGTERM)

    def listen(self) -> None:
        """Install the handlers; without effect outside the main thread, where Python allows none."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)

    def stop_listening(self) -> None:
        """Put back the handlers that were there before."""
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self._signal is not None:
            if self._signal == number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self._signal = signal.Signals(number)
        # The step in flight may take a while: say at once that the wish was heard. Not with print, which must not be
        # entered twice, and not with an error when nobody reads any more.
        with contextlib.suppress(OSError):
            os.write(1, f"\n{self._signal.name} received: finishing the step, then saving ...\n".encode())
