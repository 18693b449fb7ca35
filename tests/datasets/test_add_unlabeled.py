"""Images of any format into imagesUn, with the checks."""

import itertools
import json
import os
import re
import shutil

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from dicom_series import make_ct, write_series
from filelock import FileLock
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from nnunetv2_semisup import cli
from nnunetv2_semisup.data.folders import find_unlabeled_cases
from nnunetv2_semisup.datasets.add_unlabeled import add_unlabeled
from nnunetv2_semisup.errors import InputError


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


@pytest.fixture
def dataset(nnunet_raw):
    """Two labelled cases and a test case, one channel."""
    folder = nnunet_raw / "Dataset005_CT"
    for number, case in enumerate(["imagesTr/a", "imagesTr/b", "imagesTs/t"]):
        write(folder / f"{case}_0000.nii.gz", make_ct(number))
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "x": 1}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps({**content, "numTraining": 2}))
    return folder


def two_channels(dataset) -> None:
    content = json.loads((dataset / "dataset.json").read_text())
    (dataset / "dataset.json").write_text(json.dumps({**content, "channel_names": {"0": "T1", "1": "T2"}}))
    for case in ("imagesTr/a", "imagesTr/b", "imagesTs/t"):
        write(dataset / f"{case}_0001.nii.gz", make_ct(40))


def added(dataset) -> list[str]:
    folder = dataset / "imagesUn"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_every_format_arrives(dataset, tmp_path):
    new = tmp_path / "new"
    for number, ending in enumerate([".nii.gz", ".nii", ".nrrd", ".mha", ".mhd"]):
        write(new / "deep" / f"scan {number}{ending}", make_ct(10 + number))
    write_series(new / "deep" / "P 7" / "series", make_ct(17), "P7")
    (new / "notes.txt").write_text("x")
    report = add_unlabeled("5", new, processes=1)
    names = ["deep_P_7_series_0000.nii.gz", *(f"scan_{i}_0000.nii.gz" for i in range(5))]
    assert added(dataset) == names and "6 cases brought in" in report and "WARNING" not in report
    assert f"note: 1 files of other kinds were not read, e.g. {new / 'notes.txt'}" in report
    for number, name in zip((17, 10, 11, 12, 13, 14), names, strict=True):
        image, expected = sitk.ReadImage(str(dataset / "imagesUn" / name)), make_ct(number)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(expected))
        np.testing.assert_allclose(image.GetDirection(), expected.GetDirection(), atol=1e-5)
        np.testing.assert_allclose(image.GetSpacing(), expected.GetSpacing(), atol=1e-5)
        np.testing.assert_allclose(image.GetOrigin(), expected.GetOrigin(), atol=1e-4)
    find_unlabeled_cases(dataset, json.loads((dataset / "dataset.json").read_text()))
    record = json.loads((dataset / "added_unlabeled.json").read_text())
    assert record["scan_1"]["source"] == [str(new / "deep" / "scan 1.nii")]
    assert {path.name for path in dataset.iterdir()} == {
        "imagesTr", "imagesTs", "imagesUn", "dataset.json", "added_unlabeled.json"
    }  # fmt: skip

    write(new / "later.nrrd", make_ct(30))
    report = add_unlabeled("5", new)  # again: only what is new
    assert "1 cases brought in" in report and "scan_3 = scan_3" in report and len(added(dataset)) == 7


def test_doubles_and_test_images(dataset, tmp_path):
    write(tmp_path / "new" / "x.nrrd", make_ct(0))  # = a of imagesTr
    write(tmp_path / "new" / "y.nrrd", make_ct(2))  # = t of imagesTs
    write(tmp_path / "new" / "z1.nrrd", make_ct(9))
    write(tmp_path / "new" / "z2.mha", sitk.Cast(make_ct(9), sitk.sitkFloat32))
    report = add_unlabeled("5", tmp_path / "new")
    assert added(dataset) == ["z1_0000.nii.gz"] and "WARNING" not in report
    assert "left out, there already with the same content: x = a, z2 = z1" in report
    assert "left out, 1 test or validation images: y = imagesTs/t; --allow_test_images brings them in" in report
    assert add_unlabeled("5", tmp_path / "new").count("left out") == 2 and added(dataset) == ["z1_0000.nii.gz"]


def test_test_images_on_request(dataset, tmp_path, capsys):
    write(tmp_path / "new" / "y.nrrd", make_ct(2))  # = t of imagesTs
    told = (
        "WARNING: 1 unlabelled images are test images of imagesTs (y = t): your test result will be too good, because"
    )
    assert cli.add_unlabeled(["-d", "5", str(tmp_path / "new"), "--allow_test_images"]) == 0
    assert added(dataset) == ["y_0000.nii.gz"] and told in capsys.readouterr().out
    assert told in add_unlabeled("5", tmp_path / "new")  # as long as they lie there
    (dataset / "imagesUn" / "y_0000.nii.gz").unlink()
    report = add_unlabeled("5", tmp_path / "new")
    assert "WARNING" not in report and "y = imagesTs/t" in report
    assert "added_unlabeled.json does not list any more what was removed from imagesUn: y" in report
    assert json.loads((dataset / "added_unlabeled.json").read_text()) == {} and added(dataset) == []


def test_what_was_removed_by_hand_is_brought_in_again_and_recorded_once(dataset, tmp_path):
    for number, name in enumerate("xy"):
        write(tmp_path / "new" / f"{name}.nrrd", make_ct(20 + number))
    add_unlabeled("5", tmp_path / "new")
    for name in "xy":
        (dataset / "imagesUn" / f"{name}_0000.nii.gz").unlink()
    (tmp_path / "new" / "y.nrrd").unlink()
    report = add_unlabeled("5", tmp_path / "new")
    assert "1 cases brought in" in report and "removed from imagesUn: y" in report
    assert list(json.loads((dataset / "added_unlabeled.json").read_text())) == ["x"]


@pytest.mark.robustness
def test_all_faults_are_told_at_once_and_can_be_skipped(dataset, tmp_path, capsys):
    """Input: damaged files, archives, segmentations and whole scans in one folder. Answer: one line that names all
    that is refused and nothing brought in; with --skip_refused the whole scans are brought in.
    """
    new = tmp_path / "new"
    write(new / "good.nrrd", make_ct(20))
    for name in ("P1_seg", "P2_seg"):
        write(new / f"{name}.nii.gz", make_ct(1) > 0)
    (new / "cut.nrrd").write_bytes(b"NRRD0004")
    (new / "more.zip").write_bytes(b"")
    write(new / "a.nrrd", make_ct(21))  # imagesTr has another a
    write(new / "turned.nii.gz", sitk.DICOMOrient(make_ct(22), "RAS"))
    write(new / "mask.mha", make_ct(23) > 0)
    reasons = (
        "P1_seg.nii.gz, .*P2_seg.nii.gz looks like a segmentation: move segmentations away, only images belong here",
        "cut.nrrd: damaged", "more.zip is an archive", "another image named a",
        r"turned \(RAS\): the axes", "mask.mha: lab",
    )  # fmt: skip
    for dry_run in (True, False):
        with pytest.raises(InputError, match="^7 images are refused, none was brought in: ") as caught:
            add_unlabeled("5", new, dry_run=dry_run)
        message = str(caught.value)
        assert all(re.search(reason, message) for reason in reasons) and message.count("_seg for its own files") == 1
        assert message.endswith("--skip_refused brings in the other 1") and "\n" not in message
        assert added(dataset) == [] and not (dataset / "added_unlabeled.json").exists()
    arguments = ["-d", "5", str(new), "--skip_refused"]
    assert cli.add_unlabeled([*arguments, "--dry-run"]) == 0 and added(dataset) == []
    assert cli.add_unlabeled(arguments) == 0 and added(dataset) == ["good_0000.nii.gz"]
    report = capsys.readouterr().out
    assert report.count("left out, 7 refused:") == 2 and all(re.search(reason, report) for reason in reasons)


@pytest.mark.robustness
def test_dicom_series_that_are_not_whole_can_be_skipped(dataset, tmp_path):
    """Input: a cut DICOM slice, a series in two folders, and a scan. Answer: both named; the scan can be brought in."""
    new = tmp_path / "new"
    write(new / "good.nrrd", make_ct(20))
    write_series(new / "cut", make_ct(21), "P1")
    write_series(new / "one", make_ct(22), "P2")
    slices = sorted((new / "cut").iterdir())
    slices[1].write_bytes(slices[1].read_bytes()[:500])
    (new / "two").mkdir()
    for file in sorted((new / "one").iterdir())[:2]:
        file.rename(new / "two" / file.name)
    with pytest.raises(InputError, match="a DICOM file that cannot be read.*both have files of the DICOM series"):
        add_unlabeled("5", new)
    assert added(dataset) == []
    add_unlabeled("5", new, skip_refused=True)
    assert added(dataset) == ["good_0000.nii.gz"]


def test_the_double_of_a_refused_image_is_brought_in(dataset, tmp_path):
    new = tmp_path / "new"
    write(new / "p.nii.gz", sitk.DICOMOrient(make_ct(22), "RAS"))
    write(new / "q.nii.gz", make_ct(22))
    report = add_unlabeled("5", new, skip_refused=True)
    assert added(dataset) == ["q_0000.nii.gz"] and "same content" not in report


@pytest.mark.robustness
def test_many_damaged_files(dataset, tmp_path):
    """Input: twelve damaged files and no other. Answer: one line with the first ten and the number of the others."""
    (tmp_path / "new").mkdir()
    for number in range(12):
        (tmp_path / "new" / f"x{number:02d}.nrrd").write_bytes(b"NRRD0004")
    with pytest.raises(InputError, match=r"12 images are refused, .*x09.nrrd.* \| and 2 more$") as caught:
        add_unlabeled("5", tmp_path / "new")
    assert "x10.nrrd" not in str(caught.value)
    report = add_unlabeled("5", tmp_path / "new", skip_refused=True)
    assert "0 cases brought in" in report and "left out, 12 refused:" in report and "and 2 more" in report


def test_a_case_that_two_files_may_be_is_left_out_as_a_whole(dataset, tmp_path):
    two_channels(dataset)
    for number, name in enumerate(
        ["p_x_0000.nrrd", "p/x_0000.nrrd", "p/x_0001.nrrd", "q/x_0000.nrrd", "q/x_0001.nrrd"]
    ):
        write(tmp_path / "new" / name, make_ct(20 + number))
    report = add_unlabeled("5", tmp_path / "new", skip_refused=True)
    assert added(dataset) == ["q_x_0000.nii.gz", "q_x_0001.nii.gz"] and "would be case p_x as well" in report


def test_dry_run_changes_nothing(dataset, tmp_path):
    write(tmp_path / "new" / "x.nrrd", make_ct(20))
    assert "1 cases would be brought in (dry run)" in add_unlabeled("5", tmp_path / "new", dry_run=True)
    assert sorted(path.name for path in dataset.iterdir()) == ["dataset.json", "imagesTr", "imagesTs"]


def test_spacing_far_from_the_labelled_ones(dataset, tmp_path):
    write(tmp_path / "new" / "near.nrrd", make_ct(20, spacing=(0.5, 0.9, 2.5)))
    write(tmp_path / "new" / "far.nrrd", make_ct(21, spacing=(0.7, 0.8, 3.5)))
    assert "WARNING: spacing below half or above twice that of the labelled images: far\n" in (
        add_unlabeled("5", tmp_path / "new") + "\n"
    )


def test_orientation(dataset, tmp_path):
    turned = sitk.DICOMOrient(make_ct(20), "RAS")
    write(tmp_path / "new" / "x.nii.gz", turned)
    with pytest.raises(InputError, match=r"x \(RAS\): the axes point elsewhere than in the labelled images \(LPS\)"):
        add_unlabeled("5", tmp_path / "new")
    assert added(dataset) == []
    add_unlabeled("5", tmp_path / "new", reorient=True)
    image = sitk.ReadImage(str(dataset / "imagesUn" / "x_0000.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(make_ct(20)))


def test_several_channels(dataset, tmp_path):
    two_channels(dataset)
    new = tmp_path / "new"
    write(new / "x_0000.nrrd", make_ct(20))
    with pytest.raises(InputError, match="case x has channel 0000, expected 2 channels"):
        add_unlabeled("5", new)
    write(new / "x_0001.nrrd", make_ct(21, size=(7, 6, 4)))
    with pytest.raises(InputError, match="x_0001.nrrd: shape or geometry differ from"):
        add_unlabeled("5", new)
    write(new / "x_0001.nrrd", make_ct(21))
    write(new / "y.nrrd", make_ct(22))
    with pytest.raises(InputError, match="y.nrrd: the dataset has 2 channels"):
        add_unlabeled("5", new)
    (new / "y.nrrd").unlink()
    add_unlabeled("5", new)
    assert added(dataset) == ["x_0000.nii.gz", "x_0001.nii.gz"]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda new: None, "holds no images"),
        (lambda new: (new / "x.zip").write_bytes(b""), "x.zip is an archive: unpack it"),
        (lambda new: (new / "x.nrrd").write_bytes(b"NRRD0004"), "x.nrrd: damaged or incomplete"),
        (lambda new: write(new / "a.nrrd", make_ct(20)), "imagesTr has another image named a"),
        (lambda new: write(new / "t_0000.nrrd", make_ct(20)), "imagesTs has another image named t"),
        (lambda new: [write(new / f"x.{kind}", make_ct(20)) for kind in ("nrrd", "mha")], "would be case x as well"),
        (lambda new: [write(new / f"{x}.nrrd", make_ct(20)) for x in ("p_x", "p/x", "q/x")], "case p_x as well"),
        (
            lambda new: [write(new / f"x_000{part}.nrrd", make_ct(20 + part)) for part in (0, 1)],
            "x_0001.nrrd looks like another channel of .*x_0000.nrrd, and the .* name the latter x_0000_0000",
        ),
        (
            lambda new: [write(new / f"{name}.mha", make_ct(ord(name)) > 0) for name in "yz"],
            "y.mha, .*z.mha: labels. Fewer than 10 different values, all of them whole numbers",
        ),
        (lambda new: write(new / "y.mha", sitk.Cast(make_ct(20) > 0, sitk.sitkFloat32)), "y.mha: labels"),
        (lambda new: [write(new / f"x{part}.nrrd", make_ct(20)) for part in ("", "_0000")], "would be case x as well"),
        (lambda new: write(new / "\u60a3\u8005.nrrd", make_ct(20)), "has no letter"),
        (lambda new: write_series(new / "s", make_ct(20, size=(7, 6, 1)), "P"), "one file only; complete it, move it"),
        (lambda new: write(new / "x_seg.nrrd", make_ct(20)), "x_seg.nrrd looks like a segmentation: move"),
        (
            lambda new: write(new / "x.mha", sitk.JoinSeries([make_ct(20)] * 2)),
            "x.mha: it has 2 channels, .* declares 1",
        ),
        (lambda new: write(new / "x.mha", sitk.Compose([make_ct(20)] * 2)), "x.mha: several values per voxel"),
        (lambda new: write(new / "x.mha", sitk.Cast(make_ct(20), sitk.sitkFloat32) / 0), "x.mha: .* not finite"),
        (
            lambda new: (new / "x.nrrd").symlink_to(new.parent / "nnUNet_raw/Dataset005_CT/dataset.json"),
            "link that leaves",
        ),
        (lambda new: (new / "x.nrrd").symlink_to("gone.nrrd"), "x.nrrd is a link to gone.nrrd, which does not exist"),
        (lambda new: write_series(new / "s", make_ct(20), "P", skip=(1,)), "not evenly spaced"),
    ],
)
def test_wrong_input(make, match, dataset, tmp_path):
    (tmp_path / "new").mkdir()
    make(tmp_path / "new")
    with pytest.raises(InputError, match=match) as caught:
        add_unlabeled("5", tmp_path / "new")
    assert "\n" not in str(caught.value) and added(dataset) == []


def test_grey_photographs(nnunet_raw, tmp_path):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (4, 12, 9), dtype=np.uint8)
    content = {"channel_names": {"0": "grey"}, "labels": {"background": 0, "x": 1}, "file_ending": ".png"}
    dataset = nnunet_raw / "Dataset006_Grey"
    for name, image in zip("ab", pixels, strict=False):
        write(dataset / "imagesTr" / f"{name}_0000.png", sitk.GetImageFromArray(image))
    (dataset / "dataset.json").write_text(json.dumps({**content, "numTraining": 2}))
    for name, image in zip("cd", pixels[2:], strict=True):
        write(tmp_path / "new" / f"{name}.png", sitk.GetImageFromArray(image))
    assert "2 cases brought in" in add_unlabeled("6", tmp_path / "new")
    for name, expected in zip("cd", pixels[2:], strict=True):
        image = sitk.ReadImage(str(dataset / "imagesUn" / f"{name}_0000.png"))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(image), expected)


def test_a_failing_case_leaves_no_half_case(dataset, tmp_path, monkeypatch):
    from nnunetv2_semisup.datasets import images

    for name in ("x", "y"):
        write(tmp_path / "new" / f"{name}.nrrd", make_ct(ord(name)))
    write_image = images.write_image

    def full(image, path):
        if path.name.startswith("y"):
            path.write_bytes(b"half")
            raise InputError(f"{path} could not be written; is the disk full?")
        write_image(image, path)

    monkeypatch.setattr(images, "write_image", full)
    with pytest.raises(InputError, match="disk full"):
        add_unlabeled("5", tmp_path / "new")
    assert added(dataset) == ["x_0000.nii.gz"]
    assert not [path for path in dataset.iterdir() if path.name.startswith(".")]
    monkeypatch.setattr(images, "write_image", write_image)
    assert "1 cases brought in" in add_unlabeled("5", tmp_path / "new")
    assert added(dataset) == ["x_0000.nii.gz", "y_0000.nii.gz"]


def test_labelled_images_that_dataset_json_names_are_compared(dataset, tmp_path):
    content = json.loads((dataset / "dataset.json").read_text())
    (dataset / "imagesTr").rename(dataset / "data")
    content["dataset"] = {case: {"images": [f"data/{case}_0000.nii.gz"], "label": f"{case}.nii.gz"} for case in "ab"}
    (dataset / "dataset.json").write_text(json.dumps(content))
    write(tmp_path / "new" / "leak.nrrd", make_ct(0))
    write(tmp_path / "new" / "x.nrrd", make_ct(20))
    assert "same content: leak = a" in add_unlabeled("5", tmp_path / "new") and added(dataset) == ["x_0000.nii.gz"]
    write(tmp_path / "new" / "turned.nrrd", sitk.DICOMOrient(make_ct(21), "RAS"))
    with pytest.raises(InputError, match="the axes point elsewhere"):
        add_unlabeled("5", tmp_path / "new")


def test_few_values_are_no_labels_if_they_are_fractions(dataset, tmp_path):
    write(tmp_path / "new" / "y.mha", sitk.Cast(make_ct(20) > 0, sitk.sitkFloat32) / 2)
    assert "1 cases brought in" in add_unlabeled("5", tmp_path / "new")


def test_files_that_are_named_alike_in_every_folder(dataset, tmp_path):
    new = tmp_path / "new"
    for number, name in enumerate(["P 1/ct", "P 1/late/ct", "P 2/ct_0000", "P 2/other"]):
        write(new / f"{name}.nii.gz", make_ct(20 + number))
    add_unlabeled("5", new)
    assert added(dataset) == [f"{name}_0000.nii.gz" for name in ("P_1_ct", "P_1_late_ct", "P_2_ct", "other")]
    first = sitk.ReadImage(str(dataset / "imagesUn" / "P_1_late_ct_0000.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(first), sitk.GetArrayFromImage(make_ct(21)))


def test_channels_that_are_named_alike_in_every_folder(dataset, tmp_path):
    two_channels(dataset)
    for number, name in enumerate(["p/mr_0000", "p/mr_0001", "q/mr_0000", "q/mr_0001", "q/z_0000", "q/z_0001"]):
        write(tmp_path / "new" / f"{name}.nrrd", make_ct(20 + number))
    add_unlabeled("5", tmp_path / "new")
    cases = find_unlabeled_cases(dataset, json.loads((dataset / "dataset.json").read_text()))
    assert list(cases) == ["p_mr", "q_mr", "z"]
    image = sitk.ReadImage(cases["q_mr"][1])
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(make_ct(23)))


def test_numbered_cases_are_no_channels(dataset, tmp_path):
    for number in (1, 2):
        write(tmp_path / "new" / f"img_000{number}.nrrd", make_ct(20 + number))
    write(tmp_path / "new" / "img_0000_0000.nrrd", make_ct(20))
    add_unlabeled("5", tmp_path / "new")
    assert added(dataset) == [f"img_000{number}_0000.nii.gz" for number in range(3)]


def test_files_of_other_kinds_are_told(dataset, tmp_path):
    new = tmp_path / "new"
    write(new / "x.mhd", make_ct(20))  # and x.raw
    for name in ("analyze/b.hdr", "analyze/b.img", "c.gipl", "d.gipl", ".DS_Store", "._x.mhd"):
        (new / name).parent.mkdir(exist_ok=True)
        (new / name).write_bytes(b"x")
    places = ", ".join(str(new / name) for name in ("c.gipl", "analyze/b.hdr", "analyze/b.img"))
    assert f"note: 4 files of other kinds were not read, e.g. {places}\n" in add_unlabeled("5", new) + "\n"
    assert added(dataset) == ["x_0000.nii.gz"]


def test_validation_images_are_compared(dataset, tmp_path):
    for case, number in (("v", 30), ("w", 31)):
        write(dataset / "imagesVal" / f"{case}_0000.nii.gz", make_ct(number))
    write(tmp_path / "new" / "x.nrrd", make_ct(30))
    assert "x = imagesVal/v; --allow_test_images" in add_unlabeled("5", tmp_path / "new") and added(dataset) == []
    report = add_unlabeled("5", tmp_path / "new", allow_test_images=True)
    assert "WARNING: 1 unlabelled images are validation images of imagesVal (x = v): your validation result" in report
    write(tmp_path / "new" / "w.nrrd", make_ct(32))
    with pytest.raises(InputError, match="imagesVal has another image named w; rename"):
        add_unlabeled("5", tmp_path / "new")


def test_a_fault_that_is_there_already_stops_before_anything_is_brought_in(dataset, tmp_path):
    (dataset / "imagesUn").mkdir()
    (dataset / "imagesUn" / "notes.txt").write_text("x")
    write(tmp_path / "new" / "x.nrrd", make_ct(20))
    with pytest.raises(InputError, match="notes.txt does not end with"):
        add_unlabeled("5", tmp_path / "new")
    assert added(dataset) == ["notes.txt"]


def test_previews(dataset, tmp_path, capsys):
    for number in range(3):
        write(tmp_path / "new" / f"x{number}.nrrd", make_ct(20 + number))
    arguments = ["-d", "5", str(tmp_path / "new"), "--previews"]
    assert cli.add_unlabeled([*arguments, "-1"]) == 2 and added(dataset) == []
    assert cli.add_unlabeled([*arguments, "2"]) == 0
    assert sorted(path.name for path in (dataset / "previews_unlabeled").iterdir()) == ["x0.png", "x2.png"]


def test_one_process_at_a_time(dataset, tmp_path):
    write(tmp_path / "new" / "x.nrrd", make_ct(20))
    with FileLock(str(dataset / ".unlabeled.lock")), pytest.raises(InputError, match="another process is adding"):
        add_unlabeled("5", tmp_path / "new")
    add_unlabeled("5", tmp_path / "new")
    assert added(dataset) == ["x_0000.nii.gz"] and not list(dataset.glob(".*"))


@pytest.mark.parametrize("moment", range(4))
def test_killed_at_every_rename(moment, dataset, tmp_path, monkeypatch):
    """The folder as kill -9 leaves it: before the plan, the record, the first or the second of a case's two files."""
    two_channels(dataset)
    for channel in (0, 1):
        write(tmp_path / "new" / f"x_000{channel}.nrrd", make_ct(20 + channel))
    replace, kept = os.replace, tmp_path / "kept"
    count = itertools.count()

    def watched(*files):
        if next(count) == moment:
            shutil.copytree(dataset, kept)
        replace(*files)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", watched)
        add_unlabeled("5", tmp_path / "new")
    shutil.rmtree(dataset)
    kept.rename(dataset)
    report = add_unlabeled("5", tmp_path / "new")
    assert ("1 cases brought in" in report) == (moment == 0)
    assert added(dataset) == ["x_0000.nii.gz", "x_0001.nii.gz"]
    assert list(json.loads((dataset / "added_unlabeled.json").read_text())) == ["x"]
    assert not list(dataset.glob(".*"))


@pytest.fixture
def tiff_dataset(nnunet_raw):
    """One labelled 3D TIFF of 6 x 1 x 1 mm, whose voxel size lies in the file beside it."""
    folder = nnunet_raw / "Dataset006_Tiff"
    write_tiff(folder / "imagesTr" / "a_0000.tif", {"spacing": [6, 1, 1]}, seed=0)
    content = {"channel_names": {"0": "EM"}, "labels": {"background": 0, "x": 1}, "file_ending": ".tif"}
    (folder / "dataset.json").write_text(json.dumps({**content, "numTraining": 1}))
    return folder


def write_tiff(path, side, seed, name=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, sitk.GetImageFromArray(np.random.default_rng(seed).integers(0, 200, (4, 5, 6)).astype(np.uint8)))
    if side is not None:
        (path.parent / (name or f"{path.stem.removesuffix('_0000')}.json")).write_text(json.dumps(side))


@pytest.mark.robustness
@pytest.mark.parametrize("name", ["new0_0000.tif", "new0.tif", "deep/er/new0_0000.tif"])
def test_3d_tiff_with_side_file_keeps_its_voxel_size(tiff_dataset, tmp_path, name):
    """Input: a 3D TIFF with its voxel size in CASE.json beside it. Answer: it is taken along and nnU-Net reads it."""
    write_tiff(tmp_path / "new" / name, {"spacing": [6, 1, 1]}, seed=1)
    report = add_unlabeled("6", tmp_path / "new")
    assert added(tiff_dataset) == ["new0.json", "new0_0000.tif"] and "other kinds" not in report
    _, facts = Tiff3DIO().read_images([str(tiff_dataset / "imagesUn" / "new0_0000.tif")])
    assert list(facts["spacing"]) == [6, 1, 1]
    assert "1 cases" in report and "WARNING" not in report and not list(tiff_dataset.glob(".tmp*"))


@pytest.mark.robustness
def test_3d_tiff_without_side_file_is_refused_where_labelled_ones_have_it(tiff_dataset, tmp_path):
    """Input: a 3D TIFF without CASE.json, which the labelled cases have. Answer: an error, nothing brought in."""
    write_tiff(tmp_path / "new" / "new0_0000.tif", None, seed=1)
    with pytest.raises(InputError, match="new0_0000.tif: no file CASE.json with the voxel size"):
        add_unlabeled("6", tmp_path / "new")
    assert added(tiff_dataset) == []


@pytest.mark.robustness
@pytest.mark.parametrize("side", [{"spacing": [6, 1]}, {"spacing": [0, 1, 1]}, {"spacing": "6"}, [6, 1, 1], {}])
def test_3d_tiff_with_a_wrong_side_file_is_refused(tiff_dataset, tmp_path, side):
    """Input: a 3D TIFF whose CASE.json has no three numbers above 0. Answer: an error that names the file."""
    write_tiff(tmp_path / "new" / "new0_0000.tif", side, seed=1)
    with pytest.raises(InputError, match=r"new0.json: expected .* correct it"):
        add_unlabeled("6", tmp_path / "new")


@pytest.mark.robustness
def test_3d_tiff_with_far_voxel_size_in_side_file_is_told(tiff_dataset, tmp_path):
    """Input: a 3D TIFF whose CASE.json has five times the labelled voxel size. Answer: a warning that names it."""
    write_tiff(tmp_path / "new" / "new0_0000.tif", {"spacing": [30, 1, 1]}, seed=1)
    assert "above twice that of the labelled images: new0" in add_unlabeled("6", tmp_path / "new")


def use_reader(dataset, name):
    content = json.loads((dataset / "dataset.json").read_text())
    (dataset / "dataset.json").write_text(json.dumps({**content, "overwrite_image_reader_writer": name}))


def write_nifti(path, array, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([1.0, 1, 1, 1]) if affine is None else affine), path)


def noise(*shape, seed=7):
    return np.random.default_rng(seed).normal(0, 50, shape).astype(np.float32)


SHEARED = np.array([[-1, 0.2, 0, 0], [0, -1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1.0]])


@pytest.mark.robustness
def test_sheared_nifti_of_a_data_set_that_nibabel_reads(dataset, tmp_path):
    """Input: NIfTI with sheared axes, in a data set read by NibabelIO. Answer: taken as it is; a double is
    recognised.
    """
    use_reader(dataset, "NibabelIO")
    write_nifti(tmp_path / "new" / "x.nii.gz", noise(5, 6, 7), SHEARED)
    write_nifti(tmp_path / "new" / "y.nii.gz", noise(5, 6, 7), SHEARED)
    report = add_unlabeled("5", tmp_path / "new")
    assert added(dataset) == ["x_0000.nii.gz"] and "y = x" in report
    image, _ = NibabelIO().read_images([str(dataset / "imagesUn" / "x_0000.nii.gz")])
    np.testing.assert_array_equal(image[0].T, noise(5, 6, 7))
    write_nifti(tmp_path / "new" / "z.nii.gz", noise(5, 6, 7, seed=1), np.diag([-1, 1, 1, 1]) @ SHEARED)
    with pytest.raises(InputError, match="z.nii.gz: its axes are .* not at right angles, so it cannot be turned"):
        add_unlabeled("5", tmp_path / "new", reorient=True)


@pytest.mark.robustness
@pytest.mark.parametrize("reader", ["NibabelIOWithReorient", "SimpleITKIOWithReorient"])
@pytest.mark.parametrize("axes", ["RAS", "ASL"])
def test_mixed_orientations_of_a_data_set_whose_reader_turns_images(dataset, tmp_path, reader, axes):
    """Input: images of other orientation, in a data set whose reader turns them. Answer: they are taken."""
    use_reader(dataset, reader)
    write(tmp_path / "new" / "x.nii.gz", sitk.DICOMOrient(make_ct(20), axes))
    assert "1 cases brought in" in add_unlabeled("5", tmp_path / "new") and added(dataset) == ["x_0000.nii.gz"]


@pytest.mark.robustness
@pytest.mark.parametrize("shape", [(9, 8), (1, 9, 8)])
def test_flat_nifti_of_a_flat_data_set(nnunet_raw, tmp_path, shape):
    """Input: 2D NIfTI, stored with two axes or with one more of length 1. Answer: taken where the labelled ones
    are so.
    """
    dataset = nnunet_raw / "Dataset005_Flat"
    write_nifti(dataset / "imagesTr" / "a_0000.nii.gz", noise(*shape, seed=0))
    content = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "x": 1}, "file_ending": ".nii.gz"}
    (dataset / "dataset.json").write_text(json.dumps({**content, "numTraining": 1}))
    write_nifti(tmp_path / "new" / "b.nii.gz", noise(*shape, seed=1))
    assert "1 cases brought in" in add_unlabeled("5", tmp_path / "new") and added(dataset) == ["b_0000.nii.gz"]


@pytest.mark.robustness
def test_channels_in_one_4d_file(nnunet_raw, tmp_path):
    """Input: both channels in one 4D file, as the labelled cases have them. Answer: taken; three channels are
    refused.
    """
    dataset = nnunet_raw / "Dataset005_Four"
    write_nifti(dataset / "imagesTr" / "a_0000.nii.gz", noise(5, 6, 7, 2, seed=0))
    content = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "x": 1}, "file_ending": ".nii.gz"}
    (dataset / "dataset.json").write_text(json.dumps({**content, "numTraining": 1}))
    write_nifti(tmp_path / "new" / "b.nii.gz", noise(5, 6, 7, 2, seed=1))
    assert "1 cases brought in" in add_unlabeled("5", tmp_path / "new") and added(dataset) == ["b_0000.nii.gz"]
    assert SimpleITKIO().read_images([str(dataset / "imagesUn" / "b_0000.nii.gz")])[0].shape == (2, 7, 6, 5)
    write_nifti(tmp_path / "new" / "c.nii.gz", noise(5, 6, 7, 3, seed=2))
    with pytest.raises(InputError, match="c.nii.gz: it has 3 channels, dataset.json declares 2"):
        add_unlabeled("5", tmp_path / "new")


@pytest.mark.robustness
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda new: write(new / "x.nii.gz", make_ct(20)[:, :, 2]),
            "x.nii.gz: an image of 2 axes, the labelled ones .* 3",
        ),
        (lambda new: write(new / "x.mha", make_ct(20) * 0), "x.mha: every voxel is 0: it shows nothing"),
        (
            lambda new: write(new / "x.mha", sitk.Cast(make_ct(20), sitk.sitkFloat32) * 1e35),
            "x.mha: it has values up to",
        ),
        (lambda new: write(new / "x.nii.gz", sitk.Cast(make_ct(20), sitk.sitkComplexFloat32)), "x.nii.gz: .*complex"),
        (lambda new: os.mkfifo(new / "x.nii.gz"), "x.nii.gz is a pipe, socket or device and no file; move it away"),
        (lambda new: os.mkfifo(new / "notes"), "notes is a pipe"),
        (
            lambda new: (new / "x.mhd").write_text(MHD),
            "x.mhd: .*takes its voxels from ../secret.raw, outside its folder",
        ),
        (lambda new: (new / os.fsdecode(b"x\xff.nii.gz")).write_bytes(b""), r"x\\udcff.nii.gz': its name is no UTF-8"),
    ],
)
def test_hostile_images(make, match, dataset, tmp_path):
    """Input: a slice among volumes, an image of one value, of 1e38, of complex numbers, a pipe, a header that
    takes its voxels from elsewhere, a name that is no UTF-8. Answer: one line that names it, nothing brought
    in.
    """
    (tmp_path / "new").mkdir()
    make(tmp_path / "new")
    with pytest.raises(InputError, match=match) as caught:
        add_unlabeled("5", tmp_path / "new")
    assert "\n" not in str(caught.value) and added(dataset) == []


MHD = "ObjectType = Image\nNDims = 3\nDimSize = 3 4 5\nElementType = MET_UCHAR\nElementDataFile = ../secret.raw\n"


@pytest.mark.robustness
@pytest.mark.parametrize(
    ("channels", "told"), [(4, r"4 channels \(the fourth is transparency, save it without\)"), (1, "1 channels")]
)
def test_photographs_with_other_channels(nnunet_raw, tmp_path, channels, told):
    """Input: an RGBA or grey PNG in a data set of RGB ones. Answer: the error names file, channels and
    transparency.
    """
    pixels = np.random.default_rng(0).integers(0, 255, (9, 8, 4)).astype(np.uint8)
    dataset = nnunet_raw / "Dataset005_Photo"
    write(dataset / "imagesTr" / "a_0000.png", sitk.GetImageFromArray(pixels[..., :3], isVector=True))
    content = {"channel_names": dict(zip("012", "RGB", strict=True)), "labels": {"background": 0, "x": 1}}
    (dataset / "dataset.json").write_text(json.dumps({**content, "numTraining": 1, "file_ending": ".png"}))
    new = pixels if channels == 4 else pixels[..., 0]
    write(tmp_path / "new" / "b.png", sitk.GetImageFromArray(new, isVector=channels == 4))
    with pytest.raises(InputError, match=f"b.png: it has {told}, dataset.json declares 3"):
        add_unlabeled("5", tmp_path / "new")


@pytest.mark.robustness
@pytest.mark.parametrize("content", ["[]", '"x"', "{"])
def test_a_record_of_another_form_is_told(dataset, tmp_path, content):
    """Input: added_unlabeled.json that is a list or cut off. Answer: one line that names it."""
    (dataset / "added_unlabeled.json").write_text(content)
    write(tmp_path / "new" / "x.nrrd", make_ct(20))
    with pytest.raises(InputError, match="added_unlabeled.json is not .*: repair or remove it"):
        add_unlabeled("5", tmp_path / "new")


@pytest.mark.robustness
@pytest.mark.parametrize("name", ["5", "Dataset005_CT/", "Dataset005_CT"])
def test_a_data_set_may_be_named_with_a_slash(dataset, tmp_path, name):
    """Input: -d Dataset005_CT/, as shells complete it. Answer: the data set is found."""
    write(tmp_path / "new" / "x.nrrd", make_ct(20))
    assert "1 cases" in add_unlabeled(name, tmp_path / "new", dry_run=True)


@pytest.mark.robustness
@pytest.mark.parametrize(
    ("value", "hint"), [('"{}"', "without quotes"), ("~/nowhere", "and ~"), ("{}/typo", "create it or")]
)
def test_a_folder_variable_that_is_mistyped(dataset, tmp_path, monkeypatch, value, hint):
    """Input: nnUNet_raw with quotes, with ~, or mistyped. Answer: the error says that the folder itself is missing."""
    monkeypatch.setenv("nnUNet_raw", value.format(dataset.parent))
    with pytest.raises(InputError, match=f"nnUNet_raw is .*, which is not a folder: .*{hint}"):
        add_unlabeled("5", tmp_path, dry_run=True)


@pytest.mark.robustness
def test_a_labelled_image_that_shows_nothing_stops_nobody(dataset, tmp_path):
    """Input: a labelled image of one value, which nnU-Net takes. Answer: new images are brought in all the same."""
    write(dataset / "imagesTr" / "b_0000.nii.gz", make_ct(1) * 0)
    write(tmp_path / "new" / "x.nrrd", make_ct(20))
    assert "1 cases brought in" in add_unlabeled("5", tmp_path / "new")
