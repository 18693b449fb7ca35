"""Where unlabelled images lie, raw and preprocessed, and what their files must look like."""

from __future__ import annotations

import contextlib
import glob
import io
import re
import warnings
from pathlib import Path
from typing import Any

from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.utilities.utils import (
    get_filenames_of_train_images_and_targets,
    get_identifiers_from_splitted_dataset_folder,
)

from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.files import is_utf8, listed, read_json

RAW_FOLDER = "imagesUn"

PATIENTS = "patients"  # key of dataset.json that nnU-Net ignores: labelled case -> patient

_CASE_AND_CHANNEL = re.compile(r"(.+)_(\d{4})", re.DOTALL)


def unlabeled_folder(preprocessed_dataset_folder: Path | str, data_identifier: str) -> Path:
    """Folder of the preprocessed unlabelled cases; holds ``.b2nd`` and ``.pkl`` files only."""
    return Path(preprocessed_dataset_folder) / f"{data_identifier}_unlabeled"


def manifest_file(preprocessed_dataset_folder: Path | str, data_identifier: str) -> Path:
    """What was preprocessed from which files, beside :func:`unlabeled_folder`."""
    return Path(preprocessed_dataset_folder) / f"{data_identifier}_unlabeled.json"


def read_dataset_json(raw_dataset_folder: Path) -> dict:
    """Content of ``dataset.json``, checked for the keys that everything here needs."""
    file = raw_dataset_folder / "dataset.json"
    content = read_json(file, "repair it")
    check_dataset_json(content, file)
    return content


def check_dataset_json(content: Any, file: Path) -> None:
    """Raise an InputError unless ``content`` is what nnU-Net's dataset format describes, with names that are safe.

    Case ids and the file ending become parts of paths that are written. So an id is a plain file name, and an ending a
    dot with letters and digits, perhaps several times.
    """
    needed = ("channel_names", "labels", "file_ending")
    if not isinstance(content, dict):
        raise InputError(f"{file} is no object with {', '.join(needed)}: repair it")
    missing = [key for key in needed if not content.get(key) and not (key == "channel_names" and "modality" in content)]
    if missing:
        raise InputError(f"{file} has no {', '.join(missing)}: add it as nnU-Net's dataset format describes")
    for key in ("channel_names", "modality", "labels"):
        if not isinstance(content.get(key, {}), dict):
            raise InputError(f'{file}: {key} must be an object, {{"0": NAME}} or {{NAME: value}}: correct it')
    ending = content["file_ending"]
    if not isinstance(ending, str) or not re.fullmatch(r"(\.[A-Za-z0-9]+)+", ending):
        raise InputError(
            f"{file}: file_ending {ending!r} must be a dot with letters and digits, as .nii.gz: correct it"
        )
    entries = content.get("dataset", {})
    if not isinstance(entries, dict):
        raise InputError(f'{file}: dataset must be {{CASE: {{"images": [FILE], "label": FILE}}}}: correct it')
    labels = set()
    for case, entry in entries.items():
        if not is_plain_name(case):
            raise InputError(f"{file}: the case id {case!r} is no plain file name: rename the case")
        files = entry.get("images") if isinstance(entry, dict) else None
        if (
            not isinstance(files, list)
            or not files
            or not all(isinstance(f, str) for f in [*files, entry.get("label")])
        ):
            raise InputError(f'{file}: case {case} must have "images": [FILE, ...] and "label": FILE: correct it')
        labels.add(_resolved(file, entry["label"]))
    for case, entry in entries.items():
        for image in entry["images"]:
            if _resolved(file, image) in labels:
                raise InputError(f"{file}: case {case} names the label {image} as an image: correct it")


def is_plain_name(name: str) -> bool:
    """Whether ``name`` can be a file's name on every system: one part of a path, printable, and UTF-8."""
    return is_utf8(name) and bool(name.strip(". ")) and name.isprintable() and not set(name) & set('/\\:*?"<>|')


def _resolved(dataset_json: Path, file: str) -> Path:
    """A file that dataset.json names, as nnU-Net finds it: relative to the raw data set's folder."""
    return (dataset_json.parent / file).resolve()


def channel_count(dataset_json: dict) -> int:
    """Number of input channels that ``dataset.json`` declares."""
    for key in ("channel_names", "modality"):
        if key in dataset_json:
            return len(dataset_json[key])
    raise InputError('dataset.json has no "channel_names": add them as nnU-Net\'s dataset format describes')


def labelled_identifiers(raw_dataset_folder: Path, dataset_json: dict) -> list[str]:
    """Case ids of the labelled images, by nnU-Net's rules; no image or label is opened."""
    if "dataset" in dataset_json:
        return sorted(dataset_json["dataset"])
    folder = raw_dataset_folder / "imagesTr"
    hidden = sorted(folder.glob(f".*{dataset_json['file_ending']}"))
    if hidden:
        raise InputError(
            f"{hidden[0]} is a hidden file that nnU-Net takes for a case: delete it, and its like by find "
            f"'{raw_dataset_folder}' -name '._*' -delete"
        )
    return _identifiers(folder, dataset_json["file_ending"])


def labelled_cases(raw_dataset_folder: Path, dataset_json: dict) -> dict[str, dict]:
    """Case -> {"images": files in channel order, "label": file}, as nnU-Net finds them."""
    if "dataset" in dataset_json:
        return get_filenames_of_train_images_and_targets(str(raw_dataset_folder), dataset_json)
    ending = dataset_json["file_ending"]
    images, labels = raw_dataset_folder / "imagesTr", raw_dataset_folder / "labelsTr"
    return {
        case: {
            "images": sorted(map(str, images.glob(f"{glob.escape(case)}_[0-9][0-9][0-9][0-9]{ending}"))),
            "label": str(labels / f"{case}{ending}"),
        }
        for case in labelled_identifiers(raw_dataset_folder, dataset_json)
    }


def find_unlabeled_cases(raw_dataset_folder: Path, dataset_json: dict) -> dict[str, list[str]]:
    """List and check ``imagesUn``; whatever is wrong there is an InputError of one line.

    Hidden files are ignored. Cases that are also in ``imagesTs`` are returned, with a warning that names them.

    Args:
        raw_dataset_folder: ``nnUNet_raw/DatasetXXX_Name``.
        dataset_json: content of its ``dataset.json``.

    Returns:
        Case id -> image files, one per channel, in channel order; sorted by case id.
    """
    raw_dataset_folder = Path(raw_dataset_folder)
    folder = raw_dataset_folder / RAW_FOLDER
    ending = dataset_json["file_ending"]
    example = f"CASE_0000{ending}"
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist: put the unlabelled images there, named {example} as in imagesTr")

    cases: dict[str, dict[int, str]] = {}
    spacing_files = []
    for file in sorted(folder.iterdir()):
        if file.name.startswith("."):
            continue
        if not is_utf8(file.name):
            raise InputError(f"{folder}: the file name {file.name!a} is no UTF-8: rename it")
        if not file.is_file():
            raise InputError(
                f"{file} is a folder, a broken link or a device: {RAW_FOLDER} holds image files only, move it away"
            )
        if ending in (".tif", ".tiff") and file.suffix == ".json":
            spacing_files.append(file)  # nnU-Net reads a TIFF's voxel size from CASE.json
            continue
        if not file.name.endswith(ending):
            raise InputError(f"{file} does not end with {ending}, dataset.json's file_ending: convert or remove it")
        name = _CASE_AND_CHANNEL.fullmatch(file.name[: -len(ending)])
        if name is None:
            raise InputError(f"{file} is not named {example} (case, channel as four digits): rename it")
        if name[1].endswith("_seg"):
            raise InputError(f"{file}: nnU-Net keeps names ending with _seg for its own files: rename the case")
        cases.setdefault(name[1], {})[int(name[2])] = str(file)
    if not cases:
        raise InputError(f"{folder} is empty: put the unlabelled images there, named {example} as in imagesTr")

    for file in spacing_files:
        if file.stem not in cases:
            raise InputError(f"{file} belongs to no image: it must be named as a case of {folder}, without channel")
    _check_channels(folder, cases, files_per_case(raw_dataset_folder, dataset_json))
    both = sorted(set(cases) & set(labelled_identifiers(raw_dataset_folder, dataset_json)))
    if both:
        raise InputError(f"{folder} holds labelled cases ({listed(both)}): remove them, they are in imagesTr already")
    test = sorted(set(cases) & set(_identifiers(raw_dataset_folder / "imagesTs", ending)))
    if test:
        warnings.warn(
            f"{len(test)} unlabelled cases are also in imagesTs ({listed(test)}): training sees the test images, so "
            f"results on them are transductive and must be reported as such.",
            stacklevel=2,
        )
    return {case: [channels[i] for i in sorted(channels)] for case, channels in sorted(cases.items())}


def _check_channels(folder: Path, cases: dict[str, dict[int, str]], expected: int) -> None:
    for case, channels in cases.items():
        missing = sorted(set(range(expected)) - set(channels))
        extra = sorted(set(channels) - set(range(expected)))
        if missing:
            raise InputError(f"{folder}: case {case} lacks channel {_channels(missing)}: add the files or remove it")
        if extra:
            raise InputError(
                f"{folder}: case {case} has channel {_channels(extra)}, but a case has {expected} here (dataset.json's "
                f"channel_names): remove those files"
            )


def files_per_case(raw_dataset_folder: Path, dataset_json: dict) -> int:
    """Number of files of a case: one per channel, unless the labelled images hold all channels in one (colour, 4D)."""
    count = channel_count(dataset_json)
    if "dataset" in dataset_json:
        return max((len(entry["images"]) for entry in dataset_json["dataset"].values()), default=count)
    images = raw_dataset_folder / "imagesTr"
    all_in_one = any(images.glob(f"*_0000{dataset_json['file_ending']}")) and not any(
        images.glob(f"*_0001{dataset_json['file_ending']}")
    )
    return 1 if all_in_one else count


def reader_class(dataset_json: dict, cases: dict[str, dict]) -> type:
    """The class by which nnU-Net reads the images of a data set.

    Args:
        dataset_json: content of ``dataset.json``.
        cases: as :func:`labelled_cases` gives them; one is read to see which reader can.
    """
    example = next((files["images"][0] for files in cases.values() if files["images"]), None)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # tracebacks of the readers that cannot
            return determine_reader_writer_from_dataset_json(dataset_json, example, verbose=False)
    except RuntimeError as error:
        file = example or f"file_ending {dataset_json['file_ending']}"
        raise InputError(f"{file}: no reader of nnU-Net can read it; repair or convert it") from error


def _identifiers(folder: Path, file_ending: str) -> list[str]:
    if not folder.is_dir():
        return []
    return [str(case) for case in get_identifiers_from_splitted_dataset_folder(str(folder), file_ending)]


def _channels(numbers: list[int]) -> str:
    return ", ".join(f"{number:04d}" for number in numbers)
