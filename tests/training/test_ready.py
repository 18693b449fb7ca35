"""What is easily forgotten before a training: one line with the command, and nothing written."""

import json
import shutil

import pytest
import torch

from nnunetv2_semisup import plans, trainers
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.training.ready import require_device

TRAINER = "nnUNetTrainerPasteMatch_1epoch"


def start(dataset, plans_content=None, device="cpu", configuration="2d"):
    content = {**(plans_content or dataset.plans), "continue_training": False}
    return getattr(trainers, TRAINER)(content, configuration, "all", dataset.dataset_json, torch.device(device))


@pytest.mark.robustness
@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_forgotten_preprocessing_names_the_command(tiny, tmp_path, monkeypatch, configuration):
    """Input: a training with plans of another spacing, before nnUNetv2_preprocess. Answer: that command, whole."""
    folder = tmp_path / tiny.name
    shutil.copytree(tiny.preprocessed, folder)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    new = plans.derive(folder, "nnUNetPlans", "coarse", None, [], plans.Size(coarsen=1.2))
    content = json.loads(new.read_text())
    command = f"run nnUNetv2_preprocess -d 901 -plans_name coarse -c {configuration}"
    with pytest.raises(InputError, match=f"coarse_{configuration} holds no preprocessed cases: {command}"):
        start(tiny, content, configuration=configuration)
    assert not (tmp_path / "results").exists()
    shutil.copytree(folder / f"nnUNetPlans_{configuration}", folder / f"coarse_{configuration}")
    assert start(tiny, content, configuration=configuration).configuration_name == configuration


@pytest.mark.robustness
@pytest.mark.parametrize("variable", ["nnUNet_results", "nnUNet_preprocessed"])
def test_unset_folders_are_named(tiny, monkeypatch, variable):
    """Input: a training without nnUNet_results or nnUNet_preprocessed. Answer: the variable and how to set it."""
    monkeypatch.delenv(variable)
    with pytest.raises(InputError, match=f"{variable} is not set: export {variable}=FOLDER"):
        start(tiny)


@pytest.mark.robustness
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_and_no_device_option(tiny, tmp_path):
    """Input: a training on a machine without a GPU, without -device. Answer: add -device cpu; nothing is written."""
    with pytest.raises(InputError, match="no CUDA GPU here: add -device cpu"):
        start(tiny, device="cuda")
    assert not (tmp_path / "results").exists()
    require_device("cpu")
