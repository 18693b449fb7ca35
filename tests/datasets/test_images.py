"""Reading, orientation, previews."""

import itertools
import os
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from dicom_series import make_ct
from matplotlib.figure import Figure

from nnunetv2_semisup.data import checks
from nnunetv2_semisup.data.checks import Facts
from nnunetv2_semisup.datasets import images
from nnunetv2_semisup.datasets.preview import save_preview
from nnunetv2_semisup.errors import InputError

PATH, IMAGE = Path("label0001.nii.gz"), Path("image0001.nii.gz")


def store_differently(image: sitk.Image, order: tuple[int, ...], flipped: tuple[bool, ...]) -> sitk.Image:
    """The same voxels at the same places in space, stored with permuted and flipped axes; in numpy, index by index."""
    array = sitk.GetArrayFromImage(image).T.transpose(order)
    direction = np.array(image.GetDirection()).reshape(3, 3)[:, order]
    first = np.zeros(3, int)
    for axis, flip in enumerate(flipped):
        if flip:
            array = np.flip(array, axis)
            direction[:, axis] *= -1
            first[order[axis]] = image.GetSize()[order[axis]] - 1
    stored = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    stored.SetSpacing([image.GetSpacing()[axis] for axis in order])
    stored.SetDirection(direction.ravel())
    stored.SetOrigin(image.TransformIndexToPhysicalPoint([int(i) for i in first]))
    return stored


ALL_WAYS = list(itertools.product(itertools.permutations(range(3)), itertools.product([False, True], repeat=3)))


@pytest.mark.parametrize("angle", [0.0, 0.2])
def test_align_label_undoes_every_permutation_and_flip(angle):
    image = make_ct(0, angle=angle)
    for order, flipped in ALL_WAYS:
        stored = store_differently(image, order, flipped)
        # The helper itself, against ITK: a voxel is where it was.
        point = image.TransformIndexToPhysicalPoint((1, 2, 3))
        assert stored[stored.TransformPhysicalPointToIndex(point)] == image[1, 2, 3]
        aligned, exact = images.align_label(stored, image, PATH, IMAGE)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(aligned), sitk.GetArrayFromImage(image))
        assert exact and images.same_geometry(aligned, image)


@pytest.mark.parametrize("flipped", [(False, True, False), (True, False, True)])
def test_align_label_without_origin_and_obliqueness_uses_the_closest_axes(flipped):
    """Label files that keep the orientation of the axes only, as some archives have them."""
    image = make_ct(1)
    stored = store_differently(image, (0, 1, 2), flipped)
    stored.SetOrigin((0, 0, 0))
    stored.SetDirection(np.diag([-1.0 if flip else 1.0 for flip in flipped]).ravel())
    aligned, exact = images.align_label(stored, image, PATH, IMAGE)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(aligned), sitk.GetArrayFromImage(image))
    assert not exact and images.same_geometry(aligned, image)


def test_align_label_refuses_another_grid():
    image = make_ct(0)
    with pytest.raises(InputError, match=r"label0001.nii.gz: the label has 7 x 6 x 4 voxels .* 7 x 6 x 5"):
        images.align_label(image[:, :, :4], image, PATH, IMAGE)
    other = sitk.Image(image)
    other.SetSpacing((0.7, 0.8, 1.0))
    with pytest.raises(InputError, match=r"its spacing is 0.7 x 0.8 x 1 mm"):
        images.align_label(other, image, PATH, IMAGE)
    other = make_ct(0, size=(6, 6, 6), spacing=(1, 1, 1))
    other.SetDirection((np.array([[2, -1, 2], [2, 2, -1], [-1, 2, 2]]) / 3).ravel())
    with pytest.raises(InputError, match="axes lie between"):
        images.align_label(other, make_ct(0, size=(6, 6, 6), spacing=(1, 1, 1), angle=0), PATH, IMAGE)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("kind", ["<f4", ">f8"])
def test_values_of_nifti_that_are_not_finite(kind, value, tmp_path):
    """ITK makes zeros of them."""
    array = np.ones((70, 70, 70), kind)
    for name in ("x.nii", "x.nii.gz"):
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / name)
        assert sitk.GetArrayViewFromImage(images.read_image(tmp_path / name)).min() == 1
    array[-1, -1, -1] = value
    for name in ("x.nii", "x.nii.gz"):
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / name)
        with pytest.raises(InputError, match=f"{name} has NaN or infinite values"):
            images.read_image(tmp_path / name)


def test_labels_are_small_and_keep_their_header(tmp_path):
    """Eight bytes per voxel are common in label files; the header tells whether the orientation is known."""
    label = sitk.Cast(make_ct(0) > 0, sitk.sitkFloat64)
    sitk.WriteImage(label, str(tmp_path / "x.nii"))
    small = images.read_label(tmp_path / "x.nii", (0, 1))
    assert small.GetPixelID() == sitk.sitkUInt8 and small.GetMetaData("qform_code") == "1"
    np.testing.assert_array_equal(sitk.GetArrayFromImage(small), sitk.GetArrayFromImage(label))
    assert images.same_geometry(small, label)


def test_unexpected_label_values_are_written_out():
    with pytest.raises(InputError, match="value 1.000001; only 0, 1, 2 may occur"):
        checks.check_label(np.array([0, 1, 1.000001]), (3,), (0, 1, 2), PATH)


def test_content_hash_is_that_of_the_content(tmp_path):
    ct = make_ct(4, angle=0)
    for ending in (".nii.gz", ".nrrd", ".mha"):
        sitk.WriteImage(sitk.Cast(ct, sitk.sitkFloat32), str(tmp_path / f"x{ending}"))
        assert images.content_hash([images.read_image(tmp_path / f"x{ending}")]) == images.content_hash([ct])
    assert images.content_hash([store_differently(ct, (2, 0, 1), (True, False, False))]) == images.content_hash([ct])
    assert images.content_hash([ct + 1]) != images.content_hash([ct])
    assert images.content_hash([ct[:, ::-1, :]]) == images.content_hash([ct])  # ITK moves the geometry along


@pytest.mark.parametrize("name", ["x.nii", "X.NII"])
def test_cut_off_nifti_is_noticed(name, tmp_path):
    sitk.WriteImage(make_ct(0), str(tmp_path / "whole.nii"))
    (tmp_path / name).write_bytes((tmp_path / "whole.nii").read_bytes()[:-10])
    with pytest.raises(InputError, match=f"{name}: damaged or incomplete .*cut off"):
        images.read_image(tmp_path / name)


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz", "x.7z"])
def test_archives_are_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match="unpack it"):
        images.check_source(tmp_path / name)


def test_report():
    facts = [
        Facts("a", "labelled", (10, 20, 30), (1.0, 1.0, 2.0), {0: 5000, 1: 1000}, "odd"),
        Facts("b", "test", (10, 25, 30), (1.0, 1.0, 2.5), {0: 6000}),
        Facts("c", "unlabelled", (10, 20, 30), (1.0, 1.0, 2.0), {}),
    ]
    text = checks.table_text(checks.facts_rows(facts, {"background": 0, "organ": 1}, "from headers"))
    for row in (
        r"cases +3", r"labelled +1 in imagesTr", r"unlabelled +1 in imagesUn", r"test +1 in imagesTs",
        r"spacing +1 x 1 x 2-2.5 mm \(x, y, z\), from headers", r"shape +10 x 20-25 x 30 voxels",
        r"organ +1 ml on average \(0-2\) in 2 cases, absent in 1", r"note +odd: 1 cases \(a\)",
    ):  # fmt: skip
        assert re.search(row, text), row
    assert "background" not in text and "validation" not in text


def test_preview_shows_where_the_label_is(tmp_path):
    """A bright cube at the front, left and top: its outline must be there in each plane, also for other axes."""
    ct = sitk.Image(40, 40, 40, sitk.sitkInt16)
    ct[28:36, 4:12, 26:34] = 1000  # identity direction: x to the left, y to the back, z to the top
    label = sitk.Cast(ct > 0, sitk.sitkUInt8)
    save_preview(ct, label, tmp_path / "a.png", "t")
    turned = [store_differently(image, (2, 0, 1), (True, False, True)) for image in (ct, label)]
    save_preview(*turned, tmp_path / "b.png", "t")
    first, second = (sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / name))) for name in ("a.png", "b.png"))
    np.testing.assert_array_equal(first, second)
    red = (first[..., 0] > 200) & (first[..., 1] < 120) & (first[..., 2] < 120)
    width = first.shape[1] // 3
    centres = [np.argwhere(red[:, i * width : (i + 1) * width]).mean(axis=0) for i in range(3)]
    middle = first.shape[0] / 2
    assert centres[0][0] < middle and centres[0][1] > width / 2  # axial: front is up, left is right
    assert centres[1][0] < middle and centres[1][1] > width / 2  # coronal: top is up, left is right
    assert centres[2][0] < middle and centres[2][1] < width / 2  # sagittal: top is up, front is left
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.png", "b.png"]


def test_preview_names_classes_slices_and_the_grid(tmp_path, monkeypatch):
    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k)))
    array = np.zeros((10, 30, 20), np.uint8)
    array[6, 5:20, 5:15] = 1
    array[6, 21:24, 5:15] = 7  # the first colour once more
    array[6, 25:28, 5:15] = 9
    label = sitk.GetImageFromArray(array)
    label.SetSpacing((0.5, 1.0, 2.5))
    image = sitk.Cast(label, sitk.sitkInt16)
    classes = {"background": 0, "liver": 1, "cyst": 7, "absent": 8}
    save_preview(image, label, tmp_path / "a.png", "case (labelled)", classes)
    save_preview(image, None, tmp_path / "b.png", "case")
    save_preview(sitk.Image(30, 20, sitk.sitkUInt8), None, tmp_path / "c.png", "photograph")
    with_label, without, photo = saved
    assert with_label.get_suptitle() == "case (labelled)\n20 x 30 x 10 voxels, 0.5 x 1 x 2.5 mm (x, y, z)"
    assert photo.get_suptitle() == "photograph\n30 x 20 pixels"
    assert [a.get_title() for a in without.axes] == [
        "axial, slice 6 of 10",
        "coronal, slice 16 of 30",
        "sagittal, slice 11 of 20",
    ]
    assert with_label.axes[0].get_title() == "axial, slice 7 of 10"
    (legend,) = with_label.legends
    assert [text.get_text() for text in legend.get_texts()] == ["liver", "cyst", "9"] and not without.legends
    lines = [(line.get_color(), line.get_linestyle()) for line in legend.get_lines()]
    assert lines[0][0] == lines[1][0] and len(set(lines)) == 3, "same colour, other dashes"
    assert [[t.get_text() for t in a.texts] for a in without.axes] == [list("RLAP"), list("RLSI"), list("APSI")]
    assert all(text.get_path_effects() for axes in without.axes for text in axes.texts)


def test_preview_of_a_photograph(tmp_path):
    photo = sitk.GetImageFromArray(
        np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8), isVector=True
    )
    save_preview(photo, None, tmp_path / "a.png", "t")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_archives_where_files_are_missing(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("x.nii.gz", "._b.zip", "c.txt"):
        (tmp_path / name).write_bytes(b"")
    assert images.packed(tmp_path) == ""
    (tmp_path / "deep" / "b.ZIP").write_bytes(b"")
    assert images.packed(tmp_path) == f"; {tmp_path / 'deep' / 'b.ZIP'} is there: unpack first"
    (tmp_path / "a.tar.gz").write_bytes(b"")
    assert images.packed(tmp_path) == f"; {tmp_path / 'a.tar.gz'} and 1 more archives are there: unpack first"


def test_folders_that_cannot_be_read_are_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refusing(folder):
        if Path(folder).name == "closed":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(InputError, match=r"/closed cannot be read \(Permission denied\); change its permissions"):
        images.walk(tmp_path)


def test_remedies_fit_the_fault(tmp_path):
    sitk.WriteImage(make_ct(0), str(tmp_path / "A.nii.gz"))
    (tmp_path / "A.nii.gz").rename(tmp_path / "A.Nii.gz")
    with pytest.raises(InputError, match=r"A.Nii.gz: ITK does not know .*; rename the file, with the ending .nii.gz$"):
        images.read_image(tmp_path / "A.Nii.gz")
    affine = np.eye(4)
    affine[0, 1] = 0.4
    sheared = nibabel.Nifti1Image(np.ones((4, 5, 6), np.float32), None)
    sheared.set_sform(affine, 1)
    nibabel.save(sheared, tmp_path / "s.nii")
    with pytest.raises(InputError, match=r"s.nii: by its header the axes are not at right angles .*; resample it"):
        images.read_image(tmp_path / "s.nii")
    nibabel.save(nibabel.Nifti1Image(np.full((4, 5, 6), np.nan, np.float32), np.eye(4)), tmp_path / "n.nii")
    with pytest.raises(InputError, match="n.nii has NaN or infinite values; replace them"):
        images.read_image(tmp_path / "n.nii")
