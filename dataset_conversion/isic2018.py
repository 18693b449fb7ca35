"""Skin lesions in photographs (ISIC 2018, task 1) as a 2D dataset with labelled and unlabelled images.

    python dataset_conversion/isic2018.py --source ISIC2018 -d 18 --labeled 259

Reads the folders as they are unpacked, in any depth: *Training_Input/ISIC_NNNNNNN.jpg and
*Training_GroundTruth/ISIC_NNNNNNN_segmentation.png (0 and 255), and the same with Validation and Test. Photographs are
written as PNG with three channels, values and size unchanged, masks as PNG with 0 and 1: nnU-Net's natural image
format, configuration 2d.

The challenge's parts are kept: training (2594), validation (100), test (1000). Where the test part is not at hand,
--test N takes N random training images instead (say so in a paper). We know of no published list of labelled images, so
--labeled N takes the first N of the training images in a random order that --seed decides; larger N contain smaller
ones. The masks of the other training images are neither read nor written.

Writes imagesTr labelsTr, imagesUn, imagesVal labelsVal (nnU-Net does not look there), imagesTs labelsTs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import SimpleITK as sitk
from skimage import io

if not __package__:  # run as a file: the repository root is not on the path then
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset_conversion import common
from dataset_conversion.common import Case, Recipe
from dataset_conversion.lists import choose_labelled, choose_test
from nnunetv2_semisup.data.checks import LABELLED, TEST, UNLABELLED, VALIDATION, check_label
from nnunetv2_semisup.data.reading import damaged, read_errors
from nnunetv2_semisup.datasets.images import packed, read_image, walk
from nnunetv2_semisup.errors import InputError

NAME = "ISIC2018"
LABELS = {"background": 0, "lesion": 1}
PUBLISHED = {"training": 2594, "validation": 100, "test": 1000}
PHOTOGRAPH, MASK = re.compile(r"(ISIC_\d{7})\.jpe?g", re.IGNORECASE), re.compile(r"(ISIC_\d{7})_segmentation\.png")
DESCRIPTION = {
    "name": "ISIC 2018 task 1",
    "description": "Skin lesions in dermoscopic photographs, International Skin Imaging Collaboration, MICCAI 2018",
    "reference": "https://challenge.isic-archive.com/data/#2018",
    "licence": "The challenge sets the terms: see the reference.",
    "citation": [
        "Codella et al., Skin Lesion Analysis Toward Melanoma Detection 2018: A Challenge Hosted by the International "
        "Skin Imaging Collaboration (ISIC), arXiv:1902.03368",
        "Tschandl, Rosendahl, Kittler, The HAM10000 dataset, Scientific Data 5, 180161, 2018",
    ],
}


def find_files(source: Path) -> tuple[dict[str, dict[str, Path]], dict[str, Path]]:
    """Part ("training", ...) -> ID -> photograph; ID -> mask."""
    images: dict[str, dict[str, Path]] = {part: {} for part in PUBLISHED}
    masks: dict[str, Path] = {}
    for path in walk(source):
        if match := MASK.fullmatch(path.name):
            if match[1] in masks:
                raise InputError(f"{path}: there is another {masks[match[1]]}; give one copy of the data")
            masks[match[1]] = path
        elif match := PHOTOGRAPH.fullmatch(path.name):
            part = next((part for part in PUBLISHED if part in path.parent.name.lower()), None)
            if part is None:
                raise InputError(
                    f"{path.parent}: no part of the challenge; its name must have Training, Validation or Test"
                )
            if any(match[1] in found for found in images.values()):
                raise InputError(f"{path}: {match[1]} is there twice; give one copy of the data")
            images[part][match[1]] = path
    if not images["training"]:
        raise InputError(
            f"--source {source} has no folder *Training_Input with ISIC_NNNNNNN.jpg; give the folder of the "
            f"challenge's folders{packed(source)}"
        )
    return images, masks


def read_case(case: Case) -> tuple[sitk.Image, sitk.Image | None, str]:
    """Read a case; see ``common.Recipe``."""
    path = case.files[0]
    with read_errors(damaged(path)):
        pixels = io.imread(path)  # nnU-Net's reader of photographs
    if pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise InputError(f"{path}: no colour photograph; copy or download it again")
    photograph = sitk.GetImageFromArray(pixels, isVector=True)
    if case.label_file is None:
        return photograph, None, ""
    mask = read_image(case.label_file)
    check_label(sitk.GetArrayViewFromImage(mask), photograph.GetSize()[::-1], (0, 255), case.label_file)
    label = sitk.Cast(mask > 0, sitk.sitkUInt8)
    label.CopyInformation(photograph)
    return photograph, label, ""


def make_recipe(
    source: Path, labelled_choice: str, subset: int, test_choice: str | None = None, seed: int = 0
) -> Recipe:
    """What is read and written; see the module's text, and ``common.convert_source`` for the other arguments.

    Args:
        test_choice: number of training images for testing, or a file naming them; None: the challenge's test part.
        seed: of the random order.
    """
    images, masks = find_files(source)
    if test_choice is None and not images["test"]:
        raise InputError(
            f"--source {source} has no folder *Test_Input; unpack it there, or give --test N{packed(source)}"
        )
    train, test = choose_test(test_choice or "0", list(images["training"]), seed)
    labelled = choose_labelled(labelled_choice, train, subset)
    roles = {case: LABELLED if case in set(labelled) else UNLABELLED for case in train}
    roles |= dict.fromkeys(images["validation"], VALIDATION) | dict.fromkeys(test or images["test"], TEST)
    photographs = {case: path for found in images.values() for case, path in found.items()}
    remedy = "unpack *_GroundTruth beside *_Input"
    cases = common.cases_of(source, roles, photographs, masks, "images lack their mask", remedy)
    notes = [
        ("note", f"{len(images[part])} {part} images, {number} were published")
        for part, number in PUBLISHED.items()
        if len(images[part]) != number
    ]
    published = "the challenge's" if images["test"] else "none"
    division = f"{len(test)} training images, seed {seed}" if test else published
    return Recipe(
        cases=cases,
        read=read_case,
        channels=["R", "G", "B"],
        labels=LABELS,
        description=DESCRIPTION,
        conversion={"test_part": division, "seed": seed},
        spacing_note="photographs have none",
        rows=[("test part", division), *notes],
        file_ending=".png",
    )


convert = partial(common.convert_source, make_recipe, NAME)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, 2 for wrong input, 130 for Ctrl-C."""
    labelled_help = "the first N training images in random order, all, or a file with one ID per line"
    parser = common.make_parser(__doc__, NAME, labelled_help, "folder with the challenge's folders")
    test_help = "test on training images (default: the challenge's test part)"
    add = parser.add_argument
    add("--test", dest="test_choice", metavar="N|FILE", help=test_help)
    add("--seed", type=int, default=0, help="of the random order (default: %(default)s)")
    return common.run_command(parser, convert, arguments)


if __name__ == "__main__":
    sys.exit(main())
