"""Arguments in, one line and exit code 2 for wrong input."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nnunetv2_semisup import cli, discovery
from nnunetv2_semisup.benchmark import records

RESULTS = Path(__file__).resolve().parents[1] / "results"

COMMANDS = [
    *(cli.trainers, cli.plans, cli.preprocess, cli.hide_labels, cli.add_unlabeled),
    *(cli.selftrain, cli.evaluate, cli.export, cli.benchmark, cli.demo),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.__name__)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        command(["-h"])
    assert stop.value.code == 0 and "usage: nnUNetv2_semisup_" in capsys.readouterr().out


def test_trainers(capsys, monkeypatch):
    assert cli.trainers([]) == 0
    assert "--list" in capsys.readouterr().out, "it says what it can do"
    assert cli.trainers(["--folder"]) == 0
    assert capsys.readouterr().out.strip() == discovery.ext_trainers_folder()
    monkeypatch.setenv("nnUNet_extTrainer", discovery.ext_trainers_folder())
    assert cli.trainers(["--check"]) == 0
    assert "nnUNetTrainerMeanTeacher  " in capsys.readouterr().out
    monkeypatch.delenv("nnUNet_extTrainer")
    assert cli.trainers(["--check"]) == 2


def test_folder_is_quick():
    """Shells call it at every start: neither torch nor nnU-Net is imported."""
    code = "import sys; from nnunetv2_semisup import cli; cli.trainers(['--folder']); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("columns", [60, 100])
def test_list_tells_cost_and_use_of_every_trainer_within_the_terminal(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.trainers(["--list"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    for name, trainer in discovery.trainers().items():
        method = trainer.method_class
        assert f"\n{name}\n    " in out
        assert f"{method.cost:.1f} stock steps, {method.memory_gib:.1f} GiB; {method.use}" in " ".join(out.split())


def test_listed_costs_are_the_counted_ones():
    """Those that results/counted.csv has for 128 x 128 x 128 voxels."""
    rows = {
        row["trainer"]: row for row in records.read_csv(RESULTS / "counted.csv") if row["patch"] == "128 x 128 x 128"
    }
    for name, trainer in discovery.trainers().items():
        assert trainer.method_class.cost == pytest.approx(float(rows[name]["operations_ratio"]), abs=0.051), name
        assert trainer.method_class.memory_gib == pytest.approx(float(rows[name]["gib"]), abs=0.051), name


def test_settings_of_a_trainer(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    trainer = "nnUNetTrainerCrossMatch"
    (tmp_path / tiny.name).mkdir()
    for name, values in {"nnUNetPlans": {"conf_tau": 0.9}, "old": {"preset": "published"}}.items():
        plans = {**tiny.plans, "plans_name": name, "semisup": {trainer: values}}
        (tmp_path / tiny.name / f"{name}.json").write_text(json.dumps(plans))
    assert cli.trainers(["--settings", trainer, "-d", "901"]) == 0
    out = capsys.readouterr().out
    assert "\nconf_tau = 0.85; nnUNetPlans: 0.9\n" in out
    assert max(map(len, out.splitlines())) <= 70
    for field in dataclasses.fields(discovery.settings_class(trainer)):
        assert f"\n{field.name} = " in f"\n{out}" and field.metadata["source"] in " ".join(out.split())
    assert cli.trainers(["--settings", trainer, "-d", "901", "-p", "old"]) == 0
    out = capsys.readouterr().out
    assert "start_dice = 0.5; published: 0.0; old: 0.0\n" in out, "what the preset changes counts too"
    assert 'preset = "default"; old: "published"\n' in out and "conf_tau = 0.85\n" in out
    assert cli.trainers(["--settings", trainer]) == 0 and "old:" not in capsys.readouterr().out


def test_plans_keep_what_they_had_and_say_what_changes(tiny, tmp_path, monkeypatch, capsys):
    folder = tmp_path / tiny.name
    shutil.copytree(tiny.preprocessed, folder)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    arguments = ["-d", "901", "-o", "mine"]
    assert cli.plans([*arguments, "--set", "nnUNetTrainerCrossMatch.conf_tau=0.9"]) == 0
    assert "nnUNetTrainerCrossMatch.conf_tau: not set -> 0.9\n" in capsys.readouterr().out
    more = ["--set", "nnUNetTrainerCrossMatch.conf_tau=0.95", "--set", "nnUNetTrainerMeanTeacher.num_epochs=7"]
    assert cli.plans([*arguments, *more]) == 0
    out = capsys.readouterr().out
    assert "conf_tau: 0.9 -> 0.95\n" in out and "nnUNetTrainerMeanTeacher.num_epochs: not set -> 7\n" in out
    assert cli.plans([*arguments, "--unset", "nnUNetTrainerCrossMatch.conf_tau"]) == 0
    assert "conf_tau: 0.95 -> not set\n" in capsys.readouterr().out
    kept = json.loads((folder / "mine.json").read_text())["semisup"]
    assert kept == {"nnUNetTrainerMeanTeacher": {"num_epochs": 7}}
    assert cli.plans([*arguments, "--unset", "nnUNetTrainerCrossMatch.conf_tau"]) == 2
    one_error_line(capsys, "mine.json has no such setting; it has nnUNetTrainerMeanTeacher.num_epochs")


def test_plans_warn_of_small_images_and_name_a_configuration_that_is_there(tiny, tmp_path, monkeypatch, capsys):
    folder = tmp_path / tiny.name
    shutil.copytree(tiny.preprocessed, folder)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    plans = tiny.plans
    plans["configurations"] = {"2d": plans["configurations"]["2d"]}
    (folder / "flat.json").write_text(json.dumps({**plans, "plans_name": "flat"}))
    new = ["-d", "901", "-o", "new"]
    there = ": the data is preprocessed already"
    expected = {
        ("-p", "flat"): f"Next: nnUNetv2_train 901 2d FOLD -p new -tr TRAINER{there}",
        (
            "-p",
            "flat",
            "--coarsen",
            "1.2",
        ): "Next: nnUNetv2_preprocess -d 901 -plans_name new -c 2d, then nnUNetv2_train 901 2d FOLD -p new -tr TRAINER",
        (): f"Next: nnUNetv2_train 901 3d_fullres FOLD -p new -tr TRAINER, or with 2d, 3d_resenc{there}",
        ("--coarsen", "1.2"): "Next: nnUNetv2_preprocess -d 901 -plans_name new -c 3d_fullres (or 2d), then "
        "nnUNetv2_train 901 3d_fullres FOLD -p new -tr TRAINER",
    }
    for options, last in expected.items():
        (folder / "new.json").unlink(missing_ok=True)
        assert cli.plans([*new, *options]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1] == last
        assert sum("--preset small" in line for line in lines) == ("--coarsen" in options)
    for identifier, last in (
        ("3d_fullres", f"Next: nnUNetv2_train 901 2d FOLD -p new -tr TRAINER{there}"),
        ("*", expected[("--coarsen", "1.2")].replace("(or 2d)", "(or 2d, 3d_resenc, 3d_cascade_fullres)")),
    ):
        for data in folder.glob(f"nnUNetPlans_{identifier}"):
            shutil.rmtree(data)
        assert cli.plans(new) == 0
        assert capsys.readouterr().out.splitlines()[-1] == last, "what is not preprocessed is not offered"


def one_error_line(capsys, *words) -> None:
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        (cli.preprocess, ["-d", "77"], ("-d 77", "nnUNetv2_plan_and_preprocess")),
        (cli.preprocess, ["-d", "901", "-np", "0"], ("-np 0",)),
        (cli.preprocess, ["-d", "901", "-p", "nothing"], ("nothing",)),
        (cli.preprocess, ["-d", "901", "-c", "5d"], ("5d",)),
        (cli.plans, ["-d", "901", "-o", "new", "--set", "nnUNetTrainerMeanTeacher.x=1"], ("'x'",)),
        (cli.plans, ["-d", "901", "-o", "nnUNetPlans"], ("nnUNetPlans",)),
        (cli.plans, ["-d", "901", "-o", "new", "--preset", "tiny"], ("unknown preset 'tiny'",)),
        (cli.plans, ["-d", "901", "-o", "new", "--features"], ("--features: give at least one",)),
        (cli.plans, ["-d", "901", "-o", "new", "--batch_size", "0"], ("--batch_size 0",)),
        (cli.plans, ["-d", "901", "-o", "new", "--patch_size", "18", "16", "16"], ("3d_fullres", "give 20 16 16")),
        (cli.hide_labels, ["-d", "77", "-o", "78", "--labeled", "2"], ("-d 77", "no dataset")),
        (cli.hide_labels, ["-d", "901", "-o", "901", "--labeled", "2"], ("901 is taken",)),
        (cli.hide_labels, ["-d", "901", "-o", "902", "--labeled", "9"], ("--labeled 9", "1 to 3")),
        (cli.add_unlabeled, ["-d", "901", "nothing"], ("/nothing is no folder: correct", "absolute path")),
        (cli.evaluate, ["-ref", "r", "-pred", "p", "-djfile", "d.json", "-o", "o"], ("d.json", "does not exist")),
        (cli.benchmark, [], ("GRID.yaml", "-d")),
        (cli.benchmark, ["nowhere.yaml"], ("nowhere.yaml",)),
        (cli.benchmark, ["grid.yaml", "-d", "901"], ("either",)),
        (cli.benchmark, ["-d", "901", "--epochs", "1"], ("trainers is missing",)),
        (cli.benchmark, ["-d", "77", "-tr", "nnUNetTrainer", "--epochs", "1"], ("-d 77",)),
        (cli.benchmark, ["-d", "901", "-tr", "nnUNetTrainer", "--epochs", "1"], ("imagesTs",)),
        (cli.benchmark, ["-d", "901", "--threads", "0"], ("--threads 0",)),
        (cli.benchmark, ["--speed"], ("-d ID",)),
        (cli.demo, ["--epochs", "0"], ("--epochs 0",)),
        (cli.demo, ["--data", "nowhere"], ("--data nowhere", "no folder", "Task04_Hippocampus")),
        (cli.trainers, ["--settings", "nnUNetTrainerUAMT", "-p", "mine"], ("-p needs -d",)),
        (cli.trainers, ["-d", "901"], ("--settings TRAINER",)),
        (cli.trainers, ["--settings", "CrossMatch_5epochs"], ("did you mean nnUNetTrainerCrossMatch?",)),
        (cli.trainers, ["--settings", "nnUNetTrainerUAMT", "-d", "901", "-p", "x"], ("x.json", "-p: nnUNetPlans")),
        (cli.preprocess, ["-d", "901", "-p", "nothing"], ("with -p: nnUNetPlans",)),
        (cli.plans, ["-d", "77", "-o", "new"], ("-d 77", "there is Dataset901_Tiny", "preprocess -d 77")),
        (cli.demo, ["-tr", "nnUNetTrainerMeanTeachr"], ("did you mean nnUNetTrainerMeanTeacher",)),
    ],
)
def test_wrong_input(tiny, capsys, monkeypatch, tmp_path, command, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert command(arguments) == 2
    one_error_line(capsys, *words)
    assert not (tmp_path / "nnunetv2_semisup_demo").exists()


def test_unset_variable(capsys, monkeypatch):
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    assert cli.preprocess(["-d", "901"]) == 2
    one_error_line(capsys, "nnUNet_preprocessed is not set")


def test_demo_refuses_a_folder_in_use(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert cli.demo(["-o", str(tmp_path)]) == 2
    one_error_line(capsys, "not empty")


def test_preprocess_and_plans_do_their_work(tiny, capsys):
    assert cli.preprocess(["-d", "Dataset901_Tiny", "-np", "1"]) == 0
    assert "3d_fullres: 3 unlabelled cases are ready" in capsys.readouterr().out
    assert cli.plans(["-d", "901", "-o", "derived", "--set", "nnUNetTrainerMeanTeacher.noise_std=0.2"]) == 0
    assert (tiny.preprocessed / "derived.json").is_file()
    (tiny.preprocessed / "derived.json").unlink()
    splits = json.loads((tiny.preprocessed / "splits_final.json").read_text())  # stock needs them for 3 cases
    assert [fold["val"] for fold in splits] == [["lab0"], ["lab1"], ["lab2"]]


def test_benchmark_report_of_an_empty_work_folder(tiny, capsys, tmp_path):
    assert cli.benchmark(["--report", "-o", str(tmp_path / "work")]) == 2, "a mistyped folder"
    one_error_line(capsys, str(tmp_path / "work"), "-o")
    assert not (tmp_path / "work").exists()
    (tmp_path / "work").mkdir()
    assert cli.benchmark(["--report", "-o", str(tmp_path / "work")]) == 0
    assert "No results yet" in (tmp_path / "work" / "results" / "README.md").read_text()
    (tmp_path / "benchmark").mkdir()
    assert cli.benchmark(["--report"]) == 0, "the default is beside nnUNet_results"
    assert (tmp_path / "benchmark" / "results" / "README.md").is_file()
