"""The runner's own command on a real Slurm: a cluster of this one machine, started and shut down by a fixture."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from nnunetv2_semisup.benchmark import records

from .conftest import make_run

DAEMONS = ("munged", "slurmctld", "slurmd")
OURS, STOCK = "nnUNetTrainerMeanTeacher", "nnUNetTrainer"
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
KillWait=20
OverTimeLimit=0
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=tiny Nodes=ALL Default=YES State=UP
"""


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_for(condition: Callable, what: str, seconds: float = 300):
    """The first true value of ``condition()``."""
    end = time.time() + seconds
    while not (value := condition()):
        assert time.time() < end, f"waited {seconds:.0f} s in vain: {what}"
        time.sleep(0.05)
    return value


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Path]:
    """A Slurm of one node with two CPUs, partition ``tiny``, without accounting; yields its folder."""
    missing = [name for name in DAEMONS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge")
    if os.getuid() != 0:
        pytest.skip("slurmd starts jobs as other users, so it runs as root only")
    folder = tmp_path_factory.mktemp("slurm")
    host = socket.gethostname().split(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    (folder / "slurm.conf").write_text(CONFIGURATION.format(host=host, folder=folder, ports=free_ports(2)))
    munged = ("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key")
    munged += (f"--log-file={folder}/munged.log", f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/seed")
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        stack.enter_context(daemon(*munged, log=folder / "munged.txt"))
        wait_for(lambda: (folder / "munge.socket").exists(), "munged", 30)
        stack.enter_context(daemon("slurmctld", "-D", "-i", log=folder / "slurmctld.txt"))
        stack.enter_context(daemon("slurmd", "-D", log=folder / "slurmd.txt"))
        sinfo = ("sinfo", "--noheader", "--format=%t")
        wait_for(lambda: "idle" in subprocess.run(sinfo, capture_output=True, text=True).stdout, "an idle node", 60)
        yield folder
        subprocess.run(["scancel", "--state=PENDING", "--partition=tiny"], check=False)
        subprocess.run(["scancel", "--signal=KILL", "--full", "--partition=tiny"], check=False)
        subprocess.run(["scancel", "--partition=tiny"], check=False)
        wait_for(lambda: not output("squeue", "--noheader"), "no job left", 120)


@contextlib.contextmanager
def daemon(*command: str, log: Path) -> Iterator[None]:
    """A daemon in the foreground of a process of its own, ended with the block."""
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Grid:
    """One grid of tiny runs and its work folder, for the runner's command."""

    def __init__(self, dataset, work: Path, *options: str):
        self.work = records.WorkFolder(work)
        self.options = ("-d", "901", *options, "-device", "cpu", "--threads", "1", "-o", str(work))
        loading = {"nnUNet_n_proc_DA": "1"}  # workers get a job's signals, too
        self.environment = os.environ | dataset.variables(dataset.root / "results") | loading

    def command(self, *more: str) -> subprocess.CompletedProcess:
        start = "import sys; from nnunetv2_semisup.cli import benchmark; sys.exit(benchmark())"
        command = [sys.executable, "-W", "ignore", "-c", start, *self.options, *more]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True)

    def submit(self, *parameters: str) -> dict[str, str]:
        """Run's id -> job's number of what was submitted."""
        done = self.command("--slurm", "slurm_partition=tiny", "cpus_per_task=1", *parameters)
        assert done.returncode == 0, done.stdout + done.stderr
        return {line.split()[1]: line.split()[0] for line in done.stdout.splitlines() if line[0].isdigit()}

    def report(self) -> list[dict]:
        done = self.command("--report")
        assert done.returncode == 0, done.stdout + done.stderr
        return records.read_csv(self.work.root / "results" / "runs.csv")

    def processes(self) -> list[int]:
        """The workers of this grid and their children."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (folder / "cmdline").read_bytes().decode(errors="replace")
                if "benchmark.worker" in words and f'"{self.work.root}"' in words:
                    found.append(int(folder.name))
        return found

    def freeze(self, one) -> None:
        """Stop a run's worker as soon as an epoch is saved: then the job's end comes before the training's.

        Slurm lets stopped processes go on before it sends them anything else.
        """
        wait_for(self.work.checkpoint(one).is_file, f"an epoch of {one.id}")
        for pid in self.processes():
            with contextlib.suppress(OSError):
                if f'"trainer": "{one.trainer}"' in Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8"):
                    os.kill(pid, signal.SIGSTOP)
        assert not self.work.record(one).exists(), "frozen too late"

    def log(self, one) -> str:
        log = self.work.log(one)
        return log.read_text(encoding="utf-8") if log.exists() else "no log yet"

    def attempts(self, one) -> list[list[int]]:
        """The epochs that began, one list for every start of the run that came so far."""
        epochs = []
        for attempt in self.log(one).split("\n===== ")[1:]:
            numbers = [line.rsplit(" ", 1)[1] for line in attempt.splitlines() if ": Epoch " in line]
            epochs.append([int(number) for number in numbers if number.isdecimal()])
        return [numbers for numbers in epochs if numbers]

    def epoch_saved(self, one) -> int:
        return torch.load(self.work.checkpoint(one), weights_only=False)["current_epoch"]


def no_jobs() -> bool:
    return not output("squeue", "--noheader")


@pytest.mark.slow
def test_one_clear_error_for_a_partition_that_is_not_there(slurm, benchmark_data, tmp_path):
    grid = Grid(benchmark_data, tmp_path / "work", "-tr", STOCK, "--epochs", "1", "--seeds", "0", "1")
    for parameters, words in (
        (("slurm_partition=nowhere", "timeout_min=5"), ("--slurm", "invalid partition specified: nowhere")),
        (("timeout_min=1:30",), ("--slurm", "timeout_min", "1:30")),
    ):
        done = grid.command("--slurm", *parameters)
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        assert done.returncode == 2 and len(lines) == 1, done.stderr
        assert all(word in lines[0] for word in words)
    assert no_jobs() and not list(tmp_path.glob("work/submitted/*"))


@pytest.mark.slow
def test_time_limit_and_scancel_lose_no_epoch(slurm, benchmark_data, tmp_path):
    """Two runs in one grid meet their time limit, are submitted again, one is cancelled; then both are complete."""
    benchmark_data.edit_plans(lambda plans: plans["semisup"][OURS].update(num_iterations_per_epoch=10))
    grid = Grid(benchmark_data, tmp_path / "work", "-tr", OURS, STOCK, "--epochs", "3")
    steps = {OURS: 10, STOCK: 250}
    ours, stock = (make_run(dataset="Dataset901_Tiny", plans="nnUNetPlans", epochs=3, trainer=t) for t in steps)
    both = (ours, stock)

    with ThreadPoolExecutor() as pool:
        frozen = [pool.submit(grid.freeze, one) for one in both]
        jobs = grid.submit("timeout_min=10")  # of more, submitit takes a signal in the first minutes for preemption
        for one in frozen:
            one.result()
    assert set(jobs) == {one.id for one in both}
    assert set(output("squeue", "--noheader", "--format=%l").split()) == {"10:00"}
    again = grid.command("--slurm", "slurm_partition=tiny", "timeout_min=10")
    assert again.returncode == 0 and again.stdout.count("in the queue, not submitted again") == 2, again.stdout

    # the time limit, brought forward: submitit's signal is due 90 s before it
    for one in both:
        minutes = int(output("squeue", "--noheader", "--format=%M", f"--jobs={jobs[one.id]}").split(":")[-2])
        output("scontrol", "update", f"JobId={jobs[one.id]}", f"TimeLimit={minutes + 2}")
    wait_for(no_jobs, "the time limit", 200)
    wait_for(lambda: not grid.processes(), "the end of the jobs' processes", 60)
    saved = {one: grid.epoch_saved(one) for one in both}
    for one in both:
        assert 1 <= saved[one] < 3 and not grid.work.record(one).exists()
        assert not grid.work.failure(one).exists(), "a time limit is no failure of the run"
        [file] = (tmp_path / "work/slurm").glob(f"{jobs[one.id]}_*.out")
        assert "this job is timed-out" in file.read_text()

    # the same command submits both again; one is cancelled once it goes on
    begun = len(grid.attempts(stock))
    jobs = grid.submit("timeout_min=20")
    assert set(jobs) == {one.id for one in both}
    wait_for(lambda: len(grid.attempts(stock)) > begun, "stock goes on")
    output("scancel", jobs[stock.id])
    wait_for(no_jobs, "the end of the jobs", 600)
    wait_for(lambda: not grid.processes(), "the end of the jobs' processes", 60)
    assert grid.work.record(ours).exists() and not grid.work.record(stock).exists(), grid.log(ours)[-2000:]
    assert not grid.work.failure(stock).exists(), "cancelling is no failure of the run"

    jobs = grid.submit("timeout_min=20")
    assert set(jobs) == {stock.id}, "what is finished is not submitted"
    wait_for(no_jobs, "the end of the job", 600)

    for one, resumed in ((ours, 1), (stock, 2)):
        record = json.loads(grid.work.record(one).read_text())
        assert record["resumed"] == resumed and record["steps"] == 3 * steps[one.trainer]
        assert [row["epoch"] for row in record["curve"]] == [0, 1, 2]
        assert "nnunet" in record["evaluations"] and not grid.work.failure(one).exists()
        attempts = grid.attempts(one)
        assert attempts[0][0] == 0 and attempts[1][0] == saved[one], "it went on after the last whole epoch"
        assert attempts[-1][-1] == 2 and len(attempts) == resumed + 1
        assert len(list(grid.work.model(one, "nnUNetPlans").glob("fold_*/checkpoint_final.pth"))) == 1
    assert len(list(grid.work.root.glob("runs/*"))) == 2
    assert not list(grid.work.root.rglob("*.tmp")) and not list(grid.work.root.glob("unfinished/*"))
    assert {row["run"] for row in grid.report()} == {one.id for one in both}
    assert grid.submit("timeout_min=20") == {} and no_jobs(), "nothing is left to submit"
