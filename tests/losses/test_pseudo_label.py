"""Masked Dice against a slow loop with boolean indexing, and its edge cases."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_semisup.losses.pseudo_label import (
    PseudoLabel,
    confidence_weighted_cross_entropy,
    kept,
    largest_components,
    masked_cross_entropy,
    masked_dice,
    mix,
    pseudo_label,
)


def dice(student, target, threshold, regions=False, background=True, weights=None, skip_absent=False):
    """The loss with all classes on, unless ``weights`` says otherwise."""
    weights = torch.ones(student.shape[1]) if weights is None else weights
    keep = kept(target, threshold, weights, regions)
    return masked_dice(student, target, keep, weights, regions, background, 1e-5, skip_absent)


def slow_dice(student, target, threshold, regions, include_background, smooth):
    losses = []
    for c in range(student.shape[1]):
        if c == 0 and not regions and not include_background:
            continue
        index = c if regions else 0
        keep = target.confidence[:, index] >= threshold
        p = student[:, c][keep].double()
        y = (target.label[:, index] == (1 if regions else c))[keep].double()
        losses.append(1 - (2 * (p * y).sum() + smooth) / (y.sum() + (p * p).sum() + smooth))
    return float(sum(losses) / len(losses))


@settings(max_examples=60)
@given(
    st.booleans(),
    st.booleans(),
    st.integers(2, 4),
    st.floats(0, 1),
    st.sampled_from([(5, 4), (3, 4, 5)]),
    st.integers(0, 999),
)
def test_equals_a_slow_loop(regions, background, heads, threshold, shape, seed):
    torch.manual_seed(seed)
    logits, other = 2 * torch.randn(2, 2, heads, *shape)
    student = torch.sigmoid(logits) if regions else torch.softmax(logits, 1)
    target = pseudo_label(other, regions)
    loss = dice(student, target, threshold, regions, background)
    assert float(loss) == pytest.approx(slow_dice(student, target, threshold, regions, background, 1e-5), abs=1e-6)
    assert -1e-6 <= float(loss) <= 1


@pytest.mark.parametrize("regions", [False, True])
def test_pseudo_labels(regions):
    logits = torch.randn(2, 3, 4, 5, 6, requires_grad=True)
    label, confidence = pseudo_label(logits, regions)
    assert not label.requires_grad and not confidence.requires_grad
    p = (torch.sigmoid(logits) if regions else torch.softmax(logits, 1)).detach()
    if regions:
        assert torch.equal(label, (p > 0.5).long()) and float(confidence.min()) >= 0.5
    else:
        assert torch.equal(label[:, 0], p.argmax(1)) and torch.equal(confidence[:, 0], p.max(1).values)


def test_threshold_is_inclusive_and_dropped_voxels_do_not_count():
    student = torch.tensor([[[[0.6, 0.3, 0.9]], [[0.4, 0.7, 0.1]]]], requires_grad=True)  # (1, 2, 1, 3)
    target = PseudoLabel(torch.tensor([[[[0, 1, 1]]]]), torch.tensor([[[[0.85, 0.9, 0.8499]]]]))
    loss = dice(student, target, 0.85)
    loss.backward()
    assert student.grad[..., 2].abs().max() == 0 and (student.grad[..., :2] != 0).all()
    changed = student.detach().clone()
    changed[..., 2] = 0.5
    assert torch.equal(dice(changed, target, 0.85), loss.detach())


def test_nothing_confident_is_exactly_zero_without_gradient():
    student = torch.rand(2, 3, 4, 4, requires_grad=True)
    target = pseudo_label(torch.randn(2, 3, 4, 4), False)
    loss = dice(student, target, 1.1)
    loss.backward()
    assert loss.item() == 0 and not student.grad.any()


def test_agreeing_one_hot_is_zero():
    label = torch.randint(0, 3, (2, 1, 4, 4))
    student = torch.nn.functional.one_hot(label[:, 0], 3).movedim(-1, 1).float()
    target = PseudoLabel(label, torch.ones(label.shape))
    assert float(dice(student, target, 0.85)) == pytest.approx(0, abs=1e-6)


def test_mix_moves_label_and_confidence_alike():
    a, b = (pseudo_label(torch.randn(2, 3, 4, 4), False) for _ in range(2))
    box = torch.rand(2, 1, 4, 4) > 0.5
    mixed = mix(a, b, box)
    for part, inside, outside in zip(mixed, a, b, strict=True):
        assert torch.equal(part[box], inside[box]) and torch.equal(part[~box], outside[~box])


def weighted_ce(confidence, label=None, logits=None):
    logits = torch.randn(3, 4, 5, 5) if logits is None else logits
    label = torch.randint(0, 4, (3, 1, 5, 5)) if label is None else label
    target = PseudoLabel(label, confidence)
    return logits, label, confidence_weighted_cross_entropy(logits, target, 0.97, torch.ones(4), False)


def test_weighted_cross_entropy_is_the_mean_if_all_are_confident_and_zero_if_none_is():
    logits, label, (loss, weights) = weighted_ce(torch.full((3, 1, 5, 5), 0.97))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, label[:, 0]))
    assert torch.equal(weights, torch.ones(3))
    _, _, (loss, weights) = weighted_ce(torch.full((3, 1, 5, 5), 0.96))
    assert loss == 0 and not weights.any()


def test_weighted_cross_entropy_equals_a_slow_loop():
    label = torch.randint(-1, 4, (3, 1, 5, 5))
    label[2] = -1  # a patch without any known voxel
    confidence = torch.rand(3, 1, 5, 5) * 0.1 + 0.9
    logits, _, (loss, _) = weighted_ce(confidence, label, torch.randn(3, 4, 5, 5, requires_grad=True))
    total, count = 0.0, 0
    for b in range(3):
        known = label[b, 0] >= 0
        share = float(((confidence[b, 0] >= 0.97) & known).sum()) / max(int(known.sum()), 1)
        for at in known.nonzero().tolist():
            ce = -torch.log_softmax(logits[b, :, at[0], at[1]], 0)[label[b, 0, at[0], at[1]]]
            total, count = total + share * ce, count + 1
    torch.testing.assert_close(loss, total / count)
    loss.backward()
    assert not logits.grad[2].any()


def test_weighted_cross_entropy_without_any_voxel_is_zero():
    _, _, (loss, _) = weighted_ce(torch.ones(3, 1, 5, 5), torch.full((3, 1, 5, 5), -1))
    assert loss == 0
    certain = torch.zeros(3, 4, 5, 5)
    certain[:, 1] = 1000.0  # CE exactly 0 everywhere
    _, _, (loss, _) = weighted_ce(torch.ones(3, 1, 5, 5), torch.ones(3, 1, 5, 5, dtype=torch.int64), certain)
    assert loss == 0


def test_weighted_cross_entropy_of_regions():
    logits, label = torch.randn(2, 3, 4, 4), torch.randint(0, 2, (2, 3, 4, 4))
    confidence = torch.ones(2, 3, 4, 4)
    confidence[0, 2] = 0.5  # one uncertain head is enough
    loss, weights = confidence_weighted_cross_entropy(logits, PseudoLabel(label, confidence), 0.97, torch.ones(3), True)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    torch.testing.assert_close(loss, bce(logits[1], label[1].float()) / 2)
    assert weights.tolist() == [0, 1]


def test_voxels_count_as_much_as_their_class():
    target = PseudoLabel(torch.tensor([[[0, 1, 2, 2]]]), torch.tensor([[[0.9, 0.9, 0.9, 0.5]]]))
    assert kept(target, 0.8, torch.tensor([0.0, 1.0, 0.25]), False).tolist() == [[[0, 1, 0.25, 0]]]
    regions = PseudoLabel(torch.tensor([[[1, 0], [0, 1]]]), torch.tensor([[[0.9, 0.9], [0.9, 0.5]]]))
    assert kept(regions, 0.8, torch.tensor([0.5, 1.0]), True).tolist() == [[[0.5, 0.5], [1, 0]]]


def test_a_class_without_a_kept_voxel_gets_no_gradient_where_absent_ones_are_skipped():
    """Otherwise its Dice pushes it to 0 on every kept voxel."""
    logits = torch.randn(1, 3, 6, 6)
    target = PseudoLabel(torch.randint(0, 2, (1, 1, 6, 6)), torch.ones(1, 1, 6, 6))  # class 2 is nowhere
    gradients = []
    for skip in (True, False):
        p = logits.softmax(1).requires_grad_()
        dice(p, target, 0.5, skip_absent=skip).backward()
        gradients.append(p.grad[:, 2])
    assert not gradients[0].any() and (gradients[1] > 0).all()
    two = logits.softmax(1)
    both = (dice(two, target, 0.5, skip_absent=True), dice(two[:, :2], target, 0.5))
    torch.testing.assert_close(*both)


def test_a_class_of_weight_zero_does_not_change_the_cross_entropy_of_the_others():
    """Its voxels give nothing, and stay in the mean: no jump when a weight reaches 0."""
    logits, label = torch.randn(2, 3, 5, 5), torch.randint(0, 3, (2, 1, 5, 5))
    target, gradients = PseudoLabel(label, torch.ones(label.shape)), []
    for weight in (1e-7, 0.0):
        x = logits.clone().requires_grad_()
        confidence_weighted_cross_entropy(x, target, 0.9, torch.tensor([weight, 1.0, 1.0]), False)[0].backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
    assert not gradients[1].movedim(1, -1)[label[:, 0] == 0].any()


@pytest.mark.parametrize("regions", [False, True])
def test_masked_cross_entropy_is_the_mean_over_all_voxels(regions):
    logits = torch.randn(2, 3, 4, 5)
    target = pseudo_label(torch.randn(2, 3, 4, 5), regions)
    keep = torch.rand(target.label.shape)
    if regions:
        p = torch.where(target.label.bool(), torch.sigmoid(logits), 1 - torch.sigmoid(logits))
    else:
        p = torch.softmax(logits, 1).gather(1, target.label)
    torch.testing.assert_close(
        masked_cross_entropy(logits, target, keep, regions), -(keep * p.log()).sum() / keep.numel()
    )


def test_largest_components_of_each_class_and_sample():
    label = torch.zeros(2, 1, 6, 6, dtype=torch.int64)
    label[0, 0, 0, :3] = 1
    label[0, 0, 4, 4] = label[0, 0, 5, 5] = 1  # a corner connects: two voxels, fewer than three
    label[0, 0, 3, 0] = 2
    label[1, 0, 5, :2] = 1
    expected = label.clone()
    expected[0, 0, 4, 4] = expected[0, 0, 5, 5] = 0
    assert torch.equal(largest_components(label), expected)
    regions = torch.cat([label == 1, label > 0], 1)
    kept_regions = largest_components(regions)
    assert kept_regions.dtype == torch.bool
    assert torch.equal(kept_regions[:, 0], expected[:, 0] == 1)
    assert not kept_regions[0, 1, 3, 0], "of the region, not of the class"
    assert not largest_components(torch.zeros_like(label)).any()
