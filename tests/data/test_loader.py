import multiprocessing

import numpy as np
import pytest
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy.stats import chisquare

from nnunetv2_semisup.data.loader import TwoStreamLoader, UnlabeledDataLoader, UnlabeledDataset, geometric_part
from nnunetv2_semisup.data.preprocess import preprocess_unlabeled

SHAPE = (14, 12, 10)


def label_manager(dataset, ignore=False):
    content = dataset.dataset_json
    if ignore:
        content["labels"]["ignore"] = 2
    return PlansManager(dataset.plans).get_label_manager(content)


def save_case(folder, case, image, mask):
    folder.mkdir(exist_ok=True)
    sizes = {"chunks": image.shape, "blocks": image.shape, "chunks_seg": mask.shape, "blocks_seg": mask.shape}
    nnUNetDatasetBlosc2.save_case(image, mask, {"spacing": [1, 1, 1]}, str(folder / case), **sizes)


@pytest.fixture
def positions(tmp_path):
    """One case whose three channels hold the position of each voxel, mask 0 everywhere."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij")).astype(np.float32)
    save_case(tmp_path / "positions", "case", grid, np.zeros((1, *SHAPE), np.int16))
    return UnlabeledDataset(tmp_path / "positions")


@pytest.fixture
def indicator(tmp_path):
    """One case whose two channels are 1 within a box and 0 outside, mask -1 outside."""
    inside = np.zeros((1, 20, 20, 20), bool)
    inside[:, 5:15, 3:14, 4:17] = True
    image = np.repeat(inside, 2, axis=0).astype(np.float32)
    save_case(tmp_path / "indicator", "case", image, np.where(inside, 0, -1).astype(np.int16))
    return UnlabeledDataset(tmp_path / "indicator")


def stock_transforms(patch_size, dummy_2d=False, p=None):
    """nnU-Net's training transforms; ``p``: probability of rotation and of scaling."""
    transforms = nnUNetTrainer.get_training_transforms(
        patch_size,
        (-0.5, 0.5),
        None,
        tuple(range(len(patch_size))),
        dummy_2d,
        use_mask_for_norm=[True, False],
    )
    if p is not None:
        for transform in transforms.transforms:
            if isinstance(transform, SpatialTransform):
                transform.p_rotation = transform.p_scaling = p
    return transforms


# --------------------------------------------------------------------------------------------------------- the data set


def test_dataset_has_no_class_locations(dataset):
    cases = preprocess_unlabeled(dataset.name, "nnUNetPlans", "3d_fullres", 1, log=lambda line: None)
    chosen = ["un_2", "un_0"]
    unlabeled = UnlabeledDataset(dataset.folder, chosen)
    assert unlabeled.identifiers == ["un_0", "un_2"] and chosen == ["un_2", "un_0"]
    assert UnlabeledDataset(dataset.folder).identifiers == cases
    image, mask, previous, properties = unlabeled["un_2"]
    assert image.shape[0] == 2 and mask.shape == (1, *image.shape[1:]) and previous is None
    assert properties == {"class_locations": None}


@pytest.mark.robustness
def test_no_pickle_of_an_unlabelled_case_is_opened(dataset):
    """Input: a properties file (.pkl) of an unlabelled case that would run code. Answer: training never opens it."""
    preprocess_unlabeled(dataset.name, "nnUNetPlans", "3d_fullres", 1, log=lambda line: None)
    for file in dataset.folder.glob("*.pkl"):
        file.write_bytes(b"cos\nabort\n(tR.")
    image, mask, _, _ = UnlabeledDataset(dataset.folder)["un_2"]
    assert image[:].shape[1:] == mask[:].shape[1:]


# ---------------------------------------------------------------------------------------------------------- the patches


def test_batch_has_no_target(dataset, positions):
    loader = UnlabeledDataLoader(positions, 3, (6, 5, 4), (6, 5, 4), label_manager(dataset))
    batch = next(loader)
    assert set(batch) == {"data", "keys"}
    assert batch["data"].shape == (3, 3, 6, 5, 4) and batch["data"].dtype == torch.float32
    assert list(batch["keys"]) == ["case"] * 3


def test_2d_patches_of_3d_cases(dataset, positions):
    np.random.seed(0)
    loader = UnlabeledDataLoader(positions, 200, (5, 4), (5, 4), label_manager(dataset))
    data = next(loader)["data"].numpy()
    assert data.shape == (200, 3, 5, 4)
    assert (data[:, 0] == data[:, 0, :1, :1]).all()  # within one slice
    assert set(data[:, 0, 0, 0]) == set(range(SHAPE[0]))  # of all slices


@pytest.mark.parametrize("ignore", [False, True])
def test_patches_are_uniform(dataset, positions, ignore):
    np.random.seed(0)
    patch = (6, 5, 4)
    loader = UnlabeledDataLoader(positions, 1000, patch, patch, label_manager(dataset, ignore))
    starts = next(loader)["data"][:, :, 0, 0, 0].numpy().astype(int)
    for axis in range(3):
        counts = np.bincount(starts[:, axis], minlength=SHAPE[axis] - patch[axis] + 1)
        assert len(counts) == SHAPE[axis] - patch[axis] + 1
        assert chisquare(counts).pvalue > 1e-3


def test_patches_reach_over_the_border_as_in_stock(dataset, positions):
    """Positions are drawn as nnU-Net draws them when it forces no foreground."""
    arguments = (4, (8, 7, 6), (6, 5, 4), label_manager(dataset))
    boxes = []
    for loader in (UnlabeledDataLoader(positions, *arguments), nnUNetDataLoader(positions, *arguments)):
        np.random.seed(0)
        boxes.append([loader.get_bbox(np.array(SHAPE), loader.get_do_oversample(i % 4), None) for i in range(300)])
    assert boxes[0] == boxes[1]
    starts = np.array([lower for lower, _ in boxes[0]])
    assert (starts.min(0) == -1).all() and (starts.max(0) == np.array(SHAPE) + 1 - (8, 7, 6)).all()


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("patch_size", [(12, 10, 8), (10, 8)], ids=["3d", "2d"])
def test_patches_are_what_stocks_loader_makes(dataset, indicator, patch_size, masks):
    """From the same random numbers, also where masks are left out since no transform reads them."""
    transforms = stock_transforms(patch_size, p=0.5).transforms
    kept = [t for t in transforms if masks or not isinstance(t, MaskImageTransform)]
    geometric = geometric_part(ComposeTransforms(kept))
    larger = tuple(n + 4 for n in patch_size)
    data = UnlabeledDataset(indicator.source_folder, masks=masks)
    batches = []
    for cls, cases in ((UnlabeledDataLoader, data), (nnUNetDataLoader, indicator)):
        np.random.seed(0)
        torch.manual_seed(0)
        batches.append(next(cls(cases, 6, larger, patch_size, label_manager(dataset), transforms=geometric)))
    assert torch.equal(batches[0]["data"], batches[1]["data"])
    assert list(batches[0]["keys"]) == list(batches[1]["keys"])


def test_ignore_label_does_not_steer_patches(dataset, positions):
    manager = label_manager(dataset, ignore=True)
    assert manager.has_ignore_label
    assert next(UnlabeledDataLoader(positions, 2, (6, 5, 4), (6, 5, 4), manager))["data"].shape == (2, 3, 6, 5, 4)
    with pytest.raises(TypeError):  # stock looks for annotated voxels, and there are none
        next(nnUNetDataLoader(positions, 2, (6, 5, 4), (6, 5, 4), manager))


# ------------------------------------------------------------------------------------------------------- the transforms


@pytest.mark.parametrize(
    ("patch_size", "dummy_2d", "kinds"),
    [
        ((12, 12, 12), False, [SpatialTransform, MirrorTransform, MaskImageTransform]),
        ((12, 12), False, [SpatialTransform, MirrorTransform, MaskImageTransform]),
        (
            (6, 12, 12),
            True,
            [
                Convert3DTo2DTransform,
                SpatialTransform,
                Convert2DTo3DTransform,
                MirrorTransform,
                MaskImageTransform,
            ],
        ),
    ],
)
def test_geometric_part_keeps_stocks_own_objects(patch_size, dummy_2d, kinds):
    stock = stock_transforms(patch_size, dummy_2d)
    kept = geometric_part(stock)
    assert isinstance(kept, ComposeTransforms)
    assert [type(transform) for transform in kept.transforms] == kinds
    remaining = iter(stock.transforms)
    assert all(any(transform is other for other in remaining) for transform in kept.transforms)  # same objects, order


@pytest.mark.parametrize(
    ("patch_size", "dummy_2d"),
    [((16, 16, 16), False), ((16, 16), False), ((8, 16, 16), True)],
    ids=["3d", "2d", "dummy"],
)
def test_image_and_mask_stay_aligned_and_outside_stays_zero(dataset, indicator, patch_size, dummy_2d):
    np.random.seed(0)
    torch.manual_seed(0)
    transforms = geometric_part(stock_transforms(patch_size, dummy_2d, p=1))
    larger = patch_size if dummy_2d else tuple(n + 4 for n in patch_size)
    loader = UnlabeledDataLoader(indicator, 60, larger, patch_size, label_manager(dataset), transforms)
    data = next(loader)["data"]
    assert data.shape == (60, 2, *patch_size)
    masked, plain = data[:, 0], data[:, 1]  # the same image; only the first channel is masked
    fractional = (plain > 0.01) & (plain < 0.99)
    assert fractional.float().mean() > 0.01  # something was rotated or scaled
    outside, inside = plain < 0.45, plain > 0.55  # the mask changes where the indicator is 0.5
    assert outside.any() and inside.any()
    assert (masked[outside] == 0).all()
    assert (plain[outside] > 0).any()
    assert (masked[inside] == plain[inside]).all()


def test_without_geometry_nothing_is_transformed(dataset, positions):
    transforms = geometric_part(ComposeTransforms([]))
    loader = UnlabeledDataLoader(positions, 1, SHAPE, SHAPE, label_manager(dataset), transforms)
    assert np.array_equal(next(loader)["data"][0].numpy(), positions["case"][0][:])


# ------------------------------------------------------------------------------------------------- both streams at once


class Counter:
    """Stands for a data loader."""

    def __init__(self, key):
        self.key, self.count, self.thread_id = key, 0, None

    def set_thread_id(self, thread_id):
        self.thread_id = thread_id

    def __next__(self):
        self.count += 1
        return {"data": self.count, "target": -self.count, "keys": [self.key]}


def test_two_streams_advance_together():
    labelled, unlabelled = Counter("l"), Counter("u")
    loader = TwoStreamLoader(labelled, unlabelled)
    assert iter(loader) is loader
    loader.set_thread_id(3)
    assert labelled.thread_id == unlabelled.thread_id == 3
    for number in (1, 2):
        assert next(loader) == {
            "data": number,
            "target": -number,
            "keys": ["l"],
            "unlabelled": {"data": number, "target": -number, "keys": ["u"]},
        }


@pytest.mark.parametrize("configuration", ["3d_fullres", "2d"])
def test_streams_of_a_real_trainer_in_a_worker(dataset, monkeypatch, configuration):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    cases = preprocess_unlabeled(dataset.name, "nnUNetPlans", configuration, 1, log=lambda line: None)
    plans = {**dataset.plans, "continue_training": False}
    trainer = nnUNetTrainer(plans, configuration, "all", dataset.dataset_json, torch.device("cpu"))
    trainer.print_to_log_file = lambda *args, **kwargs: None
    trainer._set_batch_size_and_oversample()
    labelled = trainer.get_dataloaders()[0].data_loader
    dims = slice(1, None) if labelled.patch_size_was_2d else slice(None)
    unlabelled = UnlabeledDataLoader(
        UnlabeledDataset(dataset.preprocessed / f"nnUNetPlans_{configuration}_unlabeled", cases),
        3,
        labelled.patch_size[dims],
        labelled.final_patch_size[dims],
        trainer.label_manager,
        geometric_part(labelled.transforms),
    )
    augmenter = NonDetMultiThreadedAugmenter(TwoStreamLoader(labelled, unlabelled), None, 1, 2, wait_time=0.002)
    try:
        batches = [next(augmenter) for _ in range(3)]
        assert len(multiprocessing.active_children()) == 1
    finally:
        augmenter._finish()
    assert not multiprocessing.active_children()
    patch_size = tuple(trainer.configuration_manager.patch_size)
    for batch in batches:
        assert set(batch) == {"data", "target", "keys", "unlabelled"}
        assert set(batch["unlabelled"]) == {"data", "keys"}
        assert batch["data"].shape == (trainer.batch_size, 2, *patch_size)
        assert batch["unlabelled"]["data"].shape == (3, 2, *patch_size)
        assert set(batch["unlabelled"]["keys"]) <= set(cases)
        assert set(batch["keys"]) <= {"lab_0", "lab_1", "lab_2"}
