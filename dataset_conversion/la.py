"""Left atrium MRI (2018 Atrial Segmentation Challenge) as a dataset with labelled and unlabelled images.

    python dataset_conversion/la.py --source "data/2018LA_Seg_Training Set" -d 508 --labeled 8

Two forms of the same 100 scans can be read; which one it is, is found out:

  h5    <ID>/mri_norm2.h5 with `image` (float32) and `label` (uint8; 1 = left atrium), axis order (x, y, z): the files
        published with UA-MT, which the semi-supervised literature uses. Each scan was standardised and then cropped in
        x and y around its label, test cases too, so results are not comparable with results on whole scans.
  nrrd  <ID>/lgemri.nrrd and <ID>/laendo.nrrd (255 = left atrium): the challenge's training set, whole scans, with the
        geometry of the headers.

80 cases are for training and 20 for testing, as listed in splits/la_train.txt and splits/la_test.txt. --labeled N takes
the first N training cases as labelled ones, as the literature does (4, 8 and 16 are usual, 80 is the upper bound). The
labels of the other training cases are neither read nor written. One number of labelled cases = one dataset ID.

Writes $nnUNet_raw/DatasetXXX_LA with
  imagesTr labelsTr    labelled cases
  imagesUn             unlabelled cases
  imagesTs labelsTs    test cases, never to be used for a choice
  dataset.json splits_final.json

Spacing: the h5 files carry none. The challenge states 0.625 mm in all axes, which is assumed. The data itself points to
about 1.25 mm in z: the mean label is 224157 voxels, 54.7 ml at 0.625 mm but 109.5 ml with 1.25 mm in z, the usual size
in this disease, and all three axes look interpolated by about the same factor. With either, all cases have the same
spacing, so nnU-Net does not resample for 2d and 3d_fullres; what changes is the patch it plans and every distance in
mm. Report distances in voxels, as the literature does, or say which spacing was assumed.

Orientation of the h5 form: axis 0 runs from the patient's right to left, axis 1 from anterior to posterior, axis 2 from
inferior to superior (judged by the anatomy), which is the identity direction of NIfTI as SimpleITK writes it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk

if not __package__:  # run as a file: the repository root is not on the path then
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset_conversion import common
from dataset_conversion.common import Case, Recipe
from dataset_conversion.h5 import array_to_image, check_spacing, read_h5_arrays, require_h5py
from dataset_conversion.lists import LISTS, choose_labelled, read_list, require_present
from nnunetv2_semisup.data.checks import LABELLED, TEST, UNLABELLED, check_image, check_label
from nnunetv2_semisup.datasets.images import packed, read_image, require_same_geometry
from nnunetv2_semisup.errors import InputError

NAME = "LA"
LABELS = {"background": 0, "left atrium": 1}
STATED_SPACING = (0.625, 0.625, 0.625)  # mm, challenge description
FILES = {"h5": ("mri_norm2.h5", "mri_norm2.h5"), "nrrd": ("lgemri.nrrd", "laendo.nrrd")}  # image, label
FOREGROUND = {"h5": 1, "nrrd": 255}
DESCRIPTION = {
    "name": "LA",
    "description": "Left atrium in late gadolinium-enhanced MRI, 2018 Atrial Segmentation Challenge (MICCAI 2018)",
    "reference": "https://www.cardiacatlas.org/atriaseg2018-challenge",
    "licence": "The challenge sets the terms: see the reference. For research only; do not pass the images on.",
    "citation": [
        "Xiong et al., A Global Benchmark of Algorithms for Segmenting Late Gadolinium-Enhanced Cardiac Magnetic "
        "Resonance Imaging, Medical Image Analysis, 2020",
        "Yu et al., Uncertainty-aware Self-ensembling Model for Semi-supervised 3D Left Atrium Segmentation, MICCAI "
        "2019 (split, h5 files)",
    ],
}


@dataclass(frozen=True)
class Cases:
    """IDs of the cases by their role; ``missing_test`` are listed but not there."""

    labelled: list[str]
    unlabelled: list[str]
    test: list[str]
    missing_test: list[str]


# --- reading --------------------------------------------------------------------------------------------------------


def find_form(source: Path) -> str:
    """Return "h5" or "nrrd", by the files in the case folders of ``source``."""
    found = [form for form, (image, _) in FILES.items() if next(source.glob(f"*/{image}"), None)]
    if found == ["h5"]:
        require_h5py()
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(
            f"--source {source} has both <ID>/mri_norm2.h5 and <ID>/lgemri.nrrd; give a folder with one form"
        )
    deeper = [path.parents[1] for image, _ in FILES.values() for path in source.glob(f"*/*/{image}")]
    hint = f"; did you mean {deeper[0]}?" if deeper else f"; give the folder of the case folders{packed(source)}"
    raise InputError(f"--source {source} has neither <ID>/mri_norm2.h5 nor <ID>/lgemri.nrrd{hint}")


def is_present(source: Path, form: str, case: str, with_label: bool) -> bool:
    """Whether the files of ``case`` that will be read exist."""
    image, label = FILES[form]
    names = (image, label) if with_label else (image,)
    return all((source / case / name).is_file() for name in names)


def read_h5_case(folder: Path, with_label: bool, spacing: Sequence[float]) -> tuple[sitk.Image, sitk.Image | None]:
    """Read a case of the h5 form.

    Args:
        folder: case folder.
        with_label: False leaves the label dataset unopened.
        spacing: x, y, z in mm.

    Returns:
        image (float32) and label (uint8, 0 and 1) or None.
    """
    path = folder / FILES["h5"][0]
    arrays = read_h5_arrays(path, ("image", "label") if with_label else ("image",))
    check_image(arrays[0], path)
    image = array_to_image(arrays[0].astype(np.float32, copy=False), spacing)
    if not with_label:
        return image, None
    return image, array_to_image(binary_label(arrays[1], arrays[0].shape, "h5", path), spacing)


def read_nrrd_case(folder: Path, with_label: bool) -> tuple[sitk.Image, sitk.Image | None]:
    """Read a case of the nrrd form.

    Args:
        folder: case folder.
        with_label: False leaves the label file unopened.

    Returns:
        image (type and geometry of the file) and label (uint8, 0 and 1) or None.
    """
    image_path, label_path = (folder / name for name in FILES["nrrd"])
    image = read_image(image_path, "NrrdImageIO")
    array = sitk.GetArrayViewFromImage(image)
    check_image(array, image_path)
    if not with_label:
        return image, None
    source = read_image(label_path, "NrrdImageIO")
    label = sitk.GetImageFromArray(binary_label(sitk.GetArrayViewFromImage(source), array.shape, "nrrd", label_path))
    require_same_geometry(source, image, label_path, image_path)
    label.CopyInformation(image)
    return image, label


def binary_label(array: np.ndarray, shape: tuple[int, ...], form: str, path: Path) -> np.ndarray:
    """The checked label as uint8, 0 and 1."""
    check_label(array, shape, (0, FOREGROUND[form]), path)
    label = (array == FOREGROUND[form]).astype(np.uint8)
    if not label.any():
        raise InputError(f"{path}: the label is empty, yet every scan shows a left atrium; copy or download it again")
    return label


# --- converting -----------------------------------------------------------------------------------------------------


def read_case(
    case: Case, form: str, spacing: tuple[float, float, float] | None
) -> tuple[sitk.Image, sitk.Image | None, str]:
    """Read a case; see ``common.Recipe``.

    Args:
        case: its files lie in one folder.
        form: "h5" or "nrrd".
        spacing: x, y, z in mm for the h5 form.
    """
    folder, with_label = case.files[0].parent, case.label_file is not None
    image, label = read_h5_case(folder, with_label, spacing) if form == "h5" else read_nrrd_case(folder, with_label)
    return image, label, ""


def choose_cases(source: Path, form: str, labelled_choice: str, allow_missing_test: bool, subset: int = 0) -> Cases:
    """Divide the listed cases, having checked that their files are there.

    Args:
        source: folder of case folders.
        form: "h5" or "nrrd".
        labelled_choice: a number or a list file, see ``choose_labelled``.
        allow_missing_test: leave out the test cases that are not there.
        subset: see ``choose_labelled``.

    Raises:
        InputError: names every missing case.
    """
    train, listed_test = read_list(LISTS / "la_train.txt"), read_list(LISTS / "la_test.txt")
    labelled = choose_labelled(labelled_choice, train, subset)
    unlabelled = [case for case in train if case not in set(labelled)]
    missing = [case for case in labelled if not is_present(source, form, case, True)]
    missing += [case for case in unlabelled if not is_present(source, form, case, False)]
    files = "/".join(dict.fromkeys(FILES[form]))
    lack = f"cases are missing or lack {files}"
    require_present(source, missing, len(train), f"training {lack}", "complete the folder")
    missing_test = [case for case in listed_test if not is_present(source, form, case, True)]
    if not allow_missing_test:
        remedy = "complete the folder, or go on without them by --allow_missing_test"
        require_present(source, missing_test, len(listed_test), f"test {lack}", remedy)
    return Cases(labelled, unlabelled, [case for case in listed_test if case not in missing_test], missing_test)


def spacing_note(form: str, spacing_given: bool) -> str:
    """Where the spacing comes from."""
    if form == "nrrd":
        return "from the nrrd headers"
    if spacing_given:
        return "given by the user: the h5 files carry none"
    return "assumed: the challenge states it, the h5 files carry none, the data suggests 1.25 mm in z"


def make_cases(source: Path, form: str, cases: Cases) -> list[Case]:
    """All cases with their files: labelled, unlabelled, test."""
    image, label = FILES[form]
    return [
        Case(name, role, (source / name / image,), None if role == UNLABELLED else source / name / label)
        for names, role in ((cases.labelled, LABELLED), (cases.unlabelled, UNLABELLED), (cases.test, TEST))
        for name in names
    ]


def make_recipe(
    source: Path,
    labelled_choice: str,
    subset: int,
    spacing: Sequence[float] | None = None,
    allow_missing_test: bool = False,
) -> Recipe:
    """What is read and written; see the module's text, and ``common.convert_source`` for the other arguments.

    Args:
        spacing: for the h5 form: one or three numbers (x, y, z) in mm; None = 0.625 mm.
        allow_missing_test: convert the test cases that are there.
    """
    form = find_form(source)
    written_spacing = check_spacing(spacing, form, STATED_SPACING, "nrrd")
    cases = choose_cases(source, form, labelled_choice, allow_missing_test, subset)
    missing = f"; {len(cases.missing_test)} missing: {', '.join(cases.missing_test)}" if cases.missing_test else ""
    return Recipe(
        cases=make_cases(source, form, cases),
        read=partial(read_case, form=form, spacing=written_spacing),
        channels=["LGE-MRI"],
        labels=LABELS,
        description=DESCRIPTION,
        conversion={"source_form": form, "missing_test": cases.missing_test},
        spacing_note=spacing_note(form, spacing is not None),
        role_notes={TEST: missing},
    )


convert = partial(common.convert_source, make_recipe, NAME)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, 2 for wrong input, 130 for Ctrl-C."""
    labelled_help = "the first N training cases, or a file with one ID per line"
    parser = common.make_parser(__doc__, NAME, labelled_help, "folder of case folders, h5 or nrrd form")
    add = parser.add_argument
    add("--spacing", type=float, nargs="+", metavar="MM", help="h5 form: x y z or one number, in mm (default: 0.625)")
    add("--allow_missing_test", action="store_true", help="go on when test cases are missing, and name them")
    return common.run_command(parser, convert, arguments)


if __name__ == "__main__":
    sys.exit(main())
