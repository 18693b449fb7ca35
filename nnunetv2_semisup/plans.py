"""Derived plans files: settings of our trainers, and a preset small enough to train on a CPU.

A derived plans file is an ordinary one: ``nnUNetv2_train -p NAME`` takes it. The base file is never changed.
"""

from __future__ import annotations

import copy
import json
import re
from math import prod
from pathlib import Path

from nnunetv2_semisup import settings
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.files import write_json

DERIVED_FROM = "semisup_derived_from"  # key that marks a plans file as ours; its value is the base's name
PRESET = "semisup_preset"  # key that holds the preset, null without one

CPU_CONFIGURATIONS = ("2d", "3d_fullres")  # no cascade: its low resolution stage saves what the preset saves already
CPU_SPACING_FACTOR = 3  # a patch that a CPU can afford then still sees the whole organ
CPU_VOXELS = {2: 128 * 128, 3: 64 * 48 * 32}  # per patch; 3D: what a whole LA case fills once downsampled
CPU_BATCH_SIZE = {2: 8, 3: 2}  # 3D: nnU-Net's smallest; 2D: about as many voxels a step as in 3D
CPU_FEATURES = (8, 16, 32, 64)  # a quarter of nnU-Net's, so a sixteenth of the work; the last one repeats
MIN_EDGE = 4  # voxels, shortest edge of the bottleneck; nnU-Net's value
MAX_POOLINGS = 999999  # nnU-Net's value for "no limit"
LARGEST_PATCH = {2: 2048**2, 3: 256**3}  # voxels; nnU-Net's first guess, then clipped to the image
SAME_RESOLUTION = 2  # spacings within this factor count as equal, as in nnU-Net's topology function

_NOT_PLANS = {"dataset", "dataset_fingerprint", "splits_final"}  # other JSON files that nnU-Net keeps in that folder


def derive(preprocessed_dataset_folder: Path, base: str, name: str, preset: str | None, overrides: list[str]) -> Path:
    """Write the plans file ``<name>.json``, derived from ``<base>.json``.

    Args:
        preprocessed_dataset_folder: the data set's folder in nnUNet_preprocessed.
        base: name of existing plans, e.g. ``nnUNetPlans``.
        name: name of the new plans, with or without ``.json``. A file of that name is replaced only if we derived it.
        preset: ``cpu`` or None. Without one the configurations, and so the preprocessed data, are those of the base.
        overrides: ``TRAINER.KEY=VALUE`` each, TRAINER without epoch suffix; they beat the base's, the last one wins.

    Returns:
        The written file.

    Raises:
        InputError: a name, a file, a preset or an override is wrong.
    """
    folder = Path(preprocessed_dataset_folder)
    base, name = base.removesuffix(".json"), name.removesuffix(".json")
    _check_name(name)
    if name == base:
        raise InputError(f"the derived plans need another name than their base {base}")
    plans = _read_base(folder, base)
    target = folder / f"{name}.json"
    if target.exists() and not _derived_by_us(target):
        raise InputError(f"{target} exists and was not derived by this command: choose another name")

    plans = with_settings(plans, parse_overrides(overrides), f"{base}.json with --set")
    if preset == "cpu":
        plans = cpu_preset(plans, name)
    elif preset is not None:
        raise InputError(f"unknown preset {preset!r}: there is cpu")
    plans |= {"plans_name": name, DERIVED_FROM: base, PRESET: preset}
    write_json(target, plans, indent=4)
    return target


def parse_overrides(overrides: list[str]) -> dict[str, dict]:
    """Read ``TRAINER.KEY=VALUE`` texts into ``{TRAINER: {KEY: value}}``; values as :func:`settings.parse_value`."""
    parsed: dict[str, dict] = {}
    for text in overrides:
        match = re.fullmatch(r"(\w+)\.(\w+)=(.*)", text, re.DOTALL)
        if not match:
            raise InputError(f"--set {text!r} is malformed: write TRAINER.KEY=VALUE")
        trainer, key, value = match.groups()
        parsed.setdefault(trainer, {})[key] = settings.parse_value(value)
    return parsed


def with_settings(plans: dict, overrides: dict[str, dict], where: str) -> dict:
    """A copy of ``plans`` with ``overrides`` merged into its ``semisup`` section, every trainer in it checked.

    Args:
        plans: content of a plans file.
        overrides: ``{TRAINER: {KEY: value}}``; they beat the values that are there.
        where: what to name in an error.
    """
    merged = copy.deepcopy(plans.get("semisup", {}))
    if not isinstance(merged, dict) or not all(isinstance(values, dict) for values in merged.values()):
        raise InputError(f'{where}: "semisup" must look like {{"TRAINER": {{"KEY": VALUE}}}}')
    for trainer, values in overrides.items():
        merged.setdefault(trainer, {}).update(values)
    for trainer, values in merged.items():
        _check_settings(trainer, values, where)
    return {**plans, "semisup": merged} if merged else dict(plans)


def _check_settings(trainer: str, values: dict, where: str) -> None:
    if suffix := re.search(r"_\d+epochs?$", trainer):
        raise InputError(f"{where}: {trainer}: settings hold for any number of epochs: drop the suffix {suffix[0]}")
    from nnunetv2_semisup import discovery  # finds trainers by importing them, and torch

    try:
        settings_class = discovery.settings_class(trainer)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    settings.resolve(settings_class, values, f"{where}: {trainer}")


def cpu_preset(plans: dict, name: str) -> dict:
    """A copy of ``plans`` with coarse, small 2d and 3d_fullres configurations and no others.

    Args:
        plans: content of a plans file.
        name: the new plans' name; the preprocessed data of a configuration is called ``<name>_<configuration>``.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager  # imports torch

    manager = PlansManager(plans)  # resolves inheritance and the format of old versions, on copies
    kept = [c for c in plans["configurations"] if c in CPU_CONFIGURATIONS]
    if not kept:
        raise InputError(f"preset cpu needs a configuration {' or '.join(CPU_CONFIGURATIONS)}; the plans have neither")
    configurations = {c: cpu_configuration(manager.get_configuration(c).configuration, name, c) for c in kept}
    return {**plans, "configurations": configurations}


def cpu_configuration(configuration: dict, name: str, configuration_name: str) -> dict:
    """A copy of one configuration, coarser and re-planned for a CPU; all that is not about size stays.

    Args:
        configuration: as in a plans file, with nothing inherited.
        name: the new plans' name.
        configuration_name: e.g. ``3d_fullres``.
    """
    where = f"preset cpu: configuration {configuration_name}"
    new = copy.deepcopy(configuration)
    new.pop("inherits_from", None)
    spacing, median = new.get("spacing", []), new.get("median_image_size_in_voxels", [])
    kwargs = new.get("architecture", {}).get("arch_kwargs", {})
    if (
        len(spacing) not in CPU_VOXELS
        or len(median) != len(spacing)
        or not {"strides", "kernel_sizes"} <= kwargs.keys()
    ):
        raise InputError(f"{where} is not a U-Net planned by nnU-Net: use plans of nnUNetv2_plan_experiment")

    coarse = coarser(spacing)
    median = [max(1, round(n * old / s)) for n, old, s in zip(median, spacing, coarse, strict=True)]
    patch, strides, kernels = plan_patch(coarse, median, CPU_VOXELS[len(spacing)])
    stages = len(strides)
    if stages == 1:
        raise InputError(f"{where}: images of {median} voxels are too small to pool: train with the base plans")
    identifier = f"{name}_{configuration_name}"
    if identifier == new.get("data_identifier"):
        raise InputError(f"{where} would overwrite the base's preprocessed data {identifier}: choose another name")

    new |= {
        "data_identifier": identifier,
        "batch_size": CPU_BATCH_SIZE[len(spacing)],
        "patch_size": patch,
        "median_image_size_in_voxels": median,
        "spacing": coarse,
    }
    kwargs |= {
        "n_stages": stages,
        "features_per_stage": _fit(CPU_FEATURES, stages),
        "kernel_sizes": kernels,
        "strides": strides,
    }
    lengths = {"n_conv_per_stage": stages, "n_blocks_per_stage": stages, "n_conv_per_stage_decoder": stages - 1}
    for key, length in lengths.items():
        if isinstance(kwargs.get(key), (list, tuple)):  # a single number holds for all stages
            kwargs[key] = _fit(kwargs[key], length)
    return new


def coarser(spacing: list[float]) -> list[float]:
    """``spacing`` in mm, 3 times larger on the axes within a factor of 2 of the finest, unchanged on the others."""
    finest = min(spacing)
    return [float(s * CPU_SPACING_FACTOR if s / finest < SAME_RESOLUTION else s) for s in spacing]


def plan_patch(
    spacing: list[float], median: list[int], max_voxels: int
) -> tuple[list[int], list[list[int]], list[list[int]]]:
    """Choose a patch of at most ``max_voxels``, with pooling and kernel sizes from nnU-Net's topology function.

    As nnU-Net's planner does, start from the median image, clipped to a cube in mm, and shrink the axis that is largest
    relative to the median image. The planner shrinks by estimated GPU memory, we by the number of voxels.

    Args:
        spacing: mm per voxel, 2 or 3 axes.
        median: voxels of the median image, same axes.
        max_voxels: budget of the patch.

    Returns:
        Patch size in voxels, strides and kernel sizes per stage.
    """
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

    edge_mm = (LARGEST_PATCH[len(spacing)] * prod(spacing)) ** (1 / len(spacing))
    size = [min(n, round(edge_mm / s)) for n, s in zip(median, spacing, strict=True)]
    while True:
        _, strides, kernels, patch, _ = get_pool_and_conv_props(spacing, size, MIN_EDGE, MAX_POOLINGS)
        if prod(patch) <= max_voxels:
            return [int(n) for n in patch], [list(s) for s in strides], [list(k) for k in kernels]
        # by one voxel: padding may hold the patch for a few rounds, but no size is skipped and the loop must end
        shrinkable = [axis for axis, n in enumerate(size) if n > MIN_EDGE]
        size[max(shrinkable, key=lambda axis: (patch[axis] / median[axis], axis))] -= 1


def _fit(values, length: int) -> list:
    """The first ``length`` values, the last one repeated where there are fewer."""
    return [values[min(i, len(values) - 1)] for i in range(length)]


def _check_name(name: str) -> None:
    # nnU-Net splits the name of a results folder, TRAINER__PLANS__CONFIGURATION, at the double underscores
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or "__" in name or name in _NOT_PLANS:
        raise InputError(
            f"{name!r} cannot name plans: use letters, digits, '-', '.' and single '_', and none of "
            f"{', '.join(sorted(_NOT_PLANS))}"
        )


def _read_base(folder: Path, base: str) -> dict:
    file = folder / f"{base}.json"
    if not file.is_file():
        there = ", ".join(f.stem for f in sorted(folder.glob("*.json")) if _is_plans(_read_or_none(f)))
        remedy = f"there are {there}" if there else "run nnUNetv2_plan_and_preprocess first"
        raise InputError(f"no plans {base} in {folder}: {remedy}")
    try:
        plans = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON ({error}): repair it or plan again") from None
    if not _is_plans(plans):
        raise InputError(f"{file} is not a plans file, it has no configurations: name one of nnUNetv2_plan_experiment")
    return plans


def _is_plans(content) -> bool:
    return isinstance(content, dict) and isinstance(content.get("configurations"), dict)


def _derived_by_us(file: Path) -> bool:
    content = _read_or_none(file)
    return _is_plans(content) and DERIVED_FROM in content


def _read_or_none(file: Path):
    """The content of a JSON file; None where there is none to read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
