"""The main job on data it makes itself, through nnU-Net's stock commands, each printed before it runs."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from time import time

import numpy as np
import SimpleITK as sitk

from nnunetv2_semisup.demo import data
from nnunetv2_semisup.errors import InputError

DATASET = "Dataset990_Demo"
BASELINE = "nnUNetTrainer"
PLANS = "demo"
CASES = {"imagesTr": 6, "imagesUn": 18, "imagesTs": 8}
PATCH = [16, 16, 24]  # z, y, x; a whole case is 24 x 32 x 32 with the preset, and a step takes thrice as long with that
STOCK_EPOCHS = (1, 5, 10, 20, 50, 100, 250)  # nnU-Net has its own trainer for these lengths and for no other
DEFAULT_EPOCHS = 5


def run(folder: Path, trainer: str, epochs: int | None, device: str | None) -> None:
    """Make data, plan, preprocess, train baseline and ``trainer``, predict the test cases, write table and picture.

    Args:
        folder: created; must not exist or be empty.
        trainer: one of ours, without epoch suffix.
        epochs: length of both trainings, one of ``STOCK_EPOCHS``; None for 5.
        device: cuda, cpu or mps; None for a GPU if there is one.

    Raises:
        InputError: the folder is in use, no such trainer or length, or a command failed.
    """
    from nnunetv2_semisup import discovery

    epochs = epochs or DEFAULT_EPOCHS
    try:
        discovery.settings_class(trainer)
    except InputError as error:
        raise InputError(f"-tr: {error}") from None
    if epochs not in STOCK_EPOCHS:
        raise InputError(f"--epochs {epochs}: stock nnU-Net has trainers for {STOCK_EPOCHS} epochs, choose one of them")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty: choose another folder with -o, or remove it")
    device = device or _best_device()
    start = time()
    folder = folder.resolve()
    environment = _environment(folder)
    raw = folder / "nnUNet_raw" / DATASET
    print(f"Making {CASES['imagesTr']} labelled, {CASES['imagesUn']} unlabelled and {CASES['imagesTs']} test cases")
    make_dataset(raw)

    def command(*arguments: str) -> None:
        _command(arguments, environment, folder / "log.txt")

    suffix = "1epoch" if epochs == 1 else f"{epochs}epochs"
    workers = environment[
        "nnUNet_def_n_proc"
    ]  # these commands start up to 8 otherwise, which takes longer than it saves
    command("nnUNetv2_plan_and_preprocess", "-d", "990", "-c", "3d_fullres", "--no_pp", "-npfp", workers)
    command("nnUNetv2_semisup_plans", "-d", "990", "-o", PLANS, "--preset", "cpu")
    shrink_patch(folder / "nnUNet_preprocessed" / DATASET / f"{PLANS}.json")
    command("nnUNetv2_preprocess", "-d", "990", "-plans_name", PLANS, "-c", "3d_fullres")
    models = {}
    for name in (f"{BASELINE}_{suffix}", f"{trainer}_{suffix}"):
        model = ("-tr", name, "-p", PLANS)
        command("nnUNetv2_train", "990", "3d_fullres", "all", *model, "-device", device)
        output = folder / "predictions" / name
        where = ("-i", str(raw / "imagesTs"), "-o", str(output), "-npp", workers, "-nps", workers)
        command("nnUNetv2_predict", "-d", "990", "-c", "3d_fullres", "-f", "all", *model, *where, "-device", device)
        truth = ("-djfile", str(raw / "dataset.json"), "-pfile", str(output / "plans.json"))
        command("nnUNetv2_evaluate_folder", str(raw / "labelsTs"), str(output), *truth)
        models[name] = output
    table = write_table(folder / "dice.csv", models)
    draw_overlay(folder / "overlay.png", raw, models)
    print(f"\n{table}\n\n{folder / 'dice.csv'}\n{folder / 'overlay.png'}\n{time() - start:.0f} s in all on {device}")


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


def write_table(file: Path, models: dict[str, Path]) -> str:
    """Write the test Dice of every case and return a table of mean, sd over cases, and minimum."""
    dice = {}
    for name, output in models.items():
        cases = json.loads((output / "summary.json").read_text(encoding="utf-8"))["metric_per_case"]
        dice[name] = {Path(c["prediction_file"]).name.split(".")[0]: c["metrics"]["1"]["Dice"] for c in cases}
    names = list(dice)
    with open(file, "w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["case", *names])
        writer.writerows([case, *(f"{dice[n][case]:.4f}" for n in names)] for case in sorted(dice[names[0]]))
    lines = [f"{'test Dice, last checkpoint':34}{'mean':>8}{'sd':>8}{'min':>8}"]
    for name in names:
        values = np.array(list(dice[name].values()))
        lines.append(f"{name:34}{values.mean():8.3f}{values.std(ddof=1):8.3f}{values.min():8.3f}")
    difference = np.mean([dice[names[1]][c] - dice[names[0]][c] for c in dice[names[0]]])
    lines.append(f"difference {difference:+.3f} (one run each: no measure of chance)")
    return "\n".join(lines)


def draw_overlay(file: Path, raw: Path, models: dict[str, Path]) -> None:
    """Image, truth and each prediction as contours, on the slice of most organ, for the first three test cases."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = sorted(f.name.split(".")[0] for f in (raw / "labelsTs").iterdir())[:3]
    columns = {"image": None, "truth": raw / "labelsTs", **models}
    figure = Figure(figsize=(3 * len(columns), 3.1 * len(cases)), layout="constrained")
    FigureCanvasAgg(figure)
    for row, case in zip(figure.subplots(len(cases), len(columns), squeeze=False), cases, strict=True):
        image = _read(raw / "imagesTs" / f"{case}_0000.nii.gz")
        z = int(_read(raw / "labelsTs" / f"{case}.nii.gz").sum((1, 2)).argmax())
        for axis, (title, folder) in zip(row, columns.items(), strict=True):
            axis.imshow(image[z], cmap="gray")
            axis.set_axis_off()
            axis.set_title(f"{case}: {title}" if folder is None else title, fontsize="small")
            if folder is not None and (mask := _read(folder / f"{case}.nii.gz")[z]).any():
                axis.contour(mask, [0.5], colors="#E69F00", linewidths=1.5)
    figure.savefig(file, dpi=110)


def _write_case(seed: int, images: Path, labels: Path | None) -> None:
    image, label = data.make_case(seed)
    name = f"{images.name[-2:].lower()}{seed:03d}"
    for array, file in ((image, images / f"{name}_0000.nii.gz"), (label, labels and labels / f"{name}.nii.gz")):
        if file is not None:
            volume = sitk.GetImageFromArray(array)
            volume.SetSpacing(data.SPACING_MM)
            sitk.WriteImage(volume, str(file))


def _read(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


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
    environment.setdefault("nnUNet_n_proc_DA", str(max(1, min(12, cores // 2))))
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
