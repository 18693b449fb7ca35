"""CutMix boxes of half a plane and ClassMix masks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_semisup.perturbations.mixing import draw_class_masks, draw_half_plane_boxes, draw_shared_box


@pytest.mark.parametrize("shape", [(16, 24, 32), (24, 32)])
def test_boxes_are_boxes_of_the_published_size(shape):
    boxes = draw_half_plane_boxes(torch.zeros(200, 1, *shape))
    assert boxes.shape == (200, 1, *shape) and boxes.dtype == torch.bool
    sides = []
    for box in boxes[:, 0]:
        extent = [box.any(tuple(a for a in range(box.ndim) if a != axis)).nonzero() for axis in range(box.ndim)]
        sides.append([int(e.max() - e.min()) + 1 for e in extent])
        assert torch.tensor(sides[-1]).prod() == box.sum(), "not one solid box"
    sides = torch.tensor(sides, dtype=torch.float)
    if len(shape) == 3:
        assert (sides[:, 0] == 4).all()
    height, width = sides[:, -2], sides[:, -1]
    assert (width >= shape[-1] / 2).all() and width.max() > 0.95 * shape[-1] and width.min() < 0.55 * shape[-1]
    area = height * width / (shape[-1] * shape[-2])
    assert (area - 0.5).abs().max() < 0.06  # rounded to voxels
    assert 0.45 < boxes.float().mean() / (0.25 if len(shape) == 3 else 1) < 0.55


def test_boxes_reach_every_place():
    assert draw_half_plane_boxes(torch.zeros(400, 1, 8, 8, 8)).any(0).all()


def test_class_masks_keep_half_of_the_classes_present():
    labels = torch.randint(0, 5, (60, 1, 6, 6))
    labels[0] = 3  # one class: nothing is kept
    labels[1] = torch.where(labels[1] > 2, 4, 1)
    replaced = draw_class_masks(labels, 6)
    assert replaced[0].all()
    kept_classes = []
    for mask, label in zip(replaced[:, 0], labels[:, 0], strict=True):
        kept, gone = set(label[~mask].tolist()), set(label[mask].tolist())
        assert not kept & gone, "a class is kept or replaced as a whole"
        assert len(kept) == len(kept | gone) // 2
        kept_classes.append(kept)
    assert set().union(*kept_classes) == {0, 1, 2, 3, 4}


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 12), min_size=2, max_size=3),
    st.fractions(0, 1, max_denominator=1000).filter(bool),
    st.integers(0, 1000),
)
def test_a_shared_box_is_one_cuboid_inside_the_patch(shape, side, seed):
    torch.manual_seed(seed)
    box = draw_shared_box(torch.zeros(3, 2, *shape), float(side))
    assert box.shape == (1, 1, *shape) and box.dtype == torch.bool
    expected = [max(1, math.floor(side * size)) for size in shape]
    assert box.sum() == math.prod(expected)
    inside = box[0, 0].nonzero()
    assert (inside.amax(0) - inside.amin(0) + 1).tolist() == expected


def test_a_shared_box_has_the_published_size_and_reaches_every_border():
    assert draw_shared_box(torch.zeros(1, 1, 112, 112, 80), 2 / 3).sum() == 74 * 74 * 53
    boxes = torch.cat([draw_shared_box(torch.zeros(1, 1, 6, 6), 2 / 3) for _ in range(100)])
    assert boxes.any(0).all() and not boxes.all(0).all()
