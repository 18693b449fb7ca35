"""The invariants of CPS: symmetry, hard targets, two initialisations, gradients clipped apart."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import counted_cost, make_batch

from nnunetv2_semisup.training.step import MAX_GRADIENT_NORM

NAME = "nnUNetTrainerCPS"
KINDS = pytest.mark.parametrize("kind", ["4 classes", "regions"])


def build(dataset, **settings):
    torch.manual_seed(3)
    trainer = dataset.trainer(NAME, **settings)
    trainer.initialize()
    return trainer


def terms(trainer, batch, progress=0.5) -> dict[str, tuple[float, torch.Tensor]]:
    found = {}
    for group in trainer.method.losses(trainer.network, batch, batch["unlabelled"], progress):
        found |= group
    return found


def values(found) -> dict[str, float]:
    return {name: value.item() for name, (_, value) in found.items()}


def gradients(network) -> dict[str, torch.Tensor]:
    return {k: p.grad.clone() for k, p in network.named_parameters() if p.grad is not None}


def norm(network) -> float:
    return torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients(network).values()])).item()


def test_the_initialisations_differ_and_are_nnunets(tiny):
    trainer = build(tiny)
    first, second = trainer.network.state_dict(), trainer.method.second.state_dict()
    assert first.keys() == second.keys()
    for key, value in first.items():
        if value.ndim > 2:
            assert not torch.equal(value, second[key])
            if value.numel() > 500:
                assert second[key].std() == pytest.approx(float(value.std()), rel=0.15)
        else:
            assert torch.equal(value, second[key]), "norms and biases begin with constants"


@KINDS
def test_cross_terms_equal_the_formula(kind, datasets, use):
    trainer = build(use(datasets(kind)))
    batch = make_batch(trainer)
    found = terms(trainer, batch)
    with torch.no_grad():
        z = [n(batch["unlabelled"]["data"])[0] for n in (trainer.network, trainer.method.second)]
    for i, name in enumerate(("cross_1", "cross_2")):
        if kind == "regions":
            expected = F.binary_cross_entropy_with_logits(z[i], (z[1 - i] > 0).float())
        else:
            expected = F.cross_entropy(z[i], z[1 - i].argmax(1))
        torch.testing.assert_close(found[name][1].detach(), expected)
        assert found[name][0] == 0.2
    for network, name in ((trainer.network, "supervised"), (trainer.method.second, "supervised_2")):
        assert found[name][0] == 1.0
        assert torch.equal(found[name][1], trainer.loss(network(batch["data"]), batch["target"]))


def test_the_first_network_depends_on_the_second_through_its_decision_alone(tiny):
    trainer = build(tiny)
    batch = make_batch(trainer)
    found = []
    for factor in (1.0, 5.0):
        with torch.no_grad():  # other logits, the same decision
            for layer in trainer.method.second.decoder.seg_layers:
                layer.weight.mul_(factor)
                layer.bias.mul_(factor)
        trainer.network.zero_grad()
        terms(trainer, batch)["cross_1"][1].backward()
        found.append(gradients(trainer.network))
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][k], found[1][k]) for k in found[0])
    trainer.method.second.zero_grad()
    terms(trainer, batch)["cross_1"][1].backward()
    assert not gradients(trainer.method.second)


def test_swapping_the_networks_swaps_their_terms(tiny):
    trainer = build(tiny)
    batch = make_batch(trainer)
    before = values(terms(trainer, batch))
    states = [{k: v.clone() for k, v in n.state_dict().items()} for n in (trainer.network, trainer.method.second)]
    trainer.network.load_state_dict(states[1])
    trainer.method.second.load_state_dict(states[0])
    after = values(terms(trainer, batch))
    assert before["cross_1"] != before["cross_2"]
    for a, b in (("cross_1", "cross_2"), ("supervised", "supervised_2")):
        assert (after[a], after[b]) == (before[b], before[a])


def test_equal_networks_have_equal_losses(tiny):
    trainer = build(tiny)
    trainer.method.second.load_state_dict(trainer.network.state_dict())
    found = values(terms(trainer, make_batch(trainer)))
    assert found["cross_1"] == found["cross_2"] and found["supervised"] == found["supervised_2"]
    assert trainer.method.diagnostics["share_disagreement"] == 0


def test_each_network_is_clipped_on_its_own(tiny, monkeypatch):
    """A gradient of the second network that explodes leaves the first one's as it is."""
    trainer = build(tiny)
    batch = make_batch(trainer)
    losses = trainer.method.losses

    def exploding(*arguments):
        for group in losses(*arguments):
            yield {k: (w * (1e6 if k == "supervised_2" else 1), value) for k, (w, value) in group.items()}

    monkeypatch.setattr(trainer.method, "losses", exploding)
    found = terms(trainer, batch)
    sum(w * value for k, (w, value) in found.items() if k in ("supervised", "cross_1")).backward()
    expected = gradients(trainer.network)
    assert norm(trainer.network) < MAX_GRADIENT_NORM
    trainer.train_step(batch)
    for key, gradient in gradients(trainer.network).items():
        torch.testing.assert_close(gradient, expected[key])
    assert norm(trainer.method.second) == pytest.approx(MAX_GRADIENT_NORM, rel=1e-4)


def test_the_ramp_holds_back_neither_networks_labels(tiny):
    trainer = build(tiny, ramp_share=1.0)
    trainer.training_log.start_epoch()
    trainer.train_step(make_batch(trainer))
    row = trainer.training_log.end_epoch(0)
    assert row["weight_supervised"] == row["weight_supervised_2"] == 1
    assert row["weight_cross_1"] == row["weight_cross_2"] == pytest.approx(0.2 * math.exp(-5))


def test_the_first_network_learns_nothing_from_a_second_one_that_knows_nothing(tiny):
    """The second network begins after the burn-in of the first, from nothing."""
    trainer = build(tiny, start_dice=0.5)
    with torch.no_grad():
        trainer.method.second.decoder.seg_layers[-1].bias.copy_(torch.tensor([100.0, -100.0]))
    found = values(terms(trainer, make_batch(trainer)))
    assert found["cross_1"] == 0 and found["cross_2"] > 0


@pytest.mark.parametrize("kind", ["2 classes", "4 classes", "regions", "ignore", "regions and ignore"])
def test_trust_is_the_dice_on_labelled_patches_over_start_dice(kind, datasets, use):
    trainer = build(use(datasets(kind)), start_dice=0.8)
    regions, ignore = trainer.label_manager.has_regions, trainer.label_manager.ignore_label
    sums = torch.zeros(2, trainer.label_manager.num_segmentation_heads)
    for seed in range(3):
        batch = make_batch(trainer, seed)
        terms(trainer, batch)
        target = batch["target"][0]
        with torch.no_grad():
            logits = trainer.method.second(batch["data"])[0]
        for head in range(len(sums[0])):
            decided = logits[:, head] > 0 if regions else logits.argmax(1) == head
            truth = target[:, head].bool() if regions else target[:, 0] == head
            if ignore is not None:
                known = ~target[:, -1].bool() if regions else target[:, 0] != ignore
                decided, truth = decided[known], truth[known]
            new = torch.stack([(decided & truth).sum(), decided.sum() + truth.sum()])
            sums[:, head] = 0.99 * sums[:, head] + 0.01 * new
    trust = (2 * sums[0] / sums[1] / 0.8).clamp(max=1)
    if not regions:
        trust[0] = trust[1:].min()
    found = torch.stack([trainer.method.diagnostics[f"share_trust_{h}"] for h in range(len(trust))])
    torch.testing.assert_close(found, trust)
    assert (trust < 1).any()


@KINDS
def test_a_class_without_weight_counts_in_neither_cross_term(kind, datasets, use):
    trainer = build(use(datasets(kind)))
    trainer.method.head_weights.zero_()
    found = values(terms(trainer, make_batch(trainer)))
    assert found["cross_1"] == found["cross_2"] == 0 and found["supervised_2"] != 0


def test_inference_keeps_network_1(tiny, tmp_path):
    trainer = build(tiny)
    trainer.train_step(make_batch(trainer))
    trainer.save_checkpoint(str(tmp_path / "checkpoint_final.pth"))
    saved = torch.load(tmp_path / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert all(torch.equal(saved[k], v) for k, v in trainer.network.state_dict().items())


def test_cost(tiny):
    assert counted_cost(tiny, NAME) < 1.1 * 4
