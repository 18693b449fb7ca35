"""Random input to everything that reads files or arguments: it is taken, or refused in one line."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnunetv2_semisup import cli
from nnunetv2_semisup.data import folders, preprocess, splits
from nnunetv2_semisup.data.headers import read_header
from nnunetv2_semisup.datasets import images
from nnunetv2_semisup.errors import InputError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=6,
)
few = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@contextlib.contextmanager
def taken_or_refused():
    """Nothing but an InputError of one line may come out."""
    try:
        yield
    except InputError as error:
        assert "\n" not in str(error) and str(error)


def nested_keys(content: dict, path=()) -> list[tuple]:
    found = []
    for key, value in content.items():
        found.append((*path, key))
        if isinstance(value, dict):
            found += nested_keys(value, (*path, key))
    return found


def replaced(content: dict, path: tuple, value) -> dict:
    key, *rest = path
    return {**content, key: replaced(content[key], rest, value) if rest else value}


@pytest.fixture
def copy(datasets, use, tmp_path):
    dataset = replace(datasets("2 classes"), root=tmp_path / "copy")
    shutil.copytree(datasets("2 classes").root, dataset.root)
    return use(dataset)


@few
@given(value=JSON, key=st.sampled_from(["channel_names", "labels", "file_ending", "dataset", "modality"]))
def test_dataset_json(value, key):
    good = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "x": 1}, "file_ending": ".nii.gz"}
    for content in (value, good | {key: value}):
        with taken_or_refused():
            folders.check_dataset_json(content, Path("dataset.json"))


@few
@given(content=JSON | st.lists(st.fixed_dictionaries({"train": JSON, "val": JSON, "unlabeled": JSON}), max_size=2))
def test_splits_final_json(content, tmp_path):
    file = tmp_path / "splits_final.json"
    file.write_text(json.dumps(content))
    with taken_or_refused():
        splits.read_folds(file, ["a", "b"])
    with taken_or_refused():
        splits.unlabeled_of_fold(tmp_path, 0, ["a"])


@few
@given(data=st.data())
def test_plans(data, copy):
    plans = copy.plans
    path = data.draw(st.sampled_from(nested_keys(plans)))
    with taken_or_refused():
        preprocess.check_plans(replaced(plans, path, data.draw(JSON)), "3d_fullres", "plans.json", "plan again")


@few
@given(data=st.data())
def test_manifest(data, copy):
    good = {
        "plans": "x",
        "cases": {"unl0": {"images": [["unl0_0000.nii.gz", 1, 2]], "sizes": [1, 2, 3], "axes": "LPS"}},
    }
    path = data.draw(st.sampled_from(nested_keys(good)))
    content = data.draw(JSON | JSON.map(lambda value: replaced(good, path, value)))
    task = preprocess._read_task(copy.name, "nnUNetPlans", "3d_fullres")
    if isinstance(content, dict):
        content["plans"] = task.fingerprint
    copy.manifest.write_text(json.dumps(content))
    assert preprocess.pending_cases(copy.name, "nnUNetPlans", "3d_fullres") == list(copy.unlabelled)


@few
@given(
    flips=st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), min_size=1, max_size=6),
    length=st.none() | st.integers(0, 900),
    by_nibabel=st.booleans(),
)
def test_nifti_header(flips, length, by_nibabel, tmp_path):
    file = tmp_path / "a.nii"
    image = sitk.GetImageFromArray(np.random.default_rng(0).integers(0, 99, (4, 5, 6)).astype(np.int16))
    sitk.WriteImage(image, str(file))
    content = bytearray(file.read_bytes())
    for place, value in flips:
        content[place] = value
    file.write_bytes(content[:length])
    with taken_or_refused():
        images.read_image(file, by_nibabel=by_nibabel)
    read_header(str(file))


WORDS = [
    "-d",
    "901",
    "-o",
    "902",
    "-p",
    "nnUNetPlans",
    "-c",
    "2d",
    "-np",
    "0",
    "1",
    "-f",
    "all",
    "--labeled",
    "all",
    "2",
]
WORDS += [
    "--seed",
    "x",
    "--name",
    "../x",
    "--set",
    "a.b=1",
    "-tr",
    "nnUNetTrainer",
    "--dry-run",
    "--patient_pattern",
    "(",
]
WORDS += [
    "-ref",
    ".",
    "-pred",
    "-djfile",
    "dataset.json",
    "--rounds",
    "--drop",
    "2.5",
    "--preset",
    "small",
    "",
    "-x",
    "é",
]
COMMANDS = (cli.plans, cli.preprocess, cli.hide_labels, cli.add_unlabeled, cli.selftrain, cli.evaluate, cli.benchmark)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(command=st.sampled_from(COMMANDS), arguments=st.lists(st.sampled_from(WORDS), max_size=9))
def test_command_lines(command, arguments, nnunet_raw, monkeypatch):
    """In empty folders, so that nothing can be found to work on."""
    monkeypatch.chdir(nnunet_raw)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = command(arguments)
        except SystemExit as end:
            code = end.code
    assert code in (0, 1, 2, None), (arguments, code)
    assert "Traceback" not in err.getvalue() and (code in (0, None) or "error" in err.getvalue())
    assert not list(nnunet_raw.glob("Dataset*"))
