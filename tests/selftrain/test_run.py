"""Whole self-trainings of few steps: what they write, how they go on after a kill, what they refuse."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_semisup import cli
from nnunetv2_semisup.selftrain import dataset as dataset_module

ARGUMENTS = ["-d", "901", "-o", "911", "-c", "2d", "-device", "cpu", "-np", "1"]
FOLDS = [*ARGUMENTS, "-f", "0", "1", "--drop", "0.34", "--min_confidence", "0.6"]


def read(file: Path):
    return json.loads(file.read_text(encoding="utf-8"))


def array(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def names(folder: Path) -> list[str]:
    """Files below, but logs, which are named after the time."""
    return [name for name in contents(folder) if "training_log_" not in name]


def states(dataset) -> dict:
    state = read(dataset.root / "results/selftrain_Dataset911/state.json")
    return {**state, "seconds": list(state["seconds"])}


def test_folds_with_ignore_label(data, short_steps, capsys):
    """Two folds: the case on which they differ most is dropped, doubtful voxels are ignored, test cases come along."""
    dataset = data()
    before = contents(dataset.raw)
    assert cli.selftrain(FOLDS) == 0
    out = capsys.readouterr().out
    assert "[9/9] round 1: train fold 1 (about 0:00:" in out
    assert "Dataset911_Tiny_round1: 2 pseudo-labelled cases, 1 dropped" in out
    assert contents(dataset.raw) == before, "the original is as it was"

    new = dataset.raw.with_name("Dataset911_Tiny_round1")
    record = read(new / "pseudo_labels.json")
    assert (record["source"], record["kept"], record["dropped"], record["compared"]) == (dataset.name, 2, 1, "folds")
    work = dataset.root / "results/selftrain_Dataset911/round_1"
    for case, entry in record["cases"].items():
        first, second = (array(work / f"fold_{fold}" / f"{case}.nii.gz") for fold in (0, 1))
        assert entry["u"] == (first != second).sum() / max(1, ((first > 0) | (second > 0)).sum())
        assert entry["round"] == 1 and entry["source"] == [f"{dataset.name}/imagesUn/{case}_0000.nii.gz"]
    kept = {case for case, entry in record["cases"].items() if entry["kept"]}
    u = {case: entry["u"] for case, entry in record["cases"].items()}
    assert max(u[case] for case in kept) <= min(u[case] for case in set(u) - kept)

    pseudo = {f"pseudo_{case}" for case in kept}
    assert {f.name.removesuffix(".nii.gz") for f in (new / "labelsTr").iterdir()} == pseudo | set(dataset.labelled)
    assert read(new / "dataset.json")["labels"] == {"background": 0, "organ": 1, "ignore": 2}
    assert read(new / "dataset.json")["numTraining"] == 5
    assert all(array(new / "labelsTr" / f"{case}.nii.gz").max() < 2 for case in dataset.labelled)
    ignored = {case: int((array(new / "labelsTr" / f"pseudo_{case}.nii.gz") == 2).sum()) for case in kept}
    assert ignored == {case: record["cases"][case]["ignored_voxels"] for case in kept} and sum(ignored.values())
    for name in ("imagesTs", "labelsTs"):
        assert contents(new / name) == contents(dataset.raw / name)
    assert (new / "pseudo_labels.png").read_bytes().startswith(b"\x89PNG")

    preprocessed = dataset.preprocessed.with_name(new.name)
    for folder in (new, preprocessed):
        old_folds, new_folds = read(dataset.preprocessed / "splits_final.json"), read(folder / "splits_final.json")
        for old, fold in zip(old_folds, new_folds, strict=True):
            assert fold["val"] == old["val"] and set(fold["train"]) == set(old["train"]) | pseudo
    plans = read(preprocessed / "nnUNetPlans.json")
    assert plans == {**dataset.plans, "dataset_name": new.name}
    for fold in (0, 1):
        model = dataset.root / "results" / new.name / "nnUNetTrainer__nnUNetPlans__2d"
        assert (model / f"fold_{fold}" / "checkpoint_final.pth").is_file()


def test_rounds_of_one_model_with_regions_in_3d(data, short_steps):
    """Nothing to compare in round 1, so that all are kept; in round 2 the predictions of both rounds."""
    dataset = data("regions")
    options = ["-c", "3d_fullres", "--rounds", "2", "--drop", "0.5", "--min_confidence", "0.55"]
    assert cli.selftrain([*ARGUMENTS, *options]) == 0
    first, second = (dataset.raw.with_name(f"Dataset91{n}_Tiny_round{n}") for n in (1, 2))
    records = [read(folder / "pseudo_labels.json") for folder in (first, second)]
    assert [(r["compared"], r["kept"], r["dropped"]) for r in records] == [("nothing", 3, 0), ("rounds", 2, 1)]
    assert all(entry["u"] is None for entry in records[0]["cases"].values())
    for case, entry in records[1]["cases"].items():
        work = dataset.root / "results/selftrain_Dataset911"
        a, b = (array(work / path / f"{case}.nii.gz") for path in ("round_1/fold_all", "round_2/fold_0"))
        assert entry["u"] == (a != b).sum() / max(1, ((a > 0) | (b > 0)).sum())
    assert read(second / "dataset.json")["labels"] == {**read(dataset.raw / "dataset.json")["labels"], "ignore": 3}
    for folder in (first, second):
        [fold] = read(folder / "splits_final.json")
        pseudo = {f.name.removesuffix(".nii.gz") for f in (folder / "labelsTr").glob("pseudo_*")}
        assert fold["val"] == list(dataset.labelled) and set(fold["train"]) == set(dataset.labelled) | pseudo


def test_killed_at_three_points_it_ends_with_the_same_files(data, short_steps, capsys, monkeypatch):
    arguments = [*FOLDS, "--rounds", "1"]
    whole = data(folder="whole")
    assert cli.selftrain(arguments) == 0
    killed = data(folder="killed")

    def kill(owner, name: str, call: int) -> None:
        """The ``call``-th call ends the command as Ctrl-C does."""
        real, calls = getattr(owner, name), []

        @functools.wraps(real)
        def stop(*args, **kwargs):
            calls.append(name)
            if len(calls) == call:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stop)
            assert cli.selftrain(arguments) == 130

    def done() -> int:
        capsys.readouterr()
        return len(states(killed)["seconds"])

    kill(nnUNetTrainer, "perform_actual_validation", 2)  # fold 1 is trained, and that is not noted
    assert done() == 1
    kill(nnUNetPredictor, "predict_from_files_sequential", 2)
    assert done() == 2
    assert [f.name for f in (killed.root / "results/selftrain_Dataset911").rglob("unl*.nii.gz")] == ["unl0.nii.gz"]
    kill(dataset_module, "draw_sheet", 1)
    assert done() == 5 and [f.name for f in killed.raw.parent.iterdir()] == [killed.name], "no half a data set"

    trained = (killed.root / "results").rglob("checkpoint_final.pth")
    before = {file: file.stat().st_mtime_ns for file in trained}
    assert cli.selftrain(arguments) == 0
    assert "[1/9]" not in capsys.readouterr().out
    assert before and all(file.stat().st_mtime_ns == then for file, then in before.items()), "nothing is trained twice"
    assert contents(killed.raw.parent) == contents(whole.raw.parent)
    assert states(killed) == states(whole)
    for folder in ("results", "preprocessed"):
        assert names(killed.root / folder) == names(whole.root / folder)
    work = "results/selftrain_Dataset911/round_1"
    assert contents(killed.root / work) == contents(whole.root / work)


def test_a_checkpoint_that_was_cut_off_is_not_loaded(data, short_steps, monkeypatch):
    dataset = data()
    fold = dataset.root / "results" / dataset.name / "nnUNetTrainer__nnUNetPlans__2d" / "fold_all"

    def cut_off(self, npz):
        file = Path(self.output_folder, "checkpoint_final.pth")
        file.write_bytes(file.read_bytes()[:1000])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(nnUNetTrainer, "perform_actual_validation", cut_off)
        assert cli.selftrain(ARGUMENTS) == 130
    assert (fold / "checkpoint_final.pth").stat().st_size == 1000
    assert cli.selftrain(ARGUMENTS) == 0


def error(capsys) -> str:
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-d", "77"], ("-d 77", "no dataset")),
        (["-o", "901"], ("901 is taken", "-o")),
        (["-o", "900", "--rounds", "2"], ("901 is taken", "-o")),
        (["--rounds", "0"], ("--rounds 0", "at least 1")),
        (["--drop", "1"], ("--drop 1.0", "0 to below 1")),
        (["--drop", "-0.1"], ("--drop -0.1",)),
        (["--drop", "nan"], ("--drop nan",)),
        (["--min_confidence", "1.5"], ("--min_confidence 1.5",)),
        (["-f", "all", "0"], ("-f all 0",)),
        (["-f", "0", "0"], ("-f 0 0",)),
        (["-f", "3"], ("-f 3", "0 to 2")),
        (["-p", "nothing"], ("nothing.json", "nnUNetv2_plan_and_preprocess")),
        (["-c", "5d"], ("-c 5d", "3d_fullres")),
        (["-c", "3d_cascade_fullres"], ("-c 3d_cascade_fullres", "cascade")),
        (["-tr", "nnUNetTrainerNothing"], ("nnUNetTrainerNothing", "no such trainer")),
        (["-tr", "nnUNetTrainerMeanTeacher_5epochs"], ("nnUNetTrainerMeanTeacher_5epochs", "stock trainer")),
        (["-np", "0"], ("-np 0",)),
    ],
)
def test_wrong_input(data, capsys, arguments, words):
    dataset = data()
    assert cli.selftrain([*ARGUMENTS, *arguments]) == 2
    line = error(capsys)
    assert all(word in line for word in words), line
    assert not list((dataset.root / "results").iterdir()) and len(list(dataset.raw.parent.iterdir())) == 1


def test_wrong_data(data, capsys):
    dataset = data()
    shutil.rmtree(dataset.preprocessed / "nnUNetPlans_2d")
    assert cli.selftrain(ARGUMENTS) == 2
    assert "nnUNetv2_preprocess -d 901 -plans_name nnUNetPlans -c 2d" in error(capsys)
    image = dataset.raw / "imagesUn" / "unl0_0000.nii.gz"
    image.write_bytes(image.read_bytes()[:200])
    assert cli.selftrain([*ARGUMENTS, "-c", "3d_fullres"]) == 2
    assert "unl0_0000.nii.gz: damaged" in error(capsys)
    for file in (dataset.raw / "imagesUn").iterdir():
        file.unlink()
    assert cli.selftrain(ARGUMENTS) == 2
    assert "imagesUn is empty: put the unlabelled images there" in error(capsys)
    assert not list((dataset.root / "results").iterdir())


def test_a_labelled_case_named_as_a_pseudo_label(data, capsys):
    dataset = data()
    for file in (*dataset.raw.glob("imagesTr/lab0*"), *dataset.raw.glob("labelsTr/lab0*")):
        file.rename(file.with_name(f"pseudo_{file.name}"))
    assert cli.selftrain(ARGUMENTS) == 2
    assert "pseudo_lab0" in error(capsys)


def test_changed_arguments_on_resume(data, short_steps, capsys, monkeypatch):
    dataset = data()
    with monkeypatch.context() as patch:
        patch.setattr(nnUNetTrainer, "run_training", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli.selftrain(ARGUMENTS) == 130
    capsys.readouterr()
    assert cli.selftrain([*ARGUMENTS, "--drop", "0.5"]) == 2
    assert "other arguments (drop 0.0 -> 0.5)" in error(capsys)
    (dataset.raw / "imagesUn" / "unl2_0000.nii.gz").unlink()
    assert cli.selftrain(ARGUMENTS) == 2
    assert "unlabelled" in error(capsys)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_kill_9_of_the_command(data):
    """Stock steps and nnU-Net's own processes, killed in a training, in the predictions and in a later training."""
    dataset = data(unlabelled=6)
    code = "import sys; from nnunetv2_semisup.cli import selftrain; sys.exit(selftrain())"
    command = [sys.executable, "-c", code, *ARGUMENTS, "-tr", "nnUNetTrainer_1epoch"]
    log = open(dataset.root / "log.txt", "ab")  # noqa: SIM115 - several processes write it
    model = dataset.root / "results" / dataset.name / "nnUNetTrainer_1epoch__nnUNetPlans__2d" / "fold_all"
    work = dataset.root / "results/selftrain_Dataset911"
    new = "Dataset911_Tiny_round1"
    for condition in (
        lambda: model.is_dir(),
        lambda: any(work.rglob("unl1.nii.gz")),
        lambda: (dataset.root / "results" / new).is_dir(),
    ):
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.time() + 300
        while not condition():
            assert process.poll() is None and time.time() < deadline, (dataset.root / "log.txt").read_text()
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert subprocess.run(command, stdout=log, stderr=log).returncode == 0, (dataset.root / "log.txt").read_text()
    log.close()
    assert states(dataset)["seconds"][-1] == "round 1: train fold 0"
    assert read(dataset.raw.with_name(new) / "pseudo_labels.json")["kept"] == 6
    final = dataset.root / "results" / new / model.parent.name / "fold_0"
    assert (final / "checkpoint_final.pth").is_file() and (final / "validation" / "summary.json").is_file()
    assert not list(dataset.raw.parent.glob(".tmp*")) and not list(work.rglob("*.tmp"))
