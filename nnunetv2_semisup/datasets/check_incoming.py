"""Read images that shall be brought in, and say which cannot serve and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunetv2_semisup.data import checks
from nnunetv2_semisup.data.folders import RAW_FOLDER
from nnunetv2_semisup.datasets import dicom, images
from nnunetv2_semisup.datasets.incoming import PHOTOGRAPHS, Incoming
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.files import listed, read_json


@dataclass(frozen=True)
class Seen:
    """What is known of a case after reading it.

    Attributes:
        case: its id.
        file: its first one, for errors.
        hash: of its content.
        channels: number of channels.
        axes: number of axes of a channel, 2 or 3.
        spacing: x, y(, z) in mm.
        has_side: it was read from a file beside the image.
        orientation: e.g. "LPS"; "" for 2D images.
        like_label: whole numbers and fewer than 10 different ones.
        worthless: why it shows nothing, or "".
    """

    case: str
    file: Path
    hash: str
    channels: int
    axes: int
    spacing: tuple[float, ...]
    has_side: bool
    orientation: str
    like_label: bool
    worthless: str


def look(item: Incoming, by_nibabel: bool = False) -> Seen:
    """Read and check all channels of a case.

    Args:
        item: the case.
        by_nibabel: read NIfTI as the data set's own reader does, which is one of nnU-Net's two that use nibabel.
    """
    channels = read_channels(item, by_nibabel)
    first = channels[0]
    axes = min(first.GetDimension(), 3)
    for channel, files in zip(channels, item.sources, strict=True):
        checks.check_image(sitk.GetArrayViewFromImage(channel), files[0], axes=(2, 3, 4))
        if channel.GetSize() != first.GetSize() or not images.same_geometry(channel, first):
            raise InputError(f"{files[0]}: shape or geometry differ from {item.sources[0][0]}; resample it first")
    if first.GetDimension() == 4:  # the channels are the fourth axis
        if len(channels) > 1:
            raise InputError(f"{item.sources[0][0]}: a fourth axis beside other channels; give one file per channel")
        number = first.GetSize()[3]
    else:
        number = sum(channel.GetNumberOfComponentsPerPixel() for channel in channels)
    turned = images.orientation(first) if axes == 3 else ""
    few, worthless = _has_few_values(sitk.GetArrayViewFromImage(first)), ""
    try:
        for channel, files in zip(channels, item.sources, strict=True):
            checks.check_shows_something(sitk.GetArrayViewFromImage(channel), files[0])
    except InputError as error:  # of new images only: nnU-Net takes labelled ones as they are
        worthless = str(error)
    spacing = _side_spacing(item.side) if item.side else first.GetSpacing()[:axes]
    file, digest = item.sources[0][0], images.content_hash(channels)
    return Seen(item.case, file, digest, number, axes, spacing, item.side is not None, turned, few, worthless)


def try_look(item: Incoming, by_nibabel: bool = False) -> Seen | str:
    """As :func:`look`, but what is wrong with the case is told instead of raised."""
    try:
        return look(item, by_nibabel)
    except InputError as error:
        return str(error)


def _side_spacing(file: Path) -> tuple[float, ...]:
    """x, y, z in mm, of a file that has them as nnU-Net reads them, ``{"spacing": [z, y, x]}``."""
    content = read_json(file, "correct it")
    spacing = content.get("spacing") if isinstance(content, dict) else None
    if (
        not isinstance(spacing, list)
        or len(spacing) != 3
        or not all(type(value) in (int, float) and 0 < value < np.inf for value in spacing)
    ):
        raise InputError(f'{file}: expected {{"spacing": [z, y, x]}}, three numbers above 0 in mm; correct it')
    return tuple(map(float, spacing[::-1]))


def _has_few_values(array: np.ndarray) -> bool:
    if len(np.unique(array.ravel()[::101])) >= 10:  # enough for nearly all images, and quick
        return False
    values = np.unique(array)
    return len(values) < 10 and bool((values == np.round(values)).all())


def read_channels(item: Incoming, by_nibabel: bool) -> list[sitk.Image]:
    channels = []
    for files in item.sources:
        image = dicom.read_series(files) if len(files) > 1 else images.read_image(files[0], by_nibabel=by_nibabel)
        wrong = image.GetDimension() > 2 and image.GetNumberOfComponentsPerPixel() > 1
        if wrong or image.GetDimension() not in (2, 3, 4):
            raise InputError(f"{files[0]}: several values per voxel or a time axis; split it into one file per channel")
        channels.append(image)
    return channels


def refusals(
    new: Sequence[Seen], labelled: Sequence[Seen], channels: int, reorient: bool, reader_turns: bool
) -> dict[str, str]:
    """Case -> why it is refused: channels, axes, orientation, images like labels. What several share is one text.

    Args:
        new: cases that shall be brought in.
        labelled: of the dataset.
        channels: of the dataset.
        reorient: the images will be turned.
        reader_turns: the dataset's reader turns images itself.

    Raises:
        InputError: ``reorient`` has no one orientation to turn to.
    """
    refused = {fact.case: fault for fact in new if (fault := _own_fault(fact, labelled, channels))}
    rest = [fact for fact in new if fact.case not in refused]
    usual = {fact.orientation for fact in labelled}
    bare = [fact for fact in rest if not fact.has_side and any(other.has_side for other in labelled)]
    turned = [fact for fact in rest if usual and fact.orientation not in usual and not reader_turns]
    few = [fact for fact in rest if fact.like_label and not any(other.like_label for other in labelled)]
    if turned and reorient and len(usual) > 1:
        raise InputError(
            f"--reorient: the labelled images have several orientations themselves ({listed(sorted(usual))})"
        )
    if bare:
        _refuse_together(
            refused,
            bare,
            f"{listed([str(fact.file) for fact in bare])}: no file CASE.json with the voxel size beside it, as "
            f'labelled images have, so nnU-Net would take it for 1 mm; add it, {{"spacing": [z, y, x]}} in mm',
        )
    if turned and not reorient:
        _refuse_together(
            refused,
            turned,
            f"{listed([f'{fact.case} ({fact.orientation})' for fact in turned])}: the axes point elsewhere than in the "
            f"labelled images ({listed(sorted(usual))}) and nnU-Net does not turn images; --reorient turns them "
            f"without loss",
        )
    if few:
        _refuse_together(
            refused,
            few,
            f"{listed([str(fact.file) for fact in few])}: labels? Fewer than 10 different values, all of them whole "
            f"numbers, unlike the labelled images; move them away. Should they be images, put them into {RAW_FOLDER} "
            f"by hand",
        )
    return refused


def _refuse_together(refused: dict[str, str], facts: Sequence[Seen], reason: str) -> None:
    for fact in facts:
        refused.setdefault(fact.case, reason)


def _own_fault(fact: Seen, labelled: Sequence[Seen], channels: int) -> str:
    if fact.worthless:
        return fact.worthless
    if fact.channels != channels:
        four = " (the fourth is transparency, save it without)" if (fact.channels, channels) == (4, 3) else ""
        return (
            f"{fact.file}: it has {fact.channels} channels{four}, dataset.json declares {channels}; remove or "
            f"complete it"
        )
    allowed = {other.axes for other in labelled} or ({2, 3} if fact.file.suffix.lower() in PHOTOGRAPHS else {3})
    if fact.axes not in allowed:
        return (
            f"{fact.file}: an image of {fact.axes} axes, the labelled ones have {min(allowed)}; nnU-Net would "
            f"stretch it into a volume: leave it out"
        )
    return ""


def far_spacings(new: Sequence[Seen], labelled: Sequence[Seen]) -> list[str]:
    """Cases whose voxels are less than half or more than twice as long as those of the labelled ones."""
    if not labelled or not new or len({len(fact.spacing) for fact in (*labelled, *new)}) > 1:
        return []
    spacings = np.sort([fact.spacing for fact in labelled], axis=1)  # the order of the axes may differ
    low, high = spacings.min(axis=0) / 2, spacings.max(axis=0) * 2
    return [fact.case for fact in new if ((np.sort(fact.spacing) < low) | (np.sort(fact.spacing) > high)).any()]
