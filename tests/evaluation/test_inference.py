"""The literature's sliding window against a brute-force loop, and whole folders in their own geometry."""

import json
import math

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.evaluation import inference as module
from nnunetv2_semisup.evaluation.inference import LiteraturePredictor, predict_folder, sliding_windows

QUICK = settings(max_examples=60)
CPU = torch.device("cpu")
SPACING = (1.0, 1.5, 2.0)  # x, y, z; the plans' spacing is 1, so there is resampling
DIRECTION = (0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0)


@pytest.fixture
def model(datasets, use, tmp_path):
    """``model("regions")`` is the folder of a model with random weights; training mirrored along two axes."""

    def make(kind="2 classes", configuration="3d_fullres", **plans):
        dataset = use(datasets(kind))
        plans = {**dataset.plans, **plans}
        trainer = dataset.trainer("nnUNetTrainerMeanTeacher", configuration, plans=plans)
        trainer.initialize()
        weight = trainer.network.decoder.seg_layers[-1].weight
        with torch.no_grad():  # logits that differ from voxel to voxel, with no class that always wins
            weight.normal_().sub_(weight.mean(1, keepdim=True))
        trainer.inference_allowed_mirroring_axes = (0, 1)
        folder = tmp_path / "model"
        (folder / "fold_all").mkdir(parents=True)
        for file, content in (("plans.json", plans), ("dataset.json", dataset.dataset_json)):
            (folder / file).write_text(json.dumps(content))
        trainer.save_checkpoint(str(folder / "fold_all" / "checkpoint_final.pth"))
        return folder

    return make


def predictor_of(folder, stride_fraction=None) -> LiteraturePredictor:
    predictor = LiteraturePredictor(CPU, stride_fraction)
    predictor.allow_tqdm = False
    predictor.initialize_from_trained_model_folder(str(folder), ("all",))
    return predictor


def starts(size, patch, stride) -> list[int]:
    return [min(i * stride, size - patch) for i in range(math.ceil((size - patch) / stride) + 1)]


@torch.no_grad()
def brute_force(predictor, image: torch.Tensor, patch, stride, sigmoid=False) -> np.ndarray:
    """Mean probability (heads, X, Y, Z), voxel sums in float64; a 2D patch goes through the first axis."""
    if len(patch) == 2:
        slices = [brute_force(predictor, image[:, i], (*patch, 0), stride, sigmoid) for i in range(image.shape[1])]
        return np.stack(slices, 1)
    patch = patch[: image.ndim - 1]
    before = [max(p - n, 0) // 2 for n, p in zip(image.shape[1:], patch, strict=True)]
    sizes = [max(n, p) for n, p in zip(image.shape[1:], patch, strict=True)]
    padded = torch.zeros(image.shape[0], *sizes)
    inside = tuple(slice(b, b + n) for b, n in zip(before, image.shape[1:], strict=True))
    padded[(slice(None), *inside)] = image
    total = visits = 0
    corners = np.stack(np.meshgrid(*map(starts, sizes, patch, stride), indexing="ij"), -1).reshape(-1, len(patch))
    for corner in corners:
        window = tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))
        logits = predictor.network(padded[(slice(None), *window)][None])[0]
        values = logits.sigmoid() if sigmoid else logits.softmax(0)
        here = np.zeros((len(values), *sizes))
        here[(slice(None), *window)] = values
        total, visits = total + here, visits + (here.sum(0) > 0)
    return (total / visits)[(slice(None), *inside)]


@pytest.mark.parametrize("shape", [(20, 18, 22), (10, 18, 15), (16, 16, 16)])
@pytest.mark.parametrize("kind", ["2 classes", "4 classes", "regions"])
def test_equal_to_a_loop_over_windows(model, kind, shape):
    predictor = predictor_of(model(kind), (3 / 16, 5 / 16, 9 / 16))
    image = torch.randn(1, *shape)
    expected = brute_force(predictor, image, (16, 16, 16), (9, 5, 3), sigmoid=kind == "regions")
    logits = predictor.predict_sliding_window_return_logits(image)
    assert logits.dtype == torch.float32 and torch.isfinite(logits).all()
    found = predictor.label_manager.apply_inference_nonlin(logits).numpy()
    assert found == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("shape", [(3, 18, 22), (2, 10, 20)])
def test_2d_goes_slice_by_slice(model, shape):
    predictor = predictor_of(model("4 classes", "2d"), (4 / 16, 7 / 16))
    image = torch.randn(1, *shape)
    found = predictor.predict_sliding_window_return_logits(image).softmax(0).numpy()
    assert found == pytest.approx(brute_force(predictor, image, (16, 16), (7, 4)), abs=2e-6)


def test_no_mirroring_and_no_weighting(model):
    """One window: the probabilities are the network's own."""
    predictor = predictor_of(model("4 classes"))
    image = torch.randn(1, 16, 16, 16)
    with torch.no_grad():
        expected = predictor.network(image[None])[0].softmax(0)
    assert torch.allclose(predictor.predict_sliding_window_return_logits(image).softmax(0), expected, atol=1e-6)


def test_certain_probabilities_stay_finite(model):
    predictor = predictor_of(model("regions"))
    with torch.no_grad():
        predictor.network.decoder.seg_layers[-1].bias.copy_(torch.tensor([300.0, -300.0]))
    predictor.list_of_parameters = [predictor.network.state_dict()]
    logits = predictor.predict_logits_from_preprocessed_data(torch.randn(1, 16, 16, 16))
    assert torch.isfinite(logits).all() and (logits[0] > 10).all() and (logits[1] < -10).all()


# -------------------------------------------------------------------------------------------------- windows and strides


def test_windows_of_the_left_atrium():
    """A test case of 150 x 122 x 88 voxels (x, y, z), by hand."""
    windows = list(sliding_windows((150, 122, 88), (112, 112, 80), (18, 18, 4)))
    assert [sorted({w[axis].start for w in windows}) for axis in range(3)] == [[0, 18, 36, 38], [0, 10], [0, 4, 8]]
    assert len(windows) == 4 * 2 * 3 and {w[2].stop - w[2].start for w in windows} == {80}


@QUICK
@given(st.data())
def test_windows_cover_everything_once_each(data):
    dim = data.draw(st.integers(1, 3))
    patch = data.draw(st.tuples(*[st.integers(1, 5)] * dim))
    stride = tuple(data.draw(st.integers(1, p)) for p in patch)
    shape = tuple(p + data.draw(st.integers(0, 6)) for p in patch)
    windows = list(sliding_windows(shape, patch, stride))
    visits = np.zeros(shape, int)
    for window in windows:
        assert visits[window].shape == patch
        visits[window] += 1
    assert visits.min() >= 1
    corners = [tuple(s.start for s in w) for w in windows]
    assert len(set(corners)) == len(corners)
    assert sorted({c[0] for c in corners}) == starts(shape[0], patch[0], stride[0])


def test_stride_follows_the_axes_of_the_image(model):
    """Fractions are x, y, z; arrays are z, y, x, and nnU-Net may turn them once more."""
    assert predictor_of(model(), (1 / 16, 2 / 16, 4 / 16)).stride == (4, 2, 1)


def test_stride_follows_transposed_axes(model):
    turned = {"transpose_forward": [1, 0, 2], "transpose_backward": [1, 0, 2]}  # y, z, x
    assert predictor_of(model(**turned), (1 / 16, 2 / 16, 4 / 16)).stride == (2, 4, 1)


def test_papers_stride(model):
    predictor = predictor_of(model())
    predictor.configuration_manager.configuration["patch_size"] = [80, 112, 112]
    assert predictor.stride == (4, 18, 18)
    predictor.configuration_manager.configuration["patch_size"] = [8, 16, 16]
    assert predictor.stride == (1, 3, 3)  # never 0


# -------------------------------------------------------------------------------------------------------- whole folders


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for seed, name in enumerate(("c1", "c2")):
        array = np.random.default_rng(seed).normal(size=(12, 15, 19)).astype(np.float32)
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(SPACING if name == "c1" else (1.0, 1.0, 1.0))
        image.SetOrigin((3.0, -4.0, 5.0))
        image.SetDirection(DIRECTION)
        sitk.WriteImage(image, str(folder / f"{name}_0000.nii.gz"))
    return folder


@pytest.mark.parametrize("how", ["nnunet", "literature"])
def test_predictions_lie_where_the_images_lie(model, images, tmp_path, how):
    output = tmp_path / "new" / "predictions"
    predict_folder(model(), images, output, how, "cpu")
    for case in ("c1", "c2"):
        image = sitk.ReadImage(str(images / f"{case}_0000.nii.gz"))
        prediction = sitk.ReadImage(str(output / f"{case}.nii.gz"))
        for name in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(prediction, name)() == pytest.approx(getattr(image, name)())
    record = json.loads((output / "inference.json").read_text())
    assert record["inference"] == how and record["checkpoint"] == "checkpoint_final.pth" and record["folds"] == ["all"]
    assert record.get("stride_voxels") == ([1, 3, 3] if how == "literature" else None)


def test_nnunet_is_stock(model, images, tmp_path):
    folder = model("4 classes")
    predict_folder(folder, images, tmp_path / "ours", "nnunet", CPU)
    stock = nnUNetPredictor(device=CPU)
    stock.initialize_from_trained_model_folder(str(folder), ("all",))
    (tmp_path / "stock").mkdir()
    stock.predict_from_files_sequential(str(images), str(tmp_path / "stock"))
    for case in ("c1", "c2"):
        arrays = [
            sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / f / f"{case}.nii.gz"))) for f in ("ours", "stock")
        ]
        assert np.array_equal(*arrays) and len(np.unique(arrays[0])) > 1


def test_literature_is_the_argmax_of_the_mean(model, images, tmp_path):
    """On the case that needs no resampling."""
    folder = model("4 classes")
    predict_folder(folder, images, tmp_path / "out", "literature", CPU, stride_fraction=(5 / 16,) * 3)
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(images / "c2_0000.nii.gz")))
    normalised = torch.from_numpy((array - array.mean()) / array.std())[None]
    mean = brute_force(predictor_of(folder), normalised, (16,) * 3, (5,) * 3)
    found = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "c2.nii.gz")))
    clear = np.sort(mean, 0)[-1] - np.sort(mean, 0)[-2] > 1e-5
    assert clear.mean() > 0.99 and len(np.unique(found)) == 4
    assert np.array_equal(found[clear], mean.argmax(0)[clear])


def test_memory_of_the_device_runs_out(model, monkeypatch):
    """The sums then go to the CPU; the result is the same."""
    predictor = predictor_of(model())
    image = torch.randn(1, 20, 18, 22)
    expected = predictor.predict_sliding_window_return_logits(image)
    original, calls = LiteraturePredictor._average, []

    def full_at_first(self, *arguments):
        calls.append(arguments[-1])
        if len(calls) == 1:
            raise torch.cuda.OutOfMemoryError
        return original(self, *arguments)

    monkeypatch.setattr(LiteraturePredictor, "_average", full_at_first)
    assert torch.equal(predictor.predict_sliding_window_return_logits(image), expected) and len(calls) == 2


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"checkpoint": "checkpoint_best.pth"}, "checkpoint_best.pth"),
        ({"folds": (0,)}, "fold_0"),
        ({"inference": "papers"}, "'papers'"),
        ({"inference": "nnunet", "stride_fraction": (0.5,) * 3}, "stride_fraction"),
        ({"stride_fraction": (0.5, 0.5)}, "3 numbers"),
        ({"stride_fraction": (0.5, 0.5, 0.0)}, "above 0"),
    ],
)
def test_wrong_input(model, images, tmp_path, change, word):
    arguments = {"inference": "literature", "device": "cpu", **change}
    with pytest.raises(InputError, match=word):
        predict_folder(model(), images, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_wrong_folders(model, images, tmp_path):
    with pytest.raises(InputError, match="plans.json"):
        predict_folder(tmp_path, images, tmp_path / "out", "nnunet", "cpu")
    with pytest.raises(InputError, match="CASE_0000.nii.gz"):
        predict_folder(model(), tmp_path, tmp_path / "out", "nnunet", "cpu")


def test_2d_has_no_stride_of_the_papers(model, images, tmp_path):
    with pytest.raises(InputError, match="2d"):
        predict_folder(model(configuration="2d"), images, tmp_path / "out", "literature", "cpu")


def test_module_documents_its_default():
    assert [round(f * p) for f, p in zip(module.LA_STRIDE_FRACTION, (112, 112, 80), strict=True)] == [18, 18, 4]
