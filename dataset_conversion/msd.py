"""A task of the Medical Segmentation Decathlon as a dataset with labelled and unlabelled images.

    python dataset_conversion/msd.py --source Task04_Hippocampus -d 704 --labeled 4 --test 60

Reads a task as it is unpacked: imagesTr, labelsTr and dataset.json, which names classes and channels. Images with
several channels (BrainTumour, Prostate: four axes, the last one is the channel) are written as one file per channel.

The labels of the challenge's own test images (imagesTs) are secret, so these are not used: --test N takes N random
cases of the labelled ones for testing, --labeled N the first N of the others in random order; --seed decides, larger
numbers of labelled cases contain smaller ones. We know of no published division for semi-supervised training; where a
paper names its cases, --train and --test take files with one case per line, and the order of --train is kept.

Also reads a folder with images/ and labels/. In both forms, train.list and test.list beside the folders are taken where
--train and --test are not given. dataset.json may be absent for Hippocampus, if the folder is called so.

The labels of the other training cases are neither read nor written. Values and types of the images are kept.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import SimpleITK as sitk

if not __package__:  # run as a file: the repository root is not on the path then
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset_conversion import common
from dataset_conversion.common import Case, Recipe
from dataset_conversion.lists import choose_labelled, choose_test, is_number, read_list, require_present
from nnunetv2_semisup.data.checks import LABELLED, TEST, UNLABELLED
from nnunetv2_semisup.datasets import decathlon
from nnunetv2_semisup.datasets.decathlon import find_files, listed, named
from nnunetv2_semisup.datasets.images import packed
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.files import read_json

FOLDERS = {"challenge": ("imagesTr", "labelsTr"), "plain": ("images", "labels")}  # form -> folders
HIPPOCAMPUS = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "Anterior", "2": "Posterior"}}
DESCRIPTION = {
    "description": "A task of the Medical Segmentation Decathlon (MICCAI 2018)",
    "reference": "http://medicaldecathlon.com",
    "licence": "CC-BY-SA 4.0",
    "citation": [
        "Antonelli et al., The Medical Segmentation Decathlon, Nature Communications 13, 4128, 2022",
        "Simpson et al., A large annotated medical image dataset for the development and evaluation of segmentation "
        "algorithms, arXiv:1902.09063",
    ],
}


# --- reading --------------------------------------------------------------------------------------------------------


def find_form(source: Path) -> str:
    """Return "challenge" or "plain", by the folders in ``source``."""
    found = [form for form, (images, _) in FOLDERS.items() if (source / images).is_dir()]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"--source {source} has both imagesTr and images; give a folder with one of them")
    deeper = sorted(source.glob("*/imagesTr"))
    hint = f"; did you mean {deeper[0].parent}?" if deeper else f"; give the folder of one task{packed(source)}"
    raise InputError(f"--source {source} has neither imagesTr nor images{hint}")


def read_task(source: Path) -> tuple[str, dict]:
    """Name of the task, without its number, and content of its dataset.json."""
    name = re.sub(r"^Task\d+_", "", source.name)
    file = source / "dataset.json"
    if name.lower() == "hippocampus":
        name = "Hippocampus"
        if not file.exists():
            return name, HIPPOCAMPUS
    content = read_json(file, "put the dataset.json of the task's download there")
    if not isinstance(content, dict):
        raise InputError(f"{file} is not a description of a task; copy or download it again")
    return name, content


def read_case(
    case: Case, channels: int, values: Sequence[int]
) -> tuple[tuple[sitk.Image, ...], sitk.Image | None, str]:
    """Read a case; see ``common.Recipe`` and, for the other arguments, ``decathlon.read_case``."""
    images, label, same_place = decathlon.read_case(case.files[0], case.label_file, channels, values)
    return images, label, "" if same_place else "the label's header keeps no place, look at the previews"


# --- converting -----------------------------------------------------------------------------------------------------


def divide(cases: Sequence[str], train_list: Path | None, test_choice: str, seed: int) -> tuple[list[str], list[str]]:
    """Training cases in order and test cases.

    Args:
        cases: all cases.
        train_list: file naming the training cases; None: all that are not for testing, in random order.
        test_choice: number of cases, chosen among those that are not in ``train_list``, or a file naming them.
        seed: of the random order.
    """
    if train_list is None:
        return choose_test(test_choice, cases, seed)
    train = read_list(train_list)
    if unknown := sorted(set(train) - set(cases)):
        raise InputError(f"{train_list}: no images of {', '.join(unknown)}; correct the list, or complete the folder")
    if not is_number(test_choice) and (both := sorted({*train} & {*read_list(Path(test_choice))})):
        raise InputError(f"{test_choice}: also in {train_list}: {', '.join(both)}; a test case must not be trained on")
    return train, choose_test(test_choice, sorted({*cases} - {*train}), seed, left=0)[1]


def make_recipe(
    source: Path,
    labelled_choice: str,
    subset: int,
    test_choice: str | None = None,
    train_list: Path | None = None,
    seed: int = 0,
) -> Recipe:
    """What is read and written; see the module's text, and ``common.convert_source`` for the other arguments.

    Args:
        test_choice: number of test cases, or a file naming them; None: test.list in ``source``.
        train_list: file naming the training cases in order; None: train.list in ``source``, else a random order.
        seed: of the random order.
    """
    form = find_form(source)
    task, content = read_task(source)
    json_file = source / "dataset.json"
    channels = named(content, "modality", json_file)
    labels = {"background": 0} | {
        label: value for value, label in enumerate(named(content, "labels", json_file)) if value
    }
    images, label_files = (find_files(source / folder) for folder in FOLDERS[form])
    expected = listed(content, json_file) if form == "challenge" else []
    lack = f"cases that dataset.json lists are not in {FOLDERS[form][0]}"
    require_present(source, sorted({*expected} - {*images}), len(expected), lack, "complete the folder")

    if train_list is None and (source / "train.list").exists():
        train_list = source / "train.list"
    if test_choice is None:
        test_choice = str(source / "test.list")
        if not (source / "test.list").exists():
            raise InputError("--test is needed: the labels of the challenge's test images are secret; give --test N")
    train, test = divide(expected or list(images), train_list, test_choice, seed)
    labelled = choose_labelled(labelled_choice, train, subset)
    roles = {case: LABELLED if case in labelled else UNLABELLED for case in train} | dict.fromkeys(test, TEST)
    cases = common.cases_of(source, roles, images, label_files, f"cases lack the label in {FOLDERS[form][1]}")

    at_random = f"random, seed {seed}"
    division = {
        "training_cases": at_random if train_list is None else Path(train_list).name,
        "test_cases": at_random if is_number(test_choice) else Path(test_choice).name,
    }
    return Recipe(
        cases=cases,
        read=partial(read_case, channels=len(channels), values=tuple(labels.values())),
        channels=channels,
        labels=labels,
        description={"name": task, **DESCRIPTION},
        conversion={"source_form": form, **division},
        spacing_note="from the headers",
        rows=[("division", f"training cases: {division['training_cases']}; test cases: {division['test_cases']}")]
        + [("note", text) for text in not_used(source, images, roles)],
        separate_channels=True,
    )


def not_used(source: Path, images: Mapping[str, Path], roles: Mapping[str, str]) -> list[str]:
    """What to tell of images that are there and serve for nothing."""
    told = []
    if others := sorted({*images} - {*roles}):
        told.append(f"{len(others)} images are in no list and not used, e.g. {others[0]}")
    if (source / "imagesTs").is_dir() and (secret := find_files(source / "imagesTs")):
        told.append(f"{len(secret)} images of imagesTs are not used: their labels are secret")
    return told


convert = partial(common.convert_source, make_recipe, None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, 2 for wrong input, 130 for Ctrl-C."""
    labelled_help = "the first N training cases, all, or a file with one case per line"
    parser = common.make_parser(__doc__, None, labelled_help, "folder of the task, e.g. Task04_Hippocampus")
    add = parser.add_argument
    test_help = "number of test cases, or a file naming them (default: test.list in --source)"
    add("--test", dest="test_choice", metavar="N|FILE", help=test_help)
    train_help = "training cases in order (default: train.list, else random)"
    add("--train", dest="train_list", type=Path, metavar="FILE", help=train_help)
    add("--seed", type=int, default=0, help="of the random order (default: %(default)s)")
    return common.run_command(parser, convert, arguments)


if __name__ == "__main__":
    sys.exit(main())
