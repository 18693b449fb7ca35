"""The loader's worker processes end with the training, whatever ends it."""

import os
import signal
import subprocess
import sys
import time

import pytest

TRAINING = """
import time
import numpy as np
from batchgenerators.dataloading.data_loader import DataLoader
from nnunetv2_semisup.training import streams

class Loader(DataLoader):
    def generate_train_batch(self):
        time.sleep({seconds})
        return {{"data": np.zeros(3)}}

if __name__ == "__main__":
    augmenters = [streams.start_augmenter(Loader(None, 1), n, 2, None, False) for n in (2, 1)]
    print(*(process.pid for augmenter in augmenters for process in augmenter._processes), flush=True)
    {end}
"""


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks at processes in /proc")
@pytest.mark.parametrize(
    ("number", "seconds", "end"),
    [
        (signal.SIGKILL, 0, "time.sleep(600)"),  # workers wait for room in the queue
        (signal.SIGKILL, 0.2, "time.sleep(600)"),  # workers make a batch
        (None, 0, "import os; os._exit(3)"),  # what an abort in C++ comes to
    ],
)
def test_workers_end_with_a_training_that_could_not_end_them(tmp_path, number, seconds, end):
    """Input: kill -9 of a training, or its crash. Answer: its loader's workers end within seconds."""
    (tmp_path / "training.py").write_text(TRAINING.format(seconds=seconds, end=end))
    training = subprocess.Popen([sys.executable, str(tmp_path / "training.py")], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in training.stdout.readline().split()]
    assert len(workers) == 3
    if number is not None:
        assert all(map(alive, workers))
        time.sleep(0.3)
        training.send_signal(number)
    training.wait(timeout=60)
    deadline = time.time() + 60  # of a busy machine
    while any(map(alive, workers)):
        assert time.time() < deadline, "workers outlive their training"
        time.sleep(0.1)
