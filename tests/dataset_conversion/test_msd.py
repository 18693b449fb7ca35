"""The converter of the Medical Segmentation Decathlon, on miniature tasks, and on real cases where they are at hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conversion_helpers import REAL_DATA, names, read, refuse, verify, write_list

from dataset_conversion import msd
from dataset_conversion.common import Options

pytestmark = pytest.mark.filterwarnings("ignore:One patient only")
MODALITIES = {"Prostate": ["T2", "ADC"], "Spleen": ["CT"]}
CLASSES = ["background", "PZ", "TZ"]
CASES = [f"case_{number:02d}" for number in range(6)]
SPACING, ORIGIN = (1.25, 1.5, 4.0), (-30.0, 12.0, 5.0)  # mm
DIRECTION = np.array([[0.8, 0.6, 0], [-0.6, 0.8, 0], [0, 0, 1.0]])


def make_case(number: int, channels: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Channels and label with axes (z, y, x) of different lengths."""
    generator = np.random.default_rng(number)
    label = generator.integers(0, 3, (4, 6 + number % 2, 9), dtype=np.uint8)
    return [generator.normal(0, 100, label.shape).astype(np.float32) for _ in range(channels)], label


def as_image(array: np.ndarray) -> sitk.Image:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING)
    image.SetOrigin(ORIGIN)
    image.SetDirection(DIRECTION.ravel())
    return image


def write_image(path: Path, channels: list[np.ndarray]) -> None:
    images = [as_image(array) for array in channels]
    sitk.WriteImage(sitk.JoinSeries(images) if len(images) > 1 else images[0], str(path))


def make_task(folder: Path, task: str) -> Path:
    """A task as the challenge packs it, litter of a Mac included."""
    source = folder / f"Task05_{task}"
    for part in ("imagesTr", "labelsTr", "imagesTs"):
        (source / part).mkdir(parents=True)
    for number, case in enumerate(CASES):
        channels, label = make_case(number, len(MODALITIES[task]))
        write_image(source / "imagesTr" / f"{case}.nii.gz", channels)
        sitk.WriteImage(as_image(label), str(source / "labelsTr" / f"{case}.nii.gz"))
        for part in ("imagesTr", "labelsTr"):
            (source / part / f"._{case}.nii.gz").write_bytes(b"litter")
    write_image(source / "imagesTs" / "case_90.nii.gz", make_case(90, len(MODALITIES[task]))[0])
    (source / "imagesTs" / "._case_90.nii.gz").write_bytes(b"litter")
    content = {
        "name": task.upper(),
        "modality": dict(enumerate(MODALITIES[task])),
        "labels": dict(enumerate(CLASSES)),
        "numTraining": len(CASES),
        "training": [{"image": f"./imagesTr/{c}.nii.gz", "label": f"./labelsTr/{c}.nii.gz"} for c in CASES],
        "test": ["./imagesTs/case_90.nii.gz"],
    }
    (source / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    return source


def make_plain(folder: Path, name: str = "hippocampus") -> Path:
    """images, labels and lists; case_00 is in no list."""
    source = make_task(folder, "Spleen").rename(folder / name)
    for part in ("images", "labels"):
        (source / f"{part}Tr").rename(source / part)
    (source / "dataset.json").unlink()
    write_list(source / "train.list", [CASES[i] for i in (4, 2, 5, 1)])
    write_list(source / "test.list", [CASES[3]])
    return source


def change_json(source: Path, **changes) -> None:
    file = source / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes), encoding="utf-8")


@pytest.mark.parametrize("task", MODALITIES)
def test_every_voxel_arrives_where_it_was(task, nnunet_raw, tmp_path):
    report = msd.convert(make_task(tmp_path, task), 705, "2", "1")
    target = nnunet_raw / f"Dataset705_{task}"
    dataset_json = verify(target)
    assert dataset_json["channel_names"] == {str(i): name for i, name in enumerate(MODALITIES[task])}
    assert dataset_json["labels"] == {"background": 0, "PZ": 1, "TZ": 2}
    found = []
    for folder, number in (("imagesTr", 2), ("imagesUn", 3), ("imagesTs", 1)):
        cases = {path.name[:7] for path in (target / folder).iterdir()}
        assert len(cases) == number
        found += cases
        for case in cases:
            channels, label = make_case(int(case[-2:]), len(MODALITIES[task]))
            written = sorted((target / folder).glob(f"{case}*"))
            assert [path.name for path in written] == [f"{case}_{i:04d}.nii.gz" for i in range(len(channels))]
            for path, channel in zip(written, channels, strict=True):
                array, image = read(path)
                np.testing.assert_array_equal(array, channel.T)
                assert array.dtype == np.float32
                np.testing.assert_allclose(image.GetSpacing(), SPACING, rtol=1e-6)
                np.testing.assert_allclose(image.GetOrigin(), ORIGIN, rtol=1e-6)
                np.testing.assert_allclose(image.GetDirection(), DIRECTION.ravel(), atol=1e-6)
            label_file = target / folder.replace("images", "labels") / f"{case}.nii.gz"
            assert label_file.exists() == (folder != "imagesUn")
            if label_file.exists():
                np.testing.assert_array_equal(read(label_file)[0], label.T)
    assert sorted(found) == CASES
    assert "1 images of imagesTs are not used: their labels are secret" in report
    assert "random, seed 0" in report


def test_division_is_seeded_and_larger_budgets_contain_smaller_ones(nnunet_raw, tmp_path):
    source = make_task(tmp_path, "Spleen")
    for dataset_id, number, seed in ((1, "1", 4), (2, "3", 4), (3, "3", 5)):
        msd.convert(source, dataset_id, number, "2", seed=seed)
    small, large, other = (nnunet_raw / f"Dataset00{i}_Spleen" for i in (1, 2, 3))
    assert names(small / "imagesTr") < names(large / "imagesTr")
    assert names(small / "imagesTs") == names(large / "imagesTs")
    assert [names(large / f) for f in ("imagesTr", "imagesTs")] != [names(other / f) for f in ("imagesTr", "imagesTs")]


@pytest.mark.parametrize(("subset", "labelled"), [(0, {4, 2}), (1, {5, 1})])
def test_folder_with_lists(subset, labelled, nnunet_raw, tmp_path):
    report = msd.convert(make_plain(tmp_path), 704, "2", options=Options(subset=subset))
    target = nnunet_raw / "Dataset704_Hippocampus"
    dataset_json = verify(target)
    assert names(target / "imagesTr") == names(target / "labelsTr") == {CASES[i] for i in labelled}
    assert names(target / "imagesUn") == {CASES[i] for i in {4, 2, 5, 1} - labelled}
    assert names(target / "imagesTs") == {CASES[3]}
    assert dataset_json["labels"] == {"background": 0, "Anterior": 1, "Posterior": 2}
    assert dataset_json["channel_names"] == {"0": "MRI"}
    assert dataset_json["conversion"]["subset"] == subset
    assert "1 images are in no list and not used, e.g. case_00" in report
    assert ("none of those of subset 0 to 0" in report) == (subset == 1)


def test_given_lists_beat_those_in_the_folder(nnunet_raw, tmp_path):
    source = make_plain(tmp_path)
    train = write_list(tmp_path / "mine.txt", [CASES[3], CASES[0], CASES[1]])
    msd.convert(source, 704, "1", "3", train)  # all others are for testing
    target = nnunet_raw / "Dataset704_Hippocampus"
    assert [names(target / f) for f in ("imagesTr", "imagesUn", "imagesTs")] == [
        {CASES[3]},
        {CASES[0], CASES[1]},
        {CASES[2], CASES[4], CASES[5]},
    ]
    msd.convert(source, 705, "all", "0", name="No-test")
    assert names(nnunet_raw / "Dataset705_No-test" / "imagesTs") == set()


def test_task_without_training_list_in_its_dataset_json(nnunet_raw, tmp_path):
    source = make_task(tmp_path, "Spleen")
    change_json(source, training=[])
    (source / "labelsTr" / f"{CASES[1]}.nii.gz").unlink()  # of an unlabelled case: not needed
    labelled = write_list(tmp_path / "labelled.txt", [CASES[0]])
    msd.convert(source, 709, str(labelled), "0")
    assert len(names(nnunet_raw / "Dataset709_Spleen" / "imagesUn")) == 5


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        ("parent folder", "neither imagesTr nor images; did you mean .*Task05_Prostate"),
        ("packed", "neither imagesTr nor images; give the folder of one task; .*x.tar is there: unpack first"),
        ("both forms", "has both imagesTr and images"),
        ("no test", "--test is needed: .* secret"),
        ("no dataset.json", "dataset.json does not exist: put the dataset.json of the task's download there"),
        ("cut dataset.json", "dataset.json is not valid JSON"),
        ("list", "dataset.json is not a description of a task"),
        ("labels", '"labels" must look like'),
        ("same names", '"labels" must look like'),
        ("no modality", '"modality" must look like'),
        ("training", '"training" must look like'),
        ("image gone", "1 of 6 cases that dataset.json lists are not in imagesTr: case_03; complete the folder"),
        ("label gone", "1 of 6 cases lack the label in labelsTr: case_03"),
        ("labels gone", "6 of 6 cases lack the label in labelsTr: case_00"),
        ("cut image", "imagesTr/case_03.nii.gz: damaged or incomplete"),
        ("one channel", r"case_03.nii.gz: the image has shape \(9, 7, 4\), expected a volume with 2 channels"),
        ("three channels", r"case_03.nii.gz: the image has shape \(9, 7, 4, 3\), expected a volume with 2 channels"),
        ("label value", "labelsTr/case_03.nii.gz: unexpected label value 3"),
        ("label with channels", "labelsTr/case_03.nii.gz: 4 axes or several values"),
        ("label of another", "labelsTr/case_03.nii.gz: the label has 9 x 6 x 4 voxels"),
        ("NaN", "imagesTr/case_03.nii.gz has NaN"),
        ("twice", "there is another"),
        ("subset", "--subset 1: 6 training cases have 1 disjoint subsets of 6; give 0 to 0"),
        ("too many for testing", "--test 6: the number of test cases must be 0 to 5"),
        ("test is training", "test.txt: also in .*train.txt: case_01"),
        ("unknown training", "train.txt: no images of case_77"),
        ("unknown test", "no such cases: case_77"),
        ("name", "--name 'a b'"),
    ],
)
def test_wrong_input(damage, match, nnunet_raw, tmp_path):
    source = make_task(tmp_path, "Prostate")
    image, label = (source / part / "case_03.nii.gz" for part in ("imagesTr", "labelsTr"))
    labelled, test, options = "all", "0", {}
    (channels, array), train = make_case(3, 2), tmp_path / "train.txt"
    match damage:
        case "parent folder":
            source = tmp_path
        case "packed":
            source = tmp_path / "download"
            source.mkdir()
            (source / "x.tar").write_bytes(b"")
        case "both forms":
            (source / "images").mkdir()
        case "no test":
            test = None
        case "no dataset.json":
            (source / "dataset.json").unlink()
        case "cut dataset.json":
            (source / "dataset.json").write_text("{")
        case "list":
            (source / "dataset.json").write_text("[]")
        case "labels":
            change_json(source, labels={"background": 0, "PZ": 1})
        case "same names":
            change_json(source, labels={"0": "background", "1": "PZ", "2": "PZ"})
        case "no modality":
            change_json(source, modality={})
        case "training":
            change_json(source, training=["case_03.nii.gz"])
        case "image gone":
            image.unlink()
        case "label gone":
            label.unlink()
        case "labels gone":
            label.parent.rename(source / "elsewhere")
        case "cut image":
            image.write_bytes(image.read_bytes()[:-9])
        case "one channel":
            write_image(image, channels[:1])
        case "three channels":
            write_image(image, [*channels, channels[0]])
        case "label value":
            sitk.WriteImage(as_image(array + 1), str(label))
        case "label with channels":
            write_image(label, [array, array])
        case "label of another":
            sitk.WriteImage(as_image(make_case(2, 2)[1]), str(label))
        case "NaN":
            channels[1][0, 0, 0] = np.nan
            write_image(image, channels)
        case "twice":
            write_image(source / "imagesTr" / "case_03.nii", channels)
        case "subset":
            labelled, options = "6", {"options": Options(subset=1)}
        case "too many for testing":
            test = "6"
        case "test is training":
            options = {"train_list": write_list(train, CASES[:2])}
            test = str(write_list(tmp_path / "test.txt", CASES[1:3]))
        case "unknown training":
            options = {"train_list": write_list(train, [CASES[0], "case_77"])}
        case "unknown test":
            test = str(write_list(tmp_path / "test.txt", ["case_77"]))
        case "name":
            options = {"name": "a b"}
    refuse(nnunet_raw, match, msd.convert, source, 705, labelled, test, **options)


def test_main_goes_on_after_an_error(nnunet_raw, tmp_path, capsys):
    source = make_task(tmp_path, "Prostate")
    arguments = ["--source", str(source), "-d", "705", "--labeled", "1", "--subset", "1", "--test", "2", "-np", "1"]
    assert msd.main([*arguments, "--dry-run"]) == 0
    assert "nothing was written" in capsys.readouterr().out and not list(nnunet_raw.iterdir())
    image = source / "imagesTr" / "case_03.nii.gz"
    whole = image.read_bytes()
    image.write_bytes(whole[:-9])
    assert msd.main(arguments) == 2
    error = capsys.readouterr().err
    assert "case_03.nii.gz: damaged" in error and "the same command goes on from there" in error
    image.write_bytes(whole)
    assert msd.main([*arguments, "--previews", "2"]) == 0
    target = nnunet_raw / "Dataset705_Prostate"
    assert json.loads((target / "dataset.json").read_text())["conversion"]["subset"] == 1
    assert len(list((target / "previews").iterdir())) == 2


@pytest.mark.skipif(not (REAL_DATA / "hippocampus").is_dir(), reason="the cases are not beside the checkout")
def test_all_real_cases(nnunet_raw):
    source = REAL_DATA / "hippocampus"
    msd.convert(source, 704, "4", options=Options())
    target = nnunet_raw / "Dataset704_Hippocampus"
    train = (source / "train.list").read_text().split()
    assert names(target / "imagesTr") == names(target / "labelsTr") == set(train[:4])
    assert names(target / "imagesUn") == set(train[4:])
    assert names(target / "imagesTs") == set((source / "test.list").read_text().split())
    files = list(target.glob("images*/*")) + list(target.glob("labels*/*"))
    assert len(files) == 200 + 4 + 60
    for file in files:
        original = source / file.parent.name[:6] / file.name.replace("_0000.nii", ".nii")
        (array, image), (expected, original_image) = read(file), read(original)
        np.testing.assert_array_equal(array, expected)
        assert file.parent.name.startswith("labels") or array.dtype == expected.dtype
        for property_ in ("GetSpacing", "GetOrigin", "GetDirection"):
            np.testing.assert_allclose(getattr(image, property_)(), getattr(original_image, property_)(), atol=1e-4)
