"""A semi-supervised dataset out of a labelled one: what stays, what is hidden, and how it was chosen."""

import gzip
import itertools
import json
import os
import random
import shutil

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_semisup import cli
from nnunetv2_semisup.data.folders import find_unlabeled_cases
from nnunetv2_semisup.data.splits import make_splits
from nnunetv2_semisup.datasets import hide_labels as module
from nnunetv2_semisup.datasets.hide_labels import choose_stratified, hide_labels
from nnunetv2_semisup.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:One patient only")
CASES = [f"p{patient}_{visit}" for patient in range(6) for visit in "ab"]


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path))


@pytest.fixture
def source(nnunet_raw):
    """Six patients with two cases of two channels each; the foreground grows with the patient's number."""
    folder = nnunet_raw / "Dataset004_Many"
    for number, case in enumerate(CASES):
        label = np.zeros((3, 4, 5), np.uint8)
        label.flat[: number // 2 + 1] = 1
        label.flat[50:] = 2  # to be ignored
        for channel in (0, 1):
            write(folder / "imagesTr" / f"{case}_{channel:04d}.nrrd", np.full((3, 4, 5), number, np.float32))
        write(folder / "labelsTr" / f"{case}.nrrd", label)
    write(folder / "imagesTs" / "t_0000.nrrd", np.zeros((3, 4, 5), np.float32))
    write(folder / "imagesTs" / "t_0001.nrrd", np.zeros((3, 4, 5), np.float32))
    content = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "x": 1, "ignore": 2},
        "numTraining": 12,
        "file_ending": ".nrrd",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def cases_in(folder) -> set[str]:
    return {path.name.removesuffix(".nrrd").removesuffix("_0000").removesuffix("_0001") for path in folder.iterdir()}


def test_cases_are_divided_and_linked(source):
    hide_labels("4", 504, "5", name="Few")
    target = source.with_name("Dataset504_Few")
    kept, hidden = cases_in(target / "imagesTr"), cases_in(target / "imagesUn")
    assert len(kept) == 5 and kept | hidden == set(CASES) and not kept & hidden
    assert cases_in(target / "labelsTr") == kept
    for file in target.glob("*/*.nrrd"):
        original = next(source.glob(f"*/{file.name}"))
        assert os.path.samefile(file, original)
    dataset_json = json.loads((target / "dataset.json").read_text())
    assert dataset_json["numTraining"] == 5
    assert sorted(find_unlabeled_cases(target, dataset_json)) == sorted(hidden)
    record = json.loads((target / "hidden_labels.json").read_text())
    assert (set(record["labelled"]), set(record["hidden"])) == (kept, hidden)
    assert record["source"] == "Dataset004_Many" and "seed 0" in record["choice"]
    assert (target / "imagesTs" / "t_0001.nrrd").exists()
    assert len(list(source.rglob("*.nrrd"))) == 38  # the source is as it was


def test_seed_decides(source):
    for number, seed in ((501, 1), (502, 1), (503, 2)):
        hide_labels("Dataset004_Many", number, "4", seed=seed)
    kept = [cases_in(source.with_name(f"Dataset{number}_Many") / "imagesTr") for number in (501, 502, 503)]
    assert kept[0] == kept[1] != kept[2]


def test_patients_stay_together(source):
    hide_labels("4", 504, "2", patient_pattern=r"^p(\d)")
    target = source.with_name("Dataset504_Many")
    kept = cases_in(target / "imagesTr")
    assert len(kept) == 4 and len({case[:2] for case in kept}) == 2
    folds = json.loads((target / "splits_final.json").read_text())
    assert len(folds) == 2 and all(len({case[:2] for case in fold["val"]}) == 1 for fold in folds)


def test_stratified_takes_one_of_each_size(source):
    hide_labels("4", 504, "3", patient_pattern=r"p\d", stratified=True)
    target = source.with_name("Dataset504_Many")
    kept = sorted({int(case[1]) for case in cases_in(target / "imagesTr")})
    assert [number // 2 for number in kept] == [0, 1, 2]
    sizes = json.loads((target / "hidden_labels.json").read_text())["foreground_voxels_per_case"]
    assert sizes == {f"p{number}": number + 1 for number in kept}, "nothing of the hidden labels is written"


@given(st.dictionaries(st.text("abcdef", min_size=1), st.integers(0, 9), min_size=1, max_size=30), st.data())
def test_stratified_choice(sizes, data):
    number = data.draw(st.integers(1, len(sizes)))
    chosen = choose_stratified(sizes, number, seed=data.draw(st.integers(0, 5)))
    assert len(set(chosen)) == number and set(chosen) <= set(sizes)
    rank = {name: i for i, name in enumerate(sorted(sizes, key=lambda name: (sizes[name], name)))}
    longest = -(-len(sizes) // number)
    positions = sorted(rank[name] for name in chosen)
    assert all(later - earlier < 2 * longest for earlier, later in itertools.pairwise(positions))


def test_list_of_cases_or_patients(source, tmp_path):
    (tmp_path / "list.txt").write_text("# mine\np1_a\np1_b\np4\n")
    hide_labels("4", 504, str(tmp_path / "list.txt"), patient_pattern=r"p\d")
    assert cases_in(source.with_name("Dataset504_Many") / "imagesTr") == {"p1_a", "p1_b", "p4_a", "p4_b"}


def test_files_are_copied_where_links_are_impossible(source, monkeypatch):
    def refused(*arguments, **options):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refused)
    monkeypatch.setattr("pathlib.Path.symlink_to", refused)
    hide_labels("4", 504, "1")
    image = next(source.with_name("Dataset504_Many").glob("imagesTr/*_0000.nrrd"))
    assert not image.is_symlink() and image.read_bytes() == (source / "imagesTr" / image.name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        (("5", 504, "2"), {}, "-d 5: no dataset"),
        (("4", 4, "2"), {}, "4 is taken: .*; choose another with -o"),
        (("4", 1000, "2"), {}, "-o 1000: a dataset ID must be"),
        (("4", 504, "0"), {}, "must be 1 to 12"),
        (("4", 504, "7"), {"patient_pattern": r"p\d"}, "must be 1 to 6"),
        (("4", 504, "2"), {"patient_pattern": "("}, "no regular expression"),
        (("4", 504, "2"), {"patient_pattern": "q"}, "finds no patient in p0_a"),
        (("4", 504, "2"), {"patient_pattern": "p(9)?"}, "finds no patient in p0_a"),
        (("4", 504, "absent.txt"), {}, "give the number of patients that keep their labels"),
        (("4", 504, "2"), {"name": "a/b"}, "--name"),
    ],
)
def test_wrong_input(arguments, options, match, source):
    with pytest.raises(InputError, match=match):
        hide_labels(*arguments, **options)
    assert [path.name for path in source.parent.iterdir()] == ["Dataset004_Many"]


@pytest.mark.parametrize(("text", "match"), [("p1_a\n", "p1_b must be listed too"), ("x\n", "no such"), ("", "empty")])
def test_wrong_list(text, match, source, tmp_path):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(InputError, match=match):
        hide_labels("4", 504, str(tmp_path / "list.txt"), patient_pattern=r"p\d")


def test_damaged_source(source):
    (source / "labelsTr" / "p0_a.nrrd").write_bytes(b"NRRD")
    with pytest.raises(InputError, match="p0_a.nrrd: the label cannot be read"):
        hide_labels("4", 504, "2", stratified=True)
    (source / "labelsTr" / "p0_a.nrrd").unlink()
    with pytest.raises(InputError, match="p0_a.nrrd does not exist"):
        hide_labels("4", 504, "12")
    assert [path.name for path in source.parent.iterdir()] == ["Dataset004_Many"]


def test_one_process_per_id_and_no_leftovers(source):
    (source.parent / ".tmp_Dataset504_Killed" / "imagesTr").mkdir(parents=True)
    with FileLock(str(source.parent / ".unfinished_Dataset504.lock")), pytest.raises(InputError, match="Dataset504"):
        hide_labels("4", 504, "2", name="Other")
    hide_labels("4", 504, "2")
    assert sorted(path.name for path in source.parent.iterdir()) == ["Dataset004_Many", "Dataset504_Many"]


def test_folder_that_cannot_be_written(source, monkeypatch, capsys):
    def refused(lock, timeout):
        raise PermissionError(13, "Permission denied", lock.lock_file)

    monkeypatch.setattr(FileLock, "acquire", refused)
    assert cli.hide_labels(["-d", "4", "-o", "504", "--labeled", "2"]) == 2
    expected = f"error: {source.parent} cannot be written (Permission denied); change its permissions"
    assert capsys.readouterr().err.startswith(expected)


def test_dataset_with_this_id_that_appears_meanwhile(source, monkeypatch):
    link = module.link_or_copy
    other = source.with_name("Dataset504_Other")
    monkeypatch.setattr(module, "link_or_copy", lambda *files: (other.mkdir(exist_ok=True), link(*files)))
    with pytest.raises(InputError, match="Dataset504_Other has appeared"):
        hide_labels("4", 504, "2")
    assert not source.with_name("Dataset504_Many").exists()


def change_json(source, **changes):
    content = json.loads((source / "dataset.json").read_text())
    content = {key: value for key, value in {**content, **changes}.items() if value is not None}
    (source / "dataset.json").write_text(json.dumps(content))


def test_patients_that_dataset_json_names_stay_together(source):
    change_json(source, patients={case: case[:2] for case in CASES}, conversion={"labelled": 12})
    hide_labels("4", 504, "3")
    target = source.with_name("Dataset504_Many")
    kept = cases_in(target / "imagesTr")
    assert len(kept) == 6 and len({case[:2] for case in kept}) == 3
    dataset_json = json.loads((target / "dataset.json").read_text())
    assert dataset_json["patients"] == {case: case[:2] for case in sorted(kept)} and "conversion" not in dataset_json
    hide_labels("504", 505, "1")
    assert len(cases_in(source.with_name("Dataset505_Many") / "imagesTr")) == 2


@pytest.mark.parametrize("key", ["labels", "file_ending", "channel_names"])
def test_incomplete_dataset_json(key, source):
    change_json(source, **{key: None})
    with pytest.raises(InputError, match=f"dataset.json has no {key}: add"):
        hide_labels("4", 504, "2", stratified=True)


@pytest.mark.parametrize("labels", [{"0": "background", "1": "x"}, ["background", "x"]])
def test_labels_written_otherwise(labels, source):
    change_json(source, labels=labels)
    with pytest.raises(InputError, match="dataset.json: labels must be"):
        hide_labels("4", 504, "2")


def test_dataset_json_that_is_a_list(source):
    (source / "dataset.json").write_text("[]")
    with pytest.raises(InputError, match="dataset.json is no object"):
        hide_labels("4", 504, "2")


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        ("channel", "case p0_a has 1 image files, expected 2"),
        ("label of a hidden case", "p0_a.nrrd does not exist; add it, or move the images of p0_a to imagesUn"),
        ("label without image", "p0_a.nrrd is a label without image in imagesTr; add"),
        ("hidden file", r"\._p0_a_0000.nrrd is a hidden file"),
        ("NaN in the image", "p0_a_0001.nrrd: the images cannot be read .NaN or infinite values in channel 1"),
        ("value", "p0_a.nrrd: unexpected label value 9; only 0, 1, 2 may"),
        ("shape", "p0_a.nrrd: the label has shape"),
        ("spacing", "p0_a.nrrd: its spacing differs"),
        ("image", "p0_a_0001.nrrd: the images cannot be read"),
    ],
)
def test_labelled_cases_are_checked(damage, match, source):
    label = np.ones((3, 4, 5), np.uint8)
    match damage:
        case "channel":
            (source / "imagesTr" / "p0_a_0001.nrrd").unlink()
        case "label of a hidden case":
            (source / "labelsTr" / "p0_a.nrrd").unlink()
        case "label without image":
            for channel in (0, 1):
                (source / "imagesTr" / f"p0_a_000{channel}.nrrd").unlink()
        case "hidden file":
            (source / "imagesTr" / "._p0_a_0000.nrrd").write_bytes(b"")
        case "NaN in the image":
            write(source / "imagesTr" / "p0_a_0001.nrrd", np.full((3, 4, 5), np.nan, np.float32))
        case "value":
            write(source / "labelsTr" / "p0_a.nrrd", label * 9)
        case "shape":
            write(source / "labelsTr" / "p0_a.nrrd", label[:2])
        case "spacing":
            image = sitk.GetImageFromArray(label)
            image.SetSpacing((1, 1, 2))
            sitk.WriteImage(image, str(source / "labelsTr" / "p0_a.nrrd"))
        case "image":
            (source / "imagesTr" / "p0_a_0001.nrrd").write_bytes(b"NRRD")
    with pytest.raises(InputError, match=match) as caught:
        hide_labels("4", 504, "1" if "hidden" in damage else "12", seed=1)
    assert "\n" not in str(caught.value)
    assert [path.name for path in source.parent.iterdir()] == ["Dataset004_Many"]


@pytest.fixture
def nifti_source(nnunet_raw):
    """Two cases, of which p1 keeps its label with seed 0 and p0 with seed 1."""
    folder = nnunet_raw / "Dataset006_Ni"
    label = sitk.GetImageFromArray(np.random.default_rng(0).integers(0, 2, (4, 5, 6)).astype(np.uint8))
    label.SetSpacing((1, 1, 2))
    label.SetOrigin((10, 20, 30))
    for part in ("imagesTr", "labelsTr", "imagesVal", "labelsVal"):
        (folder / part).mkdir(parents=True)
    for case in ("p0", "p1"):
        sitk.WriteImage(sitk.Cast(label, sitk.sitkFloat32), str(folder / "imagesTr" / f"{case}_0000.nii.gz"))
        sitk.WriteImage(label, str(folder / "labelsTr" / f"{case}.nii.gz"))
    content = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "x": 1}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps({**content, "numTraining": 2}))
    return folder


@pytest.mark.parametrize("reader", [None, "NibabelIO", "NibabelIOWithReorient", "SimpleITKIOWithReorient"])
@pytest.mark.parametrize(
    ("damage", "match"),
    [
        ("origin", "p0.nii.gz: by the headers it lies 1.5 mm away from .*p0_0000.nii.gz; is it"),
        ("direction", "p0.nii.gz: by the headers it lies .* mm away from"),
    ],
)
def test_labels_that_lie_elsewhere(damage, match, reader, nifti_source):
    change_json(nifti_source, overwrite_image_reader_writer=reader)
    file = nifti_source / "labelsTr" / "p0.nii.gz"
    label = sitk.ReadImage(str(file))
    label.SetOrigin((10.4, 20, 30))  # less than half a voxel
    sitk.WriteImage(label, str(file))
    assert "1 cases of 1 patients" in hide_labels("6", 504, "1", seed=1)
    if damage == "origin":
        label.SetOrigin((11.5, 20, 30))
    else:
        label.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    sitk.WriteImage(label, str(file))
    hide_labels("6", 505, "1", seed=0)  # hidden there: not read
    with pytest.raises(InputError, match=match) as caught:
        hide_labels("6", 506, "1", seed=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", [".png", ".nii.gz"])
def test_images_with_two_axes(ending, nnunet_raw):
    """Photographs tell no place; a NIfTI slice does."""
    folder = nnunet_raw / "Dataset007_Flat"
    for part, name in (("imagesTr", "a_0000"), ("labelsTr", "a")):
        write(folder / part / f"{name}{ending}", np.eye(9, 7, dtype=np.uint8))
    content = {"channel_names": {"0": "grey"}, "labels": {"background": 0, "x": 1}, "file_ending": ending}
    (folder / "dataset.json").write_text(json.dumps({**content, "numTraining": 1}))
    assert "1 cases of 1 patients" in hide_labels("7", 504, "1")
    label = sitk.GetImageFromArray(np.eye(9, 7, dtype=np.uint8))
    label.SetOrigin((0, 3))
    sitk.WriteImage(label, str(folder / "labelsTr" / f"a{ending}"))
    if ending == ".png":
        hide_labels("7", 505, "1")
    else:
        with pytest.raises(InputError, match="a.nii.gz: by the headers it lies 3 mm away"):
            hide_labels("7", 505, "1")


@pytest.mark.parametrize("seed", [0, 1], ids=["hidden", "kept"])
@pytest.mark.parametrize("damage", ["cut off", "NaN"])
def test_images_are_whole_whether_hidden_or_not(damage, seed, nifti_source):
    file = nifti_source / "imagesTr" / "p0_0000.nii.gz"
    if damage == "NaN":
        image = nibabel.load(file)
        values = image.get_fdata()
        values[1, 2, 3] = np.nan
        nibabel.save(nibabel.Nifti1Image(values, image.affine), file)
    else:  # as ITK reads it without complaint
        file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:-50]))
    found = "NaN or infinite" if damage == "NaN" else "is cut off"
    with pytest.raises(InputError, match=f"p0_0000.nii.gz: the images cannot be read .*{found}.*; repair or remove"):
        hide_labels("6", 504, "1", seed=seed)


def test_label_with_nan(nifti_source):
    """ITK makes zeros of them, that is background."""
    file = nifti_source / "labelsTr" / "p0.nii.gz"
    label = nibabel.load(file)
    values = label.get_fdata()
    values[1, 2, 3] = np.nan
    nibabel.save(nibabel.Nifti1Image(values, label.affine), file)
    with pytest.raises(InputError, match="p0.nii.gz: the label cannot be read .*NaN"):
        hide_labels("6", 504, "1", seed=1)


def test_validation_cases_and_table_of_patients_come_along(nifti_source):
    for part, name in (("images", "v_0000.nii.gz"), ("labels", "v.nii.gz")):
        (nifti_source / f"{part}Val" / name).write_bytes((nifti_source / "labelsTr" / "p0.nii.gz").read_bytes())
    (nifti_source / "patients.csv").write_bytes(
        "patient,role,Group\np0,labelled,DCM\nv,validation,M\xfcller\n".encode()
    )
    hide_labels("6", 504, "1")
    target = nifti_source.with_name("Dataset504_Ni")
    assert os.path.samefile(target / "imagesVal" / "v_0000.nii.gz", nifti_source / "imagesVal" / "v_0000.nii.gz")
    assert (target / "labelsVal" / "v.nii.gz").is_file()
    assert (target / "patients.csv").read_bytes().decode() == "patient,Group\np0,DCM\nv,M\xfcller\n"


def test_dry_run_checks_and_writes_nothing(source, capsys):
    assert cli.hide_labels(["-d", "4", "-o", "504", "--labeled", "5", "--dry-run"]) == 0
    report = capsys.readouterr().out
    assert "dry run, nothing was written" in report and "5 cases of 5 patients keep their labels" in report
    assert "7 cases go to imagesUn" in report
    (source / "labelsTr" / "p0_a.nrrd").write_bytes(b"NRRD")
    with pytest.raises(InputError, match="p0_a.nrrd: the label cannot be read"):
        hide_labels("4", 504, "12", dry_run=True)
    assert [path.name for path in source.parent.iterdir()] == ["Dataset004_Many"]


def test_list_written_by_the_windows_editor(source, tmp_path):
    (tmp_path / "list.txt").write_text("p1_a\r\np2_b\r\n", encoding="utf-8-sig")
    hide_labels("4", 504, str(tmp_path / "list.txt"))
    assert cases_in(source.with_name("Dataset504_Many") / "imagesTr") == {"p1_a", "p2_b"}


def test_dataset_json_may_name_the_files(source):
    """nnU-Net's other way: "dataset" in dataset.json, with files of any name anywhere."""
    content = json.loads((source / "dataset.json").read_text())
    content["dataset"] = {
        f"case{i}": {"images": [f"imagesTr/p{i}_a_000{c}.nrrd" for c in (0, 1)], "label": f"labelsTr/p{i}_a.nrrd"}
        for i in range(3)
    }
    (source / "dataset.json").write_text(json.dumps(content))
    hide_labels("4", 504, "1")
    target = source.with_name("Dataset504_Many")
    assert cases_in(target / "imagesTr") | cases_in(target / "imagesUn") == {"case0", "case1", "case2"}
    assert "dataset" not in json.loads((target / "dataset.json").read_text())
    assert set(module.labelled_cases(target, {"file_ending": ".nrrd"})) == cases_in(target / "imagesTr")


def turn(source, case, axes):
    for file in (
        *(source / "imagesTr" / f"{case}_{channel:04d}.nrrd" for channel in (0, 1)),
        source / "labelsTr" / f"{case}.nrrd",
    ):
        sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(str(file)), axes), str(file))


@pytest.mark.robustness
@pytest.mark.parametrize(("case", "axes"), [("p0_a", "RAS"), ("p5_b", "ASL"), ("p3_a", "LAS")])
@pytest.mark.parametrize("dry_run", [False, True])
def test_case_with_other_axes_is_named_by_hide_labels(source, case, axes, dry_run):
    """Input: a labelled case with other axes than the rest. Answer: the report names it."""
    turn(source, case, axes)
    report = hide_labels("4", 504, "5", dry_run=dry_run)
    assert f"usual here (LPS): {case} ({axes})" in report


def test_cases_with_the_same_axes_are_not_named(source):
    assert "WARNING" not in hide_labels("4", 504, "5", dry_run=True)


def test_readers_that_turn_images_need_no_warning(source):
    turn(source, "p0_a", "RAS")
    content = json.loads((source / "dataset.json").read_text())
    content["overwrite_image_reader_writer"] = "SimpleITKIOWithReorient"
    (source / "dataset.json").write_text(json.dumps(content))
    assert "WARNING" not in hide_labels("4", 504, "5", dry_run=True)


def patient_folds() -> list[dict]:
    """Three folds that keep both cases of a patient on one side; none that nnU-Net would make."""
    left_out = [("p0", "p1"), ("p2", "p3"), ("p4", "p5")]
    return [
        {"train": [c for c in CASES if c[:2] not in out], "val": [c for c in CASES if c[:2] in out]} for out in left_out
    ]


@pytest.mark.robustness
@pytest.mark.parametrize("place", ["raw", "preprocessed"])
@pytest.mark.parametrize("unlabeled", [False, True])
def test_folds_of_the_source_are_kept(source, tmp_path, place, unlabeled):
    """Input: a source with a splits_final.json of its own. Answer: its folds, restricted to the cases that keep
    labels.
    """
    folds = patient_folds()
    if unlabeled:
        folds[1]["unlabeled"] = ["u1"]
    folder = source if place == "raw" else tmp_path / "nnUNet_preprocessed" / source.name
    folder.mkdir(exist_ok=True)
    (folder / "splits_final.json").write_text(json.dumps(folds))
    hide_labels("4", 504, write_cases(tmp_path, "p1", "p2", "p5"))
    target = source.with_name("Dataset504_Many")
    new = json.loads((target / "splits_final.json").read_text())
    kept = cases_in(target / "labelsTr")
    assert [fold["val"] for fold in new] == [[f"{p}_a", f"{p}_b"] for p in ("p1", "p2", "p5")]
    assert all(set(fold["train"]) | set(fold["val"]) == kept for fold in new)
    assert ["unlabeled" in fold for fold in new] == [False, unlabeled, False]
    if unlabeled:
        assert set(new[1]["unlabeled"]) == {"u1"} | (set(CASES) - kept)


@pytest.mark.robustness
def test_a_fold_that_would_be_empty_is_refused_with_the_remedy(source, tmp_path):
    """Input: a source with folds of its own of which one would have no case left. Answer: an error that says
    what to do.
    """
    (source / "splits_final.json").write_text(json.dumps(patient_folds()))
    with pytest.raises(
        InputError, match=r"splits_final.json: fold 2 would have no case left to validate on.*--patient_"
    ):
        hide_labels("4", 504, write_cases(tmp_path, "p0", "p2"))
    hide_labels("4", 504, write_cases(tmp_path, "p0", "p2"), patient_pattern=r"p\d")
    new = json.loads((source.with_name("Dataset504_Many") / "splits_final.json").read_text())
    assert [fold["val"] for fold in new] == [["p0_a", "p0_b"], ["p2_a", "p2_b"]]


def write_cases(folder, *patients) -> str:
    file = folder / "cases.txt"
    file.write_text("\n".join(case for case in CASES if case[:2] in patients))
    return str(file)


@pytest.mark.robustness
@pytest.mark.parametrize("groups", [None, {case: case[:2] for case in CASES}])
def test_folds_that_anyone_would_make_are_made_anew(source, tmp_path, groups):
    """Input: a source whose folds are nnU-Net's or our converters' own. Answer: new ones for the cases that are
    left.
    """
    if groups:
        change_json(source, patients=groups)
    (source / "splits_final.json").write_text(json.dumps(make_splits(CASES, groups)))
    hide_labels("4", 504, write_cases(tmp_path, "p0", "p2"))
    new = json.loads((source.with_name("Dataset504_Many") / "splits_final.json").read_text())
    assert len(new) == (2 if groups else 4)


@pytest.mark.robustness
@pytest.mark.parametrize(
    ("folds", "message"),
    [
        ({}, "must be a list of folds"),
        ([{"train": ["p0_a"]}], 'fold 0 must have "val", a list of case names'),
        ([{"train": "p0_a", "val": []}], 'fold 0 must have "train"'),
        ([{"train": ["p0_a"], "val": ["gone"]}], '"val" of fold 0 names cases that are not there: gone'),
    ],
)
def test_damaged_folds_of_the_source(source, folds, message):
    """Input: a splits_final.json of another form, or with names that do not exist. Answer: one line that names
    them.
    """
    (source / "splits_final.json").write_text(json.dumps(folds))
    with pytest.raises(InputError, match=f"splits_final.json.*{message}") as caught:
        hide_labels("4", 504, "3")
    assert "\n" not in str(caught.value)


@pytest.mark.robustness
@pytest.mark.parametrize("what", ["images", "label"])
def test_listed_files_of_another_ending_are_refused(source, what):
    """Input: dataset.json lists .mha files in a data set of .nrrd files. Answer: an error that names one, no
    renaming.
    """
    entry = {"images": [f"imagesTr/p0_a_000{c}.nrrd" for c in (0, 1)], "label": "labelsTr/p0_a.nrrd"}
    name = "imagesTr/p0_a_0001" if what == "images" else "labelsTr/p0_a"
    write(source / f"{name}.mha", np.ones((3, 4, 5), np.uint8))
    entry = {key: json.loads(json.dumps(value).replace(f"{name}.nrrd", f"{name}.mha")) for key, value in entry.items()}
    change_json(source, dataset={"p0_a": entry})
    with pytest.raises(InputError, match=rf"{name}.mha: dataset.json's file_ending is .nrrd; convert"):
        hide_labels("4", 504, "1")


@pytest.mark.robustness
@pytest.mark.parametrize("part", ["labelsVal", "labelsTs"])
def test_labels_of_hidden_cases_in_other_parts_are_told(source, part):
    """Input: labelsVal or labelsTs hold the label of a case that is hidden. Answer: a warning that names the case."""
    (source / part).mkdir(exist_ok=True)
    for case in CASES:
        shutil.copy(source / "labelsTr" / f"{case}.nrrd", source / part)
    report = hide_labels("4", 504, "11", dry_run=True)
    assert f"WARNING: {part} has labels of 1 cases that are hidden (p" in report and "transductive" in report


@pytest.mark.robustness
@pytest.mark.parametrize("hidden", [False, True])
def test_a_slice_among_volumes_is_refused(source, hidden):
    """Input: a 2D image in a 3D data set, labelled or to be hidden. Answer: an error that names it."""
    seed = next(s for s in range(99) if ("p3_a" in random.Random(s).sample(CASES, 11)) != hidden)
    for file in source.glob("imagesTr/p3_a_*"):
        write(file, np.ones((4, 5), np.float32))
    with pytest.raises(InputError, match="p3_a_0000.nrrd: an image of 2 axes, the labelled ones have 3"):
        hide_labels("4", 504, "11", seed=seed)


@pytest.mark.robustness
@pytest.mark.parametrize("part", ["imagesTs", "labelsTs"])
def test_a_folder_among_images_is_called_a_folder(source, part):
    """Input: a folder imagesTs/old. Answer: an error that calls it a folder."""
    (source / part / "old").mkdir(parents=True)
    with pytest.raises(InputError, match=f"{part}/old is a folder: {part} holds files only; move it away"):
        hide_labels("4", 504, "11")


@pytest.mark.robustness
def test_all_is_no_number_of_patients(source):
    """Input: hide_labels --labeled all. Answer: the error says what to give."""
    with pytest.raises(
        InputError, match="--labeled all: give the number of patients that keep their labels, or a text"
    ):
        hide_labels("4", 504, "all")
