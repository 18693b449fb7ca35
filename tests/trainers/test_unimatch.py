"""UniMatch, FixMatch and online self-training, in closed form."""

import pytest
import torch
from helpers import make_batch

from nnunetv2_semisup.losses.consistency import probabilities
from nnunetv2_semisup.network import taps
from nnunetv2_semisup.perturbations import image as image_views

NAME = "nnUNetTrainerUniMatch"
FIXMATCH = {"strong_views": 1, "w_strong": 2.0, "w_feature": 0.0}


def build(dataset, configuration="3d_fullres", **settings):
    torch.manual_seed(0)
    trainer = dataset.trainer(NAME, configuration, **settings)
    trainer.initialize()
    return trainer


def terms(trainer, batch):
    groups = trainer.method.losses(trainer.network, batch, batch["unlabelled"], 0.5)
    return {name: term for group in groups for name, term in group.items()}


def dice_against_own_decision(trainer, images):
    """Mean over classes of 1 - (2 sum p y + s) / (sum y + sum p^2 + s), y the network's own arg max."""
    with torch.no_grad():
        p = probabilities(taps.logits(trainer.network, images), False)
    losses = []
    for c in range(p.shape[1]):
        y = (p.argmax(1) == c).float()
        if y.any():
            q = p[:, c]
            losses.append(1 - (2 * (q * y).sum() + 1e-5) / (y.sum() + (q * q).sum() + 1e-5))
    return sum(losses).item() / len(losses)


@pytest.mark.parametrize("changes", [{}, FIXMATCH])
def test_without_perturbation_every_term_is_the_dice_against_the_own_decision(tiny, changes):
    still = {"strong_intensity_probability": 0.0, "strong_blur_probability": 0.0, "box_probability": 0.0}
    trainer = build(tiny, threshold=0.0, feature_dropout=0.0, **still, **changes)
    batch = make_batch(trainer)
    found = terms(trainer, batch)
    expected = dice_against_own_decision(trainer, batch["unlabelled"]["data"])
    names = {"strong_1", "supervised"} if changes else {"feature", "strong_1", "strong_2", "supervised"}
    assert set(found) == names
    for name in names - {"supervised"}:
        assert found[name][1].item() == pytest.approx(expected, abs=1e-5), name


def test_weights_are_the_published_ones_over_the_supervised_loss(tiny):
    """0.25, 0.25, 0.5 beside (CE + Dice) / 2, all halved: four times that beside nnU-Net's CE + Dice, halved too."""
    trainer = build(tiny, preset="published")
    found = {name: weight for name, (weight, _) in terms(trainer, make_batch(trainer)).items()}
    published = {"strong_1": 0.25 / 2, "strong_2": 0.25 / 2, "feature": 0.5 / 2, "supervised": 0.5 / 2}
    assert found == {name: 4 * weight for name, weight in published.items()}


def test_where_no_voxel_is_confident_nothing_is_learned(tiny):
    trainer = build(tiny, threshold=1.0)
    batch = make_batch(trainer)
    for group in trainer.method.losses(trainer.network, batch, batch["unlabelled"], 0.5):
        if "supervised" in group:
            continue
        trainer.network.zero_grad()
        sum(value for _, value in group.values()).backward()
        assert all(p.grad is None or not p.grad.any() for p in trainer.network.parameters()), list(group)


def test_a_box_of_the_whole_patch_takes_image_and_label_of_the_partner(tiny, monkeypatch):
    still = {"strong_intensity_probability": 0.0, "strong_blur_probability": 0.0, "box_probability": 1.0}
    trainer = build(tiny, threshold=0.0, **still, **FIXMATCH)
    monkeypatch.setattr(image_views, "draw_boxes", lambda images, *_: torch.ones_like(images[:, :1], dtype=torch.bool))
    batch = make_batch(trainer)
    assert trainer.method.wants_partners
    expected = dice_against_own_decision(trainer, batch["unlabelled"]["partners"])
    assert terms(trainer, batch)["strong_1"][1].item() == pytest.approx(expected, abs=1e-5)


def test_the_weak_view_of_fixmatch_has_no_gradient(tiny):
    trainer = build(tiny, **FIXMATCH)
    images = make_batch(trainer)["unlabelled"]["data"].requires_grad_()
    own, feature = trainer.method._weak_view(trainer.network, images)
    assert feature is None and not own.confidence.requires_grad


def test_weights_of_heads_reach_every_term(tiny):
    trainer = build(tiny, threshold=0.0)
    trainer.method.head_weights.zero_()
    found = terms(trainer, make_batch(trainer))
    assert all(value.item() == 0 for name, (_, value) in found.items() if name != "supervised")


def test_online_self_training_needs_no_partners(tiny):
    trainer = build(tiny, threshold=0.0, box_probability=0.0, **FIXMATCH)
    batch = make_batch(trainer)
    batch["unlabelled"].pop("partners", None)
    assert set(terms(trainer, batch)) == {"strong_1", "supervised"}
    assert trainer.method.diagnostics["share_confident"] == 1
