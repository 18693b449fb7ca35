"""Folders of small label files in, rows and a summary out; everything wrong with the input is named in one line."""

import csv
import json
import math
import re

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage import io

from nnunetv2_semisup import cli
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.evaluation.folder import evaluate_folder, largest_component
from nnunetv2_semisup.evaluation.metrics import METRICS, compare_masks
from nnunetv2_semisup.evaluation.summary import COLUMNS, POSTPROCESSING, summarize, table

QUICK = settings(max_examples=60)
SPACING = (0.5, 0.75, 2.0)  # x, y, z in mm
SHAPE = (4, 6, 8)  # z, y, x
LABELS = {"background": 0, "a": 1, "b": 2}
HEAD = ("label", "Dice %", "Jaccard %", "95HD voxel", "ASD voxel", "95HD mm", "ASSD mm")


def write(file, array, spacing=SPACING, origin=None, direction=None):
    image = sitk.GetImageFromArray(array.astype(np.uint8))
    image.SetSpacing(spacing)
    image.SetOrigin(origin or (0.0,) * array.ndim)
    if direction:
        image.SetDirection(direction)
    sitk.WriteImage(image, str(file))


class Case:
    """Two folders, a dataset.json and an output folder."""

    def __init__(self, root):
        self.reference, self.prediction, self.output = root / "labelsTs", root / "predicted", root / "out"
        self.reference.mkdir()
        self.prediction.mkdir()
        self.dataset_json = root / "dataset.json"
        self.labels(LABELS)

    def labels(self, labels, ending=".nii.gz", **more):
        self.dataset_json.write_text(json.dumps({"labels": labels, "file_ending": ending, **more}))

    def add(self, name, reference, prediction):
        write(self.reference / f"{name}.nii.gz", reference)
        write(self.prediction / f"{name}.nii.gz", prediction)

    def evaluate(self, **kwargs):
        return evaluate_folder(self.reference, self.prediction, self.dataset_json, self.output, **kwargs)


@pytest.fixture
def folders(tmp_path):
    return Case(tmp_path)


def arrays(seed, labels=3, shape=SHAPE):
    return np.random.default_rng(seed).integers(0, labels, (2, *shape))


def test_rows_are_the_metrics_of_each_mask(folders):
    cases = {name: arrays(seed) for seed, name in enumerate(("c2", "c1"))}
    for name, pair in cases.items():
        folders.add(name, *pair)
    rows = folders.evaluate()
    assert [(r["case"], r["label"], r["postprocessing"]) for r in rows] == [
        ("c1", "a", "none"),
        ("c1", "b", "none"),
        ("c2", "a", "none"),
        ("c2", "b", "none"),
    ]
    for row in rows:
        assert tuple(row) == COLUMNS
        reference, prediction = (array == LABELS[row["label"]] for array in cases[row["case"]])
        expected = compare_masks(prediction, reference, SPACING[::-1])
        assert {name: row[name] for name in METRICS} == expected
        assert (row["voxels_prediction"], row["voxels_reference"]) == (prediction.sum(), reference.sum())


def test_files(folders):
    for seed in range(3):
        folders.add(f"c{seed}", *arrays(seed))
    write(folders.reference / "empty.nii.gz", np.eye(*SHAPE[:2])[..., None].repeat(8, 2))  # no label b anywhere
    write(folders.prediction / "empty.nii.gz", np.zeros(SHAPE))
    (folders.prediction / "plans.json").write_text("{}")  # nnU-Net's own files and hidden ones are passed over
    (folders.prediction / ".c9.nii.gz").write_text("")
    rows = folders.evaluate()
    with open(folders.output / "cases.csv", encoding="utf-8", newline="") as f:
        written = list(csv.DictReader(f))
    assert tuple(written[0]) == COLUMNS and len(written) == len(rows) == 8
    for row, text in zip(rows, written, strict=True):
        for name in METRICS:
            assert float(text[name]) == pytest.approx(row[name], abs=1e-6, nan_ok=True)
    summary = json.loads((folders.output / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["none"]["labels"]["a"]["dice"]["mean"] == pytest.approx(np.mean([r["dice"] for r in rows[::2]]))
    assert summary["none"]["labels"]["a"]["dice"]["failures"] == 1
    assert summary["none"]["labels"]["b"]["hd95_mm"]["n"] == 3
    assert sorted(f.name for f in folders.output.iterdir()) == ["cases.csv", "summary.json"]


def test_in_processes_as_in_one(folders):
    for seed in range(3):
        folders.add(f"c{seed}", *arrays(seed))
    assert folders.evaluate(processes=2) == folders.evaluate(processes=1)


def test_regions(folders):
    folders.labels({"background": 0, "whole": [1, 2], "core": [2]}, regions_class_order=[1, 2])
    reference, prediction = arrays(0)
    folders.add("c", reference, prediction)
    whole, core = folders.evaluate()
    assert whole["label"] == "whole" and core["label"] == "core"
    assert whole["dice"] == compare_masks(prediction > 0, reference > 0, None)["dice"]
    assert core["dice"] == compare_masks(prediction == 2, reference == 2, None)["dice"]


def test_ignored_voxels_leave_both_masks(folders):
    folders.labels({"background": 0, "a": 1, "ignore": 2})
    reference = np.zeros(SHAPE)
    reference[1:3, 1:4, 1:4] = 1
    prediction = reference.copy()
    prediction[:, :, 6:] = 1  # wrong, but in the ignored part
    reference[:, :, 5:] = 2
    folders.add("c", reference, prediction)
    (row,) = folders.evaluate()
    assert (row["label"], row["dice"], row["hd95_mm"]) == ("a", 1, 0)
    assert row["voxels_prediction"] == row["voxels_reference"] == 18


def test_largest_component_is_a_second_set_of_rows(folders):
    reference = np.zeros(SHAPE)
    reference[1:3, 1:4, 1:4] = 1
    prediction = reference.copy()
    prediction[3, 4, 4] = 1  # touches at a corner: full connectivity keeps it
    prediction[0, 0, 7] = 1  # a stray voxel
    folders.labels({"background": 0, "a": 1})
    folders.add("c", reference, prediction)
    plain, largest = folders.evaluate(largest_component=True)
    assert (plain["postprocessing"], largest["postprocessing"]) == ("none", "largest_component")
    assert (plain["voxels_prediction"], largest["voxels_prediction"]) == (20, 19)
    assert plain["dice"] == 36 / 38 and largest["dice"] == 36 / 37
    assert folders.evaluate() == [plain]
    assert list(summarize([plain, largest])) == ["none", "largest_component"]


def test_one_component_per_label_and_before_ignored_voxels_are_removed(folders):
    folders.labels({"background": 0, "a": 1, "b": 2, "ignore": 3})
    prediction, reference = np.zeros(SHAPE), np.zeros(SHAPE)
    prediction[0, 0, :3], prediction[2, 2, :2] = 1, 1  # the larger one will be ignored
    prediction[0, 5, 4:], prediction[3, 5, 7] = 2, 2
    reference[2, 2, :2] = 1
    reference[0, 0] = 3
    folders.add("c", reference, prediction)
    voxels = [(r["label"], r["voxels_prediction"]) for r in folders.evaluate(largest_component=True)]
    assert voxels == [("a", 2), ("a", 0), ("b", 5), ("b", 4)]


@QUICK
@given(hnp.arrays(bool, hnp.array_shapes(min_dims=1, max_dims=3, max_side=5)))
def test_largest_component_against_a_search(mask):
    """Flood fill by hand, over neighbours that differ by at most 1 in every axis."""
    unseen, sizes = {tuple(p) for p in np.argwhere(mask).tolist()}, []
    while unseen:
        queue, size = [unseen.pop()], 0
        while queue:
            here = queue.pop()
            size += 1
            near = {p for p in unseen if all(abs(a - b) <= 1 for a, b in zip(p, here, strict=True))}
            unseen -= near
            queue += near
        sizes.append(size)
    kept = largest_component(mask)
    assert kept.sum() == max(sizes, default=0) and not (kept & ~mask).any()
    assert np.array_equal(largest_component(kept), kept)


# ----------------------------------------------------------------------------------------------------------- statistics


def row(case, label, values, voxels=(1, 1), postprocessing="none"):
    names = {"case": case, "label": label, "postprocessing": postprocessing}
    return {**names, **dict.fromkeys(METRICS, values), "voxels_prediction": voxels[0], "voxels_reference": voxels[1]}


def failed(case, label, voxels):
    return {**row(case, label, math.nan, voxels), "dice": 0.0, "jaccard": 0.0}


def test_failures_lower_dice_and_are_counted_beside_the_distances():
    rows = [row("c1", "a", 0.5), row("c2", "a", 1.0), failed("c3", "a", (0, 9)), failed("c4", "a", (9, 0))]
    found = summarize([*rows, row("c5", "a", math.nan, (0, 0))])["none"]
    assert found["cases"] == 5
    dice, distance = found["labels"]["a"]["dice"], found["labels"]["a"]["hd95_mm"]
    assert (dice["mean"], dice["median"], dice["n"], dice["failures"]) == (0.375, 0.25, 4, 2)
    assert dice["sd"] == pytest.approx(np.std([0.5, 1, 0, 0], ddof=1))
    assert (distance["mean"], distance["n"], distance["failures"]) == (0.75, 2, 2)


def test_over_labels():
    rows = [row("c1", "a", 1.0), row("c1", "b", 3.0), row("c2", "a", 5.0), failed("c2", "b", (0, 1))]
    found = summarize(rows)["none"]["over_labels"]["hd95_voxel"]
    assert found["mean"] == 3.0  # of the labels' means 3 and 3
    assert found["median"] == 3.5 and found["sd"] == pytest.approx(np.std([2, 5], ddof=1))  # of the cases' means 2, 5
    assert (found["n"], found["failures"]) == (2, 1)


def test_nothing_known_is_nan_and_a_dash():
    summary = summarize([failed("c", "a", (0, 5))])
    distance = summary["none"]["labels"]["a"]["assd_mm"]
    assert math.isnan(distance["mean"]) and math.isnan(distance["sd"]) and distance["n"] == 0
    lines = table(summary).splitlines()
    assert re.split(" {2,}", lines[1]) == [*HEAD, "failures"]
    assert lines[2].split() == ["a", "0.0", "±", "-", "0.0", "±", "-", *["-"] * 4, "1"]
    assert lines[3].startswith("failure: only one of")


def test_the_mean_has_no_distance_where_a_label_has_none():
    rows = [row("c1", "a", 0.5), failed("c1", "b", (0, 5)), failed("c1", "left atrium", (0, 5))]
    rows += [row("c1", "d", math.nan, (0, 0))]  # nowhere, which is no reason
    lines = table(summarize(rows)).splitlines()
    [mean] = [line for line in lines if line.startswith("(mean) ")]
    assert mean.split() == ["(mean)", "16.7", "±", "-", "16.7", "±", "-", *["-"] * 4, "2"]
    assert "(mean): no distances, since these labels have none: b, left atrium" in lines


def test_without_voxel_size_the_columns_stay():
    rows = [{**row("c1", "a", 0.5), "hd95_mm": math.nan, "assd_mm": math.nan}]
    lines = table(summarize(rows)).splitlines()
    assert re.split(" {2,}", lines[1]) == [*HEAD, "failures"] and lines[2].split()[-3:] == ["-", "-", "0"]
    assert lines[3] == "mm: unknown, these files have no voxel size"


def test_table_has_a_line_per_label_and_the_mean():
    """Per label the mean ± sd of its column, in the printed digits, computed here."""
    cases = {f"c{i}": {"hippocampus": 0.5 + 0.1 * i, "b": 0.7} for i in range(4)}
    rows = [row(case, label, value) for case, values in cases.items() for label, value in values.items()]
    lines = table(summarize(rows)).splitlines()
    assert lines[0] == "4 cases, predictions as they are; mean ± sd over cases"
    assert lines[2].split() == ["hippocampus", *["65.0", "±", "12.9"] * 2, *["0.65", "±", "0.13"] * 4, "0"]
    assert lines[3].split() == ["b", *["70.0", "±", "0.0"] * 2, *["0.70", "±", "0.00"] * 4, "0"]
    assert lines[4].split() == ["(mean)", *["67.5", "±", "6.5"] * 2, *["0.68", "±", "0.06"] * 4, "0"]
    assert len(lines) == 5, "nothing to explain"


def test_table_fits_100_columns_and_has_every_postprocessing():
    """Large numbers, labels that not every case has."""
    labels = ("hippocampus", "a", "b")
    rows = [row(f"c{i}", x, 123.4 * i, postprocessing=p) for p in POSTPROCESSING for x in labels for i in (0, 1)]
    rows += [row("c2", "b", math.nan, (0, 0), postprocessing=p) for p in POSTPROCESSING]
    for r in rows:
        r |= {"dice": min(r["dice"], 1.0), "jaccard": min(r["jaccard"], 1.0)}
    text = table(summarize(rows))
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("(mean)") == 2 and "largest component of each predicted label" in text
    assert text.count("b: 2 cases, in the others neither prediction nor reference has it") == 2


def test_a_label_of_several_words_stands_on_one_line():
    lines = table(summarize([row("c1", "left ventricular myocardium", 0.5), row("c1", "b", 0.5)])).splitlines()
    assert lines[2].startswith("left ventricular myocardium  50.0 ± -") and len(lines) == 5


# -------------------------------------------------------------------------------------------------------------- formats


def test_image_of_one_slice_is_2d(folders):
    """As a 3D volume every voxel would be surface, and the distances far too small."""
    reference, prediction = (arrays(0, 2, (1, 9, 9)) * 0).astype(np.uint8)
    reference[0, 1:8, 1:8], prediction[0, 1:8, 2:9] = 1, 1
    folders.labels({"background": 0, "a": 1})
    folders.add("c", reference, prediction)
    (row,) = folders.evaluate()
    assert row["asd_voxel"] == compare_masks(prediction[0] > 0, reference[0] > 0, None)["asd_voxel"]
    assert row["asd_voxel"] > compare_masks(prediction > 0, reference > 0, None)["asd_voxel"]


def test_2d_medical_images(folders):
    folders.labels({"background": 0, "a": 1}, ".nrrd")
    reference, prediction = arrays(1, 2, (7, 9))
    write(folders.reference / "c.nrrd", reference, (0.5, 3.0))
    write(folders.prediction / "c.nrrd", prediction, (0.5, 3.0))
    (row,) = folders.evaluate()
    expected = compare_masks(prediction == 1, reference == 1, (3.0, 0.5))
    assert {name: row[name] for name in METRICS} == expected


def test_natural_images_have_no_mm(folders):
    folders.labels(LABELS, ".png")
    (folders.reference / "c.json").write_text('{"spacing": [1, 2, 3]}')  # only the reader of 3D tif files looks there
    reference, prediction = arrays(2, 3, (7, 9)).astype(np.uint8)
    io.imsave(folders.reference / "c.png", reference, check_contrast=False)
    io.imsave(folders.prediction / "c.png", prediction, check_contrast=False)
    for row in folders.evaluate():
        expected = compare_masks(prediction == LABELS[row["label"]], reference == LABELS[row["label"]], None)
        assert {n: row[n] for n in METRICS} == pytest.approx(expected, nan_ok=True)
        assert math.isnan(row["hd95_mm"]) and row["hd95_voxel"] > 0
    assert summarize(folders.evaluate())["none"]["labels"]["a"]["hd95_mm"]["failures"] == 0


@pytest.mark.parametrize("spacing", [None, [2.0, 0.75, 0.5]])
def test_3d_tif_has_mm_only_with_a_spacing_file(folders, spacing, capfd):
    folders.labels(LABELS, ".tif")
    reference, prediction = arrays(3, shape=(5, 6, 8)).astype(np.uint8)
    for folder, array in ((folders.reference, reference), (folders.prediction, prediction)):
        tifffile.imwrite(folder / "c.tif", array)
        (folder / "c.json").write_text(json.dumps({"spacing": spacing})) if spacing else None
    rows = folders.evaluate()
    assert capfd.readouterr() == ("", "")
    for row in rows:
        masks = prediction == LABELS[row["label"]], reference == LABELS[row["label"]]
        assert {n: row[n] for n in METRICS} == pytest.approx(compare_masks(*masks, spacing), nan_ok=True)


def test_nibabel_reader(folders):
    folders.labels({"background": 0, "a": 1}, overwrite_image_reader_writer="NibabelIO")
    folders.add("c", *(a == 1 for a in arrays(4)))
    (row,) = folders.evaluate()
    folders.labels({"background": 0, "a": 1})
    assert folders.evaluate() == [pytest.approx(row)]


# ---------------------------------------------------------------------------------------------------------- wrong input


def refused(folders, *words, **kwargs):
    with pytest.raises(InputError) as error:
        folders.evaluate(**kwargs)
    assert "\n" not in str(error.value)
    for word in words:
        assert str(word) in str(error.value)
    assert not (folders.output / "cases.csv").exists()


@pytest.mark.parametrize("part", [0.8, 0.999])
def test_truncated_prediction(folders, part):
    """SimpleITK alone would fill the rest with zeros."""
    folders.add("c1", *arrays(0, shape=(20, 30, 40)))
    file = folders.prediction / "c1.nii.gz"
    content = file.read_bytes()
    file.write_bytes(content[: int(part * len(content))])
    refused(folders, file, "cannot be read")


def test_missing_and_extra_predictions(folders):
    folders.add("c1", *arrays(0))
    write(folders.reference / "c2.nii.gz", arrays(1)[0])
    refused(folders, folders.prediction, "lacks", "c2.nii.gz", f"-o {folders.prediction} --continue_prediction", "-ref")
    write(folders.prediction / "c2.nii.gz", arrays(1)[1])
    write(folders.prediction / "c3.nii.gz", arrays(1)[1])
    refused(folders, folders.prediction, "without a reference", "c3.nii.gz")


TURNED = (0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, -1.0)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"spacing": (0.5, 0.75, 2.01)}, "spacing (2.01, 0.75, 0.5)"),
        ({"origin": (0.0, 0.1, 0.0)}, "origin"),
        ({"direction": TURNED}, "direction"),
    ],
)
@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO", "NibabelIOWithReorient"])
def test_misaligned(folders, change, word, reader):
    shape = (6, 6, 6)  # the same after turning
    folders.labels(LABELS, overwrite_image_reader_writer=reader)
    write(folders.reference / "c.nii.gz", arrays(0, shape=shape)[0])
    write(folders.prediction / "c.nii.gz", arrays(0, shape=shape)[1], **change)
    if reader == "NibabelIOWithReorient" and "direction" in change:
        word = "not aligned"  # the reader turns the image back, which leaves the axes' lengths or the origin to differ
    refused(folders, folders.prediction / "c.nii.gz", word)


def test_rounding_of_headers_is_not_misalignment(folders):
    reference, prediction = arrays(0)
    write(folders.reference / "c.nii.gz", reference)
    write(folders.prediction / "c.nii.gz", prediction, tuple(s * (1 + 1e-6) for s in SPACING), (1e-5, 0.0, 0.0))
    assert len(folders.evaluate()) == 2


@pytest.mark.parametrize("processes", [1, 2])
def test_different_size(folders, processes):
    folders.add("c1", *arrays(0))
    write(folders.reference / "c2.nii.gz", arrays(0)[0])
    write(folders.prediction / "c2.nii.gz", arrays(0)[1][:, :, :7])
    refused(folders, "c2.nii.gz", "size (4, 6, 7)", "(4, 6, 8)", processes=processes)


@pytest.mark.parametrize("which", ["reference", "prediction"])
def test_unknown_label(folders, which):
    pair = dict(zip(("reference", "prediction"), arrays(0), strict=True))
    pair[which][0, 0, 0] = 7
    folders.add("c", pair["reference"], pair["prediction"])
    refused(folders, getattr(folders, which) / "c.nii.gz", "does not know", "7")


def test_ignore_label_in_a_prediction(folders):
    folders.labels({"background": 0, "a": 1, "ignore": 2})
    folders.add("c", *arrays(0))
    refused(folders, folders.prediction / "c.nii.gz", "the ignore label")


def test_probabilities_are_no_labels(folders):
    folders.add("c", *arrays(0))
    image = sitk.GetImageFromArray(np.full(SHAPE, 0.5, np.float32))
    image.SetSpacing(SPACING)
    sitk.WriteImage(image, str(folders.prediction / "c.nii.gz"))
    refused(folders, "does not know", "0.5")


def test_unreadable_file(folders, capfd):
    folders.add("c1", *arrays(0))
    folders.add("c2", *arrays(0))
    (folders.prediction / "c2.nii.gz").write_bytes(b"no image")
    refused(folders, folders.prediction / "c2.nii.gz", "cannot be read")
    (folders.reference / "c1.nii.gz").write_bytes(b"no image")
    refused(folders, folders.reference / "c1.nii.gz", "cannot be read")
    assert "Traceback" not in "".join(capfd.readouterr())


def test_unreadable_file_for_nibabel(folders):
    folders.labels(LABELS, overwrite_image_reader_writer="NibabelIO")
    folders.add("c", *arrays(0))
    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 6, 4, 2), np.uint8), np.eye(4)), folders.prediction / "c.nii.gz")
    refused(folders, folders.prediction / "c.nii.gz", "cannot be read", "3d")


def test_colour_image(folders):
    folders.labels(LABELS, ".png")
    io.imsave(folders.reference / "c.png", np.zeros((5, 5), np.uint8), check_contrast=False)
    io.imsave(folders.prediction / "c.png", np.zeros((5, 5, 3), np.uint8), check_contrast=False)
    refused(folders, folders.prediction / "c.png", "3 channels")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("{", "not valid JSON"),
        ('{"labels": {"background": 0, "a": 1}}', '"file_ending"'),
        ('{"file_ending": ".nii.gz"}', '"labels"'),
        ('{"file_ending": ".nii.gz", "labels": {"0": "background", "1": "a"}}', '"0"'),
        ('{"file_ending": ".nii.gz", "labels": {"background": 0}}', "no label"),
        ('{"file_ending": ".nii.gz", "labels": {"background": 0, "a": 1, "ignore": [2, 3]}}', "ignore"),
        ("[]", '"labels"'),
    ],
)
def test_wrong_dataset_json(folders, content, word):
    folders.add("c", *arrays(0))
    folders.dataset_json.write_text(content)
    refused(folders, folders.dataset_json, word)


def test_wrong_folders(folders, tmp_path):
    refused(folders, folders.reference, "no file", ".nii.gz")
    folders.add("c", *arrays(0))
    refused(folders, "-np 0", processes=0)
    folders.output = folders.prediction
    refused(folders, "another output folder")
    folders.output = folders.dataset_json
    refused(folders, folders.dataset_json, "is a file")
    folders.output, folders.prediction = tmp_path / "out", tmp_path / "nothing"
    refused(folders, folders.prediction, "is not a folder")


def test_an_interrupted_run_leaves_the_old_files(folders, monkeypatch):
    folders.add("c", *arrays(0))
    folders.evaluate()
    before = (folders.output / "cases.csv").read_text()
    folders.add("c", *arrays(1))

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("csv.DictWriter.writerows", full)
    with pytest.raises(InputError, match=r"cases.csv cannot be written \(no space left"):
        folders.evaluate()
    assert (folders.output / "cases.csv").read_text() == before


# --------------------------------------------------------------------------------------------------------- command line


def test_missing_arguments(capsys):
    with pytest.raises(SystemExit) as end:
        cli.evaluate(["-ref", "r", "-o", "o"])
    assert end.value.code == 2 and "required: -pred, -djfile" in capsys.readouterr().err


def command(folders, *more):
    names = {"-ref": folders.reference, "-pred": folders.prediction, "-djfile": folders.dataset_json}
    return cli.evaluate([str(a) for pair in {**names, "-o": folders.output}.items() for a in pair] + list(more))


def test_command(folders, capsys):
    folders.add("c", *arrays(0))
    assert command(folders, "--largest_component", "-np", "1") == 0
    out = capsys.readouterr().out
    assert "largest component" in out and "95HD voxel" in out and str(folders.output / "cases.csv") in out
    assert f"Wrote {folders.output / 'cases.csv'}" in out and (folders.output / "summary.json").is_file()
    assert command(folders) == 0
    assert f"Replaced the earlier {folders.output / 'cases.csv'} and " in capsys.readouterr().out


def test_two_evaluations_are_compared(folders, capsys):
    """As a user does it: evaluate both with largest components, then --compare."""
    outputs = [folders.output, folders.output.with_name("better")]
    for seed in range(3):
        folders.add(f"c{seed}", *arrays(seed))
    assert command(folders, "--largest_component") == 0
    for seed in range(3):
        folders.add(f"c{seed}", arrays(seed)[0], arrays(seed)[0])
    folders.output = outputs[1]
    assert command(folders, "--largest_component") == 0
    capsys.readouterr()
    assert cli.evaluate(["--compare", *map(str, outputs)]) == 0
    out = capsys.readouterr().out
    assert out.count("mean over 2 labels") == 2 and out.count("100.0 ± 0.0") >= 3 and "3 of 3" in out


def test_command_with_wrong_input(folders, capsys):
    folders.add("c", *arrays(0))
    (folders.prediction / "c.nii.gz").unlink()
    assert command(folders) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "c.nii.gz" in err
    assert not folders.output.exists()


@QUICK
@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_summary_of_any_values(values):
    found = summarize([row(f"c{i}", "a", v) for i, v in enumerate(values)])["none"]["labels"]["a"]["jaccard"]
    assert found["mean"] == pytest.approx(np.mean(values)) and found["n"] == len(values) and found["failures"] == 0
