"""The benchmark's work folder: where every file of a run lies, the finished runs' records, and tables made from them.

A record is written when the training is complete, and again after each inference; what is not recorded is not done.
"""

from __future__ import annotations

import csv
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

from nnunetv2_semisup import __version__, files
from nnunetv2_semisup.benchmark.grid import Run
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.evaluation.metrics import METRICS
from nnunetv2_semisup.evaluation.summary import COLUMNS, summarize
from nnunetv2_semisup.files import read_json, write_json

FORMAT = 1
RECORD_KEYS = {"run", "dataset", "labeled", "trainer", "seed", "versions", "train_seconds", "evaluations"}


@dataclass(frozen=True)
class WorkFolder:
    """Paths below ``root``. nnU-Net has one results folder per seed, since its model folders do not name seeds."""

    root: Path

    def nnunet_results(self, run: Run) -> Path:
        return self.root / f"seed{run.seed}"

    def model(self, run: Run, plans_name: str) -> Path:
        name = f"{run.trainer_name}__{plans_name}__{run.configuration}"
        return self.nnunet_results(run) / run.dataset / name

    def predictions(self, run: Run) -> Path:
        return self.root / "predictions" / run.id

    def record(self, run: Run) -> Path:
        return self.root / "runs" / f"{run.id}.json"

    def failure(self, run: Run) -> Path:
        return self.root / "failed" / f"{run.id}.json"

    def unfinished(self, run: Run) -> Path:
        """Folder of what a training needs to go on; gone when it is recorded."""
        return self.root / "unfinished" / run.id

    def checkpoint(self, run: Run) -> Path:
        """Of the last whole epoch."""
        return self.unfinished(run) / "checkpoint.pth"

    def submitted(self, run: Run) -> Path:
        return self.root / "submitted" / f"{run.id}.json"

    def log(self, run: Run) -> Path:
        return self.root / "logs" / f"{run.id}.log"

    def lock(self, run: Run) -> Path:
        return self.root / "locks" / f"{run.id}.lock"

    def missing(self, run: Run) -> list[str]:
        """The inferences of ``run`` that have no result yet."""
        record = self.read(run)
        return [i for i in run.inference if record is None or i not in record["evaluations"]]

    def read(self, run: Run) -> dict | None:
        """The record of ``run``, or None."""
        file = self.record(run)
        return _read_record(file) if file.is_file() else None

    def all_records(self) -> list[dict]:
        files = sorted((self.root / "runs").glob("*.json"))
        return [_read_record(file) for file in files]


def _read_record(file: Path) -> dict:
    remedy = "remove it, and the run is repeated"
    record = read_json(file, remedy)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise InputError(f"{file} is no record of this version: {remedy}")
    if missing := sorted(RECORD_KEYS - set(record)):
        raise InputError(f"{file} is damaged, it has no {missing[0]!r}: {remedy}")
    return record


def write(file: Path, content: dict) -> None:
    """As :func:`write_json`, making the folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, content)


def wall_seconds(record: dict) -> float:
    """Time that training and all inferences took, without starting Python."""
    return record["train_seconds"] + sum(
        part["predict_seconds"] + part["evaluate_seconds"] for part in record["evaluations"].values()
    )


def commit() -> str:
    """Commit of the checkout that this package is imported from, ``+`` behind it if the package differs from it.

    Empty where there is no git checkout: then the version tells.
    """
    package = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not git("ls-files", "__init__.py"):  # installed into someone else's checkout
            return ""
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def versions() -> dict[str, str]:
    """Name -> version of what the numbers depend on."""
    packages = ("nnunetv2", "torch", "numpy", "batchgeneratorsv2")
    own = {"python": platform.python_version(), "nnunetv2_semisup": __version__}
    return own | {name: version(name) for name in packages}


def versions_text(numbers: dict[str, str]) -> str:
    return "; ".join(f"{name} {number}" for name, number in numbers.items())


def hardware(device: str) -> str:
    """Name of the GPU, or of the processor with its number of cores."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else name
    return f"{name}, {os.cpu_count()} cores"


# --------------------------------------------------------------------------------------------------------- as tables

CASE_COLUMNS = ("inference", *COLUMNS)
RUN_COLUMNS = (
    *("run", "dataset", "labeled", "trainer", "epochs", "steps", "resumed", "seed", "fold", "configuration", "plans"),
    *("inference", "postprocessing", *METRICS, "failures"),
    *(
        "seconds_per_step",
        "peak_memory_mb",
        "train_seconds",
        "wall_seconds",
        "device",
        "hardware",
        "threads",
        "loader_processes",
    ),
    *("started", "commit", "versions"),
)


def collect(work: WorkFolder, results: Path) -> int:
    """Write ``runs.csv``, ``cases/<run>.csv`` and ``curves/<run>.csv`` in ``results`` from all records of ``work``.

    Rows of other runs that are there already, made on another machine perhaps, stay. Returns the number of runs now in
    the table.
    """
    results.mkdir(parents=True, exist_ok=True)
    work.root.mkdir(parents=True, exist_ok=True)
    with FileLock(str(work.root / "results.lock")):  # two runners may finish at once
        finished = {record["run"]: record for record in work.all_records() if record["evaluations"]}
        rows = [row for row in _earlier_rows(results / "runs.csv") if row["run"] not in finished]
        for record in finished.values():
            rows += run_rows(record)
            cases = [
                {"inference": inference, **case}
                for inference, part in record["evaluations"].items()
                for case in part["cases"]
            ]
            write_csv(results / "cases" / f"{record['run']}.csv", CASE_COLUMNS, cases)
            if curve := record.get("curve"):  # not in records of earlier versions
                columns = list(dict.fromkeys(key for row in curve for key in row))
                write_csv(results / "curves" / f"{record['run']}.csv", columns, curve)
        rows.sort(key=lambda row: (row["run"], row["inference"], row["postprocessing"] != "none"))
        write_csv(results / "runs.csv", RUN_COLUMNS, rows)
    return len({row["run"] for row in rows})


def _earlier_rows(file: Path) -> list[dict]:
    """Rows that must not be lost; a damaged file is refused, as it would be written anew without them."""
    if not file.is_file():
        return []
    try:
        header, rows = file.read_text(encoding="utf-8").split("\n", 1)[0], read_csv(file)
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{file} is damaged ({error}): bring it back from git, or remove it") from None
    if header != ",".join(RUN_COLUMNS) or any(None in row or None in row.values() for row in rows):
        raise InputError(f"{file} is damaged: bring it back from git, or remove it")
    return rows


def run_rows(record: dict) -> list[dict]:
    """One row of ``runs.csv`` per inference and post-processing; metrics are means over cases and labels."""
    versions = versions_text(record["versions"])
    rows = []
    for inference, part in record["evaluations"].items():
        cases = [{k: math.nan if v is None else v for k, v in case.items()} for case in part["cases"]]
        for postprocessing, summary in summarize(cases).items():
            means = {metric: summary["over_labels"][metric]["mean"] for metric in METRICS}
            failures = summary["over_labels"]["dice"]["failures"]
            row = {**record, **means, "failures": failures, "versions": versions, "wall_seconds": wall_seconds(record)}
            rows.append({**row, "inference": inference, "postprocessing": postprocessing})
    return rows


def read_csv(file: Path) -> list[dict]:
    """Rows of a table written by :func:`write_csv`, all values as text; none where there is no file."""
    if not file.is_file():
        return []
    with open(file, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def write_csv(file: Path, columns: Sequence[str], rows: Iterable[dict]) -> None:
    """Write ``columns`` of ``rows`` as one whole; floats with 6 decimals, nothing for None and NaN."""

    def text(value) -> object:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        return f"{value:.6f}" if isinstance(value, float) else value

    file.parent.mkdir(parents=True, exist_ok=True)
    files.write_csv(file, columns, ({column: text(row.get(column)) for column in columns} for row in rows))
