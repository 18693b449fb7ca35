import json
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunetv2_semisup.data.splits import ensure_splits, make_splits, unlabeled_of_fold
from nnunetv2_semisup.errors import InputError

names = st.text("abcXYZ019_-", min_size=1, max_size=6)


@given(st.sets(names, min_size=5, max_size=40))
def test_without_groups_it_is_nnunets_split(cases):
    assert make_splits(list(cases)) == generate_crossval_split(sorted(cases))


@given(
    st.dictionaries(names, st.sampled_from("pqrstuvw"), min_size=2, max_size=40),
    st.integers(2, 6),
    st.integers(0, 2**31),
    st.randoms(use_true_random=False),
)
def test_grouped_splits_partition_and_keep_patients_together(patient_of, n_splits, seed, random):
    patients = set(patient_of.values())
    if len(patients) == 1:
        return
    cases = list(patient_of)
    random.shuffle(cases)
    splits = make_splits(cases, patient_of, n_splits, seed)

    assert len(splits) == min(n_splits, len(patients))
    for split in splits:
        assert set(split) == {"train", "val"}
        assert sorted(split["train"] + split["val"]) == sorted(cases)
        assert split["train"] == sorted(split["train"]) and split["val"] == sorted(split["val"])
        train_patients, val_patients = ({patient_of[case] for case in split[side]} for side in ("train", "val"))
        assert train_patients and val_patients and not train_patients & val_patients
        assert len(val_patients) in (len(patients) // len(splits), -(-len(patients) // len(splits)))
    assert sorted(case for split in splits for case in split["val"]) == sorted(cases)
    assert make_splits(sorted(cases), patient_of, n_splits, seed) == splits


def test_groups_of_one_case_equal_no_groups():
    cases = [f"case_{i}" for i in range(12)]
    assert make_splits(cases, {case: case for case in cases}) == make_splits(cases)


def test_fewer_than_five_patients_are_left_out_one_by_one():
    patient_of = {"a1": "a", "a2": "a", "b1": "b", "c1": "c", "c2": "c"}
    assert make_splits(list(patient_of), patient_of) == [
        {"train": ["b1", "c1", "c2"], "val": ["a1", "a2"]},
        {"train": ["a1", "a2", "c1", "c2"], "val": ["b1"]},
        {"train": ["a1", "a2", "b1"], "val": ["c1", "c2"]},
    ]


def test_one_patient_is_both_sides_with_a_warning():
    with pytest.warns(UserWarning, match="One patient only \\(p\\)"):
        splits = make_splits(["frame2", "frame1"], {"frame1": "p", "frame2": "p"})
    assert splits == [{"train": ["frame1", "frame2"], "val": ["frame1", "frame2"]}]


def test_result_can_be_written_as_json():
    splits = make_splits([f"case_{i}" for i in range(7)])
    assert json.loads(json.dumps(splits)) == splits
    assert all(type(case) is str for split in splits for side in split.values() for case in side)


def test_wrong_input_is_named():
    with pytest.raises(InputError, match="no patient is given for b"):
        make_splits(["a", "b"], {"a": "p"})
    with pytest.raises(InputError, match="no labelled cases"):
        make_splits([])


@pytest.mark.parametrize("count", [2, 3, 4])
def test_ensure_splits_writes_what_stock_cannot(tmp_path, count):
    cases = [f"case_{i}" for i in range(count)]
    file = ensure_splits(tmp_path, cases)
    assert file == tmp_path / "splits_final.json"
    assert json.loads(file.read_text()) == make_splits(cases)
    assert len(json.loads(file.read_text())) == count
    assert list(tmp_path.iterdir()) == [file]


def test_ensure_splits_leaves_the_rest_to_stock(tmp_path):
    assert ensure_splits(tmp_path, [f"case_{i}" for i in range(5)]) is None
    assert not list(tmp_path.iterdir())
    file = tmp_path / "splits_final.json"
    file.write_text("[]")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ensure_splits(tmp_path, ["only"]) is None
    assert file.read_text() == "[]"


def write_splits(folder, *unlabeled):
    splits = [{"train": ["a"], "val": ["b"], **({} if u is None else {"unlabeled": u})} for u in unlabeled]
    (folder / "splits_final.json").write_text(json.dumps(splits))


def test_unlabeled_cases_of_a_fold(tmp_path):
    available = ["u3", "u1", "u2"]
    assert unlabeled_of_fold(tmp_path, 0, available) == ["u1", "u2", "u3"]  # no file
    write_splits(tmp_path, ["u3", "u1"], None)
    assert unlabeled_of_fold(tmp_path, 0, available) == ["u1", "u3"]
    assert unlabeled_of_fold(tmp_path, 1, available) == ["u1", "u2", "u3"]  # no key
    assert unlabeled_of_fold(tmp_path, 2, available) == ["u1", "u2", "u3"]  # nnU-Net draws such a fold at random
    assert unlabeled_of_fold(tmp_path, "all", available) == ["u1", "u2", "u3"]


@pytest.mark.parametrize(
    ("unlabeled", "message"),
    [
        (["u1", "zz", "yy"], "fold 0 names cases that are not in imagesUn: yy, zz"),
        ([], "fold 0 is empty"),
        ("u1", "fold 0 must be a list of case names, it is 'u1'"),
        ({"u1": 1}, "must be a list"),
        ([1, 2], "must be a list of case names"),
    ],
)
def test_wrong_unlabeled_lists_are_named(tmp_path, unlabeled, message):
    write_splits(tmp_path, unlabeled)
    with pytest.raises(InputError, match=message) as error:
        unlabeled_of_fold(tmp_path, 0, ["u1", "u2"])
    assert str(tmp_path / "splits_final.json") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "message"), [("[{", "not valid JSON"), ('{"train": []}', "must be a list of folds")])
def test_damaged_splits_file_is_named(tmp_path, text, message):
    (tmp_path / "splits_final.json").write_text(text)
    with pytest.raises(InputError, match=message):
        unlabeled_of_fold(tmp_path, 0, ["u1"])
