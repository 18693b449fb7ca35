"""The raw data set of a round: the labelled cases and the pseudo-labelled ones, which their names tell apart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from tqdm import tqdm

from nnunetv2_semisup.data.folders import labelled_cases, read_dataset_json
from nnunetv2_semisup.datasets.raw import link_or_copy, whole_folder
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.files import listed, write_json
from nnunetv2_semisup.selftrain.agreement import cases_to_drop, disagreement
from nnunetv2_semisup.selftrain.predict import unsure_file
from nnunetv2_semisup.selftrain.sheet import Picture, draw_sheet

PREFIX = "pseudo_"
RECORD = "pseudo_labels.json"
SHEET = "pseudo_labels.png"


@dataclass(frozen=True)
class Predictions:
    """What a round knows of the unlabelled cases.

    Args:
        labels: folder with the prediction that becomes the pseudo-label.
        compared: two or more folders whose predictions say how much to trust a case; empty: nothing to compare.
        compares: what these differ in, for the record: "folds", "rounds" or "nothing".
    """

    labels: Path
    compared: tuple[Path, ...]
    compares: str


def write_dataset(
    source: Path,
    target: Path,
    cases: dict[str, list[str]],
    predictions: Predictions,
    splits: list[dict] | None,
    round_number: int,
    drop: float,
    threshold: float | None,
) -> None:
    """Make ``target`` in nnUNet_raw, whole or not at all; of ``source`` nothing is changed.

    Args:
        source: the raw data set with the labelled cases and imagesUn; its test cases are linked too.
        target: folder of the new one.
        cases: unlabelled case -> image files in channel order.
        predictions: of all of them.
        splits: the source's folds, to which the pseudo-labelled cases are added in training; None: a single fold that
            trains on every case and validates on the labelled ones.
        round_number: for the record.
        drop: share of the cases to leave out, those of largest disagreement.
        threshold: voxels of less confidence get the ignore label; None: none do.
    """
    dataset_json = read_dataset_json(source)
    labelled = labelled_cases(source, dataset_json)
    require_no_prefix(source, list(labelled))
    ending = dataset_json["file_ending"]
    reader = determine_reader_writer_from_dataset_json(dataset_json, next(iter(cases.values()))[0], verbose=False)()
    ignore = None if threshold is None else ignore_label(dataset_json["labels"])

    def read(folder: Path, case: str) -> tuple[np.ndarray, dict]:
        label, properties = reader.read_seg(str(folder / f"{case}{ending}"))
        return label[0], properties

    u = {
        case: disagreement([read(folder, case)[0] for folder in predictions.compared])
        for case in (tqdm(cases, desc="Comparing", unit="case", disable=None) if predictions.compared else ())
    }
    dropped = cases_to_drop(u, drop)
    entries: dict[str, dict] = {}
    pictures = []
    with whole_folder(target) as folder:
        for case, files in labelled.items():
            _link_images(files["images"], case, ending, folder)
            _link_with_spacing(Path(files["label"]), folder / "labelsTr" / f"{case}{ending}", ending)
        for name in ("imagesTs", "labelsTs"):
            for file in sorted((source / name).glob("[!.]*")):
                link_or_copy(file, folder / name / file.name)
        for case in tqdm(cases, desc="Writing", unit="case", disable=None):
            label, properties = read(predictions.labels, case)
            foreground, ignored = int((label > 0).sum()), 0
            if ignore is not None:
                with np.load(unsure_file(predictions.labels, case)) as saved:
                    label[saved["unsure"]] = ignore
                ignored = int((label == ignore).sum())
            kept = case not in dropped
            if kept:
                _link_images(cases[case], PREFIX + case, ending, folder)
                reader.write_seg(label, str(folder / "labelsTr" / f"{PREFIX}{case}{ending}"), properties)
            entries[case] = {
                "name": PREFIX + case if kept else None,
                "kept": kept,
                "u": u.get(case),
                "round": round_number,
                "source": [str(Path(file).relative_to(source.parent)) for file in cases[case]],
                "foreground_voxels": foreground,
                "ignored_voxels": ignored,
            }
            pictures.append(Picture(case, cases[case], label, u.get(case), kept))
        pseudo = [PREFIX + case for case in cases if case not in dropped]
        drop_keys = ("dataset", "conversion")  # where the source's files lie and how they were made
        new_json = {key: value for key, value in dataset_json.items() if key not in drop_keys}
        if ignore is not None:
            new_json["labels"] = {**new_json["labels"], "ignore": ignore}
        write_json(folder / "dataset.json", {**new_json, "numTraining": len(labelled) + len(pseudo)}, indent=4)
        write_json(folder / "splits_final.json", splits_with(splits, sorted(labelled), pseudo), indent=4)
        record = {
            "source": source.name,
            "round": round_number,
            "compared": predictions.compares,
            "drop_share": drop,
            "min_confidence": threshold,
            "ignore_label": ignore,
            "kept": len(pseudo),
            "dropped": len(dropped),
            "cases": entries,
        }
        write_json(folder / RECORD, record)
        draw_sheet(folder / SHEET, pictures, reader, ignore)


def splits_with(splits: list[dict] | None, labelled: list[str], pseudo: list[str]) -> list[dict]:
    """Folds in which the pseudo-labelled cases train always and validate never; see :func:`write_dataset`."""
    folds = [{"train": labelled, "val": labelled}] if splits is None else splits
    return [{"train": [*fold["train"], *pseudo], "val": list(fold["val"])} for fold in folds]


def ignore_label(labels: dict) -> int:
    """The ignore label that ``dataset.json`` declares, else the value that nnU-Net wants for it: the next one."""
    if "ignore" in labels:
        return int(labels["ignore"])
    return 1 + max(int(value) for entry in labels.values() for value in np.atleast_1d(entry))


def require_no_prefix(source: Path, labelled: list[str]) -> None:
    """Refuse labelled cases that would be taken for pseudo-labelled ones."""
    if wrong := [case for case in labelled if case.startswith(PREFIX)]:
        raise InputError(
            f"{source}: labelled cases named {PREFIX}... ({listed(wrong)}) would pass for pseudo-labelled: rename them"
        )


def _link_images(files: list[str], name: str, ending: str, folder: Path) -> None:
    for channel, file in enumerate(map(Path, files)):
        link_or_copy(file, folder / "imagesTr" / f"{name}_{channel:04d}{ending}")
    case = Path(files[0]).name.removesuffix(ending)[: -len("_0000")]
    if (spacing := Path(files[0]).with_name(f"{case}.json")).is_file():  # of a TIFF
        link_or_copy(spacing, folder / "imagesTr" / f"{name}.json")


def _link_with_spacing(file: Path, target: Path, ending: str) -> None:
    link_or_copy(file, target)
    if (spacing := file.with_name(f"{file.name.removesuffix(ending)}.json")).is_file():
        link_or_copy(spacing, target.with_name(f"{target.name.removesuffix(ending)}.json"))
