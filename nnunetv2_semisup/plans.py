"""Derived plans files: settings of our trainers, and networks and images of another size.

A derived plans file is an ordinary one: ``nnUNetv2_train -p NAME`` takes it. The base file is never changed.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from nnunetv2_semisup import settings
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.files import dataset_id, listed, plans_in, write_json

DERIVED_FROM = "semisup_derived_from"  # key that marks a plans file as ours; its value is the base's name
PRESET = "semisup_preset"  # key that holds the preset, null without one

CONFIGURATIONS = ("2d", "3d_fullres")  # that can have another size: the cascade is one way to save already
SMALL_FEATURES = (8, 16, 32, 64)  # a quarter of nnU-Net's, so a sixteenth of the work
CPU_VOXELS = {2: 128 * 128, 3: 64 * 48 * 32}  # per patch; 3D: what a whole LA case fills once downsampled
MIN_EDGE = 4  # voxels, shortest edge of the bottleneck; nnU-Net's value
MAX_POOLINGS = 999999  # nnU-Net's value for "no limit"
LARGEST_PATCH = {2: 2048**2, 3: 256**3}  # voxels; nnU-Net's first guess, then clipped to the image
MIN_EDGE_OF_IMAGE = 32  # voxels; below, nnU-Net halves an axis less than three times, and small structures are gone
SAME_RESOLUTION = 2  # spacings within this factor count as equal, as in nnU-Net's topology function

_NOT_PLANS = {"dataset", "dataset_fingerprint", "splits_final"}  # other JSON files that nnU-Net keeps in that folder


@dataclass(frozen=True)
class Size:
    """What changes of the size of configurations; None leaves a part as the base has it.

    Attributes:
        features: channels of the first stages; the last one repeats.
        batch_size: number of axes -> labelled patches per step.
        patch_size: voxels, axes in the order of the plans; for the configurations with that many axes.
        coarsen: factor of the spacing on the axes within 2 times the finest; needs new preprocessed data unless 1.
        max_voxels: number of axes -> voxels of a patch that is planned anew.

    Raises:
        InputError: a value cannot be.
    """

    features: Sequence[int] | None = None
    batch_size: Mapping[int, int] | None = None
    patch_size: Sequence[int] | None = None
    coarsen: float | None = None
    max_voxels: Mapping[int, int] | None = None

    def __post_init__(self):
        if self.features is not None and (not self.features or min(self.features) < 1):
            raise InputError(f"{_option('--features', self.features)}: give at least one number, each 1 or more")
        if self.batch_size is not None and min(self.batch_size.values()) < 1:
            raise InputError(f"--batch_size {min(self.batch_size.values())}: give 1 or more")
        if self.patch_size is not None and (len(self.patch_size) not in (2, 3) or min(self.patch_size) < 1):
            raise InputError(f"{self.patch_option}: give 2 or 3 numbers of voxels, each 1 or more")
        if self.coarsen is not None and not 1 <= self.coarsen < math.inf:
            raise InputError(f"--coarsen {self.coarsen:g}: give a factor of 1 or more")

    @property
    def patch_option(self) -> str:
        """The option that gave the patch size, for errors."""
        return _option("--patch_size", self.patch_size)

    def with_preset(self, preset: str | None) -> Size:
        """This size, with what it leaves open as the preset has it."""
        if preset is None:
            return self
        if preset not in PRESETS:
            raise InputError(f"unknown preset {preset!r}: there are {', '.join(PRESETS)}")
        return replace(PRESETS[preset], **{part: value for part, value in vars(self).items() if value is not None})


def _option(name: str, values: Sequence[int] | None) -> str:
    return " ".join([name, *map(str, values or ())])


PRESETS = {
    # Batch: in 3D nnU-Net's smallest, in 2D about as many voxels a step. A patch then still sees the whole organ.
    "cpu": Size(features=SMALL_FEATURES, batch_size={2: 8, 3: 2}, coarsen=3, max_voxels=CPU_VOXELS),
    "small": Size(features=SMALL_FEATURES, batch_size={2: 12, 3: 2}),  # 2D: the literature's, beside 12 unlabelled
}


def derive(
    preprocessed_dataset_folder: Path,
    base: str,
    name: str,
    preset: str | None,
    overrides: list[str],
    size: Size = Size(),
    removed: Sequence[str] = (),
) -> Path:
    """Write the plans file ``<name>.json``, derived from ``<base>.json``.

    Args:
        preprocessed_dataset_folder: the data set's folder in nnUNet_preprocessed.
        base: name of existing plans, e.g. ``nnUNetPlans``.
        name: name of the new plans, with or without ``.json``. A file of that name is replaced only if we derived it,
            and the settings in it are kept.
        preset: one of ``PRESETS``, or None.
        overrides: ``TRAINER.KEY=VALUE`` each, TRAINER without epoch suffix; they beat the base's, the last one wins.
        size: beats the preset. Where neither says anything, the configurations stay as they are, all of them.
        removed: ``TRAINER.KEY`` each, settings that the new plans must not have.

    Returns:
        The written file.

    Raises:
        InputError: a name, a file, a preset, a size or an override is wrong.
    """
    size = size.with_preset(preset)
    folder = Path(preprocessed_dataset_folder)
    base, name = base.removesuffix(".json"), name.removesuffix(".json")
    _check_name(name)
    if name == base:
        raise InputError(f"the derived plans need another name than their base {base}")
    plans = _read_base(folder, base)
    target = folder / f"{name}.json"
    if target.exists() and not _derived_by_us(target):
        raise InputError(f"{target} exists and was not derived by this command: choose another name")

    origin = name if target.exists() else base
    if before := settings_in(folder, base, name):
        plans = {**plans, "semisup": before}
    plans = with_settings(plans, parse_overrides(overrides), f"{origin}.json with --set")
    plans = without_settings(plans, removed, f"{origin}.json")
    if size != Size():
        plans = resized(plans, size, name)
    plans |= {"plans_name": name, DERIVED_FROM: base, PRESET: preset}
    write_json(target, plans, indent=4)
    return target


def preprocessed_configurations(folder: Path, plans: dict) -> list[str]:
    """Configurations of ``plans`` whose labelled cases are preprocessed, ``3d_fullres`` first."""
    identifiers = {name: content.get("data_identifier") for name, content in plans["configurations"].items()}
    ready = [
        name for name, identifier in identifiers.items() if identifier and any((folder / identifier).glob("*.pkl"))
    ]
    return sorted(ready, key="3d_fullres".__ne__)


def settings_in(folder: Path, base: str, name: str) -> dict[str, dict]:
    """The settings that :func:`derive` starts from: those of the plans ``name`` if they exist, else of ``base``."""
    for file in (folder / f"{name.removesuffix('.json')}.json", folder / f"{base.removesuffix('.json')}.json"):
        content = _read_or_none(file)
        if isinstance(content, dict):
            return content.get("semisup", {})
    return {}


def without_settings(plans: dict, removed: Sequence[str], where: str) -> dict:
    """``plans`` without the settings ``TRAINER.KEY``; an InputError names one that is not there."""
    kept = copy.deepcopy(plans.get("semisup", {}))
    for text in removed:
        trainer, _, key = text.partition(".")
        if key not in kept.get(trainer, {}):
            there = listed([f"{name}.{k}" for name, values in kept.items() for k in values])
            raise InputError(f"--unset {text}: {where} has no such setting; it has {there or 'none'}")
        del kept[trainer][key]
    return {**plans, "semisup": {name: values for name, values in kept.items() if values}} if kept else plans


def changed_settings(before: dict[str, dict], after: dict[str, dict]) -> list[str]:
    """``TRAINER.KEY: old -> new`` for every setting that differs."""
    lines = []
    for trainer in sorted({*before, *after}):
        old, new = before.get(trainer, {}), after.get(trainer, {})
        for key in sorted({*old, *new}):
            texts = [json.dumps(values[key]) if key in values else "not set" for values in (old, new)]
            if texts[0] != texts[1]:
                lines.append(f"{trainer}.{key}: {texts[0]} -> {texts[1]}")
    return lines


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


def resized(plans: dict, size: Size, name: str) -> dict:
    """A copy of ``plans`` with the 2d and 3d_fullres configurations in another size, and no others.

    Args:
        plans: content of a plans file.
        size: what to change.
        name: the new plans' name; the data of a configuration with new spacing is called ``<name>_<configuration>``.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager  # imports torch

    manager = PlansManager(plans)  # resolves inheritance and the format of old versions, on copies
    kept = {c: manager.get_configuration(c).configuration for c in plans["configurations"] if c in CONFIGURATIONS}
    if not kept:
        raise InputError(f"another size needs a configuration {' or '.join(CONFIGURATIONS)}; the plans have neither")
    if size.patch_size and all(len(c.get("spacing", [])) != len(size.patch_size) for c in kept.values()):
        raise InputError(
            f"{size.patch_option}: none of the configurations {', '.join(kept)} has {len(size.patch_size)} axes"
        )
    return {**plans, "configurations": {c: resized_configuration(kept[c], size, name, c) for c in kept}}


def resized_configuration(configuration: dict, size: Size, name: str, configuration_name: str) -> dict:
    """A copy of one configuration in another size; all that is not about size stays.

    The patch stays unless one is given, a budget of voxels is, or the spacing changes, when it keeps its budget.

    Args:
        configuration: as in a plans file, with nothing inherited.
        size: what to change; its patch size counts if it has as many axes.
        name: the new plans' name.
        configuration_name: e.g. ``3d_fullres``.
    """
    where = f"configuration {configuration_name}"
    new = copy.deepcopy(configuration)
    new.pop("inherits_from", None)
    old, median, patch = (new.get(key, []) for key in ("spacing", "median_image_size_in_voxels", "patch_size"))
    kwargs = new.get("architecture", {}).get("arch_kwargs", {})
    dim = len(old)
    needed = {"strides", "kernel_sizes", "features_per_stage"}
    if dim not in (2, 3) or len(median) != dim or len(patch) != dim or not needed <= kwargs.keys():
        raise InputError(f"{where} is not a U-Net planned by nnU-Net: use plans of nnUNetv2_plan_experiment")

    spacing = coarser(old, size.coarsen or 1)
    if spacing != old:
        identifier = f"{name}_{configuration_name}"
        if identifier == new.get("data_identifier"):
            raise InputError(f"{where} would overwrite the base's preprocessed data {identifier}: choose another name")
        median = [max(1, round(n * a / b)) for n, a, b in zip(median, old, spacing, strict=True)]
        new |= {"data_identifier": identifier, "spacing": spacing, "median_image_size_in_voxels": median}
    strides, kernels = kwargs["strides"], kwargs["kernel_sizes"]
    too_small = f"{where}: images of {_times(median)} voxels are too small to pool: {_KEEP_SPACING}"
    if size.patch_size and len(size.patch_size) == dim:
        patch, strides, kernels = topology(spacing, size.patch_size)
        if patch != list(size.patch_size):
            remedy = " ".join(map(str, patch))
            raise InputError(f"{size.patch_option}: {where} cannot halve it as often as it pools: give {remedy}")
        too_small = f"{size.patch_option}: too small for {where} to pool: give a larger patch"
    elif size.max_voxels or spacing != old:
        patch, strides, kernels = plan_patch(spacing, median, (size.max_voxels or {dim: prod(patch)})[dim])
    stages = len(strides)
    if stages == 1:
        raise InputError(too_small)
    new |= {"patch_size": patch, "batch_size": (size.batch_size or {}).get(dim, new["batch_size"])}
    kwargs |= {"n_stages": stages, "kernel_sizes": kernels, "strides": strides}
    kwargs["features_per_stage"] = _fit(size.features or kwargs["features_per_stage"], stages)
    lengths = {"n_conv_per_stage": stages, "n_blocks_per_stage": stages, "n_conv_per_stage_decoder": stages - 1}
    for key, length in lengths.items():
        if isinstance(kwargs.get(key), (list, tuple)):  # a single number holds for all stages
            kwargs[key] = _fit(kwargs[key], length)
    return new


def small_images(plans: dict) -> str:
    """A warning if the median image of a configuration is too small to be of use, else "".

    That is so where its second longest axis has fewer than ``MIN_EDGE_OF_IMAGE`` voxels; the longest alone makes no
    plane, and slices may be few.
    """
    for name, configuration in plans["configurations"].items():
        median = configuration.get("median_image_size_in_voxels", [])
        if len(median) > 1 and sorted(median)[-2] < MIN_EDGE_OF_IMAGE:
            return (
                f"WARNING: the median image of {name} has {_times(median)} voxels at this spacing, too few to learn "
                f"small structures (second longest axis below {MIN_EDGE_OF_IMAGE}): {_KEEP_SPACING}"
            )
    return ""


_KEEP_SPACING = "use --preset small, which keeps the spacing"


def _times(sizes: Sequence[float]) -> str:
    return " x ".join(f"{size:g}" for size in sizes)


def coarser(spacing: list[float], factor: float) -> list[float]:
    """``spacing`` in mm, ``factor`` times larger on the axes within 2 times the finest, unchanged on the others."""
    finest = min(spacing)
    return [float(s * factor if s / finest < SAME_RESOLUTION else s) for s in spacing]


Topology = tuple[list[int], list[list[int]], list[list[int]]]  # patch size; strides and kernel sizes per stage


def topology(spacing: list[float], size: Sequence[int]) -> Topology:
    """The network that nnU-Net plans for a patch of ``size`` voxels, which is padded to what can be pooled."""
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

    _, strides, kernels, patch, _ = get_pool_and_conv_props(spacing, size, MIN_EDGE, MAX_POOLINGS)
    return [int(n) for n in patch], [list(s) for s in strides], [list(k) for k in kernels]


def plan_patch(spacing: list[float], median: list[int], max_voxels: int) -> Topology:
    """Choose a patch of at most ``max_voxels``, and its network.

    As nnU-Net's planner does, start from the median image, clipped to a cube in mm, and shrink the axis that is largest
    relative to the median image. The planner shrinks by estimated GPU memory, we by the number of voxels.

    Args:
        spacing: mm per voxel, 2 or 3 axes.
        median: voxels of the median image, same axes.
        max_voxels: budget of the patch.
    """
    edge_mm = (LARGEST_PATCH[len(spacing)] * prod(spacing)) ** (1 / len(spacing))
    size = [min(n, round(edge_mm / s)) for n, s in zip(median, spacing, strict=True)]
    while True:
        patch, strides, kernels = topology(spacing, size)
        if prod(patch) <= max_voxels:
            return patch, strides, kernels
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
        there = ", ".join(plans_in(folder))
        remedy = f"there are {there}" if there else f"run nnUNetv2_plan_and_preprocess -d {dataset_id(folder.name)}"
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
