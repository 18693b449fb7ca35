"""Write a CT as a DICOM series, one file per slice, names in no useful order, as archives deliver them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import SimpleITK as sitk


def write_series(folder: Path, image: sitk.Image, patient: str, skip: tuple[int, ...] = (), series: str = "") -> None:
    """Write ``image`` (int16, HU) below ``folder``, without the slices in ``skip``; ``series``: its UID."""
    folder.mkdir(parents=True, exist_ok=True)
    direction = np.array(image.GetDirection()).reshape(3, 3)
    own = "1.2.4." + str(int(hashlib.md5(str(folder).encode()).hexdigest()[:8], 16))
    tags = {
        "0008|0060": "CT",
        "0010|0020": patient,
        "0020|000d": "1.2.3." + str(int(hashlib.md5(patient.encode()).hexdigest()[:8], 16)),
        "0020|000e": series or own,
        "0020|0037": "\\".join(f"{value:.10g}" for value in direction.T[:2].ravel()),
        "0028|1052": "-1024",
        "0028|1053": "1",
    }
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for index in range(image.GetDepth()):
        if index in skip:
            continue
        piece = image[:, :, index]
        for tag, value in tags.items():
            piece.SetMetaData(tag, value)
        position = image.TransformIndexToPhysicalPoint((0, 0, index))
        piece.SetMetaData("0020|0032", "\\".join(f"{value:.10g}" for value in position))
        piece.SetMetaData("0020|0013", str(index + 1))
        piece.SetMetaData("0008|0018", f"{own}.{index + 1}")
        writer.SetFileName(str(folder / f"{hashlib.md5(str(index).encode()).hexdigest()[:8]}.dcm"))
        writer.Execute(piece)


def make_ct(seed: int, size=(7, 6, 5), spacing=(0.7, 0.8, 1.5), angle: float = 0.2) -> sitk.Image:
    """A random CT, different along all axes, rotated about an oblique axis by ``angle`` (rad)."""
    generator = np.random.default_rng(seed)
    image = sitk.GetImageFromArray(generator.integers(-1000, 1500, size[::-1]).astype(np.int16))
    image.SetSpacing(spacing)
    image.SetOrigin((-50.5, 20.25, 300.0))
    image.SetDirection(rotation(angle).ravel())
    return image


def rotation(angle: float) -> np.ndarray:
    """Rotation matrix about the axis (1, 2, 3), Rodrigues' formula."""
    x, y, z = np.array([1, 2, 3]) / np.sqrt(14)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
