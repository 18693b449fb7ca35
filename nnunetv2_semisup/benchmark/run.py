"""Work through a grid: one process per run, finished runs skipped, a failing run does not stop the others."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from statistics import mean, median
from time import perf_counter

from nnunetv2_semisup import discovery, settings
from nnunetv2_semisup.benchmark import records, worker
from nnunetv2_semisup.benchmark.grid import BASELINE, Run, family
from nnunetv2_semisup.benchmark.records import WorkFolder
from nnunetv2_semisup.data.folders import read_dataset_json
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.files import listed, read_object, require_preprocessed
from nnunetv2_semisup.settings import SemiSupSettings

WORKER = (sys.executable, "-u", "-m", "nnunetv2_semisup.benchmark.worker")
SECONDS_TO_END = 10  # between SIGTERM and SIGKILL


@dataclass(frozen=True)
class Options:
    """How runs are executed: ``device`` as nnU-Net takes it; ``threads`` of torch on the CPU, None for all cores."""

    device: str = "cuda"
    threads: int | None = None


def run_grid(runs: list[Run], work: WorkFolder, results: Path, options: Options) -> int:
    """Do all runs that have no complete record yet, and keep the tables in ``results``. Returns how many failed."""
    records.collect(work, results)
    todo = [run for run in runs if work.missing(run)]
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them finished before. Work folder: {work.root}", flush=True)
    failed, busy = [], 0
    for number, run in enumerate(todo, 1):
        print(f"[{number}/{len(todo)}] {run.id}{_time_left(todo[number - 1 :], work)}", flush=True)
        if not work.missing(run):
            print("    finished by another process meanwhile", flush=True)
            continue
        start = perf_counter()
        code = run_one(run, work, options)
        seconds = perf_counter() - start
        if code == 0 and (record := work.read(run)) is not None:
            try:
                records.collect(work, results)
            except OSError as error:
                print(f"    the tables in {results} could not be written ({error}): --report makes them", flush=True)
            print(f"    done in {readable(seconds)}: {_summary(record)}", flush=True)
        elif code == worker.BUSY:
            busy += 1
            print("    another process is doing this run: skipped", flush=True)
        else:
            failed.append(run)
            note = read_object(work.failure(run), "remove it", "message")
            message = f"{note['message']} (exit code {note['exit_code']}, log {note['log']})"
            print(f"    FAILED after {readable(seconds)}: {message}", flush=True)
    if busy:
        print(f"{busy} runs were being done by another process; the same command shows what became of them.")
    if failed:
        print(f"{len(failed)} runs failed; the same command tries them again. Logs: {work.root / 'logs'}")
    return len(failed)


def dry_run(runs: list[Run], work: WorkFolder, options: Options) -> None:
    """Print every run and what it will take: from finished runs of its kind, else from a few steps timed now."""
    finished = work.all_records()
    measured: dict[tuple, float] = {}
    total = 0.0
    for run in runs:
        seconds, source = 0.0, "finished"
        if work.missing(run):
            expected, source = expected_seconds(run, finished), "as earlier runs"
            if expected is None:
                source = "training alone, from a few steps"
                kind = (run.family, run.plans, run.configuration, run.trainer_name)
                if kind not in measured:
                    measured[kind] = _training_seconds(run, options)
                expected = measured[kind]
            seconds = expected
        total += seconds
        print(f"{run.id}  {readable(seconds) if seconds else '-'}  ({source})", flush=True)
    print(f"{len(runs)} runs, {readable(total)} on one {options.device}. Work folder: {work.root}")


def submit(runs: list[Run], work: WorkFolder, options: Options, parameters: dict, cluster: str = "slurm") -> list:
    """Hand every unfinished run to a cluster as a job of its own; needs submitit. Returns its jobs.

    Args:
        parameters: as submitit's ``AutoExecutor.update_parameters`` takes them, e.g. ``slurm_partition``.
        cluster: submitit's name; ``local`` runs the jobs on this machine.
    """
    try:
        import submitit
    except ModuleNotFoundError:
        raise InputError('--slurm needs submitit: pip install "nnunetv2-semisup[slurm]"') from None
    todo = [run for run in runs if work.missing(run)]
    queued = {run: number for run in todo if (number := _job_in_queue(run, work))}
    for run, number in queued.items():
        print(f"{number}  {run.id}  (in the queue, not submitted again)")
    todo = [run for run in todo if run not in queued]
    if not todo:
        print(f"Nothing to submit: {len(runs) - len(queued)} runs are finished, {len(queued)} in the queue")
        return []
    try:
        executor = submitit.AutoExecutor(folder=work.root / "slurm", cluster=cluster)
        executor.update_parameters(**parameters)
        with contextlib.redirect_stderr(StringIO()) as words:  # of sbatch: its errors come again in the exception
            jobs = executor.map_array(job, todo, [work] * len(todo), [options] * len(todo))
    except (NameError, RuntimeError, AssertionError, TypeError, ValueError) as error:  # submitit's, and sbatch's words
        raise InputError(f"--slurm: {'; '.join(str(error).splitlines())}") from None
    print(words.getvalue(), end="", file=sys.stderr)
    for run, submitted in zip(todo, jobs, strict=True):
        records.write(work.submitted(run), {"job": submitted.job_id, "time": worker.now()})
        print(f"{submitted.job_id}  {run.id}")
    print("When they are done: nnUNetv2_semisup_benchmark --report. The same command submits what is not finished.")
    return jobs


def _job_in_queue(run: Run, work: WorkFolder) -> str | None:
    """The number of the job that ``run`` was submitted as, if it waits or runs."""
    file = work.submitted(run)
    if not file.is_file():
        return None
    number = str(read_object(file, "remove it", "job")["job"])
    command = ["squeue", "--noheader", "--array", "--format=%i", "--states=PENDING,RUNNING,SUSPENDED"]
    command.append(f"--jobs={number.split('_')[0]}")
    with contextlib.suppress(OSError):  # no Slurm here: submitit says so
        waiting = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
        return number if number in waiting else None
    return None


def job(run: Run, work: WorkFolder, options: Options) -> None:
    """One run as a cluster's job; it fails where the run does."""
    code = run_one(run, work, options)
    if code == worker.BUSY:
        print(f"Another process is doing {run.id}: nothing to do", flush=True)
    elif code != 0:
        raise RuntimeError(read_object(work.failure(run), "remove it", "message")["message"])


def run_one(run: Run, work: WorkFolder, options: Options) -> int:
    """Do one run in a process of its own, killed with this one. Returns its exit code and notes a failure."""
    job = {"run": asdict(run), "work": str(work.root), **asdict(options)}
    log = work.log(run)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [*WORKER, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(options),
            start_new_session=True,
        )
        assert process.stdin is not None  # a pipe, see above
        with process.stdin, _ended_with_this_block(process):
            code = process.wait()
    if code == 0 and work.missing(run):
        code = 1  # ended early without an error
    if code not in (0, worker.BUSY):
        note = {"run": run.id, "exit_code": code, "message": last_line(log), "log": str(log), "time": worker.now()}
        records.write(work.failure(run), note)
    return code


def check(runs: list[Run]) -> None:
    """Everything that can be known to fail before hours have passed; unequal numbers of steps are a printed warning.

    Raises:
        InputError: folders, plans, preprocessed data, test cases or a trainer are missing.
    """
    for name in ("nnUNet_raw", "nnUNet_preprocessed"):
        if not os.environ.get(name):
            raise InputError(f"{name} is not set: export {name}=FOLDER, as nnU-Net needs it too")
    for dataset, plans, configuration in dict.fromkeys((r.dataset, r.plans, r.configuration) for r in runs):
        _check_data(dataset, plans, configuration)
    if flat := [run.id for run in runs if "literature" in run.inference and run.configuration.startswith("2d")]:
        raise InputError(f"{flat[0]}: the literature has no sliding window in 2D: leave out inference literature")
    for name in dict.fromkeys(run.trainer_name for run in runs):
        _check_trainer(name)
    for line in (*lengths(runs), *(f"WARNING: {warning}" for warning in unequal_steps(runs))):
        print(line, flush=True)


def lengths(runs: list[Run]) -> list[str]:
    """A line per data set, configuration, plans and fold: epochs and optimiser steps of every trainer, stock first."""
    of_setting: dict[tuple, list[str]] = {}
    for run in sorted(runs, key=lambda run: run.trainer != BASELINE):
        steps = _steps_per_epoch(run)
        text = f"{run.trainer} {run.epochs} x {steps} = {run.epochs * steps:,} steps"
        texts = of_setting.setdefault((run.dataset, run.configuration, f"plans {run.plans}", f"fold {run.fold}"), [])
        if text not in texts:
            texts.append(text)
    return [f"{', '.join(setting)}: {'; '.join(texts)}" for setting, texts in of_setting.items()]


def unequal_steps(runs: list[Run]) -> list[str]:
    """What to say of trainers of ours that take other steps than the stock baseline of their setting.

    Stock nnU-Net's number of steps per epoch is fixed; only ours is a setting, ``num_iterations_per_epoch``.
    """

    def setting(run: Run) -> tuple:
        return (run.dataset, run.plans, run.configuration, run.fold)

    stock: dict[tuple, set[int]] = {}  # epochs
    for run in runs:
        if run.trainer == BASELINE:
            stock.setdefault(setting(run), set()).add(run.epochs)
    warnings = []
    for run in runs:
        if run.trainer not in discovery.trainers() or setting(run) not in stock:
            continue
        where = f"{run.dataset}, {run.configuration}, plans {run.plans}"
        ours, theirs = _steps_per_epoch(run), SemiSupSettings().num_iterations_per_epoch
        if run.epochs not in stock[setting(run)]:
            warnings.append(
                f"{run.trainer} runs {run.epochs} epochs on {where}, stock {BASELINE} does not: they will not be "
                f"compared. Add {BASELINE} with {run.epochs} epochs"
            )
        elif ours != theirs:
            warnings.append(
                f"{run.trainer} takes {run.epochs} x {ours} steps on {where}, stock {BASELINE} {run.epochs} x {theirs}:"
                f" they will not be compared. Remove {run.trainer}.num_iterations_per_epoch from {_plans_file(run)} "
                f"and set the length by epochs"
            )
    return list(dict.fromkeys(warnings))


def _steps_per_epoch(run: Run) -> int:
    trainers = discovery.trainers()
    if run.trainer not in trainers:
        return SemiSupSettings().num_iterations_per_epoch
    plans = read_object(_plans_file(run), "make the plans, see nnUNetv2_semisup_plans -h")
    settings_class = discovery.settings_class(run.trainer)
    return settings.of_trainer(plans, run.trainer, settings_class, trainers).num_iterations_per_epoch


def _plans_file(run: Run) -> Path:
    return Path(os.environ["nnUNet_preprocessed"], run.dataset, f"{run.plans}.json")


def ready_plans(preprocessed: Path, plans_name: str, configuration: str) -> dict:
    """Content of a plans file; an InputError unless it has the configuration and that is preprocessed."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    file = preprocessed / f"{plans_name}.json"
    plans = read_object(file, "make the plans, see nnUNetv2_semisup_plans -h", "plans_name", "configurations")
    if configuration not in plans["configurations"]:
        raise InputError(f"{file} has no configuration {configuration}, but {listed(list(plans['configurations']))}")
    identifier = PlansManager(plans).get_configuration(configuration).data_identifier
    require_preprocessed(preprocessed, identifier, plans_name, configuration)
    return plans


def _check_data(dataset: str, plans_name: str, configuration: str) -> None:
    raw, preprocessed = (Path(os.environ[name], dataset) for name in ("nnUNet_raw", "nnUNet_preprocessed"))
    dataset_json = read_dataset_json(raw)
    ending = dataset_json["file_ending"]
    images = {f.name[: -len(ending) - 5] for f in raw.glob(f"imagesTs/*{ending}")}
    labels = {f.name[: -len(ending)] for f in raw.glob(f"labelsTs/*{ending}")}
    if not images or images != labels:
        different = ", ".join(sorted(images ^ labels)[:3])
        raise InputError(
            f"{raw}: a benchmark tests on imagesTs against labelsTs, but "
            + (f"these cases are in one of them only: {different}" if images or labels else "there are none")
        )
    plans = ready_plans(preprocessed, plans_name, configuration)
    if plans["plans_name"] != plans_name:
        raise InputError(
            f'{preprocessed / plans_name}.json has the "plans_name" {plans["plans_name"]}, and nnU-Net names model '
            f"folders by it: two plans would share one. Set it to {plans_name}"
        )
    for trainer, values in plans.get("semisup", {}).items():
        if values.get("deterministic_seed") is not None:
            raise InputError(
                f"{preprocessed / plans_name}.json: {trainer}.deterministic_seed would give every seed of the grid the "
                f"same weights: remove it, the benchmark seeds the process itself"
            )


def _check_trainer(name: str) -> None:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    try:
        with contextlib.redirect_stdout(StringIO()):
            recursive_find_trainer_class_by_name(name)
    except RuntimeError:
        raise InputError(
            f"nnU-Net finds no trainer {name}: ours, at any length, are listed by nnUNetv2_semisup_trainers --list; "
            "where they are found, stock nnUNetTrainer exists at any length too"
        ) from None


def readable(seconds: float) -> str:
    """``50 s``, ``12 min``, ``3 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def last_line(log: Path) -> str:
    """The last line of ``log`` that is not empty: of a traceback that is the message."""
    with open(log, "rb") as f:
        f.seek(max(0, log.stat().st_size - 10_000))
        lines = [line.strip() for line in f.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def expected_seconds(run: Run, records_: list[dict]) -> float | None:
    """Wall time of ``run`` from finished ones of the same data, trainer and plans, scaled by the number of epochs."""
    alike = [
        records.wall_seconds(record) * run.epochs / record["epochs"]
        for record in records_
        if all(record[key] == getattr(run, key) for key in ("trainer", "plans", "configuration"))
        and family(record["dataset"]) == run.family
    ]
    return median(alike) if alike else None


def _training_seconds(run: Run, options: Options) -> float:
    """Training time of ``run`` from a few steps on random batches, loaders and validation left out."""
    from nnunetv2_semisup.benchmark import speed
    from nnunetv2_semisup.training import rehearsal

    worker.set_threads(options.device, options.threads)
    trainer = rehearsal.build(run.dataset, run.configuration, run.plans, run.trainer_name, options.device)
    [[seconds]] = speed.step_times([trainer], rounds=1)
    steps = trainer.num_epochs * trainer.num_iterations_per_epoch
    del trainer
    speed.release()
    return seconds * steps


def _time_left(todo: list[Run], work: WorkFolder) -> str:
    finished = work.all_records()
    known = [s for s in (expected_seconds(run, finished) for run in todo) if s is not None]
    if not known:
        return ""
    guess = "" if len(known) == len(todo) else "roughly "
    return f" ({guess}{readable(sum(known) + (len(todo) - len(known)) * mean(known))} left)"


def _summary(record: dict) -> str:
    rows = [row for row in records.run_rows(record) if row["postprocessing"] == "none"]
    resumed = f", resumed: {record['resumed']}" if record.get("resumed") else ""
    return ", ".join(f"Dice {row['dice']:.3f} ({row['inference']})" for row in rows) + resumed


def _environment(options: Options) -> dict[str, str]:
    """The caller's variables, and OpenMP threads that sleep when idle: two trainings at once else spin."""
    environment = {**os.environ}
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    if options.threads is not None:
        environment["OMP_NUM_THREADS"] = str(options.threads)
    return environment


@contextlib.contextmanager
def _ended_with_this_block(process: subprocess.Popen) -> Iterator[None]:
    """However the block is left, by Ctrl-C or SIGTERM too, the process and its workers have ended then."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_TO_END)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # workers that outlive a process that was killed
        process.wait()
        signal.signal(signal.SIGTERM, before)
