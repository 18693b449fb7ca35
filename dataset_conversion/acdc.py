"""Cardiac cine MRI (ACDC, MICCAI 2017) as a dataset with labelled and unlabelled images.

    python dataset_conversion/acdc.py --source ACDC/database -d 27 --labeled 7

Two forms can be read; which one it is, is found out:

  nifti  the challenge's folders, in any depth: patientXXX/Info.cfg, patientXXX_frameYY.nii.gz and ..._gt.nii.gz for the
         two frames that Info.cfg names (ED = end diastole, ES = end systole). Spacing and geometry are the headers'.
  h5     data/patientXXX_frame01.h5 (ED) and _frame02.h5 (ES) with `image` (0 to 1) and `label`, axis order (z, y, x):
         the files that the semi-supervised literature passes on. They carry no spacing, although it differs between
         patients: 1.5625 x 1.5625 x 10 mm, about the usual one of this data, is assumed for all (--spacing). So report
         distances in voxels, and prefer the nifti form where you can.

Classes: 1 right ventricle, 2 myocardium, 3 left ventricle. The 100 patients of the challenge's training part are
divided as published, 70 for training, 10 for validation, 20 for testing (splits/acdc_*.txt). --labeled N takes the
first N training PATIENTS (1, 3, 7 and 14 are usual, 70 is the upper bound), both frames of each; a list file has one
patient per line, or both frames of each (train_3_label.list of the h5 copies). The cross-validation folds keep the
frames of a patient together, too. The labels of the other training patients are not read or written.

patient074 and patient076 are one scan, annotated twice. They are kept on one side: in the folds they count as one
patient, and if only one of them is labelled the other is left out instead of serving as unlabelled.

Writes $nnUNet_raw/DatasetXXX_ACDC with
  imagesTr labelsTr    labelled patients        patientXXX_ED, patientXXX_ES
  imagesUn             unlabelled patients
  imagesVal labelsVal  validation patients: nnU-Net does not look there, predict and evaluate them for choices
  imagesTs labelsTs    test patients, never to be used for a choice
  dataset.json splits_final.json patients.csv (role, frames, diagnosis, height and weight as in Info.cfg)
"""

from __future__ import annotations

import csv
import io
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
from dataset_conversion.h5 import array_to_image, check_spacing, read_h5_arrays, require_h5py
from dataset_conversion.lists import LISTS, choose_labelled, read_list, require_present
from nnunetv2_semisup.data.checks import LABELLED, TEST, UNLABELLED, VALIDATION, check_image, check_label
from nnunetv2_semisup.datasets.images import packed, read_image, require_same_geometry, walk
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.files import listed

NAME = "ACDC"
LABELS = {"background": 0, "right ventricle": 1, "myocardium": 2, "left ventricle": 3}
ASSUMED_SPACING = (1.5625, 1.5625, 10.0)  # mm; of the h5 form, see above
FRAMES = {"ED": "01", "ES": "02"}  # frame numbers in the h5 form
SAME_SCAN = ("patient074", "patient076")
FACTS = ("Group", "Height", "Weight", "NbFrame")  # of Info.cfg, besides ED and ES
DESCRIPTION = {
    "name": "ACDC",
    "description": "Heart chambers in cine MRI, Automated Cardiac Diagnosis Challenge (MICCAI 2017)",
    "reference": "https://www.creatis.insa-lyon.fr/Challenge/acdc",
    "licence": "The challenge sets the terms: see the reference. For research only; do not pass the images on.",
    "citation": [
        "Bernard, Lalande, Zotti, Cervenansky et al., Deep Learning Techniques for Automatic MRI Cardiac "
        "Multi-structures Segmentation and Diagnosis: Is the Problem Solved?, IEEE TMI 37(11), 2018",
    ],
}


# --- reading --------------------------------------------------------------------------------------------------------


def find_files(source: Path) -> tuple[str, dict[str, Path]]:
    """The form, and all files below ``source`` that may belong to it: name -> path.

    In the nifti form the key of Info.cfg is ``patientXXX/Info.cfg``.
    """
    files, twice, slices = {}, [], 0
    for path in walk(source):
        name = f"{path.parent.name}/{path.name}" if path.name == "Info.cfg" else path.name
        if re.fullmatch(r"patient\d{3}(/Info\.cfg|_frame\d+(_gt)?\.nii(\.gz)?|_frame\d+\.h5)", name):
            twice += [path] if name in files else []
            files[name] = path
        slices += re.fullmatch(r"patient\d{3}_frame\d+_slice_\d+\.h5", name) is not None
    if not files and slices:
        raise InputError(
            f"--source {source} has slices, and volumes are converted, patientXXX_frame01.h5: give the folder above, "
            f"{source.parent}"
        )
    if twice:
        raise InputError(
            f"--source {source}: {twice[0].name} is there twice, e.g. {twice[0]}; give one copy of the data"
        )
    forms = [form for form, ending in (("nifti", "Info.cfg"), ("h5", ".h5")) if any(n.endswith(ending) for n in files)]
    if len(forms) != 1:
        what = "both forms, nifti and h5" if forms else "neither patientXXX/Info.cfg nor patientXXX_frame01.h5"
        raise InputError(f"--source {source} has {what}; give the folder of one form{packed(source)}")
    if forms == ["h5"]:
        require_h5py()
    return forms[0], files


def read_info(path: Path) -> dict[str, str]:
    """Content of Info.cfg: "ED", "ES", "Group" and so on."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); copy or download it again") from error
    info = {key.strip(): value.strip() for key, colon, value in (line.partition(":") for line in lines) if colon}
    if not all(info.get(frame, "").isdecimal() for frame in FRAMES):
        raise InputError(f"{path} does not give the frames ED and ES as numbers; copy or download it again")
    return info


def frame_names(form: str, patient: str, info: dict[str, str]) -> dict[str, tuple[str, str]]:
    """ED and ES -> names of image file and label file, without ``.gz``."""
    if form == "h5":
        return {frame: (f"{patient}_frame{number}.h5",) * 2 for frame, number in FRAMES.items()}
    stems = {frame: f"{patient}_frame{int(info[frame]):02d}" for frame in FRAMES}
    return {frame: (f"{stem}.nii", f"{stem}_gt.nii") for frame, stem in stems.items()}


def read_case(
    case: Case, form: str, spacing: tuple[float, float, float] | None
) -> tuple[sitk.Image, sitk.Image | None, str]:
    """Read a case; see ``common.Recipe``."""
    path, with_label = case.files[0], case.label_file is not None
    if form == "h5":
        arrays = read_h5_arrays(path, ("image", "label") if with_label else ("image",))
        check_image(arrays[0], path)
        if with_label:
            check_label(arrays[1], arrays[0].shape, tuple(LABELS.values()), path)
        types = ("float32", "uint8")  # some images are float64 there, with 32 bits of information or less
        images = [array_to_image(a.transpose(2, 1, 0).astype(t), spacing) for a, t in zip(arrays, types, strict=False)]
        return images[0], images[1] if with_label else None, ""
    image = read_image(path)
    if not with_label:
        return image, None, ""
    label = read_image(case.label_file)
    check_label(sitk.GetArrayViewFromImage(label), image.GetSize()[::-1], tuple(LABELS.values()), case.label_file)
    require_same_geometry(label, image, case.label_file, path)
    label = sitk.Cast(label, sitk.sitkUInt8)
    label.CopyInformation(image)
    return image, label, ""


# --- converting -----------------------------------------------------------------------------------------------------


def read_patients(file: Path) -> list[str]:
    """Patients of a list file, which names them or both frames of each, ``patientXXX_frameYY``.

    Raises:
        InputError: one frame of a patient is listed, or slices are.
    """
    frames: dict[str, int] = {}
    lines = read_list(file)
    for line in lines:
        match = re.fullmatch(r"(patient\d{3})_frame\d+(_slice_\d+)?", line)
        if match and match[2]:
            raise InputError(f"{file}: it lists slices ({line}), and whole patients are labelled: write {match[1]}")
        if match:
            frames[match[1]] = frames.get(match[1], 0) + 1
    if half := [patient for patient, number in frames.items() if number < len(FRAMES) and patient not in lines]:
        raise InputError(
            f"{file}: one frame only of {listed(half)}, and both frames of a patient are labelled: write {half[0]}, "
            f"or list the other frame, too"
        )
    return list(dict.fromkeys(re.sub(r"^(patient\d{3})_frame\d+$", r"\1", line) for line in lines))


def choose_patients(labelled_choice: str, subset: int) -> tuple[dict[str, str], list[str]]:
    """Role of each patient, and what to tell of the two that are the same scan."""
    train = read_list(LISTS / "acdc_train.txt")
    labelled = choose_labelled(labelled_choice, train, subset, read_patients)
    roles = {patient: LABELLED if patient in labelled else UNLABELLED for patient in train}
    roles |= dict.fromkeys(read_list(LISTS / "acdc_val.txt"), VALIDATION)
    roles |= dict.fromkeys(read_list(LISTS / "acdc_test.txt"), TEST)
    if not set(SAME_SCAN) <= set(roles):
        return roles, []
    sides = {roles[patient] for patient in SAME_SCAN}
    told = f"{' and '.join(SAME_SCAN)} have the same images: both are {' and '.join(sides)}"
    if sides == {LABELLED, UNLABELLED}:
        left_out = next(patient for patient in SAME_SCAN if roles[patient] == UNLABELLED)
        del roles[left_out]
        told = f"{left_out} is left out: {' and '.join(SAME_SCAN)} have the same images, the other one is labelled"
    elif sides == {LABELLED}:
        told += ", and one patient in the folds"
    return roles, [told]


def make_cases(
    source: Path, form: str, files: dict[str, Path], roles: dict[str, str], allow_missing_test: bool
) -> tuple[list[Case], dict[str, dict[str, str]], list[str]]:
    """All cases, having checked that their files are there.

    Returns:
        cases; patient -> content of Info.cfg (h5 form: empty); validation and test patients that are missing.
    """
    cases, infos, missing = [], {}, []
    for patient, role in roles.items():
        if form == "nifti" and f"{patient}/Info.cfg" not in files:
            missing.append(patient)
            continue
        info = read_info(files[f"{patient}/Info.cfg"]) if form == "nifti" else {}
        found = []
        for frame, names in frame_names(form, patient, info).items():
            image, label = (_either(files, name) for name in names)
            if image and (label or role == UNLABELLED):
                found.append(Case(f"{patient}_{frame}", role, (image,), None if role == UNLABELLED else label))
        if len(found) < len(FRAMES):
            missing.append(patient)
            continue
        infos[patient] = info
        cases += found
    training = [patient for patient in missing if roles[patient] in (LABELLED, UNLABELLED)]
    kind = "patientXXX_frame01.h5 or _frame02.h5" if form == "h5" else "Info.cfg or one of the frames that it names"
    require_present(
        source, training, len(roles), f"patients are missing or lack {kind}, in training", "complete the folder"
    )
    if not allow_missing_test:
        remedy = "complete the folder, or go on without them by --allow_missing_test"
        require_present(
            source, missing, len(roles), f"patients, for validation or testing, are missing or lack {kind}", remedy
        )
    return cases, infos, missing


def _either(files: dict[str, Path], name: str) -> Path | None:
    """The file ``name`` or ``name.gz``; both are an error, for they may differ."""
    found = [files[key] for key in (name, f"{name}.gz") if key in files]
    if len(found) > 1:
        raise InputError(f"{found[0]}: there is also {found[1]}; give one copy of the data")
    return found[0] if found else None


def _unlisted(files: dict[str, Path], roles: dict[str, str]) -> list[str]:
    """What to tell of patients who are in no published list, such as those of the challenge's testing part."""
    others = sorted({name[:10] for name in files} - {*roles, *SAME_SCAN})
    if not others:
        return []
    named = others[0] if len(others) == 1 else f"{others[0]} to {others[-1]}"
    return [f"{len(others)} more patients are there ({named}); they are in no published list and were not read"]


def patients_csv(roles: dict[str, str], infos: dict[str, dict[str, str]]) -> str:
    """A table of the converted patients, as text."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["patient", "role", *FRAMES, *FACTS])
    for patient, info in sorted(infos.items()):
        writer.writerow([patient, roles[patient], *(info.get(key, "") for key in (*FRAMES, *FACTS))])
    return table.getvalue()


def make_recipe(
    source: Path,
    labelled_choice: str,
    subset: int,
    spacing: Sequence[float] | None = None,
    allow_missing_test: bool = False,
) -> Recipe:
    """What is read and written; see the module's text, and ``common.convert_source`` for the other arguments.

    Args:
        spacing: for the h5 form: one or three numbers (x, y, z) in mm.
        allow_missing_test: convert the validation and test patients that are there.
    """
    form, files = find_files(source)
    written_spacing = check_spacing(spacing, form, ASSUMED_SPACING, "NIfTI")
    roles, told = choose_patients(labelled_choice, subset)
    cases, infos, missing = make_cases(source, form, files, roles, allow_missing_test)
    patients = {role: sum(roles[patient] == role for patient in infos) for role in set(roles.values())}
    notes = {role: f", {number} patients" for role, number in patients.items()}
    for role in (VALIDATION, TEST):
        absent = [patient for patient in missing if roles[patient] == role]
        notes[role] = notes.get(role, "") + (f"; {len(absent)} patients missing: {', '.join(absent)}" if absent else "")
    if form == "nifti":
        spacing_note = "from the headers"
    else:
        spacing_note = f"{'given by the user' if spacing is not None else 'assumed'}: the h5 files carry none"
    present, no_test = {case.role for case in cases}, []
    if TEST not in present:
        where = "imagesVal and labelsVal" if VALIDATION in present else "labelled cases that you keep apart"
        no_test = [f"no test patients are at hand: evaluate on {where}"]
    same = "+".join(SAME_SCAN)
    return Recipe(
        cases=cases,
        read=partial(read_case, form=form, spacing=written_spacing),
        channels=["cine-MRI"],
        labels=LABELS,
        description=DESCRIPTION,
        conversion={"source_form": form, "missing": missing, "same_scan": told},
        spacing_note=spacing_note,
        role_notes=notes,
        rows=[("note", text) for text in (*told, *_unlisted(files, roles), *no_test)],
        groups={f"{p}_{frame}": same if p in SAME_SCAN else p for p in infos for frame in FRAMES},
        extra_files={"patients.csv": patients_csv(roles, infos)},
    )


convert = partial(common.convert_source, make_recipe, NAME)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, 2 for wrong input, 130 for Ctrl-C."""
    labelled_help = "the first N training patients, or a file with one patient per line (or both frames of each)"
    parser = common.make_parser(__doc__, NAME, labelled_help, "folder of the challenge's data, or of the h5 files")
    add = parser.add_argument
    add("--spacing", type=float, nargs="+", metavar="MM", help="h5 form: x y z or one number, in mm")
    add("--allow_missing_test", action="store_true", help="go on when validation or test patients are missing")
    return common.run_command(parser, convert, arguments)


if __name__ == "__main__":
    sys.exit(main())
