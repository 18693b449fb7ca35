"""Runs that version 0.1.0 began go on with today's code; how the files were made: checkpoints_0_1_0/README.md."""

import copy
import lzma
from pathlib import Path

import pytest
import torch
from helpers import make_batch

FOLDER = Path(__file__).with_name("checkpoints_0_1_0")


@pytest.fixture
def resume(tiny, tmp_path):
    """``resume(name)`` -> a trainer that has loaded the file, and the file's content."""

    def load(name: str):
        file = tmp_path / "checkpoint_latest.pth"
        file.write_bytes(lzma.decompress((FOLDER / f"{name}.pth.xz").read_bytes()))
        saved = torch.load(file, weights_only=False)
        plans = copy.deepcopy(saved["init_args"]["plans"])
        plans["semisup"][name]["preset"] = "published"  # no burn-in, as in 0.1.0
        trainer = tiny.trainer(name, "2d", plans=plans, resume=True)
        trainer.load_checkpoint(str(file))
        return trainer, saved

    return load


def state(module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_equal(a: dict, b: dict) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def step(trainer) -> None:
    before = state(trainer.network)
    trainer.train_step(make_batch(trainer))
    assert any(not torch.equal(value, before[key]) for key, value in trainer.network.state_dict().items())


def test_mean_teacher(resume):
    trainer, saved = resume("nnUNetTrainerMeanTeacher")
    ours = saved["semisup"]
    assert ours["version"] == "0.1.0" and trainer.current_epoch == 2
    assert_equal(state(trainer.method), ours["method"])
    assert_equal(state(trainer.network), ours["training_weights"])
    assert_equal(state(trainer.method.teacher.module), saved["network_weights"])  # the file predicts with the teacher
    assert trainer.training_log.rows == ours["log"] and len(ours["log"]) == 2
    step(trainer)


@pytest.mark.parametrize(
    ("name", "number"),
    [("nnUNetTrainerSimCVD", {"proj_pool": 24}), ("nnUNetTrainerACTIONPlusPlus", {"voxel_queue_size": 100})],
)
def test_what_follows_the_patch_today_keeps_its_number(tiny, tmp_path, capsys, name, number):
    file = str(tmp_path / "checkpoint_latest.pth")
    first = tiny.trainer(name, "2d", **number)
    first.initialize()
    first.save_checkpoint(file)
    content = torch.load(file, weights_only=False)
    for key in ("start", "stage", "picture_slices"):
        content["semisup"].pop(key)
    del content["semisup"]["settings"]["pictures"]
    torch.save(content, file)
    again = tiny.trainer(name, "2d", resume=True)
    (key,) = number
    assert getattr(again.settings, key) is None
    capsys.readouterr()
    again.load_checkpoint(file)
    assert getattr(again.settings, key) == number[key]
    assert_equal(state(again.method), state(first.method))
    assert "WARNING: setting" not in capsys.readouterr().out, "a new setting has not changed"


def test_action_goes_on_in_stage_two_and_enters_stage_three(resume, tmp_path):
    trainer, saved = resume("nnUNetTrainerACTION")
    ours, teacher = saved["semisup"], trainer.method.teacher.module
    assert int(ours["method"].pop("_extra_state")) == 2  # where 0.1.0 kept the stage
    assert ours["version"] == "0.1.0" and trainer.current_epoch == 2
    assert_equal(state(trainer.method), ours["method"])
    assert_equal(state(trainer.network), saved["network_weights"])
    again = str(tmp_path / "again.pth")
    trainer.save_checkpoint(again)
    assert torch.load(again, weights_only=False)["semisup"]["stage"] == 2

    def assert_step_averages(start: dict) -> None:
        """After a step the teacher is the mean of ``start`` and of the student."""
        step(trainer)
        expected = {key: value.lerp(start[key], 0.99) for key, value in state(trainer.network).items()}
        torch.testing.assert_close(state(teacher), expected)

    assert any(not torch.equal(value, teacher.state_dict()[key]) for key, value in saved["network_weights"].items())
    assert_step_averages(state(teacher))  # not reset: it goes on from where it was
    trainer.current_epoch = 3
    assert_step_averages(state(trainer.network))  # stage three starts from the student
    assert_step_averages(state(teacher))
