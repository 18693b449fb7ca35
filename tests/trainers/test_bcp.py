"""The invariants of BCP: boxes, region losses, phases."""

import pytest
import torch
from helpers import counted_cost, make_batch

from nnunetv2_semisup.losses.pseudo_label import largest_components
from nnunetv2_semisup.trainers import bcp

NAME = "nnUNetTrainerBCP"
KINDS = pytest.mark.parametrize("kind", ["4 classes", "regions", "ignore", "regions and ignore"])


def build(dataset, **settings):
    torch.manual_seed(3)
    trainer = dataset.trainer(NAME, **settings)
    trainer.initialize()
    return trainer


def terms(trainer, batch, progress=0.5) -> dict[str, tuple[float, torch.Tensor]]:
    torch.manual_seed(11)
    (group,) = trainer.method.losses(trainer.network, batch, batch["unlabelled"], progress)
    return group


def plain_loss(logits, label, region, regions):
    """nnU-Net's Dice and cross-entropy of one resolution over a region; batch Dice off, background left out."""
    if regions:
        p, truth = torch.sigmoid(logits), label.float()
        ce = -(truth * p.log() + (1 - truth) * (1 - p).log()).mean(1, keepdim=True)
    else:
        p = torch.softmax(logits, 1)
        ce = -p.gather(1, label).log()
        classes = torch.arange(1, p.shape[1]).reshape(1, -1, 1, 1, 1)
        truth, p = (label == classes).float(), p[:, 1:]
    dices = [
        2 * (p[b, c] * truth[b, c])[region[b, 0]].sum() / (p[b, c] + truth[b, c])[region[b, 0]].sum()
        for b in range(len(p))
        for c in range(p.shape[1])
        if truth[b, c][region[b, 0]].any()
    ]
    return ce[region].mean() - sum(dices) / max(1, len(dices))


@KINDS
def test_both_terms_are_means_over_their_regions(kind, datasets, use, monkeypatch):
    """At the highest resolution alone, on the mixed images that the network sees, in closed form."""
    trainer = build(use(datasets(kind)))
    regions, ignore = trainer.label_manager.has_regions, trainer.label_manager.ignore_label
    trainer.loss.weight_factors = (1.0, *[0.0] * (len(trainer.loss.weight_factors) - 1))
    box = torch.zeros(1, 1, 16, 16, 16, dtype=torch.bool)
    box[..., 2:9, 0:10, 5:16] = True
    monkeypatch.setattr(bcp, "draw_shared_box", lambda images, side: box)
    batch = make_batch(trainer)
    images = []
    encode = bcp.taps.encode
    monkeypatch.setattr(bcp.taps, "encode", lambda n, x: images.append(x) or encode(n, x))
    found = terms(trainer, batch)
    monkeypatch.undo()
    teacher_input, mixed = images
    assert torch.equal(teacher_input, batch["unlabelled"]["data"])
    is_true = torch.cat([~box, box])
    assert torch.equal(mixed, torch.where(is_true, batch["data"], batch["unlabelled"]["data"]))
    target = batch["target"][0]
    known = torch.ones_like(is_true)
    if ignore is not None:
        known = ~target[:, -1:].bool() if regions else target != ignore
    with torch.no_grad():
        pseudo = trainer.method.teacher.module(batch["unlabelled"]["data"])
        logits = trainer.network(mixed)[0]
    pseudo = pseudo > 0 if regions else pseudo.argmax(1, keepdim=True)
    true = target[:, : logits.shape[1]].bool() if regions else target.long().clamp(max=logits.shape[1] - 1)
    for name, label, region in (("supervised", true, is_true & known), ("pasted", pseudo, ~is_true)):
        each = [plain_loss(logits[[i]], label[[i]], region[[i]], regions) for i in range(2)]
        torch.testing.assert_close(found[name][1].detach(), sum(each) / 2, rtol=1e-3, atol=1e-4)
    assert found["supervised"][0] == 1.0 and found["pasted"][0] == 0.5


@KINDS
def test_without_a_box_it_is_the_loss_of_whole_patches(kind, datasets, use, monkeypatch):
    """The box is empty: even patches are labelled ones, odd ones unlabelled; the empty regions add 0, not NaN."""
    trainer = build(use(datasets(kind)))
    monkeypatch.setattr(bcp, "draw_shared_box", lambda images, side: torch.zeros_like(images[:1, :1]).bool())
    batch = make_batch(trainer)
    found = terms(trainer, batch)
    true = trainer.method._true_labels(batch)
    pseudo = trainer.method._pseudo_labels(batch["unlabelled"]["data"])
    outputs = [trainer.network(x) for x in (batch["data"][:1], batch["unlabelled"]["data"][1:])]
    ones = torch.ones_like(trainer.method.head_weights)
    weighted = trainer.method.task.supervised_loss.weighted
    share = true[1][:1].mean()  # the cross-entropy is a mean over what is known
    expected = weighted(outputs[0], true[0][:1], true[1][:1] / share, ones) / 2
    torch.testing.assert_close(found["supervised"][1], expected)
    expected = weighted(outputs[1], pseudo[0][1:], pseudo[1][1:], ones) / 2
    torch.testing.assert_close(found["pasted"][1], expected)


def test_a_box_that_is_the_whole_patch_turns_the_batch_around(tiny, monkeypatch):
    trainer = build(tiny, box_side=1.0)
    batch = make_batch(trainer)
    seen = []
    encode = bcp.taps.encode
    monkeypatch.setattr(bcp.taps, "encode", lambda n, x: seen.append(x) or encode(n, x))
    assert all(torch.isfinite(value) for _, value in terms(trainer, batch).values())
    assert torch.equal(seen[1], torch.stack([batch["unlabelled"]["data"][0], batch["data"][1]]))


def test_the_teacher_averages_with_a_constant_decay_and_gets_no_gradient(tiny):
    trainer = build(tiny, teacher_decay=0.9)
    before = {k: v.clone() for k, v in trainer.network.state_dict().items()}
    trainer.train_step(make_batch(trainer))
    teacher = trainer.method.teacher.module.state_dict()
    for key, after in trainer.network.state_dict().items():
        torch.testing.assert_close(teacher[key], 0.9 * before[key] + 0.1 * after)
    assert all(p.grad is None and not p.requires_grad for p in trainer.method.parameters())


def test_phases_of_one_run(tiny):
    """Phase 1 takes no unlabelled image; phase 2 begins with the student as its teacher."""
    trainer = build(tiny, preset="published", num_epochs=25, num_iterations_per_epoch=4)
    batch = make_batch(trainer)
    poisoned = batch | {"unlabelled": batch["unlabelled"] | {"data": torch.full_like(batch["data"], torch.nan)}}
    for epoch in range(3):
        trainer.current_epoch = epoch
        for step in range(4):
            trainer._steps_in_epoch = step
            trainer.train_step(poisoned)
            assert set(trainer.method.diagnostics) == set()
    student = {k: v.clone() for k, v in trainer.network.state_dict().items()}
    teacher = trainer.method.teacher.module
    seen = []
    reset = trainer.method.teacher.reset
    trainer.method.teacher.reset = lambda network: (seen.append(1), reset(network))
    trainer.current_epoch, trainer._steps_in_epoch = 3, 0
    trainer.train_step(batch)
    for key, after in trainer.network.state_dict().items():
        torch.testing.assert_close(teacher.state_dict()[key], 0.99 * student[key] + 0.01 * after)
    trainer.train_step(batch)
    assert len(seen) == 1
    assert "share_volume_1" in trainer.method.diagnostics


def test_pretraining_mixes_labelled_patches_voxel_by_voxel(tiny, monkeypatch):
    trainer = build(tiny, pretraining_fraction=0.6)
    batch = make_batch(trainer)
    value = batch["data"].abs() + 1
    batch["target"][0] = (batch["target"][0] > 0).to(torch.int16)
    batch["data"] = torch.where(batch["target"][0] > 0, value, -value)  # the sign of a voxel is its label
    seen = []
    weighted = trainer.method.task.supervised_loss.weighted
    encode = bcp.taps.encode
    monkeypatch.setattr(bcp.taps, "encode", lambda n, x: seen.append(x) or encode(n, x))
    monkeypatch.setattr(
        trainer.method.task.supervised_loss,
        "weighted",
        lambda o, label, *a: seen.append(label) or weighted(o, label, *a),
    )
    assert terms(trainer, batch).keys() == {"supervised"}
    images, label = seen
    assert torch.equal(images > 0, label > 0)
    moved = images != batch["data"]
    assert torch.equal(images[moved], batch["data"].roll(1, 0)[moved])
    assert moved[0].sum() == moved[1].sum() == 10**3


def test_pseudo_labels_keep_the_largest_component_on_request(tiny):
    plain, largest = (build(tiny, largest_component=on) for on in (False, True))
    images = make_batch(plain)["unlabelled"]["data"]
    for trainer in (plain, largest):  # a tenth of the voxels are foreground, not one piece
        teacher = trainer.method.teacher.module
        with torch.no_grad():
            excess = teacher(images).diff(dim=1).quantile(0.9)
            teacher.decoder.seg_layers[-1].bias[1] -= excess
    label, _ = plain.method._pseudo_labels(images)
    kept, _ = largest.method._pseudo_labels(images)
    assert torch.equal(kept, largest_components(label)) and 0 < kept.sum() < label.sum()


@pytest.mark.parametrize("kind", ["4 classes", "regions"])
def test_a_class_without_weight_is_not_learned_from_pseudo_labels(kind, datasets, use):
    trainer = build(use(datasets(kind)))
    batch = make_batch(trainer)
    supervised, pasted = (value.item() for _, value in terms(trainer, batch).values())
    trainer.method.head_weights.zero_()
    found = terms(trainer, batch)
    assert pasted != 0 and found["pasted"][1] == 0
    assert found["supervised"][1].item() == supervised


def test_unequal_batches_repeat_the_smaller_one(tiny):
    trainer = build(tiny, unlabeled_batch_size=3)
    assert all(torch.isfinite(value) for _, value in terms(trainer, make_batch(trainer)).values())


def test_one_labelled_patch_is_refused(tiny):
    method = build(tiny).method
    assert "batch_size" in method.unfit_batch(1, 2) and method.unfit_batch(2, 1) is None


def test_cost(tiny):
    assert counted_cost(tiny, NAME) < 1.1 * 1.33
    assert counted_cost(tiny, NAME, pretraining_fraction=1.0) < 1.01
