"""What ACTION++ (You et al., MICCAI 2023) adds: temperatures, centres, centroids, queue of voxels."""

import pytest
import torch
import torch.nn.functional as F
from helpers import make_batch
from test_action import build, state, step_losses

from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.labels import class_indices
from nnunetv2_semisup.network import taps
from nnunetv2_semisup.trainers import action, action_plus_plus
from nnunetv2_semisup.trainers.action_plus_plus import ACTIONPlusPlusSettings

NAME = "nnUNetTrainerACTIONPlusPlus"


def test_one_period_of_the_temperature_per_stage(tiny):
    method = build(tiny, name=NAME, num_epochs=400).method
    expected = {0: 1.0, 25: 0.55, 50: 0.1, 75: 0.55, 100: 1.0, 175: 0.55, 250: 0.1, 325: 0.55}
    for epoch, tau in expected.items():
        assert method.contrast_temperature(epoch / 400) == pytest.approx(tau, abs=1e-4)
        assert method.distillation_temperatures(epoch / 400) == pytest.approx((tau, 0.1 * tau), abs=1e-4)
    assert method.contrast_temperature(1.0) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau_s": 0.2}, "tau_s = 0.2 .* left alone"),
        ({"tau_classes": 0.2}, "tau_classes = 0.2 .* left alone"),
        ({"tau_min": 2.0}, "tau_min"),
        ({"lambda_a": -1.0}, "lambda_a"),
        ({"voxel_queue_size": 0}, "voxel_queue_size"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(InputError, match=message):
        ACTIONPlusPlusSettings(**settings)


@pytest.mark.parametrize("progress", [0.5, 0.6, 0.625])
def test_the_schedule_reaches_contrast_and_classes_of_negatives(tiny, progress, monkeypatch):
    """Both released scripts pass the scheduled temperature to both."""
    trainer = build(tiny, name=NAME, num_epochs=400)
    seen = []

    def contrast(*arguments):
        seen.append((arguments[5], arguments[7]))
        return arguments[0].sum() * 0

    monkeypatch.setattr(action, "anatomical_contrast", contrast)
    step_losses(trainer, make_batch(trainer), progress)
    tau = trainer.method.scheduled_temperature(progress)
    assert seen == [(tau, tau)] and 0.1 <= tau <= 1


def test_centres_need_room(datasets, use):
    with pytest.raises(InputError, match="representation_features = 3 .* at least 4, the number of classes"):
        build(use(datasets("4 classes")), name=NAME, representation_features=3)


@pytest.mark.parametrize(("kind", "ignore"), [("4 classes", False), ("regions", False), ("ignore", True)])
def test_adaptive_contrast_sees_labelled_voxels_of_teacher_and_student(kind, ignore, datasets, use, monkeypatch):
    """The embeddings are those of the same voxels, whose label is the class; then they fill the queue."""
    trainer = build(use(datasets(kind)), name=NAME, num_epochs=4, voxels=5)
    method, network, batch = trainer.method, trainer.network, make_batch(trainer)
    if ignore:
        for target in batch["target"]:
            target[target == 1] = 2  # no voxel of class 1 is labelled
    seen, drawn = [], []
    for name, found in (("adaptive_anatomical_contrast", seen), ("draw_voxels", drawn)):
        original = getattr(action_plus_plus, name)

        def recorded(*arguments, original=original, found=found):
            result = original(*arguments)
            found.append((arguments, result))
            return result

        monkeypatch.setattr(action_plus_plus, name, recorded)
    with torch.no_grad():
        for p in (*method.teacher.parameters(), *method.teacher_representation.parameters()):
            p.mul_(0.9)
    trainer.current_epoch = 2
    before = state(method)
    terms = step_losses(trainer, batch, trainer.progress)
    student, teacher, labels, queue, _, centres, tau, weight = seen[0][0]
    positions, present = drawn[0][1]
    assert set(terms) == {"supervised", "pseudo_label", "anatomical", "adaptive"} and terms["adaptive"][0] == 0.01
    assert weight == 0.2 and tau == method.contrast_temperature(0.5)
    assert torch.equal(centres, method.centres) and torch.equal(queue, before["queues.voxels.rows"])
    k = method.classes
    assert labels.reshape(k, 5).tolist() == [[c if present[c] else -1] * 5 for c in range(k)]
    assert present.tolist() == ([True, False] if ignore else [True] * k)
    task = method.task
    truth = class_indices(batch["target"], task.has_regions, task.ignore_label)[:, ::2, ::2, ::2].flatten()
    for c in range(k):
        assert not present[c] or (truth[positions[c]] == c).all()

    def embeddings(net, head):
        _, levels = taps.decode_levels(net, taps.encode(net, batch["data"]))
        return head.rows([head.thin(levels[0]), *levels[1:]], positions).flatten(0, 1)

    with torch.no_grad():
        torch.testing.assert_close(student, embeddings(network, method.representation), rtol=1e-3, atol=1e-5)
        expected = embeddings(method.teacher.module, method.teacher_representation.module)
    torch.testing.assert_close(teacher, F.normalize(expected, dim=1), rtol=1e-3, atol=1e-5)
    assert student.requires_grad and not teacher.requires_grad

    method.after_step(network)
    by_draw = torch.arange(5 * k).reshape(k, 5).T.flatten()  # the first draw of every class, then the second
    kept = by_draw[labels[by_draw] >= 0]
    count = len(kept)
    assert torch.equal(method.queues["voxels"].rows[:count], teacher[kept])
    assert torch.equal(method.queues["voxel_labels"].rows[:count], labels[kept])
    assert (method.queues["voxel_labels"].rows[count:] == -1).all()
    means = F.normalize(student.detach(), dim=1).reshape(k, 5, -1).mean(1)
    expected = torch.where(present[:, None], F.normalize(means, dim=1), torch.zeros(()))
    torch.testing.assert_close(method.centroids, expected, rtol=1e-4, atol=1e-5)


def test_centroids_move_by_a_tenth_and_absent_classes_stay(tiny):
    method = build(tiny, name=NAME).method
    start = F.normalize(torch.randn(2, 128), dim=1)
    method.centroids.copy_(start)
    sums = torch.randn(2, 128)
    method._update_centroids(sums, torch.tensor([True, False]))
    moved = 0.9 * start[0] + 0.1 * F.normalize(sums[0], dim=0)
    torch.testing.assert_close(method.centroids[0], F.normalize(moved, dim=0))
    assert torch.equal(method.centroids[1], start[1])


def test_centres_follow_the_centroids(tiny):
    """Centroids at the exchanged centres exchange the allocation at the next step."""
    trainer = build(tiny, name=NAME, num_epochs=4)
    trainer.current_epoch = 2
    method = trainer.method
    trainer.train_step(make_batch(trainer))
    method.centroids.copy_(method.centres.flip(0))
    method._cosines = None
    trainer.train_step(make_batch(trainer, 1))
    assert method.allocation.tolist() == [1, 0]


def test_stage_two_has_neither_queue_of_voxels_nor_centroids(tiny):
    trainer = build(tiny, name=NAME, num_epochs=4)
    before = state(trainer.method)
    trainer.train_step(make_batch(trainer))
    after = state(trainer.method)
    for key in ("centroids", "allocation", "queues.voxels.rows", "queues.voxel_labels.pointer"):
        assert torch.equal(before[key], after[key])
    assert trainer.method.stage(trainer.progress) == 2


def test_weight_zero_is_action_with_a_schedule(tiny):
    trainer = build(tiny, name=NAME, w_aaco=0.0)
    assert set(step_losses(trainer, make_batch(trainer), 0.6)) == {"supervised", "pseudo_label", "anatomical"}
