"""A model for plain nnU-Net: the same segmentations without our package, and where it comes from."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnunetv2_semisup import cli

NAME = "nnUNetTrainerMeanTeacher"
SHORT = {"num_epochs": 2, "num_iterations_per_epoch": 3, "num_val_iterations_per_epoch": 1}

PREDICT = """
import sys, torch
if sys.argv[1] == "without":
    sys.modules["nnunetv2_semisup"] = None  # importing it is an error
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
predictor.initialize_from_trained_model_folder(sys.argv[2], ("all",), "checkpoint_final.pth")
print(predictor.trainer_name)
predictor.predict_from_files_sequential([[sys.argv[3]]], [sys.argv[4]], save_probabilities=False)
"""


@pytest.fixture
def trained(tiny):
    trainer = tiny.trainer(NAME, inference_weights="student", **SHORT)
    trainer.run_training()
    with torch.no_grad():  # a teacher that is plainly another network
        for parameter in trainer.method.teacher.parameters():
            parameter.mul_(-1)
    trainer.current_epoch -= 1
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    return Path(trainer.output_folder).parent


def predict(tiny, model: Path, mode: str, output: Path) -> np.ndarray:
    clean = {key: value for key, value in os.environ.items() if key != "nnUNet_extTrainer"}
    command = [sys.executable, "-c", PREDICT, mode, str(model), tiny.images("unl0")[0], str(output)]
    done = subprocess.run(command, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("nnUNetTrainer\n" in done.stdout) == (mode == "without")
    return sitk.GetArrayFromImage(sitk.ReadImage(f"{output}.nii.gz"))


def test_plain_nnunet_predicts_the_same(tiny, trained, tmp_path, capsys):
    arguments = ["-d", "901", "-tr", NAME, "-f", "all"]
    assert cli.export([*arguments, "-o", str(tmp_path / "out")]) == 0
    model = tmp_path / "out" / tiny.name / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    assert str(model) in capsys.readouterr().out
    expected = predict(tiny, trained, "with", tmp_path / "a")
    np.testing.assert_array_equal(predict(tiny, model, "without", tmp_path / "b"), expected)

    content = torch.load(model / "fold_all" / "checkpoint_final.pth", weights_only=False)
    assert (
        content["trainer_name"] == "nnUNetTrainer" and "semisup" not in content and content["optimizer_state"] is None
    )
    assert "semisup" not in json.loads((model / "plans.json").read_text())
    told = json.loads((model / "semisup_provenance.json").read_text())
    assert told["trainer"] == NAME and told["weights"] == "as_trained" and told["folds"]["all"]["epochs"] == 2
    assert told["folds"]["all"]["terms_started_after_steps"] == 0
    assert told["folds"]["all"]["settings"]["num_epochs"] == 2 and told["plans_settings"][NAME]["num_epochs"] == 2

    assert cli.export([*arguments, "-o", str(tmp_path / "model.zip"), "--weights", "teacher"]) == 0
    with zipfile.ZipFile(tmp_path / "model.zip") as whole:
        whole.extractall(tmp_path / "installed")
    installed = tmp_path / "installed" / tiny.name / model.name
    weights, teacher = (
        torch.load(m / "fold_all" / "checkpoint_final.pth", weights_only=False)["network_weights"]
        for m in (model, installed)
    )
    assert weights.keys() == teacher.keys() and not all(torch.equal(weights[key], teacher[key]) for key in weights)
    assert not list(tmp_path.glob(".tmp_export_*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-d", "77", "-tr", NAME], ("-d 77", "no dataset")),
        (
            ["-d", "901", "-tr", "nnUNetTrainerOther"],
            (
                "nnUNetTrainerOther__nnUNetPlans__3d_fullres does not exist",
                f"nnUNetv2_semisup_export -d 901 -tr {NAME} -p nnUNetPlans -c 3d_fullres -f all -o ",
            ),
        ),
        (["-d", "901", "-tr", NAME, "-f", "3"], ("fold_3", "there is -f all")),
        (["-d", "901", "-tr", NAME, "-chk", "checkpoint_x.pth"], ("checkpoint_x.pth", "no fold has it")),
    ],
)
def test_wrong_input(tiny, trained, tmp_path, capsys, arguments, words):
    assert cli.export([*arguments, "-o", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and all(word in err for word in words), err
    assert not (tmp_path / "out").exists()


def test_a_model_that_saw_no_unlabelled_image_is_named(tiny, trained, tmp_path, capsys):
    file = trained / "fold_all" / "checkpoint_final.pth"
    content = torch.load(file, weights_only=False)
    content["semisup"]["start"]["step"] = None
    torch.save(content, file)
    assert cli.export(["-d", "901", "-tr", NAME, "-f", "all", "-o", str(tmp_path / "out")]) == 0
    assert "WARNING: no unlabelled image was used in fold all" in capsys.readouterr().out


def export_of_unknown(capsys, *options):
    assert cli.export(["-d", "901", "-tr", "nnUNetTrainerUAMT", "-p", "small", "-c", "2d", *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err.split("does not exist: ")[1].strip()


def test_ready_commands_for_what_is_trained(nnunet_raw, capsys):
    """Of our trainers, with the folds that have the checkpoint; what is most like the wish comes first."""
    root = nnunet_raw.parent / "nnUNet_results" / "Dataset901_Tiny"
    (root / "nnUNetTrainer__small__2d" / "fold_all").mkdir(parents=True)
    (root / "nnUNetTrainer__small__2d" / "fold_all" / "checkpoint_final.pth").write_text("stock")
    out = ("-o", "my model.zip")
    assert export_of_unknown(capsys, *out).startswith("no trainer of ours has a checkpoint_final.pth in ")
    for model, folds in {
        "nnUNetTrainerBCP__small__3d_fullres": ("0", "2"),
        "nnUNetTrainerPasteMatch_3epochs__small__2d": ("1", "all"),
        "nnUNetTrainerUAMT__small__3d_fullres": (),
    }.items():
        for fold in folds:
            (root / model / f"fold_{fold}").mkdir(parents=True)
            (root / model / f"fold_{fold}" / "checkpoint_final.pth").write_text("ours")
    commands = (
        "nnUNetv2_semisup_export -d 901 -tr nnUNetTrainerPasteMatch_3epochs -p small -c 2d -f all -o 'my model.zip'",
        "nnUNetv2_semisup_export -d 901 -tr nnUNetTrainerBCP -p small -c 3d_fullres -f 0 2 -o 'my model.zip'",
    )
    assert export_of_unknown(capsys, *out) == f"what is trained is exported by {' or by '.join(commands)}"
    assert "no trainer of ours has a x.pth" in export_of_unknown(capsys, *out, "-chk", "x.pth")
    assert "-o m.zip --weights teacher or by " in export_of_unknown(capsys, "-o", "m.zip", "--weights", "teacher")


def test_nothing_is_overwritten(tiny, trained, tmp_path, capsys):
    arguments = ["-d", "901", "-tr", NAME, "-o", str(tmp_path / "m.zip")]
    (tmp_path / "m.zip").write_text("mine")
    assert cli.export(arguments) == 2 and "m.zip exists" in capsys.readouterr().err
    assert (tmp_path / "m.zip").read_text() == "mine"
