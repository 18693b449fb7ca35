"""The invariants of UniMatch and FixMatch, in closed form."""

import pytest
import torch
from helpers import counted_cost, make_batch

from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.perturbations import image as image_views
from nnunetv2_semisup.trainers import unimatch

NAME = "nnUNetTrainerUniMatch"
PLAIN = {"intensity_probability": 0.0, "blur_probability": 0.0}  # the strong view is the weak one
FIXMATCH = {"strong_views": 1, "feature_weight": 0.0, "loss": "cross_entropy"}
SELF_TRAINING = {"strong_views": 1, "feature_weight": 0.0, "loss": "nnunet", "threshold": 0.0, "box_probability": 0.0}
KINDS = pytest.mark.parametrize("kind", ["4 classes", "regions"])


def build(dataset, logits=20.0, **settings):
    """An untrained network is sure of nothing: its logits are made larger."""
    torch.manual_seed(3)
    trainer = dataset.trainer(NAME, **settings)
    trainer.initialize()
    with torch.no_grad():
        for layer in trainer.network.decoder.seg_layers:
            layer.weight.mul_(logits)
    return trainer


def terms(trainer, batch) -> dict[str, tuple[float, torch.Tensor]]:
    torch.manual_seed(11)
    found = {}
    for group in trainer.method.losses(trainer.network, batch, batch["unlabelled"], 0.5):
        found |= group
    return found


def gradients(trainer, value) -> dict[str, torch.Tensor]:
    trainer.network.zero_grad()
    value.backward()
    return {k: p.grad.clone() for k, p in trainer.network.named_parameters() if p.grad is not None}


def predict(trainer, images):
    """Probabilities, decision and confidence, a channel per head of the label."""
    logits = trainer.network(images)[0]
    if trainer.label_manager.has_regions:
        p = torch.sigmoid(logits)
        return p, (p > 0.5).long(), torch.maximum(p, 1 - p)
    p = torch.softmax(logits, 1)
    return p, p.argmax(1, keepdim=True), p.amax(1, keepdim=True)


def slow_dice(p, label, confidence, threshold, regions):
    """Of every head with a confident voxel of its own, over its confident voxels."""
    losses = []
    for c in range(p.shape[1]):
        index = c if regions else 0
        keep = confidence[:, index] >= threshold
        pc, y = p[:, c][keep], (label[:, index][keep] == (1 if regions else c)).float()
        if y.any():
            losses.append(1 - (2 * (pc * y).sum() + 1e-5) / (y.sum() + (pc * pc).sum() + 1e-5))
    return sum(losses) / max(1, len(losses))


def test_a_threshold_that_no_voxel_reaches_teaches_nothing(tiny):
    for settings in ({}, FIXMATCH, SELF_TRAINING):
        trainer = build(tiny, logits=1.0, **settings | {"threshold": 1.0})
        found = terms(trainer, make_batch(trainer))
        assert found.pop("supervised")[0] == 1.0
        for weight, value in found.values():
            assert weight > 0 and value == 0
            assert not any(g.any() for g in gradients(trainer, value).values())


def test_weights_are_the_released_quarters_and_half(tiny):
    found = terms(build(tiny), make_batch(build(tiny)))
    weights = {name: weight for name, (weight, _) in found.items()}
    assert weights == {"feature": 1.0, "image_1": 0.5, "image_2": 0.5, "supervised": 1.0}
    unsupervised = sum(weights.values()) - weights["supervised"]
    assert [weights[k] / unsupervised for k in ("image_1", "image_2", "feature")] == [0.25, 0.25, 0.5]


@KINDS
def test_without_perturbation_every_term_is_the_dice_against_the_own_decision(kind, datasets, use):
    """Feature dropout 0, no box, no change of the image: all three terms are the Dice of a slow loop."""
    trainer = build(use(datasets(kind)), feature_dropout=0.0, box_probability=0.0, threshold=0.5, **PLAIN)
    batch = make_batch(trainer)
    assert "partners" not in batch["unlabelled"]
    found = terms(trainer, batch)
    regions = trainer.label_manager.has_regions
    expected = slow_dice(*predict(trainer, batch["unlabelled"]["data"]), 0.5, regions)
    for name in ("feature", "image_1", "image_2"):
        torch.testing.assert_close(found[name][1], expected)


@KINDS
def test_no_gradient_flows_through_the_weak_view_of_the_image_terms(kind, datasets, use):
    """The gradient is that of a constant pseudo-label."""
    trainer = build(use(datasets(kind)), box_probability=0.0, threshold=0.5, **FIXMATCH | {"loss": "dice"}, **PLAIN)
    batch = make_batch(trainer)
    mine = gradients(trainer, terms(trainer, batch)["image_1"][1])
    p, label, confidence = predict(trainer, batch["unlabelled"]["data"])
    constant = slow_dice(p, label, confidence.detach(), 0.5, trainer.label_manager.has_regions)
    for key, expected in gradients(trainer, constant).items():
        torch.testing.assert_close(mine[key], expected, rtol=1e-3, atol=1e-6)


def test_feature_dropout_perturbs_every_skip_and_the_clean_pass_is_untouched(tiny, monkeypatch):
    trainer = build(tiny, image_weight=0.0)
    batch = make_batch(trainer)
    seen = []
    drop = unimatch.drop_channels
    monkeypatch.setattr(unimatch, "drop_channels", lambda skips, masks: seen.append(masks) or drop(skips, masks))
    labels = []
    dice = unimatch.masked_dice
    monkeypatch.setattr(
        unimatch, "masked_dice", lambda p, target, *a, **k: labels.append(target) or dice(p, target, *a, **k)
    )
    terms(trainer, batch)
    (masks,) = seen
    assert len(masks) == 3 and all(set(m.unique().tolist()) <= {0.0, 2.0} for m in masks)
    _, label, confidence = predict(trainer, batch["unlabelled"]["data"])
    assert torch.equal(labels[0].label, label)
    torch.testing.assert_close(labels[0].confidence, confidence)


@KINDS
@pytest.mark.parametrize("whole", [True, False])
def test_image_and_pseudo_label_move_alike_under_the_box(kind, whole, datasets, use, monkeypatch):
    """Coordinates as images: each voxel of the strong view is that voxel of the patch, or of the partner in the box."""
    trainer = build(use(datasets(kind)), feature_weight=0.0, box_probability=1.0, **PLAIN)
    batch = make_batch(trainer)
    size = trainer.configuration_manager.patch_size
    place = torch.arange(1.0, 1 + torch.Size(size).numel()).reshape(1, 1, *size).expand(2, -1, *size)
    batch["unlabelled"] |= {"data": place, "partners": -place}
    if whole:
        monkeypatch.setattr(image_views, "draw_boxes", lambda images, *a: torch.ones_like(images[:, :1]).bool())
    images, targets = [], []
    encode, loss = unimatch.taps.encode, trainer.method._loss
    monkeypatch.setattr(unimatch.taps, "encode", lambda n, x: images.append(x) or encode(n, x))
    monkeypatch.setattr(trainer.method, "_loss", lambda output, t: targets.append(t) or loss(output, t))
    terms(trainer, batch)
    monkeypatch.undo()
    with torch.no_grad():
        (_, mine, _), (_, theirs, _) = (predict(trainer, x) for x in (place, -place))
    views = images[2:4]  # weak view, partners, the strong views, labelled
    for image, target in zip(views, targets, strict=True):
        inside = image < 0
        assert torch.equal(image.abs(), place)
        assert inside.all() if whole else 0 < inside.float().mean() < 0.5
        assert torch.equal(target.label, torch.where(inside, theirs, mine))
    assert whole or not torch.equal(*(view < 0 for view in views)), "each view has a box of its own"


@KINDS
def test_fixmatch_is_the_cross_entropy_of_confident_voxels_over_all_voxels(kind, datasets, use):
    trainer = build(use(datasets(kind)), **FIXMATCH, box_probability=0.0, threshold=0.6, **PLAIN)
    batch = make_batch(trainer)
    found = terms(trainer, batch)
    assert found.keys() == {"image_1", "supervised"} and found["image_1"][0] == 1.0
    _, label, confidence = predict(trainer, batch["unlabelled"]["data"])
    # the probability of what was decided is the confidence
    expected = torch.where(confidence >= 0.6, -confidence.log(), 0.0).sum() / label.numel()
    torch.testing.assert_close(found["image_1"][1], expected)


def test_online_self_training_is_nnunets_loss_on_the_students_own_decision(tiny):
    trainer = build(tiny, **SELF_TRAINING, **PLAIN)
    batch = make_batch(trainer)
    found = terms(trainer, batch)
    images = batch["unlabelled"]["data"]
    with torch.no_grad():
        output = trainer.network(images)
    label = output[0].argmax(1, keepdim=True)
    assert len(label.unique()) == 2, "both classes must be there for the two losses to be one"
    target = [
        label if i == 0 else label[(..., *[slice(2**i - 2 ** (i - 1), None, 2**i)] * 3)] for i in range(len(output))
    ]
    torch.testing.assert_close(found["image_1"][1].detach(), trainer.loss(output, target))


@KINDS
def test_a_class_without_weight_counts_nowhere(kind, datasets, use):
    for loss in ("dice", "cross_entropy", "nnunet"):
        trainer = build(use(datasets(kind)), threshold=0.0, loss=loss)
        batch = make_batch(trainer)
        assert all(value.item() != 0 for _, value in terms(trainer, batch).values())
        trainer.method.head_weights.zero_()
        found = terms(trainer, batch)
        found.pop("supervised")
        assert all(value.item() == 0 for _, value in found.values())


def test_boxes_out_of_order_are_refused(tiny):
    with pytest.raises(InputError, match="box_volume"):
        tiny.trainer(NAME, box_volume=(0.4, 0.02))


@pytest.mark.parametrize(("settings", "counted"), [({}, 4.5), (FIXMATCH, 2.7), (SELF_TRAINING, 2.33)])
def test_cost(tiny, settings, counted):
    assert counted_cost(tiny, NAME, **settings) < 1.1 * counted
