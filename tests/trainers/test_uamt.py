"""The invariants of UA-MT: threshold, uncertainty, masked consistency."""

import math

import pytest
import torch
from helpers import counted_cost, make_batch

from nnunetv2_semisup.losses.consistency import entropy, mean_squared_difference
from nnunetv2_semisup.schedules import sigmoid_ramp_up

NAME = "nnUNetTrainerUAMT"
SILENT = {"noise_std": 0.0, "dropout": 0.0}  # every pass of the teacher says the same
KINDS = pytest.mark.parametrize("kind", ["2 classes", "4 classes", "regions"])


def build(dataset, **settings):
    torch.manual_seed(3)
    trainer = dataset.trainer(NAME, **settings)
    trainer.initialize()
    with torch.no_grad():  # logits of a useful size, and a teacher that is not its student
        for network in (trainer.network, trainer.method.teacher.module):
            for layer in network.decoder.seg_layers:
                layer.weight.mul_(20)
        for p in trainer.network.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return trainer


def terms(trainer, batch, progress=0.5) -> dict[str, tuple[float, torch.Tensor]]:
    torch.manual_seed(11)
    found = {}
    for group in trainer.method.losses(trainer.network, batch, batch["unlabelled"], progress):
        found |= group
    return found


def predict(trainer, network, images):
    logits = network(images)
    logits = logits[0] if isinstance(logits, list) else logits
    return torch.sigmoid(logits) if trainer.label_manager.has_regions else torch.softmax(logits, 1)


@KINDS
def test_the_threshold_rises_to_the_largest_entropy(kind, datasets, use):
    method = build(use(datasets(kind))).method
    largest = math.log({"2 classes": 2, "4 classes": 4, "regions": 2}[kind])
    assert (
        method.threshold(0.0) / largest == pytest.approx(0.75 + 0.25 * math.exp(-5)) == pytest.approx(0.7517, abs=1e-4)
    )
    assert method.threshold(1.0) == pytest.approx(largest)
    rising = [method.threshold(i / 10) for i in range(11)]
    assert rising == sorted(rising)


@pytest.mark.parametrize("heads", [2, 3, 5])
def test_entropy(heads):
    uniform = torch.full((1, heads, 2, 2), 1 / heads)
    torch.testing.assert_close(entropy(uniform, False), torch.full((1, 1, 2, 2), math.log(heads)), atol=1e-5, rtol=0)
    certain = torch.zeros(1, heads, 2, 2)
    certain[:, 1] = 1
    assert entropy(certain, False).abs().max() < 1e-5 and entropy(certain, True).abs().max() < 1e-5
    half = torch.full((1, heads, 2, 2), 0.5)
    torch.testing.assert_close(entropy(half, True), torch.full((1, heads, 2, 2), math.log(2)), atol=1e-5, rtol=0)
    p = torch.softmax(torch.randn(2, heads, 3, 3), 1)
    expected = torch.distributions.Categorical(p.movedim(1, -1)).entropy()[:, None]
    torch.testing.assert_close(entropy(p, False), expected, atol=1e-5, rtol=1e-5)


def test_uniform_probabilities_are_uncertain_until_the_very_end(tiny):
    method = build(tiny).method
    uniform = entropy(torch.full((1, 2, 1, 1), 0.5), False)
    assert not (uniform < method.threshold(0.99)).any()


def test_masked_mean_against_a_slow_loop():
    student, teacher, weights = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4), torch.tensor([0.5, 1.0, 0.0])
    counted = torch.rand(2, 1, 4, 4) < 0.4
    total = sum(
        float(weights[c]) * float(student[b, c, x, y] - teacher[b, c, x, y]) ** 2
        for b, _, x, y in counted.nonzero().tolist()
        for c in range(3)
    )
    mine = mean_squared_difference(student, teacher, weights, counted)
    assert float(mine) == pytest.approx(total / (3 * int(counted.sum())), rel=1e-5)
    assert mean_squared_difference(student, teacher, weights, torch.zeros_like(counted)) == 0


def test_when_nothing_is_certain_the_loss_is_zero_and_teaches_nothing(tiny, monkeypatch):
    trainer = build(tiny)
    monkeypatch.setattr(trainer.method, "threshold", lambda progress: -1.0)
    value = terms(trainer, make_batch(trainer))["consistency"][1]
    value.backward()
    assert value == 0 and trainer.method.diagnostics["share_certain"] == 0
    assert not any(p.grad is not None and p.grad.any() for p in trainer.network.parameters())


@KINDS
def test_consistency_equals_the_formula(kind, datasets, use):
    """Without noise and dropout all samples are one: sum(m d^2) / (C sum m), m where -sum p log p is below H."""
    trainer = build(use(datasets(kind)), **SILENT, samples=3)
    batch = make_batch(trainer)
    images = batch["unlabelled"]["data"]
    found = terms(trainer, batch, 0.2)
    with torch.no_grad():
        student = predict(trainer, trainer.network, images)
        teacher = predict(trainer, trainer.method.teacher.module, images)
    regions, heads = kind == "regions", student.shape[1]
    p = torch.stack([teacher, 1 - teacher], 1) if regions else teacher[:, :, None].movedim(1, 1)
    u = -(p * torch.log(p + 1e-6)).sum(1)
    h = (0.75 + 0.25 * math.exp(-5 * 0.8**2)) * math.log(2 if regions else heads)
    m = (u < h).float()
    assert 0.05 < m.mean() < 0.95
    squares = (student - teacher) ** 2
    expected = (m * squares).sum() / ((1 if regions else heads) * m.sum())
    weight, value = found["consistency"]
    assert weight == 0.2
    torch.testing.assert_close(value.detach(), expected)


def test_an_equal_teacher_without_noise_and_dropout_gives_zero(tiny):
    trainer = build(tiny, **SILENT)
    trainer.method.reset(trainer.network)
    assert terms(trainer, make_batch(trainer))["consistency"][1] == 0


def test_dropout_makes_the_samples_differ_at_both_places_and_changes_no_key(tiny, monkeypatch):
    trainer = build(tiny, noise_std=0.0)
    method, network = trainer.method, trainer.network
    keys = set(network.state_dict())
    images = make_batch(trainer)["unlabelled"]["data"]
    features = []
    drop = method._drop
    monkeypatch.setattr(method, "_drop", lambda f: features.append((f, drop(f))) or features[-1][1])
    with torch.no_grad():
        first, second = (method._teacher(images) for _ in range(2))
    assert not torch.equal(first, second)
    assert [f.shape[1:] for f, _ in features[:2]] == [(8, 4, 4, 4), (4, 16, 16, 16)], "bottleneck, last features"
    for before, after in features:
        factor = (after / before).nan_to_num(0.0).flatten(2)
        assert set(factor.unique().tolist()) == {0.0, 2.0}
        assert torch.equal(factor.amax(2), factor.amin(2)), "whole channels"
    assert set(network.state_dict()) == keys


def test_the_mean_of_the_samples_is_asked_as_often_as_said(tiny, monkeypatch):
    trainer = build(tiny, samples=5)
    given = iter(torch.rand(6, 2, 2, 4, 4, 4).unbind())
    passes = []
    monkeypatch.setattr(
        trainer.method, "_teacher", lambda images: passes.append(next(given).clone()) or passes[-1].clone()
    )
    mean = trainer.method._teachers_mean(torch.zeros(2, 1, 4, 4, 4))
    assert len(passes) == 5
    torch.testing.assert_close(mean, torch.stack(passes).mean(0))


def test_the_published_ramp_ends_with_the_training(tiny):
    trainer = build(tiny, preset="published", **SILENT)
    batch = make_batch(trainer)
    for progress in (0.0, 0.5, 0.9):
        assert terms(trainer, batch, progress)["consistency"][0] == pytest.approx(0.2 * sigmoid_ramp_up(progress, 1.0))


def test_the_labelled_pass_is_nnunets(tiny):
    trainer = build(tiny)
    batch = make_batch(trainer)
    assert torch.equal(
        terms(trainer, batch)["supervised"][1], trainer.loss(trainer.network(batch["data"]), batch["target"])
    )


def test_teacher_gets_no_gradient_and_follows_the_student(tiny):
    trainer = build(tiny)
    trainer.train_step(make_batch(trainer))
    teacher, student = trainer.method.teacher.module.state_dict(), trainer.network.state_dict()
    assert all(torch.equal(teacher[k], student[k]) for k in student), "the first update copies the student"
    assert all(p.grad is None and not p.requires_grad for p in trainer.method.parameters())


def test_cost(tiny):
    assert counted_cost(tiny, NAME) < 1.1 * 5
