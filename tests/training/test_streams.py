"""Workers of the two streams."""

import multiprocessing
import os
import signal
from time import monotonic, sleep
from types import SimpleNamespace

import numpy as np
import pytest

from nnunetv2_semisup.training import streams


class Batches:
    """A loader without data."""

    def __init__(self, busy: float):
        self.busy = busy
        self._data = SimpleNamespace(identifiers=[])

    def set_thread_id(self, thread_id: int) -> None:
        self.thread_id = thread_id

    def __next__(self) -> dict:
        sleep(self.busy)
        return {"data": np.zeros(1)}


def _train(connection, busy: float, workers: int) -> None:
    augmenters = [streams.start_augmenter(Batches(busy), workers, 2, None, False) for _ in range(2)]
    connection.send([process.pid for augmenter in augmenters for process in augmenter._processes])
    sleep(60)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.robustness
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at processes in /proc")
@pytest.mark.parametrize(("busy", "workers"), [(0.0, 1), (0.0, 3), (0.2, 2)])
def test_training_killed__its_loader_workers_end(busy, workers):
    """Input: kill -9 of a training. Answer: its loader workers end within seconds, idle or busy, one or several."""
    ours, theirs = multiprocessing.Pipe()
    training = multiprocessing.Process(target=_train, args=(theirs, busy, workers))
    training.start()
    assert ours.poll(30)
    pids = ours.recv()
    os.kill(training.pid, signal.SIGKILL)
    training.join()
    end = monotonic() + 8
    while any(map(_runs, pids)) and monotonic() < end:
        sleep(0.1)
    left = [pid for pid in pids if _runs(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert len(pids) == 2 * workers
    assert not left
