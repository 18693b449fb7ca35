"""A folder of predictions against a folder of references: one row per case, label and post-processing.

A row is a dict: ``case`` (file name without ending), ``label`` (name in dataset.json), ``postprocessing`` (``none`` or
``largest_component``), the metrics of :mod:`nnunetv2_semisup.evaluation.metrics`, and the voxels of both masks.

- Labels and regions are those of dataset.json without the background; a region's mask is the union of its values.
- Voxels with the ignore label in the reference are removed from both masks.
- ``largest_component`` keeps one component of the predicted mask (full connectivity), before ignored voxels are
  removed, since post-processing does not know the reference.
- Axes of one voxel are dropped: an image of one slice is a 2D image, with a contour and not a sheet for its surface.
- Formats without a voxel size (png, bmp, a tif without nnU-Net's json file) have NaN for every ``_mm`` metric.

Failures: where exactly one of the two masks is empty, Dice and Jaccard are 0 and count in their means; distances do not
exist, are left out of the mean, and the number of failures stands beside it. Where both are empty there is nothing to
measure: NaN, left out of every mean, neither a success nor a failure.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from scipy.ndimage import generate_binary_structure
from scipy.ndimage import label as label_components

from nnunetv2_semisup.data.jobs import run_jobs
from nnunetv2_semisup.data.reading import read_errors
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.evaluation.metrics import METRICS, compare_masks
from nnunetv2_semisup.evaluation.summary import COLUMNS, POSTPROCESSING, summarize
from nnunetv2_semisup.files import listed, read_json, write_csv, write_json


def evaluate_folder(
    reference: Path,
    prediction: Path,
    dataset_json: Path,
    output: Path | None,
    processes: int = 1,
    largest_component: bool = False,
) -> list[dict]:
    """Compare every case of two folders.

    Args:
        reference: folder of label files, e.g. ``labelsTs``.
        prediction: folder of predictions with the same file names. Other file endings are ignored.
        dataset_json: nnU-Net's file with ``labels`` and ``file_ending``.
        output: created; receives ``cases.csv`` (:data:`summary.COLUMNS`) and ``summary.json``
            (:func:`summary.summarize`). None: no files.
        processes: 1 works in this process.
        largest_component: add a second row per case and label, for the largest component of the predicted mask.

    Returns:
        Rows ordered by case, label (as in dataset.json) and post-processing.

    Raises:
        InputError: missing or extra files, size or geometry that differ, unknown labels, unreadable files.
    """
    reference, prediction, dataset_json = Path(reference), Path(prediction), Path(dataset_json)
    if processes < 1:
        raise InputError(f"-np {processes}: at least one process is needed")
    if output is not None:
        output = Path(output)
        if output.resolve() in (reference.resolve(), prediction.resolve()):
            raise InputError(
                f"{output} holds the segmentations, and nnU-Net's summary.json: name another output folder"
            )
        if output.exists() and not output.is_dir():
            raise InputError(f"{output} is a file: name a folder for the results")
    labels = _read_labels(dataset_json)
    jobs = _find_jobs(reference, prediction, labels, largest_component)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    rows = [row for case_rows in run_jobs(_evaluate_case, jobs, processes, "Evaluating") for row in case_rows]
    if output is not None:
        _write_csv(output / "cases.csv", rows)
        write_json(output / "summary.json", _without_nan(summarize(rows)))
    return rows


# ------------------------------------------------------------------------------------------------------- files and jobs


@dataclass(frozen=True)
class _Labels:
    """What dataset.json says: name -> values of the mask; every known value; the ignore label; how files are read."""

    masks: dict[str, tuple[int, ...]]
    known: frozenset[int]
    ignore: int | None
    content: dict

    @property
    def ending(self) -> str:
        return self.content["file_ending"]


@dataclass(frozen=True)
class _Job:
    case: str
    reference: Path
    prediction: Path
    labels: _Labels
    reader: type[BaseReaderWriter]
    postprocessing: tuple[str, ...]


def _read_labels(file: Path) -> _Labels:
    content = read_json(file, "name the dataset.json of the data set with -djfile")
    for key in ("labels", "file_ending"):
        if not isinstance(content, dict) or key not in content:
            raise InputError(f'{file} has no "{key}": it is not a dataset.json of nnU-Net v2')
    if not isinstance(content["labels"], dict) or not isinstance(content["file_ending"], str):
        raise InputError(f'{file}: "labels" must be a dictionary and "file_ending" a text')
    values = {}
    for name, value in content["labels"].items():
        try:
            values[name] = tuple(int(v) for v in (value if isinstance(value, list) else [value]))
        except (TypeError, ValueError) as error:
            raise InputError(
                f'{file}: label "{name}" is {value!r}, but must be a number or a list of numbers'
            ) from error
    ignore = values.pop("ignore", None)
    if ignore is not None and len(ignore) != 1:
        raise InputError(f"{file}: the ignore label must be one number, not {list(ignore)}")
    masks = {name: v for name, v in values.items() if set(v) != {0}}
    if not masks:
        raise InputError(f"{file} declares no label beside the background: there is nothing to evaluate")
    known = frozenset(v for entry in values.values() for v in entry) | {0}
    return _Labels(masks, known, ignore[0] if ignore else None, content)


def _find_jobs(reference: Path, prediction: Path, labels: _Labels, largest_component: bool) -> list[_Job]:
    references, predictions = (_files(folder, labels.ending) for folder in (reference, prediction))
    if not references:
        raise InputError(f"{reference} holds no file that ends with {labels.ending}, dataset.json's file_ending")
    missing, extra = sorted(set(references) - set(predictions)), sorted(set(predictions) - set(references))
    if missing:
        raise InputError(
            f"{prediction} lacks predictions of {listed(missing)}: predict them too, with nnUNetv2_predict ... "
            f"-o {prediction} --continue_prediction, or copy the other label files to a folder and name it with -ref"
        )
    if extra:
        raise InputError(f"{prediction} has files without a reference in {reference}: {listed(extra)}: remove them")
    reader = _reader(labels.content, references[min(references)])
    postprocessing = tuple(POSTPROCESSING)[: 2 if largest_component else 1]
    return [
        _Job(name[: -len(labels.ending)], file, predictions[name], labels, reader, postprocessing)
        for name, file in sorted(references.items())
    ]


def _files(folder: Path, ending: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    return {f.name: f for f in folder.iterdir() if f.name.endswith(ending) and not f.name.startswith(".")}


def _reader(dataset_json: dict, example: Path) -> type[BaseReaderWriter]:
    """nnU-Net's reader for these files; it prints the traceback of every reader that it tries in vain."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            return determine_reader_writer_from_dataset_json(dataset_json, str(example), verbose=False)
        except RuntimeError as error:
            raise InputError(f"{example} cannot be read by any of nnU-Net's readers: is it damaged?") from error


# ------------------------------------------------------------------------------------------------------------- one case


def _evaluate_case(job: _Job) -> list[dict]:
    reference, geometry = _read(job.reference, job.reader)
    prediction, geometry_prediction = _read(job.prediction, job.reader)
    _check_alignment(job, reference, prediction, geometry, geometry_prediction)
    valid = _check_labels(job, reference, prediction)
    spacing = _spacing_mm(job, geometry)
    axes = [axis for axis, size in enumerate(reference.shape) if size > 1] or [0]
    rows = []
    for label, values in job.labels.masks.items():
        in_reference = np.isin(reference, values)
        in_prediction = np.isin(prediction, values)
        for postprocessing in job.postprocessing:
            if postprocessing == "largest_component":
                in_prediction = largest_component(in_prediction)
            predicted, true = (_squeeze(mask & valid, axes) for mask in (in_prediction, in_reference))
            rows.append(
                {
                    "case": job.case,
                    "label": label,
                    "postprocessing": postprocessing,
                    **compare_masks(predicted, true, spacing and [spacing[axis] for axis in axes]),
                    "voxels_prediction": int(np.count_nonzero(predicted)),
                    "voxels_reference": int(np.count_nonzero(true)),
                }
            )
    return rows


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest component of a bool mask, neighbours by face, edge or corner; an empty mask stays empty."""
    components, count = label_components(mask, generate_binary_structure(mask.ndim, mask.ndim))
    if count < 2:
        return mask
    return components == np.bincount(components.ravel())[1:].argmax() + 1


def _squeeze(mask: np.ndarray, axes: list[int]) -> np.ndarray:
    return mask.reshape([mask.shape[axis] for axis in axes])


def _read(file: Path, reader: type[BaseReaderWriter]) -> tuple[np.ndarray, dict]:
    """Values (Z, Y, X) and nnU-Net's properties of a label file."""

    def tell(error: Exception) -> str:
        return f"{file} cannot be read: {' '.join(str(error).split()) or type(error).__name__}"

    with read_errors(tell):
        if file.suffix == ".gz":  # SimpleITK takes a file that ends too soon for a whole one
            with gzip.open(file) as f:
                while f.read(1 << 22):
                    pass
        with contextlib.redirect_stdout(io.StringIO()):  # nnU-Net's tif reader prints where it finds no voxel size
            values, properties = reader().read_seg(str(file))
    if len(values) != 1:
        raise InputError(f"{file} has {len(values)} channels: a label file has one")
    return values[0], properties


def _check_alignment(
    job: _Job, reference: np.ndarray, prediction: np.ndarray, geometry: dict, geometry_prediction: dict
) -> None:
    if prediction.shape != reference.shape:
        raise InputError(
            f"{job.prediction} has size {prediction.shape}, but {job.reference} has {reference.shape} (z, y, x): "
            "predict the same images"
        )
    expected, found = _placement(geometry), _placement(geometry_prediction)
    for name, (value, tolerance) in expected.items():
        other = found[name][0]
        if other.shape != value.shape or not np.allclose(other, value, rtol=0, atol=tolerance):
            raise InputError(
                f"{job.prediction} has {name} {_numbers(other)}, but {job.reference} has {_numbers(value)}: "
                "they are not aligned"
            )


def _placement(properties: dict) -> dict[str, tuple[np.ndarray, float]]:
    """Name -> value and absolute tolerance; over 1,000 voxels they add up to about a tenth of a voxel."""
    spacing = np.asarray(properties["spacing"], float)
    placement = {"spacing": (spacing, 1e-4 * spacing.min())}
    if "sitk_stuff" in properties:
        placement["origin"] = (np.asarray(properties["sitk_stuff"]["origin"]), 1e-2 * spacing.min())
        placement["direction"] = (np.asarray(properties["sitk_stuff"]["direction"]), 1e-4)
    if "nibabel_stuff" in properties:
        stuff = properties["nibabel_stuff"]
        affine = np.asarray(stuff.get("reoriented_affine", stuff["original_affine"]))
        placement["origin"] = (affine[:3, 3], 1e-2 * spacing.min())
        placement["direction"] = (affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0), 1e-4)
    return placement


def _numbers(values: np.ndarray) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in np.ravel(values)) + ")"


def _check_labels(job: _Job, reference: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Refuse values that dataset.json does not know; return where the reference does not have the ignore label."""
    ignore = job.labels.ignore
    for file, array, known in (
        (job.reference, reference, job.labels.known | ({ignore} if ignore is not None else set())),
        (job.prediction, prediction, job.labels.known),
    ):
        unknown = np.unique(array[~np.isin(array, list(known))]).tolist()
        if unknown:
            which = "the ignore label" if unknown == [ignore] else "labels that dataset.json does not know"
            raise InputError(f"{file} has {which}: {listed([f'{value:g}' for value in unknown])}")
    return reference != ignore if ignore is not None else np.ones(reference.shape, bool)


def _spacing_mm(job: _Job, properties: dict) -> list[float] | None:
    """Voxel size (z, y, x) in mm, or None where the file's format has none and nnU-Net's reader fills in numbers."""
    beside = issubclass(job.reader, Tiff3DIO) and job.reference.with_suffix(".json").is_file()
    if beside or "sitk_stuff" in properties or "nibabel_stuff" in properties:
        return [float(s) for s in properties["spacing"]]
    return None


# -------------------------------------------------------------------------------------------------------------- writing


def _write_csv(file: Path, rows: list[dict]) -> None:
    write_csv(file, COLUMNS, ({k: f"{v:.6f}" if k in METRICS else v for k, v in row.items()} for row in rows))


def _without_nan(value):
    """The same nested dict with null for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
