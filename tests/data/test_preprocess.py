import gzip
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import blosc2
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from filelock import FileLock
from helpers import full_disk
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_semisup.data import checks, preprocess
from nnunetv2_semisup.data.preprocess import SUFFIXES, pending_cases, preprocess_unlabeled
from nnunetv2_semisup.errors import InputError

CASES = ["un_0", "un_1", "un_2"]
PACKAGE_ROOT = Path(preprocess.__file__).parents[2]


def run(dataset, configuration="3d_fullres", processes=1, **kwargs):
    """Call it, keeping quiet; returns ids."""
    kwargs.setdefault("log", lambda line: None)
    return preprocess_unlabeled(dataset.name, "nnUNetPlans", configuration, processes, **kwargs)


def pending(dataset):
    return pending_cases(dataset.name, "nnUNetPlans", "3d_fullres")


def load(folder, case):
    image, mask = (blosc2.open(str(folder / f"{case}{suffix}"))[:] for suffix in (".b2nd", "_seg.b2nd"))
    return image, mask, load_pickle(str(folder / f"{case}.pkl"))


def stamps(dataset):
    return {file.name: file.stat().st_mtime_ns for file in dataset.folder.iterdir()}


def assert_state(dataset, cases, reference=None):
    """The folder holds exactly these cases, whole, recorded, and nothing is left beside it."""
    assert sorted(f.name for f in dataset.folder.iterdir()) == sorted(c + s for c in cases for s in SUFFIXES)
    assert sorted(json.loads(dataset.manifest.read_text())["cases"]) == sorted(cases)
    assert not dataset.folder.with_name(dataset.folder.name + ".tmp").exists()
    assert not list(dataset.preprocessed.glob("*.tmp"))
    for case in cases:
        image, mask, _ = load(dataset.folder, case)
        assert np.isfinite(image).all() and image.shape[1:] == mask.shape[1:]
        if reference is not None:
            assert np.array_equal(image, reference[case])


def processed_cases(monkeypatch):
    """List that grows by every case processed in this process."""
    seen = []
    original = preprocess._preprocess_case

    def spy(job):
        seen.append(job.case)
        return original(job)

    monkeypatch.setattr(preprocess, "_preprocess_case", spy)
    return seen


@pytest.fixture(scope="module")
def reference(planned_dataset, tmp_path_factory):
    """Case id -> image that nnU-Net makes of it when it is a labelled case; also the masks, per configuration."""
    plans = PlansManager(planned_dataset.plans)
    result = {}
    for configuration_name in ("3d_fullres", "2d"):
        configuration = plans.get_configuration(configuration_name)
        for case in CASES:
            files = planned_dataset.images(case)
            label = str(tmp_path_factory.mktemp("label") / "label.nii.gz")
            image = sitk.ReadImage(files[0])
            array = (sitk.GetArrayFromImage(image) > 150).astype(np.uint8)
            fake = sitk.GetImageFromArray(array)
            fake.CopyInformation(image)
            sitk.WriteImage(fake, label)
            result[configuration_name, case] = configuration.preprocessor_class(verbose=False).run_case(
                files, label, plans, configuration, planned_dataset.dataset_json
            )
    return result


@pytest.fixture(scope="module")
def images(reference):
    return {case: image for (configuration, case), (image, _, _) in reference.items() if configuration == "3d_fullres"}


# --------------------------------------------------------------------------------------------------------- what is made


@pytest.mark.parametrize("configuration", ["3d_fullres", "2d"])
def test_images_equal_stock_preprocessing_of_a_labelled_case(dataset, reference, configuration):
    assert run(dataset, configuration) == CASES
    folder = dataset.preprocessed / f"nnUNetPlans_{configuration}_unlabeled"
    for case in CASES:
        image, mask, properties = load(folder, case)
        stock_image, stock_label, stock_properties = reference[configuration, case]
        assert stock_label.max() == 1 and len(stock_properties["class_locations"][1]) > 0  # it was labelled
        assert image.dtype == np.float32 and np.array_equal(image, stock_image)
        assert "class_locations" not in properties
        assert properties["shape_before_cropping"] == stock_properties["shape_before_cropping"]
        # The nonzero mask, as the mask for normalisation needs it.
        assert set(np.unique(mask)) == {-1, 0}
        assert np.array_equal(mask < 0, stock_label < 0)
    assert infer_dataset_class(str(folder)) is nnUNetDatasetBlosc2
    assert sorted(nnUNetDatasetBlosc2.get_identifiers(str(folder))) == CASES


def test_mr_is_masked_and_ct_uses_the_plans_statistics(dataset):
    run(dataset)
    statistics = dataset.plans["foreground_intensity_properties_per_channel"]["1"]
    image, mask, properties = load(dataset.folder, "un_1")  # has the plans' spacing: not resampled
    crop = tuple(slice(a, b) for a, b in properties["bbox_used_for_cropping"])
    ct = sitk.GetArrayFromImage(sitk.ReadImage(dataset.images("un_1")[1]))[crop]
    expected = np.clip(ct, statistics["percentile_00_5"], statistics["percentile_99_5"])
    expected = (expected - statistics["mean"]) / statistics["std"]
    np.testing.assert_allclose(image[1], expected, rtol=1e-5, atol=1e-5)
    assert (image[0][mask[0] < 0] == 0).all()
    np.testing.assert_allclose(image[0][mask[0] == 0].mean(), 0, atol=1e-5)
    np.testing.assert_allclose(image[0][mask[0] == 0].std(), 1, atol=1e-5)


@pytest.mark.parametrize("poison", ["corrupt", "missing"])
def test_no_label_is_opened(dataset, monkeypatch, poison):
    labels = dataset.raw / "labelsTr"
    if poison == "missing":
        shutil.rmtree(labels)
    else:
        for label in labels.iterdir():
            label.write_bytes(b"not an image")

    def refuse(*args):
        raise AssertionError("a segmentation was opened")

    monkeypatch.setattr(SimpleITKIO, "read_seg", refuse)
    assert run(dataset) == CASES


def test_two_processes_of_a_pool_give_the_same(dataset, images):
    assert run(dataset, processes=2) == CASES
    assert_state(dataset, CASES, images)


# ------------------------------------------------------------------------------------------------- missing, stale, gone


def test_second_call_changes_nothing(dataset, monkeypatch):
    run(dataset)
    seen, before, lines = processed_cases(monkeypatch), stamps(dataset), []
    assert run(dataset, log=lines.append) == CASES
    assert not seen and stamps(dataset) == before
    assert lines == [f"3 unlabelled cases are preprocessed in {dataset.folder}"]


@pytest.mark.parametrize("change", ["content", "time", "added"])
def test_changed_images_are_redone_alone(dataset, images, monkeypatch, change):
    run(dataset)
    before = stamps(dataset)
    first, second = dataset.images("un_1")
    if change == "content":
        image = sitk.ReadImage(first)
        sitk.WriteImage(image * 2, first)
    elif change == "time":
        os.utime(second)
    else:
        for old in (first, second):
            shutil.copy2(old, old.replace("un_1", "un_9"))
    changed = "un_9" if change == "added" else "un_1"
    assert pending(dataset) == [changed]
    seen = processed_cases(monkeypatch)
    assert run(dataset) == sorted({*CASES, changed})
    assert seen == [changed]
    after = stamps(dataset)
    assert {name: t for name, t in after.items() if changed not in name} == {
        name: t for name, t in before.items() if changed not in name
    }
    assert pending(dataset) == []


def change_spacing(plans):
    plans["configurations"]["3d_fullres"]["spacing"] = [2.0, 2.0, 2.0]


def change_ct_statistics(plans):
    plans["foreground_intensity_properties_per_channel"]["1"]["mean"] += 10


def change_mask(plans):
    plans["configurations"]["3d_fullres"]["use_mask_for_norm"] = [False, False]


def change_resampling(plans):
    plans["configurations"]["3d_fullres"]["resampling_fn_data_kwargs"]["order"] = 1


@pytest.mark.parametrize("change", [change_spacing, change_ct_statistics, change_mask, change_resampling])
def test_plans_that_change_the_result_make_all_stale(dataset, change):
    run(dataset)
    image, _, _ = load(dataset.folder, "un_0")
    dataset.edit_plans(change)
    assert pending(dataset) == CASES
    assert run(dataset) == CASES
    changed, _, _ = load(dataset.folder, "un_0")
    assert changed.shape != image.shape or not np.allclose(changed, image)
    assert_state(dataset, CASES)


def test_plans_that_do_not_change_the_result_keep_all(dataset):
    run(dataset)
    dataset.edit_plans(lambda plans: plans["configurations"]["3d_fullres"].update(patch_size=[8, 8, 8], batch_size=7))
    dataset.edit_plans(lambda plans: plans.update(semisup={"nnUNetTrainerMeanTeacher": {}}))
    assert pending(dataset) == []


def test_removed_case_disappears(dataset, images):
    run(dataset)
    for file in dataset.images("un_1"):
        os.remove(file)
    assert pending(dataset) == []
    assert run(dataset) == ["un_0", "un_2"]
    assert_state(dataset, ["un_0", "un_2"], images)


def test_incomplete_files_and_orphans_are_mended(dataset, images):
    run(dataset)
    (dataset.folder / "un_0.pkl").unlink()
    with (dataset.folder / "un_1.b2nd").open("r+b") as file:
        file.truncate(100)  # as a copy that was interrupted
    (dataset.folder / "orphan.b2nd").touch()
    (dataset.folder / "orphan.pkl").touch()
    assert pending(dataset) == ["un_0", "un_1"]
    assert run(dataset) == CASES
    assert_state(dataset, CASES, images)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"plans": 1}'])
def test_damaged_manifest_means_all_is_redone(dataset, images, text):
    run(dataset)
    dataset.manifest.write_text(text)
    assert pending(dataset) == CASES
    run(dataset)
    assert_state(dataset, CASES, images)


def test_chosen_cases_only(dataset, images):
    assert run(dataset, identifiers=["un_2"]) == ["un_2"]
    assert_state(dataset, ["un_2"], images)
    assert pending(dataset) == ["un_0", "un_1"]
    assert run(dataset, identifiers=["un_2", "un_0"]) == ["un_0", "un_2"]
    assert_state(dataset, ["un_0", "un_2"], images)
    with pytest.raises(InputError, match="no such cases in imagesUn: lab_0"):
        run(dataset, identifiers=["un_0", "lab_0"])


# --------------------------------------------------------------------------------------------------------- wrong images


def rewrite(file, change):
    image = sitk.ReadImage(file)
    array = change(sitk.GetArrayFromImage(image))
    changed = sitk.GetImageFromArray(array)
    changed.SetSpacing(image.GetSpacing())
    sitk.WriteImage(changed, file)


def with_value(value):
    def change(array):
        array[8, 10, 12] = value
        return array

    return change


def truncate(file):
    content = Path(file).read_bytes()
    Path(file).write_bytes(content[: len(content) // 2])


def truncate_unzipped(file):
    content = gzip.decompress(Path(file).read_bytes())
    Path(file).write_bytes(gzip.compress(content[: len(content) // 2]))


def flip_byte(file):
    content = bytearray(Path(file).read_bytes())
    content[len(content) // 2] ^= 255
    Path(file).write_bytes(content)


DAMAGE = {
    "truncated": (truncate, "the compressed data end too early"),
    "truncated before compression": (truncate_unzipped, "un_1_0001.nii.gz is cut off, 12496 of 24992 bytes are there"),
    "no image": (lambda file: Path(file).write_text("hello", encoding="utf-8"), "un_1_0001.nii.gz is no NIfTI image"),
    "empty file": (lambda file: Path(file).write_bytes(b""), "un_1_0001.nii.gz is no NIfTI image"),
    "flipped byte": (flip_byte, "un_1_0001.nii.gz"),
    "other shape": (lambda file: rewrite(file, lambda a: a[1:]), "its channels differ in shape or voxel size"),
    "more channels": (lambda file: rewrite(file, lambda a: np.stack([a, a])), "un_1_0001.nii.gz"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_image_is_named_and_the_others_stay(dataset, images, damage):
    harm, message = DAMAGE[damage]
    good = Path(dataset.images("un_1")[1]).read_bytes()
    harm(dataset.images("un_1")[1])
    with pytest.raises(InputError) as error:
        run(dataset)
    text = str(error.value)
    assert message in text and dataset.images("un_1")[1] in text and "remove it from imagesUn" in text
    assert "\n" not in text and error.value.__cause__ is not None
    assert_state(dataset, ["un_0"], images)

    Path(dataset.images("un_1")[1]).write_bytes(good)
    assert pending(dataset) == ["un_1", "un_2"]
    assert run(dataset) == CASES
    assert_state(dataset, CASES, images)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(dataset, value):
    dataset.edit_plans(lambda plans: plans.update(image_reader_writer="NibabelIO"))
    rewrite(dataset.images("un_1")[1], with_value(value))
    with pytest.raises(InputError, match=r"un_1_0001.nii.gz cannot be .*: NaN or infinite values in channel 1. Repair"):
        run(dataset)
    assert_state(dataset, ["un_0"])


def test_itk_reads_nan_as_zero_as_for_labelled_images(dataset):
    with_nan, with_zero = "un_1", "un_9"
    for file in dataset.images(with_nan):
        shutil.copy2(file, file.replace(with_nan, with_zero))
    rewrite(dataset.images(with_nan)[1], with_value(np.nan))
    rewrite(dataset.images(with_zero)[1], with_value(0))
    run(dataset)
    assert np.array_equal(load(dataset.folder, with_nan)[0], load(dataset.folder, with_zero)[0])


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_finite_values_that_overflow_are_refused(dataset):
    rewrite(dataset.images("un_1")[0], lambda array: np.where(array > 0, np.float32(3e38), np.float32(0)))
    with pytest.raises(InputError, match=r"un_1_0000.nii.gz.*it has values up to 3e\+38"):
        run(dataset)


def test_all_channels_wrong_in_the_same_way(dataset):
    for file in dataset.images("un_1"):
        rewrite(file, lambda array: np.stack([array, array]))
    with pytest.raises(InputError, match="un_1_0000.nii.gz.* it has 4 channels, the plans expect 2"):
        run(dataset)


@pytest.mark.robustness
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (np.zeros_like, "every voxel is 0: it shows nothing"),
        (lambda array: np.full_like(array, 7), "every voxel is 7: it shows nothing"),
        (lambda array: np.full_like(array, np.nan), "NaN or infinite values|every voxel is 0"),
        (lambda array: np.where(np.arange(array.size).reshape(array.shape) == 5, 3e38, array), r"values up to 3e\+38"),
    ],
)
def test_a_worthless_image_is_refused(dataset, change, message):
    """Input: an unlabelled image of one value, of NaN, or with a value of 3e38. Answer: an error that names it."""
    for file in dataset.images("un_1"):
        rewrite(file, lambda array: change(array.astype(np.float32)).astype(np.float32))
    with pytest.raises(InputError, match=rf"un_1_0000.nii.gz.* cannot be preprocessed: .*({message})"):
        run(dataset)
    assert "un_1" in pending(dataset)


@pytest.mark.robustness
@pytest.mark.parametrize("value", [0, -3.5])
def test_one_empty_channel_among_others_is_told(dataset, value):
    """Input: an unlabelled image one of whose channels has one value. Answer: it is used, with a warning that
    names it.
    """
    rewrite(dataset.images("un_1")[1], lambda array: np.full_like(array, value))
    lines = []
    assert run(dataset, log=lines.append) == CASES
    assert [line for line in lines if "WARNING" in line and "un_1_0001" in line and "channel 1 has one value" in line]


@pytest.mark.robustness
@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_a_slice_among_volumes_is_refused(dataset, configuration):
    """Input: a 2D image in a 3D data set. Answer: an error that names it, where nnU-Net would stretch it."""
    for file in dataset.images("un_1"):
        sitk.WriteImage(sitk.ReadImage(file)[:, :, 3], file)
    with pytest.raises(InputError, match="un_1_0000.nii.gz.*it has 2 axes, the labelled images have 3"):
        run(dataset, configuration)


@pytest.mark.robustness
@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
def test_a_volume_of_one_slice_is_a_volume(dataset, reader):
    """Input: a NIfTI volume of one slice among volumes. Answer: it is used; only images of two axes are refused."""
    for file in dataset.images("un_1"):
        nifti = nibabel.load(file)
        nibabel.save(nibabel.Nifti1Image(nifti.get_fdata(dtype=np.float32)[:, :, 8:9], nifti.affine), file)
    dataset.edit_plans(lambda plans: plans.update(image_reader_writer=reader))
    assert run(dataset) == CASES


@pytest.mark.robustness
@pytest.mark.parametrize(
    ("spacing", "message"),
    [
        ((60, 60, 60), r"voxel size 60 x 60 x 60 mm would make [\d.]+ GiB of it"),
        ((1000, 1000, 1), "would make .* correct the header"),
        ((0.001, 1, 1), "voxel size .*0.001 mm leaves no voxel of"),
    ],
)
def test_absurd_voxel_sizes_are_refused_before_memory_is_asked_for(dataset, spacing, message):
    """Input: a voxel size of 60 mm or 0.001 mm. Answer: an error that names file, size and what it would come to."""
    for file in dataset.images("un_1"):
        image = sitk.ReadImage(file)
        image.SetSpacing(spacing)
        sitk.WriteImage(image, file)
    with pytest.raises(InputError, match=f"un_1_0000.nii.gz.*{message}"):
        run(dataset)


def damage_header(file, **fields):
    """Overwrite fields of a NIfTI header."""
    content = bytearray(gzip.decompress(Path(file).read_bytes()))
    header = nibabel.Nifti1Header(bytes(content[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    content[:348] = header.binaryblock
    Path(file).write_bytes(gzip.compress(bytes(content)))


@pytest.mark.robustness
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pixdim": [1, 0, 1, 1, 0, 0, 0, 0]}, "has no voxel size, its header says 0 x 1 x 1 mm"),
        ({"pixdim": [1, 1, np.nan, 1, 0, 0, 0, 0]}, "has no voxel size"),
        ({"dim": [3, 24, 0, 16, 1, 1, 1, 1]}, "has no voxels, its size is 24 x 0 x 16"),
        ({"datatype": 32, "bitpix": 64}, "complex numbers"),
        ({"datatype": 64, "bitpix": 0}, "is cut off"),
        ({"datatype": 1}, "data type 1, which"),
        ({"dim": [9, 2, 2, 2, 2, 2, 2, 2]}, "is no NIfTI image"),
    ],
)
def test_a_nifti_header_that_lies_is_refused(dataset, fields, message):
    """Input: a NIfTI header with no voxel size, an axis of length 0, complex numbers, or more voxels than there
    are. Answer: an error that names the file and what is wrong.
    """
    damage_header(dataset.images("un_1")[0], **fields)
    with pytest.raises(InputError, match=f"un_1_0000.nii.gz.*{message}"):
        run(dataset)


@pytest.mark.robustness
@pytest.mark.parametrize("rest", [b"trailing", b"\x1f\x8b", b"\0" * 3000])
def test_bytes_behind_a_whole_file_do_not_matter(dataset, rest):
    """Input: a .nii.gz with bytes behind its end. Answer: it is used; its voxels are whole."""
    for file in dataset.images("un_1"):
        with open(file, "ab") as stream:
            stream.write(rest)
    assert run(dataset) == CASES


@pytest.mark.robustness
@pytest.mark.parametrize("name", ["../secret.raw", "/etc/hostname", "LIST\n../secret.raw"])
def test_voxels_outside_the_folder_are_not_read(tmp_path, name):
    """Input: an .mhd or .nhdr header that takes its voxels from a file outside its folder. Answer: an error."""
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret.raw").write_bytes(bytes(range(60)))
    mhd = "ObjectType = Image\nNDims = 3\nDimSize = 3 4 5\nElementType = MET_UCHAR\nElementDataFile = "
    nrrd = "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 3 4 5\nencoding: raw\ndata file: "
    for file, start in (("a.mhd", mhd), ("a.mha", mhd), ("a.nhdr", nrrd), ("a.nrrd", nrrd)):
        (inside / file).write_text(f"{start}{name}\n")
        with pytest.raises(ValueError, match=f"{file} takes its voxels from {name.split()[-1]}, outside its folder"):
            checks.require_own_data(str(inside / file))
        (inside / file).write_text(f"{start}secret.raw\n")
        checks.require_own_data(str(inside / file))


@pytest.mark.robustness
@pytest.mark.parametrize(
    "change",
    [
        lambda plans: plans["configurations"]["3d_fullres"].pop("spacing"),
        lambda plans: plans["configurations"].update({"3d_fullres": None}),
        lambda plans: plans["configurations"]["3d_fullres"].update(preprocessor_name="NoPreprocessor"),
        lambda plans: plans["configurations"]["3d_fullres"].update(spacing=[0, 1, 1]),
        lambda plans: plans["configurations"]["3d_fullres"].update(spacing="1 1 1"),
        lambda plans: plans["configurations"]["3d_fullres"].update(inherits_from="nothing"),
        lambda plans: plans.pop("transpose_forward"),
        lambda plans: plans.update(transpose_forward=[0, 0, 1]),
        lambda plans: plans.pop("image_reader_writer"),
        lambda plans: plans.update(configurations=[]),
    ],
)
def test_damaged_plans_are_told_in_one_line(dataset, change):
    """Input: plans without spacing, with a configuration that is null, an unknown preprocessor, a spacing of 0
    and the like. Answer: one line that names the file and the command that makes it anew.
    """
    dataset.edit_plans(change)
    with pytest.raises(InputError, match=r"nnUNetPlans.json.*run nnUNetv2_plan_and_preprocess -d 508$") as caught:
        run(dataset)
    assert "\n" not in str(caught.value)


@pytest.mark.robustness
def test_a_full_disk_is_told_and_nothing_half_written_stays(dataset, images):
    """Input: a disk that fills up while unlabelled images are preprocessed. Answer: one line that names the
    file and the room left; what is whole is kept, and the same command goes on.
    """
    with (
        full_disk(2000),
        pytest.raises(InputError, match=r"un_0.b2nd cannot be written \(.*GB are free there\)") as caught,
    ):
        run(dataset)
    assert "\n" not in str(caught.value) and not list(dataset.folder.glob("*"))
    assert run(dataset) == CASES
    assert_state(dataset, CASES, images)


@pytest.mark.robustness
@pytest.mark.parametrize("cases", [[], "x", {"un_0": None, "un_1": [1], "un_2": {"sizes": "x", "axes": 3}}])
def test_a_manifest_of_another_form_means_all_is_redone(dataset, images, cases):
    """Input: a manifest whose entries are not what was written. Answer: the cases are preprocessed anew."""
    run(dataset)
    content = json.loads(dataset.manifest.read_text())
    dataset.manifest.write_text(json.dumps({**content, "cases": cases}))
    assert run(dataset) == CASES
    assert_state(dataset, CASES, images)


def test_error_in_a_pool_names_the_image_and_keeps_whole_cases_only(dataset, images):
    truncate(dataset.images("un_0")[0])
    with pytest.raises(InputError, match=r"un_0_0000.nii.gz, .*un_0_0001.nii.gz cannot be preprocessed"):
        run(dataset, processes=2)
    assert_state(dataset, json.loads(dataset.manifest.read_text())["cases"], images)
    assert "un_0" in pending(dataset)
    assert not multiprocessing.active_children()


# -------------------------------------------------------------------------------------------------------- interruptions


def test_killed_at_every_file_operation(dataset, tmp_path, images, monkeypatch):
    """A copy of the folder at each rename is what kill -9 at that moment leaves."""
    snapshots = []
    original = os.replace

    def replace(source, target):
        snapshots.append(tmp_path / f"snapshot{len(snapshots)}")
        shutil.copytree(dataset.preprocessed, snapshots[-1])
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        patch.setattr(preprocess, "MANIFEST_PAUSE", 0)
        run(dataset)
    assert len(snapshots) == 1 + 3 * (3 + 1)  # an empty manifest, then per case three files and the manifest

    for number, snapshot in enumerate(snapshots):
        shutil.rmtree(dataset.preprocessed)
        snapshot.rename(dataset.preprocessed)
        done = max(0, (number - 1) // 4)
        assert len(pending(dataset)) == 3 - done
        assert run(dataset) == CASES
        assert_state(dataset, CASES, images)


SCRIPT = """
import sys, time
from pathlib import Path
from nnunetv2_semisup.data import checks, preprocess

name, hang_at = sys.argv[1:]
original = preprocess._preprocess_case

def slow(job):
    print("processing", job.case, flush=True)
    if job.case == hang_at:
        Path(job.output + ".b2nd").write_bytes(b"half a file")
        print("hanging", flush=True)
        time.sleep(60)
    time.sleep(0.3)
    return original(job)

preprocess._preprocess_case = slow
print("ready", flush=True)
sys.stdin.readline()
log = lambda line: None
print(preprocess.preprocess_unlabeled(name, "nnUNetPlans", "3d_fullres", 1, log=log), flush=True)
"""


def start_script(dataset, hang_at=""):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, dataset.name, hang_at],
        env={**os.environ, "PYTHONPATH": str(PACKAGE_ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def go_until(process, end):
    """Let the script go and read what it prints up to the line ``end``."""
    process.stdin.write("\n")
    process.stdin.flush()
    lines = []
    while end not in lines:
        lines.append(process.stdout.readline().strip())
        assert lines[-1], f"ended before {end!r}: {lines}"
    return lines


def test_kill_9_then_two_processes_at_once(dataset, images, monkeypatch):
    killed, other = start_script(dataset, hang_at="un_1"), start_script(dataset)

    # Killed within the second case: the first is there, of the second nothing.
    go_until(killed, "hanging")
    assert list(json.loads(dataset.manifest.read_text())["cases"]) == ["un_0"]
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert list(dataset.folder.with_name(dataset.folder.name + ".tmp").iterdir())
    assert pending(dataset) == ["un_1", "un_2"]

    # Two at once: the other process does what is left, this one waits and finds it done.
    go_until(other, "processing un_1")
    seen, lines = processed_cases(monkeypatch), []
    assert run(dataset, log=lines.append) == CASES
    assert "waiting for it" in lines[0] and not seen
    output, _ = other.communicate(timeout=50)
    assert output.splitlines() == ["processing un_2", str(CASES)] and other.returncode == 0
    assert_state(dataset, CASES, images)


def test_waiting_for_the_lock_is_said(dataset):
    lock = FileLock(str(dataset.folder) + ".lock")
    lock.acquire()
    lines = []

    def log(line):
        lines.append(line)
        lock.release()

    assert run(dataset, log=log) == CASES
    assert "Another process is preprocessing these unlabelled images" in lines[0]


def when(condition, action):
    """Run ``action`` in a thread once ``condition`` holds."""

    def watch():
        while not condition():
            time.sleep(0.01)
        action()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_killed_worker_is_explained(dataset):
    thread = when(multiprocessing.active_children, lambda: multiprocessing.active_children()[0].kill())
    with pytest.raises(InputError, match=r"lack of memory.*preprocess -d 508 -p nnUNetPlans -c 3d_fullres -np 1$"):
        run(dataset, processes=2)
    thread.join()
    assert not multiprocessing.active_children()
    assert_state(dataset, json.loads(dataset.manifest.read_text())["cases"])


def only_the_first_ends(job, original=preprocess._preprocess_case):
    if job.case != "un_0":
        time.sleep(60)
    return original(job)


def test_ctrl_c_ends_workers_in_the_middle_of_a_case(dataset, images, monkeypatch):
    monkeypatch.setattr(preprocess, "_preprocess_case", only_the_first_ends)
    thread = when(
        lambda: dataset.manifest.exists() and json.loads(dataset.manifest.read_text())["cases"],
        lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT),
    )
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(dataset, processes=2)
    thread.join()
    assert time.monotonic() - start < 50
    assert not multiprocessing.active_children()
    assert_state(dataset, ["un_0"], images)


def test_no_more_processes_than_cases(dataset, monkeypatch):
    counts = []
    monkeypatch.setattr(preprocess, "_run_in_pool", lambda jobs, workers, publish: counts.append(workers))
    run(dataset, processes=8)
    assert counts == [3]


# ------------------------------------------------------------------------------------- without raw data, without plans


@pytest.mark.parametrize("absence", ["dataset", "variable"])
def test_without_raw_images_the_earlier_ones_serve(dataset, monkeypatch, absence):
    run(dataset)
    (dataset.folder / "un_1.pkl").unlink()
    if absence == "dataset":
        shutil.rmtree(dataset.raw)
    else:
        monkeypatch.delenv("nnUNet_raw")
    lines, before = [], stamps(dataset)
    assert run(dataset, log=lines.append) == ["un_0", "un_2"]
    assert lines[0] == f"No imagesUn at hand: using the 2 cases preprocessed earlier in {dataset.folder}"
    assert lines[1] == "WARNING: not used, because their preprocessed files are incomplete: un_1"
    assert stamps(dataset) == before and pending(dataset) == []
    assert run(dataset, identifiers=["un_2"]) == ["un_2"]
    with pytest.raises(InputError, match="no such cases in .*_unlabeled: un_1"):
        run(dataset, identifiers=["un_1"])


@pytest.mark.parametrize("absence", ["dataset", "variable"])
@pytest.mark.parametrize("earlier", ["none", "other plans"])
def test_without_raw_images_and_earlier_ones(dataset, monkeypatch, absence, earlier):
    if earlier == "other plans":
        run(dataset)
        dataset.edit_plans(change_spacing)
    if absence == "dataset":
        shutil.rmtree(dataset.raw / "imagesUn")
    else:
        monkeypatch.delenv("nnUNet_raw")
    remedy = "imagesUn is not there .*: put" if absence == "dataset" else "not set .*: export nnUNet_raw=FOLDER"
    for function in (run, pending):
        with pytest.raises(InputError, match=remedy) as error:
            function(dataset)
        assert "holds no case made with these plans" in str(error.value)


def test_missing_plans_and_configurations_name_the_command(dataset, monkeypatch):
    command = "run nnUNetv2_plan_and_preprocess -d 508"
    with pytest.raises(InputError, match=f"{command}, or choose one of the plans there with -p: nnUNetPlans$"):
        preprocess_unlabeled(dataset.name, "nnUNetResEncUNetMPlans", "3d_fullres", 1)
    with pytest.raises(
        InputError, match=f"has no configuration '3d_lowres': choose one of .*3d_fullres.*, or {command}"
    ):
        run(dataset, "3d_lowres")
    dataset.plans_file.write_text("[]")
    with pytest.raises(InputError, match=f"nnUNetPlans.json is no plans file: {command}"):
        run(dataset)
    dataset.plans_file.unlink()
    with pytest.raises(InputError, match=f"nnUNetPlans.json does not exist: {command}$"):
        run(dataset)
    monkeypatch.delenv("nnUNet_preprocessed")
    with pytest.raises(InputError, match="nnUNet_preprocessed is not set"):
        run(dataset)


def turn(dataset, case, axes):
    """Store an unlabelled case with other axes, at the same place in space."""
    for channel in (0, 1):
        file = dataset.raw / "imagesUn" / f"{case}_{channel:04d}.nii.gz"
        sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(str(file)), axes), str(file))


@pytest.mark.robustness
@pytest.mark.parametrize("axes", ["ASL", "RAS", "LAS"])
def test_unlabelled_image_with_other_axes_is_named_each_time(dataset, axes):
    """Input: an image turned by hand in imagesUn. Answer: preprocessing and training warn and name it, every time."""
    turn(dataset, "un_1", axes)
    for _ in range(2):  # the second call, as a training's, finds everything done
        lines = []
        run(dataset, log=lines.append)
        warnings = [line for line in lines if "WARNING" in line]
        assert len(warnings) == 1 and f"usual here (LPS): un_1 ({axes})" in warnings[0]


@pytest.mark.robustness
def test_readers_that_turn_images_need_no_warning(dataset):
    """Input: an image turned by hand, and a reader that turns images back. Answer: no warning."""
    turn(dataset, "un_1", "ASL")
    file = dataset.preprocessed / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    file.write_text(json.dumps({**plans, "image_reader_writer": "NibabelIOWithReorient"}))
    lines = []
    run(dataset, identifiers=["un_1"], log=lines.append)
    assert not any("WARNING" in line for line in lines)
