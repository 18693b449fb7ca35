"""Two evaluations of the same cases side by side, through the command, and against the benchmark's own comparison."""

import csv
import math
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from imports import REPOSITORY

from nnunetv2_semisup import cli
from nnunetv2_semisup.benchmark import table as benchmark_table
from nnunetv2_semisup.evaluation.summary import COLUMNS

CASES = [f"c{i:02}" for i in range(20)]


def write(folder, dice, postprocessing=("none",), without=""):
    """A cases.csv; dice: (case, label) -> value. NaN is a mask that is rightly empty, 0 a failure."""
    folder.mkdir(exist_ok=True)
    with open(folder / "cases.csv", "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, [c for c in COLUMNS if c != without], extrasaction="ignore")
        writer.writeheader()
        for (case, label), value in dice.items():
            for name in postprocessing:
                voxels = {
                    "voxels_prediction": 0 if not value > 0 else 9,
                    "voxels_reference": 0 if value != value else 9,
                }
                names = {"case": case, "label": label, "postprocessing": name}
                writer.writerow({**dict.fromkeys(COLUMNS, 0.5), **names, "dice": f"{value:.6f}", **voxels})


def random_dice(seed, labels=("a",), low=0.4):
    random = np.random.default_rng(seed)
    return {(case, label): random.uniform(low, 1) for case in CASES for label in labels}


def compare(capsys, *folders):
    assert cli.evaluate(["--compare", *map(str, folders)]) == 0
    return capsys.readouterr().out.splitlines()


def cells(line):
    return [part.strip() for part in line.split("  ") if part.strip()]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_row_per_folder_as_the_benchmark_compares(here, capsys):
    dice = {"stock": random_dice(0), "out/ours": random_dice(1, low=0.6), "third": random_dice(2)}
    dice["third"]["c03", "a"] = 0.0
    (here / "out").mkdir()
    for name, values in dice.items():
        write(here / name, values)
    lines = compare(capsys, *dice)
    assert lines[0] == "20 cases, predictions as they are; mean ± sd over cases"
    assert cells(lines[1]) == ["Dice %", "difference [95 % interval]", "better", "failures"]
    frames = {
        name: pd.DataFrame({"d": {case: round(value, 6) for (case, _), value in values.items()}})
        for name, values in dice.items()
    }
    for line, (name, frame) in zip(lines[2:5], frames.items(), strict=True):
        d = benchmark_table.paired_difference(frame, frames["stock"])
        compared = [f"{100 * d.mean:+.1f} [{100 * d.low:.1f}, {100 * d.high:.1f}]", f"{d.better} of 20"]
        mean = f"{100 * frame['d'].mean():.1f} ± {100 * frame['d'].std(ddof=1):.1f}"
        assert cells(line) == [name, mean, *(compared if name != "stock" else []), "1" if name == "third" else "0"]
    assert any("to stock in Dice points" in line for line in lines[5:])


def test_several_labels_and_postprocessings(here, capsys):
    """Per case the mean over labels, then each label; a table for each post-processing that all folders have."""
    a = random_dice(0, ("left ventricle", "b"))
    b = {key: min(1.0, value + 0.1 * (key[1] == "b")) for key, value in a.items()}
    write(here / "A", a, ("none", "largest_component"))
    write(here / "B", b, ("none", "largest_component"))
    lines = compare(capsys, "A", "B")
    assert sum("largest component of each" in line for line in lines) == 1
    names = [line.strip().split("  ")[0] for line in lines[2:11]]
    assert names == ["mean over 2 labels", "A", "B", "left ventricle", "A", "B", "b", "A", "B"]
    gained = np.mean([b[case, "b"] - a[case, "b"] for case in CASES])
    assert f"{100 * gained / 2:+.1f} [" in lines[4] and f"{100 * gained:+.1f} [" in lines[10]
    assert "+0.0 [0.0, 0.0]" in lines[7] and "0 of 20" in lines[7]
    write(here / "B", b)
    text = "\n".join(compare(capsys, "A", "B"))
    assert "no table for largest_component: B was evaluated without --largest_component" in text
    assert "largest component of each" not in text


def test_masks_that_are_rightly_empty(here, capsys):
    """Against a folder that puts something there an empty mask is right, a Dice of 1; where all are empty, nothing."""
    write(here / "A", {("c1", "a"): 0.0, ("c2", "a"): 0.5, ("c3", "a"): math.nan})
    write(here / "B", {("c1", "a"): math.nan, ("c2", "a"): 0.5, ("c3", "a"): math.nan})
    for folder, predicted in (("A", 5), ("B", 0)):
        text = (here / folder / "cases.csv").read_text().splitlines()
        text[1] = ",".join([*text[1].split(",")[:-2], str(predicted), "0"])
        (here / folder / "cases.csv").write_text("\n".join(text))
    lines = compare(capsys, "A", "B")
    assert cells(lines[2]) == ["A", "25.0 ± 35.4", "1"]
    assert cells(lines[3])[:2] == ["B", "75.0 ± 35.4"] and cells(lines[3])[3:] == ["1 of 2", "0"]
    assert any("rightly empty" in line and line.startswith("1 ") for line in lines)


def test_one_case_has_no_interval_and_nothing_measured_is_a_dash(here, capsys):
    for folder, value in (("A", 0.5), ("B", 0.75)):
        write(here / folder, {("1", "a"): value, ("1", "b"): math.nan})
    lines = compare(capsys, "A", "B")
    assert cells(lines[4]) == ["B", "75.0 ± -", "+25.0", "1 of 1", "0"]
    assert cells(lines[10]) == ["B", "-", "0"]


GOOD = {(case, label): 0.5 for case in ("c1", "c2") for label in ("a", "b")}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({("c1", "a"): None, ("c1", "b"): None}, ("B has no case c1", "A has", "-ref")),
        ({("c3", "a"): 0.5, ("c3", "b"): 0.5}, ("A has no case c3", "B has")),
        ({("c1", "b"): None, ("c2", "b"): None}, ("B has no label b", "A has", "-djfile")),
        ({("c2", "b"): None}, ("B/cases.csv has no row of case c2, label b",)),
        ({("c2", "b"): math.nan}, ("B had another reference than A", "case c2", "label b")),
        ({("c2", "b"): 1.5}, ("B/cases.csv", "case c2", "label b", "damaged")),
    ],
)
def test_different_cases_labels_and_references(here, capsys, change, words):
    write(here / "A", GOOD)
    write(here / "B", {key: value for key, value in {**GOOD, **change}.items() if value is not None})
    refused(capsys, ["A", "B"], *words)


def refused(capsys, folders, *words):
    assert cli.evaluate(["--compare", *folders]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err


def test_missing_files_and_columns(here, capsys):
    write(here / "A", GOOD)
    refused(capsys, ["A"], "at least two")
    refused(capsys, ["A", "nothing"], "nothing has no cases.csv", "-o")
    write(here / "B", GOOD, without="dice")
    refused(capsys, ["A", "B"], "B/cases.csv has no column dice", "evaluate again")
    (here / "B" / "cases.csv").write_bytes(b"\xff\xfe\x00")
    refused(capsys, ["A", "B"], "B/cases.csv")
    (here / "B" / "cases.csv").write_text("")
    refused(capsys, ["B", "A"], "B/cases.csv has no column case")
    (here / "B" / "cases.csv").write_text(",".join(COLUMNS) + "\nc1,a,none\n")
    refused(capsys, ["A", "B"], "B/cases.csv is damaged at case c1, label a")
    (here / "B" / "cases.csv").write_text(",".join(COLUMNS) + "\n")
    refused(capsys, ["A", "B"], "B/cases.csv has no rows")
    write(here / "B", GOOD, ("none", "none"))
    refused(capsys, ["A", "B"], "B/cases.csv has case c1, label a twice")
    write(here / "B", GOOD, ("none", "magic"))
    refused(capsys, ["A", "B"], "'magic'")
    refused(capsys, ["A", "A", "-ref", "r"], "leave -ref out")
    refused(capsys, ["A", "A", "--largest_component"], "leave --largest_component out")


def test_the_example_of_the_docs(here, capsys):
    """The table of docs/your_data.md is that of its two runs."""
    runs = REPOSITORY / "results" / "study_hippocampus" / "cases"
    for name, trainer in (("STOCK_TABLES", "nnUNetTrainer"), ("OURS_TABLES", "nnUNetTrainerPasteMatch")):
        (here / name).mkdir()
        shutil.copy(
            runs / f"Dataset693_ACDCStudy__{trainer}_20epochs__cpu__2d__fold_all__seed0.csv", here / name / "cases.csv"
        )
    lines = compare(capsys, "STOCK_TABLES", "OURS_TABLES")[:5]
    page = (REPOSITORY / "docs" / "your_data.md").read_text(encoding="utf-8")
    assert "\n".join(f"    {line}" for line in lines) in page, "\n".join(lines)


def test_it_is_fast(here):
    """Neither torch nor nnU-Net nor pandas is imported."""
    write(here / "A", GOOD)
    write(here / "B", GOOD)
    heavy = ("torch", "nnunetv2", "pandas", "scipy.stats", "SimpleITK")
    code = "import sys; from nnunetv2_semisup import cli; assert cli.evaluate(['--compare', 'A', 'B']) == 0; "
    code += f"sys.exit(', '.join(m for m in {heavy} if m in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-X", "utf8", "-c", code], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
