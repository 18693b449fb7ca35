"""The Pancreas-CT converter, on miniature DICOM series, NIfTI and h5 files."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from conversion_helpers import names, read, refuse, verify, write_list
from dicom_series import make_ct, write_series
from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization, ZScoreNormalization
from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme

from dataset_conversion import lists, pancreas_ct
from nnunetv2_semisup.datasets.dicom import find_series
from nnunetv2_semisup.datasets.images import same_geometry

pytestmark = pytest.mark.filterwarnings("ignore:One patient only")
TRAIN, TEST = ["0002", "0070", "0019", "0033"], ["0050", "0025"]
B_TRAIN, B_TEST = ["0002", "0019", "0033"], ["0050"]


def make_case(number: str) -> tuple[sitk.Image, sitk.Image]:
    """A CT with an oblique direction and a label that no flip or permutation maps onto itself."""
    size = (7 + int(number) % 2, 6, 5)
    image = make_ct(int(number), size)
    label = np.zeros(size[::-1], np.uint8)
    label[1, 1:4, 2] = label[1, 1, 2:6] = label[1:3, 3, 5] = 1
    label = sitk.GetImageFromArray(label)
    label.CopyInformation(image)
    return image, label


def write_label(path: Path, label: sitk.Image, header: str) -> None:
    """Stored with other axes than the image; with ``header`` "poor" nothing but their orientation is kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    label = sitk.DICOMOrient(label, "LAS")
    if header == "poor":
        label.SetOrigin((0, 0, 0))
        label.SetDirection((1, 0, 0, 0, -1, 0, 0, 0, 1))
    sitk.WriteImage(label, str(path))


def make_source(form: str, source: Path, numbers=TRAIN + TEST, header: str = "full") -> Path:
    for number in numbers:
        image, label = make_case(number)
        if form == "dicom":
            folder = source / "manifest" / "Pancreas-CT" / f"PANCREAS_{number}" / "11-24-2015" / "series"
            write_series(folder, image, f"PANCREAS_{number}")
        elif form == "nifti":
            (source / "images").mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(image, str(source / "images" / f"image{number}.nii.gz"))
        else:
            source.mkdir(exist_ok=True)
            with h5py.File(source / f"image{number}_norm.h5", "w") as file:
                file["image"] = sitk.GetArrayFromImage(image).T / np.float32(100)
                file["label"] = sitk.GetArrayFromImage(label).T
            continue
        write_label(source / "TCIA_pancreas_labels" / f"label{number}.nii.gz", label, header)
    return source


@pytest.fixture
def raw(nnunet_raw, tmp_path, monkeypatch) -> Path:
    for variant, parts in (("a", (TRAIN, TEST)), ("b", (B_TRAIN, B_TEST))):
        for part, numbers in zip(("train", "test"), parts, strict=True):
            write_list(tmp_path / "lists" / f"pancreas_{variant}_{part}.txt", numbers)
    monkeypatch.setattr(pancreas_ct, "LISTS", tmp_path / "lists")
    return nnunet_raw


def cases(*numbers: str) -> set[str]:
    return {f"PANCREAS_{number}" for number in numbers}


@pytest.mark.parametrize(("form", "header"), [("dicom", "full"), ("dicom", "poor"), ("nifti", "full"), ("h5", "full")])
def test_every_voxel_arrives_where_it_was(form, header, raw, tmp_path):
    report = pancreas_ct.convert(make_source(form, tmp_path / "s", header=header), 82, "2", variant="B")
    target = raw / "Dataset082_PancreasCT"
    dataset_json = verify(target)
    for folder, numbers in (("imagesTr", ["0002", "0019"]), ("imagesUn", ["0033"]), ("imagesTs", ["0050"])):
        assert names(target / folder) == cases(*numbers)
        for number in numbers:
            source, source_label = make_case(number)
            array, image = read(target / folder / f"PANCREAS_{number}_0000.nii.gz")
            expected = sitk.GetArrayFromImage(source).T
            np.testing.assert_array_equal(array, expected / np.float32(100) if form == "h5" else expected)
            if form != "h5":
                np.testing.assert_allclose(image.GetDirection(), source.GetDirection(), atol=1e-5)
                np.testing.assert_allclose(image.GetOrigin(), source.GetOrigin(), atol=1e-4)
                np.testing.assert_allclose(image.GetSpacing(), source.GetSpacing(), atol=1e-5)
            if folder != "imagesUn":
                array, label = read(target / folder.replace("images", "labels") / f"PANCREAS_{number}.nii.gz")
                np.testing.assert_array_equal(array, sitk.GetArrayFromImage(source_label).T)
                assert same_geometry(label, image) and array.dtype == np.uint8
    assert names(target / "labelsTr") == cases("0002", "0019")
    scheme = get_normalization_scheme(dataset_json["channel_names"]["0"])
    assert scheme is (ZScoreNormalization if form == "h5" else CTNormalization)
    assert "0025 and 0070 are left out" in report
    assert ("agree on the orientation only" in report) == (header == "poor")


def test_duplicates_need_a_flag(raw, tmp_path):
    source = make_source("h5", tmp_path / "source")
    report = pancreas_ct.convert(source, 82, "2")
    target = raw / "Dataset082_PancreasCT"
    assert names(target / "imagesTr") == cases("0002", "0019") and names(target / "imagesTs") == cases("0050")
    assert "variant A" in report and "not the published ones" in report
    report = pancreas_ct.convert(source, 83, "2", keep_duplicates=True)
    target = raw / "Dataset083_PancreasCT"
    assert names(target / "imagesTr") == cases("0002", "0070") and names(target / "imagesTs") == cases("0050", "0025")
    assert "LEAK: 0025 and 0070" in report
    assert "LEAK" in json.loads((target / "dataset.json").read_text())["conversion"]["duplicates"][0]


def test_duplicates_of_variant_b(raw, tmp_path):
    source = make_source("h5", tmp_path / "source")
    refuse(raw, "variant B has no duplicates", pancreas_ct.convert, source, 82, "2", "B", keep_duplicates=True)


def test_labels_of_unlabelled_cases_are_not_read(raw, tmp_path):
    source = make_source("nifti", tmp_path / "source", B_TRAIN + B_TEST)
    (source / "TCIA_pancreas_labels" / "label0033.nii.gz").write_bytes(b"poison")
    (source / "TCIA_pancreas_labels" / "label0019.nii.gz").unlink()
    pancreas_ct.convert(source, 82, "1")
    assert names(raw / "Dataset082_PancreasCT" / "imagesUn") == cases("0019", "0033")


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        ("no label", "1 of 4 cases lack the image or the label: 0019; complete"),
        ("packed labels", "3 of 4 cases lack the image or the label: .*/labels.zip is there: unpack first"),
        ("divided series", "/series and .*/more both have files of the DICOM series .*; put them into one folder"),
        ("copied series", "/series and .*/more both have .* 5 slices are there twice, move one copy away"),
        ("missing slice", "PANCREAS_0033.*: the 4 DICOM slices are not evenly spaced"),
        ("label of another case", "label0002.nii.gz: the label has 8 x 6 x 5 voxels .* 7 x 6 x 5"),
        ("label elsewhere", "label0002.nii.gz: by the headers it lies .* voxels away from .*dcm"),
        ("label without orientation", "label0002.nii.gz: its header keeps no orientation .* onto .*dcm"),
        ("label with four axes", "label0002.nii.gz: 4 axes or several values"),
        ("unreadable slice", "cannot be read as an image; download"),
        ("label value", "label0002.nii.gz: unexpected label value 2"),
        ("empty label", "label0002.nii.gz: the label is empty"),
        ("cut label", "label0050.nii.gz: damaged or incomplete"),
        ("twice", "case 0002 is there twice"),
        ("both forms", "several forms"),
        ("stranger", "of no PANCREAS_NNNN patient"),
        ("archive", "is an archive: unpack it"),
        ("link", "is a link that leaves the source folder"),
    ],
)
def test_damaged_download(damage, match, raw, tmp_path):
    source = make_source("dicom", tmp_path / "source", B_TRAIN + B_TEST)
    labels = source / "TCIA_pancreas_labels"
    image, label = make_case("0002")
    series = source / "manifest" / "Pancreas-CT" / "PANCREAS_0033"
    match damage:
        case "no label":
            (labels / "label0019.nii.gz").unlink()
        case "packed labels":
            shutil.rmtree(labels)
            (source / "labels.zip").write_bytes(b"")
        case "divided series" | "copied series":
            (series / "more").mkdir()
            for file in sorted((series / "11-24-2015" / "series").iterdir())[: 2 if damage == "divided series" else 5]:
                (shutil.move if damage == "divided series" else shutil.copy)(file, series / "more")
        case "missing slice":
            write_series(series / "new", make_case("0033")[0], "PANCREAS_0033", skip=(2,))
            for file in (series / "11-24-2015" / "series").iterdir():
                file.unlink()
        case "label of another case":
            write_label(labels / "label0002.nii.gz", make_case("0019")[1], "full")
        case "label elsewhere":
            label.SetOrigin((200.0, 20.0, 300.0))
            write_label(labels / "label0002.nii.gz", label, "full")
        case "label without orientation":
            stored = nibabel.load(labels / "label0002.nii.gz")
            stored.set_qform(None, 0)
            stored.set_sform(None, 0)
            nibabel.save(stored, labels / "label0002.nii.gz")
        case "label with four axes":
            sitk.WriteImage(sitk.JoinSeries([label] * 2), str(labels / "label0002.nii.gz"))
        case "unreadable slice":
            ((*_, last),) = find_series(sorted(series.rglob("*.dcm"))).values()
            last.write_bytes(last.read_bytes()[:500])
        case "label value":
            write_label(labels / "label0002.nii.gz", label * 2, "full")
        case "empty label":
            write_label(labels / "label0002.nii.gz", label * 0, "full")
        case "cut label":
            whole = (labels / "label0050.nii.gz").read_bytes()
            (labels / "label0050.nii.gz").write_bytes(whole[: len(whole) // 2])
        case "twice":
            write_series(source / "again", image, "PANCREAS_0002")
        case "both forms":
            sitk.WriteImage(image, str(source / "image0002.nii.gz"))
        case "stranger":
            write_series(source / "other", image, "LIVER_1")
        case "archive":
            source = tmp_path / "source.zip"
            zipfile.ZipFile(source, "w").close()
        case "link":
            series.rename(tmp_path / "elsewhere")
            series.symlink_to(tmp_path / "elsewhere")
    refuse(raw, match, pancreas_ct.convert, source, 82, "2")


def test_main(raw, tmp_path, capsys):
    source = make_source("nifti", tmp_path / "source", B_TRAIN + B_TEST)
    arguments = ["--source", str(source), "-d", "82", "--labeled", "all", "-np", "1", "--previews", "1"]
    assert pancreas_ct.main(arguments) == 0
    assert "next" in capsys.readouterr().out
    assert len(list((raw / "Dataset082_PancreasCT" / "previews").iterdir())) == 1
    assert pancreas_ct.main(arguments) == 2
    assert "82 is taken" in capsys.readouterr().err


def test_published_lists():
    published = {
        f"{variant}_{part}": lists.read_list(lists.LISTS / f"pancreas_{variant}_{part}.txt")
        for variant in "ab"
        for part in ("train", "test")
    }
    assert {name: len(numbers) for name, numbers in published.items()} == {
        "a_train": 62, "a_test": 20, "b_train": 62, "b_test": 18
    }  # fmt: skip
    everything = {f"{number:04d}" for number in range(1, 83)}
    assert {*published["a_train"], *published["a_test"]} == everything
    assert {*published["b_train"], *published["b_test"]} == everything - set(pancreas_ct.DUPLICATES)
    assert " ".join(published["a_train"][:12]) == "0057 0018 0062 0031 0020 0017 0032 0079 0061 0064 0070 0019"
    assert published["b_train"] == sorted(published["b_train"]) and published["b_train"][11] == "0012"
