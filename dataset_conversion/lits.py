"""Liver and liver tumours in CT (LiTS, ISBI and MICCAI 2017) as a dataset with labelled and unlabelled images.

    python dataset_conversion/lits.py --source LiTS -d 131 --labeled 13 --test 26

Reads volume-N.nii and segmentation-N.nii (or .nii.gz) of the 131 training scans, in folders of any depth. The
challenge's test scans (test-volume-N.nii) have no public labels and are not used.

We know of no published division for semi-supervised training: --test N takes N random scans for testing, --labeled N
the first N of the others; --seed decides the random order, larger numbers of labelled scans contain smaller ones. Or
name the scans, one volume-N per line, in a file. The labels of the other scans are neither read nor written.

--structures both (default): 1 liver, 2 tumour; liver: 1 liver with its tumours. HU are kept: the channel is called CT.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import SimpleITK as sitk

if not __package__:  # run as a file: the repository root is not on the path then
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset_conversion import common
from dataset_conversion.common import Case, Recipe
from dataset_conversion.lists import choose_labelled, choose_test
from nnunetv2_semisup.data.checks import LABELLED, TEST, UNLABELLED
from nnunetv2_semisup.datasets.images import (
    align_label,
    orientation,
    packed,
    read_image,
    read_label,
    walk,
)
from nnunetv2_semisup.errors import InputError

NAME = "LiTS"
LABELS = {"both": {"background": 0, "liver": 1, "tumour": 2}, "liver": {"background": 0, "liver": 1}}
PUBLISHED = 131
FILE = re.compile(r"(volume|segmentation)-(\d+)\.nii(\.gz)?")
DESCRIPTION = {
    "name": "LiTS",
    "description": "Liver and liver tumours in CT, Liver Tumor Segmentation Challenge (ISBI and MICCAI 2017)",
    "reference": "https://competitions.codalab.org/competitions/17094",
    "licence": "The challenge sets the terms: see the reference.",
    "citation": [
        "Bilic et al., The Liver Tumor Segmentation Benchmark (LiTS), Medical Image Analysis 84, 102680, 2023",
    ],
}


def find_files(source: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """``volume-N`` -> image; ``volume-N`` -> label."""
    found: dict[str, dict[str, Path]] = {"volume": {}, "segmentation": {}}
    for path in walk(source):
        if match := FILE.fullmatch(path.name):
            case = f"volume-{match[2]}"
            if case in found[match[1]]:
                raise InputError(f"{path}: there is another {found[match[1]][case]}; give one copy of the data")
            found[match[1]][case] = path
    if not found["volume"]:
        raise InputError(
            f"--source {source} has no volume-N.nii; give the folder of the training scans{packed(source)}"
        )
    return found["volume"], found["segmentation"]


def read_case(case: Case, structures: str) -> tuple[sitk.Image, sitk.Image | None, str]:
    """Read a case; see ``common.Recipe``."""
    image = read_image(case.files[0])
    if case.label_file is None:
        return image, None, ""
    source = read_label(case.label_file, (0, 1, 2))
    label, same_place = align_label(source, image, case.label_file, case.files[0])
    if not same_place and orientation(source) != orientation(image):
        raise InputError(
            f"{case.label_file}: its header has axes {orientation(source)} and no place, the image has "
            f"{orientation(image)}, so which way round it belongs is unknown; correct the header"
        )
    if structures == "liver":
        label = label > 0
    return image, label, "" if same_place else "the label's header keeps no place, look at the previews"


def make_recipe(
    source: Path, labelled_choice: str, subset: int, test_choice: str, structures: str = "both", seed: int = 0
) -> Recipe:
    """What is read and written; see the module's text, and ``common.convert_source`` for the other arguments.

    Args:
        test_choice: number of test scans, or a file naming them.
        structures: "both" or "liver".
        seed: of the random order.
    """
    images, labels = find_files(source)
    train, test = choose_test(test_choice, list(images), seed)
    labelled = choose_labelled(labelled_choice, train, subset)
    roles = {case: LABELLED if case in labelled else UNLABELLED for case in train} | dict.fromkeys(test, TEST)
    counted = [("note", f"{len(images)} scans, {PUBLISHED} were published")] if len(images) != PUBLISHED else []
    return Recipe(
        cases=common.cases_of(source, roles, images, labels, "scans lack segmentation-N.nii"),
        read=partial(read_case, structures=structures),
        channels=["CT"],
        labels=LABELS[structures],
        description=DESCRIPTION,
        conversion={"structures": structures, "seed": seed},
        spacing_note="from the headers",
        rows=[("division", f"random, seed {seed}"), *counted],
    )


convert = partial(common.convert_source, make_recipe, NAME)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, 2 for wrong input, 130 for Ctrl-C."""
    labelled_help = "the first N training scans in random order, all, or a file with one volume-N per line"
    parser = common.make_parser(__doc__, NAME, labelled_help, "folder with the scans, in any depth")
    add = parser.add_argument
    test_help = "number of test scans, or a file naming them"
    add("--test", dest="test_choice", required=True, metavar="N|FILE", help=test_help)
    add("--structures", choices=list(LABELS), default="both", help="default: %(default)s")
    add("--seed", type=int, default=0, help="of the random order (default: %(default)s)")
    return common.run_command(parser, convert, arguments)


if __name__ == "__main__":
    sys.exit(main())
