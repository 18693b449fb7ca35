"""A real runner, killed with ``kill -9`` at three random moments and started again, ends with the same rows."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nnunetv2_semisup.benchmark import records

TRAINER = "nnUNetTrainerMeanTeacher"
MEASURED = (
    "seconds_per_step",
    "peak_memory_mb",
    "train_seconds",
    "wall_seconds",
    "started",
)  # differ between equal runs


def start(dataset, work: Path) -> subprocess.Popen:
    variables = dataset.variables(dataset.root / "results")  # nnUNet_n_proc_DA=0 (conftest): values repeat exactly
    command = "import sys; from nnunetv2_semisup.cli import benchmark; sys.exit(benchmark())"
    options = ("-d", "901", "-tr", TRAINER, "--epochs", "1", "--seeds", "0", "1", "-device", "cpu", "--threads", "1")
    with open(dataset.root / f"{work.name}.txt", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", command, *options, "-o", str(work)],
            env=os.environ | variables,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def rows(work: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in records.read_csv(work / "results/runs.csv")]


def texts(work: Path) -> dict[str, str]:
    """Files of ``cases`` and ``curves``."""
    return {f"{file.parent.name}/{file.name}": file.read_text() for file in work.glob("results/c*/*.csv")}


def children(pid: int) -> list[int]:
    found = []
    for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()):
        found += [child, *children(child)]
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks at processes in /proc")
@pytest.mark.slow
def test_killed_three_times_and_restarted(benchmark_data, tmp_path, monkeypatch):
    assert os.environ["nnUNet_n_proc_DA"] == "0"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    begin = time.time()
    assert start(benchmark_data, whole).wait(timeout=600) == 0, (tmp_path / "data" / "whole.txt").read_text()
    duration = time.time() - begin

    seed = random.randrange(10**6)
    print(f"random seed {seed}, uninterrupted {duration:.1f} s")  # shown where the test fails
    moments = random.Random(seed)
    for _ in range(3):
        runner = start(benchmark_data, killed)
        time.sleep(moments.uniform(0.2, 0.7) * duration)
        started = children(runner.pid) if runner.poll() is None else []
        runner.kill()
        runner.wait()
        deadline = time.time() + 60
        while any(map(alive, started)):
            assert time.time() < deadline, "a killed runner's processes end with it"
            time.sleep(0.1)
    assert start(benchmark_data, killed).wait(timeout=600) == 0, (tmp_path / "data" / "killed.txt").read_text()

    assert len(rows(whole)) == 4  # two seeds, with and without the largest component
    assert rows(killed) == rows(whole)
    assert texts(killed) == texts(whole) and len(texts(whole)) == 4
    curve = records.read_csv(next(whole.glob("results/curves/*seed0.csv")))
    assert len(curve) == 1 and float(curve[0]["train_loss"]) == pytest.approx(float(curve[0]["loss_supervised"]), 1e-4)
    dice = {row["seed"]: row["dice"] for row in rows(whole)}
    assert dice["0"] != dice["1"], "seeds differ, or equal rows would mean nothing"
    assert not list(killed.rglob("*.tmp"))
