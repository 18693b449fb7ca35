"""The invariants of Mean Teacher (Tarvainen & Valpola 2017; released segmentation code)."""

import pytest
import torch
from helpers import make_batch

from nnunetv2_semisup.losses.consistency import probabilities
from nnunetv2_semisup.network import taps
from nnunetv2_semisup.schedules import sigmoid_ramp_up

NAME = "nnUNetTrainerMeanTeacher"


def build(dataset, **settings):
    trainer = dataset.trainer(NAME, **settings)
    trainer.initialize()
    trainer.method.reset(trainer.network)
    return trainer


def groups(trainer, batch, progress=0.5):
    return list(trainer.method.losses(trainer.network, batch, batch["unlabelled"], progress))


def test_after_the_first_step_the_teacher_is_the_student(tiny):
    trainer = build(tiny)
    trainer.train_step(make_batch(trainer))
    teacher = trainer.method.teacher.module.state_dict()
    before = {k: v.clone() for k, v in trainer.network.state_dict().items()}
    assert all(torch.equal(teacher[k], before[k]) for k in before)
    trainer.train_step(make_batch(trainer, 1))
    for k, after in trainer.network.state_dict().items():  # decay 0.5 at the second update
        torch.testing.assert_close(teacher[k], (before[k] + after) / 2)


def test_teacher_gets_no_gradient_and_is_not_optimised(tiny):
    trainer = build(tiny)
    trainer.train_step(make_batch(trainer))
    assert all(p.grad is None and not p.requires_grad for p in trainer.method.parameters())
    assert trainer.method_parameters() == []
    assert len(trainer.optimizer.param_groups) == 1


def test_without_noise_an_equal_teacher_gives_zero(tiny):
    trainer = build(tiny, noise_std=0.0)
    consistency, _ = groups(trainer, make_batch(trainer))
    assert consistency["consistency"][1].item() == 0.0
    assert float(trainer.method.diagnostics["share_teacher_student_agreement"]) == 1.0


@pytest.mark.parametrize("kind", ["4 classes", "regions"])
def test_consistency_equals_the_formula(kind, datasets, use):
    trainer = build(use(datasets(kind)))
    batch = make_batch(trainer)
    with torch.no_grad():
        for p in trainer.network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    torch.manual_seed(7)
    consistency, supervised = groups(trainer, batch)
    torch.manual_seed(7)
    images = batch["unlabelled"]["data"]
    noise = (0.1 * torch.randn(images.shape)).clamp(-0.2, 0.2)
    regions = trainer.label_manager.has_regions
    with torch.no_grad():
        student = probabilities(trainer.network(images)[0], regions)
        teacher = probabilities(trainer.method.teacher.module(images + noise), regions)
        expected = ((student - teacher) ** 2).mean()
    weight, value = consistency["consistency"]
    torch.testing.assert_close(value.detach(), expected)
    assert weight == pytest.approx(0.2 * sigmoid_ramp_up(0.5, 0.4))
    expected = trainer.loss(trainer.network(batch["data"]), batch["target"])
    assert torch.equal(supervised["supervised"][1], expected) and supervised["supervised"][0] == 1.0


def test_target_does_not_follow_the_student(tiny):
    """The consistency term pulls on the student alone: its gradient is that of a constant target."""
    trainer = build(tiny, noise_std=0.0, consistency_weight=1.0, ramp_fraction=0.0)
    batch = make_batch(trainer)
    with torch.no_grad():
        for p in trainer.method.teacher.module.parameters():
            p.mul_(0.9)
        constant = probabilities(trainer.method.teacher.module(batch["unlabelled"]["data"]), False)
    weight, value = groups(trainer, batch)[0]["consistency"]
    (weight * value).backward()
    mine = [None if p.grad is None else p.grad.clone() for p in trainer.network.parameters()]
    trainer.network.zero_grad()
    student = probabilities(taps.logits(trainer.network, batch["unlabelled"]["data"]), False)
    ((student - constant) ** 2).mean().backward()
    for a, p in zip(mine, trainer.network.parameters(), strict=True):
        assert (a is None) == (p.grad is None) and (a is None or torch.equal(a, p.grad))


def test_weight_follows_the_ramp_over_the_run(tiny):
    trainer = build(tiny, num_epochs=10, num_iterations_per_epoch=4, preset="published")
    expected = {0: 0.2 * 0.0067379, 2: 0.2 * 0.2865, 4: 0.2, 9: 0.2}
    for epoch, weight in expected.items():
        trainer.current_epoch = epoch
        assert groups(trainer, make_batch(trainer), trainer.progress)[0]["consistency"][0] == pytest.approx(
            weight, 1e-3
        )


def test_teacher_weights_at_inference_is_a_setting(tiny, tmp_path):
    """The checkpoint's network_weights are the teacher's; the student is kept aside and comes back on resume."""
    trainer = build(tiny, inference_weights="teacher")
    for seed in range(3):
        trainer.train_step(make_batch(trainer, seed))
    student = {k: v.clone() for k, v in trainer.network.state_dict().items()}
    teacher = trainer.method.teacher.module.state_dict()
    assert any(not torch.equal(student[k], teacher[k]) for k in student)
    file = str(tmp_path / "checkpoint_latest.pth")
    trainer.save_checkpoint(file)
    saved = torch.load(file, weights_only=False)["network_weights"]
    assert all(torch.equal(saved[k], teacher[k]) for k in teacher)

    trainer.on_validation_epoch_start()
    assert all(torch.equal(v, teacher[k]) for k, v in trainer.network.state_dict().items())
    trainer.on_validation_epoch_end([trainer.validation_step(make_batch(trainer))])
    assert all(torch.equal(v, student[k]) for k, v in trainer.network.state_dict().items())

    resumed = tiny.trainer(NAME, inference_weights="teacher", resume=True)
    resumed.load_checkpoint(file)
    assert all(torch.equal(v, student[k]) for k, v in resumed.network.state_dict().items())
