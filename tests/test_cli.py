"""Arguments in, one line and exit code 2 for wrong input."""

import json

import pytest

from nnunetv2_semisup import cli, discovery

COMMANDS = [
    *(cli.trainers, cli.plans, cli.preprocess, cli.hide_labels, cli.add_unlabeled),
    *(cli.selftrain, cli.evaluate, cli.benchmark, cli.demo),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.__name__)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        command(["-h"])
    assert stop.value.code == 0 and "usage: nnUNetv2_semisup_" in capsys.readouterr().out


def test_trainers(capsys, monkeypatch):
    assert cli.trainers([]) == 0
    assert capsys.readouterr().out.strip() == discovery.ext_trainers_folder()
    monkeypatch.setenv("nnUNet_extTrainer", discovery.ext_trainers_folder())
    assert cli.trainers(["--check"]) == 0
    assert "nnUNetTrainerMeanTeacher  " in capsys.readouterr().out
    monkeypatch.delenv("nnUNet_extTrainer")
    assert cli.trainers(["--check"]) == 2


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
        (cli.add_unlabeled, ["-d", "901", "nothing"], ("nothing", "no folder")),
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
        (cli.demo, ["--epochs", "3"], ("--epochs 3",)),
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
