"""Work folder and CSV files."""

import json
import subprocess
from pathlib import Path

import pytest

import nnunetv2_semisup
from nnunetv2_semisup.benchmark import records
from nnunetv2_semisup.errors import InputError

from .conftest import make_record, make_run


def test_a_run_is_complete_when_every_inference_is_recorded(work):
    run = make_run(inference=("nnunet", "literature"))
    assert work.missing(run) == ["nnunet", "literature"] and work.read(run) is None
    records.write(work.record(run), make_record(make_run(), [0.5]))
    assert work.missing(run) == ["literature"] and work.missing(make_run()) == []
    trained = {**make_record(run, [0.5]), "evaluations": {}}
    records.write(work.record(run), trained)
    assert work.missing(run) == ["nnunet", "literature"] and records.run_rows(trained) == []


def test_seeds_have_results_folders_of_their_own(work):
    first, second = (work.model(make_run(seed=seed), "cpu") for seed in (0, 1))
    assert first != second
    assert first.name == second.name == "nnUNetTrainer_5epochs__cpu__3d_fullres"


def test_collect_replaces_own_rows_and_keeps_those_of_other_machines(work, tmp_path):
    mine, elsewhere = make_run(), make_run(seed=1)
    other = records.WorkFolder(tmp_path / "other")
    for folder, run, dice in ((other, elsewhere, 0.5), (other, mine, 0.1), (work, mine, 0.75)):
        records.write(folder.record(run), make_record(run, [dice, dice]))
    assert records.collect(other, tmp_path / "results") == 2
    before = (tmp_path / "results" / "runs.csv").read_text()
    assert records.collect(work, tmp_path / "results") == 2
    rows = records.read_csv(tmp_path / "results" / "runs.csv")
    assert {(row["seed"], row["postprocessing"]): row["dice"] for row in rows} == {
        ("0", "none"): "0.750000",
        ("0", "largest_component"): "0.750000",
        ("1", "none"): "0.500000",
        ("1", "largest_component"): "0.500000",
    }
    assert tuple(rows[0]) == records.RUN_COLUMNS
    assert rows[0]["versions"] == "python 3.11.7; torch 2.15.0"
    assert len(records.read_csv(tmp_path / "results" / "cases" / f"{mine.id}.csv")) == 4
    records.collect(other, tmp_path / "results")
    assert (tmp_path / "results" / "runs.csv").read_text() == before, "the same records, the same file"


def test_nothing_is_left_where_writing_fails(tmp_path, monkeypatch):
    records.write_csv(tmp_path / "a.csv", ["x"], [{"x": 1.5}, {"x": float("nan")}, {}])
    assert (tmp_path / "a.csv").read_text() == "x\n1.500000\n\n\n".replace("\n\n\n", '\n""\n""\n')

    class Unprintable:
        def __str__(self):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        records.write_csv(tmp_path / "a.csv", ["x"], [{"x": 2.5}, {"x": Unprintable()}])
    assert "1.5" in (tmp_path / "a.csv").read_text()


def test_a_damaged_record_is_named(work):
    run = make_run()
    records.write(work.record(run), {})
    work.record(run).write_text('{"run": ')
    with pytest.raises(InputError, match="seed0.json.*repeated"):
        work.read(run)
    for content, match in (([], "no record"), ({"format": 0}, "no record"), ({"format": 1, "run": 1}, "'dataset'")):
        records.write(work.record(run), content)
        with pytest.raises(InputError, match=f"seed0.json.*{match}.*repeated"):
            work.all_records()


def test_provenance():
    assert records.versions()["nnunetv2_semisup"] == nnunetv2_semisup.__version__
    assert "cores" in records.hardware("cpu")
    package = Path(nnunetv2_semisup.__file__).parent
    head = subprocess.run(["git", "-C", package, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode == 0:
        assert records.commit().rstrip("+") == head.stdout[:10]
    else:
        assert records.commit() == ""


def test_records_are_plain_json(work, filled):
    for record in filled.all_records():
        assert json.loads(json.dumps(record, allow_nan=False)) == record
