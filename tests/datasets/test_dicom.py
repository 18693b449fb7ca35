"""DICOM series: found whole, read whole, or refused."""

import shutil

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_series import make_ct, rotation, write_series

from nnunetv2_semisup.datasets import dicom, images
from nnunetv2_semisup.errors import InputError


def test_dicom_series_comes_back_whole(tmp_path):
    ct = make_ct(3)
    write_series(tmp_path / "a" / "b", ct, "PANCREAS_0001")
    (found,) = dicom.find_series(images.walk(tmp_path)).values()
    read = dicom.read_series(found)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read), sitk.GetArrayFromImage(ct))
    np.testing.assert_allclose(read.GetDirection(), rotation(0.2).ravel(), atol=1e-6)
    np.testing.assert_allclose(read.GetOrigin(), ct.GetOrigin(), atol=1e-6)
    np.testing.assert_allclose(read.GetSpacing(), ct.GetSpacing(), atol=1e-6)
    assert dicom.dicom_tag(found[0], "0010|0020") == "PANCREAS_0001"


def test_damaged_dicom_series(tmp_path):
    write_series(tmp_path / "gap", make_ct(3), "P1", skip=(2,))
    (found,) = dicom.find_series(images.walk(tmp_path)).values()
    with pytest.raises(InputError, match="gap: the 4 DICOM slices are not evenly spaced"):
        dicom.read_series(found)
    with pytest.raises(InputError, match="one slice only"):
        dicom.read_series(found[:1])
    found[1].write_bytes(found[1].read_bytes()[:500])
    with pytest.raises(InputError, match="damaged or incomplete"):
        dicom.read_series(found)


def test_dicom_file_of_no_series(tmp_path):
    """GDCM leaves out what it cannot read, at the ends of a series unnoticed; reports and the like may be there."""
    write_series(tmp_path, make_ct(3), "P1")
    (found,) = dicom.find_series(images.walk(tmp_path)).values()
    report = b"\0" * 128 + b"DICM\x02\0\x02\0UI\x1e\x001.2.840.10008.5.1.4.1.1.88.11\0"
    (tmp_path / "report.dcm").write_bytes(report)
    assert list(dicom.find_series(images.walk(tmp_path)).values()) == [found]
    for damaged in (found[0], found[-1]):
        whole = damaged.read_bytes()
        damaged.write_bytes(whole[:500])
        with pytest.raises(InputError, match=f"{damaged.name}: a DICOM file that cannot be read"):
            dicom.find_series(images.walk(tmp_path))
        damaged.write_bytes(whole)


@pytest.mark.parametrize("moved", [slice(0, None, 2), slice(0, 2)], ids=["every other slice", "half"])
def test_dicom_series_in_two_folders(moved, tmp_path):
    """Each folder alone would pass for an image, of half the slices or of half the size."""
    write_series(tmp_path / "a", make_ct(3), "P1")
    (found,) = dicom.find_series(images.walk(tmp_path)).values()
    (tmp_path / "b").mkdir()
    for file in found[moved]:
        file.rename(tmp_path / "b" / file.name)
    with pytest.raises(
        InputError, match=r"/a and .*/b both have files of the DICOM series .*; put them into one folder"
    ):
        dicom.find_series(images.walk(tmp_path))
    for file in (tmp_path / "a").iterdir():
        file.rename(tmp_path / "b" / file.name)
    (whole,) = dicom.find_series(images.walk(tmp_path)).values()
    assert len(whole) == 5
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    with pytest.raises(InputError, match=r"/b and .*/c both have .*; 5 slices are there twice, move one copy away"):
        dicom.find_series(images.walk(tmp_path))


def test_dicom_series_with_two_images_at_one_place(tmp_path):
    """Phases of one series, each in its folder, are images of their own."""
    for number in (3, 4):
        write_series(tmp_path / str(number), make_ct(number), "P1", series="1.2.4.5")
    found = dicom.find_series(images.walk(tmp_path))
    assert len({uid for _, uid in found}) == 1 and [len(files) for files in found.values()] == [5, 5]
    write_series(tmp_path / "5", make_ct(5, spacing=(0.7, 0.8, 2)), "P2", series="1.2.4.5")  # another patient
    assert len(dicom.find_series(images.walk(tmp_path))) == 3
    write_series(tmp_path / "6", make_ct(6, spacing=(0.7, 0.8, 2)), "P1", series="1.2.4.5")
    with pytest.raises(InputError, match="slices of one image"):
        dicom.find_series(images.walk(tmp_path))


def test_dicom_slices_of_another_scale(tmp_path):
    write_series(tmp_path, make_ct(3), "P1")
    (found,) = dicom.find_series(images.walk(tmp_path)).values()
    whole = found[2].read_bytes()
    slope = b"\x28\0\x53\x10\x02\0\0\0"
    assert whole.count(slope + b"1 ") == 1
    found[2].write_bytes(whole.replace(slope + b"1 ", slope + b"2 "))
    with pytest.raises(InputError, match=f"{found[2].name}: its values are stored otherwise than those of"):
        dicom.read_series(found)


@pytest.mark.robustness
@pytest.mark.parametrize(
    ("tag", "value", "what"),
    [
        ("0020|0037", "0\\1\\0\\0\\0\\-1", "orientation"),
        ("0028|0030", "2.\\2.", "pixel spacing"),
        ("0020|0037", "1\\0\\0\\0\\1\\0", "orientation"),
    ],
)
@pytest.mark.parametrize("index", [0, 3])
def test_a_dicom_slice_of_another_grid_is_named(tmp_path, tag, value, what, index):
    """Input: a DICOM series with one slice of another orientation or pixel spacing. Answer: an error that names
    a slice.
    """
    write_series(tmp_path, make_ct(3), "P1")
    [slices] = dicom.find_series(images.walk(tmp_path)).values()
    piece = sitk.ReadImage(str(slices[index]))
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for key in ("0020|0032", "0020|0037", "0008|0018", "0020|000e", "0010|0020", "0020|0013", "0028|1052", "0028|1053"):
        piece.SetMetaData(key, piece.GetMetaData(key))
    piece.SetMetaData(tag, value)
    if tag == "0028|0030":
        piece.SetSpacing((2.0, 2.0, piece.GetSpacing()[2]))
    writer.SetFileName(str(slices[index]))
    writer.Execute(piece)
    with pytest.raises(
        InputError, match=rf"\.dcm: its {what} is another than that of .*\.dcm, and yet both are of one"
    ):
        dicom.read_series(slices)
