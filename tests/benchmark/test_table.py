"""Comparisons with the baseline against numbers worked out by hand."""

import math

import numpy as np
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
    assert stock.runs == (("Dataset904_Tiny", 0), ("Dataset904_Tiny", 1)) and stock.dice == pytest.approx((0.6, 0.8))
    assert stock.masks == 10 and stock.difference is None and stock.verdict == ""
    assert method.mean["dice"] == pytest.approx(0.844) and math.isnan(method.sd["dice"])
    d = method.difference
    assert d.mean == pytest.approx(0.144)  # 0.2 0.1 0.15 0.14 0.13
    assert 0.1 < d.low < 0.13 < 0.15 < d.high < 0.2
    assert d.p == pytest.approx(2 / 2**5) and (d.better, d.cases, d.subsets) == (5, 5, 1)  # all positive, two-sided
    assert method.verdict == "too few runs"
    assert stock.cases["Dataset904_Tiny"].tolist() == pytest.approx([0.6, 0.8, 0.7, 0.7, 0.7])


SUBSETS = ("Dataset904_Tiny", "Dataset914_Tiny", "Dataset924_Tiny")


def test_labelled_subsets_are_one_row(work, tmp_path):
    """Three subsets of stock, two of the method: the difference is that on the two, the sd that over all runs."""
    stock, method = store(
        work,
        tmp_path,
        *((make_run(dataset=s), dice) for s, dice in zip(SUBSETS, ([0.5, 0.6], [0.7, 0.6], [0.9, 0.9]), strict=True)),
        *(
            (make_run(dataset=s, trainer=METHOD), dice)
            for s, dice in zip(SUBSETS, ([0.6, 0.8], [0.7, 0.9]), strict=False)
        ),
    )
    assert stock.subsets == SUBSETS and method.subsets == SUBSETS[:2] and len(stock.runs) == 3
    assert stock.dice == pytest.approx((0.55, 0.65, 0.9)) and stock.mean["dice"] == pytest.approx(0.7)
    assert stock.sd["dice"] == pytest.approx(math.sqrt((0.15**2 + 0.05**2 + 0.2**2) / 2))
    d = method.difference
    assert d.mean == pytest.approx((0.1 + 0.2 + 0.0 + 0.3) / 4) and d.subsets == 2
    assert (d.better, d.cases) == (2, 2)  # 0.05 and 0.25: a case is the mean over subsets
    assert d.p == pytest.approx(0.5)
    assert (d.low, d.high) == pytest.approx((0.05, 0.25))  # 0.1 or 0.2 twice, and 0.0 or 0.3 twice: 1 in 16 each
    assert method.verdict == "no difference"  # 0.15 is less than twice 0.18
    [first, second] = table.short_table([stock, method]).splitlines()[2:]
    assert "| 3 | 70.0 ± 18.0 |" in first and "| 2 | 75.0 ± 7.1 |" in second
    assert "| +15.0 [5.0, 25.0] |" in second
    pages = table.full_tables([stock, method])
    assert "Labelled subsets: Dataset904_Tiny, Dataset914_Tiny, Dataset924_Tiny." in pages
    assert "| 3 × 1 | 70.0 ± 18.0 |" in pages and "| 2 × 1 | 75.0 ± 7.1 |" in pages


def test_a_subset_without_baseline_is_said_and_does_not_count(work, tmp_path):
    stock, method = store(
        work,
        tmp_path,
        (make_run(dataset=SUBSETS[0], seed=0), [0.5, 0.6]),
        (make_run(dataset=SUBSETS[0], seed=1), [0.5, 0.6]),
        *((make_run(dataset=s, trainer=METHOD), [0.6, 0.6]) for s in SUBSETS),
    )
    assert method.difference.mean == pytest.approx(0.05) and method.difference.subsets == 1
    assert "(1 of 3 subsets)" in table.short_table([stock, method])
    text = table.full_tables([stock, method])
    assert "(1 of 3 subsets)" in text and "| 1 × 2 |" in text and "| 3 × 1 |" in text


def test_subsets_with_different_numbers_of_seeds(work, tmp_path):
    """A case's mean over seeds is taken within its subset."""
    runs = [(make_run(dataset=SUBSETS[0], seed=s), [dice]) for s, dice in ((0, 0.2), (1, 0.4))]
    runs += [(make_run(dataset=SUBSETS[1]), [0.7])]
    runs += [(make_run(dataset=s, trainer=METHOD), [0.7]) for s in SUBSETS[:2]]
    stock, method = store(work, tmp_path, *runs)
    assert method.difference.mean == pytest.approx(((0.7 - 0.3) + 0.0) / 2)
    assert table.runs_text(stock) == "2 × 1–2"


def test_another_budget_is_another_row(work, tmp_path):
    store(work, tmp_path, (make_run(dataset=SUBSETS[0]), [0.5]), labeled=4)
    made = store(work, tmp_path, (make_run(dataset=SUBSETS[1]), [0.5]), labeled=8)
    assert [c.setting["labeled"] for c in made] == [4, 8]


def test_p_is_corrected_for_the_methods_of_a_setting(work, tmp_path):
    dice = {"nnUNetTrainerA": [0.1 * i for i in range(1, 6)], "nnUNetTrainerB": [0.11, 0.2, 0.3, 0.4, 0.45]}
    runs = [(make_run(), [0.05] * 5), *((make_run(trainer=t), d) for t, d in dice.items())]
    runs.append((make_run(trainer="nnUNetTrainerA", epochs=10), [0.5] * 5))  # another setting, no baseline
    _, a, b, other = store(work, tmp_path, *runs)
    assert a.difference.p == b.difference.p == pytest.approx(2 / 2**5)
    assert a.p == b.p == pytest.approx(2 * 2 / 2**5) and other.difference is None and math.isnan(other.p)
    assert "| 0.125 |" in table.full_tables([a])


def frame(**columns) -> pd.DataFrame:
    return pd.DataFrame(columns, index=list("xyz"))


def test_p_is_that_of_a_signed_rank_test():
    a, b = frame(one=[1.0, 2.0, 3.0]), frame(one=[0.9, 1.8, 2.7])
    assert table.paired_difference(a, b).p == pytest.approx(binomtest(3, 3).pvalue)  # three of one sign: 2 / 8
    same = table.paired_difference(a, a)
    assert same.mean == same.low == same.high == 0 and math.isnan(same.p) and same.better == 0
    assert table.paired_difference(a, frame(two=[0.0, 0.0, 0.0])) is None


def test_missing_values_are_left_out():
    """A case that is unknown in one subset counts in the other."""
    a = frame(one=[0.5, math.nan, 0.8], two=[0.5, 0.6, 0.7])
    b = frame(one=[0.4, 0.5, 0.5], two=[0.5, 0.5, math.nan])
    d = table.paired_difference(a, b)
    assert d.mean == pytest.approx((0.05 + 0.1 + 0.3) / 3) and (d.better, d.cases, d.subsets) == (3, 3, 2)


def test_the_same_gain_in_every_subset_makes_the_interval_no_narrower():
    gains = np.random.default_rng(0).normal(0.02, 0.1, 40)
    zeros, one = np.zeros(40), pd.DataFrame({"a": gains})
    three = pd.DataFrame(dict.fromkeys("abc", gains))
    single = table.paired_difference(one, pd.DataFrame({"a": zeros}))
    several = table.paired_difference(three, pd.DataFrame(dict.fromkeys("abc", zeros)))
    assert (several.low, several.high) == pytest.approx((single.low, single.high)) and several.subsets == 3


def test_equal_compute_is_the_shortest_stock_run_that_is_long_enough(work, tmp_path):
    lengths = {5: [0.5, 0.6], 10: [0.6, 0.7], 20: [0.65, 0.75], 50: [0.9, 0.9]}
    runs = [(make_run(epochs=e), dice) for e, dice in lengths.items()]
    store(work, tmp_path, *runs, (make_run(trainer=METHOD), [0.7, 0.7]))

    def equal(cost: float):
        row = {"trainer": METHOD, "configuration": "3d_fullres", "plans": "cpu", "device": "cpu", "threads": "1"}
        row |= {"dataset": "Dataset990_Tiny", "hardware": "A processor, 2 cores", "compiled": "False"}
        made = table.compare(*table.read(tmp_path), [{**row, "step_ratio": str(cost)}])
        [method] = [c for c in made if c.trainer == METHOD and c.setting["postprocessing"] == "none"]
        assert method.difference.mean == pytest.approx(0.15), "at equal steps nothing changes"
        return method

    assert equal(2.0).equal_compute_steps == 2500 and equal(2.0).equal_compute.mean == pytest.approx(0.05)
    assert equal(2.1).equal_compute_steps == 5000 and equal(2.1).equal_compute.mean == pytest.approx(0.0)
    assert equal(11).equal_compute is None and equal(math.nan).equal_compute is None
    assert equal(0.9).equal_compute_steps == 1250
    assert "(2,500 steps) | 2.0 |" in table.short_table([equal(2.0)])


def test_equal_compute_is_on_common_subsets(work, tmp_path):
    runs = [(make_run(dataset=s, trainer=METHOD), [0.7, 0.7]) for s in SUBSETS]
    runs += [(make_run(dataset=SUBSETS[0], epochs=10), [0.6, 0.6])]
    store(work, tmp_path, *runs)
    row = {"trainer": METHOD, "configuration": "3d_fullres", "plans": "cpu", "device": "cpu", "threads": "1"}
    row |= {"dataset": SUBSETS[0], "hardware": "A processor, 2 cores", "compiled": "False", "step_ratio": "2"}
    method = table.compare(*table.read(tmp_path), [row])[0]
    assert method.trainer == METHOD and method.difference is None
    assert (
        method.equal_compute.subsets == 1
        and "+10.0 [10.0, 10.0] (2,500 steps, 1 of 3 subsets)" in table.short_table([method])
    )


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
    assert stock.cases["Dataset904_Tiny"].tolist() == pytest.approx([0.55, 0.65])
    assert stock.mean["dice"] == pytest.approx(0.6)
    assert method.difference.mean == pytest.approx(0.1) and method.masks == 4


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
        assert method.difference is None and method.verdict == ""
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
    assert lines[0][4] == "3" and lines[0][5].count("±") == 1 and "±" not in lines[3][5]
    assert lines[0][6] == "" and lines[1][6].startswith("+")
    assert len(lines[0]) == 7, "no step cost, no column"
    assert "| beats |" in table.full_tables(table.compare(*table.read(tmp_path)))


def test_a_stock_run_that_is_there_for_equal_compute_alone_has_no_row_on_the_front_page(work, tmp_path):
    runs = [(make_run(epochs=e), [0.5, 0.6]) for e in (5, 10)]
    made = store(work, tmp_path, *runs, (make_run(trainer=METHOD), [0.7, 0.7]))
    text = table.short_table(made)
    assert text.count("`nnUNetTrainer`") == 1 and "| 1,250 |" in text and "2,500" not in text
    assert table.short_table([c for c in made if c.trainer != METHOD]).count("`nnUNetTrainer`") == 2, "no method, all"


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
    assert method.difference.mean == pytest.approx((0.1 - 1) / 2)


@pytest.mark.parametrize("content", ["", "run,dice\nx,1\n", "\0\1"])
def test_damaged_table_is_not_written_over(work, tmp_path, content):
    store(work, tmp_path, (make_run(seed=0), [0.5, 0.7]))
    (tmp_path / "runs.csv").write_text(content)
    with pytest.raises(InputError, match="runs.csv"):
        records.collect(work, tmp_path)
    assert (tmp_path / "runs.csv").read_text() == content
