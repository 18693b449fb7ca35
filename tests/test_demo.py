"""The demo's parts in process, on a task of the Decathlon whole; the whole demo on its own data as a slow test."""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from helpers import make_plans
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.run.run_training import run_training

from nnunetv2_semisup import cli, files
from nnunetv2_semisup.data.checks import LABELLED, TEST, UNLABELLED
from nnunetv2_semisup.demo import data, report, run
from nnunetv2_semisup.demo.task import read_task, write_dataset
from nnunetv2_semisup.selftrain.predict import predict_cases


def test_data_are_frozen():
    """Statistics, not bytes, so that another scipy's last digit does not matter; a changed generator does."""
    image, label = data.make_case(0)
    assert image.shape == label.shape == data.SHAPE and image.dtype == np.int16 and label.dtype == np.uint8
    assert set(np.unique(label)) == {0, 1}
    assert [int(label.sum()), round(float(image.mean()), 1), round(float(image.std()), 1)] == FROZEN
    assert not np.array_equal(image, data.make_case(1)[0])


FROZEN = [17780, 199.0, 209.6]


def test_dataset_has_no_label_of_an_unlabelled_case(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "CASES", {"imagesTr": 1, "imagesUn": 1, "imagesTs": 1})
    run.make_dataset(tmp_path)
    names = sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*.nii.gz"))
    assert names == [
        "imagesTr/tr000_0000.nii.gz",
        "imagesTs/ts002_0000.nii.gz",
        "imagesUn/un001_0000.nii.gz",
        "labelsTr/tr000.nii.gz",
        "labelsTs/ts002.nii.gz",
    ]
    assert sitk.ReadImage(str(tmp_path / names[0])).GetSpacing() == data.SPACING_MM
    assert json.loads((tmp_path / "dataset.json").read_text())["numTraining"] == 1


def test_table_shows_a_loss_as_a_loss(tmp_path):
    dice = {"baseline": {"ts0": 0.8, "ts1": 0.6, "ts2": math.nan}, "ours": {"ts0": 0.7, "ts1": 0.5, "ts2": math.nan}}
    table = report.write_table(tmp_path / "dice.csv", dice)
    assert "0.600   0.141   0.500" in table and "difference -0.100, 0 of 2 cases better" in table
    assert (tmp_path / "dice.csv").read_text().splitlines() == [
        "case,baseline,ours",
        "ts0,0.8000,0.7000",
        "ts1,0.6000,0.5000",
        "ts2,nan,nan",
    ]


def test_dice_of_a_case_is_the_mean_over_its_labels(tmp_path):
    rows = ["case,label,dice", "a,x,0.5", "a,y,1.0", "b,x,nan", "b,y,0.25", "c,x,nan", "c,y,nan"]
    (tmp_path / "cases.csv").write_text("\n".join(rows))
    dice = report.read_dice({"model": tmp_path})["model"]
    assert dice["a"] == 0.75 and dice["b"] == 0.25 and math.isnan(dice["c"])


# --------------------------------------------------------------------------------------- a task of the Decathlon

CASES = [f"liver_{number}" for number in range(9)]


@pytest.fixture
def task(tmp_path) -> Path:
    """A task as it is downloaded: two channels in one file, a label of two classes, a Mac's litter."""
    folder = tmp_path / "Task99_Tiny"
    random = np.random.default_rng(0)
    for case in [*CASES, "liver_77"]:
        part = "Ts" if case == "liver_77" else "Tr"
        label = np.zeros((6, 24, 24), np.uint8)
        label[1:5, 4:12, 5:14], label[1:5, 12:18, 5:14] = 1, 2
        channels = [sitk.GetImageFromArray((label + random.normal(0, 0.3, label.shape)).astype(np.float32))] * 2
        images = {f"images{part}": sitk.JoinSeries(channels), f"labels{part}": sitk.GetImageFromArray(label)}
        for name, image in images.items():
            if name != "labelsTs":
                (folder / name).mkdir(parents=True, exist_ok=True)
                sitk.WriteImage(image, str(folder / name / f"{case}.nii.gz"))
                (folder / name / f"._{case}.nii.gz").write_bytes(b"litter")
    content = {
        "modality": {"0": "T2", "1": "ADC"},
        "labels": {"0": "background", "1": "front", "2": "back"},
        "training": [{"image": f"./imagesTr/{c}.nii.gz", "label": f"./labelsTr/{c}.nii.gz"} for c in CASES],
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def test_a_task_becomes_a_dataset_without_the_labels_of_unlabelled_cases(task, tmp_path):
    found = read_task(task)
    numbers = {role: found.number(role) for role in (LABELLED, UNLABELLED, TEST)}
    assert numbers == {LABELLED: 4, UNLABELLED: 3, TEST: 2} and found.roles == read_task(task).roles
    for case, role in found.roles.items():
        if role == UNLABELLED:
            (task / "labelsTr" / f"{case}.nii.gz").write_bytes(b"not to be read")
    raw = tmp_path / "raw"
    write_dataset(found, raw, 1)
    for role, folder in ((LABELLED, "Tr"), (UNLABELLED, "Un"), (TEST, "Ts")):
        cases = {case for case in CASES if found.roles[case] == role}
        images = {f.name for f in (raw / f"images{folder}").iterdir()}
        assert images == {f"{case}_{channel:04d}.nii.gz" for case in cases for channel in (0, 1)}
        labels = {f.name for f in raw.glob(f"labels{folder}/*")}
        assert labels == ({f"{case}.nii.gz" for case in cases} if role != UNLABELLED else set())
    content = json.loads((raw / "dataset.json").read_text())
    assert content["channel_names"] == {"0": "T2", "1": "ADC"} and content["numTraining"] == 4
    assert content["labels"] == {"background": 0, "front": 1, "back": 2}


def one_level_too_high(task: Path) -> None:
    task.rename(task.with_name("inner"))
    task.mkdir()
    task.with_name("inner").rename(task / "inner")


@pytest.mark.robustness
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: shutil.rmtree(t / "labelsTr"), ("has no labelsTr", "no task of the Medical Segmentation Decathlon")),
        (lambda t: (t / "dataset.json").unlink(), ("has no dataset.json", "as it is downloaded")),
        (lambda t: (t / "dataset.json").write_text("{"), ("dataset.json is not valid JSON", "download")),
        (lambda t: (t / "labelsTr" / "liver_3.nii.gz").unlink(), ("labelsTr lacks liver_3", "complete it")),
        (one_level_too_high, ("has no imagesTr, labelsTr, dataset.json", "did you mean", "/Task99_Tiny/inner?")),
    ],
)
def test_folders_that_are_no_task(task, tmp_path, monkeypatch, capsys, damage, words):
    """Input: nnUNetv2_semisup_demo --data with a folder that is no whole task. Answer: what is missing; nothing is
    written.
    """
    monkeypatch.chdir(tmp_path)
    damage(task)
    assert cli.demo(["--data", str(task)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err
    assert not (tmp_path / "nnunetv2_semisup_demo").exists()


@pytest.mark.robustness
def test_a_damaged_image_leaves_no_folder(task, tmp_path, capsys):
    """Input: nnUNetv2_semisup_demo --data with a damaged image. Answer: the file is named; no output folder is left."""
    file = task / "imagesTr" / "liver_2.nii.gz"
    file.write_bytes(file.read_bytes()[:300])
    assert cli.demo(["--data", str(task), "-o", str(tmp_path / "out"), "-device", "cpu"]) == 2
    assert "liver_2.nii.gz" in capsys.readouterr().err and not (tmp_path / "out").exists()


def in_this_process(arguments, environment, log) -> None:
    """A command of the demo with nnU-Net's own functions; planning is replaced by plans of a tiny network."""
    name, *rest = arguments
    given = dict(itertools.pairwise(rest))
    with files.environment(**{k: environment[k] for k in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}):
        dataset = "Dataset990_Demo"
        preprocessed = Path(environment["nnUNet_preprocessed"], dataset)
        if name == "nnUNetv2_plan_and_preprocess":
            preprocessed.mkdir()
            shutil.copy(Path(environment["nnUNet_raw"], dataset, "dataset.json"), preprocessed)
            (preprocessed / "dataset_fingerprint.json").write_text("{}")
            plans = make_plans(dataset)
            for configuration in ("2d", "3d_fullres"):
                schemes = {"normalization_schemes": ["ZScoreNormalization"] * 2, "use_mask_for_norm": [False] * 2}
                plans["configurations"][configuration] |= schemes
            statistics = plans["foreground_intensity_properties_per_channel"]
            statistics["1"] = statistics["0"]
            (preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans))
            DefaultPreprocessor(verbose=False).run(dataset, "2d", "nnUNetPlans", 1)
        elif name == "nnUNetv2_train":
            device = torch.device(given["-device"])
            run_training(rest[0], rest[1], rest[2], given["-tr"], given["-p"], device=device)
        elif name == "nnUNetv2_predict":
            model = Path(environment["nnUNet_results"], dataset, f"{given['-tr']}__{given['-p']}__{given['-c']}")
            cases: dict[str, list[str]] = {}
            for file in sorted(Path(given["-i"]).iterdir()):
                cases.setdefault(file.name[: -len("_0000.nii.gz")], []).append(str(file))
            predict_cases(model, ("all",), cases, Path(given["-o"]), given["-device"], None)
        else:
            assert getattr(cli, name.removeprefix("nnUNetv2_semisup_"))(rest) == 0


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_demo_on_a_task(task, tmp_path, monkeypatch, capsys, short_steps):
    """The whole way, of one step each; the start line tells that so few epochs teach nothing."""
    monkeypatch.setattr(run, "_command", in_this_process)
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    out = tmp_path / "out"
    assert cli.demo(["--data", str(task), "-o", str(out), "--epochs", "1", "-device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "Taking 4 labelled, 3 unlabelled, 2 test cases" in printed and "Fewer than 20 epochs" in printed
    assert "CPU" in printed and "On a GPU: not measured" in printed and "difference" in printed
    models = [f"{name}_1epoch" for name in ("nnUNetTrainer", "nnUNetTrainerPasteMatch")]
    rows = (out / "dice.csv").read_text().splitlines()
    assert rows[0] == ",".join(["case", *models]) and len(rows) == 3
    assert {f.name for f in (out / "evaluation").iterdir()} == set(models)
    assert (out / "overlay.png").stat().st_size > 10_000


@pytest.mark.slow
def test_whole_demo(tmp_path):
    arguments = ["-o", str(tmp_path / "d"), "--epochs", "1"]
    code = f"import sys; from nnunetv2_semisup.cli import demo; sys.exit(demo({arguments}))"
    # nnU-Net cannot plan with the 0 loader workers that the other tests use
    environment = {k: v for k, v in os.environ.items() if k != "nnUNet_n_proc_DA"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert "difference" in result.stdout and (tmp_path / "d" / "overlay.png").is_file()
