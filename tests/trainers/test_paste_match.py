"""PasteMatch, part by part, in closed form."""

import pytest
import torch
from helpers import make_batch

from nnunetv2_semisup.trainers.paste_match import Patches, paste

NAME = "nnUNetTrainerPasteMatch"


def build(dataset, configuration="3d_fullres", **settings):
    trainer = dataset.trainer(NAME, configuration, **settings)
    trainer.initialize()
    trainer.method.reset(trainer.network)
    return trainer


def terms(trainer, batch):
    return {
        name: (weight, value.item())
        for group in trainer.method.losses(trainer.network, batch, batch["unlabelled"], 0.5)
        for name, (weight, value) in group.items()
    }


def confident(trainer, factor: float = 1e3):
    """Make teacher and student sure of what they say."""
    for network in (trainer.network, trainer.method.teacher.module):
        with torch.no_grad():
            for layer in network.decoder.seg_layers:
                layer.weight.mul_(factor)


@pytest.mark.parametrize("ramp", [0.01, 0.5, 1.0])
def test_the_weights_of_a_step_sum_to_one(tiny, ramp):
    trainer = build(tiny, weight=2.0)
    trainer.method.ramp = ramp
    found = terms(trainer, make_batch(trainer))
    assert ramp * found["mixed"][0] + found["supervised"][0] == pytest.approx(1)
    assert ramp * found["mixed"][0] / found["supervised"][0] == pytest.approx(2 * ramp)


@pytest.mark.parametrize(("epochs", "decay"), [(1000, 0.999), (20, 0.998), (1, 0.96)])
def test_the_teacher_averages_over_a_tenth_of_a_short_run(tiny, epochs, decay):
    assert build(tiny, num_epochs=epochs).method.teacher.decay == pytest.approx(decay)


def test_a_voxel_is_kept_by_the_threshold_of_its_class(tiny, monkeypatch):
    from nnunetv2_semisup.network import taps

    trainer = build(tiny)
    voxelwise = lambda network, images: torch.cat([images, -images], 1) * 5  # noqa: E731
    monkeypatch.setattr(taps, "logits", voxelwise)
    images = torch.randn(2, 1, 8, 8, 8)
    known = trainer.method._pseudo_labels(images)
    p = torch.softmax(voxelwise(None, images), 1)
    assert torch.equal(known.label, p.argmax(1, keepdim=True))
    needed = torch.where(known.label > 0, 0.7, 0.95)
    assert torch.equal(known.weight > 0, p.amax(1, keepdim=True) >= needed)


def test_paste_moves_image_label_and_weight_alike():
    unlabelled = Patches(torch.zeros(40, 1, 8, 8, 8), torch.zeros(40, 1, 8, 8, 8).long(), torch.zeros(40, 1, 8, 8, 8))
    labelled = Patches(torch.ones(40, 1, 8, 8, 8), torch.ones(40, 1, 8, 8, 8).long(), torch.ones(40, 1, 8, 8, 8))
    mixed = paste(unlabelled, labelled, 0.5, (0.1, 0.4))
    assert torch.equal(mixed.images, mixed.weight) and torch.equal(mixed.images, mixed.label.float())
    shares = mixed.images.flatten(1).mean(1)
    whole, inside, outside = shares == 0, (shares > 0) & (shares < 0.5), shares > 0.5
    assert 8 < whole.sum() < 32 and inside.any() and outside.any() and not (shares == 1).any()
    assert not paste(unlabelled, labelled, 0.0, (0.1, 0.4)).images.any()


def test_labels_of_the_student_come_from_the_teacher_on_the_weak_view(tiny, monkeypatch):
    trainer = build(tiny, paste_probability=0.0)
    confident(trainer)
    batch = make_batch(trainer)
    seen = []
    weighted = trainer.method.task.supervised_loss.weighted

    def noted(output, label, weight, factors):
        seen.append((label, weight, factors))
        return weighted(output, label, weight, factors)

    monkeypatch.setattr(trainer.method.task.supervised_loss, "weighted", noted)
    torch.manual_seed(3)
    terms(trainer, batch)
    torch.manual_seed(3)
    expected = trainer.method._pseudo_labels(batch["unlabelled"]["data"])
    ((label, weight, factors),) = seen
    assert torch.equal(label, expected.label) and torch.equal(weight, expected.weight)
    assert torch.equal(factors, trainer.method.head_weights)


@pytest.mark.parametrize("kind", ["4 classes", "regions"])
def test_a_head_without_weight_is_neither_kept_nor_in_the_dice(kind, datasets, use):
    trainer = build(use(datasets(kind)))
    confident(trainer)
    trainer.method.head_weights[1] = 0
    images = make_batch(trainer)["unlabelled"]["data"]
    known = trainer.method._pseudo_labels(images)
    if kind == "regions":
        assert not known.weight[:, 1].any() and known.weight[:, 0].any()
    else:
        assert not known.weight[known.label == 1].any() and known.weight.any()


def test_true_labels_know_nothing_of_ignored_voxels(datasets, use):
    for kind in ("ignore", "regions and ignore"):
        trainer = build(use(datasets(kind)))
        batch = make_batch(trainer)
        truth = trainer.method._true_labels(batch, 5)
        assert truth.images.shape[0] == 5 and torch.equal(truth.images[4], batch["data"][0])
        ignored = batch["target"][0][:, -1:].bool() if "regions" in kind else batch["target"][0] == 2
        assert torch.equal(truth.weight[:2] == 0, ignored.expand(truth.label[:2].shape))


def test_unlabelled_images_reach_the_student_through_the_strong_view_alone(tiny, monkeypatch):
    from nnunetv2_semisup.trainers import paste_match

    trainer = build(tiny, paste_probability=0.0)
    batch = make_batch(trainer)
    monkeypatch.setattr(paste_match, "apply_strong_view", lambda images, view: images * 0 + 7)
    seen = []
    encode = paste_match.taps.encode
    monkeypatch.setattr(paste_match.taps, "encode", lambda n, x: (seen.append((n, x)), encode(n, x))[1])
    terms(trainer, batch)
    students = [x for network, x in seen if network is trainer.network]
    assert len(students) == 2 and (students[0] == 7).all() and torch.equal(students[1], batch["data"])
