"""Which network, view, threshold and temperature serves which term of ACTION and ACTION++."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import make_batch
from test_action import NAME, NAMES, PROGRESS, STILL, build, octants, record, state, step_losses

from nnunetv2_semisup.losses import anatomical
from nnunetv2_semisup.losses.pseudo_label import PseudoLabel, confidence_weighted_cross_entropy
from nnunetv2_semisup.losses.soft_negatives import soft_negative_distillation
from nnunetv2_semisup.network import taps
from nnunetv2_semisup.network.embedding_heads import RepresentationHead, pool_cells, window_edges, windows
from nnunetv2_semisup.trainers import action, action_plus_plus


@pytest.mark.parametrize("epoch", [0, 1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_teacher_moves_by_one_percent_in_every_stage(name, epoch, tiny):
    trainer = build(tiny, name=name, num_epochs=4)
    trainer.current_epoch, method = epoch, trainer.method
    pairs = {"network": (method.teacher, trainer.network), "projectors": (method.teacher_projectors, method.projectors)}
    if name != NAME:
        pairs["representation"] = (method.teacher_representation, method.representation)
    before = {k: state(t.module) for k, (t, _) in pairs.items()}
    for k, (_, student) in pairs.items():
        assert all(torch.equal(p, before[k][n]) for n, p in student.named_parameters()), "starts equal"
    trainer.train_step(make_batch(trainer))
    stage = method.stage(trainer.progress)
    for k, (teacher, student) in pairs.items():
        now = dict(student.named_parameters())
        moved = any(not torch.equal(p, before[k][n]) for n, p in now.items())
        assert moved == (k == "network" or (k == "projectors") == (stage < 3))
        for n, p in teacher.module.named_parameters():
            torch.testing.assert_close(p, 0.99 * before[k][n] + 0.01 * now[n].detach(), rtol=1e-6, atol=1e-7)
            assert p.grad is None


@pytest.mark.parametrize(("stage", "term", "modules"), [
    (1, "global_unlabelled", ("encoder",)), (2, "local_unlabelled", ("encoder", "decoder")),
    (3, "pseudo_label", ("encoder", "decoder")), (3, "anatomical", ("encoder", "decoder")),
])  # fmt: skip
def test_each_unsupervised_term_alone_reaches_the_network(stage, term, modules, tiny):
    trainer = build(tiny)
    with torch.no_grad():
        trainer.network.decoder.seg_layers[-1].weight.mul_(40)  # confident and unsure voxels: pseudo_label is not 0
    trainer.method.reset(trainer.network)
    batch = make_batch(trainer)
    for group in trainer.method.losses(trainer.network, batch, batch["unlabelled"], PROGRESS[stage]):
        if term in group:
            group[term][1].backward()
    for name in modules:
        part = getattr(trainer.network, name).stages
        assert all(p.grad is not None and p.grad.any() for p in part.parameters()), name


def test_shares_and_weights_with_unequal_batches(tiny):
    trainer = build(tiny, unlabeled_batch_size=6, w_global=2.0, w_local=3.0)
    terms = step_losses(trainer, make_batch(trainer), PROGRESS[2])
    images = make_batch(trainer)["unlabelled"]["data"].shape[0]
    assert images == 6
    assert {n: w for n, (w, _) in terms.items()} == pytest.approx(
        {"global_unlabelled": 1.5, "global_labelled": 0.5, "local_unlabelled": 2.25, "local_labelled": 0.75,
         "supervised": 1.0})  # fmt: skip


def test_stage_three_sees_what_it_should(tiny, monkeypatch):
    """Labels: teacher on the weak view, mixed like the image; student: on the strong view of the mixed image."""
    trainer = build(tiny)
    method, network, batch = trainer.method, trainer.network, make_batch(trainer)
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.mul_(1.5)
    monkeypatch.setattr(action, "apply_jitter", lambda images, drawn: images.roll(1, -1))
    boxes = record(monkeypatch, action, "draw_half_plane_boxes")
    loss = record(monkeypatch, action, "confidence_weighted_cross_entropy")
    drawn = record(monkeypatch, action, "draw_voxels")
    terms = step_losses(trainer, batch, PROGRESS[3])
    (((images,), replaced),) = boxes
    assert torch.equal(images, batch["unlabelled"]["data"])
    with torch.no_grad():
        p = torch.softmax(taps.logits(method.teacher.module, images), 1)
        p = torch.where(replaced, p.roll(-1, 0), p)
        image = torch.where(replaced, images.roll(-1, 0), images)
        expected = taps.logits(network, image.roll(1, -1))
        supervised = trainer.loss(network(batch["data"]), batch["target"])
    (logits, used, *_), _ = loss[0]
    torch.testing.assert_close(logits.detach(), expected)
    torch.testing.assert_close(used.confidence[:, 0], p.amax(1))
    assert torch.equal(used.label[:, 0], p.argmax(1))
    (members, _), _ = drawn[1]
    contrasted = method.representation.thin(torch.where(p.amax(1) >= 0.7, p.argmax(1), -1)).flatten()
    assert torch.equal(members[:, -len(contrasted) :], contrasted == torch.arange(2)[:, None])
    torch.testing.assert_close(terms["supervised"][1].detach(), supervised)
    assert {n: w for n, (w, _) in terms.items()} == {"supervised": 1.0, "pseudo_label": 1.0, "anatomical": 0.01}


@pytest.mark.parametrize("name", NAMES)
def test_what_the_anatomical_contrast_gets(name, datasets, use, monkeypatch):
    """Queries are hard voxels, negatives and means come from all voxels; each temperature in its place."""
    more = {"tau_anco": 0.3, "tau_classes": 0.7} if name == NAME else {}  # ACTION++ schedules both
    trainer = build(use(datasets("4 classes")), name=name, queries=50, weak_threshold=0.0, **more)
    method, head = trainer.method, trainer.method.representation
    meant = record(monkeypatch, head, "class_means")
    drawn = record(monkeypatch, action, "draw_voxels")
    calls = record(monkeypatch, action, "anatomical_contrast")
    with torch.no_grad():
        trainer.network.decoder.seg_layers[-1].weight.mul_(20)
    method.reset(trainer.network)
    step_losses(trainer, make_batch(trainer), PROGRESS[3])
    (hard, size), (members, candidates) = (c[0] for c in drawn)
    assert hard.any() and (members & ~hard).any() and not (hard & ~members).any()
    assert (size, candidates) == (50, 50 * action.CANDIDATES)
    _, has, means, _, present, tau, negatives, tau_classes = calls[0][0]
    (maps, of_classes), result = meant[0]
    assert torch.equal(means, result) and torch.equal(of_classes, members)
    assert maps[0].shape[0] == 4, "labelled and mixed patches"
    assert torch.equal(has, hard.any(1)) and torch.equal(present, members.any(1))
    expected = method.contrast_temperature(PROGRESS[3])
    assert (tau, negatives, tau_classes) == (expected, 512, 0.7 if name == NAME else expected)


def test_hard_has_a_threshold_of_its_own(tiny, monkeypatch):
    trainer = build(tiny, hard_threshold=0.0)
    drawn = record(monkeypatch, action, "draw_voxels")
    step_losses(trainer, make_batch(trainer), PROGRESS[3])
    (hard, _), (members, _) = (arguments for arguments, _ in drawn)
    assert members.any() and not hard.any()


def test_strong_view_uses_its_settings(tiny, monkeypatch):
    trainer = build(tiny, jitter_probability=0.1, jitter_strength=0.2, blur_probability=0.3)
    drawn = record(monkeypatch, action, "draw_jitter")
    step_losses(trainer, make_batch(trainer), PROGRESS[1])
    assert drawn[0][0][1:] == (0.1, 0.2, 0.3)


def test_the_contrast_uses_the_allocation_and_the_allocation_follows(datasets, use, monkeypatch):
    """Four classes, a cyclic permutation: with two classes a permutation is its own inverse."""
    trainer = build(use(datasets("4 classes")), name=NAMES[1], num_epochs=4)
    trainer.current_epoch, method = 2, trainer.method
    trainer.train_step(make_batch(trainer))  # the first cosines are those of zeros
    order = torch.tensor([1, 2, 3, 0])
    monkeypatch.setattr(method, "_update_centroids", lambda *_: method.centroids.copy_(method.centres[order]))
    trainer.train_step(make_batch(trainer, 1))
    trainer.train_step(make_batch(trainer, 2))
    assert torch.equal(method.allocation, order)
    calls = record(monkeypatch, action_plus_plus, "adaptive_anatomical_contrast")
    step_losses(trainer, make_batch(trainer, 3), 0.6)
    assert torch.equal(calls[0][0][5], method.centres[order])


def test_embeddings_are_fp32_under_autocast(tiny, monkeypatch):
    """The heads work in fp32 on what the network gives in bfloat16."""
    trainer = build(tiny, **STILL)
    method, images = trainer.method, (batch := make_batch(trainer))["unlabelled"]["data"]
    calls, heads = record(monkeypatch, action, "soft_negative_distillation"), method.teacher_projectors.module
    with torch.autocast("cpu", torch.bfloat16):
        step_losses(trainer, batch, PROGRESS[2])
        with torch.no_grad():
            bottleneck = taps.encode(method.teacher.module, images)[-1]
            logits = taps.logits(method.teacher.module, images)
    with torch.no_grad():
        expected = (
            heads["global"](octants(bottleneck.float()))[:, None],
            windows(heads["local"](pool_cells(logits.float(), method.window_edges))),
        )
    for ((student, teacher, *_), _), value in zip(calls, expected, strict=False):
        assert bottleneck.dtype == logits.dtype == torch.bfloat16 and student.dtype == torch.float32
        torch.testing.assert_close(teacher, value, rtol=1e-4, atol=1e-5)


def test_losses_are_fp32_under_autocast():
    x, y, anchors = torch.randn(3, 2, 4, 16)[0], torch.randn(2, 4, 16), torch.randn(9, 4, 16)
    q, m, c = torch.randn(3, 8, 16), torch.randn(3, 16), torch.randn(3, 9, 16)
    yes, labels = torch.ones(3, dtype=torch.bool), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])

    def values():
        torch.manual_seed(0)
        return (
            soft_negative_distillation(x, y, anchors, 0.1, 0.01)[0],
            anatomical.anatomical_contrast(q, yes, m, c, yes, 0.5, 64, 0.5),
            anatomical.adaptive_anatomical_contrast(q[0], q[1], labels, q[2], labels, m, 0.1, 0.2),
        )

    expected = values()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(values(), expected, strict=True))


def test_negative_classes_of_three_classes():
    """Constant candidates per class: the value of many negatives is that of the expected class shares."""
    means = F.normalize(torch.tensor([[1.0, 0, 0], [0.9, 0.4, 0], [-0.5, 0, 1.0]]), dim=1)
    yes, n = torch.ones(3, dtype=torch.bool), 20_000
    value = anatomical.anatomical_contrast(means[:, None], yes, means, means[:, None].repeat(1, 2, 1), yes, 0.5, n, 0.5)
    cosines, expected = means @ means.T, 0.0
    for c in range(3):
        others = [v for v in range(3) if v != c]
        share = torch.softmax(cosines[c, others] / 0.5, 0)
        expected += torch.log(1 + n * (share * ((cosines[c, others] - 1) / 0.5).exp()).sum()) / 3
    torch.testing.assert_close(value, expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("strong_on", ["student", "teacher"])
def test_supervised_loss_of_stage_two_is_on_the_view_of_the_student(strong_on, tiny, monkeypatch):
    trainer = build(tiny, strong_on=strong_on)
    monkeypatch.setattr(action, "apply_jitter", lambda images, drawn: images.roll(1, -1))
    batch = make_batch(trainer)
    view = batch["data"].roll(1, -1) if strong_on == "student" else batch["data"]
    expected = trainer.loss(trainer.network(view), batch["target"])
    torch.testing.assert_close(step_losses(trainer, batch, PROGRESS[2])["supervised"][1], expected)


def test_rows_means_and_pseudo_label_loss_are_fp32_under_autocast():
    head, maps = RepresentationHead((4, 12), (2, 2), 8), [torch.randn(2, 4, 8, 8), torch.randn(2, 12, 8, 8)]
    positions, members = torch.arange(100), torch.rand(3, 128) < 0.5
    logits = torch.randn(2, 3, 8, 8).bfloat16()
    target = PseudoLabel(torch.ones(2, 1, 8, 8).long(), torch.ones(2, 1, 8, 8))
    arguments = logits, target, 0.9, torch.ones(3), False
    rows, loss = head.rows(maps, positions), confidence_weighted_cross_entropy(*arguments)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head.rows(maps, positions), rows)
        assert head.class_means(maps, members).dtype == torch.float32
        assert torch.equal(confidence_weighted_cross_entropy(*arguments)[0], loss)


def test_similar_means_and_a_low_temperature_leave_a_distribution():
    means = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [-1.0, 0.2]])
    shares = anatomical.negative_class_probabilities(means, torch.ones(3, dtype=torch.bool), 0.01)
    torch.testing.assert_close(shares.sum(1), torch.ones(3))
    assert not shares.diagonal().any()


def test_no_class_is_pushed_out_of_a_short_queue(datasets, use):
    trainer = build(use(datasets("4 classes")), name=NAMES[1], num_epochs=4, voxels=8, voxel_queue_size=16)
    trainer.current_epoch = 2
    trainer.train_step(make_batch(trainer))
    assert set(trainer.method.queues["voxel_labels"].rows.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("shape", [(3, 32, 32), (32, 2, 32), (2, 32)])
def test_a_patch_of_few_slices_is_in_every_window_whole(shape):
    cells = pool_cells(torch.randn(2, 3, *shape), window_edges(shape))
    found = windows(cells)
    assert found.shape[2] == 3 * math.prod(min(4, n) for n in cells.shape[1:-1])
