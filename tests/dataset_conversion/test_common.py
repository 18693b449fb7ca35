"""The engine that all converters use, on a data set of a few voxels."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conversion_helpers import names, read, refuse
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from dataset_conversion import common, lists
from dataset_conversion.common import Case, Options, Recipe
from nnunetv2_semisup.data.checks import LABELLED, TEST, UNLABELLED
from nnunetv2_semisup.datasets.images import read_image
from nnunetv2_semisup.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:One patient only")
ROLES = {"a": LABELLED, "b": LABELLED, "c": UNLABELLED, "d": TEST}


def read_case(case: Case, offset: int) -> tuple[sitk.Image, sitk.Image | None, str]:
    label = read_image(case.label_file) if case.label_file else None
    return read_image(case.files[0]) + offset, label, ""


def make_recipe(source: Path, offset: int = 0) -> Recipe:
    for number, name in enumerate(ROLES):
        for file, value in ((f"{name}.nrrd", number + 1), (f"{name}_label.nrrd", 1)):
            if not (source / file).exists():
                array = np.zeros((3, 4, 5), np.int16)
                array[1, 1, 1:3] = value
                sitk.WriteImage(sitk.GetImageFromArray(array), str(source / file))
    cases = [
        Case(name, role, (source / f"{name}.nrrd",), None if role == UNLABELLED else source / f"{name}_label.nrrd")
        for name, role in ROLES.items()
    ]
    return Recipe(cases, partial(read_case, offset=offset), ["MRI"], {"background": 0, "organ": 1}, {"name": "x"})


@pytest.fixture
def source(tmp_path) -> Path:
    (tmp_path / "source").mkdir()
    return (tmp_path / "source").resolve()


def convert(recipe: Recipe, source: Path, **options) -> str:
    return common.convert(recipe, source, 7, "X", Options(**options))


def test_files_and_previews(nnunet_raw, source):
    report = convert(make_recipe(source), source, previews=2)
    target = nnunet_raw / "Dataset007_X"
    assert {folder: names(target / folder) for folder in ("imagesTr", "imagesUn", "imagesTs", "previews")} == {
        "imagesTr": {"a", "b"}, "imagesUn": {"c"}, "imagesTs": {"d"}, "previews": {"a", "d"}
    }  # fmt: skip
    assert "0.002 ml on average" in report and not list(nnunet_raw.glob(".*"))


def test_previews_name_the_classes_of_the_data_set(nnunet_raw, source, monkeypatch):
    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k)))
    recipe = make_recipe(source)
    convert(recipe, source, previews=1)
    (figure,) = saved
    named = {text.get_text() for text in figure.legends[0].get_texts()}
    assert named and named <= set(recipe.labels)


def read_channels(case: Case) -> tuple[tuple[sitk.Image, ...], sitk.Image | None, str]:
    image, label, remark = read_case(case, 0)
    return (image, image + 7), label, remark


def test_one_file_per_channel(nnunet_raw, source):
    recipe = replace(make_recipe(source), read=read_channels, channels=["T1", "T2"], separate_channels=True)
    (source / "d.nrrd").rename(source / "elsewhere")
    (source / "d.nrrd").write_bytes(b"NRRD")
    refuse(nnunet_raw, r"\(3 cases are finished", convert, recipe, source)
    (source / "elsewhere").rename(source / "d.nrrd")
    (nnunet_raw / ".unfinished_Dataset007_X" / "imagesTr" / "a_0001.nii.gz").unlink()
    convert(recipe, source, previews=2)
    target = nnunet_raw / "Dataset007_X"
    for folder, case in (("imagesTr", "a"), ("imagesUn", "c"), ("imagesTs", "d")):
        first, second = (read(target / folder / f"{case}_{channel}.nii.gz")[0] for channel in ("0000", "0001"))
        np.testing.assert_array_equal(second, first + 7)
    assert len(list(target.glob("images*/*"))) == 8 and names(target / "previews") == {"a", "d"}


def test_only_what_is_finished_and_unchanged_is_kept(nnunet_raw, source):
    recipe = make_recipe(source)
    (source / "d.nrrd").write_bytes(b"NRRD")
    refuse(nnunet_raw, r"d.nrrd: damaged.*\(3 cases are finished and kept in", convert, recipe, source)
    (source / "a.nrrd").unlink()
    (source / "d.nrrd").unlink()
    make_recipe(source)
    sitk.WriteImage(read_image(source / "a.nrrd") + 50, str(source / "a.nrrd"))
    done = nnunet_raw / ".unfinished_Dataset007_X" / "imagesTr" / "b_0000.nii.gz"
    before = done.stat().st_mtime_ns
    convert(recipe, source)
    target = nnunet_raw / "Dataset007_X"
    assert (target / "imagesTr" / "b_0000.nii.gz").stat().st_mtime_ns == before
    assert read(target / "imagesTr" / "a_0000.nii.gz")[0].max() == 51


def test_another_way_of_reading_starts_over(nnunet_raw, source):
    make_recipe(source)
    (source / "d.nrrd").write_bytes(b"NRRD")
    refuse(nnunet_raw, "3 cases are finished", convert, make_recipe(source), source)
    (source / "d.nrrd").unlink()
    convert(make_recipe(source, offset=9), source)
    assert read(nnunet_raw / "Dataset007_X" / "imagesTr" / "b_0000.nii.gz")[0].min() == 9


def test_nothing_is_left_when_nothing_was_finished(nnunet_raw, source):
    recipe = make_recipe(source)
    (source / "a.nrrd").write_bytes(b"NRRD")
    refuse(nnunet_raw, "copy or download it again$", convert, recipe, source)
    assert list(nnunet_raw.iterdir()) == []


def test_two_conversions_at_once(nnunet_raw, source):
    """Whatever the name: one ID, one process."""
    with FileLock(str(nnunet_raw / ".unfinished_Dataset007.lock")):
        refuse(nnunet_raw, "another process is making Dataset007", convert, make_recipe(source), source)
    convert(make_recipe(source), source)


def test_the_id_is_locked_until_the_dataset_is_there(nnunet_raw, source, monkeypatch):
    publish = common.publish

    def while_published(folder, target):
        with pytest.raises(InputError, match="another process is making Dataset007"):
            common.convert(make_recipe(source), source, 7, "Y", Options())
        publish(folder, target)

    monkeypatch.setattr(common, "publish", while_published)
    convert(make_recipe(source), source)
    assert [path.name for path in nnunet_raw.iterdir()] == ["Dataset007_X"]


def unfinished(nnunet_raw, source) -> Path:
    """A conversion that failed at its last case."""
    recipe = make_recipe(source)
    intact = (source / "d.nrrd").read_bytes()
    (source / "d.nrrd").write_bytes(b"NRRD")
    refuse(nnunet_raw, "3 cases are finished", convert, recipe, source)
    (source / "d.nrrd").write_bytes(intact)
    return nnunet_raw / ".unfinished_Dataset007_X"


def test_a_file_too_many_is_not_published(nnunet_raw, source):
    """As a process that outlived its parent would leave it: the label of an unlabelled case."""
    folder = unfinished(nnunet_raw, source)
    (folder / "labelsTr" / "c.nii.gz").write_bytes(b"leak")
    refuse(nnunet_raw, "labelsTr/c.nii.gz is of no case of this call.*; remove", convert, make_recipe(source), source)


def test_litter_does_not_stop_a_conversion(nnunet_raw, source):
    """What a process killed while writing leaves, and file browsers."""
    folder = unfinished(nnunet_raw, source)
    for name in (f"{common.RECORDS}/a.json.4711.tmp", ".DS_Store", "imagesTr/._a_0000.nii.gz"):
        (folder / name).write_bytes(b"x")
    convert(make_recipe(source), source)
    target = nnunet_raw / "Dataset007_X"
    assert names(target / "imagesTr") == {"a", "b"} and not list(target.rglob(".*"))


@pytest.mark.parametrize("damage", ["label gone", "image empty", "record empty", "record of another kind"])
def test_what_was_written_must_still_be_there(damage, nnunet_raw, source):
    folder = unfinished(nnunet_raw, source)
    match damage:
        case "label gone":
            (folder / "labelsTr" / "a.nii.gz").unlink()
        case "image empty":
            (folder / "imagesTr" / "a_0000.nii.gz").write_bytes(b"")
        case "record empty":
            (folder / common.RECORDS / "a.json").write_bytes(b"")
        case "record of another kind":
            (folder / common.RECORDS / "a.json").write_text("[1]", encoding="utf-8")
    convert(make_recipe(source), source)
    for name in ("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz"):
        assert read(nnunet_raw / "Dataset007_X" / name)[0].shape == (5, 4, 3)


def test_nothing_is_lost_when_publishing_fails(nnunet_raw, source, monkeypatch):
    def failing(folder, target):
        raise OSError("no such luck")

    with monkeypatch.context() as patch:
        patch.setattr(common, "publish", failing)
        refuse(nnunet_raw, r"no such luck \(4 cases are finished and kept", convert, make_recipe(source), source)
    calls = []
    monkeypatch.setattr(common, "write_image", lambda *arguments: calls.append(arguments))
    convert(make_recipe(source), source)
    assert not calls and [path.name for path in nnunet_raw.iterdir()] == ["Dataset007_X"]
    assert not list((nnunet_raw / "Dataset007_X").glob(".*"))


def test_another_number_of_previews_keeps_finished_cases(nnunet_raw, source, monkeypatch):
    folder = unfinished(nnunet_raw, source)
    before = (folder / "imagesTr" / "a_0000.nii.gz").stat().st_mtime_ns
    convert(make_recipe(source), source, previews=1)
    target = nnunet_raw / "Dataset007_X"
    assert (target / "imagesTr" / "a_0000.nii.gz").stat().st_mtime_ns == before
    assert names(target / "previews") == {"a"}


def test_nothing_of_another_call_stays(nnunet_raw, source, capsys):
    folder = unfinished(nnunet_raw, source)
    (folder / "patients.csv").write_text("x", encoding="utf-8")
    convert(make_recipe(source, offset=9), source)
    assert "had 3 finished cases of another call" in capsys.readouterr().err
    assert not (nnunet_raw / "Dataset007_X" / "patients.csv").exists()


@given(st.integers(2, 40), st.data())
def test_random_division(number, data):
    cases = [f"case{i}" for i in range(number)]
    size, seed = data.draw(st.integers(0, number - 1)), data.draw(st.integers(0, 3))
    train, test = lists.choose_test(str(size), cases, seed)
    assert len(test) == size and sorted(train + test) == sorted(cases)
    assert (train, test) == lists.choose_test(str(size), cases[::-1], seed)


def test_labelled_choice():
    assert lists.choose_labelled("all", ["a", "b"]) == ["a", "b"]
    with pytest.raises(InputError, match="must be 1 to 2"):
        lists.choose_labelled("3", ["a", "b"])


@given(st.integers(1, 30), st.data())
def test_subsets_are_disjoint_and_together_the_list(number, data):
    cases = [f"case{i}" for i in range(number)]
    size = data.draw(st.integers(1, number))
    subsets = [lists.choose_labelled(str(size), cases, k) for k in range(number // size)]
    assert all(len(subset) == size for subset in subsets)
    assert [case for subset in subsets for case in subset] == cases[: size * len(subsets)]
    for wrong in (-1, len(subsets)):
        with pytest.raises(InputError, match=f"--subset {wrong}: .*give 0 to {len(subsets) - 1}$"):
            lists.choose_labelled(str(size), cases, wrong)


@pytest.mark.parametrize("choice", ["all", "list.txt"])
def test_only_a_number_has_subsets(choice, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("list.txt").write_text("a\n", encoding="utf-8")
    assert "a" in lists.choose_labelled(choice, ["a", "b"], 0)
    with pytest.raises(InputError, match="--subset 1: only a number"):
        lists.choose_labelled(choice, ["a", "b"], 1)


def test_list_written_by_the_windows_editor(tmp_path):
    (tmp_path / "list.txt").write_text("b\r\na\r\n", encoding="utf-8-sig")
    assert lists.choose_labelled(str(tmp_path / "list.txt"), ["a", "b"]) == ["b", "a"]


def test_archives_are_named_where_cases_are_missing(tmp_path):
    (tmp_path / "labels.zip").write_bytes(b"")
    with pytest.raises(InputError, match=r"1 of 2 cases lack it: a; complete; .*/labels.zip is there: unpack first$"):
        lists.require_present(tmp_path, ["a"], 2, "cases lack it", "complete")
