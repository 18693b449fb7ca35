"""BCP: boxes, mixing, and the losses of both regions, in closed form."""

import numpy as np
import pytest
import torch
from helpers import make_batch
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_semisup.network import taps
from nnunetv2_semisup.trainers import bcp
from nnunetv2_semisup.trainers.bcp import largest_components, outside_box

NAME = "nnUNetTrainerBCP"


def build(dataset, configuration="3d_fullres", **settings):
    torch.manual_seed(0)
    trainer = dataset.trainer(NAME, configuration, **settings)
    trainer.initialize()
    trainer.method.reset(trainer.network)
    return trainer


def terms(trainer, batch, progress=0.5):
    groups = trainer.method.losses(trainer.network, batch, batch["unlabelled"], progress)
    return {name: term for group in groups for name, term in group.items()}


@given(st.lists(st.integers(2, 30), min_size=2, max_size=3), st.integers(0, 10**6))
def test_the_box_has_two_thirds_of_every_edge_and_lies_in_the_patch(shape, seed):
    torch.manual_seed(seed)
    inside = ~outside_box(torch.zeros(2, 1, *shape), 2 / 3)[0, 0]
    for axis, size in enumerate(shape):
        along = inside.movedim(axis, 0).flatten(1).any(1).nonzero().flatten()
        assert len(along) == max(1, 2 * size // 3) == along[-1] - along[0] + 1
    assert inside.sum() == np.prod([max(1, 2 * size // 3) for size in shape])


def test_a_mixed_patch_takes_image_and_label_by_the_same_voxels(tiny, monkeypatch):
    """The network is asked for l_a outside the box with u_a in it, and for u_b outside with l_b in it."""
    trainer = build(tiny)
    batch = make_batch(trainer)
    seen = []
    monkeypatch.setattr(bcp, "outside_box", lambda images, share: fixed(images))
    encode = taps.encode

    def note(network, images):
        if network is trainer.network:
            seen.append(images)
        return encode(network, images)

    monkeypatch.setattr(taps, "encode", note)
    terms(trainer, batch)
    m, (la, lb), (ua, ub) = fixed(batch["data"]), batch["data"].split(1), batch["unlabelled"]["data"].split(1)
    assert torch.equal(seen[0], torch.cat([torch.where(m, la, ua), torch.where(m, ub, lb)]))


def fixed(images):
    outside = torch.ones_like(images[:1, :1], dtype=torch.bool)
    outside[:, :, 2:9, 3:8] = False
    return outside


@pytest.mark.parametrize("kind", ["4 classes", "regions"])
def test_true_labels_everywhere_give_nnunets_loss_of_each_region(datasets, use, kind, monkeypatch):
    """With a teacher that says the truth, one patch as both: a region's loss by nnU-Net's own, the rest ignored."""
    trainer = build(use(datasets(kind)), u_weight=0.5)
    batch = make_batch(trainer)
    for image in (batch["data"], batch["unlabelled"]["data"]):
        image.copy_(batch["data"][:1].clone().expand_as(image))
    batch["target"] = [t[:1].expand_as(t).clone() for t in batch["target"]]
    monkeypatch.setattr(bcp, "outside_box", lambda images, share: fixed(images))
    label, known = bcp.partly_known(batch["target"], trainer.label_manager.has_regions, None)
    monkeypatch.setattr(trainer.method, "_pseudo_labels", lambda images: (label, known))
    found = terms(trainer, batch)
    output, _ = taps.decode(trainer.network, taps.encode(trainer.network, batch["data"][:1]))
    target, m = [t[:1] for t in batch["target"]], fixed(batch["data"])
    regions = [trainer.method.task.supervised_loss(output, target, region) for region in (m, ~m)]
    expected = {"supervised_in": regions[0] + 0.5 * regions[1], "supervised_out": 0.5 * regions[0] + regions[1]}
    for name, value in expected.items():
        assert found[name][0] == 0.5
        assert found[name][1].item() == pytest.approx(value.item(), abs=0.02), name


def test_the_trainers_ramp_raises_the_pseudo_labelled_part_alone(tiny):
    trainer = build(tiny, u_weight=1.0)
    batch = make_batch(trainer)
    losses = []
    for ramp in (0.0, 0.5, 1.0):
        trainer.method.ramp = ramp
        torch.manual_seed(1)
        losses.append(terms(trainer, batch)["supervised_in"][1].item())
    assert losses[1] == pytest.approx((losses[0] + losses[2]) / 2, rel=1e-4) and losses[0] != losses[2]


def test_pretraining_sees_no_unlabelled_patch_and_then_the_teacher_is_the_student(tiny):
    trainer = build(tiny, pretrain_share=0.5)
    batch = make_batch(trainer)
    changed = {**batch, "unlabelled": {**batch["unlabelled"], "data": batch["unlabelled"]["data"] + 5}}

    def values(b, progress):
        torch.manual_seed(1)
        return [value.item() for _, value in terms(trainer, b, progress).values()]

    assert values(batch, 0.4) == values(changed, 0.4)
    assert values(batch, 0.6) != values(changed, 0.6)
    trainer.train_step(batch)
    trainer.method.enter_stage(trainer.network, 2)
    teacher = trainer.method.teacher.module.state_dict()
    assert all(torch.equal(value, teacher[key]) for key, value in trainer.network.state_dict().items())


def test_largest_component_of_every_class():
    label = torch.tensor([[1, 1, 0, 1, 0, 2, 0, 2, 2, 2]]).reshape(1, 1, 10)
    assert largest_components(label, 3).flatten().tolist() == [1, 1, 0, 0, 0, 0, 0, 2, 2, 2]
    regions = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0]]).bool().reshape(1, 2, 1, 4)
    assert largest_components(regions, 2).int().flatten().tolist() == [0, 0, 1, 1, 0, 0, 0, 0]


def test_a_single_patch_is_refused(tiny):
    method = build(tiny).method
    assert "batch_size" in method.unfit_batch(1, 2) and method.unfit_batch(2, 2) is None


def test_the_teacher_has_no_gradient_and_moves_by_a_hundredth(tiny):
    trainer = build(tiny)
    before = {k: v.clone() for k, v in trainer.method.teacher.module.named_parameters()}
    trainer.train_step(make_batch(trainer))
    for key, parameter in trainer.network.named_parameters():
        mine = trainer.method.teacher.module.get_parameter(key)
        assert mine.grad is None
        assert torch.allclose(mine, 0.99 * before[key] + 0.01 * parameter, atol=1e-7)
