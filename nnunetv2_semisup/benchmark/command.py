"""What ``nnUNetv2_semisup_benchmark`` does with its arguments: run, report, measure speed, submit."""

from __future__ import annotations

import argparse
import os
from itertools import product
from pathlib import Path

from nnunetv2_semisup.benchmark import counted, grid, records, report, speed, worker
from nnunetv2_semisup.benchmark import run as runner
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.files import RESULTS, find_preprocessed
from nnunetv2_semisup.settings import parse_value
from nnunetv2_semisup.training.ready import require_device


def run(args: argparse.Namespace) -> int:
    """Do what the arguments of ``cli.benchmark`` ask for; returns the exit code."""
    if args.threads is not None and args.threads < 1:
        raise InputError(f"--threads {args.threads}: at least one is needed")
    if args.report:
        work = None if args.results and not args.o else records.WorkFolder((args.o or _work_folder()).resolve())
        if work is not None and not work.root.is_dir():
            raise InputError(f"{work.root} is not a folder: name the benchmark's work folder with -o")
        if work is None and not args.results.is_dir():
            raise InputError(f"{args.results} is not a folder: name the one with runs.csv")
        report.write(args.results if work is None else args.results or work.root / "results", work)
        return 0
    work = records.WorkFolder((args.o or _work_folder()).resolve())
    results = args.results or work.root / "results"
    options = runner.Options(args.device, args.threads)
    if args.speed or args.counted:
        return _speed(args, results) if args.speed else _counted(args, results)
    if (args.grid is None) == (args.d is None):
        raise InputError("give either a GRID.yaml or -d, -tr and --epochs")
    if args.grid:
        blocks, where = grid.read(args.grid), str(args.grid)
    else:
        given = {"datasets": args.d, "seeds": args.seeds, "trainers": args.tr, "epochs": args.epochs, "fold": args.f}
        given |= {"configuration": args.c, "plans": args.p, "inference": args.inference}
        blocks, where = [{key: value for key, value in given.items() if value is not None}], "arguments"
    runs = grid.expand(blocks, lambda dataset: _dataset_folder(dataset).name, where)
    runner.check(runs)
    if args.slurm is None:
        require_device(args.device)
    if args.dry_run:
        runner.dry_run(runs, work, options)
        return 0
    if args.slurm is not None:
        runner.submit(runs, work, options, key_values(args.slurm))
        return 0
    return 1 if runner.run_grid(runs, work, results, options) else 0


def _speed(args: argparse.Namespace, results: Path) -> int:
    named = _plans_named(args, "--speed")
    require_device(args.device)
    worker.set_threads(args.device, args.threads)
    for where in named:
        rows = speed.measure(*where, args.device, trainers=args.tr)
        print(f"{' '.join(where)}, {rows[0]['hardware']}, {rows[0]['threads']} threads\n{speed.table(rows)}")
        print(f"Written to {speed.write(results, rows)}")
    return 0


def _counted(args: argparse.Namespace, results: Path) -> int:
    for where in _plans_named(args, "--counted"):
        rows = counted.count(*where, args.tr)
        print(f"{' '.join(where)}, patch {rows[0]['patch']}, batch {rows[0]['batch']}\n{counted.table(rows)}")
        print(f"Written to {counted.write(results, rows)}")
    return 0


def _plans_named(args: argparse.Namespace, option: str) -> list[tuple[str, str, str]]:
    """Data set, configuration and name of all plans that ``args`` name; an InputError unless each is preprocessed."""
    if not args.d:
        raise InputError(f"{option} needs a preprocessed data set: -d ID, with -c and -p")
    folders = [_dataset_folder(dataset) for dataset in args.d]
    named = list(product(folders, args.p, args.c))
    for folder, plans_name, configuration in named:
        runner.ready_plans(folder, plans_name, configuration)
    return [(folder.name, configuration, plans_name) for folder, plans_name, configuration in named]


def key_values(texts: list[str]) -> dict:
    """``KEY=VALUE`` texts as a dict, values as JSON where they are; an InputError names a text without =."""
    for text in texts:
        if "=" not in text:
            raise InputError(f"--slurm {text!r} is malformed: write KEY=VALUE")
    return {key: parse_value(value) for key, value in (text.split("=", 1) for text in texts)}


def _work_folder() -> Path:
    if not os.environ.get(RESULTS):
        raise InputError("nnUNet_results is not set: export nnUNet_results=FOLDER, or name a work folder with -o")
    return Path(os.environ[RESULTS]).parent / "benchmark"


def _dataset_folder(dataset: str) -> Path:
    return find_preprocessed(dataset)
