"""Stock nnU-Net at lengths that it does not have itself."""

import pickle

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunetv2_semisup import discovery, trainers


@pytest.fixture(autouse=True)
def found(monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", discovery.ext_trainers_folder())


def test_nnunet_finds_any_length_and_it_pickles():
    for name in ("nnUNetTrainer_3epochs", "nnUNetTrainer_47epochs"):
        found = recursive_find_trainer_class_by_name(name)
        assert found is getattr(trainers, name) and found.__name__ == name and found.__bases__ == (nnUNetTrainer,)
        assert pickle.loads(pickle.dumps(found)) is found
    assert "nnUNetTrainer_47epochs" not in discovery.trainers(), "it is none of ours"


def test_its_own_lengths_stay_its_own():
    found = recursive_find_trainer_class_by_name("nnUNetTrainer_5epochs")
    assert found.__module__.startswith("nnunetv2.training")


def test_only_the_number_of_epochs_differs(tiny):
    def build(trainer_class):
        plans = tiny.plans | {"continue_training": False}
        return trainer_class(plans, "3d_fullres", "all", tiny.dataset_json, torch.device("cpu"))

    stock, ours = build(nnUNetTrainer), build(trainers.nnUNetTrainer_47epochs)
    assert ours.num_epochs == 47 and ours.my_init_kwargs.keys() == stock.my_init_kwargs.keys()
    assert ours.output_folder == stock.output_folder.replace("nnUNetTrainer__", "nnUNetTrainer_47epochs__")
    same = [key for key, value in vars(stock).items() if isinstance(value, (int, float, bool)) and key != "num_epochs"]
    assert len(same) > 10 and all(getattr(ours, key) == getattr(stock, key) for key in same)
