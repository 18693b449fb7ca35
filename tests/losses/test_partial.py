"""nnU-Net's loss on partly known patches, against nnU-Net's own and against a slow loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from nnunetv2_semisup.losses.partial import partial_dice_cross_entropy

SMOOTH = 1e-5


def nnunets(regions: bool, batch_dice: bool, ignore: bool = False):
    dice = {"batch_dice": batch_dice, "smooth": SMOOTH, "do_bg": regions, "ddp": False}
    if regions:
        return DC_and_BCE_loss({}, dice, use_ignore_label=ignore, dice_class=MemoryEfficientSoftDiceLoss)
    return DC_and_CE_loss(dice, {}, ignore_label=-1 if ignore else None, dice_class=MemoryEfficientSoftDiceLoss)


def patches(regions: bool, heads: int = 3, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, heads, 6, 5, 4, generator=generator)
    if regions:
        return logits, torch.rand(logits.shape, generator=generator) > 0.5
    return logits, torch.randint(0, heads, (2, 1, 6, 5, 4), generator=generator)


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("regions", [False, True])
def test_all_known_is_nnunets_loss(regions, batch_dice):
    logits, label = patches(regions)
    ones = torch.ones(2, 1, 6, 5, 4)
    mine = partial_dice_cross_entropy(logits, label, ones, torch.ones(3), regions, batch_dice, False, SMOOTH)
    torch.testing.assert_close(mine, nnunets(regions, batch_dice)(logits, label))


def slow(logits, label, weight, factors, include_background, batch_dice):
    """Voxel by voxel, softmax."""
    p = logits.softmax(1).double()
    samples, heads = p.shape[:2]
    ce, voxels = 0.0, label.numel()
    groups = [range(samples)] if batch_dice else [[b] for b in range(samples)]
    for b in range(samples):
        for i, value in enumerate(label[b].flatten().tolist()):
            ce -= weight[b].flatten()[i].double() * p[b, value].flatten()[i].log()
    dices, present = 0.0, 0
    for group in groups:
        for c in range(0 if include_background else 1, heads):
            overlap = volume = predicted = 0.0
            for b in group:
                w, q = weight[b, 0].double(), p[b, c]
                y = (label[b, 0] == c).double()
                overlap += float((w * q * y).sum())
                volume += float((w * y).sum())
                predicted += float((w * q).sum())
            if volume > 0:
                present += 1
                dices += float(factors[c]) * (2 * overlap + SMOOTH) / (volume + predicted + SMOOTH)
    return ce / voxels - (dices / present if present else 0.0)


@given(st.integers(0, 10**6), st.booleans(), st.booleans())
@settings(max_examples=15)
def test_against_a_slow_loop(seed, batch_dice, include_background):
    logits, label = patches(False, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(label.shape, generator=generator) * (torch.rand(label.shape, generator=generator) > 0.5)
    factors = torch.rand(3, generator=generator)
    mine = partial_dice_cross_entropy(logits, label, weight, factors, False, batch_dice, include_background, SMOOTH)
    assert float(mine) == pytest.approx(
        float(slow(logits, label, weight, factors, include_background, batch_dice)), 1e-4
    )


@pytest.mark.parametrize("regions", [False, True])
def test_nothing_known_teaches_nothing(regions):
    logits, label = patches(regions)
    logits.requires_grad_()
    loss = partial_dice_cross_entropy(
        logits, label, torch.zeros(2, 1, 6, 5, 4), torch.ones(3), regions, True, False, SMOOTH
    )
    loss.backward()
    assert loss == 0 and not logits.grad.any()


def test_a_class_absent_from_the_known_voxels_gets_no_gradient_of_the_dice():
    """Class 2 is labelled on voxels of weight 0 alone: only the CE of the others touches it, not its own Dice."""
    logits, label = patches(False)
    weight = (label != 2).float()
    gradients = []
    for factors in (torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 0.0])):
        x = logits.clone().requires_grad_()
        partial_dice_cross_entropy(x, label, weight, factors, False, True, False, SMOOTH).backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    assert not gradients[0].movedim(1, -1)[label[:, 0] == 2].any(), "unknown voxels get none at all"
