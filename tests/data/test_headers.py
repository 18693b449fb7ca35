"""Axes of stored images, and the warning of those that differ."""

import nibabel
import numpy as np
import pytest

from nnunetv2_semisup.data.headers import differing_axes, stored_axes


@pytest.mark.robustness
def test_axes_of_a_sheared_nifti_are_read(tmp_path):
    """Input: a NIfTI file with sheared axes, which ITK refuses. Answer: its closest axes are known."""
    affine = np.array([[-1, 0.2, 0, 0], [0, -1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1.0]])
    nibabel.save(nibabel.Nifti1Image(np.zeros((3, 4, 5), np.uint8), affine), tmp_path / "a.nii.gz")
    assert stored_axes(str(tmp_path / "a.nii.gz")) == "LPS"


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.png"])
def test_damaged_files_have_no_axes(tmp_path, name):
    (tmp_path / name).write_bytes(b"x" * 400)
    assert stored_axes(str(tmp_path / name)) == ""


def test_labelled_cases_say_what_is_usual():
    axes = {"a": "LPS", "b": "RAS", "c": "RAS", "d": "RAS", "e": ""}
    assert "usual here (LPS): b (RAS), c (RAS), d (RAS)." in differing_axes(axes, ["a", "e"])
    assert "usual here (RAS): a (LPS)." in differing_axes(axes, [])
    assert differing_axes({"a": "LPS", "b": "LPS", "e": ""}, ["a"]) == "" == differing_axes({}, [])
