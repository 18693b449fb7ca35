"""Stages, teacher, queues and terms of ACTION (You et al., IPMI 2023), in the trainer."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import make_batch

from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.labels import disjoint_classes
from nnunetv2_semisup.losses.pseudo_label import PseudoLabel
from nnunetv2_semisup.network import taps
from nnunetv2_semisup.network.embedding_heads import pool_cells, windows
from nnunetv2_semisup.trainers import action
from nnunetv2_semisup.trainers.action import ACTION, ACTIONSettings, class_probabilities
from nnunetv2_semisup.trainers.action_plus_plus import ACTIONPlusPlusSettings

NAMES = ["nnUNetTrainerACTION", "nnUNetTrainerACTIONPlusPlus"]
NAME = NAMES[0]
PROGRESS = {1: 0.1, 2: 0.3, 3: 0.6}  # within the stages of ACTION
SHORT = {"num_epochs": 4, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1}
STILL = {"jitter_probability": 0.0, "blur_probability": 0.0}  # strong view = weak view


def make(dataset, name, configuration="3d_fullres", **settings):
    """A trainer with stages and learning rates as published, and our two cells per axis."""
    return dataset.trainer(name, configuration, **{"preset": "published", "global_cells": 2} | settings)


def build(dataset, configuration="3d_fullres", name=NAME, **settings):
    trainer = make(dataset, name, configuration, **settings)
    trainer.initialize()
    trainer.method.reset(trainer.network)
    for name in ("global", "local"):  # as after the first steps
        trainer.method.queues[name].count.fill_(trainer.settings.queue_size)
    return trainer


def octants(features):
    """(B, C, X, Y, Z) to (B, C * 8): the mean of each of 2 x 2 x 2 equal parts."""
    halves = [torch.stack(part.chunk(2, -1)) for part in features.chunk(2, -3)]  # (z, B, C, X / 2, Y, Z / 2) each
    parts = [torch.stack(part.chunk(2, -2)).mean((-3, -2, -1)) for part in halves]  # (y, z, B, C) each
    return torch.stack(parts).permute(3, 4, 0, 1, 2).flatten(1)


def step_losses(trainer, batch, progress, backward=False) -> dict:
    """All terms of a step, {name: (weight, value)}."""
    terms = {}
    for group in trainer.method.losses(trainer.network, batch, batch["unlabelled"], progress):
        if backward:
            sum(weight * value for weight, value in group.values()).backward()
        terms |= group
    return terms


def record(monkeypatch, module, name) -> list:
    """Each call of a function from now on: arguments and result."""
    calls, original = [], getattr(module, name)

    def recorded(*arguments):
        calls.append((arguments, original(*arguments)))
        return calls[-1][1]

    monkeypatch.setattr(module, name, recorded)
    return calls


def mixed_by_stage_three(trainer, images, label, monkeypatch) -> tuple[torch.Tensor, PseudoLabel]:
    """The images that the student sees and the label that it learns, where the teacher says ``label`` of ``images``."""
    batch = make_batch(trainer)
    batch["unlabelled"]["data"] = images
    with monkeypatch.context() as patch:
        patch.setattr(action, "pseudo_label", lambda logits, regions: label)
        patch.setattr(action, "apply_jitter", lambda images, drawn: images)
        passes = record(patch, taps, "encode")
        loss = record(patch, action, "confidence_weighted_cross_entropy")
        step_losses(trainer, batch, PROGRESS[3])
    return passes[-1][0][1], loss[0][0][1]


def state(module) -> dict:
    return {k: v.clone() for k, v in module.state_dict().items()}


# ------------------------------------------------------------------------------------------------------------- stages


@pytest.mark.parametrize("epochs", [4, 5, 6, 7, 1000])
def test_stages_are_a_function_of_the_epoch(epochs, tiny):
    trainer = make(tiny, NAME, num_epochs=epochs, num_iterations_per_epoch=3)
    trainer.initialize()
    stages = []
    for epoch in range(epochs):
        trainer.current_epoch = epoch
        found = set()
        for trainer._steps_in_epoch in range(3):
            found.add(trainer.method.stage(trainer.progress))
        assert len(found) == 1, "a stage ended within an epoch"
        stages += found
    assert stages == sorted(stages) and set(stages) == {1, 2, 3}
    assert stages.index(2) == epochs // 4 and stages.index(3) == epochs // 2


@pytest.mark.parametrize("epochs", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_run_shorter_than_its_stages_is_refused(name, epochs, tiny, tmp_path):
    with pytest.raises(InputError, match=f"num_epochs = {epochs} .* each stage has an epoch; the next such is 4"):
        make(tiny, name, num_epochs=epochs)
    with pytest.raises(InputError, match="the next such is 4"):
        make(tiny, f"{name}_{epochs}epoch{'s' * (epochs > 1)}")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage_fractions": (0.5, 0.5)}, "stage_fractions"),
        ({"stage_fractions": (0.5, 0.5, 0.0)}, "stage_fractions"),
        ({"stage_fractions": (0.5, 0.2, 0.5)}, "stage_fractions"),
        ({"stage_fractions": (0.5, 1e-9, 0.5)}, "stage_fractions"),
        ({"w_global": 0.0, **ACTIONSettings.published}, "stage one has no other loss"),
        ({"tau_t": 0.0}, "tau_t"),
        ({"confident": 1.5}, "confident"),
        ({"queue_size": 0}, "queue_size"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(InputError, match=message):
        ACTIONSettings(**settings)


@pytest.mark.parametrize("kind", ["2 classes", "regions and ignore"])
@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_terms_and_gradients_of_each_stage(kind, configuration, datasets, use):
    trainer = build(use(datasets(kind)), configuration)
    method, network = trainer.method, trainer.network
    expected = {
        1: {"global_unlabelled", "global_labelled"},
        2: {f"{n}_{s}" for n in ("global", "local") for s in ("unlabelled", "labelled")} | {"supervised"},
        3: {"supervised", "pseudo_label", "anatomical"},
    }
    for stage, progress in PROGRESS.items():
        trainer.optimizer.zero_grad(set_to_none=True)
        terms = step_losses(trainer, make_batch(trainer), progress, backward=True)
        assert set(terms) == expected[stage]
        assert all(np.isfinite(weight) and torch.isfinite(value) for weight, value in terms.values())

        def moved(module):
            return all(p.grad is not None and p.grad.any() for p in module.parameters())

        def untouched(module):
            return all(p.grad is None for p in module.parameters())

        assert moved(network.encoder.stages)
        assert untouched(network.decoder.stages) if stage == 1 else moved(network.decoder.stages)
        heads = [(m[n], n) for m in (method.projectors, method.predictors) for n in ("global", "local")]
        for head, name in heads:
            assert moved(head) if stage == 2 or (stage, name) == (1, "global") else untouched(head), (stage, name)
        assert moved(method.representation) if stage == 3 else untouched(method.representation)
        assert untouched(method.teacher) and untouched(method.teacher_projectors)
        assert not any(b.requires_grad for b in method.buffers())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_each_stage_under_mixed_precision(name, stage, tiny):
    """As on a GPU: the groups in autocast, the same weights get a gradient, values close to those of fp32."""
    trainer = build(tiny, name=name)
    batch, seen = make_batch(trainer), []
    for enabled in (False, True):
        trainer.optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        groups, terms = trainer.method.losses(trainer.network, batch, batch["unlabelled"], PROGRESS[stage]), {}
        while True:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled, cache_enabled=False):
                group = next(groups, None)
            if group is None:
                break
            sum(weight * value for weight, value in group.values()).backward()
            terms |= {n: float(value.detach()) for n, (_, value) in group.items()}
        modules = (trainer.network, trainer.method)
        seen.append((terms, {k for m in modules for k, p in m.named_parameters() if p.grad is not None}))
    assert seen[0][1] == seen[1][1]
    for term, value in seen[0][0].items():
        assert seen[1][0][term] == pytest.approx(value, rel=0.25, abs=0.05), term


def test_stage_one_may_be_supervised(tiny):
    trainer = build(tiny, stage1_supervised=True)
    terms = step_losses(trainer, make_batch(trainer), PROGRESS[1])
    assert set(terms) == {"global_unlabelled", "global_labelled", "supervised"}
    assert trainer.method.first_supervised_epoch == 0


# --------------------------------------------------------------------------------------------------- stages one and two


def test_local_heads_of_two_classes_are_never_dead(tiny):
    """With few hidden units and a ReLU one start in eight has all of them off, for all inputs."""
    logits = torch.randn(2, 2, 16, 16, 16).requires_grad_()
    trainer = make(tiny, NAME)
    trainer.initialize()
    for seed in range(60):
        torch.manual_seed(seed)
        method = ACTION(trainer.network, trainer.method.task, trainer.settings)
        cells = method.projectors["local"](pool_cells(logits, method.window_edges))
        embedded = windows(method.predictors["local"](cells))
        (gradient,) = torch.autograd.grad(embedded.square().sum(), logits)
        assert gradient.any(), seed


@pytest.mark.parametrize("strong_on", ["student", "teacher"])
def test_distillation_equals_its_definition(strong_on, tiny, monkeypatch):
    """Global: pooled bottleneck; local: windows of the logits; student with predictor, teacher without."""
    trainer = build(tiny, strong_on=strong_on)
    method, network = trainer.method, trainer.network
    with torch.no_grad():
        for p in (*method.teacher.parameters(), *method.teacher_projectors.parameters()):
            p.mul_(0.9)
    monkeypatch.setattr(action, "apply_jitter", lambda images, drawn: images.roll(1, -1) * 1.1)
    batch = make_batch(trainer)
    terms = step_losses(trainer, batch, PROGRESS[2])
    for stream, images in (("labelled", batch["data"]), ("unlabelled", batch["unlabelled"]["data"])):
        views = [images.roll(1, -1) * 1.1, images]
        views = views if strong_on == "student" else views[::-1]
        nets = (network, method.teacher.module)
        cosines = {"global": [], "local": []}
        for net, view, heads in zip(nets, views, (method.projectors, method.teacher_projectors.module), strict=True):
            skips = taps.encode(net, view)
            student = net is network
            rows = {"global": heads["global"](octants(skips[-1]))}
            cells = heads["local"](pool_cells(taps.logits(net, view), method.window_edges))
            rows["local"] = cells
            if student:
                rows = {n: method.predictors[n](x) for n, x in rows.items()}
            rows["global"], rows["local"] = rows["global"][:, None], windows(rows["local"])
            for n, x in rows.items():
                anchors = method.queues[n].rows.float()
                cosines[n].append(F.cosine_similarity(x[:, None], anchors[None], dim=3))  # (B, K, P)
        for n, (student, teacher) in cosines.items():
            p_s, p_t = torch.log_softmax(student / 0.1, 1), torch.softmax(teacher / 0.01, 1)
            kl = F.kl_div(p_s, p_t, reduction="none").sum(1).mean()
            weight, value = terms[f"{n}_{stream}"]
            assert weight == 0.5
            torch.testing.assert_close(value, kl, rtol=1e-3, atol=1e-4)


def test_each_queue_is_waited_for_by_its_own_terms(tiny):
    """ACTION++ begins with both, ACTION fills the global one first."""
    trainer = build(tiny)
    trainer.method.queues["local"].count.zero_()
    found = {name: value.item() for name, (_, value) in step_losses(trainer, make_batch(trainer), PROGRESS[2]).items()}
    assert found["global_labelled"] > 0 and found["global_unlabelled"] > 0
    assert found["local_labelled"] == found["local_unlabelled"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_passes_of_each_stage(name, tiny, monkeypatch):
    """(patches, with decoder, with gradient) of each pass: what the costs in the docs count."""
    trainer = build(tiny, name=name)
    passes, encode = [], taps.encode

    def encoded(network, images):
        passes.append([len(images), False, torch.is_grad_enabled()])
        return encode(network, images)

    def note(function):
        def noted(*arguments, **options):
            passes[-1][1] = True
            return function(*arguments, **options)

        return noted

    monkeypatch.setattr(taps, "encode", encoded)
    for function in ("decode", "decode_levels"):
        monkeypatch.setattr(taps, function, note(getattr(taps, function)))
    teacher, student = [2, True, False], [2, True, True]
    joint = [teacher, student] * 2
    expected = {1: [[2, False, False], [2, False, True]] * 2, 2: joint, 3: [teacher, student, student]}
    if name != NAME:
        expected = {2: joint, 3: [teacher, teacher, student, student]}
    for stage, listed in expected.items():
        passes.clear()
        step_losses(trainer, make_batch(trainer), {1: 0.1, 2: 0.26 if name == NAME else 0.1, 3: 0.6}[stage])
        assert passes == listed, stage


def test_random_rows_of_the_start_are_not_compared_with(tiny):
    """Three steps of 2 + 2 patches fill a queue of 10; until then the distillation has neither value nor gradient."""
    trainer = build(tiny, num_epochs=4, queue_size=10)
    method, batch = trainer.method, make_batch(trainer)
    for queue in ("global", "local"):
        method.queues[queue].count.zero_()
    trainer.current_epoch = 1
    for step in range(4):
        terms = step_losses(trainer, batch, trainer.progress)
        found = {name: value.item() for name, (_, value) in terms.items() if name != "supervised"}
        assert len(found) == 4 and all((value > 0) == (step == 3) for value in found.values())
        trainer.train_step(batch)


@pytest.mark.parametrize("local_mode", ["same_window", "pooled"])
def test_the_queue_takes_the_teachers_embeddings_after_the_step(local_mode, tiny):
    """The loss does not depend on what is enqueued at its own step; both streams enter; no student row does."""
    trainer = build(tiny, num_epochs=4, local_mode=local_mode, **STILL)
    method = trainer.method
    trainer.current_epoch = 1
    batch = make_batch(trainer)
    before = state(method.queues)
    step_losses(trainer, batch, trainer.progress)
    assert all(torch.equal(v, before[k]) for k, v in state(method.queues).items()), "enqueued before the step"
    with torch.no_grad():
        images = torch.cat((batch["unlabelled"]["data"], batch["data"]))
        skips = taps.encode(method.teacher.module, images)
        rows = method.teacher_projectors.module["global"](octants(skips[-1]))
        cells = pool_cells(taps.logits(method.teacher.module, images), method.window_edges)
        expected = F.normalize(windows(method.teacher_projectors.module["local"](cells)), dim=2)
    trainer.train_step(batch)
    torch.testing.assert_close(method.queues["global"].rows[:4, 0], F.normalize(rows, dim=1))
    assert int(method.queues["global"].pointer) == int(method.queues["local"].pointer) == 4
    assert torch.equal(method.queues["global"].rows[4:], before["global.rows"][4:])
    kept = method.queues["local"].rows
    assert kept.shape == (36, method.all_windows if local_mode == "same_window" else 1, 2 * 64)
    if local_mode == "same_window":
        torch.testing.assert_close(kept[:4].float(), expected, rtol=0, atol=2e-3)
    else:
        distance = (kept[:4].float() - expected).abs().amax(2)  # (4, P)
        assert (distance.amin(1) < 2e-3).all() and distance.argmin(1).unique().numel() > 1


# -------------------------------------------------------------------------------------------------------- the teacher


@pytest.mark.parametrize("name", NAMES)
def test_teacher_becomes_the_student_once_when_stage_three_starts(name, tiny, tmp_path):
    def distance():
        method = trainer.method
        pairs = [(method.teacher.module, trainer.network), (method.teacher_projectors.module, method.projectors)]
        pairs = [pair for modules in pairs for pair in zip(*(m.parameters() for m in modules), strict=True)]
        return sum(float((a - b).detach().abs().sum()) for a, b in pairs)

    def step_resets(seed):
        """Whether the teacher after a step is one percent away from the student before it."""
        before = [p.detach().clone() for p in trainer.network.parameters()]
        trainer.train_step(make_batch(trainer, seed))
        teacher, now = trainer.method.teacher.module.parameters(), trainer.network.parameters()
        return all(torch.allclose(t, 0.99 * b + 0.01 * n) for t, b, n in zip(teacher, before, now, strict=True))

    trainer = build(tiny, name=name, num_epochs=4, num_iterations_per_epoch=2)
    first_of_three = trainer.method.bounds[2]
    trainer.current_epoch = first_of_three - 1
    for seed in range(2):
        trainer.train_step(make_batch(trainer, seed))
    assert distance() > 0
    trainer.save_checkpoint(str(tmp_path / "before.pth"))
    trainer.current_epoch = first_of_three
    assert step_resets(2)
    trainer.save_checkpoint(str(tmp_path / "within.pth"))

    for file, is_reset in (("before.pth", True), ("within.pth", False)):
        trainer = make(tiny, name, num_epochs=4, num_iterations_per_epoch=2, resume=True)
        trainer.load_checkpoint(str(tmp_path / file))
        assert distance() > 0
        assert step_resets(3) == is_reset


# -------------------------------------------------------------------------------------------------------- stage three


def test_pseudo_label_term_equals_its_definition(tiny):
    """A patch that is confident in some of its voxels; without CutMix and strong view."""
    trainer = build(tiny, unlabeled_batch_size=1, mix="none", **STILL)
    batch = make_batch(trainer)
    with torch.no_grad():
        trainer.network.decoder.seg_layers[-1].weight.mul_(40)
        trainer.network.decoder.seg_layers[-1].bias.add_(torch.tensor([0.3, -0.3]))
    trainer.method.reset(trainer.network)
    images = batch["unlabelled"]["data"]
    with torch.no_grad():
        logits = trainer.network(images)[0]
    confidence, label = torch.softmax(logits, 1).max(1)
    omega = (confidence >= 0.97).float().mean()
    ce = F.cross_entropy(logits, label, reduction="none")
    assert 0 < omega < 1
    weight, value = step_losses(trainer, batch, PROGRESS[3])["pseudo_label"]
    assert weight == 1.0
    torch.testing.assert_close(value.detach(), omega * ce.sum() / (ce > 0).sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["4 classes", "regions"])
@pytest.mark.parametrize("mix", ["cutmix", "classmix"])
def test_mixing_keeps_image_label_and_confidence_together(kind, mix, datasets, use, monkeypatch):
    trainer = build(use(datasets(kind)), mix=mix)
    heads = 2 if kind == "regions" else 1
    images = torch.randn(3, 1, 16, 16, 16)
    label = torch.randint(0, 2 if kind == "regions" else 4, (3, heads, 16, 16, 16))
    confidence = torch.rand(3, heads, 16, 16, 16)
    mixed, together = mixed_by_stage_three(trainer, images, PseudoLabel(label, confidence), monkeypatch)
    replaced = mixed != images
    assert replaced.any() and not replaced.all()
    for part, source in ((mixed, images), (together.label, label), (together.confidence, confidence)):
        assert torch.equal(part, torch.where(replaced, source[[1, 2, 0]], source))


def test_classmix_of_regions_draws_among_all_their_classes(datasets, use, monkeypatch):
    """Whole and core, its part, are classes of their own: one may be replaced where the other stays."""
    trainer = build(use(datasets("regions")), "2d", mix="classmix")
    whole = torch.zeros(2, 16, 16)
    whole[:, 4:12], core = 1, torch.zeros(2, 16, 16)
    core[:, 6:10] = 1
    images, label = torch.randn(2, 1, 16, 16), torch.stack((whole, core), 1).long()
    apart = False
    for _ in range(40):
        mixed, _ = mixed_by_stage_three(trainer, images, PseudoLabel(label, label.float()), monkeypatch)
        replaced = (mixed != images)[:, 0]
        for one, k in zip(replaced, (core > 0), strict=True):
            assert one[k].all() or not one[k].any(), "a class is replaced whole"
            apart |= bool(one[4:6].all() != one[6:10].all())
    assert apart


@pytest.mark.parametrize("mix", ["cutmix", "classmix"])
def test_a_single_patch_is_not_mixed(mix, tiny, monkeypatch):
    trainer = build(tiny, mix=mix)
    images, label = torch.randn(1, 1, 16, 16, 16), torch.randint(0, 2, (1, 1, 16, 16, 16))
    mixed, together = mixed_by_stage_three(trainer, images, PseudoLabel(label, label.float()), monkeypatch)
    assert torch.equal(mixed, images) and torch.equal(together.label, label)


def test_a_single_patch_is_refused_before_anything_is_prepared_unless_mixing_is_off(tiny, monkeypatch):
    trainer = build(tiny, unlabeled_batch_size=1)
    monkeypatch.setattr(trainer, "_prepare_unlabeled_cases", lambda: pytest.fail("preprocessed first"))
    with pytest.raises(InputError, match="mix = cutmix needs 2 unlabelled patches per GPU"):
        trainer.on_train_start()
    trainer = build(tiny, mix="none")
    assert trainer.method.unfit_batch(2, 1) is None
    images, classes = torch.randn(2, 1, 16, 16, 16), torch.randint(0, 2, (2, 1, 16, 16, 16))
    label = PseudoLabel(classes, torch.rand(2, 1, 16, 16, 16))
    mixed, together = mixed_by_stage_three(trainer, images, label, monkeypatch)
    assert mixed is images and together is label


def test_classes_of_regions():
    """whole = {1, 2}, core = {2}: a voxel belongs to the last region it is in."""
    regions = torch.tensor([[[0, 1, 1, 0]], [[0, 0, 1, 1]]], dtype=torch.bool).transpose(0, 1)
    assert disjoint_classes(regions[..., None])[..., 0].tolist() == [[0, 1, 2, 2]]
    p = torch.tensor([[[0.2, 0.9], [0.1, 0.3]]])[..., None]  # (1, regions, 2, 1)
    expected = torch.tensor([[[0.8, 0.1], [0.2, 0.7], [0.1, 0.3]]])
    torch.testing.assert_close(class_probabilities(p, True)[..., 0], expected)
    assert class_probabilities(p, False) is p


@pytest.mark.parametrize("kind", ["ignore", "regions and ignore", "4 classes"])
def test_voxels_of_the_contrast(kind, datasets, use, monkeypatch):
    """Labelled voxels but the ignored ones, unlabelled ones from 0.7; hard: the student is below 0.97 for the class."""
    trainer = build(use(datasets(kind)), "2d", mix="none", **STILL)
    method, batch = trainer.method, make_batch(trainer)
    drawn = record(monkeypatch, action, "draw_voxels")
    with torch.no_grad():
        trainer.network.decoder.seg_layers[-1].weight.mul_(5)
    method.reset(trainer.network)
    step_losses(trainer, batch, PROGRESS[3])
    (hard, _), (members, _) = (arguments for arguments, _ in drawn)
    regions, target = trainer.label_manager.has_regions, batch["target"][0]
    ignore = trainer.label_manager.ignore_label
    images = torch.cat((batch["data"], batch["unlabelled"]["data"]))
    with torch.no_grad():
        logits = trainer.network(images)[0]
    p = torch.sigmoid(logits) if regions else torch.softmax(logits, 1)
    at = 0
    for b in range(len(images)):
        for x in range(0, 16, 2):
            for y in range(0, 16, 2):
                column, q = members[:, at], p[b, :, x, y].tolist()
                if b < len(target) and regions:
                    bits = target[b, :, x, y].tolist()
                    expected = -1 if ignore is not None and bits[2] else (2 if bits[1] else int(bits[0]))
                elif b < len(target):
                    value = int(target[b, 0, x, y])
                    expected = -1 if value == ignore else value
                elif regions:
                    sure = min(max(v, 1 - v) for v in q) >= 0.7
                    expected = (2 if q[1] > 0.5 else int(q[0] > 0.5)) if sure else -1
                else:
                    expected = int(np.argmax(q)) if max(q) >= 0.7 else -1
                assert column.tolist() == [c == expected for c in range(len(column))]
                if expected >= 0:
                    own = [min(1 - q[0], 1 - q[1]), min(q[0], 1 - q[1]), q[1]][expected] if regions else q[expected]
                    assert bool(hard[expected, at]) == (own < 0.97)
                assert not hard[:, at][~column].any()
                at += 1
    assert at == members.shape[1]


def test_contrast_is_off_at_weight_zero_and_pseudo_labels_too(tiny):
    trainer = build(tiny, w_anco=0.0)
    assert set(step_losses(trainer, make_batch(trainer), PROGRESS[3])) == {"pseudo_label", "supervised"}
    trainer = build(tiny, w_unsup=0.0)
    assert set(step_losses(trainer, make_batch(trainer), PROGRESS[3])) == {"anatomical", "supervised"}
    trainer = build(tiny, w_unsup=0.0, w_anco=0.0)
    assert set(step_losses(trainer, make_batch(trainer), PROGRESS[3])) == {"supervised"}


def test_heads_without_activation_are_linear(tiny):
    head = build(tiny, head_activation="none").method.predictors["global"]
    a, b = torch.randn(2, 3, 128)
    torch.testing.assert_close(head(a + b) + head(torch.zeros(3, 128)), head(a) + head(b))


# ------------------------------------------------------------------------------------------------------- whole runs


def test_defaults_are_those_of_paper_and_code():
    """methods as published; docs/methods/action.md says where paper and code differ."""
    common = {
        "w_global": 1, "w_local": 1, "w_unsup": 1, "w_anco": 0.01, "teacher_decay": 0.99, "tau_s": 0.1, "tau_t": 0.01,
        "queue_size": 36, "strong_on": "student", "local_mode": "same_window", "confident": 0.97, "queries": None,
        "weak_threshold": 0.7, "hard_threshold": 0.97, "tau_anco": 0.5, "negatives": 512, "tau_classes": 0.5,
        "jitter_probability": 0.5, "jitter_strength": 0.25, "blur_probability": 0.5, "mix": "cutmix",
        "head_activation": "relu", "lr_restart": False, "stage1_supervised": False,
    }  # fmt: skip
    more = {
        "w_aaco": 0.01, "lambda_a": 0.2, "tau_min": 0.1, "tau_max": 1, "teacher_sharpness": 0.1, "voxels": None,
        "voxel_queue_size": None, "centroid_decay": 0.9, "stage_fractions": (0, 0.25, 0.75),
    }  # fmt: skip
    for found, expected in (
        (ACTIONSettings(), common | {"stage_fractions": (0, 1 / 3, 2 / 3)}),
        (ACTIONPlusPlusSettings(), common | more),
    ):
        assert {key: getattr(found, key) for key in expected} == expected


def test_without_restart_the_learning_rate_is_nnunets(tiny):
    trainer = make(tiny, NAME, num_epochs=4, lr_restart=False)
    trainer.initialize()
    rates = []
    for epoch in range(4):
        trainer.lr_scheduler.step(epoch)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.01 * (1 - epoch / 4) ** 0.9 for epoch in range(4)])
    assert len({group["lr"] for group in trainer.optimizer.param_groups}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_run_passes_through_its_stages(name, tiny, monkeypatch):
    """Learning rate restarts, no best checkpoint before labels are used, each epoch's terms are those of its stage."""
    trainer = make(tiny, name, **SHORT | {"save_every_minutes": 0.0})
    saved, original = [], trainer.save_checkpoint

    def save(filename):
        saved.append((trainer.current_epoch, Path(filename).stem))
        original(filename)

    monkeypatch.setattr(trainer, "save_checkpoint", save)
    trainer.run_training()
    logged = trainer.logger.get_value
    lengths = [1, 1, 2] if name == NAME else [1, 3]
    expected = [0.01 * (1 - e / n) ** 0.9 for n in lengths for e in range(n)]
    assert logged("lrs", None) == pytest.approx(expected)
    first = trainer.method.first_supervised_epoch
    assert first == (1 if name == NAME else 0)
    assert min(epoch for epoch, stem in saved if stem == "checkpoint_best") == first
    dice, ema = logged("mean_fg_dice", None), logged("ema_fg_dice", None)
    assert ema[first] == dice[first] and ema[first + 1] == pytest.approx(0.9 * ema[first] + 0.1 * dice[first + 1])
    assert trainer._best_ema == max(ema[first:])
    rows = trainer.training_log.rows
    stages = [3 if "loss_anatomical" in r else 2 if "loss_supervised" in r else 1 for r in rows]
    assert stages == ([1, 2, 3, 3] if name == NAME else [2, 3, 3, 3])


def test_no_best_checkpoint_after_a_resume_in_stage_one(tiny, tmp_path):
    """A checkpoint that was written at the end of the last epoch without labels knows no best value."""
    trainer = make(tiny, NAME, **SHORT | {"num_epochs": 8, "save_every_minutes": 0.0})
    trainer.on_train_start()
    for _ in range(2):
        run_epoch(trainer)
    folder = Path(trainer.output_folder)
    assert {f.name for f in folder.glob("*.pth")} == {"checkpoint_latest.pth"}
    resumed = make(tiny, NAME, resume=True, **SHORT | {"num_epochs": 8, "save_every_minutes": 0.0})
    resumed.load_checkpoint(str(folder / "checkpoint_latest.pth"))
    assert resumed.current_epoch == resumed.method.first_supervised_epoch == 2
    resumed.on_train_start()
    run_epoch(resumed)
    assert (folder / "checkpoint_best.pth").exists() and np.isfinite(resumed._best_ema)


def run_epoch(trainer) -> None:
    """As nnU-Net's run_training."""
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    steps = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(trainer.num_iterations_per_epoch)]
    trainer.on_train_epoch_end(steps)
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val))])
    trainer.on_epoch_end()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("epoch", range(4))
def test_save_and_load_at_any_epoch(name, epoch, tiny, tmp_path):
    """Queues, pointers, class means, teacher and the next losses are those of the run that goes on."""
    first = build(tiny, name=name, num_epochs=4, num_iterations_per_epoch=1)
    for e in range(epoch + 1):
        first.current_epoch = e
        first.train_step(make_batch(first, e))
    first.save_checkpoint(str(tmp_path / "c.pth"))
    second = make(tiny, name, num_epochs=4, num_iterations_per_epoch=1, resume=True)
    second.load_checkpoint(str(tmp_path / "c.pth"))
    assert second.current_epoch == epoch + 1
    results = []
    for trainer in (first, second):
        trainer.current_epoch, trainer._steps_in_epoch = min(epoch + 1, 3), 0
        torch.manual_seed(7)
        batch = make_batch(trainer, 9)
        values = {n: v for n, (_, v) in step_losses(trainer, batch, trainer.progress).items()}
        torch.manual_seed(7)
        trainer.train_step(batch)
        results.append((values, state(trainer.method), state(trainer.network)))
    for mine, other in zip(*results, strict=True):
        assert mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)
