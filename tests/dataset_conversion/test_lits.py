"""The LiTS converter on miniature scans."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conversion_helpers import names, read, refuse, verify
from dicom_series import make_ct

from dataset_conversion import lits
from dataset_conversion.common import Options

pytestmark = pytest.mark.filterwarnings("ignore:One patient only")


def make_case(number: int) -> tuple[sitk.Image, sitk.Image]:
    image = make_ct(number)
    label = sitk.GetImageFromArray(np.random.default_rng(number).integers(0, 3, (5, 6, 7)).astype(np.int16))
    label.CopyInformation(image)
    return image, label


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source"
    for number in range(6):
        part = folder / f"Training Batch {1 + number % 2}"
        part.mkdir(parents=True, exist_ok=True)
        image, label = make_case(number)
        sitk.WriteImage(image, str(part / f"volume-{number}.nii"))
        sitk.WriteImage(label, str(part / f"segmentation-{number}.nii"))
    sitk.WriteImage(make_ct(9), str(folder / "test-volume-0.nii"))
    return folder


@pytest.mark.parametrize("structures", ["both", "liver"])
def test_every_voxel_arrives_where_it_was(structures, nnunet_raw, source):
    report = lits.convert(source, 131, "2", "1", structures)
    target = nnunet_raw / "Dataset131_LiTS"
    dataset_json = verify(target)
    assert dataset_json["channel_names"] == {"0": "CT"}
    assert dataset_json["labels"] == lits.LABELS[structures]
    found = {}
    for folder, number in (("imagesTr", 2), ("imagesUn", 3), ("imagesTs", 1)):
        found[folder] = names(target / folder)
        assert len(found[folder]) == number
        for case in found[folder]:
            image, label = make_case(int(case.removeprefix("volume-")))
            array, written = read(target / folder / f"{case}_0000.nii.gz")
            np.testing.assert_array_equal(array, sitk.GetArrayFromImage(image).T)
            np.testing.assert_allclose(written.GetDirection(), image.GetDirection(), atol=1e-5)
            label_file = target / folder.replace("images", "labels") / f"{case}.nii.gz"
            assert label_file.exists() == (folder != "imagesUn")
            if label_file.exists():
                expected = np.minimum(sitk.GetArrayFromImage(label).T, {"both": 2, "liver": 1}[structures])
                np.testing.assert_array_equal(read(label_file)[0], expected)
    assert set().union(*found.values()) == {f"volume-{number}" for number in range(6)}
    assert "6 scans, 131 were published" in report


def test_larger_budgets_contain_smaller_ones_and_the_test_set_stays(nnunet_raw, source):
    for number in (1, 3):
        lits.convert(source, 100 + number, str(number), "2", seed=4)
    first, second = nnunet_raw / "Dataset101_LiTS", nnunet_raw / "Dataset103_LiTS"
    assert names(first / "imagesTr") < names(second / "imagesTr")
    assert names(first / "imagesTs") == names(second / "imagesTs")
    lits.convert(source, 104, "3", "2", seed=5)
    other = nnunet_raw / "Dataset104_LiTS"
    assert (names(other / "imagesTs"), names(other / "imagesTr")) != (
        names(second / "imagesTs"),
        names(second / "imagesTr"),
    )


def test_subsets(nnunet_raw, source):
    for subset in (0, 1):
        lits.convert(source, 110 + subset, "2", "1", options=Options(subset=subset))
    first, second = nnunet_raw / "Dataset110_LiTS", nnunet_raw / "Dataset111_LiTS"
    assert not names(first / "imagesTr") & names(second / "imagesTr")
    assert names(first / "imagesTs") == names(second / "imagesTs")


def test_lists(nnunet_raw, source, tmp_path):
    (tmp_path / "test.txt").write_text("volume-4\n")
    (tmp_path / "labelled.txt").write_text("volume-5\nvolume-0\n")
    lits.convert(source, 131, str(tmp_path / "labelled.txt"), str(tmp_path / "test.txt"))
    assert names(nnunet_raw / "Dataset131_LiTS" / "imagesTs") == {"volume-4"}
    assert names(nnunet_raw / "Dataset131_LiTS" / "labelsTr") == {"volume-0", "volume-5"}


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        ("no label", "lack segmentation-N.nii: volume-0"),
        ("cut", "volume-0.nii: damaged or incomplete"),
        ("value", "segmentation-0.nii: unexpected label value 3"),
        ("other axes elsewhere", "segmentation-0.nii: its header has axes RAS and no place"),
        ("elsewhere", "segmentation-0.nii: by the headers it lies .* voxels away from .*volume-0.nii"),
        ("four axes", "segmentation-0.nii: 4 axes or several values"),
        ("image with four axes", "volume-0.nii: 4 axes or several values"),
        ("twice", "there is another"),
        ("all for testing", "--test 6: the number of test cases must be 0 to 5"),
        ("unknown test", "no such cases: volume-9"),
        ("nothing", "has no volume-N.nii; .*x.zip is there: unpack first"),
    ],
)
def test_wrong_input(damage, match, nnunet_raw, source, tmp_path):
    part, choice = source / "Training Batch 1", "0"
    label = make_case(0)[1]
    match damage:
        case "no label":
            (part / "segmentation-0.nii").unlink()
        case "cut":
            (part / "volume-0.nii").write_bytes((part / "volume-0.nii").read_bytes()[:-9])
        case "value":
            sitk.WriteImage(label + 1, str(part / "segmentation-0.nii"))
        case "other axes elsewhere":
            turned = sitk.DICOMOrient(label, "RAS")
            turned.SetOrigin((0, 0, 0))
            sitk.WriteImage(turned, str(part / "segmentation-0.nii"))
        case "elsewhere":
            label.SetOrigin((-50.5, 20.25, 600.0))
            sitk.WriteImage(label, str(part / "segmentation-0.nii"))
        case "four axes":
            sitk.WriteImage(sitk.JoinSeries([label] * 2), str(part / "segmentation-0.nii"))
        case "image with four axes":
            sitk.WriteImage(sitk.JoinSeries([make_ct(0)] * 2), str(part / "volume-0.nii"))
        case "twice":
            sitk.WriteImage(label, str(source / "segmentation-0.nii.gz"))
        case "all for testing":
            choice = "6"
        case "unknown test":
            choice = str(tmp_path / "test.txt")
            Path(choice).write_text("volume-9\n", encoding="utf-8")
        case "nothing":
            source = tmp_path / "empty"
            source.mkdir()
            (source / "x.zip").write_bytes(b"")
    refuse(nnunet_raw, match, lits.convert, source, 131, "all", choice)


def test_main(nnunet_raw, source, capsys):
    arguments = ["--source", str(source), "-d", "131", "--labeled", "2", "--test", "1", "-np", "1", "--previews", "0"]
    assert lits.main([*arguments, "--dry-run"]) == 0
    assert "nothing was written" in capsys.readouterr().out and not list(nnunet_raw.iterdir())
    assert lits.main(arguments) == 0 and not (nnunet_raw / "Dataset131_LiTS" / "previews").exists()


@pytest.mark.robustness
@pytest.mark.parametrize("turned", [(0, 3), (2,), (5,)])
def test_volumes_with_other_axes_are_named_in_the_report(nnunet_raw, source, turned):
    """Input: volumes of LiTS with axes to the right and front among others. Answer: the report names them."""
    for number in turned:
        for file in source.glob(f"*/*-{number}.nii"):
            sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(str(file)), "RAS"), str(file))
    report = lits.convert(source, 131, "4", "1", "both", options=Options(dry_run=True))
    names = ", ".join(f"volume-{number} (RAS)" for number in turned)
    assert f"usual here (LPS): {names}. nnU-Net does not turn images" in report
