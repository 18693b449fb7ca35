"""The invariants of CrossMatch (methods as published; see the module's docstring for the terms)."""

import math
from functools import partial

import pytest
import torch
from helpers import make_batch

from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.network import taps
from nnunetv2_semisup.perturbations import image as image_views
from nnunetv2_semisup.trainers import crossmatch

NAME = "nnUNetTrainerCrossMatch"
TERMS = ["teacher_1", "teacher_2", "image_1", "image_2", "teacher_3", "decoder_1", "teacher_4", "decoder_2"]
# An untrained network is confident nowhere at 0.85, and every loss would be 0.
LOW = {"conf_tau": 0.52}


def build(dataset, configuration="3d_fullres", **settings):
    torch.manual_seed(3)
    trainer = dataset.trainer(NAME, configuration, **LOW | settings)
    trainer.initialize()
    with torch.no_grad():  # logits of a useful size
        for layer in trainer.network.decoder.seg_layers:
            layer.weight.mul_(20)
    return trainer


def terms(trainer, batch, progress=0.5, seed=11) -> dict[str, tuple[float, torch.Tensor]]:
    torch.manual_seed(seed)
    found = {}
    for group in trainer.method.losses(trainer.network, batch, batch["unlabelled"], progress):
        found |= group
    return found


def returned(generator):
    """What it returns at its end."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


def values(found) -> dict[str, float]:
    return {name: value.item() for name, (_, value) in found.items()}


def gradients(trainer) -> dict[str, torch.Tensor]:
    found = {k: p.grad.clone() for k, p in trainer.network.named_parameters() if p.grad is not None}
    trainer.network.zero_grad()
    return found


# --------------------------------------------------------------------------------- the released plan, written plainly


def slow_dice(logits, label, confidence, threshold, regions):
    p = torch.sigmoid(logits) if regions else torch.softmax(logits, 1)
    losses = []
    for c in range(p.shape[1]):
        index = c if regions else 0
        keep = confidence[:, index] >= threshold
        pc, y = p[:, c][keep], (label[:, index][keep] == (1 if regions else c)).float()
        losses.append(1 - (2 * (pc * y).sum() + 1e-5) / (y.sum() + (pc * pc).sum() + 1e-5))
    return sum(losses) / len(losses)


def decide(logits, regions):
    if regions:
        p = torch.sigmoid(logits)
        return (p > 0.5).long(), torch.maximum(p, 1 - p)
    confidence, label = torch.softmax(logits, 1).max(1, keepdim=True)
    return label, confidence


def released_plan(trainer, batch, drawn) -> torch.Tensor:
    """Four passes with concatenated batches as in the released code, one total, random numbers given."""
    network, regions = trainer.network, trainer.label_manager.has_regions
    u, m = batch["unlabelled"]["data"], batch["unlabelled"]["partners"]
    masks, views, boxes = drawn["draw_channel_masks"], drawn["draw_strong_view"], drawn["draw_boxes"]

    def decode(skips):
        return network.decoder(skips)[0]

    def streams(images, weak, strong):
        """logits of [images, images with weak, images with strong features], decoded as one batch"""
        skips = network.encoder(images)
        views = [skips, *([s * f for s, f in zip(skips, factors, strict=True)] for factors in (weak, strong))]
        return decode([torch.cat(level) for level in zip(*views, strict=True)]).chunk(3)

    with torch.no_grad():
        m_clean, m_weak, m_strong = (decide(z, regions) for z in streams(m, masks[2], masks[3]))
    z_clean, z_weak, z_strong = streams(u, masks[0], masks[1])
    u_clean, u_weak, u_strong = (decide(z.detach(), regions) for z in (z_clean, z_weak, z_strong))
    apply = image_views.apply_strong_view
    mixed = [
        torch.where(box, apply(m, view_m), apply(u, view_u))
        for box, view_m, view_u in ((boxes[0], *views[:2]), (boxes[1], *views[2:]))
    ]
    s1 = decode(network.encoder(mixed[0]))
    s2, s2_weak, s2_strong = streams(mixed[1], masks[4], masks[5])

    def where(box, inside, outside):
        return [torch.where(box, a, b) for a, b in zip(inside, outside, strict=True)]

    y1, y2 = where(boxes[0], m_clean, u_clean), where(boxes[1], m_clean, u_clean)
    y2_weak, y2_strong = where(boxes[1], m_weak, u_weak), where(boxes[1], m_strong, u_strong)

    def dice(logits, target):
        return slow_dice(logits, *target, LOW["conf_tau"], regions)

    tkd = (dice(z_weak, u_clean) + dice(z_strong, u_clean) + dice(s2_weak, y2) + dice(s2_strong, y2)) / 4
    dkd = (dice(s2_weak, y2_weak) + dice(s2_strong, y2_strong)) / 2
    supervised = trainer.loss(network(batch["data"]), batch["target"])
    return supervised + 0.5 * dice(s1, y1) + 0.5 * dice(s2, y2) + 0.7 * tkd + 0.3 * dkd


@pytest.mark.parametrize(
    ("configuration", "kind"), [("3d_fullres", "2 classes"), ("2d", "4 classes"), ("3d_fullres", "regions")]
)
def test_trimmed_groups_have_the_gradients_of_the_released_plan(configuration, kind, datasets, use, monkeypatch):
    """Groups one after the other, clean decode without gradient, unused passes left out: the same gradient."""
    trainer = build(use(datasets(kind)), configuration, box_probability=1.0, guards=False)
    batch = make_batch(trainer)
    drawn = {}
    draws = {"draw_channel_masks": crossmatch, "draw_strong_view": image_views, "draw_boxes": image_views}
    for name, module in draws.items():
        original = getattr(module, name)

        def recorded(*args, original=original, name=name):
            result = original(*args)
            drawn.setdefault(name, []).append(result)
            return result

        monkeypatch.setattr(module, name, recorded)
    torch.manual_seed(1)
    for group in trainer.method.losses(trainer.network, batch, batch["unlabelled"], 0.5):
        sum(weight * value for weight, value in group.values()).backward()
    mine = gradients(trainer)
    released_plan(trainer, batch, drawn).backward()
    expected = gradients(trainer)
    assert mine.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    for key in expected:
        torch.testing.assert_close(mine[key], expected[key], rtol=1e-4, atol=1e-6 * scale)


def test_joint_backward_equals_groups(tiny, monkeypatch):
    """One encoder pass for several decoder passes that are back-propagated one by one: the sum of their gradients."""
    trainer = build(tiny)
    batch = make_batch(trainer)
    torch.manual_seed(5)
    for group in trainer.method.losses(trainer.network, batch, batch["unlabelled"], 0.5):
        sum(weight * value for weight, value in group.values()).backward()
    grouped = gradients(trainer)
    monkeypatch.setattr(taps, "share", lambda skips: skips)
    monkeypatch.setattr(taps, "back_propagate_shared", lambda skips, shared: None)
    sum(weight * value for weight, value in terms(trainer, batch, seed=5).values()).backward()
    joint = gradients(trainer)
    scale = max(float(g.abs().max()) for g in joint.values())
    for key in joint:
        torch.testing.assert_close(grouped[key], joint[key], rtol=1e-6, atol=1e-6 * scale)


# ----------------------------------------------------------------------------------------------------------- invariants


def test_terms_come_in_order_and_labelled_last(tiny):
    trainer = build(tiny)
    found = terms(trainer, make_batch(trainer))
    assert list(found) == [*TERMS, "supervised"]
    assert all(value > 0 for value in values(found).values() if value is not None)


def test_without_channel_dropout_the_streams_are_equal(tiny):
    trainer = build(tiny, p_weak=0.0, p_strong=0.0)
    found = values(terms(trainer, make_batch(trainer)))
    assert found["teacher_1"] == found["teacher_2"]
    assert found["image_2"] == found["teacher_3"] == found["teacher_4"] == found["decoder_1"] == found["decoder_2"]


def test_channel_dropout_stays_active_in_evaluation_mode(tiny):
    trainer = build(tiny)
    trainer.network.eval()
    trainer.method.eval()
    found = values(terms(trainer, make_batch(trainer)))
    assert found["teacher_1"] != found["teacher_2"]


@pytest.mark.parametrize(("eta", "zero"), [(0.0, "decoder"), (1.0, "teacher")])
def test_eta_switches_terms_off(tiny, eta, zero):
    trainer = build(tiny, eta=eta)
    weights = {name: weight for name, (weight, _) in terms(trainer, make_batch(trainer)).items()}
    assert all((weights[name] == 0) == name.startswith(zero) for name in TERMS)


def test_weights_follow_the_published_totals(tiny):
    """ACDC code: L_sup + L_s1 / 4 + L_s2 / 4 + L_kd / 2, doubled because nnU-Net's loss is 2 L_sup."""
    trainer = build(tiny)
    weights = {n: w for n, (w, _) in terms(trainer, make_batch(trainer)).items()}
    assert weights == pytest.approx(
        {"image_1": 0.5, "image_2": 0.5, "supervised": 1.0}
        | {f"teacher_{i}": 0.7 / 4 for i in (1, 2, 3, 4)}
        | {f"decoder_{i}": 0.3 / 2 for i in (1, 2)}
    )


def test_labels_reach_the_supervised_term_alone(tiny):
    trainer = build(tiny)
    batch, other = make_batch(trainer), make_batch(trainer, 1)
    first = values(terms(trainer, batch))
    relabelled = values(terms(trainer, batch | {"target": other["target"]}))
    assert relabelled.pop("supervised") != first["supervised"]
    reimaged = values(terms(trainer, batch | {"data": other["data"]}))
    assert reimaged.pop("supervised") != first.pop("supervised")
    assert relabelled == reimaged == first


def test_views_share_the_geometry_of_the_weak_view(tiny):
    """No intensity change and no box: both strong views are u itself, and m is not seen."""
    trainer = build(tiny, strong_intensity_probability=0.0, strong_blur_probability=0.0, box_probability=0.0)
    batch = make_batch(trainer)
    u, m = batch["unlabelled"]["data"], batch["unlabelled"]["partners"]
    images, box = trainer.method._strong_view(u, m)
    assert torch.equal(images, u) and not box.any()
    before = values(terms(trainer, batch))
    assert before["image_1"] == before["image_2"]
    batch["unlabelled"]["partners"] = torch.randn_like(m)
    assert values(terms(trainer, batch)) == before


def test_inside_the_box_image_and_label_are_the_partners(tiny):
    trainer = build(tiny, strong_intensity_probability=0.0, strong_blur_probability=0.0, box_probability=1.0)
    u, m = torch.randn(2, 2, 1, 16, 16, 16)
    images, box = trainer.method._strong_view(u, m)
    assert torch.equal(images[box], m[box]) and torch.equal(images[~box], u[~box]) and box.any()


@pytest.mark.parametrize(
    ("tau", "progress", "expected"),
    [(0.75, 1 / 14000, 0.521), (0.75, 6 / 14, 0.541), (0.75, 1.0, 0.668), (0.85, 1.0, 0.678)],
)
def test_threshold_of_the_released_la_code(tiny, tau, progress, expected):
    method = build(tiny, conf_mode="ramp_ln2", conf_tau=tau).method
    assert method.threshold(0.0) == tau
    assert method.threshold(progress) == pytest.approx(expected, abs=6e-4)
    assert method.threshold(progress) < math.log(2)


def test_fixed_threshold_is_fixed(tiny):
    method = build(tiny, conf_tau=0.85).method
    assert {method.threshold(p) for p in (0.0, 0.3, 1.0)} == {0.85}


def test_nothing_confident_teaches_nothing(tiny):
    trainer = build(tiny, conf_tau=1.0)
    batch = make_batch(trainer)
    with torch.no_grad():
        for layer in trainer.network.decoder.seg_layers:
            layer.weight.mul_(0.01)
    for group in trainer.method.losses(trainer.network, batch, batch["unlabelled"], 0.5):
        if "supervised" not in group:
            assert all(value.item() == 0 for _, value in group.values())
            sum(value for _, value in group.values()).backward()
    assert not any(g.any() for g in gradients(trainer).values())


def test_batch_roll_draws_once_and_takes_the_neighbours_labels(tiny):
    assert build(tiny).method.wants_partners
    assert not build(tiny, mix_source="batch_roll").method.wants_partners
    trainer = build(tiny, mix_source="batch_roll", unlabeled_batch_size=3)  # of two, both neighbours are the same
    batch = make_batch(trainer)
    assert list(terms(trainer, batch)) == [*TERMS, "supervised"]
    images = batch["unlabelled"]["data"]
    own = returned(trainer.method._weak_view(trainer.network, images, partial(trainer.method._dice, threshold=0.5), 1))
    partners = images.roll(1, 0)
    others = trainer.method._labels_of_partners(trainer.network, None, own)
    for i, partner in enumerate(partners):
        (neighbour,) = [j for j in range(3) if torch.equal(images[j], partner)]
        assert neighbour != i
        for mine, other in zip(own, others, strict=True):
            assert torch.equal(other.label[i], mine.label[neighbour])
            assert torch.equal(other.confidence[i], mine.confidence[neighbour])
    with pytest.raises(InputError, match="mix_source = batch_roll needs 2 unlabelled patches per GPU"):
        build(tiny, mix_source="batch_roll", unlabeled_batch_size=1).on_train_start()


def test_a_bias_field_in_ct_is_told(tiny, capsys):
    plans = tiny.plans
    plans["configurations"]["3d_fullres"]["normalization_schemes"] = ["CTNormalization"]
    build(tiny, plans=plans, strong_bias_field=False)
    assert "strong_bias_field" not in capsys.readouterr().out
    build(tiny, plans=plans)
    assert "nnUNetTrainerCrossMatch.strong_bias_field=false" in capsys.readouterr().out


def test_diagnostics_are_shares(tiny):
    trainer = build(tiny)
    trainer.train_step(make_batch(trainer))
    row = trainer.training_log.end_epoch(0)
    shares = {k: v for k, v in row.items() if k.startswith("share_")}
    assert len(shares) == 4 and all(0 <= v <= 1 for v in shares.values()) and shares["share_confident_clean"] > 0
