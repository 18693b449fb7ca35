"""Derived plans files: presets, parts of a size, settings from the command line, and every wrong input."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncM,
)
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_semisup import discovery, plans
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.plans import Size
from nnunetv2_semisup.settings import SemiSupSettings

DATASET = "Dataset950_Fabricated"
TRAINER = "nnUNetTrainerMeanTeacher"
CPU = plans.PRESETS["cpu"]
GEOMETRIES = {  # spacing in mm and median shape in voxels, axes z, y, x
    "LA": ((0.625, 0.625, 0.625), (88, 142, 190)),
    "ACDC": ((10.0, 1.5, 1.5), (10, 216, 256)),
    "CT": ((5.0, 0.7, 0.7), (120, 512, 512)),
    "rod": ((1.0, 1.0, 1.0), (3000, 60, 60)),  # longer than the first guess of the patch
}


class VoxelPlanner(ExperimentPlanner):
    """nnU-Net's planner with our budget: voxels of the patch instead of estimated GPU memory."""

    def __init__(self, *args):
        super().__init__(*args)
        self.UNet_reference_val_2d, self.UNet_reference_val_3d = plans.CPU_VOXELS[2], plans.CPU_VOXELS[3]
        self.UNet_reference_val_corresp_bs_2d = self.UNet_reference_val_corresp_bs_3d = 2

    @staticmethod
    def static_estimate_VRAM_usage(patch_size, *_):
        return prod(patch_size)


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The preprocessed folder of a data set like LA, planned by nnU-Net itself; variables point at it."""
    root = tmp_path_factory.mktemp("nnunet")
    raw, preprocessed = root / "raw" / DATASET, root / "preprocessed" / DATASET
    for folder in (raw / "imagesTr", raw / "labelsTr", preprocessed):
        folder.mkdir(parents=True)
    spacing, shape = GEOMETRIES["LA"]
    for i in range(4):
        (raw / "imagesTr" / f"case{i}_0000.nii.gz").touch()
        (raw / "labelsTr" / f"case{i}.nii.gz").touch()
    statistics = dict.fromkeys(("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std"), 1.0)
    dataset_json = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "atrium": 1},
        "numTraining": 4,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "SimpleITKIO",
    }
    fingerprint = {
        "spacings": [spacing] * 4,
        "shapes_after_crop": [shape] * 4,
        "foreground_intensity_properties_per_channel": {"0": statistics},
        "median_relative_size_after_cropping": 1.0,
    }
    (raw / "dataset.json").write_text(json.dumps(dataset_json))
    (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_raw", str(raw.parent))
        patch.setenv("nnUNet_preprocessed", str(preprocessed.parent))
        patch.setenv("nnUNet_def_n_proc", "1")
        patch.setenv("nnUNet_n_proc_DA", "1")
        ExperimentPlanner(DATASET).plan_experiment()
        nnUNetPlannerResEncM(DATASET).plan_experiment()
        yield preprocessed


BASES = {"plain": "nnUNetPlans", "residual": "nnUNetResEncUNetMPlans"}


@pytest.fixture
def folder(planned, tmp_path):
    """A copy of that folder to write in."""
    for file in planned.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture
def known(monkeypatch):
    """Our trainers are nnUNetTrainerMeanTeacher and nnUNetTrainerSSNet, with the common settings."""

    def settings_class(name):
        if name not in (TRAINER, "nnUNetTrainerSSNet"):
            raise InputError(f"unknown trainer {name!r}: did you mean {TRAINER}?")
        return SemiSupSettings

    monkeypatch.setattr(discovery, "settings_class", settings_class)


def read(path):
    return json.loads(path.read_text())


def base_configuration(planned, kind: str, dim: int, spacing, median) -> dict:
    """nnU-Net's plan for the LA-like data set with another spacing and median image, as long as neither decides."""
    content = read(planned / f"{BASES[kind]}.json")["configurations"]["2d" if dim == 2 else "3d_fullres"]
    return copy.deepcopy(content) | {
        "spacing": [float(s) for s in spacing[-dim:]],
        "median_image_size_in_voxels": [float(n) for n in median[-dim:]],
    }


def forward(configuration: dict) -> torch.Tensor:
    """The output of the network of a configuration for one patch with one channel and two classes."""
    manager = PlansManager({"configurations": {"c": configuration}}).get_configuration("c")
    network = get_network_from_plans(
        manager.network_arch_class_name,
        manager.network_arch_init_kwargs,
        manager.network_arch_init_kwargs_req_import,
        1,
        2,
        deep_supervision=False,
    )
    with torch.no_grad():
        return network(torch.zeros(1, 1, *manager.patch_size))


def check_invariants(configuration: dict) -> None:
    """What must hold for any configuration of the preset."""
    kwargs = configuration["architecture"]["arch_kwargs"]
    patch, median = configuration["patch_size"], configuration["median_image_size_in_voxels"]
    dim = len(patch)
    total = np.prod(kwargs["strides"], axis=0)
    assert prod(patch) <= plans.CPU_VOXELS[dim]
    for n, stride, image in zip(patch, total, median, strict=True):
        assert n % stride == 0
        assert n // stride >= min(plans.MIN_EDGE, image)
    stages = kwargs["n_stages"]
    for key in ("strides", "kernel_sizes", "features_per_stage"):
        assert len(kwargs[key]) == stages
    encoder = {"n_conv_per_stage", "n_blocks_per_stage"} & kwargs.keys()
    assert len(encoder) == 1
    assert len(kwargs[encoder.pop()]) == stages
    assert len(kwargs["n_conv_per_stage_decoder"]) == stages - 1
    assert all(len(row) == dim for row in kwargs["strides"] + kwargs["kernel_sizes"])
    assert kwargs["features_per_stage"] == [8, 16, 32, 64, 64, 64, 64, 64, 64, 64][:stages]
    assert configuration["batch_size"] == (8 if dim == 2 else 2)
    assert all(type(n) is int for n in patch + median)
    json.dumps(configuration)  # no numpy types


# ---------------------------------------------------------------- the preset


@pytest.mark.parametrize("kind", BASES)
def test_left_atrium(folder, kind):
    base = read(folder / f"{BASES[kind]}.json")
    written = plans.derive(folder, BASES[kind], "small", "cpu", [])
    assert written == folder / "small.json"
    derived = read(written)
    assert list(derived["configurations"]) == ["2d", "3d_fullres"]
    assert derived["plans_name"] == "small"
    full, flat = derived["configurations"]["3d_fullres"], derived["configurations"]["2d"]

    assert full["spacing"] == [1.875] * 3
    assert full["median_image_size_in_voxels"] == [29, 47, 63]
    assert full["patch_size"] == [32, 48, 64]
    kwargs = full["architecture"]["arch_kwargs"]
    assert kwargs["strides"] == [[1, 1, 1]] + [[2, 2, 2]] * 3  # bottleneck 4 x 6 x 8: nnU-Net pools no further
    assert kwargs["kernel_sizes"] == [[3, 3, 3]] * 4
    assert full["data_identifier"] == "small_3d_fullres"
    assert (flat["patch_size"], flat["spacing"], flat["data_identifier"]) == ([48, 64], [1.875] * 2, "small_2d")
    blocks, expected = ("n_conv_per_stage", [2] * 4) if kind == "plain" else ("n_blocks_per_stage", [1, 3, 4, 6])
    assert kwargs[blocks] == expected
    assert kwargs["n_conv_per_stage_decoder"] == [2 if kind == "plain" else 1] * 3

    ours = {"spacing", "median_image_size_in_voxels", "patch_size", "batch_size", "data_identifier", "architecture"}
    replanned = {"n_stages", "features_per_stage", "strides", "kernel_sizes", "n_conv_per_stage_decoder", blocks}
    for name, configuration in derived["configurations"].items():
        check_invariants(configuration)
        old = base["configurations"][name]
        assert {k: v for k, v in configuration.items() if k not in ours} == {
            k: v for k, v in old.items() if k not in ours
        }
        new_kwargs, old_kwargs = (c["architecture"]["arch_kwargs"] for c in (configuration, old))
        assert {k: v for k, v in new_kwargs.items() if k not in replanned} == {
            k: v for k, v in old_kwargs.items() if k not in replanned
        }
        assert configuration["architecture"]["network_class_name"] == old["architecture"]["network_class_name"]
        assert forward(configuration).shape == (1, 2, *configuration["patch_size"])


@pytest.mark.parametrize(
    ("geometry", "dim", "spacing", "median"),
    [
        ("ACDC", 3, [10.0, 4.5, 4.5], [10, 72, 85]),
        ("ACDC", 2, [4.5, 4.5], [72, 85]),
        ("CT", 3, [5.0, 2.1, 2.1], [120, 171, 171]),
        ("CT", 2, [2.1, 2.1], [171, 171]),
    ],
)
@pytest.mark.parametrize("kind", BASES)
def test_anisotropic(planned, kind, geometry, dim, spacing, median):
    base = base_configuration(planned, kind, dim, *GEOMETRIES[geometry])
    configuration = plans.resized_configuration(base, CPU, "small", "c")
    check_invariants(configuration)
    assert configuration["spacing"] == pytest.approx(spacing)
    assert configuration["median_image_size_in_voxels"] == median
    kwargs = configuration["architecture"]["arch_kwargs"]
    if dim == 3:  # the coarse axis is neither convolved nor pooled until the others have caught up
        assert kwargs["kernel_sizes"][0] == [1, 3, 3]
        assert kwargs["strides"][1] == [1, 2, 2]
    assert forward(configuration).shape == (1, 2, *configuration["patch_size"])


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_patch_is_that_of_nnunets_planner(planned, geometry, dim):
    """With voxels in place of the memory estimate nnU-Net's own planner arrives at the same patch and network."""
    configuration = plans.resized_configuration(
        base_configuration(planned, "plain", dim, *GEOMETRIES[geometry]), CPU, "small", "c"
    )
    expected = VoxelPlanner(DATASET).get_plans_for_configuration(
        np.array(configuration["spacing"]), configuration["median_image_size_in_voxels"], "", 1e12, {}
    )
    assert configuration["patch_size"] == [int(n) for n in expected["patch_size"]]
    for key in ("n_stages", "strides", "kernel_sizes"):
        ours, theirs = (c["architecture"]["arch_kwargs"][key] for c in (configuration, expected))
        assert np.array_equal(ours, theirs)


@hypothesis_settings(max_examples=200)
@given(data=st.data(), dim=st.sampled_from([2, 3]), kind=st.sampled_from(list(BASES)))
def test_invariants(planned, data, dim, kind):
    spacing = [round(2**e, 3) for e in data.draw(st.lists(st.floats(-2, 4), min_size=dim, max_size=dim))]
    median = data.draw(st.lists(st.integers(1, 9) | st.integers(10, 700), min_size=dim, max_size=dim))
    factors = [3 if s / min(spacing) < 2 else 1 for s in spacing]
    coarse = [s * factor for s, factor in zip(spacing, factors, strict=True)]
    image = [max(1, round(n / factor)) for n, factor in zip(median, factors, strict=True)]
    base = base_configuration(planned, kind, dim, spacing, median)
    before = copy.deepcopy(base)
    try:
        configuration = plans.resized_configuration(base, CPU, "small", "c")
    except InputError as error:
        assert "too small to pool" in str(error)
        patch, _, _ = plans.plan_patch(coarse, image, plans.CPU_VOXELS[dim])
        long = [axis for axis in range(dim) if patch[axis] >= 8]  # nnU-Net halves to 4 at the least, the finest first,
        fine = [axis for axis in long if coarse[axis] / min(coarse[i] for i in long) < 2]
        assert not fine or (len(fine) == 1 and patch[fine[0]] < 12)  # and one axis alone to 6
        return
    finally:
        assert base == before
    check_invariants(configuration)
    assert configuration["spacing"] == pytest.approx(coarse)
    assert configuration["median_image_size_in_voxels"] == image


def test_thin_images_keep_their_thickness():
    """Shrunk in proportion, six slices would become two."""
    patch, strides, _ = plans.plan_patch([2.0, 1.1, 0.5], [6, 500, 500], plans.CPU_VOXELS[3])
    assert patch[0] == 4
    assert np.prod(strides, axis=0)[0] == 1


@pytest.mark.parametrize("kind", BASES)
def test_more_stages_than_the_base(planned, kind):
    base = base_configuration(planned, kind, 2, *GEOMETRIES["CT"])
    kwargs = base["architecture"]["arch_kwargs"]
    blocks = "n_conv_per_stage" if kind == "plain" else "n_blocks_per_stage"
    kwargs |= {"n_stages": 2, blocks: [1, 3], "n_conv_per_stage_decoder": [2]}
    configuration = plans.resized_configuration(base, CPU, "small", "2d")
    check_invariants(configuration)
    kwargs = configuration["architecture"]["arch_kwargs"]
    assert kwargs["n_stages"] == 6
    assert kwargs[blocks] == [1, 3, 3, 3, 3, 3]
    assert kwargs["n_conv_per_stage_decoder"] == [2] * 5
    assert forward(configuration).shape == (1, 2, *configuration["patch_size"])


def test_one_number_for_all_stages_stays(planned):
    base = base_configuration(planned, "plain", 2, *GEOMETRIES["LA"])
    base["architecture"]["arch_kwargs"] |= {"n_conv_per_stage": 2, "n_conv_per_stage_decoder": 1}
    kwargs = plans.resized_configuration(base, CPU, "small", "2d")["architecture"]["arch_kwargs"]
    assert (kwargs["n_conv_per_stage"], kwargs["n_conv_per_stage_decoder"]) == (2, 1)


def test_inheritance_is_resolved_and_the_cascade_dropped(folder):
    base = read(folder / "nnUNetPlans.json")
    configurations = base["configurations"]
    configurations["parent"] = configurations.pop("3d_fullres")
    configurations["3d_fullres"] = {"inherits_from": "parent", "batch_size": 5, "note": "kept"}
    configurations["3d_lowres"] = copy.deepcopy(configurations["parent"]) | {"next_stage": "3d_cascade_fullres"}
    configurations["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    (folder / "nnUNetPlans.json").write_text(json.dumps(base))
    derived = read(plans.derive(folder, "nnUNetPlans", "small", "cpu", []))
    assert set(derived["configurations"]) == {"2d", "3d_fullres"}
    full = PlansManager(derived).get_configuration("3d_fullres")
    assert (full.patch_size, full.batch_size, full.configuration["note"]) == ([32, 48, 64], 2, "kept")
    assert "inherits_from" not in full.configuration


def test_preset_of_a_2d_data_set(folder):
    base = read(folder / "nnUNetPlans.json")
    del base["configurations"]["3d_fullres"]
    (folder / "nnUNetPlans.json").write_text(json.dumps(base))
    assert list(read(plans.derive(folder, "nnUNetPlans", "small", "cpu", []))["configurations"]) == ["2d"]


# ---------------------------------------------------------------- the small preset and parts of a size

PARTS = {"patch_size", "batch_size", "spacing", "median_image_size_in_voxels", "data_identifier"}


def network(configuration: dict) -> dict:
    return configuration["architecture"]["arch_kwargs"]


def derive(folder, preset=None, **parts) -> dict:
    """Configurations of plans called ours."""
    return read(plans.derive(folder, "nnUNetPlans", "ours", preset, [], Size(**parts)))["configurations"]


@pytest.mark.parametrize("kind", BASES)
def test_small_changes_features_and_batch_only(folder, kind):
    base = read(folder / f"{BASES[kind]}.json")
    base["configurations"]["3d_lowres"] = base["configurations"]["3d_fullres"]
    (folder / f"{BASES[kind]}.json").write_text(json.dumps(base))
    derived = read(plans.derive(folder, BASES[kind], "ours", "small", []))
    assert derived[plans.PRESET] == "small"
    assert list(derived["configurations"]) == ["2d", "3d_fullres"]
    for name, configuration in derived["configurations"].items():
        expected = base["configurations"][name]
        stages = len(network(expected)["strides"])
        network(expected)["features_per_stage"] = [8, 16, 32, 64, 64, 64, 64, 64][:stages]
        expected["batch_size"] = {"2d": 12, "3d_fullres": 2}[name]
        assert configuration == expected
        assert forward(configuration).shape == (1, 2, *configuration["patch_size"])


@pytest.mark.parametrize(
    ("parts", "changed"),
    [
        ({"features": [4, 8]}, set()),
        ({"batch_size": {2: 3, 3: 3}}, {"batch_size"}),
        ({"coarsen": 1.0}, set()),
        ({"coarsen": 2.0}, {"patch_size", "spacing", "median_image_size_in_voxels", "data_identifier"}),
        ({"patch_size": [32, 64, 64]}, {"patch_size"}),
    ],
)
def test_one_part_changes_nothing_else(folder, parts, changed):
    base, new = (
        c["3d_fullres"] for c in (read(folder / "nnUNetPlans.json")["configurations"], derive(folder, **parts))
    )
    assert {key for key in PARTS if new[key] != base[key]} == changed
    assert {key: value for key, value in new.items() if key not in {*PARTS, "architecture"}} == {
        key: value for key, value in base.items() if key not in {*PARTS, "architecture"}
    }
    expected = {"features": [4, *[8] * 9], "batch_size": None}.get(next(iter(parts)))
    features = expected or network(base)["features_per_stage"]
    assert network(new)["features_per_stage"] == features[: len(network(new)["strides"])]
    if changed <= {"batch_size"}:
        assert [network(new)[key] for key in ("strides", "kernel_sizes")] == [
            network(base)[key] for key in ("strides", "kernel_sizes")
        ]
    assert forward(new).shape == (1, 2, *new["patch_size"])


def test_coarser_images_keep_the_budget_of_the_patch(folder):
    base = read(folder / "nnUNetPlans.json")["configurations"]["3d_fullres"]
    new = derive(folder, coarsen=1.5)["3d_fullres"]
    assert new["spacing"] == pytest.approx([0.9375] * 3)
    assert new["median_image_size_in_voxels"] == [59, 95, 127]
    assert new["data_identifier"] == "ours_3d_fullres"
    assert prod(new["patch_size"]) <= prod(base["patch_size"])


def test_a_patch_is_for_the_configurations_with_as_many_axes(folder):
    base = read(folder / "nnUNetPlans.json")["configurations"]
    new = derive(folder, patch_size=[96, 128])
    assert new["3d_fullres"] == base["3d_fullres"]
    assert new["2d"]["patch_size"] == [96, 128]
    assert network(new["2d"])["strides"] == [[1, 1]] + [[2, 2]] * 4
    assert new["2d"]["data_identifier"] == "nnUNetPlans_2d"


def test_parts_beat_the_preset(folder):
    new = derive(folder, "cpu", patch_size=[16, 32, 32], coarsen=1, batch_size={2: 5, 3: 5})
    full, flat = new["3d_fullres"], new["2d"]
    assert (full["patch_size"], full["batch_size"], full["spacing"]) == ([16, 32, 32], 5, [0.625] * 3)
    assert network(full)["features_per_stage"] == [8, 16, 32, 64][: len(network(full)["strides"])]
    assert full["data_identifier"] == "nnUNetPlans_3d_fullres"
    assert prod(flat["patch_size"]) <= plans.CPU_VOXELS[2]  # the preset's budget holds where no patch is given
    assert network(derive(folder, "cpu", features=[2])["2d"])["features_per_stage"] == [2] * 4


def test_the_base_is_named_where_its_data_would_be_overwritten(folder):
    (folder / "nnUNetPlans.json").rename(folder / "other.json")
    fails("choose another name", folder, "other", "nnUNetPlans", None, [], Size(coarsen=2))


@hypothesis_settings(max_examples=200)
@given(data=st.data(), dim=st.sampled_from([2, 3]), kind=st.sampled_from(list(BASES)))
def test_any_patch_fits_or_the_remedy_does(planned, data, dim, kind):
    spacing = [round(2**e, 3) for e in data.draw(st.lists(st.floats(-1, 3), min_size=dim, max_size=dim))]
    patch = data.draw(st.lists(st.integers(1, 70), min_size=dim, max_size=dim))
    base = base_configuration(planned, kind, dim, spacing, (60,) * 3)
    try:
        configuration = plans.resized_configuration(base, Size(patch_size=patch), "ours", "c")
    except InputError as error:
        assert str(error).startswith(f"--patch_size {' '.join(map(str, patch))}: ")
        remedy = re.search(r"pools: give ([\d ]+)$", str(error))
        if not remedy:
            assert "too small" in str(error) and min(patch) < 12
            return
        patch = [int(n) for n in remedy[1].split()]
        configuration = plans.resized_configuration(base, Size(patch_size=patch), "ours", "c")
    kwargs = network(configuration)
    assert configuration["patch_size"] == patch
    assert all(n % stride == 0 for n, stride in zip(patch, np.prod(kwargs["strides"], axis=0), strict=True))
    assert len(kwargs["features_per_stage"]) == len(kwargs["strides"]) == kwargs["n_stages"] > 1


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"features": []}, "--features: give at least one number"),
        ({"features": [8, 0]}, "--features 8 0: give at least one number, each 1 or more"),
        ({"batch_size": {2: 0, 3: 0}}, "--batch_size 0: give 1 or more"),
        ({"patch_size": []}, "--patch_size: give 2 or 3 numbers"),
        ({"patch_size": [64]}, "--patch_size 64: give 2 or 3 numbers"),
        ({"patch_size": [64, 0]}, "--patch_size 64 0: give 2 or 3 numbers of voxels, each 1 or more"),
        ({"coarsen": 0.5}, "--coarsen 0.5: give a factor of 1 or more"),
        ({"coarsen": float("nan")}, "--coarsen nan: give a factor of 1 or more"),
        ({"coarsen": float("inf")}, "--coarsen inf: give a factor of 1 or more"),
    ],
)
def test_size_that_cannot_be(parts, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Size(**parts)


def test_patch_that_fits_no_configuration(folder):
    for patch, message in {
        (
            30,
            48,
            48,
        ): "--patch_size 30 48 48: configuration 3d_fullres cannot halve it as often as it pools: give 32 48 48",
        (4, 4, 4): "--patch_size 4 4 4: too small for configuration 3d_fullres to pool: give a larger patch",
    }.items():
        fails(message, folder, "nnUNetPlans", "ours", None, [], Size(patch_size=patch))
    base = read(folder / "nnUNetPlans.json")
    del base["configurations"]["3d_fullres"]
    (folder / "nnUNetPlans.json").write_text(json.dumps(base))
    message = "--patch_size 32 32 32: none of the configurations 2d has 3 axes"
    fails(message, folder, "nnUNetPlans", "ours", "small", [], Size(patch_size=(32, 32, 32)))


# ---------------------------------------------------------------- files


def test_without_preset_only_names_and_settings_differ(folder, known):
    base = read(folder / "nnUNetPlans.json") | {"a_key_of_yours": {"x": [1, 2.5, None]}}
    (folder / "nnUNetPlans.json").write_text(json.dumps(base))
    derived = read(plans.derive(folder, "nnUNetPlans", "ours", None, [f"{TRAINER}.num_epochs=7"]))
    ours = {"semisup": {TRAINER: {"num_epochs": 7}}, plans.DERIVED_FROM: "nnUNetPlans", plans.PRESET: None}
    assert derived == base | ours | {"plans_name": "ours"}
    assert list(derived)[: len(base)] == list(base)
    for name in ("2d", "3d_fullres"):
        assert PlansManager(derived).get_configuration(name).data_identifier == f"nnUNetPlans_{name}"


@pytest.mark.parametrize("preset", [None, "cpu"])
def test_twice_the_same(folder, known, preset):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    arguments = (folder, "nnUNetPlans", "ours", preset, [f"{TRAINER}.num_epochs=7"])
    first = plans.derive(*arguments).read_bytes()
    assert plans.derive(*arguments).read_bytes() == first
    text = first.decode()
    assert text == json.dumps(json.loads(text), indent=4) + "\n"  # nnU-Net's style
    (folder / "ours.json").unlink()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before  # base as it was, nothing left over


def test_rederived_with_other_arguments_and_in_a_chain(folder, known):
    plans.derive(folder, "nnUNetPlans", "small", "cpu", [f"{TRAINER}.num_epochs=7"])
    small = read(plans.derive(folder, "nnUNetPlans", "small", "cpu", []))
    assert small["semisup"] == {TRAINER: {"num_epochs": 7}}, "settings are kept"
    tuned = read(plans.derive(folder, "small", "tuned", None, [f"{TRAINER}.num_epochs=9"]))
    assert tuned["configurations"] == small["configurations"]
    assert (tuned[plans.DERIVED_FROM], tuned["plans_name"]) == ("small", "tuned")


def test_names_may_end_in_json(folder):
    assert plans.derive(folder, "nnUNetPlans.json", "ours.json", None, []) == folder / "ours.json"
    assert read(folder / "ours.json")["plans_name"] == "ours"


def test_interrupted_write_leaves_the_old_file(folder, monkeypatch):
    old = plans.derive(folder, "nnUNetPlans", "ours", None, []).read_bytes()

    def no_space(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(InputError, match=r"ours.json cannot be written \(no space left"):
        plans.derive(folder, "nnUNetPlans", "ours", "cpu", [])
    assert (folder / "ours.json").read_bytes() == old
    assert not list(folder.glob("*.tmp")) + list(folder.glob(".*"))


# ---------------------------------------------------------------- settings


def test_overrides_beat_the_base_and_the_last_one_wins(folder, known):
    base = read(folder / "nnUNetPlans.json")
    base["semisup"] = {
        TRAINER: {"num_epochs": 5, "save_every_minutes": 2.5},
        "nnUNetTrainerSSNet": {"num_epochs": 3},
    }
    (folder / "nnUNetPlans.json").write_text(json.dumps(base))
    overrides = ["num_epochs=6", "deterministic_seed=1", "num_epochs=8", "unlabeled_batch_size=null"]
    derived = read(plans.derive(folder, "nnUNetPlans", "ours", "cpu", [f"{TRAINER}.{o}" for o in overrides]))
    assert derived["semisup"] == {
        TRAINER: {"num_epochs": 8, "save_every_minutes": 2.5, "deterministic_seed": 1, "unlabeled_batch_size": None},
        "nnUNetTrainerSSNet": {"num_epochs": 3},
    }


def test_merging_changes_no_argument(known):
    content, overrides = {"semisup": {TRAINER: {"num_epochs": 5}}}, {TRAINER: {"num_epochs": 6}}
    before = copy.deepcopy((content, overrides))
    assert plans.with_settings(content, overrides, "x.json") == {"semisup": overrides}
    assert (content, overrides) == before


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.9", 0.9), ("true", True), ("student", "student"), ("[1, 2]", [1, 2]), ("a.b=c", "a.b=c"), ("", "")],
)
def test_values(text, value):
    assert plans.parse_overrides([f"T.k={text}"]) == {"T": {"k": value}}


def test_real_trainers(folder):
    """Without a stand-in for discovery."""
    derived = read(plans.derive(folder, "nnUNetPlans", "ours", None, [f"{TRAINER}.consistency_weight=1"]))
    assert derived["semisup"] == {TRAINER: {"consistency_weight": 1}}
    with pytest.raises(InputError, match=f"did you mean {TRAINER}"):
        plans.derive(folder, "nnUNetPlans", "ours", None, ["nnUNetTrainerMeanTeachr.num_epochs=1"])


# ---------------------------------------------------------------- wrong input


def fails(message: str, *arguments) -> None:
    """``derive`` says this in one line, and nothing is written."""
    folder = arguments[0]
    before = {file.name: file.read_bytes() for file in folder.iterdir()} if folder.exists() else None
    with pytest.raises(InputError, match=re.escape(message)) as error:
        plans.derive(*arguments)
    assert "\n" not in str(error.value)
    assert before == ({file.name: file.read_bytes() for file in folder.iterdir()} if folder.exists() else None)


def test_missing_base(folder, tmp_path):
    fails("there are nnUNetPlans, nnUNetResEncUNetMPlans", folder, "nnUNetPlan", "ours", None, [])
    fails("run nnUNetv2_plan_and_preprocess -d", tmp_path / "nowhere", "nnUNetPlans", "ours", None, [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"configurations": {', "nnUNetPlans.json is not valid JSON"),
        ("\x00\xff", "nnUNetPlans.json is not valid JSON"),
        ("[1]", "nnUNetPlans.json is not a plans file"),
        ('{"plans_name": "nnUNetPlans"}', "nnUNetPlans.json is not a plans file"),
    ],
)
def test_damaged_base(folder, content, message):
    (folder / "nnUNetPlans.json").write_text(content, encoding="latin-1")
    fails(message, folder, "nnUNetPlans", "ours", None, [])


@pytest.mark.parametrize("name", ["", ".json", "a/b", "../a", "a\\b", ".hidden", "a b", "a__b", "splits_final"])
def test_bad_name(folder, name):
    fails("cannot name plans", folder, "nnUNetPlans", name, None, [])


def test_name_of_the_base_or_of_a_file_that_is_not_ours(folder):
    fails("another name than their base", folder, "nnUNetPlans", "nnUNetPlans", None, [])
    fails("was not derived", folder, "nnUNetPlans", "nnUNetResEncUNetMPlans", None, [])
    (folder / "broken.json").write_text("{")
    fails("was not derived", folder, "nnUNetPlans", "broken", None, [])


@pytest.mark.parametrize("override", ["", "T", "T=1", "T.k", ".k=1", "T.=1", "a.b.c=1", "T k=1", "T .k=1"])
def test_malformed_override(folder, override):
    fails("write TRAINER.KEY=VALUE", folder, "nnUNetPlans", "ours", None, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"{TRAINER}_20epochs.num_epochs=1", "drop the suffix _20epochs"),
        (f"{TRAINER}_1epoch.num_epochs=1", "drop the suffix _1epoch"),
        ("nnUNetTrainerX.num_epochs=1", "nnUNetPlans.json with --set: unknown trainer 'nnUNetTrainerX': did you mean"),
        (f"{TRAINER}.epochs=1", "unknown setting 'epochs'"),
        (f"{TRAINER}.num_epochs=many", "has the wrong type"),
        (f"{TRAINER}.num_epochs=0", "out of range"),
    ],
)
def test_wrong_setting(folder, known, override, message):
    fails(message, folder, "nnUNetPlans", "ours", None, [override])


@pytest.mark.parametrize("semisup", [[], {TRAINER: 1}, {f"{TRAINER}_5epochs": {}}, {TRAINER: {"epochs": 1}}])
def test_wrong_setting_in_the_base(folder, known, semisup):
    base = read(folder / "nnUNetPlans.json") | {"semisup": semisup}
    (folder / "nnUNetPlans.json").write_text(json.dumps(base))
    fails("nnUNetPlans.json", folder, "nnUNetPlans", "ours", None, [f"{TRAINER}.num_epochs=1"])


def test_preset_that_cannot_be(folder, planned):
    fails("unknown preset 'gpu': there are cpu, small", folder, "nnUNetPlans", "ours", "gpu", [])
    # stock ResEnc plans share the data of nnUNetPlans: a name that would make the preset overwrite them
    (folder / "nnUNetPlans.json").unlink()
    fails("would overwrite", folder, "nnUNetResEncUNetMPlans", "nnUNetPlans", "cpu", [])

    small = base_configuration(planned, "plain", 3, (1.0, 1.0, 1.0), (20, 23, 21))
    foreign = copy.deepcopy(small)
    foreign["architecture"]["arch_kwargs"] = {"embed_dim": 864}
    for message, configurations in {
        "needs a configuration 2d or 3d_fullres": {"3d_lowres": small},
        "3d_fullres: images of 7 x 8 x 7 voxels are too small to pool": {"3d_fullres": small},
        "2d is not a U-Net planned by nnU-Net": {"2d": foreign},
    }.items():
        content = read(planned / "nnUNetPlans.json") | {"configurations": configurations}
        (folder / "odd.json").write_text(json.dumps(content))
        fails(message, folder, "odd", "ours", "cpu", [])


def test_without_preset_and_settings_torch_is_not_imported(folder):
    """Importing torch takes seconds, and a wrong name is found without it."""
    code = (
        "import sys; from nnunetv2_semisup import plans; "
        f"plans.derive({str(folder)!r}, 'nnUNetPlans', 'ours', None, []); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("median", "warned"),
    [
        ((12, 17, 12), True),  # Hippocampus with the preset cpu
        ((24, 32, 32), False),
        ((3, 72, 85), False),  # few slices are no fault
        ((3, 20, 85), True),
        ((17, 12), True),
        ((32, 33), False),
    ],
)
def test_small_images_are_warned_of_with_a_remedy(median, warned):
    warning = plans.small_images({"configurations": {"x": {"median_image_size_in_voxels": list(median)}}})
    assert bool(warning) == warned
    if warned:
        assert "\n" not in warning and "--preset small" in warning and " x ".join(map(str, median)) in warning
