"""The main job, on data it makes itself or on a task of the Medical Segmentation Decathlon.

Everything runs through nnU-Net's stock commands and ours, each printed before it runs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from time import time

import SimpleITK as sitk

from nnunetv2_semisup.data.checks import LABELLED, TEST, UNLABELLED
from nnunetv2_semisup.demo import data, report
from nnunetv2_semisup.demo.task import Task, read_task, write_dataset
from nnunetv2_semisup.errors import InputError

ID = "990"
DATASET = f"Dataset{ID}_Demo"
PLANS = "demo"  # of the data that the demo makes
BASELINE = "nnUNetTrainer"
CASES = {"imagesTr": 6, "imagesUn": 18, "imagesTs": 8}
PATCH = [16, 16, 24]  # z, y, x; a whole case is 24 x 32 x 32 with the preset, and a step takes thrice as long with that
MADE_EPOCHS, REAL_EPOCHS = 5, 20  # stock nnU-Net has reached its level on Hippocampus after 20
# Minutes of training per epoch of stock nnU-Net and of PasteMatch together: results/runs.csv, Hippocampus with 4
# labelled cases, 2d, plans small, on one of two CPU cores, the other one busy; and PasteMatch's cost in stock steps.
MINUTES_PER_EPOCH, COST = 1.9, 2.3

Command = Callable[..., None]


def run(folder: Path, trainer: str, epochs: int | None, device: str | None, source: Path | None = None) -> None:
    """Make a data set, plan, preprocess, train baseline and ``trainer``, predict the test cases, write table, picture.

    Args:
        folder: created; must not exist or be empty.
        trainer: one of ours, without epoch suffix.
        epochs: length of both trainings; None for 5, or 20 with ``source``.
        device: cuda, cpu or mps; None for a GPU if there is one.
        source: folder of a task of the Medical Segmentation Decathlon; None: data that the demo makes.

    Raises:
        InputError: a folder is not what it should be, no such trainer, or a command failed.
    """
    from nnunetv2_semisup import discovery

    try:
        discovery.settings_class(trainer)
    except InputError as error:
        raise InputError(f"-tr: {error}") from None
    task = None if source is None else read_task(source)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty: choose another folder with -o, or remove it")
    device = device or _best_device()
    start = time()
    folder = folder.resolve()
    environment = _environment(folder)
    raw = folder / "nnUNet_raw" / DATASET
    workers = environment["nnUNet_def_n_proc"]  # commands start up to 8 otherwise, which takes longer than it saves

    def command(*arguments: str) -> None:
        _command(arguments, environment, folder / "log.txt")

    print(f"What the commands print goes to {folder / 'log.txt'}")
    if task is None:
        epochs, configuration, plans = epochs or MADE_EPOCHS, "3d_fullres", PLANS
        _prepare_made(raw, folder, plans, command, workers)
    else:
        epochs, configuration, plans = epochs or REAL_EPOCHS, "2d", "small"
        print(expectation(task.name, trainer, epochs))
        _prepare_real(task, raw, folder, plans, command, workers)
    suffix = "1epoch" if epochs == 1 else f"{epochs}epochs"
    predictions, evaluations = {}, {}
    for name in (f"{BASELINE}_{suffix}", f"{trainer}_{suffix}"):
        model = ("-tr", name, "-p", plans)
        command("nnUNetv2_train", ID, configuration, "all", *model, "-device", device)
        predictions[name], evaluations[name] = folder / "predictions" / name, folder / "evaluation" / name
        where = ("-i", str(raw / "imagesTs"), "-o", str(predictions[name]), "-npp", workers, "-nps", workers)
        command("nnUNetv2_predict", "-d", ID, "-c", configuration, "-f", "all", *model, *where, "-device", device)
        compared = ("-ref", str(raw / "labelsTs"), "-pred", str(predictions[name]))
        truth = ("-djfile", str(raw / "dataset.json"), "-o", str(evaluations[name]))
        command("nnUNetv2_semisup_evaluate", *compared, *truth)
    dice = report.read_dice(evaluations)
    table = report.write_table(folder / "dice.csv", dice)
    report.draw_overlay(folder / "overlay.png", raw, predictions, dice)
    more = f"More metrics, per case and label: {folder / 'evaluation'}"
    print(f"\n{table}\n\n{folder / 'dice.csv'}\n{folder / 'overlay.png'}\n{more}")
    print(f"{(time() - start) / 60:.0f} minutes in all on {device}")


def expectation(task: str, trainer: str, epochs: int) -> str:
    """How long the trainings will take, as far as that was measured."""
    from nnunetv2_semisup import discovery

    cost = discovery.trainers()[trainer].method_class.cost
    minutes = MINUTES_PER_EPOCH * epochs * (1 + cost) / (1 + COST)
    length = "1 epoch" if epochs == 1 else f"{epochs} epochs"
    lines = [
        f"{task}: two trainings of {length}. Both take about {max(1, round(minutes))} minutes on a CPU core, as "
        f"measured with Hippocampus; larger images take longer to preprocess and predict. On a GPU: not measured."
    ]
    if epochs < REAL_EPOCHS:
        lines.append(f"Fewer than {REAL_EPOCHS} epochs show that it runs: stock nnU-Net is not at its level yet.")
    return "\n".join(lines)


def _prepare_made(raw: Path, folder: Path, plans: str, command: Command, workers: str) -> None:
    print(f"Making {CASES['imagesTr']} labelled, {CASES['imagesUn']} unlabelled and {CASES['imagesTs']} test cases")
    make_dataset(raw)
    command("nnUNetv2_plan_and_preprocess", "-d", ID, "-c", "3d_fullres", "--no_pp", "-npfp", workers)
    command("nnUNetv2_semisup_plans", "-d", ID, "-o", plans, "--preset", "cpu")
    shrink_patch(folder / "nnUNet_preprocessed" / raw.name / f"{plans}.json")
    command("nnUNetv2_preprocess", "-d", ID, "-plans_name", plans, "-c", "3d_fullres", "-np", workers)


def _prepare_real(task: Task, raw: Path, folder: Path, plans: str, command: Command, workers: str) -> None:
    numbers = ", ".join(f"{task.number(role)} {role}" for role in (LABELLED, UNLABELLED, TEST))
    print(f"Taking {numbers} cases; the labels of the unlabelled ones are not read")
    try:
        write_dataset(task, raw, int(workers))
    except BaseException:  # a damaged case, Ctrl-C: the same command must find the folder as it was
        shutil.rmtree(folder)
        raise
    command("nnUNetv2_plan_and_preprocess", "-d", ID, "-c", "2d", "-npfp", workers, "-np", workers)
    command("nnUNetv2_semisup_plans", "-d", ID, "-o", plans, "--preset", "small")
    command("nnUNetv2_semisup_preprocess", "-d", ID, "-p", plans, "-c", "2d", "-np", workers)


def make_dataset(raw: Path) -> None:
    """Write the demo's cases as an nnU-Net raw data set; no label of an unlabelled case is written."""
    for name in (*CASES, "labelsTr", "labelsTs"):
        (raw / name).mkdir(parents=True)
    jobs, seed = [], 0
    for folder, count in CASES.items():
        labels = None if folder == "imagesUn" else raw / folder.replace("images", "labels")
        for _ in range(count):
            jobs.append((seed, raw / folder, labels))
            seed += 1
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        list(pool.map(_write_case, *zip(*jobs, strict=True)))
    content = {
        "channel_names": {"0": "MRI"},
        "labels": data.LABELS,
        "numTraining": CASES["imagesTr"],
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


def shrink_patch(plans: Path) -> None:
    """Set the patch of ``plans`` to ``PATCH``, as one would by hand in an editor."""
    content = json.loads(plans.read_text(encoding="utf-8"))
    content["configurations"]["3d_fullres"]["patch_size"] = PATCH
    plans.write_text(json.dumps(content, indent=4), encoding="utf-8")
    print(f"Patch size in {plans.name} set to {PATCH}, to save time")


def _write_case(seed: int, images: Path, labels: Path | None) -> None:
    image, label = data.make_case(seed)
    name = f"{images.name[-2:].lower()}{seed:03d}"
    for array, file in ((image, images / f"{name}_0000.nii.gz"), (label, labels and labels / f"{name}.nii.gz")):
        if file is not None:
            volume = sitk.GetImageFromArray(array)
            volume.SetSpacing(data.SPACING_MM)
            sitk.WriteImage(volume, str(file))


def _best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _environment(folder: Path) -> dict[str, str]:
    """Folders of the demo's own, and worker counts for a small machine unless the user has set them."""
    environment = {**os.environ}
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (folder / name).mkdir(parents=True)
        environment[name] = str(folder / name)
    cores = os.cpu_count() or 1
    environment.setdefault("nnUNet_def_n_proc", str(max(1, min(8, cores // 2))))
    if environment.get("nnUNet_n_proc_DA", "0") == "0":  # nnU-Net's planner does not run with 0
        environment["nnUNet_n_proc_DA"] = str(max(1, min(12, cores // 2)))
    # Idle OpenMP threads that spin take the core that the loader's worker needs; threads that sleep at once wake up
    # late. A short spin is best on two cores: 20.5 s an epoch against 25.5 s without, both measured with this demo.
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    environment.setdefault("GOMP_SPINCOUNT", "1000")
    return environment


def _command(arguments: tuple[str, ...], environment: dict[str, str], log: Path) -> None:
    """Print a command, run it, append its output to ``log``; its end is shown when it fails."""
    start = time()
    print("$", *arguments, end=" ", flush=True)
    program = shutil.which(arguments[0], path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        raise InputError(f"{arguments[0]} is not installed beside {sys.executable}: pip install nnunetv2-semisup")
    with open(log, "ab+") as output:
        output.write(f"\n$ {' '.join(arguments)}\n".encode())
        output.flush()
        result = subprocess.run([program, *arguments[1:]], env=environment, stdout=output, stderr=subprocess.STDOUT)
    print(f"[{time() - start:.0f} s]")
    if result.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        print("\n".join(tail), file=sys.stderr)
        raise InputError(f"{arguments[0]} failed with exit code {result.returncode}; all its output is in {log}")
