"""Stock nnU-Net commands in processes of their own: train, kill -9, resume, predict; and how wrong input looks."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from helpers import LABELS, SHAPE, make_dataset

from nnunetv2_semisup import discovery

BIN = Path(sys.executable).parent
TRAINER = "nnUNetTrainerMeanTeacher"


@pytest.fixture
def dataset(tmp_path):
    dataset = make_dataset(tmp_path, LABELS["2 classes"], labelled=2, unlabelled=2)
    settings = {"num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1, "save_every_minutes": 0.0}
    settings["start_dice"] = 0.0  # two steps an epoch teach no class
    plans = dataset.plans | {"semisup": dict.fromkeys(discovery.trainers(), settings)}
    (dataset.preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans))
    return dataset


def environment(dataset) -> dict[str, str]:
    """As a user has it: nothing but nnU-Net's folders, so that the installed start-up line has to do its work."""
    clean = {k: v for k, v in os.environ.items() if k not in ("nnUNet_extTrainer", "PYTHONPATH")}
    workers = {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1"}
    return {**clean, **dataset.variables(dataset.root / "results"), **workers}


def start(dataset, *arguments) -> subprocess.Popen:
    log = open(dataset.root / "log.txt", "a", encoding="utf-8")  # noqa: SIM115 - the process outlives this function
    command = [str(BIN / arguments[0]), *map(str, arguments[1:])]
    return subprocess.Popen(
        command, env=environment(dataset), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def run(dataset, *arguments) -> tuple[int, str]:
    code = start(dataset, *arguments).wait(timeout=600)
    return code, (dataset.root / "log.txt").read_text(encoding="utf-8")


def train(dataset, epochs: int, *options, configuration="3d_fullres", fold="0", trainer=TRAINER):
    name = f"{trainer}_{epochs}epochs"
    return ("nnUNetv2_train", "901", configuration, fold, "-tr", name, "-device", "cpu", *options)


def model_folder(dataset, epochs: int, configuration="3d_fullres", trainer=TRAINER) -> Path:
    return dataset.root / "results" / dataset.name / f"{trainer}_{epochs}epochs__nnUNetPlans__{configuration}"


def logged_epochs(fold: Path) -> list[int]:
    file = fold / "semisup_log.csv"
    if not file.is_file():
        return []
    with open(file, encoding="utf-8") as f:
        return [int(row["epoch"]) for row in csv.DictReader(f)]


def predict(dataset, epochs: int, trainer=TRAINER) -> np.ndarray:
    """Predict imagesUn; returns the prediction of unl0."""
    where = ("-i", dataset.raw / "imagesUn", "-o", dataset.root / "predictions")
    model = ("-tr", f"{trainer}_{epochs}epochs", "-c", "3d_fullres", "-f", "0", "-d", "901")
    code, log = run(dataset, "nnUNetv2_predict", *where, *model, "-device", "cpu", "-npp", "1", "-nps", "1")
    assert code == 0, log
    return sitk.GetArrayFromImage(sitk.ReadImage(str(dataset.root / "predictions" / "unl0.nii.gz")))


def wait_for(condition, process) -> None:
    deadline = time.time() + 300
    while not condition():
        assert process.poll() is None, "training ended early"
        assert time.time() < deadline
        time.sleep(0.05)


def test_train_kill_resume_validate_predict(dataset):
    epochs = 400  # far more than are done before the kill
    fold = model_folder(dataset, epochs) / "fold_0"
    process = start(dataset, *train(dataset, epochs))
    wait_for(lambda: (fold / "semisup_log.csv").is_file() and (fold / "checkpoint_latest.pth").is_file(), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    checkpoint = torch.load(fold / "checkpoint_latest.pth", weights_only=False)
    assert checkpoint["semisup"]["method"]["teacher.n_averaged"] == 2 * checkpoint["current_epoch"]

    # Resume where there is little left to do: pretend the run was killed near its end.
    checkpoint["current_epoch"] = epochs - 1
    checkpoint["logging"] = {k: v[:1] * (epochs - 1) for k, v in checkpoint["logging"].items()}
    torch.save(checkpoint, fold / "checkpoint_latest.pth")
    code, log = run(dataset, *train(dataset, epochs, "--c"))
    assert code == 0, log
    assert logged_epochs(fold)[-1] == epochs - 1
    final = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    before = checkpoint["semisup"]["method"]["teacher.n_averaged"]
    assert final["semisup"]["method"]["teacher.n_averaged"] == before + 2, "the teacher's counter went on"
    assert (fold / "validation" / "summary.json").is_file()

    prediction = predict(dataset, epochs)
    assert prediction.shape == SHAPE and set(np.unique(prediction)) <= {0, 1}


@pytest.mark.slow
@pytest.mark.parametrize("trainer", discovery.trainers())
def test_every_trainer_goes_on_after_a_kill(dataset, trainer):
    """Twelve epochs, so that ACTION is killed in its second stage and ends in its third."""
    fold = model_folder(dataset, 12, trainer=trainer) / "fold_0"
    process = start(dataset, *train(dataset, 12, trainer=trainer))
    wait_for(lambda: len(logged_epochs(fold)) >= 4 and (fold / "checkpoint_latest.pth").is_file(), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    killed_in = torch.load(fold / "checkpoint_latest.pth", weights_only=False)["current_epoch"]
    assert 3 <= killed_in < 12
    code, log = run(dataset, *train(dataset, 12, "--c", trainer=trainer))
    assert code == 0, log
    assert logged_epochs(fold) == list(range(12))
    assert predict(dataset, 12, trainer).shape == SHAPE


def test_wrong_input_ends_nnunets_command_with_one_line(dataset):
    (dataset.raw / "imagesUn" / "unl1_0000.nii.gz").rename(dataset.raw / "imagesUn" / "lab0_0000.nii.gz")
    code, log = run(dataset, *train(dataset, 2))
    assert code == 1 and "Traceback" not in log
    last = log.splitlines()[-1]
    assert "imagesUn holds labelled cases (lab0)" in last and "remove them" in last


def test_input_error_is_an_exit_and_a_value_error():
    code = "from nnunetv2_semisup.errors import InputError; raise InputError('scan.nii.gz is cut off: copy it again')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (1, "scan.nii.gz is cut off: copy it again\n")
    from nnunetv2_semisup.errors import InputError

    assert issubclass(InputError, ValueError)


@pytest.mark.slow
@pytest.mark.parametrize("configuration", ["2d", "3d_resenc"])
def test_other_configurations_with_probabilities(dataset, configuration):
    code, log = run(dataset, *train(dataset, 2, "--npz", configuration=configuration, fold="1"))
    assert code == 0, log
    assert list((model_folder(dataset, 2, configuration) / "fold_1" / "validation").glob("*.npz"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_of_all_processes_saves_and_leaves_no_process(dataset, number):
    """To the whole process group, as a terminal sends SIGINT and a cluster SIGTERM."""
    fold = model_folder(dataset, 400) / "fold_0"
    process = start(dataset, *train(dataset, 400))
    wait_for(lambda: (fold / "semisup_log.csv").is_file(), process)
    os.killpg(process.pid, number)
    code, log = process.wait(timeout=120), (dataset.root / "log.txt").read_text(encoding="utf-8")
    assert code == 128 + number, log
    assert f"Stopped by {number.name}" in log and (fold / "checkpoint_latest.pth").is_file()
    if number == signal.SIGINT:  # SIGTERM ends the workers at once, and their queues say so
        assert "Traceback" not in log and "no longer alive" not in log
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
