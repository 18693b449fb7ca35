"""The runner around its worker processes: here a stand-in for the worker, in test_kill.py the real one."""

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from filelock import FileLock

from nnunetv2_semisup.benchmark import records, run, worker
from nnunetv2_semisup.errors import InputError

from .conftest import make_record, make_run

OPTIONS = run.Options("cpu", 1)

# Seed 0 succeeds, seed 1 fails as a traceback does, seed 2 ends well without a record, seed 3 is busy, seed 4 hangs
# with a child of its own.
STAND_IN = """
import json, os, pathlib, subprocess, sys, time
job = json.loads(sys.argv[-1])
seed, work = job["run"]["seed"], pathlib.Path(job["work"])
print("line one")
if seed == 0:
    for prepared in work.glob("prepared/*seed0.json"):
        (work / "runs").mkdir(exist_ok=True)
        prepared.rename(work / "runs" / prepared.name)
if seed == 1:
    sys.exit("Traceback ...\\nRuntimeError: something broke\\n")
if seed == 3:
    sys.exit(75)
if seed == 4:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (work / "pids.json").write_text(json.dumps([os.getpid(), child.pid]))
    time.sleep(600)
"""


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(run, "WORKER", (sys.executable, "-u", str(tmp_path / "stand_in.py")))


def prepare(work, one):
    records.write(work.root / "prepared" / f"{one.id}.json", make_record(one, [0.5, 0.7]))


def test_a_failing_run_does_not_stop_the_others(work, tmp_path, stand_in, capsys):
    runs = [make_run(seed=seed) for seed in (1, 2, 3, 0)]
    prepare(work, runs[-1])
    assert run.run_grid(runs, work, tmp_path / "results", OPTIONS) == 2
    output = capsys.readouterr().out
    assert "RuntimeError: something broke (exit code 1, log" in output and "another process is doing" in output
    assert "Dice 0.600 (nnunet)" in output
    note = json.loads(work.failure(runs[0]).read_text())
    assert note["message"] == "RuntimeError: something broke" and note["log"] == str(work.log(runs[0]))
    assert json.loads(work.failure(runs[1]).read_text())["message"] == "line one", "no record is a failure, too"
    assert not work.failure(runs[2]).exists() and not work.failure(runs[3]).exists()
    rows = records.read_csv(tmp_path / "results" / "runs.csv")
    assert {row["run"] for row in rows} == {runs[3].id}, "no row for a run that failed"

    # again: the finished one is skipped, the failed ones are tried
    assert run.run_grid(runs, work, tmp_path / "results", OPTIONS) == 2
    output = capsys.readouterr().out
    assert "4 runs, 1 of them finished before" in output and "[3/3]" in output
    assert work.log(runs[0]).read_text().count("line one") == 2, "the log keeps every attempt"


def ended(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as f:
            return f.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks at processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_child_and_its_children(work, tmp_path, stand_in, number):
    def interrupt():
        while not (work.root / "pids.json").exists() or not (work.root / "pids.json").read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run.run_grid([make_run(seed=4)], work, tmp_path / "results", OPTIONS)
    deadline = time.time() + 60  # SIGKILL takes its time on a busy machine
    while not all(ended(pid) for pid in json.loads((work.root / "pids.json").read_text())):
        assert time.time() < deadline
        time.sleep(0.05)
    assert records.read_csv(tmp_path / "results" / "runs.csv") == []
    assert not work.failure(make_run(seed=4)).exists(), "stopping is no failure"
    assert signal.getsignal(signal.SIGTERM) is before


def test_two_runners_do_not_share_a_run(work, monkeypatch):
    monkeypatch.setattr(worker, "LOCK_SECONDS", 0.1)
    one = make_run()
    work.lock(one).parent.mkdir(parents=True)
    job = {"run": vars(one), "work": str(work.root), "device": "cpu", "threads": 1}
    with FileLock(str(work.lock(one))):
        assert worker.main(job) == worker.BUSY
    records.write(work.record(one), make_record(one, [0.5]))
    assert worker.main(job) == 0, "finished meanwhile: nothing to do"


def test_environment(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert run._environment(run.Options("cpu", 3)) | {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "passive"} == (
        run._environment(run.Options("cpu", 3))
    )
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    environment = run._environment(run.Options("cuda"))
    assert environment["OMP_WAIT_POLICY"] == "active" and environment["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (89.6, "90 s"), (720, "12 min"), (11100, "3 h 05 min"), (5399, "1 h 30 min")]
)
def test_readable(seconds, text):
    assert run.readable(seconds) == text


def test_expected_time_comes_from_runs_of_the_same_kind():
    record = make_record(make_run(epochs=5, seed=3), [0.5])  # 300 + 25 s
    assert run.expected_seconds(make_run(epochs=10), [record]) == 650
    assert run.expected_seconds(make_run(trainer="nnUNetTrainerMeanTeacher"), [record]) is None
    assert run.expected_seconds(make_run(plans="other"), [record]) is None


def test_dry_run(work, monkeypatch, capsys):
    finished, later, other = make_run(), make_run(seed=1), make_run(trainer="nnUNetTrainerMeanTeacher")
    records.write(work.record(finished), make_record(finished, [0.5]))
    asked = []
    monkeypatch.setattr(run, "_training_seconds", lambda one, options: asked.append(one) or 3600.0)
    run.dry_run([finished, later, other, make_run(trainer=other.trainer, seed=1)], work, OPTIONS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("seed0  -  (finished)") and lines[1].endswith("seed1  5 min  (as earlier runs)")
    assert lines[2].endswith("60 min  (training alone, from a few steps)") and asked == [other], "timed once"
    assert lines[-1].startswith("4 runs, 2 h 05 min on one cpu")


# ---------------------------------------------------------------------------------------------- checks before the start


@pytest.fixture
def dataset(benchmark_data, use):
    return use(benchmark_data)


def tiny_run(**changes):
    values = {"dataset": "Dataset901_Tiny", "plans": "nnUNetPlans", "epochs": 1}
    return make_run(**{**values, **changes})


def test_all_is_well(dataset):
    run.check([tiny_run(), tiny_run(epochs=3), tiny_run(trainer="nnUNetTrainerMeanTeacher", epochs=3)])


def test_unequal_numbers_of_steps_are_warned_of(dataset, capsys):
    """The fixture's Mean Teacher has 4 steps an epoch, CrossMatch and stock have 250."""
    method, other = (tiny_run(trainer=f"nnUNetTrainer{name}", epochs=3) for name in ("MeanTeacher", "CrossMatch"))
    run.check([method, dataclasses.replace(method, seed=1), other, tiny_run(epochs=3)])
    lengths, line = capsys.readouterr().out.splitlines()
    assert lengths.endswith(
        "fold all: nnUNetTrainer 3 x 250 = 750 steps; nnUNetTrainerMeanTeacher 3 x 4 = 12 steps; "
        "nnUNetTrainerCrossMatch 3 x 250 = 750 steps"
    )
    for words in ("nnUNetTrainerMeanTeacher takes 3 x 4 steps", "3 x 250", "Remove", "nnUNetPlans.json", "epochs"):
        assert words in line


def test_a_baseline_of_another_length_alone_is_warned_of(dataset):
    """Tables compare runs of equal length; without any stock run there is nothing to say, it may be done already."""
    other = tiny_run(trainer="nnUNetTrainerCrossMatch", epochs=3)
    [line] = run.unequal_steps([tiny_run(), other])
    assert "nnUNetTrainerCrossMatch runs 3 epochs" in line and "Add nnUNetTrainer with 3 epochs" in line
    assert run.unequal_steps([other]) == []


def test_stock_of_a_length_that_nnunet_does_not_have_is_trained_and_predicts(dataset, work, monkeypatch):
    from nnunetv2.run import run_training

    build = run_training.get_trainer_from_args

    def short(*arguments, **options):
        trainer = build(*arguments, **options)
        trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 2, 1
        return trainer

    monkeypatch.setattr(run_training, "get_trainer_from_args", short)
    monkeypatch.setenv("nnUNet_results", "")  # the worker sets it
    for epochs in (2, 3):
        one = tiny_run(epochs=epochs)
        worker.execute(one, work, "cpu", None)
        record = work.read(one)
        assert record["steps"] == 2 * epochs and len(record["evaluations"]["nnunet"]["cases"]) > 0
        assert (work.model(one, "nnUNetPlans") / "fold_all" / "checkpoint_final.pth").is_file()
        assert work.model(one, "nnUNetPlans").name == f"nnUNetTrainer_{epochs}epochs__nnUNetPlans__3d_fullres"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"plans": "cpu"}, ("cpu.json does not exist", "nnUNetv2_semisup_plans")),
        ({"configuration": "3d_lowres"}, ("no configuration 3d_lowres",)),
        ({"configuration": "3d_cascade_fullres"}, ("no preprocessed", "nnUNetv2_preprocess")),
        ({"trainer": "nnUNetTrainerNothing"}, ("nnUNetTrainerNothing_1epoch", "--list")),
    ],
)
def test_what_is_missing_is_said_before_the_start(dataset, change, words):
    if change.get("configuration") == "3d_cascade_fullres":  # inherits from 3d_fullres
        (dataset.preprocessed / "nnUNetPlans_3d_fullres").rename(dataset.root / "away")
    with pytest.raises(InputError) as error:
        run.check([tiny_run(**change)])
    for word in words:
        assert word in str(error.value)


def test_test_cases_need_labels(dataset):
    next((dataset.raw / "labelsTs").iterdir()).unlink()
    with pytest.raises(InputError, match="in one of them only: "):
        run.check([tiny_run()])
    for name in ("imagesTs", "labelsTs"):
        for file in (dataset.raw / name).iterdir():
            file.unlink()
    with pytest.raises(InputError, match="there are none"):
        run.check([tiny_run()])


def test_a_fixed_seed_in_the_plans_is_refused(dataset):
    plans = dataset.plans | {"semisup": {"nnUNetTrainerMeanTeacher": {"deterministic_seed": 1}}}
    (dataset.preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans))
    with pytest.raises(InputError, match="deterministic_seed.*same weights"):
        run.check([tiny_run()])


def test_variables_are_named(monkeypatch):
    monkeypatch.delenv("nnUNet_raw", raising=False)
    with pytest.raises(InputError, match="nnUNet_raw is not set"):
        run.check([make_run()])


def test_stock_and_ours_start_from_the_same_weights(dataset):
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    def first_weights(name, seed):
        worker.seed_everything(seed)
        trainer = get_trainer_from_args("901", "3d_fullres", "all", name, device=torch.device("cpu"))
        trainer.initialize()
        return next(trainer.network.parameters()).detach().clone()

    stock = first_weights("nnUNetTrainer", 0)
    assert torch.equal(stock, first_weights("nnUNetTrainerMeanTeacher", 0))
    assert not torch.equal(stock, first_weights("nnUNetTrainer", 1))


# ---------------------------------------------------------------------------------------------------------------- Slurm


def test_slurm_needs_submitit(work, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InputError, match="needs submitit: pip install"):
        run.submit([make_run()], work, OPTIONS, {})


@pytest.mark.parametrize(
    ("parameters", "words"), [({"no_such_parameter": 1}, "no_such_parameter"), ({"timeout_min": "1:30"}, "1:30")]
)
def test_what_submitit_says_of_wrong_parameters(work, parameters, words):
    pytest.importorskip("submitit")
    with pytest.raises(InputError, match=f"^--slurm: .*{words}"):
        run.submit([make_run()], work, OPTIONS, parameters, cluster="local")


def test_only_unfinished_runs_are_submitted(work, monkeypatch, capsys):
    calls = []

    class Executor:
        def __init__(self, folder, cluster):
            calls.append((folder, cluster))

        def update_parameters(self, **parameters):
            calls.append(parameters)

        def map_array(self, function, *lists):
            calls.append((function, *lists))
            return [SimpleNamespace(job_id="17")]

    errors = SimpleNamespace(utils=SimpleNamespace(FailedJobError=OSError))
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(AutoExecutor=Executor, core=errors))
    finished, open_ = make_run(seed=0), make_run(seed=1)
    records.write(work.record(finished), make_record(finished, [0.5]))
    run.submit([finished, open_], work, OPTIONS, {"timeout_min": 60})
    assert calls == [(work.root / "slurm", "slurm"), {"timeout_min": 60}, (run.job, [open_], [work], [OPTIONS])]
    assert f"17  {open_.id}" in capsys.readouterr().out


@pytest.mark.parametrize("seed", [0, 1])
def test_job(work, stand_in, seed):
    one = make_run(seed=seed)
    prepare(work, one)
    if seed == 0:
        run.job(one, work, OPTIONS)
        assert work.missing(one) == []
    else:
        with pytest.raises(RuntimeError, match="something broke"):
            run.job(one, work, OPTIONS)
