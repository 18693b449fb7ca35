"""nnU-Net's loss with a mask of what is known, for the losses that real trainers have."""

import pytest
import torch
from helpers import make_batch

from nnunetv2_semisup.labels import known_voxels

NAME = "nnUNetTrainerMeanTeacher"


@pytest.fixture(params=["2 classes", "4 classes", "regions", "ignore", "regions and ignore"])
def case(request, datasets, use):
    trainer = use(datasets(request.param)).trainer(NAME)
    trainer.initialize()
    batch = make_batch(trainer)
    with torch.no_grad():
        output = trainer.network(batch["data"])
    return trainer, output, batch["target"]


def test_all_known_is_nnunets_loss(case):
    trainer, output, target = case
    loss, known = trainer.method.task.supervised_loss, torch.ones(2, 1, 16, 16, 16, dtype=torch.bool)
    stock = trainer.loss(output, [t.clone() for t in target])
    assert loss(output, target) == stock
    if trainer.label_manager.has_regions:
        torch.testing.assert_close(loss(output, target, known), stock)
    else:
        assert loss(output, target, known) == stock


def test_unknown_voxels_count_nowhere(case):
    """Whatever is labelled or predicted there, at full resolution and, by the nearest voxel, below it."""
    trainer, output, target = case
    loss = trainer.method.task.supervised_loss
    known = torch.ones(2, 1, 16, 16, 16, dtype=torch.bool)
    known[:, :, :8] = False
    changed_output = [torch.where(_half(level), level, level.flip(1)) for level in output]
    changed_target = [torch.where(_half(level), level, level.flip(0)) for level in target]
    assert loss(output, target, known) == loss(changed_output, changed_target, known) != loss(output, target)


def _half(level):
    """True in the upper half of the first axis."""
    mask = torch.arange(level.shape[2]) >= level.shape[2] // 2
    return mask.reshape(1, 1, -1, 1, 1)


def test_weighted_is_nnunets_loss_where_all_is_known_and_every_class_is_there(datasets, use):
    trainer = use(datasets("2 classes")).trainer(NAME)
    trainer.initialize()
    batch = make_batch(trainer)
    with torch.no_grad():
        output = trainer.network(batch["data"])
    label = batch["target"][0].long()
    below = [label[:, :, ::2, ::2, ::2] if i else label for i in range(2)]  # nearest-exact takes the upper one of two
    below[1] = label[:, :, 1::2, 1::2, 1::2]
    target = [below[i] if i < 2 else t for i, t in enumerate(batch["target"])]
    expected = trainer.loss(output, target)
    mine = trainer.method.task.supervised_loss.weighted(output, label, torch.ones_like(label).float(), torch.ones(2))
    torch.testing.assert_close(mine, expected)
    known = known_voxels(batch["target"], False, None)
    assert known.all()
