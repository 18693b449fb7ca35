"""Start-up line, typo hints, checks."""

import os

import pytest

from nnunetv2_semisup import discovery, trainers
from nnunetv2_semisup.errors import InputError


def test_register_appends_once_and_keeps_what_is_there(monkeypatch):
    ours = discovery.ext_trainers_folder()
    monkeypatch.setenv("nnUNet_extTrainer", f"/other{os.pathsep}/more")
    for _ in range(2):
        discovery.register()
        assert os.environ["nnUNet_extTrainer"] == os.pathsep.join(["/other", "/more", ours])
    monkeypatch.delenv("nnUNet_extTrainer")
    discovery.register()
    assert os.environ["nnUNet_extTrainer"] == ours


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("nnUNetTrainerMeanTeachr", "nnUNetTrainerMeanTeacher"),
        ("nnUNetTrainermeanteacher_20epochs", "nnUNetTrainerMeanTeacher_20epochs"),
        ("nnUNetTrainerMeansTeacher_1epoch", "nnUNetTrainerMeanTeacher_1epoch"),
        ("nnUNetTrainerQQQQ", None),
        ("nnUNetTrainer_5epochs", None),
    ],
)
def test_nearest(typo, meant):
    assert discovery.nearest(typo) == meant


@pytest.mark.parametrize(
    "name",
    ["nnUNetTrainerMeanTeacher_0epochs", "nnUNetTrainerMeanTeacher_5epoch", "nnUNetTrainerMeanTeacher_1epochs", "x"],
)
def test_no_such_trainer(name):
    assert not hasattr(trainers, name)


def test_unknown_trainer_in_settings_is_named_with_a_suggestion():
    with pytest.raises(InputError, match="nnUNetTrainerMeanTeacer.*did you mean nnUNetTrainerMeanTeacher"):
        discovery.settings_class("nnUNetTrainerMeanTeacer")


def test_check_finds_all_and_says_from_where(monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", discovery.ext_trainers_folder())
    found = discovery.check()
    assert set(found) == set(discovery.trainers()) and all(os.path.isfile(f) for f in found.values())


def test_check_fails_when_nnunet_cannot_find_them(monkeypatch):
    monkeypatch.delenv("nnUNet_extTrainer")
    with pytest.raises(InputError, match=r"export nnUNet_extTrainer=\$\(nnUNetv2_semisup_trainers\)"):
        discovery.check()


def test_check_fails_when_another_class_hides_ours(monkeypatch, tmp_path):
    (tmp_path / "impostor.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class nnUNetTrainerMeanTeacher(nnUNetTrainer):\n    pass\n"
    )
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(tmp_path), discovery.ext_trainers_folder()]))
    with pytest.raises(InputError, match="resolves nnUNetTrainerMeanTeacher to .* module impostor"):
        discovery.check()
