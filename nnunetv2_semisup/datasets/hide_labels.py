"""Make a semi-supervised dataset from a labelled one: few cases keep their labels, the rest become unlabelled."""

from __future__ import annotations

import csv
import io
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from nnunetv2_semisup.data.checks import check_label, require_finite, require_own_data, require_whole_nifti
from nnunetv2_semisup.data.folders import (
    PATIENTS,
    RAW_FOLDER,
    files_per_case,
    labelled_cases,
    read_dataset_json,
    reader_class,
)
from nnunetv2_semisup.data.headers import Header, differing_axes, read_header, turns_images
from nnunetv2_semisup.data.jobs import run_jobs
from nnunetv2_semisup.data.reading import last_line, read_errors
from nnunetv2_semisup.datasets.folds import kept_folds
from nnunetv2_semisup.datasets.raw import find_dataset, link_or_copy, new_dataset_path, whole_folder, write_splits
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.files import listed, write_json

RECORD = "hidden_labels.json"
PATIENT_FACTS = "patients.csv"  # of our ACDC converter


def hide_labels(
    dataset: str,
    new_id: int,
    labelled_choice: str,
    name: str | None = None,
    patient_pattern: str | None = None,
    stratified: bool = False,
    seed: int = 0,
    dry_run: bool = False,
    processes: int = 1,
) -> str:
    """Make ``DatasetXXX_name`` from a dataset in nnUNet_raw, linking its files.

    Args:
        dataset: id or name of the labelled dataset.
        new_id: id of the new one.
        labelled_choice: number of patients that keep their labels, or a file with one case id or patient per line.
        name: of the new dataset; None: that of the old one.
        patient_pattern: regular expression, found in a case id; its first group, or all that it matches, is the
            patient. Cases of one patient stay together, in new folds too. None: as "patients" in dataset.json says,
            which our converters write where a patient has several cases; else every case is a patient, and folds that
            the source's ``splits_final.json`` has of its own are kept.
        stratified: choose by size of the foreground: one patient of each of N equal parts of the sorted list. This
            reads all labels, also those that are hidden then.
        seed: of the random choice.
        dry_run: check and report only.
        processes: for reading images and labels.

    Returns:
        a report for people.

    Raises:
        InputError: something given is wrong; no dataset has appeared.
    """
    source = find_dataset(dataset)
    target = new_dataset_path(new_id, name or source.name.split("_", 1)[-1], "-o")
    dataset_json = read_dataset_json(source)
    cases = labelled_cases(source, dataset_json)
    _check_complete(source, cases, dataset_json)
    patient_of = group_cases(sorted(cases), patient_pattern, dataset_json.get(PATIENTS))
    patients = sorted(set(patient_of.values()))
    sizes: dict[str, float] = {}
    if re.fullmatch(r"[+-]?\d+", labelled_choice):
        number = int(labelled_choice)
        if not 1 <= number <= len(patients):
            raise InputError(
                f"--labeled {number}: must be 1 to {len(patients)}, the number of patients in {source.name}"
            )
        if stratified:
            sizes = foreground_sizes(cases, patient_of, dataset_json, processes)
            labelled = choose_stratified(sizes, number, seed)
        else:
            labelled = sorted(random.Random(seed).sample(patients, number))
        how = f"{'stratified by foreground size' if stratified else 'random'}, seed {seed}"
    else:
        if stratified:
            raise InputError("--stratified needs a number with --labeled, not a list")
        labelled = listed_patients(Path(labelled_choice), patient_of)
        how = f"list {Path(labelled_choice).name}"
    kept = [case for case in sorted(cases) if patient_of[case] in set(labelled)]
    hidden = [case for case in sorted(cases) if case not in set(kept)]

    folds = None if patient_pattern else kept_folds(source, sorted(cases), patient_of, kept)
    headers = {case: read_header(files["images"][0]) for case, files in cases.items()}
    reader = reader_class(dataset_json, cases).__name__
    if reader.startswith("SimpleITK"):  # others count the axes themselves
        _check_axes(cases, headers, kept)
    _check_content(source, cases, kept, dataset_json, processes)
    report = (
        f"  {len(kept)} cases of {len(labelled)} patients keep their labels ({how})\n"
        f"  {len(hidden)} cases go to {RAW_FOLDER} without labels"
    )
    warnings = _leaks(source, hidden, dataset_json["file_ending"])
    if not turns_images(reader):
        warnings.append(differing_axes({case: header.axes for case, header in headers.items() if header}, kept))
    report += "".join(f"\n  WARNING: {text}" for text in warnings if text)
    if dry_run:
        return f"{target}: dry run, nothing was written\n{report}"
    with whole_folder(target) as folder:
        _link_cases(source, folder, cases, kept, hidden, dataset_json["file_ending"])
        # How the source was converted and what it counted is told there, and not true of the new one.
        new_json = {key: value for key, value in dataset_json.items() if key not in ("dataset", "conversion", PATIENTS)}
        if len(patients) < len(cases):
            new_json[PATIENTS] = {case: patient_of[case] for case in kept}
        _write_json(folder / "dataset.json", {**new_json, "numTraining": len(kept)})
        record = {
            "source": source.name,
            "choice": how,
            "patient_pattern": patient_pattern,
            "labelled": {case: patient_of[case] for case in kept},
            "hidden": {case: patient_of[case] for case in hidden},
            **({"foreground_voxels_per_case": {patient: sizes[patient] for patient in labelled}} if sizes else {}),
        }
        _write_json(folder / RECORD, record)
        if folds is None:
            write_splits(folder, kept, patient_of)
        else:
            write_json(folder / "splits_final.json", folds, indent=4)
    return (
        f"{target}\n{report}, see {RECORD}\n  next: nnUNetv2_plan_and_preprocess -d {new_id} --verify_dataset_integrity"
    )


def group_cases(cases: Sequence[str], pattern: str | None, known: object = None) -> dict[str, str]:
    """Case -> patient, by a regular expression, or as ``known`` says; see ``hide_labels``."""
    if not cases:
        raise InputError("the dataset has no labelled cases: imagesTr is empty")
    if pattern is None:
        known = known if isinstance(known, dict) else {}
        return {case: str(known.get(case, case)) for case in cases}
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"--patient_pattern {pattern!r} is no regular expression: {error}") from error
    found = {case: compiled.search(case) for case in cases}
    patients = {case: match[min(compiled.groups, 1)] if match else "" for case, match in found.items()}
    unknown = [case for case, patient in patients.items() if not patient]
    if unknown:
        raise InputError(f"--patient_pattern {pattern!r} finds no patient in {', '.join(unknown[:5])}; correct it")
    return patients


def listed_patients(file: Path, patient_of: dict[str, str]) -> list[str]:
    """Patients named in a file, by themselves or by all of their cases."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--labeled {file}: give the number of patients that keep their labels, or a text file that lists them "
            f"({getattr(error, 'strerror', None) or error})"
        ) from error
    names = {line for line in lines if line and not line.startswith("#")}
    unknown = sorted(names - set(patient_of) - set(patient_of.values()))
    if unknown or not names:
        what = f"no such cases or patients: {', '.join(unknown)}" if unknown else "the list is empty"
        raise InputError(f"--labeled {file}: {what}; name cases of imagesTr")
    chosen = {patient_of.get(name, name) for name in names}
    torn = [case for case, patient in patient_of.items() if patient in chosen - names and case not in names]
    if torn:
        raise InputError(
            f"--labeled {file}: {', '.join(torn)} must be listed too, other cases of the same patients are there"
        )
    return sorted(chosen)


def choose_stratified(sizes: dict[str, float], number: int, seed: int) -> list[str]:
    """One random patient of each of ``number`` parts, as equal as possible, of the patients sorted by size."""
    ordered = sorted(sizes, key=lambda patient: (sizes[patient], patient))
    generator = random.Random(seed)
    return sorted(generator.choice(list(part)) for part in np.array_split(np.array(ordered, dtype=object), number))


def foreground_sizes(
    cases: dict[str, dict], patient_of: dict[str, str], dataset_json: dict, processes: int
) -> dict[str, float]:
    """Patient -> mean number of labelled voxels per case; the ignore label is not counted."""
    count = partial(
        _foreground_voxels, reader=reader_class(dataset_json, cases), ignore=dataset_json["labels"].get("ignore")
    )
    names = sorted(cases)
    counts = run_jobs(count, [cases[case]["label"] for case in names], processes, "Reading labels")
    of_patient: dict[str, list[int]] = {}
    for case, voxels in zip(names, counts, strict=True):
        of_patient.setdefault(patient_of[case], []).append(voxels)
    return {patient: float(np.mean(voxels)) for patient, voxels in of_patient.items()}


def _leaks(source: Path, hidden: Sequence[str], ending: str) -> list[str]:
    """What to tell of labels of hidden cases that come along as those of other parts."""
    found = []
    for name in ("labelsVal", "labelsTs"):
        both = [case for case in hidden if (source / name / f"{case}{ending}").exists()]
        if both:
            found.append(
                f"{name} has labels of {len(both)} cases that are hidden ({listed(both)}): training sees their images, "
                f"so results on them are transductive and must be reported as such"
            )
    return found


def _check_axes(cases: dict[str, dict], headers: dict[str, Header | None], kept: Sequence[str]) -> None:
    """All images must have as many axes as those that keep their labels."""
    usual = Counter(header.number for case in kept if (header := headers[case])).most_common(1)
    for case, header in headers.items():
        if usual and header and header.number != usual[0][0]:
            raise InputError(
                f"{cases[case]['images'][0]}: an image of {header.number} axes, the labelled ones have {usual[0][0]}; "
                f"nnU-Net would stretch it into a volume: remove the case"
            )


def _foreground_voxels(file: str, reader: type, ignore: int | None) -> int:
    label, _ = _read_label(reader, file)
    return int(((label > 0) & (label != (-1 if ignore is None else ignore))).sum())


def _read_label(reader: type, file: str) -> tuple[np.ndarray, dict]:
    with read_errors(lambda e: f"{file}: the label cannot be read ({last_line(e)}); repair or remove the case"):
        require_whole_nifti(file, finite=True)
        return reader().read_seg(file)


def _check_complete(source: Path, cases: dict[str, dict], dataset_json: dict) -> None:
    """Every image must have its label and every label its image."""
    expected = files_per_case(source, dataset_json)
    for case, files in cases.items():
        number = len(files["images"])
        if number != expected:
            raise InputError(f"{source}: case {case} has {number} image files, expected {expected}; complete it")
        for file in (*files["images"], files["label"]):
            if not file.endswith(dataset_json["file_ending"]):
                raise InputError(
                    f"{file}: dataset.json's file_ending is {dataset_json['file_ending']}; convert the file to that"
                )
        for file in files["images"]:
            if not Path(file).is_file():
                raise InputError(f"{file} does not exist; complete the dataset")
        if not Path(files["label"]).is_file():
            raise InputError(f"{files['label']} does not exist; add it, or move the images of {case} to {RAW_FOLDER}")
    if "dataset" not in dataset_json:
        ending = dataset_json["file_ending"]
        for label in sorted((source / "labelsTr").glob(f"[!.]*{ending}")):
            if label.name.removesuffix(ending) not in cases:
                raise InputError(f"{label} is a label without image in imagesTr; add the image or remove the label")


def _check_content(source: Path, cases: dict[str, dict], kept: list[str], dataset_json: dict, processes: int) -> None:
    """All images must be whole; what keeps its label is read and compared with it."""
    try:
        values = tuple(sorted({int(v) for entry in dataset_json["labels"].values() for v in np.atleast_1d(entry)}))
    except (TypeError, ValueError) as error:
        raise InputError(f'{source / "dataset.json"}: labels must be {{"name": value, ...}}: correct it') from error
    check = partial(_check_case, reader=reader_class(dataset_json, cases), values=values)
    keeping = set(kept)
    run_jobs(check, [(files, case in keeping) for case, files in cases.items()], processes, "Checking cases")


def _check_case(job: tuple[dict, bool], reader: type, values: tuple[int, ...]) -> None:
    """Check the files of a case, and whether it keeps its label; labels that are hidden are not read."""
    files, keeps_label = job
    images = files["images"]
    named = ", ".join(images)
    with read_errors(lambda e: f"{named}: the images cannot be read ({last_line(e)}); repair or remove the case"):
        for file in images:
            require_whole_nifti(file, finite=True)
            require_own_data(file)
        if not keeps_label:
            return
        image, image_facts = reader().read_images(images)
        require_finite(image)
    label, label_facts = _read_label(reader, files["label"])
    check_label(label[0], image.shape[1:], values, files["label"])
    if not np.allclose(label_facts["spacing"], image_facts["spacing"], rtol=1e-3):
        raise InputError(f"{files['label']}: its spacing differs from that of {images[0]}; correct the header")
    here, there = (_corners(facts, image.shape[1:]) for facts in (label_facts, image_facts))
    off = np.linalg.norm(here - there, axis=1).max(initial=0) if here.shape == there.shape else 0
    if off > min(image_facts["spacing"]) / 2:
        raise InputError(
            f"{files['label']}: by the headers it lies {off:.3g} mm away from {images[0]}; is it the label of another "
            f"case? If it belongs there, correct the header: origin and direction of the image"
        )


def _corners(facts: dict, shape: tuple[int, ...]) -> np.ndarray:
    """Where the corner voxels of an image lie, (8, 3) in mm, by what nnU-Net's reader tells; empty if nothing.

    Args:
        facts: second result of the reader.
        shape: (Z, Y, X).
    """
    if "sitk_stuff" in facts:
        place = facts["sitk_stuff"]
        axes = len(place["origin"])
        matrix, origin = np.reshape(place["direction"], (axes, axes)) * place["spacing"], np.array(place["origin"])
    elif "nibabel_stuff" in facts:
        affines = facts["nibabel_stuff"]
        affine = affines.get("reoriented_affine", affines["original_affine"])
        matrix, origin = affine[:3, :3], affine[:3, 3]
    else:  # photographs, TIFF
        return np.empty((0, 3))
    axes = min(len(origin), 3)  # in 4D the channels are the last axis
    indices = list(itertools.product(*((0, length - 1) for length in shape[::-1][:axes])))
    return np.array(indices) @ matrix[:axes, :axes].T + origin[:axes]


def _link_cases(
    source: Path, folder: Path, cases: dict[str, dict], kept: list[str], hidden: list[str], ending: str
) -> None:
    for case in (*kept, *hidden):
        images = folder / ("imagesTr" if case in set(kept) else RAW_FOLDER)
        for channel, file in enumerate(cases[case]["images"]):
            _link(Path(file), images / f"{case}_{channel:04d}{ending}")
        spacing_file = Path(cases[case]["images"][0]).with_name(f"{case}.json")  # beside TIFF images
        if spacing_file.exists():
            _link(spacing_file, images / spacing_file.name)
    for case in kept:
        label = Path(cases[case]["label"])
        _link(label, folder / "labelsTr" / f"{case}{ending}")
        if label.with_name(f"{case}.json").exists():
            _link(label.with_name(f"{case}.json"), folder / "labelsTr" / f"{case}.json")
    for name in (RAW_FOLDER, "imagesTs", "labelsTs", "imagesVal", "labelsVal"):
        for file in sorted((source / name).glob("[!.]*")):
            (folder / name).mkdir(exist_ok=True)
            _link(file, folder / name / file.name)
    if (source / PATIENT_FACTS).is_file():
        (folder / PATIENT_FACTS).write_text(_without_roles(source / PATIENT_FACTS), encoding="latin-1")


def _without_roles(file: Path) -> str:
    """A table of patients without its column "role", which is true of the old dataset only; any encoding."""
    rows = list(csv.reader(io.StringIO(file.read_text(encoding="latin-1"))))
    kept = [index for index, name in enumerate(rows[0] if rows else []) if name != "role"]
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([row[i] for i in kept if i < len(row)] for row in rows)
    return table.getvalue()


def _link(source: Path, target: Path) -> None:
    if source.is_dir():
        raise InputError(f"{source} is a folder: {source.parent.name} holds files only; move it away")
    if not source.is_file():
        raise InputError(f"{source} does not exist; complete the dataset")
    if target.exists():
        raise InputError(f"{source} has the name of another case of {target.parent.name}; rename it")
    link_or_copy(source, target)


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
