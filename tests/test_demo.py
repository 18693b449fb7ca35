"""The demo's parts in process; the whole demo as a slow test."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_semisup.demo import data, run


def test_data_are_frozen():
    """Statistics, not bytes, so that another scipy's last digit does not matter; a changed generator does."""
    image, label = data.make_case(0)
    assert image.shape == label.shape == data.SHAPE and image.dtype == np.int16 and label.dtype == np.uint8
    assert set(np.unique(label)) == {0, 1}
    assert [int(label.sum()), round(float(image.mean()), 1), round(float(image.std()), 1)] == FROZEN
    assert not np.array_equal(image, data.make_case(1)[0])


FROZEN = [17780, 199.0, 209.6]


def test_dataset_has_no_label_of_an_unlabelled_case(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "CASES", {"imagesTr": 1, "imagesUn": 1, "imagesTs": 1})
    run.make_dataset(tmp_path)
    names = sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*.nii.gz"))
    assert names == [
        "imagesTr/tr000_0000.nii.gz",
        "imagesTs/ts002_0000.nii.gz",
        "imagesUn/un001_0000.nii.gz",
        "labelsTr/tr000.nii.gz",
        "labelsTs/ts002.nii.gz",
    ]
    assert sitk.ReadImage(str(tmp_path / names[0])).GetSpacing() == data.SPACING_MM
    assert json.loads((tmp_path / "dataset.json").read_text())["numTraining"] == 1


def test_table_shows_a_loss_as_a_loss(tmp_path):
    models = {}
    for name, values in {"baseline": [0.8, 0.6], "ours": [0.7, 0.5]}.items():
        models[name] = tmp_path / name
        models[name].mkdir()
        cases = [{"prediction_file": f"/x/ts{i}.nii.gz", "metrics": {"1": {"Dice": v}}} for i, v in enumerate(values)]
        (models[name] / "summary.json").write_text(json.dumps({"metric_per_case": cases}))
    table = run.write_table(tmp_path / "dice.csv", models)
    assert "0.700   0.141   0.600" in table and "difference -0.100" in table
    assert (tmp_path / "dice.csv").read_text().splitlines() == [
        "case,baseline,ours",
        "ts0,0.8000,0.7000",
        "ts1,0.6000,0.5000",
    ]


@pytest.mark.slow
def test_whole_demo(tmp_path):
    arguments = ["-o", str(tmp_path / "d"), "--epochs", "1"]
    code = f"import sys; from nnunetv2_semisup.cli import demo; sys.exit(demo({arguments}))"
    # nnU-Net cannot plan with the 0 loader workers that the other tests use
    environment = {k: v for k, v in os.environ.items() if k != "nnUNet_n_proc_DA"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert "difference" in result.stdout and (tmp_path / "d" / "overlay.png").is_file()
