"""No worker outlives the process that started it, however that ends."""

import errno
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from nnunetv2_semisup.data import jobs
from nnunetv2_semisup.errors import InputError

ROOT = Path(jobs.__file__).parents[2]
SCRIPT = """
import os, sys, time
from pathlib import Path

FOLDER = Path(sys.argv[1])

def hang(number):
    (FOLDER / f"{os.getpid()}.pid").touch()
    time.sleep(60)

if __name__ == "__main__":
    from nnunetv2_semisup.data.jobs import run_jobs

    try:
        run_jobs(hang, [0, 1], 2, "Hanging")
    finally:
        alive = [name for name in FOLDER.glob("*.pid") if Path("/proc", name.stem).exists()]
        (FOLDER / "released").write_text(f"{len(alive)} alive")
"""


@pytest.mark.parametrize(("error", "raised"), [
    (OSError("handle is closed"), InputError), (OSError(errno.EMFILE, "Too many open files"), OSError),
])  # fmt: skip
def test_a_worker_that_dies_while_another_is_started(error, raised, monkeypatch):
    """multiprocessing closes the pipes that the new one is about to get."""

    def fail(*_):
        raise error

    monkeypatch.setattr(ProcessPoolExecutor, "_adjust_process_count", fail)
    with pytest.raises(raised, match="a worker process died|Too many open files"):
        jobs.run_jobs(abs, [1, 2], 2, "Trying")


@pytest.mark.parametrize("processes", [1, 2])
def test_progress_is_told_where_stderr_is_no_terminal(processes, monkeypatch, capsys):
    assert jobs.run_jobs(abs, [-1, -2], processes, "Counting") == [1, 2]
    assert capsys.readouterr().err == ""  # quick work is not worth a line
    monkeypatch.setattr(jobs, "LINE_EVERY", 0)
    assert jobs.run_jobs(abs, [-1, -2], processes, "Counting") == [1, 2]
    assert capsys.readouterr().err == "Counting: 1 of 2 cases\nCounting: 2 of 2 cases\n"


def is_alive(worker: int) -> bool:
    try:
        return Path(f"/proc/{worker}/stat").read_text(encoding="utf-8").split(") ")[1][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("end", ["killed", "interrupted twice"])
def test_workers_end_with_their_parent(end, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    workers = [int(file.stem) for file in tmp_path.glob("*.pid")]
    if end == "killed":
        parent.kill()
    else:
        os.killpg(parent.pid, signal.SIGINT)
        time.sleep(0.05)
        os.killpg(parent.pid, signal.SIGINT)
    parent.wait(timeout=30)
    wait_until(lambda: not any(map(is_alive, workers)))
    if end != "killed":
        assert (tmp_path / "released").read_text() == "0 alive"
