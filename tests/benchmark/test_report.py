"""Generated pages and pictures: made from the CSV files, and noticed when they are stale."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from nnunetv2_semisup import discovery
from nnunetv2_semisup.benchmark import grid, plots, records, report, speed, table
from nnunetv2_semisup.errors import InputError

from .conftest import CASES, make_record, make_run

REPOSITORY = Path(__file__).parents[2]
MARKERS = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"


def text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


@pytest.fixture
def results(filled, tmp_path):
    (tmp_path / "README.md").write_text(MARKERS)
    records.collect(filled, tmp_path / "results")
    report.write(tmp_path / "results", None)
    return tmp_path / "results"


@pytest.mark.parametrize("folder", ["results", "results/archive_1250", "results/study_hippocampus"])
def test_the_repositorys_pages_and_pictures_are_those_of_its_numbers(folder):
    results, texts = REPOSITORY / folder, report.texts(REPOSITORY / folder)
    command = f"nnUNetv2_semisup_benchmark --report --results {folder}"
    for file, expected in texts.items():
        assert text(file) == expected, f"{file} is stale: run {command}"
    if folder == "results":
        assert REPOSITORY / "README.md" in texts, "README.md has lost its markers"
    assert plots.stale(results) == [], f"stale pictures: run {command}"


@pytest.mark.parametrize("folder", ["results", "results/archive_1250", "results/study_hippocampus"])
def test_the_repositorys_grids_can_be_read(folder):
    file = REPOSITORY / folder / "grid.yaml"
    assert grid.expand(grid.read(file), lambda dataset: f"Dataset{dataset}_X", str(file))


def test_no_results_yet(tmp_path):
    (tmp_path / "README.md").write_text(MARKERS)
    report.write(tmp_path / "results", None)
    assert text(tmp_path / "README.md") == f"before\n{report.BEGIN}\n{table.EMPTY}{report.END}\nafter\n"
    assert text(tmp_path / "results" / "README.md").endswith(table.EMPTY)
    assert [f.name for f in (tmp_path / "results").iterdir()] == ["README.md"] and plots.stale(
        tmp_path / "results"
    ) == []


def test_pages(results):
    front = text(results.parent / "README.md")
    assert front.startswith("before\n") and front.endswith("\nafter\n") and "old" not in front
    assert front.count("`nnUNetTrainerCrossMatch`") == 2
    page = text(results / "README.md")
    assert page.count("### Tiny: ") == 3 and "A processor, 2 cores" in page
    for picture in re.findall(r"\]\((plots/.*?)\)", page):
        assert (results / picture).is_file()
    report.write(results, None)
    assert text(results.parent / "README.md") == front and text(results / "README.md") == page


def test_a_readme_without_markers_is_left_alone_and_half_a_marker_is_an_error(results):
    front = results.parent / "README.md"
    front.write_text("my own")
    assert front not in report.texts(results)
    front.write_text(report.BEGIN)
    with pytest.raises(InputError, match=r"README.md has the marker.*add it"):
        report.texts(results)


def test_changed_numbers_make_pages_and_pictures_stale(results):
    assert plots.stale(results) == []
    case_file = next((results / "cases").glob("Dataset908*CrossMatch*"))
    lines = case_file.read_text().splitlines()
    changed = lines[1].split(",")
    changed[4] = "0.123400"
    case_file.write_text("\n".join([lines[0], ",".join(changed), *lines[2:]]) + "\n")
    stale = plots.stale(results)
    assert {name.split("__")[0] for name in stale} == {"labels", "differences", "cases"}
    assert not any("4_labelled" in name for name in stale)
    assert report.texts(results)[results / "README.md"] != text(results / "README.md")


def test_learning_curves(filled, results):
    """Stock logs the online Dice; a method its pseudo-labels as well, from its start on."""
    for trainer in ("nnUNetTrainer", "nnUNetTrainerMeanTeacher"):
        run = make_run(dataset="Dataset904_Tiny", trainer=trainer, seed=1, inference=("nnunet", "literature"))
        record = filled.read(run)
        rows = [{"epoch": i, "online_dice_1": 0.1 * i, "online_dice_2": None} for i in range(5)]
        if trainer != "nnUNetTrainer":
            rows[4:] = [{**rows[4], "share_kept": 0.5, "share_volume_1": 0.1}]
        records.write(filled.record(run), record | {"curve": rows})
    records.collect(filled, results)
    files = sorted((results / "curves").iterdir())
    assert len(files) == 2 and files[0].read_text().splitlines()[2] == "1,0.100000,,,"
    new = [name for name in plots.stale(results) if name.startswith("curves__4_labelled__Tiny")]
    assert len(new) == 1
    report.write(results, None)
    drawn = imread(results / "plots" / new[0])
    assert plots.stale(results) == [] and drawn[..., :3].std() > 0.05
    assert f"(plots/{new[0]})" in text(results / "README.md")
    files[1].write_text(files[1].read_text().replace("0.400000", "0.300000"))
    assert new[0] in plots.stale(results)


def test_a_missing_file_of_cases_is_named(results):
    next((results / "cases").iterdir()).unlink()
    with pytest.raises(InputError, match=r"cases/Dataset9.*seed\d\.csv is missing"):
        report.texts(results)


def test_pictures_of_numbers_that_are_gone_are_removed(results):
    (results / "plots" / "cases__Dataset999_Old.png").write_bytes(b"")
    drawn = {file.name for file in plots.draw_all(results)}
    assert {file.name for file in (results / "plots").iterdir()} == drawn


def test_pictures_show_something(results):
    for file in (results / "plots").iterdir():
        image = imread(file)
        assert min(image.shape[:2]) > 300 and image[..., :3].std() > 0.05


def test_a_trainer_looks_the_same_everywhere_and_unlike_all_others():
    assert {name.removeprefix("nnUNetTrainer") for name in discovery.trainers()} <= set(plots.LOOKS)
    looks = {name: plots.look(f"nnUNetTrainer{name}") for name in [*plots.LOOKS, "OfAStranger"]}
    colours, markers = zip(*looks.values(), strict=True)
    assert len(set(colours)) == len(looks) and len(set(markers[:-1])) == len(plots.LOOKS)
    for name, expected in looks.items():
        assert plots.look(f"nnUNetTrainer{name}_20epochs") == plots.look(f"nnUNetTrainer{name}_1epoch") == expected


def test_the_axis_of_the_online_dice_fits_what_comes_after_the_beginning(results):
    comparison = next(c for c in table.load(results) if c.is_plain)

    def axis_of(dice):
        (axis,) = plots.draw_curves([replace(comparison, curves=(pd.DataFrame({"online_dice_1": dice}),))]).axes
        return axis

    axis = axis_of([0.0, 0.5, *18 * [0.8], 0.9])
    assert axis.get_ylim() == pytest.approx((0.79, 0.91)) and "without the beginning" in axis.get_ylabel()
    for dice in (np.linspace(0, 1, 21), 21 * [0.5]):
        axis = axis_of(dice)
        assert axis.get_ylim()[0] < min(dice) and "without" not in axis.get_ylabel()


def test_the_ceiling_is_stock_where_no_method_ran(results):
    comparisons = [c for c in table.load(results) if c.is_plain]
    assert plots._ceiling(comparisons).setting["labeled"] == 80
    assert plots._ceiling([c for c in comparisons if c.setting["labeled"] < 80]) is None


def test_what_is_said_by_hand_stands_at_the_head(results):
    (results / "about.md").write_text("What this is.\n")
    page = report.texts(results)[results / "README.md"]
    assert page.index("What this is.") < page.index("## How to read this")


def test_overlays_go_into_the_work_folder(benchmark_data, use, work, tmp_path):
    """Two trainers that predict the truth, and nothing."""
    dataset = use(benchmark_data)
    cases = [f.name.removesuffix(".nii.gz") for f in sorted((dataset.raw / "labelsTs").iterdir())]
    for trainer, dice in (("nnUNetTrainer", [1.0, 0.9, 0.8]), ("nnUNetTrainerMeanTeacher", [0.0, 0.5, 0.9])):
        run = make_run(dataset=dataset.name, trainer=trainer, plans="nnUNetPlans")
        record = make_record(run, dice)
        for row in record["evaluations"]["nnunet"]["cases"]:
            row["case"] = cases[CASES.index(row["case"])]
        records.write(work.record(run), record)
        folder = work.predictions(run) / "nnunet"
        folder.mkdir(parents=True)
        for case in cases:
            (folder / f"{case}.nii.gz").write_bytes((dataset.raw / "labelsTs" / f"{case}.nii.gz").read_bytes())
    report.write(tmp_path / "results", work)
    drawn = sorted((work.root / "overlays").iterdir())
    assert len(drawn) == 2
    in_results = {file.name for file in (tmp_path / "results").rglob("*.png")}
    assert not in_results & {file.name for file in drawn}
    widths = [imread(file).shape[1] for file in drawn]
    assert widths[0] < widths[1] or widths[1] < widths[0], "stock alone has a column less"
    assert np.ptp(imread(drawn[0])[..., 2]) > 0.5


def test_speed_table(tmp_path):
    row = dict.fromkeys(speed.COLUMNS, "x") | {"compiled": False, "step_ratio": 2.5, "memory_ratio": 1.5}
    row |= {"counted_ratio": 2.33, "step_seconds": 0.2, "peak_memory_mb": 100.0, "trainer": "nnUNetTrainerMeanTeacher"}
    speed.write(tmp_path, [row])
    speed.write(tmp_path, [row | {"step_ratio": 2.4}, row | {"hardware": "y"}])
    text = report.texts(tmp_path)[tmp_path / "README.md"]
    assert text.count("| nnUNetTrainerMeanTeacher | no | 2.33 | 0.2000 |") == 2, "one row per machine, the newest"
    assert "| 2.40 | 100 | 1.50 |" in text and "| 2.50 | 100 | 1.50 |" in text
