"""An interrupted training goes on from its last whole epoch: stock nnU-Net's and ours, with real trainers on tiny data.

The same with a real Slurm is in test_slurm_cluster.py, kill -9 of a real runner in test_kill.py.
"""

import json
import shutil

import pytest

from nnunetv2_semisup.benchmark import worker
from nnunetv2_semisup.errors import InputError

from .conftest import make_run

STEPS = 2  # per epoch


class Interruption(BaseException):
    """As a signal: nobody catches it."""


@pytest.fixture
def interrupt(benchmark_data, use, monkeypatch):
    """``interrupt(n)`` ends the next training in the ``n``-th step from then on (0: never). Returns its epochs."""
    from nnunetv2.run import run_training

    use(benchmark_data)
    monkeypatch.setenv("nnUNet_results", "")  # the worker sets it
    build = run_training.get_trainer_from_args
    left, epochs = [0], []

    def short(*arguments, **options):
        trainer = build(*arguments, **options)
        trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = STEPS, 1
        step = trainer.train_step

        def interrupted_step(batch):
            left[0] -= 1
            if left[0] == 0:
                raise Interruption
            epochs.append(trainer.current_epoch)
            return step(batch)

        trainer.train_step = interrupted_step
        return trainer

    monkeypatch.setattr(run_training, "get_trainer_from_args", short)

    def at(number: int) -> list[int]:
        left[0] = number
        epochs.clear()
        return epochs

    return at


def start(one, work, complete=True) -> dict | None:
    if not complete:
        with pytest.raises(Interruption):
            worker.execute(one, work, "cpu", None)
        return work.read(one)
    worker.execute(one, work, "cpu", None)
    return work.read(one)


@pytest.mark.parametrize("trainer", ["nnUNetTrainer", "nnUNetTrainerMeanTeacher"])
def test_goes_on_from_the_last_whole_epoch(interrupt, work, trainer):
    one = make_run(dataset="Dataset901_Tiny", plans="nnUNetPlans", epochs=3, trainer=trainer)
    interrupt(2)
    assert start(one, work, complete=False) is None and not work.checkpoint(one).exists(), "no epoch is whole yet"
    epochs = interrupt(2 * STEPS)
    assert start(one, work, complete=False) is None, "what is not complete is not recorded"
    assert epochs == [0, 0, 1], "without a checkpoint it starts anew"
    begun = json.loads((work.unfinished(one) / "begun.json").read_text())

    epochs = interrupt(0)
    record = start(one, work)
    assert epochs == [1, 1, 2, 2]
    assert record["resumed"] == 1 and record["steps"] == 3 * STEPS and record["started"] == begun["started"]
    assert [row["epoch"] for row in record["curve"]] == [0, 1, 2]
    assert record["train_seconds"] > 0 and record["seconds_per_step"] > 0
    fold = work.model(one, "nnUNetPlans") / "fold_all"
    assert (fold / "checkpoint_final.pth").is_file()
    assert not work.unfinished(one).exists() and not list(work.root.rglob("*.tmp"))


def test_an_uninterrupted_training_was_never_resumed(interrupt, work):
    one = make_run(dataset="Dataset901_Tiny", plans="nnUNetPlans", epochs=2)
    interrupt(0)
    assert start(one, work)["resumed"] == 0 and not work.unfinished(one).exists()


def test_other_plans_start_anew(interrupt, work, benchmark_data, capsys):
    one = make_run(dataset="Dataset901_Tiny", plans="nnUNetPlans", epochs=2)
    interrupt(STEPS + 1)
    start(one, work, complete=False)
    benchmark_data.edit_plans(lambda plans: plans["configurations"]["3d_fullres"].update(batch_size=3))
    epochs = interrupt(0)
    assert start(one, work)["resumed"] == 0 and epochs == [0, 0, 1, 1]
    assert "plans changed since the training began: it starts again" in capsys.readouterr().out


def test_other_data_start_anew(interrupt, work, benchmark_data, capsys):
    one = make_run(dataset="Dataset901_Tiny", plans="nnUNetPlans", epochs=2)
    interrupt(STEPS + 1)
    start(one, work, complete=False)
    label = sorted((benchmark_data.root / "raw" / benchmark_data.name / "labelsTr").iterdir())[0]
    content = label.read_bytes()
    label.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # of the same size
    try:
        epochs = interrupt(0)
        assert start(one, work)["resumed"] == 0 and epochs == [0, 0, 1, 1]
    finally:
        label.write_bytes(content)
    assert "data changed since the training began: it starts again" in capsys.readouterr().out


def test_the_same_data_elsewhere_go_on(interrupt, work, benchmark_data, tmp_path, monkeypatch):
    one = make_run(dataset="Dataset901_Tiny", plans="nnUNetPlans", epochs=2)
    interrupt(STEPS + 1)
    start(one, work, complete=False)
    (tmp_path / "link").symlink_to(benchmark_data.root / "raw")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "link"))
    note = work.unfinished(one) / "begun.json"
    content = json.loads(note.read_text())
    note.write_text(json.dumps({key: value for key, value in content.items() if key != "hardware"}))  # an older note
    epochs = interrupt(0)
    assert start(one, work)["resumed"] == 1 and epochs == [1, 1]


@pytest.mark.parametrize("trainer", ["nnUNetTrainer", "nnUNetTrainerMeanTeacher"])
def test_a_damaged_checkpoint_is_named(interrupt, work, trainer):
    one = make_run(dataset="Dataset901_Tiny", plans="nnUNetPlans", epochs=2, trainer=trainer)
    interrupt(STEPS + 1)
    start(one, work, complete=False)
    whole = work.checkpoint(one).read_bytes()
    for damaged in (b"", whole[: len(whole) // 2]):
        work.checkpoint(one).write_bytes(damaged)
        with pytest.raises(InputError, match="checkpoint.pth cannot be .*remove"):
            worker.execute(one, work, "cpu", None)
    shutil.rmtree(work.unfinished(one))
    interrupt(0)
    assert start(one, work)["resumed"] == 0
