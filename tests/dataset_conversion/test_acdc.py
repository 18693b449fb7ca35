"""The ACDC converter, on miniature inputs in both forms, and on real volumes where they are at hand."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import SimpleITK as sitk
from conversion_helpers import REAL_DATA, names, read, refuse, verify, write_list

from dataset_conversion import acdc, lists
from dataset_conversion.common import Options
from nnunetv2_semisup.datasets.images import same_geometry

TRAIN = ["patient099", "patient074", "patient050", "patient076", "patient021"]
VAL, TEST = ["patient028"], ["patient011", "patient013"]
SPACING, ORIGIN = (1.25, 1.5, 8.0), (-30.0, 12.0, 5.0)  # mm
DIRECTION = np.array([[0.8, 0.6, 0], [-0.6, 0.8, 0], [0, 0, 1.0]])
pytestmark = pytest.mark.filterwarnings("ignore:One patient only")
needs_real_data = pytest.mark.skipif(
    not (REAL_DATA / "acdc").is_dir(), reason="the packages are not beside the checkout"
)


def make_frame(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Image and label with axes (z, y, x) of different lengths."""
    generator = np.random.default_rng(number)
    label = generator.integers(0, 4, (4, 6 + number % 2, 9), dtype=np.uint8)
    return generator.integers(0, 2000, label.shape).astype(np.int16), label


def write_nifti(path: Path, array: np.ndarray, spacing=SPACING) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin(ORIGIN)
    image.SetDirection(DIRECTION.ravel())
    sitk.WriteImage(image, str(path))


def write_h5(path: Path, **arrays) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array)


def make_source(form: str, source: Path) -> Path:
    for index, patient in enumerate(TRAIN + VAL + TEST):
        for number, (first, later) in enumerate((("01", "01"), ("02", "12"))):
            image, label = make_frame(2 * index + number)
            if form == "h5":
                write_h5(source / "data" / f"{patient}_frame{first}.h5", image=image / 2000, label=label)
                continue
            folder = source / ("testing" if patient in TEST else "training") / patient
            folder.mkdir(parents=True, exist_ok=True)
            write_nifti(folder / f"{patient}_frame{later}.nii.gz", image)
            write_nifti(folder / f"{patient}_frame{later}_gt.nii.gz", label)
            (folder / "Info.cfg").write_text("ED: 1\nES: 12\nGroup: DCM\nHeight: 184.0\nNbFrame: 30\nWeight: 95.0\n")
    return source


@pytest.fixture
def raw(nnunet_raw, tmp_path, monkeypatch) -> Path:
    for name, patients in (("train", TRAIN), ("val", VAL), ("test", TEST)):
        write_list(tmp_path / "lists" / f"acdc_{name}.txt", patients)
    monkeypatch.setattr(acdc, "LISTS", tmp_path / "lists")
    return nnunet_raw


def test_subsets_are_of_patients(raw, tmp_path):
    acdc.convert(make_source("nifti", tmp_path / "source"), 27, "2", options=Options(subset=1))
    cases = names(raw / "Dataset027_ACDC" / "imagesTr")
    assert cases == {f"{patient}_{frame}" for patient in TRAIN[2:4] for frame in ("ED", "ES")}


@pytest.mark.parametrize("form", ["nifti", "h5"])
def test_every_voxel_arrives_where_it_was(form, raw, tmp_path):
    report = acdc.convert(make_source(form, tmp_path / "source"), 27, "1")
    target = raw / "Dataset027_ACDC"
    dataset_json = verify(target)
    assert dataset_json["numTraining"] == 2 and dataset_json["conversion"]["source_form"] == form
    roles = {"Tr": TRAIN[:1], "Un": TRAIN[1:], "Val": VAL, "Ts": TEST}
    for suffix, patients in roles.items():
        assert names(target / f"images{suffix}") == {f"{p}_{frame}" for p in patients for frame in ("ED", "ES")}
        for patient in patients:
            for number, frame in enumerate(("ED", "ES")):
                expected, expected_label = make_frame(2 * (TRAIN + VAL + TEST).index(patient) + number)
                array, image = read(target / f"images{suffix}" / f"{patient}_{frame}_0000.nii.gz")
                np.testing.assert_array_equal(array.T, expected if form == "nifti" else (expected / 2000).astype("f4"))
                if form == "nifti":
                    np.testing.assert_allclose(image.GetSpacing(), SPACING)
                    np.testing.assert_allclose(image.GetDirection(), DIRECTION.ravel(), atol=1e-6)
                    np.testing.assert_allclose(image.GetOrigin(), ORIGIN)
                else:
                    assert image.GetSpacing() == pytest.approx(acdc.ASSUMED_SPACING)
                if suffix != "Un":
                    array, label = read(target / f"labels{suffix}" / f"{patient}_{frame}.nii.gz")
                    np.testing.assert_array_equal(array.T, expected_label)
                    assert array.dtype == np.uint8 and same_geometry(image, label)
    assert names(target / "labelsTr") == {"patient099_ED", "patient099_ES"}
    assert "2 in imagesTr, 1 patients" in report and "patient074 and patient076 have the same images" in report


@pytest.mark.parametrize("form", ["nifti", "h5"])
def test_patients_of_no_list_are_told(form, raw, tmp_path):
    source = make_source(form, tmp_path / "source")
    for file in [*source.rglob("patient011*"), *source.rglob("patient011*/*")]:
        if file.is_file():
            other = Path(str(file).replace("patient011", "patient101"))
            other.parent.mkdir(exist_ok=True)
            other.write_bytes(file.read_bytes())
    if form == "nifti":
        (source / "testing/patient101/Info.cfg").write_bytes((source / "testing/patient011/Info.cfg").read_bytes())
    assert "1 more patients are there (patient101); they are in no published list" in acdc.convert(source, 27, "1")
    assert not list((raw / "Dataset027_ACDC").rglob("patient101*"))


def test_info_goes_to_a_table(raw, tmp_path):
    acdc.convert(make_source("nifti", tmp_path / "source"), 27, "1")
    rows = list(csv.DictReader((raw / "Dataset027_ACDC" / "patients.csv").open()))
    assert {row["patient"]: row["role"] for row in rows}["patient011"] == "test" and len(rows) == 8
    assert {key: rows[0][key] for key in ("ED", "ES", "Group", "Height", "Weight", "NbFrame")} == {
        "ED": "1", "ES": "12", "Group": "DCM", "Height": "184.0", "Weight": "95.0", "NbFrame": "30"
    }  # fmt: skip


def test_folds_keep_patients_and_the_doubled_scan_together(raw, tmp_path):
    acdc.convert(make_source("h5", tmp_path / "source"), 27, "all")
    folds = json.loads((raw / "Dataset027_ACDC" / "splits_final.json").read_text())
    patients = json.loads((raw / "Dataset027_ACDC" / "dataset.json").read_text())["patients"]
    assert len(patients) == 10 and patients["patient074_ED"] == patients["patient076_ES"] != patients["patient099_ED"]
    assert len(folds) == 4  # five patients, two of them one scan
    for fold in folds:
        sides = [{case.split("_")[0].replace("076", "074") for case in fold[side]} for side in ("train", "val")]
        assert not sides[0] & sides[1]
        assert len(fold["train"]) + len(fold["val"]) == 10


def test_twin_of_a_labelled_patient_is_not_unlabelled(raw, tmp_path):
    report = acdc.convert(make_source("h5", tmp_path / "source"), 27, "2")
    assert names(raw / "Dataset027_ACDC" / "imagesUn") == {
        f"{p}_{f}" for p in TRAIN[2:] if "076" not in p for f in ("ED", "ES")
    }
    assert "patient076 is left out" in report


def test_labels_of_unlabelled_patients_are_not_read(raw, tmp_path):
    source = make_source("nifti", tmp_path / "source")
    for label in (source / "training" / "patient050").glob("*_gt*"):
        label.write_bytes(b"poison")
    (source / "training" / "patient021" / "patient021_frame01_gt.nii.gz").unlink()
    acdc.convert(source, 27, "1")
    h5 = make_source("h5", tmp_path / "h5")
    write_h5(h5 / "data" / "patient050_frame01.h5", image=np.arange(60.0).reshape(3, 4, 5), label="poison")
    acdc.convert(h5, 28, "1")


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        ("label 4", "frame12_gt.nii.gz: unexpected label value 4"),
        (
            "label spacing",
            "frame12_gt.nii.gz: its header differs from patient099_frame12.*; is it the .*correct the header",
        ),
        ("label shape", "frame12_gt.nii.gz: the label has shape"),
        ("image twice", "patient099_frame12.nii: there is also .*patient099_frame12.nii.gz"),
        ("cut image", "patient099_frame12.nii.gz: damaged or incomplete"),
        ("no ES", "Info.cfg does not give the frames ED and ES"),
        ("no frame", r"1 of 8 patients .* in training: patient099; complete"),
        ("archive", "source.zip is an archive: unpack it"),
        ("link", "is a link that leaves the source folder"),
    ],
)
def test_damaged_nifti(damage, match, raw, tmp_path):
    source = make_source("nifti", tmp_path / "source")
    folder = source / "training" / "patient099"
    image, label = folder / "patient099_frame12.nii.gz", folder / "patient099_frame12_gt.nii.gz"
    match damage:
        case "label 4":
            write_nifti(label, make_frame(1)[1] + np.uint8(1))
        case "label spacing":
            write_nifti(label, make_frame(1)[1], spacing=(1.5, 1.25, 8.0))
        case "label shape":
            write_nifti(label, make_frame(1)[1][:-1])
        case "image twice":
            write_nifti(folder / "patient099_frame12.nii", make_frame(5)[0])
        case "cut image":
            image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
        case "no ES":
            (folder / "Info.cfg").write_text("ED: 1\n")
        case "no frame":
            image.unlink()
        case "archive":
            source = tmp_path / "source.zip"
            source.write_bytes(b"PK")
        case "link":
            image.rename(tmp_path / "elsewhere.nii.gz")
            image.symlink_to(tmp_path / "elsewhere.nii.gz")
    refuse(raw, match, acdc.convert, source, 27, "1")


def test_missing_test_patients(raw, tmp_path):
    source = make_source("h5", tmp_path / "source")
    (source / "data" / "patient013_frame02.h5").unlink()
    refuse(raw, "for validation or testing, .*: patient013; .*--allow_missing_test", acdc.convert, source, 27, "1")
    report = acdc.convert(source, 27, "1", allow_missing_test=True)
    assert "2 in imagesTs, 1 patients; 1 patients missing: patient013" in report


def test_without_test_patients_the_report_says_where_to_evaluate(raw, tmp_path):
    source = make_source("h5", tmp_path / "source")
    for file in (source / "data").glob("patient01*"):
        file.unlink()
    report = acdc.convert(source, 27, "1", allow_missing_test=True)
    assert "no test patients are at hand: evaluate on imagesVal and labelsVal" in report.splitlines()[-2]
    for file in (source / "data").glob("patient028*"):
        file.unlink()
    assert "evaluate on labelled cases that you keep" in acdc.convert(source, 28, "1", allow_missing_test=True)


def test_lists_of_frames_are_lists_of_patients(raw, tmp_path):
    frames = [f"{patient}_frame{number}" for patient in (TRAIN[0], TRAIN[4]) for number in ("01", "02")]
    list_file = write_list(tmp_path / "train_2_label.list", frames)
    acdc.convert(make_source("nifti", tmp_path / "source"), 27, str(list_file))
    labelled = {f"{patient}_{frame}" for patient in (TRAIN[0], TRAIN[4]) for frame in ("ED", "ES")}
    assert names(raw / "Dataset027_ACDC" / "imagesTr") == labelled


@pytest.mark.robustness
@pytest.mark.parametrize(
    ("lines", "match"),
    [
        (["patient099_frame01"], "x.list: one frame only of patient099, .*: write patient099, or list the other"),
        (
            ["patient099_frame01_slice_3"],
            r"x.list: it lists slices \(patient099_frame01_slice_3\), .* write patient099",
        ),
        (["patient011_frame01", "patient011_frame02"], "not in the list of training cases: patient011; correct"),
        (["patient99"], "not in the list of training cases: patient99; correct"),
    ],
)
def test_lists_that_are_not_of_patients(lines, match, raw, tmp_path):
    """Input: a list of ACDC with one frame of a patient, with slices, or with a patient of another part. Answer: an
    error that names them and says what to write or correct.
    """
    list_file = write_list(tmp_path / "x.list", lines)
    refuse(raw, match, acdc.convert, make_source("h5", tmp_path / "source"), 27, str(list_file))


def test_the_folder_of_slices_is_not_the_source(raw, tmp_path):
    source = make_source("h5", tmp_path / "source") / "data"
    write_h5(source / "slices" / "patient099_frame01_slice_1.h5", image=np.ones((2, 3)))
    refuse(raw, f"has slices, .*: give the folder above, {source}$", acdc.convert, source / "slices", 27, "1")
    acdc.convert(source, 27, "1")


def test_unknown_layout(raw, tmp_path):
    (tmp_path / "training.zip").write_bytes(b"")
    refuse(raw, "neither patientXXX/Info.cfg nor .*training.zip is there: unpack", acdc.convert, tmp_path, 27, "1")


def test_an_interrupted_run_goes_on(raw, tmp_path, monkeypatch, capsys):
    source = make_source("h5", tmp_path / "source")
    read_case, calls = acdc.read_h5_arrays, []

    def counted(path, *arguments):
        calls.append(path.name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return read_case(path, *arguments)

    monkeypatch.setattr(acdc, "read_h5_arrays", counted)
    arguments = ["--source", str(source), "-d", "27", "--labeled", "1", "-np", "1", "--previews", "1"]
    assert acdc.main(arguments) == 130
    assert [p.name for p in raw.iterdir()] == [".unfinished_Dataset027_ACDC"]
    assert "3 cases are finished and kept" in capsys.readouterr().err
    assert acdc.main(arguments) == 0
    assert len(calls) == 4 + 13 and len(set(calls)) == 16  # three cases were not read again
    assert [p.name for p in raw.iterdir()] == ["Dataset027_ACDC"]
    visible = {"imagesTr", "labelsTr", "imagesUn", "imagesVal", "labelsVal", "imagesTs", "labelsTs", "previews"}
    files = {"dataset.json", "splits_final.json", "patients.csv"}
    assert {p.name for p in (raw / "Dataset027_ACDC").iterdir()} == visible | files
    assert "16" in capsys.readouterr().out


def test_finished_cases_of_another_call_are_not_used(raw, tmp_path):
    source = make_source("h5", tmp_path / "source")
    broken = source / "data" / "patient013_frame02.h5"
    intact = broken.read_bytes()
    broken.write_bytes(b"")
    refuse(raw, r"damaged.* \(15 cases are finished and kept", acdc.convert, source, 27, "1")
    broken.write_bytes(intact)
    acdc.convert(source, 27, "1", spacing=[2.0])
    _, image = read(raw / "Dataset027_ACDC" / "imagesTr" / "patient099_ED_0000.nii.gz")
    assert image.GetSpacing() == (2, 2, 2)


def test_dry_run_writes_nothing_but_finds_faults(raw, tmp_path):
    source = make_source("nifti", tmp_path / "source")
    report = acdc.convert(source, 27, "1", options=Options(dry_run=True))
    assert "nothing was written" in report and "left ventricle" in report and not list(raw.iterdir())
    write_nifti(source / "testing" / "patient013" / "patient013_frame12_gt.nii.gz", make_frame(1)[1] * np.uint8(2))
    refuse(raw, "unexpected label value", acdc.convert, source, 27, "1", options=Options(dry_run=True))


def test_published_lists():
    published = {name: lists.read_list(lists.LISTS / f"acdc_{name}.txt") for name in ("train", "val", "test")}
    assert [len(patients) for patients in published.values()] == [70, 10, 20]
    assert set().union(*published.values()) == {f"patient{number:03d}" for number in range(1, 101)}
    first = [patient[-3:] for patient in published["train"][:14]]
    assert " ".join(first) == "099 038 050 100 058 021 049 020 072 040 060 089 004 056"


# --- real volumes ---------------------------------------------------------------------------------------------------


def convert_real(raw: Path, tmp_path: Path, monkeypatch, roles: dict[str, list[str]], labelled: str) -> None:
    """Convert real volumes and compare every value with the package."""
    spec = importlib.util.spec_from_file_location("unpack_acdc", REAL_DATA / "unpack_acdc.py")
    unpack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unpack)
    content = {}
    for role, patients in roles.items():
        write_list(tmp_path / "real" / f"acdc_{role}.txt", patients)
        for patient in patients:
            for frame, number in (("ED", "01"), ("ES", "02")):
                case = unpack.load_case(REAL_DATA / "acdc" / f"{patient}_frame{number}.npz")
                content[f"{patient}_{frame}"] = case
                write_h5(tmp_path / "source" / f"{patient}_frame{number}.h5", image=case[0], label=case[1])
    monkeypatch.setattr(acdc, "LISTS", tmp_path / "real")
    acdc.convert(tmp_path / "source", 27, labelled)
    target = raw / "Dataset027_ACDC"
    seen = set()
    for file in target.glob("images*/*"):
        case = file.name.removesuffix("_0000.nii.gz")
        seen.add(case)
        array, _ = read(file)
        np.testing.assert_array_equal(array.T, content[case][0].astype(np.float32))
        label = target / file.parent.name.replace("images", "labels") / f"{case}.nii.gz"
        assert label.exists() == (file.parent.name != "imagesUn")
        if label.exists():
            np.testing.assert_array_equal(read(label)[0].T, content[case][1])
    assert seen == set(content)


@needs_real_data
def test_real_packages(nnunet_raw, tmp_path, monkeypatch):
    roles = {"train": ["patient099", "patient038"], "val": ["patient028"], "test": []}
    convert_real(nnunet_raw, tmp_path, monkeypatch, roles, "1")


@pytest.mark.slow
@needs_real_data
def test_all_real_packages(nnunet_raw, tmp_path, monkeypatch):
    roles = {name: lists.read_list(lists.LISTS / f"acdc_{name}.txt") for name in ("train", "val")}
    convert_real(nnunet_raw, tmp_path, monkeypatch, {**roles, "test": []}, "all")


@pytest.mark.robustness
@pytest.mark.parametrize("start", [b"\xef\xbb\xbf", b""])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_info_written_by_an_editor_of_windows(tmp_path, start, end):
    """Input: Info.cfg with a byte-order mark or Windows' line ends. Answer: it is read."""
    (tmp_path / "Info.cfg").write_bytes(start + end.join([b"ED: 1", b"ES: 12", b"Group: DCM"]))
    assert acdc.read_info(tmp_path / "Info.cfg") == {"ED": "1", "ES": "12", "Group": "DCM"}
