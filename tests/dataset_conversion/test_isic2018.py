"""The ISIC converter on miniature photographs; the photographs go through preprocessing and a training step."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conversion_helpers import names, refuse, verify
from helpers import make_configuration, make_plans
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from skimage import io

from dataset_conversion import isic2018
from nnunetv2_semisup import trainers
from nnunetv2_semisup.data.preprocess import preprocess_unlabeled
from nnunetv2_semisup.training.streams import end_augmenters

pytestmark = pytest.mark.filterwarnings("ignore:One patient only")
PARTS = {"Training": range(6), "Validation": [6], "Test": [7, 8]}


def identifier(number: int) -> str:
    return f"ISIC_{number:07d}"


@pytest.fixture
def source(tmp_path) -> Path:
    """The challenge's folders; photographs of different sizes, wider than high."""
    for part, numbers in PARTS.items():
        images = tmp_path / "source" / f"ISIC2018_Task1-2_{part}_Input"
        masks = tmp_path / "source" / f"ISIC2018_Task1_{part}_GroundTruth"
        for folder in (images, masks):
            folder.mkdir(parents=True)
            (folder / "ATTRIBUTION.txt").write_text("x")
        for number in numbers:
            generator = np.random.default_rng(number)
            shape = (40 + number, 52)
            mask = np.zeros(shape, np.uint8)
            mask[10:30, 15 : 30 + number] = 255
            photograph = generator.integers(0, 80, (*shape, 3)) + (mask[..., None] // 2) * np.array([1, 0.5, 0.2])
            io.imsave(images / f"{identifier(number)}.jpg", photograph.astype(np.uint8), check_contrast=False)
            io.imsave(masks / f"{identifier(number)}_segmentation.png", mask, check_contrast=False)
    return tmp_path / "source"


def test_every_pixel_arrives_where_it_was(nnunet_raw, source):
    report = isic2018.convert(source, 18, "2")
    target = nnunet_raw / "Dataset018_ISIC2018"
    assert verify(target)["channel_names"] == {"0": "R", "1": "G", "2": "B"}
    assert names(target / "imagesTs") == {identifier(7), identifier(8)}
    assert names(target / "imagesVal") == {identifier(6)}
    assert len(names(target / "imagesTr")) == 2 and names(target / "labelsTr") == names(target / "imagesTr")
    assert names(target / "imagesTr") | names(target / "imagesUn") == {identifier(number) for number in range(6)}
    for file in target.glob("images*/*.png"):
        case = file.name.removesuffix("_0000.png")
        original = next(source.glob(f"*/{case}.jpg"))
        np.testing.assert_array_equal(io.imread(file), io.imread(original))
        mask = target / file.parent.name.replace("images", "labels") / f"{case}.png"
        assert mask.exists() == (file.parent.name != "imagesUn")
        if mask.exists():
            expected = io.imread(next(source.glob(f"*/{case}_segmentation.png"))) // 255
            np.testing.assert_array_equal(io.imread(mask), expected)
    assert "6 training images, 2594 were published" in report and "% of the image" in report


def test_without_the_test_part(nnunet_raw, source):
    for folder in source.glob("*Test*"):
        folder.rename(folder.with_name("." + folder.name))
    refuse(nnunet_raw, "no folder .Test_Input; unpack it there, or give --test N", isic2018.convert, source, 18, "2")
    isic2018.convert(source, 18, "2", "3")
    target = nnunet_raw / "Dataset018_ISIC2018"
    assert [len(names(target / folder)) for folder in ("imagesTr", "imagesUn", "imagesTs")] == [2, 1, 3]
    isic2018.convert(source, 19, "2", "0")
    content = json.loads((nnunet_raw / "Dataset019_ISIC2018" / "dataset.json").read_text())
    assert content["conversion"]["test_part"] == "none"


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        ("no mask", "1 of 9 images lack their mask: ISIC_0000007"),
        ("cut photograph", "ISIC_0000003.jpg: damaged or incomplete"),
        ("empty photograph", "ISIC_0000003.jpg: damaged or incomplete .*; copy or download it again"),
        ("grey photograph", "ISIC_0000003.jpg: no colour photograph"),
        ("mask value", "ISIC_0000007_segmentation.png: unexpected label value 7"),
        ("mask size", "ISIC_0000007_segmentation.png: the label has shape"),
        ("part", "no part of the challenge"),
        ("twice", "ISIC_0000003 is there twice"),
        ("mask twice", "ISIC_0000007_segmentation.png: there is another"),
        ("nothing", "has no folder .*Training_Input with .*; .*x.zip is there: unpack first"),
    ],
)
def test_wrong_input(damage, match, nnunet_raw, source):
    photograph = next(source.glob("*/ISIC_0000003.jpg"))
    mask = next(source.glob("*/ISIC_0000007_segmentation.png"))
    match damage:
        case "no mask":
            mask.unlink()
        case "cut photograph":
            photograph.write_bytes(photograph.read_bytes()[:-100])
        case "empty photograph":
            photograph.write_bytes(b"")
        case "grey photograph":
            io.imsave(photograph, np.zeros((9, 9), np.uint8), check_contrast=False)
        case "mask value":
            io.imsave(mask, np.full((47, 52), 7, np.uint8), check_contrast=False)
        case "mask size":
            io.imsave(mask, np.zeros((52, 47), np.uint8), check_contrast=False)
        case "part":
            photograph.parent.rename(source / "more")
        case "twice":
            (source / "Test_copy").mkdir()
            (source / "Test_copy" / photograph.name).write_bytes(photograph.read_bytes())
        case "mask twice":
            (source / "GroundTruth_old").mkdir()
            (source / "GroundTruth_old" / mask.name).write_bytes(mask.read_bytes())
        case "nothing":
            source = source / "ISIC2018_Task1_Test_GroundTruth"
            (source / "x.zip").write_bytes(b"")
    refuse(nnunet_raw, match, isic2018.convert, source, 18, "2")


def test_photographs_are_preprocessed_and_trained_on(nnunet_raw, source, tmp_path):
    """Labelled cases by nnU-Net, unlabelled ones by us, then one step of a semi-supervised trainer in 2d."""
    isic2018.convert(source, 18, "2")
    raw = nnunet_raw / "Dataset018_ISIC2018"
    preprocessed = tmp_path / "nnUNet_preprocessed" / raw.name
    (preprocessed / "nnUNetPlans_2d").mkdir(parents=True)
    dataset_json = json.loads((raw / "dataset.json").read_text())
    plans = make_plans(raw.name)
    plans["image_reader_writer"] = "NaturalImage2DIO"
    plans["configurations"] = {"2d": make_configuration(2)}
    plans["configurations"]["2d"] |= {
        "normalization_schemes": ["ZScoreNormalization"] * 3,
        "use_mask_for_norm": [False] * 3,
    }
    plans["original_median_spacing_after_transp"] = [999, 1, 1]
    plans["foreground_intensity_properties_per_channel"] = dict.fromkeys(
        "012", plans["foreground_intensity_properties_per_channel"]["0"]
    )
    for name, content in (
        ("dataset.json", dataset_json),
        ("nnUNetPlans.json", plans),
        ("dataset_fingerprint.json", {}),
    ):
        (preprocessed / name).write_text(json.dumps(content))
    manager = PlansManager(plans)
    for case in names(raw / "imagesTr"):
        DefaultPreprocessor(verbose=False).run_case_save(
            str(preprocessed / "nnUNetPlans_2d" / case),
            [str(raw / "imagesTr" / f"{case}_0000.png")],
            str(raw / "labelsTr" / f"{case}.png"),
            manager,
            manager.get_configuration("2d"),
            dataset_json,
        )
    ready = preprocess_unlabeled(raw.name, "nnUNetPlans", "2d", 1, log=lambda text: None)
    assert set(ready) == names(raw / "imagesUn") and len(ready) == 4

    plans["continue_training"] = False
    trainer = trainers.nnUNetTrainerMeanTeacher(plans, "2d", "all", dataset_json, torch.device("cpu"))
    trainer.initialize()
    trainer.on_train_start()
    try:
        batch = next(trainer.dataloader_train)
        assert batch["data"].shape[1] == batch["unlabelled"]["data"].shape[1] == 3
        before = [parameter.detach().clone() for parameter in trainer.network.parameters()]
        result = trainer.train_step(batch)
        assert np.isfinite(result["loss"])
        assert any(not torch.equal(a, b) for a, b in zip(before, trainer.network.parameters(), strict=True))
    finally:
        end_augmenters(trainer.dataloader_train, trainer.dataloader_val)


def test_main(nnunet_raw, source, capsys):
    arguments = ["--source", str(source), "-d", "18", "--labeled", "all", "-np", "1", "--previews", "2"]
    assert isic2018.main(arguments) == 0
    previews = sorted((nnunet_raw / "Dataset018_ISIC2018" / "previews").iterdir())
    assert len(previews) == 2 and sitk.ReadImage(str(previews[0])).GetSize()[0] > 100
    assert isic2018.main([*arguments[:-1], "-1"]) == 2
    assert "--previews -1" in capsys.readouterr().err
