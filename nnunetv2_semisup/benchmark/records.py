"""The benchmark's work folder: where every file of a run lies, and the finished runs' records.

A record is written when the training is complete, and again after each inference; what is not recorded is not done.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from nnunetv2_semisup.benchmark.grid import Run
from nnunetv2_semisup.data.folders import read_json, write_json

FORMAT = 1


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
        return read_json(file, "remove it, and the run is repeated") if file.is_file() else None

    def all_records(self) -> list[dict]:
        files = sorted((self.root / "runs").glob("*.json"))
        return [read_json(file, "remove it, and the run is repeated") for file in files]


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
    packages = ("nnunetv2_semisup", "nnunetv2", "torch", "numpy", "batchgeneratorsv2")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


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
