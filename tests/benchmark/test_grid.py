"""From blocks to runs."""

import pytest

from nnunetv2_semisup.benchmark import grid
from nnunetv2_semisup.errors import InputError

BLOCK = {"datasets": [504, 508], "trainers": ["nnUNetTrainer", "nnUNetTrainerMeanTeacher"], "epochs": 5}


def names(dataset: str) -> str:
    return dataset if dataset.startswith("Dataset") else f"Dataset{dataset}_LA"


def test_a_block_is_a_product_with_all_trainers_of_a_seed_together():
    runs = grid.expand([{**BLOCK, "seeds": [0, 1], "plans": "cpu"}], names, "here")
    assert len(runs) == len({run.id for run in runs}) == 8
    assert [(r.dataset[7:10], r.seed, r.trainer[13:]) for r in runs[:4]] == [
        ("504", 0, ""),
        ("504", 0, "MeanTeacher"),
        ("504", 1, ""),
        ("504", 1, "MeanTeacher"),
    ]
    assert {r.plans for r in runs} == {"cpu"} and {r.fold for r in runs} == {"all"}
    assert {r.configuration for r in runs} == {"3d_fullres"} and {r.inference for r in runs} == {("nnunet",)}


def test_names():
    run = grid.expand([{**BLOCK, "datasets": 504, "epochs": [1, 20], "fold": 0}], names, "here")
    assert [r.trainer_name for r in run[::2]] == ["nnUNetTrainer_1epoch", "nnUNetTrainerMeanTeacher_1epoch"]
    assert run[1].id == "Dataset504_LA__nnUNetTrainer_20epochs__nnUNetPlans__3d_fullres__fold_0__seed0"


def test_blocks_that_overlap_give_one_run_with_the_inferences_of_both():
    blocks = [{**BLOCK, "datasets": "504"}, {**BLOCK, "datasets": "Dataset504_LA", "inference": ["literature"]}]
    runs = grid.expand(blocks, names, "here")
    assert [r.inference for r in runs] == [("nnunet", "literature")] * 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trainer": "x"}, ("block 1", "'trainer'", "trainers")),
        ({"epochs": "five"}, ("epochs", "'five'")),
        ({"epochs": True}, ("epochs", "True")),
        ({"epochs": 0}, ("epochs", "less than 1")),
        ({"seeds": [-1]}, ("seeds", "negative")),
        ({"seeds": []}, ("seeds", "empty")),
        ({"fold": "some"}, ("fold", "'some'")),
        ({"trainers": "nnUNetTrainer_5epochs"}, ("suffix", "epochs")),
        ({"inference": "best"}, ("'best'", "nnunet, literature")),
        ({"plans": [None]}, ("plans", "None")),
    ],
)
def test_wrong_blocks(change, words):
    with pytest.raises(InputError) as error:
        grid.expand([BLOCK | change], names, "file.yaml")
    for word in ("file.yaml", *words):
        assert word in str(error.value)


@pytest.mark.parametrize("key", ["datasets", "trainers", "epochs"])
def test_missing_keys(key):
    with pytest.raises(InputError, match=f"{key} is missing"):
        grid.expand([{k: v for k, v in BLOCK.items() if k != key}], names, "here")


@pytest.mark.parametrize("text", ["", "datasets: 504", "- [1, 2]", "- datasets: [504"])
def test_wrong_files(tmp_path, text):
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(InputError, match="grid.yaml"):
        grid.read(tmp_path / "grid.yaml")


def test_numbers_are_read_as_they_are_written(tmp_path):
    (tmp_path / "grid.yaml").write_text('- {datasets: 027, trainers: nnUNetTrainer, epochs: [5, "010"]}')
    runs = grid.expand(grid.read(tmp_path / "grid.yaml"), lambda dataset: f"Dataset{dataset}_X", "here")
    assert [(run.dataset, run.epochs) for run in runs] == [("Dataset027_X", 5), ("Dataset027_X", 10)]


def test_no_file(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        grid.read(tmp_path / "grid.yaml")
