"""CPS: the second network, its start, and the crossed labels."""

import pytest
import torch
from helpers import make_batch

from nnunetv2_semisup.trainers.cps import hard_cross_entropy

NAME = "nnUNetTrainerCPS"


def build(dataset, configuration="3d_fullres", **settings):
    torch.manual_seed(0)
    trainer = dataset.trainer(NAME, configuration, **settings)
    trainer.initialize()
    return trainer


def groups(trainer, batch):
    return list(trainer.method.losses(trainer.network, batch, batch["unlabelled"], 0.5))


def test_networks_have_the_same_keys_and_other_weights(tiny):
    trainer = build(tiny)
    mine, others = trainer.network.state_dict(), trainer.method.second.state_dict()
    assert mine.keys() == others.keys()
    assert not torch.equal(
        mine["encoder.stages.0.0.convs.0.conv.weight"], others["encoder.stages.0.0.convs.0.conv.weight"]
    )


def test_with_the_burn_in_the_second_begins_with_the_firsts_encoder_and_a_decoder_of_its_own(tiny):
    trainer = build(tiny, start_dice=0.5)
    trainer.begin_terms()
    for key, value in trainer.network.state_dict().items():
        other = trainer.method.second.state_dict()[key]
        if key.startswith("encoder"):
            assert torch.equal(value, other), key
        elif key.endswith("conv.weight") and not key.startswith("decoder.encoder"):
            assert not torch.equal(value, other), key


def test_without_burn_in_both_begin_apart(tiny):
    trainer = build(tiny)
    before = {k: v.clone() for k, v in trainer.method.second.state_dict().items()}
    trainer.method.reset(trainer.network)
    assert all(torch.equal(before[k], v) for k, v in trainer.method.second.state_dict().items())


@pytest.mark.parametrize("kind", ["4 classes", "regions"])
def test_crossed_terms_are_symmetric_under_swapping_the_networks(datasets, use, kind):
    trainer = build(use(datasets(kind)))
    batch = make_batch(trainer)
    first = groups(trainer, batch)[0]
    network, method = trainer.network, trainer.method
    mine, others = ({k: v.clone() for k, v in n.state_dict().items()} for n in (network, method.second))
    network.load_state_dict(others)
    method.second.load_state_dict(mine)
    second = groups(trainer, batch)[0]
    assert second["cross_1"][1].item() == pytest.approx(first["cross_2"][1].item(), rel=1e-5)
    assert second["cross_2"][1].item() == pytest.approx(first["cross_1"][1].item(), rel=1e-5)


def test_each_network_learns_from_its_own_terms_alone(tiny):
    trainer = build(tiny)
    network, second = trainer.network, trainer.method.second
    crossed, of_second, of_first = groups(trainer, make_batch(trainer))

    def reached(value):
        for n in (network, second):
            n.zero_grad()
        value.backward(retain_graph=True)
        return [any(p.grad is not None and p.grad.any() for p in n.parameters()) for n in (network, second)]

    assert reached(crossed["cross_1"][1]) == [True, False] and reached(crossed["cross_2"][1]) == [False, True]
    assert reached(of_second["supervised_2"][1]) == [False, True] and reached(of_first["supervised"][1]) == [
        True,
        False,
    ]


def test_the_second_network_learns_from_labels_at_full_weight_from_the_start(tiny):
    """The trainer's ramp holds for what rests on predictions alone."""
    trainer = build(tiny, ramp_share=0.5)
    weights = {k: w for group in trainer._groups(*split(make_batch(trainer))) for k, (w, _) in group.items()}
    assert weights["supervised"] == weights["supervised_2"] == 1
    assert weights["cross_1"] == weights["cross_2"] == pytest.approx(0.2 * 0.0067, rel=0.01)


def split(batch):
    return {k: v for k, v in batch.items() if k != "unlabelled"}, batch["unlabelled"]


def test_prediction_keeps_the_first_network(tiny):
    trainer = build(tiny)
    assert trainer.method.inference_network(trainer.network) is trainer.network


def test_cross_entropy_against_torch(tiny):
    torch.manual_seed(0)
    logits, label = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    expected = torch.nn.functional.cross_entropy(logits, label)
    assert hard_cross_entropy(logits, label, torch.ones(3), False).item() == pytest.approx(expected.item(), rel=1e-6)
    bits = torch.rand(2, 3, 4, 5) > 0.5
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, bits.float())
    assert hard_cross_entropy(logits, bits, torch.ones(3), True).item() == pytest.approx(expected.item(), rel=1e-6)
    without = hard_cross_entropy(logits, label, torch.tensor([0.0, 1.0, 1.0]), False)
    kept = torch.nn.functional.cross_entropy(logits, label, reduction="none")[label > 0].sum() / label.numel()
    assert without.item() == pytest.approx(kept.item(), rel=1e-6)
