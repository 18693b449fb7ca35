"""Costs counted on tensors without values, against those counted on real ones."""

import random

import numpy as np
import pytest
import torch

from nnunetv2_semisup import cli, discovery
from nnunetv2_semisup.benchmark import counted, records, speed
from nnunetv2_semisup.training import rehearsal

NAMES = ["nnUNetTrainerMeanTeacher", "nnUNetTrainerSimCVD", "nnUNetTrainerACTIONPlusPlus", "nnUNetTrainerSSNet"]


def test_live_tensors_are_added_up():
    with rehearsal._Fake(), rehearsal.Live() as live:
        a = torch.empty(1000)
        b = a * 2
        view = b.reshape(10, 100)
        c = torch.cat([a, b])
        assert live.now == 4000 * 4 and view.numel() == 1000
        del c
        assert (live.now, live.peak) == (4000 * 2, 4000 * 4)
        b.add_(1)
        assert live.now == 4000 * 2
        assert float(a.sum()) == 0.0, "values that are asked for"


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_operations_are_those_of_real_tensors(tiny, configuration, tmp_path, monkeypatch):
    rows = {row["trainer"]: row for row in counted.count(tiny.name, configuration, "nnUNetPlans", NAMES)}
    assert rows["nnUNetTrainer"]["operations_ratio"] == 1.0 and len(rows) == 5
    stock = speed.counted_operations(rehearsal.build(tiny.name, configuration, "nnUNetPlans", "nnUNetTrainer", "cpu"))
    for name in NAMES:
        trainer = rehearsal.build(tiny.name, configuration, "nnUNetPlans", name, "cpu")
        rehearsal.step(trainer, rehearsal.random_batch(trainer), rehearsal.POINTS[0])
        expected = speed.counted_operations(trainer) / stock
        assert rows[name]["operations_ratio"] == pytest.approx(expected, rel=1e-6), name
        held = sum(t.numel() * t.element_size() for t in trainer.network.parameters()) / 2**30
        assert rows[name]["gib"] > 3 * held, "weights, gradients, momentum"


def test_command(tiny, tmp_path, capsys):
    arguments = ["--counted", "-d", "901", "-tr", "nnUNetTrainerPasteMatch", "--results", str(tmp_path / "out")]
    assert cli.benchmark([*arguments, "-o", str(tmp_path / "work")]) == 0
    assert "| `nnUNetTrainerPasteMatch` | 2." in capsys.readouterr().out
    rows = records.read_csv(tmp_path / "out" / "counted.csv")
    assert [row["trainer"] for row in rows] == ["nnUNetTrainer", "nnUNetTrainerPasteMatch"]
    assert cli.benchmark([*arguments, "-o", str(tmp_path / "work")]) == 0
    assert len(records.read_csv(tmp_path / "out" / "counted.csv")) == 2, "the same rows are replaced"


def test_a_training_that_will_not_fit_is_named_before_it_starts(tiny):
    trainer = tiny.trainer("nnUNetTrainerCrossMatch", "3d_fullres")
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    gib = rehearsal.count(rehearsal.twin(trainer), operations=False)[1]
    torch.manual_seed(3)
    states = random.getstate(), np.random.get_state()[1].tolist()
    assert rehearsal.memory_warning(trainer, int((gib + 1.6) * 2**30), "-d 901 -p a") is None
    warning = rehearsal.memory_warning(trainer, int((gib + 1.4) * 2**30), "-d 901 -p a")
    assert "nnUNetTrainerCrossMatch" in warning and "this GPU has 1.4 GiB" in warning
    assert "nnUNetv2_semisup_plans -d 901 -p a -o smaller with --patch_size" in warning
    assert torch.rand(1) == expected, "the training's random numbers are left alone"
    assert states == (random.getstate(), np.random.get_state()[1].tolist())


def test_levels_wider_than_the_embedding_are_counted(tiny):
    trainer = tiny.trainer("nnUNetTrainerACTIONPlusPlus", "2d", representation_features=4)
    trainer = rehearsal.twin(trainer)
    assert any(trainer.method.representation.is_wide)
    assert min(rehearsal.count(trainer)) > 0


@pytest.mark.parametrize("option", ["--counted", "--speed"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs a preprocessed data set: -d ID"),
        (["-d", "901", "-p", "other"], "other.json does not exist: make the plans"),
        (["-d", "901", "-c", "3d_lowres"], "nnUNetPlans.json has no configuration 3d_lowres, but "),
    ],
)
def test_what_cannot_be_measured_is_one_line(tiny, tmp_path, capsys, option, arguments, message):
    assert cli.benchmark([option, *arguments, "-device", "cpu", "-o", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


class nnUNetTrainerOfAUser(discovery.trainers()["nnUNetTrainerMeanTeacher"]):
    """In no folder that nnU-Net searches."""


def test_a_trainer_that_nnunet_would_not_find_is_counted_all_the_same(tiny):
    found = tiny.trainer("nnUNetTrainerMeanTeacher", "2d")
    plans = {**found.my_init_kwargs["plans"], "continue_training": False}
    own = nnUNetTrainerOfAUser(**{**found.my_init_kwargs, "plans": plans})
    a, b = (rehearsal.count(rehearsal.twin(trainer), operations=False)[1] for trainer in (found, own))
    assert a == b
    assert "holds" in rehearsal.memory_warning(own, 2**20, "-d 901 -p a")


def test_a_resumed_training_is_counted_as_it_goes_on(tiny, tmp_path):
    name, file = "nnUNetTrainerMeanTeacher", str(tmp_path / "checkpoint_latest.pth")
    large, small = (tiny.trainer(name, "2d", unlabeled_batch_size=size) for size in (24, 2))
    large.initialize()
    large.save_checkpoint(file)
    expected = rehearsal.count(rehearsal.twin(small), operations=False)
    small.load_checkpoint(file)
    assert rehearsal.count(rehearsal.twin(small), operations=False) == expected


def test_what_cannot_be_counted_ends_no_training(tiny):
    trainer = tiny.trainer("nnUNetTrainerCrossMatch", "2d")
    trainer.plans_manager = None
    warning = rehearsal.memory_warning(trainer, 2**30, "-d 901 -p a")
    assert warning.startswith("WARNING: whether nnUNetTrainerCrossMatch fits")
