"""Tasks of the Medical Segmentation Decathlon: which cases there are, and how one is read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import SimpleITK as sitk

from nnunetv2_semisup.datasets.images import align_label, read_image, read_label, walk
from nnunetv2_semisup.errors import InputError


def find_files(folder: Path) -> dict[str, Path]:
    """Case -> NIfTI file; none if there is no such folder."""
    found: dict[str, Path] = {}
    for path in walk(folder) if folder.is_dir() else ():
        if match := re.fullmatch(r"(.+)\.nii(\.gz)?", path.name):
            if match[1] in found:
                raise InputError(f"{path}: there is another {found[match[1]]}; give one copy of the data")
            found[match[1]] = path
    return found


def named(content: dict, key: str, file: Path) -> list[str]:
    """The names that ``{"0": NAME, "1": NAME, ...}`` gives, in order."""
    names = content.get(key)
    names = names if isinstance(names, dict) else {}
    numbers = [str(number) for number in range(len(names))]
    if not numbers or set(names) != set(numbers) or len({str(name) for name in names.values()}) < len(names):
        raise InputError(
            f'{file}: "{key}" must look like {{"0": NAME, "1": NAME}}, with a different name for each; '
            f"copy or download it again"
        )
    return [str(names[number]) for number in numbers]


def listed(content: dict, file: Path) -> list[str]:
    """The training cases that dataset.json lists; empty if it lists none."""
    try:
        return [PurePosixPath(entry["image"]).name.split(".nii")[0] for entry in content.get("training", [])]
    except (TypeError, KeyError):
        text = f'{file}: "training" must look like [{{"image": FILE, "label": FILE}}]; copy or download it again'
        raise InputError(text) from None


def read_case(
    image_file: Path, label_file: Path | None, channels: int, values: Sequence[int]
) -> tuple[tuple[sitk.Image, ...], sitk.Image | None, bool]:
    """Read a case.

    Args:
        image_file: its image has three axes, or four with the channels last.
        label_file: None: the label is not touched.
        channels: number of channels that the image must have.
        values: that the label may have.

    Returns:
        One image per channel, the label on their grid, and whether both headers describe the same place.
    """
    images = split_channels(read_image(image_file), channels, image_file)
    if label_file is None:
        return images, None, True
    return (images, *align_label(read_label(label_file, values), images[0], label_file, image_file))


def split_channels(image: sitk.Image, channels: int, path: Path) -> tuple[sitk.Image, ...]:
    """The 3D channels of an image with axes (x, y, z) or (x, y, z, channel)."""
    axes = image.GetDimension()
    found = image.GetSize()[3] if axes == 4 else 1
    if axes not in (3, 4) or image.GetNumberOfComponentsPerPixel() > 1 or found != channels:
        raise InputError(
            f"{path}: the image has shape {image.GetSize()}, expected a volume with {channels} channels as "
            f"dataset.json names them; copy or download it again"
        )
    if axes == 3:
        return (image,)
    split = tuple(image[:, :, :, channel] for channel in range(channels))
    for key in ("qform_code", "sform_code"):  # say whether the header knows where the axes point
        if image.HasMetaDataKey(key):
            for channel in split:
                channel.SetMetaData(key, image.GetMetaData(key))
    return split
