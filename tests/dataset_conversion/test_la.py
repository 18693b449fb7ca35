"""The left atrium converter, on miniature inputs in both layouts, and on real cases where they are at hand."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

import h5py
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.preprocessing.normalization.default_normalization_schemes import ZScoreNormalization
from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme
from nnunetv2.utilities import utils
from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from dataset_conversion import common, la, lists
from nnunetv2_semisup.datasets.images import same_geometry
from nnunetv2_semisup.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
REAL_DATA = ROOT.parent / "shared" / "data"
needs_real_data = pytest.mark.skipif(
    not (REAL_DATA / "la").is_dir(), reason="the LA packages are not beside the checkout"
)

TRAIN = ["C1", "C2", "C3", "C4", "C5", "C6"]
TEST = ["T1", "T2"]
SPACING = (0.5, 0.75, 1.25)  # of the nrrd headers, mm
ORIGIN = (-11.0, 22.5, 7.0)  # mm
IMAGE_NAME = {"h5": "mri_norm2.h5", "nrrd": "lgemri.nrrd"}
pytestmark = pytest.mark.filterwarnings("ignore:One patient only")
FORMS = pytest.mark.parametrize("form", ["h5", "nrrd"])


# --- miniature inputs -----------------------------------------------------------------------------------------------


def make_case(form: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Random image and label (0, 1), axes (x, y, z) of three different lengths."""
    generator = np.random.default_rng(number)
    shape = (7 + number % 3, 5, 3)
    label = (generator.random(shape) < 0.3).astype(np.uint8)
    label[0, 1, 2] = 1
    if form == "h5":
        return generator.normal(size=shape).astype(np.float32), label
    return generator.integers(0, 256, shape, dtype=np.uint8), label


def write_h5(path: Path, **arrays) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, compression="gzip" if np.ndim(array) else None)


def write_nrrd(path: Path, array: np.ndarray, spacing=SPACING, origin=ORIGIN) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"space": "left-posterior-superior", "space directions": np.diag(spacing), "space origin": origin}
    nrrd.write(str(path), array, header if array.ndim == 3 else {})


def write_case(form: str, folder: Path, image: np.ndarray, label: np.ndarray) -> None:
    if form == "h5":
        write_h5(folder / "mri_norm2.h5", image=image, label=label)
    else:
        write_nrrd(folder / "lgemri.nrrd", image)
        write_nrrd(folder / "laendo.nrrd", label * np.uint8(255))


def make_source(form: str, source: Path, cases: list[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    content = {case: make_case(form, number) for number, case in enumerate(cases)}
    for case, (image, label) in content.items():
        write_case(form, source / case, image, label)
    return content


def write_lists(folder: Path, train: list[str], test: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "la_train.txt").write_text("# a source\n" + "\n".join(train) + "\n")
    (folder / "la_test.txt").write_text("# a source\n" + "\n".join(test) + "\n")
    return folder


@pytest.fixture
def raw(tmp_path, monkeypatch) -> Path:
    """nnU-Net's raw folder, empty; the lists name the miniature cases."""
    for key in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / key).mkdir()
        monkeypatch.setenv(key, str(tmp_path / key))
    monkeypatch.setattr(la, "LISTS", write_lists(tmp_path / "lists", TRAIN, TEST))
    return tmp_path / "nnUNet_raw"


@pytest.fixture
def source(tmp_path) -> Path:
    """A source folder of the h5 form."""
    make_source("h5", tmp_path / "source", TRAIN + TEST)
    return tmp_path / "source"


def read_nifti(path: Path) -> tuple[np.ndarray, sitk.Image]:
    """The array in axis order (x, y, z), and the image."""
    image = sitk.ReadImage(str(path))
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0), image


def files_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def refuse(raw: Path, match: str, *arguments, **options) -> None:
    """``la.convert`` must raise an InputError of one line and change nothing that nnU-Net sees."""
    before = sorted(raw.glob("[!.]*"))
    with pytest.raises(InputError, match=match) as caught:
        la.convert(*arguments, **options)
    assert "\n" not in str(caught.value)
    assert sorted(raw.glob("[!.]*")) == before


# --- what is written ------------------------------------------------------------------------------------------------


@FORMS
def test_every_voxel_arrives_where_it_was(form, raw, tmp_path):
    content = make_source(form, tmp_path / "source", TRAIN + TEST)
    la.convert(tmp_path / "source", 508, "2")
    target = raw / "Dataset508_LA"
    for cases, images, labels in (
        (TRAIN[:2], "imagesTr", "labelsTr"),
        (TRAIN[2:], "imagesUn", None),
        (TEST, "imagesTs", "labelsTs"),
    ):
        for case in cases:
            source_image, source_label = content[case]
            array, image = read_nifti(target / images / f"{case}_0000.nii.gz")
            np.testing.assert_array_equal(array, source_image)
            assert array.dtype == source_image.dtype
            np.testing.assert_allclose(image.GetSpacing(), (0.625,) * 3 if form == "h5" else SPACING)
            np.testing.assert_allclose(image.GetOrigin(), (0, 0, 0) if form == "h5" else ORIGIN)
            np.testing.assert_allclose(image.GetDirection(), np.eye(3).ravel())
            if labels:
                array, label = read_nifti(target / labels / f"{case}.nii.gz")
                np.testing.assert_array_equal(array, source_label)
                assert array.dtype == np.uint8
                assert same_geometry(image, label)


@FORMS
def test_exactly_the_promised_files(form, raw, tmp_path):
    make_source(form, tmp_path / "source", TRAIN + TEST)
    la.convert(tmp_path / "source", 508, "2", name="Atrium")
    assert [path.name for path in raw.iterdir()] == ["Dataset508_Atrium"]
    images = {f"imagesTr/{c}_0000.nii.gz" for c in TRAIN[:2]} | {f"imagesUn/{c}_0000.nii.gz" for c in TRAIN[2:]}
    test = {f"imagesTs/{c}_0000.nii.gz" for c in TEST} | {f"labelsTs/{c}.nii.gz" for c in TEST}
    labels = {f"labelsTr/{c}.nii.gz" for c in TRAIN[:2]}
    assert files_under(raw / "Dataset508_Atrium") == images | labels | test | {"dataset.json", "splits_final.json"}


def test_nrrd_with_another_orientation_keeps_its_world_coordinates(raw, tmp_path):
    make_source("nrrd", tmp_path / "source", TRAIN + TEST)
    image, label = make_case("nrrd", 0)
    header = {"space": "right-anterior-superior", "space directions": np.diag(SPACING), "space origin": ORIGIN}
    nrrd.write(str(tmp_path / "source" / "C1" / "lgemri.nrrd"), image, header)
    nrrd.write(str(tmp_path / "source" / "C1" / "laendo.nrrd"), label * np.uint8(255), header)
    la.convert(tmp_path / "source", 508, "1")
    array, written = read_nifti(raw / "Dataset508_LA/imagesTr/C1_0000.nii.gz")
    np.testing.assert_array_equal(array, image)
    # RAS to LPS: x and y change sign
    corner = np.array(ORIGIN) + np.array([6, 4, 2]) * SPACING
    np.testing.assert_allclose(written.TransformIndexToPhysicalPoint((6, 4, 2)), corner * [-1, -1, 1], atol=1e-5)
    assert same_geometry(written, read_nifti(raw / "Dataset508_LA/labelsTr/C1.nii.gz")[1])


def test_nnunet_understands_the_dataset(raw, source, monkeypatch):
    monkeypatch.setattr(utils, "Pool", ThreadPool)  # processes forked beside threads may hang
    la.convert(source, 508, "5")
    target = raw / "Dataset508_LA"
    content = json.loads((target / "dataset.json").read_text())
    found = get_filenames_of_train_images_and_targets(str(target), content)
    assert sorted(found) == TRAIN[:5]
    assert content["numTraining"] == 5
    assert content["labels"] == {"background": 0, "left atrium": 1}
    assert get_normalization_scheme(content["channel_names"]["0"]) is ZScoreNormalization
    image, properties = SimpleITKIO().read_images(found["C1"]["images"])
    np.testing.assert_array_equal(image[0].transpose(2, 1, 0), make_case("h5", 0)[0])
    assert properties["spacing"] == pytest.approx([0.625] * 3)


def test_dataset_json_says_how_it_was_made(raw, source):
    la.convert(source, 508, "2")
    content = json.loads((raw / "Dataset508_LA" / "dataset.json").read_text())
    made = content["conversion"]
    assert (made["source_form"], made["labelled"], made["unlabelled"], made["test"]) == ("h5", 2, 4, 2)
    assert "0.625" in made["spacing"] and "assumed" in made["spacing"]
    assert "Xiong" in content["citation"][0] and "research" in content["licence"]


@pytest.mark.parametrize("given, written", [([1.0], (1, 1, 1)), ([0.625, 0.5, 1.25], (0.625, 0.5, 1.25))])
def test_spacing_is_written_in_the_order_x_y_z(given, written, raw, source):
    summary = la.convert(source, 508, "2", spacing=given)
    assert read_nifti(raw / "Dataset508_LA/imagesUn/C3_0000.nii.gz")[1].GetSpacing() == pytest.approx(written)
    assert read_nifti(raw / "Dataset508_LA/labelsTs/T1.nii.gz")[1].GetSpacing() == pytest.approx(written)
    assert "given by the user" in summary


@pytest.mark.parametrize("number", [1, 2, 4, 5, 6])
def test_splits(number, raw, source):
    la.convert(source, 508, str(number))
    folds = json.loads((raw / "Dataset508_LA" / "splits_final.json").read_text())
    labelled = TRAIN[:number]
    if number == 1:
        assert folds == [{"train": labelled, "val": labelled}]
    elif number < 5:
        assert sorted(fold["val"] for fold in folds) == [[case] for case in labelled]
        assert all(sorted(fold["train"] + fold["val"]) == labelled for fold in folds)
    else:
        assert folds == generate_crossval_split(labelled, seed=12345, n_splits=5)


def test_all_labelled_leaves_no_unlabelled(raw, source):
    la.convert(source, 508, "6")
    assert list((raw / "Dataset508_LA" / "imagesUn").iterdir()) == []
    assert len(list((raw / "Dataset508_LA" / "imagesTr").iterdir())) == 6


def test_labelled_cases_from_a_list_file(raw, source, tmp_path):
    (tmp_path / "mine.txt").write_bytes(b"# my choice\r\nC5\r\n\r\nC2\r\n")
    la.convert(source, 508, str(tmp_path / "mine.txt"))
    assert sorted(path.name for path in (raw / "Dataset508_LA/labelsTr").iterdir()) == ["C2.nii.gz", "C5.nii.gz"]
    assert len(list((raw / "Dataset508_LA/imagesUn").iterdir())) == 4


def test_missing_test_cases_can_be_allowed(raw, source):
    (source / "T1" / "mri_norm2.h5").unlink()
    summary = la.convert(source, 508, "2", allow_missing_test=True)
    assert re.search(r"test +1 in imagesTs; 1 missing: T1", summary)
    assert files_under(raw / "Dataset508_LA" / "labelsTs") == {"T2.nii.gz"}
    assert json.loads((raw / "Dataset508_LA" / "dataset.json").read_text())["conversion"]["missing_test"] == ["T1"]


def test_summary(raw, source):
    summary = la.convert(source, 508, "2")
    assert str(raw / "Dataset508_LA") in summary
    for row in ("cases +8", "labelled +2 ", "unlabelled +4 ", "test +2 ", r"shape +7-9 x 5 x 3 voxels"):
        assert re.search(row, summary), row
    assert "0.625 x 0.625 x 0.625 mm (x, y, z), assumed" in summary


# --- no label of an unlabelled case ---------------------------------------------------------------------------------


def test_h5_labels_of_unlabelled_cases_are_never_opened(raw, source, monkeypatch):
    image = make_case("h5", 2)[0]
    write_h5(source / "C3" / "mri_norm2.h5", image=image)
    write_h5(source / "C4" / "mri_norm2.h5", image=image, label=np.full((2, 2), 9.5))
    write_h5(source / "C5" / "mri_norm2.h5", image=image, label="poison")
    opened = []
    get = h5py.Group.__getitem__

    def recorded(group, name):
        opened.append((group.file.filename, name))
        return get(group, name)

    monkeypatch.setattr(h5py.Group, "__getitem__", recorded)
    la.convert(source, 508, "2")
    with_label = {Path(name).parent.name for name, dataset in opened if dataset == "label"}
    assert with_label == {*TRAIN[:2], *TEST}


def test_nrrd_labels_of_unlabelled_cases_are_never_opened(raw, tmp_path):
    source = tmp_path / "source"
    make_source("nrrd", source, TRAIN + TEST)
    (source / "C3" / "laendo.nrrd").unlink()
    (source / "C4" / "laendo.nrrd").write_bytes(b"poison")
    la.convert(source, 508, "2")
    assert files_under(raw / "Dataset508_LA" / "labelsTr") == {"C1.nii.gz", "C2.nii.gz"}


# --- checked before anything is written -----------------------------------------------------------------------------


def test_source_must_be_right(raw, source, tmp_path):
    refuse(raw, "is no folder", tmp_path / "absent", 508, "2")
    (tmp_path / "empty").mkdir()
    refuse(
        raw,
        "neither <ID>/mri_norm2.h5 nor <ID>/lgemri.nrrd; give the folder of the case folders$",
        tmp_path / "empty",
        508,
        "2",
    )
    (tmp_path / "outer").mkdir()
    source.rename(tmp_path / "outer" / "source")
    refuse(raw, "did you mean .*outer/source", tmp_path / "outer", 508, "2")
    write_nrrd(tmp_path / "outer" / "source" / "C1" / "lgemri.nrrd", make_case("nrrd", 0)[0])
    refuse(raw, "has both", tmp_path / "outer" / "source", 508, "2")


def test_missing_training_cases_are_all_named(raw, source):
    (source / "C1" / "mri_norm2.h5").unlink()
    (source / "C5" / "mri_norm2.h5").rename(source / "C5" / "other.h5")
    refuse(raw, rf"{source}: 2 of 6 training cases .* C1, C5;", source, 508, "2", allow_missing_test=True)


def test_missing_label_file_of_a_labelled_case(raw, tmp_path):
    make_source("nrrd", tmp_path / "source", TRAIN + TEST)
    (tmp_path / "source" / "C2" / "laendo.nrrd").unlink()
    refuse(raw, "lgemri.nrrd/laendo.nrrd: C2;", tmp_path / "source", 508, "2")


def test_missing_test_cases_are_all_named(raw, source):
    for case in TEST:
        (source / case / "mri_norm2.h5").unlink()
    refuse(raw, "2 of 2 test cases .* T1, T2; .*--allow_missing_test", source, 508, "2")


@pytest.mark.parametrize("choice", ["0", "7", "-1"])
def test_number_of_labelled_cases_is_checked(choice, raw, source):
    refuse(raw, f"--labeled {choice}: .* must be 1 to 6", source, 508, choice)


@pytest.mark.parametrize(
    "text, match",
    [
        ("C1\nC9\nT1\n", "not in the list of training cases: C9, T1"),
        ("C1\nC2\nC1\n", "more than once: C1"),
        ("# nothing\n\n", "at least 1"),
        (None, "cannot be read"),
    ],
)
def test_list_file_is_checked(text, match, raw, source, tmp_path):
    if text is not None:
        (tmp_path / "mine.txt").write_text(text)
    refuse(raw, match, source, 508, str(tmp_path / "mine.txt"))


def test_raw_folder_is_checked(raw, source, monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "absent"))
    refuse(raw, "absent, which is not a folder", source, 508, "2")
    monkeypatch.delenv("nnUNet_raw")
    refuse(raw, "nnUNet_raw is not set", source, 508, "2")


@pytest.mark.parametrize("number", [0, -3, 1000])
def test_dataset_id_is_checked(number, raw, source):
    refuse(raw, "must be 1 to 999", source, number, "2")


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a b"])
def test_name_is_checked(name, raw, source):
    refuse(raw, "--name", source, 508, "2", name=name)


@pytest.mark.parametrize("place", ["nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"])
@pytest.mark.parametrize("name", ["Dataset508_LA", "Dataset508_Other"])
def test_an_id_in_use_is_refused(place, name, raw, source, tmp_path):
    (tmp_path / place / name).mkdir()
    (tmp_path / place / "Dataset050_Other").mkdir()
    (tmp_path / place / name / "file").write_text("precious")
    refuse(raw, f"508 is taken: .*{place}/{name};", source, 508, "2")
    assert (tmp_path / place / name / "file").read_text() == "precious"


@pytest.mark.parametrize("values", [[0.0], [-1.0], [1.0, 1.0], [1.0, 1.0, float("nan")], [1.0] * 4])
def test_spacing_is_checked(values, raw, source):
    refuse(raw, "--spacing .* one number or three", source, 508, "2", spacing=values)


def test_spacing_is_refused_where_headers_have_it(raw, tmp_path):
    make_source("nrrd", tmp_path / "source", TRAIN + TEST)
    refuse(raw, "h5 form only", tmp_path / "source", 508, "2", spacing=[1.0])


def test_number_of_processes_is_checked(raw, source):
    refuse(raw, "-np 0", source, 508, "2", options=common.Options(processes=0))


# --- damaged files --------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_h5(folder: Path, kind: str) -> None:
    image, label = make_case("h5", 1)
    path = folder / "mri_norm2.h5"
    arrays = {"image": image, "label": label}
    if kind == "truncated":
        truncate(path)
        return
    if kind == "no hdf5":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
        return
    if kind.startswith("no "):
        del arrays[kind.removeprefix("no ")]
    elif kind == "label 2":
        label[1, 1, 1] = 2
    elif kind == "label NaN":
        arrays["label"] = np.where(label, np.nan, 0)
    elif kind == "empty label":
        label[:] = 0
    elif kind == "label shape":
        arrays["label"] = label.transpose(2, 1, 0)
    elif kind in ("nan", "inf"):
        image[2, 1, 0] = float(kind)
    elif kind == "rank":
        arrays["image"] = image[..., 0]
    elif kind == "text":
        arrays["image"] = np.full(image.shape, b"x")
    write_h5(path, **arrays)


@pytest.mark.parametrize(
    "kind, match",
    [
        ("truncated", "damaged or incomplete"),
        ("no hdf5", "damaged or incomplete"),
        ("no image", "no dataset 'image'"),
        ("no label", "no dataset 'label'"),
        ("label 2", "unexpected label value 2; only 0, 1"),
        ("label NaN", "unexpected label value nan"),
        ("empty label", "label is empty"),
        ("label shape", r"label has shape \(3, 5, 8\), the image \(8, 5, 3\)"),
        ("nan", "not finite"),
        ("inf", "not finite"),
        ("rank", r"shape \(8, 5\), expected 3 axes"),
        ("text", "expected real numbers"),
    ],
)
@pytest.mark.parametrize("case", ["C2", "T1"])
def test_damaged_h5(kind, match, case, raw, source):
    damage_h5(source / case, kind)
    refuse(raw, rf"{case}/mri_norm2.h5: .*{match}", source, 508, "2")


@pytest.mark.parametrize("kind", ["truncated", "no image", "nan", "rank"])
def test_damaged_unlabelled_h5(kind, raw, source):
    damage_h5(source / "C4", kind)
    refuse(raw, "C4/mri_norm2.h5: ", source, 508, "2")


def damage_nrrd(folder: Path, kind: str) -> None:
    image, label = make_case("nrrd", 1)
    label *= 255
    match kind:
        case "truncated image":
            truncate(folder / "lgemri.nrrd")
        case "truncated label":
            truncate(folder / "laendo.nrrd")
        case "label 1":
            write_nrrd(folder / "laendo.nrrd", label // 255)
        case "label shape":
            write_nrrd(folder / "laendo.nrrd", label[:, :, :-1])
        case "spacing":
            write_nrrd(folder / "laendo.nrrd", label, spacing=(0.5, 0.75, 1.0))
        case "origin":
            write_nrrd(folder / "laendo.nrrd", label, origin=(0.0, 0.0, 0.0))
        case "direction":
            header = {"space": "LPS", "space directions": np.diag(SPACING) * [-1, 1, 1], "space origin": ORIGIN}
            nrrd.write(str(folder / "laendo.nrrd"), label, header)
        case "nan":
            write_nrrd(folder / "lgemri.nrrd", np.where(image > 128, np.nan, 1.0))
        case "rank 2":
            write_nrrd(folder / "lgemri.nrrd", image[..., 0])
        case "rank 4":
            write_nrrd(folder / "lgemri.nrrd", np.stack([image, image], axis=-1))


@pytest.mark.parametrize(
    "kind, match",
    [
        ("truncated image", "lgemri.nrrd: damaged or incomplete"),
        ("truncated label", "laendo.nrrd: damaged or incomplete"),
        ("label 1", "laendo.nrrd: unexpected label value 1; only 0, 255"),
        ("label shape", "laendo.nrrd: the label has shape"),
        ("spacing", "laendo.nrrd: its header differs"),
        ("origin", "laendo.nrrd: its header differs .*; is it the label of another case.*correct the header"),
        ("direction", "laendo.nrrd: its header differs"),
        ("nan", "lgemri.nrrd: .* not finite"),
        ("rank 2", "lgemri.nrrd: .* expected 3 axes"),
        ("rank 4", "lgemri.nrrd: .* expected 3 axes"),
    ],
)
def test_damaged_nrrd(kind, match, raw, tmp_path):
    make_source("nrrd", tmp_path / "source", TRAIN + TEST)
    damage_nrrd(tmp_path / "source" / "C2", kind)
    refuse(raw, f"C2/{match}", tmp_path / "source", 508, "2")


def test_target_that_appears_meanwhile_is_left_alone(raw, source, monkeypatch):
    write = common.write_splits
    monkeypatch.setattr(common, "write_splits", lambda *a: ((raw / "Dataset508_LA").mkdir(), write(*a)))
    with pytest.raises(InputError, match="has appeared"):
        la.convert(source, 508, "2")
    assert [path.name for path in raw.glob("[!.]*")] == ["Dataset508_LA"]
    assert list((raw / "Dataset508_LA").iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_noticed(tmp_path):
    (tmp_path / "image.nii.gz").symlink_to("/dev/full")
    with pytest.raises(InputError, match="is the disk full"):
        common.write_image(la.array_to_image(make_case("h5", 0)[0], (1, 1, 1)), tmp_path / "image.nii.gz")


# --- command line ---------------------------------------------------------------------------------------------------


def test_main_succeeds(raw, source, capsys):
    arguments = ["--source", str(source), "-d", "508", "--labeled", "2", "--spacing", "1", "1", "2", "-np", "1"]
    assert la.main(arguments) == 0
    assert "1 x 1 x 2 mm" in capsys.readouterr().out


def test_main_reports_wrong_input_in_one_line(raw, source, capsys):
    assert la.main(["--source", str(source), "-d", "0", "--labeled", "2"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: -d 0: ") and captured.err.count("\n") == 1


def test_an_interrupted_run_goes_on(raw, source, capsys, monkeypatch):
    read, calls = la.read_h5_case, []

    def interrupted(folder, *arguments):
        calls.append(folder.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(folder, *arguments)

    monkeypatch.setattr(la, "read_h5_case", interrupted)
    arguments = ["--source", str(source), "-d", "508", "--labeled", "2", "-np", "1"]
    assert la.main(arguments) == 130
    assert "2 cases are finished and kept" in capsys.readouterr().err
    assert list(find_candidate_datasets(508)) == [], "nnU-Net does not see the unfinished folder"
    assert la.main(arguments) == 0
    assert len(calls) == len(TRAIN + TEST) + 1 and set(calls) == set(TRAIN + TEST), "two cases were not read again"
    assert [path.name for path in raw.iterdir()] == list(find_candidate_datasets(508)) == ["Dataset508_LA"]


def run_script(raw: Path, source: Path, cwd: Path) -> subprocess.CompletedProcess:
    """Run the converter as a file, from another folder, with the published lists and two processes."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "dataset_conversion" / "la.py"), "--source", str(source)]
    command += ["-d", "508", "--labeled", "8", "-np", "2"]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_script_with_several_processes_and_the_published_lists(raw, tmp_path):
    splits = ROOT / "dataset_conversion" / "splits"
    train, test = lists.read_list(splits / "la_train.txt"), lists.read_list(splits / "la_test.txt")
    source = tmp_path / "source"
    content = make_source("h5", source, train + test)
    intact = (source / train[-1] / "mri_norm2.h5").read_bytes()
    truncate(source / train[-1] / "mri_norm2.h5")
    failed = run_script(raw, source, tmp_path)
    assert failed.returncode == 2
    assert re.fullmatch(rf"error: .*{train[-1]}.*damaged.*", failed.stderr.splitlines()[-1])
    assert list(raw.glob("Dataset*")) == []

    (source / train[-1] / "mri_norm2.h5").write_bytes(intact)
    done = run_script(raw, source, tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(raw / "Dataset508_LA") in done.stdout
    target = raw / "Dataset508_LA"
    assert files_under(target / "labelsTr") == {f"{case}.nii.gz" for case in train[:8]}
    assert files_under(target / "imagesUn") == {f"{case}_0000.nii.gz" for case in train[8:]}
    assert files_under(target / "labelsTs") == {f"{case}.nii.gz" for case in test}
    np.testing.assert_array_equal(read_nifti(target / f"imagesUn/{train[-1]}_0000.nii.gz")[0], content[train[-1]][0])


# --- properties -----------------------------------------------------------------------------------------------------

QUICK = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
SHAPES = st.tuples(*[st.integers(1, 6)] * 3)


@QUICK
@given(
    array=hnp.arrays(np.float32, SHAPES, elements=st.floats(-1e6, 1e6, width=32)),
    spacing=st.tuples(*[st.floats(0.1, 9)] * 3),
)
def test_axes_and_spacing_survive_the_file(array, spacing, tmp_path):
    common.write_image(la.array_to_image(array, spacing), tmp_path / "image.nii.gz")
    written, image = read_nifti(tmp_path / "image.nii.gz")
    np.testing.assert_array_equal(written, array)
    assert image.GetSpacing() == pytest.approx(spacing, rel=1e-5)


@QUICK
@given(
    array=hnp.arrays(np.uint8, SHAPES, elements=st.sampled_from([0, 1, 2, 255])), form=st.sampled_from(["h5", "nrrd"])
)
def test_binary_label_accepts_exactly_its_values(array, form):
    foreground = {"h5": 1, "nrrd": 255}[form]
    valid = set(array.ravel().tolist()) <= {0, foreground} and foreground in array
    if valid:
        np.testing.assert_array_equal(la.binary_label(array, array.shape, form, Path("x")) * foreground, array)
    else:
        with pytest.raises(InputError):
            la.binary_label(array, array.shape, form, Path("x"))


@FORMS
@QUICK
@given(share=st.floats(0, 0.9999))
def test_a_file_cut_anywhere_is_never_read_wrongly(form, share, tmp_path):
    image, label = make_case(form, 0)
    write_case(form, tmp_path / "C1", image, label)
    path = tmp_path / "C1" / IMAGE_NAME[form]
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    try:
        case = la.read_h5_case(path.parent, True, (1, 1, 1)) if form == "h5" else la.read_nrrd_case(path.parent, True)
    except InputError:
        return
    np.testing.assert_array_equal(sitk.GetArrayFromImage(case[0]).transpose(2, 1, 0), image)


# --- the published lists --------------------------------------------------------------------------------------------


def test_published_lists():
    splits = ROOT / "dataset_conversion" / "splits"
    train, test = lists.read_list(splits / "la_train.txt"), lists.read_list(splits / "la_test.txt")
    assert (len(train), len(test)) == (80, 20)
    assert not set(train) & set(test)
    assert (train[0], train[7], train[15]) == ("06SR5RBREL16DQ6M8LWS", "38CWS74285MFGZZXR09Z", "5BHTH9RHH3PQT913I59W")
    assert train == sorted(train)
    md5 = [hashlib.md5("".join(f"{case}\n" for case in cases).encode()).hexdigest() for cases in (train, test)]
    assert md5 == ["ded9b3bf69cd44ddeda212e30a9f5b00", "c8b450d0ab549f4c1e8bcecec45f0209"]
    assert (splits / "la_train.txt").read_text().startswith("# ")


# --- real cases -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unpack():
    """The module that writes the packages back to the published layout."""
    spec = importlib.util.spec_from_file_location("unpack_la", REAL_DATA / "unpack_la.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_real_data
def test_real_packages(raw, tmp_path, monkeypatch, unpack):
    train, test = ["06SR5RBREL16DQ6M8LWS", "0RZDK210BSMWAA6467LU"], ["UPT6DX9IQY9JAZ7HJKA7"]
    monkeypatch.setattr(la, "LISTS", write_lists(tmp_path / "real", train, test))
    content = {case: unpack.load_case(REAL_DATA / "la" / f"{case}.npz") for case in train + test}
    for case, (image, label) in content.items():
        write_h5(tmp_path / "source" / case / "mri_norm2.h5", image=image, label=label)
    la.convert(tmp_path / "source", 508, "2")
    for cases, images, labels in ((train, "imagesTr", "labelsTr"), (test, "imagesTs", "labelsTs")):
        for case in cases:
            image, _ = read_nifti(raw / "Dataset508_LA" / images / f"{case}_0000.nii.gz")
            label, _ = read_nifti(raw / "Dataset508_LA" / labels / f"{case}.nii.gz")
            np.testing.assert_array_equal(image, content[case][0])
            np.testing.assert_array_equal(label, content[case][1])


@pytest.mark.slow
@needs_real_data
def test_all_real_packages(raw, tmp_path, monkeypatch, unpack):
    splits = ROOT / "dataset_conversion" / "splits"
    monkeypatch.setattr(la, "LISTS", splits)
    for package in (REAL_DATA / "la").glob("*.npz"):
        image, label = unpack.load_case(package)
        write_h5(tmp_path / "source" / package.stem / "mri_norm2.h5", image=image, label=label)
    la.convert(tmp_path / "source", 508, "80", allow_missing_test=True)
    files = list((raw / "Dataset508_LA").glob("images*/*"))
    assert len(files) == 90
    for file in files:
        case = file.name.removesuffix("_0000.nii.gz")
        image, label = unpack.load_case(REAL_DATA / "la" / f"{case}.npz")
        np.testing.assert_array_equal(read_nifti(file)[0], image)
        label_file = file.parents[1] / file.parent.name.replace("images", "labels") / f"{case}.nii.gz"
        np.testing.assert_array_equal(read_nifti(label_file)[0], label)


@needs_real_data
def test_files_as_published(raw, tmp_path, monkeypatch):
    source = REAL_DATA / "original_samples" / "la" / "data" / "2018LA_Seg_Training Set"
    cases = sorted(path.name for path in source.iterdir())
    monkeypatch.setattr(la, "LISTS", write_lists(tmp_path / "real", cases[:2], cases[2:]))
    la.convert(source, 508, "1")
    folders = [("imagesTr", "labelsTr"), ("imagesUn", None), ("imagesTs", "labelsTs")]
    for case, (images, labels) in zip(cases, folders, strict=True):
        with h5py.File(source / case / "mri_norm2.h5") as file:
            np.testing.assert_array_equal(
                read_nifti(raw / f"Dataset508_LA/{images}/{case}_0000.nii.gz")[0], file["image"]
            )
            if labels:
                np.testing.assert_array_equal(
                    read_nifti(raw / f"Dataset508_LA/{labels}/{case}.nii.gz")[0], file["label"]
                )


@pytest.mark.robustness
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("link", "'image' is a link to another file; put the values into this one"),
        ("storage", "'image' has its values in another file"),
        ("virtual", "'image' has its values in another file"),
        ("claim", r"'image' claims 256 GiB and 0 bytes are there"),
    ],
)
def test_values_that_are_not_in_the_file(tmp_path, kind, message):
    """Input: an h5 file whose values lie in another file, or that claims 256 GB in 2 kB. Answer: one line that
    says so.
    """
    (tmp_path / "case").mkdir()
    with h5py.File(tmp_path / "secret.h5", "w") as other:
        other["image"] = np.arange(60.0).reshape(3, 4, 5)
    (tmp_path / "secret.raw").write_bytes(bytes(480))
    with h5py.File(tmp_path / "case" / "mri_norm2.h5", "w") as file:
        if kind == "link":
            file["image"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "image")
        elif kind == "storage":
            file.create_dataset("image", (3, 4, 5), "f8", external=[(str(tmp_path / "secret.raw"), 0, 480)])
        elif kind == "virtual":
            layout = h5py.VirtualLayout((3, 4, 5), "f8")
            layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "image", (3, 4, 5))
            file.create_virtual_dataset("image", layout)
        else:
            file.create_dataset("image", (4096, 4096, 4096), "f4", chunks=(64, 64, 64), compression="gzip")
    with pytest.raises(InputError, match=rf"mri_norm2.h5: {message}"):
        la.read_h5_case(tmp_path / "case", False, (1, 1, 1))
