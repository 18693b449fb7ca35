"""Pancreas in abdominal CT (NIH Pancreas-CT, TCIA) as a dataset with labelled and unlabelled images.

    python dataset_conversion/pancreas_ct.py --source Pancreas-CT -d 82 --labeled 12

Three forms can be read; which one it is, is found out:

  dicom  as TCIA delivers it: one DICOM series per patient (PatientID PANCREAS_0001) in folders of any depth, and
         labelNNNN.nii.gz anywhere below --source. The labels are stored with other axes than the images; they are put
         on the image's grid by permuting and flipping axes as both headers say, nothing is interpolated. Where the
         labels keep the orientation only and no place (origin zero), the report says so: look at previews/ then. Labels
         that lie elsewhere by their header are refused.
  nifti  imageNNNN.nii.gz (or PANCREAS_NNNN.nii.gz, with or without _0000) and labelNNNN.nii.gz, likewise.
  h5     imageNNNN_norm.h5 with `image` and `label`: what MC-Net and later papers pass on. Resampled to 1 mm, clipped to
         -125 to 275 HU, cropped in x and y around the label, test cases too, and standardised: HU are gone, and results
         are not comparable with results on whole scans. Axes are taken as (x, y, z).

HU are kept in the first two forms: the channel is called CT, for which nnU-Net clips and normalises by the labelled
cases.

Cases 0025 and 0070 are the scan of 0002 again, which is why TCIA withdrew them: they are left out, with a message.
There are two published divisions, and numbers from one must not be compared with those from the other (--variant):

  B  CoraNet, BCP: 62 for training, 18 for testing, without 0025 and 0070. Default for dicom and nifti.
  A  MC-Net, SS-Net and others: 62 and 20; default for h5. As published, 0002 and 0070 are training cases and 0025 is a
     test case, so training sees a test case. Without the doubles 61 and 19 remain and the first 12 are no longer the
     published 12, of which 0070 is one. --keep_duplicates gives the published lists, where the files are there.

--labeled N takes the first N training cases (6 and 12 are usual; "all" is the upper bound). The labels of the other
training cases are neither read nor written.
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
from dataset_conversion.h5 import array_to_image, read_h5_arrays, require_h5py
from dataset_conversion.lists import LISTS, choose_labelled, read_list, require_present
from nnunetv2_semisup.data.checks import LABELLED, TEST, UNLABELLED, check_image, check_label
from nnunetv2_semisup.datasets.dicom import dicom_tag, find_series, read_series
from nnunetv2_semisup.datasets.images import align_label, packed, read_image, read_label, walk
from nnunetv2_semisup.errors import InputError

NAME = "PancreasCT"
LABELS = {"background": 0, "pancreas": 1}
DUPLICATES = ("0025", "0070")
FORMS = {
    "h5": re.compile(r"image(\d{4})_norm\.h5"),
    "nifti": re.compile(r"(?:image|PANCREAS_)(\d{4})(?:_0000)?\.nii(?:\.gz)?"),
}
LABEL_FILE = re.compile(r"label(\d{4})\.nii(?:\.gz)?")
PATIENT = re.compile(r"PANCREAS_(\d{4})")
H5_SPACING = (1.0, 1.0, 1.0)  # mm; the files were resampled to it
DESCRIPTION = {
    "name": "Pancreas-CT",
    "description": "Pancreas in portal-venous abdominal CT, National Institutes of Health Clinical Center",
    "reference": "https://doi.org/10.7937/K9/TCIA.2016.tNB1kqBU",
    "licence": "The collection's page sets the terms: see the reference.",
    "citation": [
        "Roth, Farag, Turkbey, Lu, Liu, Summers, Data From Pancreas-CT, The Cancer Imaging Archive, 2016",
        "Roth, Lu, Farag, Shin, Liu, Turkbey, Summers, DeepOrgan: Multi-level Deep Convolutional Networks for "
        "Automated Pancreas Segmentation, MICCAI 2015",
    ],
}


# --- reading --------------------------------------------------------------------------------------------------------


def find_cases(source: Path) -> tuple[str, dict[str, tuple[Path, ...]], dict[str, Path]]:
    """The form; case number -> image file, or slices in order; case number -> label file."""
    files = walk(source)
    images: dict[str, dict[str, tuple[Path, ...]]] = {form: {} for form in ("dicom", *FORMS)}
    labels: dict[str, Path] = {}
    for file in files:
        for form, pattern in FORMS.items():
            if match := pattern.fullmatch(file.name):
                _add(images[form], match[1], (file,), source)
        if match := LABEL_FILE.fullmatch(file.name):
            _add(labels, match[1], file, source)
    for slices in find_series([file for file in files if not file.name.endswith((".nii", ".nii.gz", ".h5"))]).values():
        match = PATIENT.search(dicom_tag(slices[0], "0010|0020")) or PATIENT.search(slices[0].as_posix())
        if match is None:
            raise InputError(f"{slices[0].parent}: a DICOM series of no PANCREAS_NNNN patient; move it away")
        _add(images["dicom"], match[1], tuple(slices), source)
    found = [form for form, cases in images.items() if cases]
    if len(found) != 1:
        there = (
            f"several forms ({', '.join(found)})" if found else "no DICOM series, imageNNNN.nii.gz or imageNNNN_norm.h5"
        )
        raise InputError(f"--source {source} has {there}; give the folder of one form{packed(source)}")
    if found == ["h5"]:
        require_h5py()
        labels = {number: files[0] for number, files in images["h5"].items()}
    return found[0], images[found[0]], labels


def _add(cases: dict, number: str, content: Path | tuple[Path, ...], source: Path) -> None:
    if number in cases:
        where = content[0] if isinstance(content, tuple) else content
        raise InputError(f"--source {source}: case {number} is there twice, e.g. {where}; give one copy of it")
    cases[number] = content


def read_case(case: Case, form: str) -> tuple[sitk.Image, sitk.Image | None, str]:
    """Read a case; see ``common.Recipe``."""
    with_label = case.label_file is not None
    if form == "h5":
        arrays = read_h5_arrays(case.files[0], ("image", "label") if with_label else ("image",))
        check_image(arrays[0], case.files[0])
        if with_label:
            check_label(arrays[1], arrays[0].shape, (0, 1), case.files[0])
        types = ("float32", "uint8")
        images = [array_to_image(a.astype(t), H5_SPACING) for a, t in zip(arrays, types, strict=False)]
        return images[0], images[1] if with_label else None, ""
    image = read_series(case.files) if form == "dicom" else read_image(case.files[0])
    if not with_label:
        return image, None, ""
    label, same_place = align_label(read_label(case.label_file, (0, 1)), image, case.label_file, case.files[0])
    remark = "" if same_place else "image and label headers agree on the orientation only, look at the previews"
    return image, label, remark


# --- converting -----------------------------------------------------------------------------------------------------


def published_lists(variant: str, keep_duplicates: bool) -> tuple[list[str], list[str], list[str]]:
    """Numbers of the training and test cases of variant A or B, and what to tell of the duplicates."""
    train, test = (read_list(LISTS / f"pancreas_{variant.lower()}_{part}.txt") for part in ("train", "test"))
    listed = [number for number in DUPLICATES if number in {*train, *test}]
    if keep_duplicates:
        if not listed:
            raise InputError("--keep_duplicates: variant B has no duplicates; leave it out")
        return train, test, [f"LEAK: {' and '.join(listed)} are the scan of 0002; a test case is seen in training"]
    told = f"{' and '.join(DUPLICATES)} are left out: they are the scan of 0002 again"
    if "0070" in train:
        told += "; more than 6 labelled cases of variant A are therefore not the published ones"
    return [n for n in train if n not in listed], [n for n in test if n not in listed], [told]


def make_recipe(
    source: Path, labelled_choice: str, subset: int, variant: str | None = None, keep_duplicates: bool = False
) -> Recipe:
    """What is read and written; see the module's text, and ``common.convert_source`` for the other arguments.

    Args:
        variant: "A" or "B"; None: by the form.
        keep_duplicates: use the published lists of variant A as they are.
    """
    form, images, labels = find_cases(source)
    variant = variant or ("A" if form == "h5" else "B")
    train, test, told = published_lists(variant, keep_duplicates)
    labelled = choose_labelled(labelled_choice, train, subset)
    roles = {number: LABELLED if number in labelled else UNLABELLED for number in train} | dict.fromkeys(test, TEST)
    missing = [n for n, role in roles.items() if n not in images or (role != UNLABELLED and n not in labels)]
    require_present(source, missing, len(roles), "cases lack the image or the label", "complete the folder")
    return Recipe(
        cases=[
            Case(f"PANCREAS_{number}", role, images[number], None if role == UNLABELLED else labels[number])
            for number, role in roles.items()
        ],
        read=partial(read_case, form=form),
        channels=["CT standardised" if form == "h5" else "CT"],
        labels=LABELS,
        description=DESCRIPTION,
        conversion={"source_form": form, "variant": variant, "duplicates": told},
        spacing_note="the h5 files were resampled to it" if form == "h5" else "from the headers",
        rows=[("division", f"variant {variant}, see splits/"), *(("note", text) for text in told)],
    )


convert = partial(common.convert_source, make_recipe, NAME)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, 2 for wrong input, 130 for Ctrl-C."""
    labelled_help = "the first N training cases, all, or a file with one case number per line"
    parser = common.make_parser(__doc__, NAME, labelled_help, "folder with images and labels, in any depth")
    parser.add_argument("--variant", choices=["A", "B"], help="published division (default: A for h5, else B)")
    parser.add_argument("--keep_duplicates", action="store_true", help="variant A with its leak into the test set")
    return common.run_command(parser, convert, arguments)


if __name__ == "__main__":
    sys.exit(main())
