"""Start-up line, typo hints, checks."""

import inspect
import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

import nnunetv2_semisup
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
        ("nnUNetTrainerMeanTeacher_5epoch", "nnUNetTrainerMeanTeacher_5epochs"),
        ("nnUNetTrainerMeanTeacher_1epochs", "nnUNetTrainerMeanTeacher_1epoch"),
        ("MeanTeacher", "nnUNetTrainerMeanTeacher"),
        ("CrossMatch_20epochs", "nnUNetTrainerCrossMatch_20epochs"),
        ("nnUNetTrainerQQQQ", None),
        ("nnUNetTrainer_5epochs", None),
    ],
)
def test_nearest(typo, meant):
    assert discovery.nearest(typo) == meant


@pytest.mark.robustness
@pytest.mark.parametrize("name", ["CrossMatch", "nnUNetTrainerCrosMatch_5epochs"])
def test_a_near_miss_ends_nnunets_search_with_one_line(monkeypatch, capsys, name):
    """Input: -tr CrossMatch, or a typo. Answer: the name that was meant; nothing of nnU-Net's traceback."""
    monkeypatch.setenv("nnUNet_extTrainer", discovery.ext_trainers_folder())
    with pytest.raises(InputError, match="Did you mean nnUNetTrainerCrossMatch(_5epochs)?[?]"):
        recursive_find_trainer_class_by_name(name)
    with pytest.raises(RuntimeError, match="Did you mean"):  # as nnU-Net's own error, for whoever uses it as a library
        recursive_find_trainer_class_by_name(name)
    with pytest.raises(RuntimeError, match="Could not find requested nnunet trainer nnUNetTrainerQQQQ"):
        recursive_find_trainer_class_by_name("nnUNetTrainerQQQQ")


def test_a_trainer_of_another_folder_may_be_named_like_ours(monkeypatch, tmp_path, capsys):
    (tmp_path / "other.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class nnUNetTrainerMeanTeachers(nnUNetTrainer):\n    pass\n"
    )
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([discovery.ext_trainers_folder(), str(tmp_path)]))
    found = recursive_find_trainer_class_by_name("nnUNetTrainerMeanTeachers")
    assert found.__module__ == "other" and "Did you mean nnUNetTrainerMeanTeacher?" in capsys.readouterr().err


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
    with pytest.raises(InputError, match=r"export nnUNet_extTrainer=\$\(nnUNetv2_semisup_trainers --folder\)"):
        discovery.check()


def test_check_names_a_torchvision_of_another_torch(monkeypatch):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("nnunetv2.utilities.find_objects.recursive_find_trainer_class_by_name", broken)
    with pytest.raises(InputError, match="^torch [0-9].* and torchvision [0-9].* do not match: run pip install"):
        discovery.check()


def test_check_fails_when_another_class_hides_ours(monkeypatch, tmp_path):
    (tmp_path / "impostor.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class nnUNetTrainerMeanTeacher(nnUNetTrainer):\n    pass\n"
    )
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(tmp_path), discovery.ext_trainers_folder()]))
    with pytest.raises(InputError, match="resolves nnUNetTrainerMeanTeacher to .* module impostor"):
        discovery.check()


#: A trainer that is another one's next version, and needs its file.
BUILT_ON = {"action": "action_plus_plus"}
METHODS = sorted(trainer.__module__.rpartition(".")[2] for trainer in discovery.trainers().values())


@pytest.mark.parametrize("removed", METHODS)
def test_without_one_method_all_others_are_found(removed, tmp_path, monkeypatch):
    """The folder of trainers lies in a copy, where the file is missing; all others are offered from there."""
    gone = {removed, BUILT_ON.get(removed)}
    expected = {n for n, t in discovery.trainers().items() if t.__module__.rpartition(".")[2] not in gone}
    copied = Path(shutil.copytree(Path(trainers.__file__).parent, tmp_path / "trainers"))
    for name in filter(None, gone):
        (copied / f"{name}.py").unlink()
    for module in [name for name in sys.modules if name.startswith("nnunetv2_semisup.trainers")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr(nnunetv2_semisup, "trainers")
    monkeypatch.setattr(nnunetv2_semisup, "__path__", [str(tmp_path), *nnunetv2_semisup.__path__])
    (scanned,) = Path(discovery.ext_trainers_folder()).glob("*.py")
    offered = runpy.run_path(str(scanned))  # as nnU-Net's search does
    assert len(expected) == len(METHODS) - len(gone - {None})
    assert set(discovery.trainers()) == expected == {name for name in offered if name.startswith("nnUNetTrainer")}
    for trainer in discovery.trainers().values():
        assert Path(inspect.getfile(trainer)).parent == copied and trainer.method_class.settings_class()
