"""Comparisons with the baseline against numbers worked out by hand."""

import math

import pandas as pd
import pytest
from scipy.stats import binomtest

from nnunetv2_semisup.benchmark import records, table
from nnunetv2_semisup.errors import InputError

from .conftest import make_cases, make_record, make_run


def store(work, results, *runs_and_dice, **changes):
    for run, dice in runs_and_dice:
        records.write(work.record(run), make_record(run, dice, **changes))
    records.collect(work, results)
    return [c for c in table.compare(*table.read(results)) if c.setting["postprocessing"] == "none"]


METHOD = "nnUNetTrainerMeanTeacher"


def test_means_sd_and_paired_difference(work, tmp_path):
    stock, method = store(
        work,
        tmp_path,
        (make_run(seed=0), [0.5, 0.7, 0.6, 0.6, 0.6]),
        (make_run(seed=1), [0.7, 0.9, 0.8, 0.8, 0.8]),
        (make_run(trainer=METHOD, seed=0), [0.8, 0.9, 0.85, 0.84, 0.83]),
    )
    assert (stock.trainer, method.trainer) == ("nnUNetTrainer", METHOD)
    assert stock.mean["dice"] == pytest.approx(0.7) and stock.sd["dice"] == pytest.approx(0.2 / math.sqrt(2))
    assert stock.seeds == (0, 1) and stock.masks == 10 and math.isnan(stock.difference) and stock.verdict == ""
    assert method.mean["dice"] == pytest.approx(0.844) and math.isnan(method.sd["dice"])
    assert method.difference == pytest.approx(0.144)  # 0.2 0.1 0.15 0.14 0.13
    assert method.p == pytest.approx(2 / 2**5)  # all five positive, two-sided
    assert method.verdict == "too few seeds"
    assert list(stock.cases) == pytest.approx([0.6, 0.8, 0.7, 0.7, 0.7])


@pytest.mark.parametrize(
    ("difference", "sd", "expected"),
    [
        (0.021, 0.01, "beats"),
        (0.02, 0.01, "no difference"),
        (-0.02, 0.01, "no difference"),
        (-0.021, 0.01, "worse"),
        (0.5, math.nan, "too few seeds"),
        (math.nan, 0.01, ""),
        (0.001, 0.0, "beats"),
    ],
)
def test_verdict(difference, sd, expected):
    assert table.verdict(difference, sd) == expected


def test_p_is_that_of_a_signed_rank_test():
    a, b = pd.Series([1.0, 2.0, 3.0], ["x", "y", "z"]), pd.Series([0.9, 1.8, 2.7], ["x", "y", "z"])
    assert table.paired_difference(a, b)[1] == pytest.approx(binomtest(3, 3).pvalue)  # three of one sign: 2 / 8
    assert table.paired_difference(a, a)[0] == 0 and math.isnan(table.paired_difference(a, a)[1])
    other = pd.Series([0.0], ["somewhere else"])
    assert all(map(math.isnan, table.paired_difference(a, other)))


def test_failures_count_and_have_no_distance(work, tmp_path):
    [one] = store(work, tmp_path, (make_run(seed=0), [0.0, 0.8, 0.8]))
    assert (one.failures, one.masks) == (1, 3)
    assert one.mean["dice"] == pytest.approx(1.6 / 3) and one.mean["hd95_voxel"] == pytest.approx(2.0)
    assert "| 1 of 3 |" in table.full_tables([one])


def test_labels_are_averaged_within_a_case_first(work, tmp_path):
    run, other = make_run(), make_run(trainer=METHOD)
    for r, second in ((run, 0.5), (other, 0.7)):
        record = make_record(r, [0.6, 0.8])
        rows = record["evaluations"]["nnunet"]["cases"]
        more = [{**row, "label": "other"} for row in make_cases([second, second])]
        record["evaluations"]["nnunet"]["cases"] = rows + more
        records.write(work.record(r), record)
    records.collect(work, tmp_path)
    stock, method = table.compare(*table.read(tmp_path))[:2]
    assert list(stock.cases) == pytest.approx([0.55, 0.65]) and stock.mean["dice"] == pytest.approx(0.6)
    assert method.difference == pytest.approx(0.1) and method.masks == 4


def test_step_cost_is_that_measured_in_one_process_on_the_machine_of_the_run(work, tmp_path):
    store(work, tmp_path, (make_run(), [0.5, 0.6]), seconds_per_step=0.1)
    store(work, tmp_path, (make_run(trainer=METHOD), [0.5, 0.7]), seconds_per_step=0.1)
    same = {"trainer": METHOD, "configuration": "3d_fullres", "plans": "cpu", "device": "cpu", "threads": "1"}
    same |= {"dataset": "Dataset990_Tiny", "hardware": "A processor, 2 cores", "compiled": "False", "step_ratio": "2.5"}

    def cost(**changes) -> float:
        stock, method = table.compare(*table.read(tmp_path), [{**same, **changes}])[:2]
        assert math.isnan(stock.cost)
        return method.cost

    assert cost() == 2.5, "another number of labelled cases does not change a step"
    for key in set(same) - {"step_ratio"}:
        assert math.isnan(cost(**{key: "Dataset990_Other" if key == "dataset" else "another"})), key


def test_other_settings_are_no_baseline(work, tmp_path):
    """Another length, other plans, another fold: nothing to compare with."""
    for change in ({"epochs": 1}, {"plans": "other"}, {"fold": "0"}, {"configuration": "2d"}):
        made = store(work, tmp_path, (make_run(trainer=METHOD), [0.5, 0.6]), (make_run(**change), [0.5, 0.6]))
        [method] = [c for c in made if c.trainer == METHOD]
        assert math.isnan(method.difference) and method.verdict == ""
        work.record(make_run(**change)).unlink()


def test_short_table(filled, tmp_path):
    records.collect(filled, tmp_path)
    text = table.short_table(table.compare(*table.read(tmp_path)))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    assert [(line[1], line[2].strip("`")[13:]) for line in lines] == [
        *(("4", name) for name in ("", "CrossMatch", "MeanTeacher")),
        *(("8", name) for name in ("", "CrossMatch", "MeanTeacher")),
        ("80", ""),
    ]
    assert all(line[0] == "Tiny, 3d_fullres, plans cpu" and line[3] == "1,250" for line in lines)
    assert lines[0][5].count("±") == 1 and lines[3][5].endswith("± –") and lines[4][7] == "too few seeds"
    assert lines[1][7] == "beats" and lines[1][6].startswith("+")


def test_nothing():
    assert table.compare(pd.DataFrame(), pd.DataFrame()) == []
    assert table.short_table([]) == table.full_tables([]) == "No results yet.\n"


def test_runs_on_different_cases_are_not_compared(work, tmp_path):
    with pytest.raises(InputError, match="different cases"):
        store(work, tmp_path, (make_run(seed=0), [0.5, 0.7]), (make_run(trainer=METHOD, seed=0), [0.8, 0.9, 0.85]))


def test_false_positives_where_nothing_is_count_in_the_difference(work, tmp_path):
    _, method = store(
        work,
        tmp_path,
        (make_run(seed=0), [0.5, math.nan]),
        (make_run(trainer=METHOD, seed=0), [0.6, 0.0]),
    )
    assert method.difference == pytest.approx((0.1 - 1) / 2)


@pytest.mark.parametrize("content", ["", "run,dice\nx,1\n", "\0\1"])
def test_damaged_table_is_not_written_over(work, tmp_path, content):
    store(work, tmp_path, (make_run(seed=0), [0.5, 0.7]))
    (tmp_path / "runs.csv").write_text(content)
    with pytest.raises(InputError, match="runs.csv"):
        records.collect(work, tmp_path)
    assert (tmp_path / "runs.csv").read_text() == content
