"""The demo's data set out of a task of the Medical Segmentation Decathlon, as it is downloaded."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nnunetv2_semisup.data.checks import IMAGES_OF, LABELLED, LABELS_OF, TEST, UNLABELLED
from nnunetv2_semisup.data.jobs import run_jobs
from nnunetv2_semisup.datasets.decathlon import find_files, listed, named, read_case
from nnunetv2_semisup.datasets.images import packed, write_image
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.files import listed as some_of
from nnunetv2_semisup.files import read_object, write_json

LABELLED_CASES = 4
MOST_TEST_CASES = 60  # else a quarter of the cases
PARTS = ("imagesTr", "labelsTr", "dataset.json")
FILE_ENDING = ".nii.gz"


@dataclass(frozen=True)
class Task:
    """A task, and what becomes of its cases.

    Attributes:
        name: of its folder.
        channels: their names in order.
        labels: name -> value, background 0.
        images: case -> file, of one channel or of all.
        label_files: case -> file.
        roles: case -> LABELLED, UNLABELLED or TEST.
    """

    name: str
    channels: list[str]
    labels: dict[str, int]
    images: dict[str, Path]
    label_files: dict[str, Path]
    roles: dict[str, str]

    def number(self, role: str) -> int:
        """Of cases."""
        return sum(found == role for found in self.roles.values())


def read_task(source: Path) -> Task:
    """Look through the folder of a task and divide its cases at random, always alike; no image is read.

    The labels of the challenge's own test images are secret, so test cases are taken from those with a label.

    Raises:
        InputError: it is no folder of a task, or an incomplete or too small one.
    """
    if not source.is_dir():
        raise InputError(f"--data {source} is no folder: give that of an unpacked task, e.g. Task04_Hippocampus")
    if missing := [part for part in PARTS if not (source / part).exists()]:
        deeper = sorted(source.glob("*/imagesTr"))
        remedy = f"did you mean {deeper[0].parent}?" if deeper else "give the folder of one task as it is downloaded"
        raise InputError(
            f"--data {source} has no {', '.join(missing)}, so it is no task of the Medical Segmentation Decathlon: "
            f"{remedy}{packed(source)}"
        )
    source = source.resolve()
    json_file = source / "dataset.json"
    content = read_object(json_file, "copy or download the task again")
    channels = named(content, "modality", json_file)
    labels = {label: value for value, label in enumerate(named(content, "labels", json_file)) if value}
    images, label_files = find_files(source / "imagesTr"), find_files(source / "labelsTr")
    cases = sorted(listed(content, json_file) or images)
    for folder, files in (("imagesTr", images), ("labelsTr", label_files)):
        if lacking := [case for case in cases if case not in files]:
            raise InputError(f"{source / folder} lacks {some_of(lacking)}, which dataset.json lists: complete it")
    tests = min(MOST_TEST_CASES, len(cases) // 4)
    if len(cases) < LABELLED_CASES + 2:
        raise InputError(f"--data {source}: {len(cases)} cases with label; the demo needs {LABELLED_CASES + 2} or more")
    random.Random(0).shuffle(cases)
    order = [TEST] * tests + [LABELLED] * LABELLED_CASES + [UNLABELLED] * (len(cases) - tests - LABELLED_CASES)
    roles = dict(zip(cases, order, strict=True))
    return Task(source.name, channels, {"background": 0} | labels, images, label_files, roles)


def write_dataset(task: Task, raw: Path, processes: int) -> None:
    """Write a task as an nnU-Net raw data set; the labels of unlabelled cases are neither read nor written."""
    for folder in (*IMAGES_OF.values(), *LABELS_OF.values()):
        if not folder.endswith("Val"):
            (raw / folder).mkdir(parents=True)
    run_jobs(partial(_write_case, task=task, raw=raw), sorted(task.roles), processes, "Copying")
    content = {
        "channel_names": {str(number): name for number, name in enumerate(task.channels)},
        "labels": task.labels,
        "numTraining": task.number(LABELLED),
        "file_ending": FILE_ENDING,
    }
    write_json(raw / "dataset.json", content)


def _write_case(case: str, task: Task, raw: Path) -> None:
    role = task.roles[case]
    label_file = None if role == UNLABELLED else task.label_files[case]
    images, label, _ = read_case(task.images[case], label_file, len(task.channels), tuple(task.labels.values()))
    for channel, image in enumerate(images):
        write_image(image, raw / IMAGES_OF[role] / f"{case}_{channel:04d}{FILE_ENDING}")
    if label is not None:
        write_image(label, raw / LABELS_OF[role] / f"{case}{FILE_ENDING}")
