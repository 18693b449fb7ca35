import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_semisup import files
from nnunetv2_semisup.data import folders
from nnunetv2_semisup.data.folders import find_unlabeled_cases
from nnunetv2_semisup.errors import InputError

TWO_CHANNELS = {"channel_names": {"0": "MR", "1": "CT"}, "file_ending": ".nii.gz"}
ONE_CHANNEL = {"modality": {"0": "MR"}, "file_ending": ".nii.gz"}


def touch(folder: Path, *files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        (folder / file).touch()


def test_names_of_folder_and_manifest(tmp_path):
    assert folders.unlabeled_folder(tmp_path, "nnUNetPlans_2d") == tmp_path / "nnUNetPlans_2d_unlabeled"
    assert folders.manifest_file(str(tmp_path), "nnUNetPlans_2d") == tmp_path / "nnUNetPlans_2d_unlabeled.json"


def test_cases_and_channel_order(tmp_path):
    un = tmp_path / "imagesUn"
    touch(un, "b_0001.nii.gz", "b_0000.nii.gz", "a_1_0000.nii.gz", "a_1_0001.nii.gz", ".DS_Store", "._b_0000.nii.gz")
    touch(tmp_path / "imagesTr", "c_0000.nii.gz", "c_0001.nii.gz")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cases = find_unlabeled_cases(tmp_path, TWO_CHANNELS)
    assert list(cases) == ["a_1", "b"]
    assert cases["b"] == [str(un / "b_0000.nii.gz"), str(un / "b_0001.nii.gz")]
    assert cases["a_1"] == [str(un / "a_1_0000.nii.gz"), str(un / "a_1_0001.nii.gz")]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "imagesUn is empty: put the unlabelled images there"),
        ((".hidden_0000.nii.gz",), "imagesUn is empty"),
        (("a_0000.nii",), r"a_0000.nii does not end with .nii.gz"),
        (("a_0000.nii.gz", "notes.txt"), r"notes.txt does not end with .nii.gz"),
        (("a_0000.nii.gz", "a.json"), r"a.json does not end with .nii.gz"),
        (("a.nii.gz",), r"a.nii.gz is not named CASE_0000.nii.gz"),
        (("a_000.nii.gz",), "is not named"),
        (("_0000.nii.gz",), "is not named"),
        (("a_00x0.nii.gz",), "is not named"),
        (("a_seg_0000.nii.gz",), "ending with _seg"),
        (("a_0001.nii.gz",), "case a lacks channel 0000"),
        (("a_0000.nii.gz", "a_0001.nii.gz"), "case a has channel 0001, but a case has 1 here"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(tmp_path, files, message):
    touch(tmp_path / "imagesUn", *files)
    with pytest.raises(InputError, match=message) as error:
        find_unlabeled_cases(tmp_path, ONE_CHANNEL)
    assert str(tmp_path / "imagesUn") in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_folder(tmp_path):
    with pytest.raises(InputError, match=r"imagesUn does not exist: put .* CASE_0000.nii.gz"):
        find_unlabeled_cases(tmp_path, ONE_CHANNEL)


def test_folders_and_broken_links_are_named(tmp_path):
    touch(tmp_path / "imagesUn", "a_0000.nii.gz")
    (tmp_path / "imagesUn" / "dicom").mkdir()
    with pytest.raises(InputError, match="dicom is a folder, a broken link or a device"):
        find_unlabeled_cases(tmp_path, ONE_CHANNEL)
    (tmp_path / "imagesUn" / "dicom").rmdir()
    (tmp_path / "imagesUn" / "b_0000.nii.gz").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="b_0000.nii.gz is a folder, a broken link or a device"):
        find_unlabeled_cases(tmp_path, ONE_CHANNEL)


def test_one_missing_channel_among_several_cases(tmp_path):
    touch(tmp_path / "imagesUn", "a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz")
    with pytest.raises(InputError, match="case b lacks channel 0001"):
        find_unlabeled_cases(tmp_path, TWO_CHANNELS)


def test_labelled_case_is_refused(tmp_path):
    touch(tmp_path / "imagesUn", "a_0000.nii.gz", "b_0000.nii.gz")
    touch(tmp_path / "imagesTr", "b_0000.nii.gz", "c_0000.nii.gz")
    with pytest.raises(InputError, match=r"holds labelled cases \(b\)"):
        find_unlabeled_cases(tmp_path, ONE_CHANNEL)


def test_labelled_case_of_a_dataset_key_is_refused(tmp_path):
    touch(tmp_path / "imagesUn", "a_0000.nii.gz", "b_0000.nii.gz")
    listed = {"b": {"images": ["elsewhere/x.nii.gz"], "label": "elsewhere/y.nii.gz"}}
    with pytest.raises(InputError, match=r"holds labelled cases \(b\)"):
        find_unlabeled_cases(tmp_path, {**ONE_CHANNEL, "dataset": listed})
    listed["c"] = listed.pop("b")
    assert list(find_unlabeled_cases(tmp_path, {**ONE_CHANNEL, "dataset": listed})) == ["a", "b"]


def test_test_case_is_returned_with_a_warning(tmp_path):
    touch(tmp_path / "imagesUn", "a_0000.nii.gz", "b_0000.nii.gz")
    touch(tmp_path / "imagesTs", "b_0000.nii.gz", "c_0000.nii.gz")
    with pytest.warns(UserWarning, match=r"1 unlabelled cases are also in imagesTs \(b\).*transductive"):
        assert list(find_unlabeled_cases(tmp_path, ONE_CHANNEL)) == ["a", "b"]


def test_colour_images_hold_all_channels_in_one_file(tmp_path):
    colour = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "file_ending": ".png"}
    touch(tmp_path / "imagesTr", "t_0000.png")
    touch(tmp_path / "imagesUn", "a_0000.png")
    assert find_unlabeled_cases(tmp_path, colour) == {"a": [str(tmp_path / "imagesUn" / "a_0000.png")]}
    touch(tmp_path / "imagesUn", "a_0001.png")
    with pytest.raises(InputError, match="case a has channel 0001, but a case has 1 here"):
        find_unlabeled_cases(tmp_path, colour)


def test_tiff_has_its_voxel_size_beside_it(tmp_path):
    tiff = {"channel_names": {"0": "EM"}, "file_ending": ".tif"}
    touch(tmp_path / "imagesUn", "a_0000.tif", "a.json")
    assert list(find_unlabeled_cases(tmp_path, tiff)) == ["a"]
    touch(tmp_path / "imagesUn", "b.json")
    with pytest.raises(InputError, match="b.json belongs to no image"):
        find_unlabeled_cases(tmp_path, tiff)


def test_dataset_json_without_channels(tmp_path):
    touch(tmp_path / "imagesUn", "a_0000.nii.gz")
    with pytest.raises(InputError, match='no "channel_names"'):
        find_unlabeled_cases(tmp_path, {"file_ending": ".nii.gz"})


def test_a_reader_of_json_sees_the_old_or_the_new_file(tmp_path):
    file = tmp_path / "content.json"
    files.write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(file, {"a": object()})
    assert files.read_json(file, "") == {"a": 1}


def test_reading_json_names_file_and_remedy(tmp_path):
    with pytest.raises(InputError, match=r"none.json does not exist: run this"):
        files.read_json(tmp_path / "none.json", "run this")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(InputError, match=r"bad.json is not valid JSON \(.*\): run this"):
        files.read_json(tmp_path / "bad.json", "run this")


def test_hidden_files_that_nnunet_would_take_for_cases(tmp_path):
    """Such as macOS leaves on foreign disks."""
    touch(tmp_path / "imagesTr", "c_0000.nii.gz", ".DS_Store", "._c_0000.nii.gz")
    with pytest.raises(InputError, match=r"\._c_0000.nii.gz is a hidden file .* delete it, and its like by find '.*'"):
        folders.labelled_identifiers(tmp_path, ONE_CHANNEL)
    (tmp_path / "imagesTr" / "._c_0000.nii.gz").unlink()
    assert folders.labelled_identifiers(tmp_path, ONE_CHANNEL) == ["c"]


GOOD = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz"}


def entry(**changes):
    return {"images": ["imagesTr/a_0000.nii.gz"], "label": "labelsTr/a.nii.gz", **changes}


@pytest.mark.robustness
@pytest.mark.parametrize(
    "case",
    [
        "../a",
        "a/b",
        "/a",
        "..",
        ".",
        "",
        "a\\b",
        "a\nb",
        "a\0b",
        "a\ud800",
        "../../../site-packages/zz",
        "C:a",
        " ",
        "a\u202e",
    ],
)
def test_a_case_id_that_is_no_plain_file_name_is_refused(tmp_path, case):
    """Input: dataset.json with a case id that leads elsewhere. Answer: one line that names it; nothing is read."""
    with pytest.raises(InputError, match="is no plain file name: rename the case") as error:
        folders.check_dataset_json(GOOD | {"dataset": {case: entry()}}, tmp_path / "dataset.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", ["a", "Patient 7", "fall_ü-03.b", "李明", "it's", "a_0000", "x" * 200])
def test_names_of_people_and_other_scripts_are_plain(case, tmp_path):
    folders.check_dataset_json(GOOD | {"dataset": {case: entry()}}, tmp_path / "dataset.json")


@pytest.mark.robustness
@pytest.mark.parametrize("ending", ["nii.gz", ".nii/../x", "/etc", ".", "..gz", ".nii.gz ", 5, ["nii"], ".p\nth", "*"])
def test_a_file_ending_is_a_dot_with_letters_and_digits(tmp_path, ending):
    """Input: dataset.json whose file_ending is a path, has no dot, or is no text. Answer: one line that says so."""
    with pytest.raises(InputError, match="file_ending .* must be a dot with letters and digits"):
        folders.check_dataset_json(GOOD | {"file_ending": ending}, tmp_path / "dataset.json")


@pytest.mark.robustness
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": ["a"]}, "dataset must be"),
        ({"dataset": {"a": {"label": "x"}}}, 'case a must have "images"'),
        ({"dataset": {"a": entry(images="imagesTr/a_0000.nii.gz")}}, 'case a must have "images"'),
        ({"dataset": {"a": entry(images=[])}}, 'case a must have "images"'),
        ({"dataset": {"a": entry(label=None)}}, 'case a must have "images"'),
        ({"dataset": {"a": "imagesTr"}}, 'case a must have "images"'),
        ({"channel_names": "MR"}, "channel_names must be an object"),
        ({"channel_names": ["MR"]}, "channel_names must be an object"),
        ({"labels": ["organ"]}, "labels must be an object"),
        ({"labels": {}}, "has no labels"),
    ],
)
def test_a_dataset_json_of_another_form_is_refused_in_one_line(tmp_path, changes, message):
    """Input: dataset.json with a key of another type. Answer: one line with file, key and the form it must have."""
    with pytest.raises(InputError, match=message) as error:
        folders.check_dataset_json(GOOD | changes, tmp_path / "dataset.json")
    assert str(tmp_path / "dataset.json") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.robustness
@pytest.mark.parametrize("image", ["labelsTr/a.nii.gz", "./imagesTr/../labelsTr/a.nii.gz"])
def test_a_label_is_no_image_of_another_case(tmp_path, image):
    """Input: dataset.json that names the label of one case as the image of another. Answer: refused, both named."""
    content = GOOD | {"dataset": {"a": entry(), "b": entry(images=[image], label="labelsTr/b.nii.gz")}}
    with pytest.raises(InputError, match="case b names the label .* as an image"):
        folders.check_dataset_json(content, tmp_path / "dataset.json")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
        max_leaves=6,
    ),
    st.sampled_from(["channel_names", "labels", "file_ending", "dataset", "modality"]),
)
def test_any_content_is_accepted_or_refused_in_one_line(value, key):
    try:
        folders.check_dataset_json(GOOD | {key: value}, Path("dataset.json"))
        folders.check_dataset_json(value, Path("dataset.json"))
    except InputError as error:
        assert "\n" not in str(error)
