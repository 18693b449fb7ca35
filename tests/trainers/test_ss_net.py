"""The invariants of SS-Net (as published; see the module's docstring for the terms)."""

import contextlib
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from helpers import make_batch, spawn
from torch import distributed as dist
from torch.nn import functional as F

from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.labels import known_voxels
from nnunetv2_semisup.losses.consistency import probabilities
from nnunetv2_semisup.network import taps
from nnunetv2_semisup.trainers import ss_net
from nnunetv2_semisup.training.distributed import broadcast_state

NAME = "nnUNetTrainerSSNet"
TERMS = ["separation_unlabelled", "smoothness_unlabelled", "smoothness_labelled", "separation_labelled", "supervised"]
KINDS = ["2 classes", "4 classes", "regions", "ignore", "regions and ignore"]


def build(dataset, configuration="3d_fullres", **settings):
    torch.manual_seed(3)
    trainer = dataset.trainer(NAME, configuration, **{"cs_max_rows": 8192} | settings)  # all voxels of tiny patches
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


def values(found) -> dict[str, float]:
    return {name: value.item() for name, (_, value) in found.items()}


def backward(trainer, batch, progress=0.5, seed=11) -> None:
    torch.manual_seed(seed)
    for group in trainer.method.losses(trainer.network, batch, batch["unlabelled"], progress):
        sum(weight * value for weight, value in group.values()).backward()


def gradients(trainer) -> dict[str, torch.Tensor]:
    modules = {"network": trainer.network, "method": trainer.method}
    named = {f"{m}.{k}": p for m, module in modules.items() for k, p in module.named_parameters()}
    found = {k: p.grad.clone() for k, p in named.items() if p.grad is not None}
    for parameter in named.values():
        parameter.grad = None
    return found


def assert_close(mine: dict, expected: dict, rtol=1e-4, atol=1e-6) -> None:
    """Equal up to rounding, relative to the largest of all; what is missing in ``expected`` is 0."""
    assert expected.keys() <= mine.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    for key, gradient in mine.items():
        other = expected.get(key, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, other, rtol=rtol, atol=atol * scale, msg=key)


# --------------------------------------------------------------------------------- the published plan, written plainly


def published_plan(trainer, batch, starts) -> torch.Tensor:
    """Both streams as one batch, boolean indices, torch's batch norm, all pairs, one total; random directions given."""
    network, method, s = trainer.network, trainer.method, trainer.settings
    regions, heads = trainer.label_manager.has_regions, trainer.label_manager.num_segmentation_heads
    images = torch.cat([batch["data"], batch["unlabelled"]["data"]])
    count = len(batch["data"])
    outputs, features = taps.decode(network, taps.encode(network, images))
    clean = probabilities(outputs[0].detach(), regions)
    dims = range(2, images.ndim)

    def head(mlp, rows, training=True):
        norm = mlp.norm
        hidden = F.batch_norm(
            mlp.first(rows), norm.running_mean, norm.running_var, norm.weight, norm.bias, training, 0.0, norm.eps
        )
        return mlp.last(F.leaky_relu(hidden, mlp.negative_slope))

    def dice(p):
        if s.lds_dice == "joint_linear" and not regions:
            return 1 - (2 * (p * clean).sum() + s.lds_smooth) / (p.sum() + clean.sum() + s.lds_smooth)
        total = 0
        for part in (slice(0, count), slice(count, None)):  # our deviation: each stream alone
            a, b, power = p[part], clean[part], 1 if s.lds_dice == "joint_linear" else 2
            axes = [0, 1, *dims] if s.lds_dice == "joint_linear" else [0, *dims]
            sizes = (a**power).sum(axes) + (b**power).sum(axes)
            total = total + (1 - (2 * (a * b).sum(axes) + s.lds_smooth) / (sizes + s.lds_smooth)).mean() * len(a)
        return total / len(p)

    # prototypes
    target = batch["target"][0]
    counted = torch.ones(len(images), *images.shape[2:], dtype=torch.bool)  # not ignored: enters the heads
    if trainer.label_manager.has_ignore_label:
        ignored = target[:, -1].bool() if regions else target[:, 0] == trainer.label_manager.ignore_label
        counted[:count] = ~ignored
    if regions:
        ignored = target[:, -1].bool() if trainer.label_manager.has_ignore_label else torch.zeros_like(target[:, 0])
        truth = [target[:, c].bool() & ~ignored.bool() for c in range(heads)]
        predicted = [clean[:, c] > 0.5 for c in range(heads)]
    else:
        truth = [target[:, 0] == c for c in range(heads)]
        predicted = [clean.argmax(1) == c for c in range(heads)]
    rows_of = features.movedim(1, -1)
    memory = {}
    for k, c in enumerate(method.classes):
        z = head(method.projection, rows_of[:count][truth[c] & predicted[c][:count]], training=False).detach()
        if len(z) > 32:
            order = head(method.selectors[k], z)[:, 0].argsort(descending=s.proto_select == "highest")
            z = z[order[:32]]
        if len(z) >= 2:
            memory[c] = z

    # separation
    separation = 0
    for half, masks in ((slice(0, count), truth), (slice(count, None), [p[count:] for p in predicted])):
        embedded = head(method.prediction, head(method.projection, rows_of[half][counted[half]]))
        for c, z in memory.items():
            k, e = list(method.classes).index(c), embedded[masks[c][counted[half]]]
            if len(e) < 2:
                continue
            w = torch.sigmoid(head(method.selectors[k], e.detach())[:, 0])
            w = len(e) * w / w.sum()
            u = torch.ones(len(z))
            if s.proto_attention == "normalised":
                u = torch.sigmoid(head(method.prototype_selectors[k], F.normalize(z, dim=1))[:, 0])
                u = len(z) * u / u.sum()
            pairs = 1 - F.cosine_similarity(e[:, None], z[None], dim=2)
            separation = separation + (w[:, None] * u[None] * pairs).mean() / heads

    # smoothness
    scale = math.sqrt(images[0].numel())
    noise = (s.vat_xi_rms * scale * starts).requires_grad_(True)
    (g,) = torch.autograd.grad(dice(probabilities(network(images + noise)[0], regions)), noise)
    noise = s.vat_eps_rms * scale * g / g.square().sum([1, *dims], keepdim=True).sqrt()
    smoothness = dice(probabilities(network(images + noise)[0], regions))

    supervised = trainer.loss([o[:count] for o in outputs], batch["target"])
    return supervised + s.lambda_max * (s.lds_ratio * smoothness + s.cs_ratio * separation)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"lds_dice": "joint_linear", "proto_select": "lowest", "proto_attention": "normalised", "lds_ratio": 0.5}],
    ids=["default", "other"],
)
def test_gradients_equal_the_published_plan(kind, settings, datasets, use, monkeypatch):
    """Also shows that the groups, back-propagated one by one, equal one backward of the total."""
    trainer = build(use(datasets(kind)), cs_ratio=3.0, vat_eps_rms=0.3, vat_xi_rms=0.3, **settings)
    batch, drawn = make_batch(trainer), []
    original = ss_net.draw_directions
    monkeypatch.setattr(ss_net, "draw_directions", lambda images: drawn.append(original(images)) or drawn[-1])
    backward(trainer, batch)
    mine = gradients(trainer)
    assert (trainer.method.memory.count >= 2).any()
    with torch.no_grad():  # the running statistics that the prototypes were projected with
        for module in trainer.method.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                module.reset_running_stats()
    published_plan(trainer, batch, torch.cat(drawn[::-1])).backward()  # unlabelled noise is drawn first
    # Rounding moves a voxel over the kink of a ReLU now and then, and its gradient is 1e-4 of a small tensor's.
    assert_close(mine, gradients(trainer), rtol=2e-3, atol=2e-4)


# ------------------------------------------------------------------------------------------------------------ the noise


@pytest.mark.parametrize("absolute", [None, 6.0])
def test_noise_has_the_length_asked_for(tiny, absolute):
    trainer = build(tiny, vat_eps=absolute)
    images = make_batch(trainer)["data"]
    clean = probabilities(taps.logits(trainer.network, images), False).detach()
    noise, found = trainer.method._adversarial_noise(trainer.network, images, clean)
    expected = 0.01 * math.sqrt(16**3) if absolute is None else absolute
    assert found.all() and not noise.requires_grad
    torch.testing.assert_close(
        noise.flatten(1).norm(dim=1), torch.full((2,), expected, dtype=torch.float32), rtol=1e-4, atol=0
    )


def test_noise_grows_with_the_channels(tiny, monkeypatch):
    """One length per sample over all channels and voxels, so the share of each value is the same."""
    method = build(tiny).method
    images, target = torch.randn(3, 2, 8, 8, 8), torch.rand(3, 2, 8, 8, 8)
    monkeypatch.setattr(method, "_under_noise", lambda network, images, noise: torch.sigmoid(images + noise))
    noise, found = method._adversarial_noise(torch.nn.Identity(), images, target)
    assert found.all()
    torch.testing.assert_close(noise.square().mean([1, 2, 3, 4]).sqrt(), torch.full((3,), 0.01), rtol=1e-4, atol=0)


def test_smoothing_of_the_dice_is_the_setting(tiny):
    """Against some 10^4 voxels, 10^6 leaves a hundredth of the loss."""
    usual, smooth = (build(tiny, lds_smooth=value) for value in (1e-5, 1e6))
    batch = make_batch(usual)
    few, many = (values(terms(trainer, batch))["smoothness_labelled"] for trainer in (smooth, usual))
    assert 0 < few < 0.05 * many


@pytest.mark.parametrize(("settings", "length"), [({"vat_xi": 3.0}, 3.0), ({"vat_xi_rms": 0.5}, 0.5 * 64)], ids=str)
def test_trial_noise_has_the_length_asked_for(tiny, settings, length, monkeypatch):
    trainer, steps, search = build(tiny, **settings), [], ss_net.adversarial_directions
    monkeypatch.setattr(ss_net, "adversarial_directions", lambda d, s, step: steps.append(step) or search(d, s, step))
    terms(trainer, make_batch(trainer))
    assert steps == pytest.approx([length] * 2)


def test_search_asks_for_no_gradient_of_the_weights(tiny, monkeypatch):
    trainer, search, frozen = build(tiny), ss_net.adversarial_directions, []

    def spy(*args):
        frozen.append(not any(p.requires_grad for p in trainer.network.parameters()))
        return search(*args)

    monkeypatch.setattr(ss_net, "adversarial_directions", spy)
    terms(trainer, make_batch(trainer))
    assert frozen == [True, True]


def test_scaled_length_is_the_published_one_at_the_published_patch():
    assert ss_net.SSNetSettings().vat_eps_rms * math.sqrt(112 * 112 * 80) == pytest.approx(10, rel=0.003)
    assert ss_net.SSNetSettings().vat_xi_rms * math.sqrt(112 * 112 * 80) == pytest.approx(10, rel=0.003)


def test_noise_moves_the_prediction_more_than_a_random_direction(tiny):
    trainer = build(tiny, vat_eps_rms=0.1, vat_xi_rms=0.1)
    images = make_batch(trainer)["data"]
    clean = probabilities(taps.logits(trainer.network, images), False).detach()
    with torch.no_grad():
        random = 0.1 * 64 * ss_net.draw_directions(images)
        moved = trainer.method._dice(trainer.method._under_noise(trainer.network, images, random), clean)
    noise, _ = trainer.method._adversarial_noise(trainer.network, images, clean)
    with torch.no_grad():
        adversarial = trainer.method._dice(trainer.method._under_noise(trainer.network, images, noise), clean)
    assert adversarial > 2 * moved > 0


def test_search_leaves_no_gradient_in_the_parameters(tiny):
    trainer = build(tiny)
    images = make_batch(trainer)["data"]
    parameters = list(trainer.network.parameters())
    parameters[0].grad = torch.ones_like(parameters[0])
    clean = probabilities(taps.logits(trainer.network, images), False).detach()
    trainer.method._adversarial_noise(trainer.network, images, clean)
    assert torch.equal(parameters[0].grad, torch.ones_like(parameters[0]))
    assert all(p.grad is None for p in parameters[1:]) and all(p.requires_grad for p in parameters)


@pytest.mark.parametrize("dice", ["per_class_squared", "joint_linear"])
def test_smoothness_reaches_the_weights_through_the_noisy_pass_alone(tiny, dice, monkeypatch):
    """Its gradient is that of a prediction against constants: clean target and noise."""
    trainer = build(tiny, lds_dice=dice)
    method, network, images = trainer.method, trainer.network, make_batch(trainer)["data"]
    clean = method._clean(taps.decode(network, taps.encode(network, images))[0])
    assert not clean.requires_grad
    noises, search = [], method._adversarial_noise
    monkeypatch.setattr(method, "_adversarial_noise", lambda *a: noises.append(search(*a)) or noises[-1])
    method._smoothness(network, images, clean, "labelled").backward()
    mine = gradients(trainer)
    constant = noises[0][0].clone()
    method._dice(probabilities(network(images + constant)[0], False), clean).backward()
    assert_close(mine, gradients(trainer))


def test_no_noise_no_smoothness_loss(tiny, monkeypatch):
    trainer = build(tiny)
    monkeypatch.setattr(
        trainer.method, "_adversarial_noise", lambda n, images, t: (torch.zeros_like(images), torch.ones(2) > 0)
    )
    found = values(terms(trainer, make_batch(trainer)))
    assert abs(found["smoothness_labelled"]) < 1e-6 and abs(found["smoothness_unlabelled"]) < 1e-6
    linear = build(tiny, lds_dice="joint_linear")
    batch = make_batch(linear)
    monkeypatch.setattr(
        linear.method, "_adversarial_noise", lambda n, images, t: (torch.zeros_like(images), torch.ones(2) > 0)
    )
    clean = probabilities(taps.logits(linear.network, batch["data"]), False)
    expected = (1 - clean.square().sum(1).mean()).item()
    assert values(terms(linear, batch))["smoothness_labelled"] == pytest.approx(expected, abs=1e-5)


def test_labels_do_not_reach_the_smoothness_terms(tiny):
    trainer = build(tiny)
    batch = make_batch(trainer)
    first = values(terms(trainer, batch))
    relabelled = values(terms(trainer, batch | {"target": make_batch(trainer, 1)["target"]}))
    for name in TERMS:
        assert (first[name] == relabelled[name]) == name.startswith("smoothness"), name


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_half_precision_finds_the_same_direction(tiny, precision):
    """In autocast, with a loss 10^4 times smaller: as over 10^8 voxels, where fp16 alone would flush the gradient."""
    trainer = build(tiny, vat_xi_rms=0.1)
    method, network, images = trainer.method, trainer.network, make_batch(trainer)["data"]
    clean = probabilities(taps.logits(network, images), False).detach()
    start = ss_net.draw_directions(images)

    def search(low, **scale):
        def discrepancy(noise):
            with torch.autocast("cpu", precision, enabled=low, cache_enabled=False):
                return 1e-4 * method._dice(method._under_noise(network, images, noise), clean)

        return ss_net.adversarial_directions(discrepancy, start, 6.4, **scale)

    exact, _ = search(False)
    found, usable = search(True)
    cosine = (exact * found).flatten(1).sum(1)
    assert usable.all() and float(cosine.min()) > (0.95 if precision == torch.float16 else 0.7), cosine
    if precision == torch.float16:
        unscaled, _ = search(True, loss_scale=1.0)
        assert float((exact * unscaled).flatten(1).sum(1).max()) < float(cosine.min()) - 0.1


# ------------------------------------------------------------------------------------------------------- the prototypes


def test_heads_are_the_published_ones(datasets, use):
    trainer = build(use(datasets("4 classes")), proto_attention="normalised")
    method, features = trainer.method, taps.feature_channels(trainer.network)

    def shape(head):
        return head.first.in_features, head.norm.num_features, head.last.out_features, head.negative_slope

    assert shape(method.projection) == (features, 32, 32, 0) and shape(method.prediction) == (32, 32, 32, 0)
    selectors = [*method.selectors, *method.prototype_selectors]
    assert len(selectors) == 6 and all(shape(head) == (32, 32, 1, 0.2) for head in selectors)
    assert method.memory.rows.shape == (3, 32, 32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("background", [False, True])
def test_memory_takes_correct_labelled_foreground_voxels_alone(kind, background, datasets, use, monkeypatch):
    """Every voxel's feature is its number, all others are poisoned; the memory holds voxels of its class only."""
    trainer = build(use(datasets(kind)), proto_include_background=background)
    method, batch = trainer.method, make_batch(trainer)
    label = batch["target"][0]
    regions, heads = trainer.label_manager.has_regions, trainer.label_manager.num_segmentation_heads
    logits = torch.randn(2, heads, *label.shape[2:])
    if regions:
        allowed = (logits > 0) & label[:, :heads].bool()
        if trainer.label_manager.has_ignore_label:
            allowed &= ~label[:, heads:].bool()
        classes = list(range(heads))
    else:
        allowed = torch.stack([(logits.argmax(1) == c) & (label[:, 0] == c) for c in range(heads)], 1)
        classes = list(range(0 if background else 1, heads))
    numbers = torch.arange(float(label[:, 0].numel())).reshape(2, 1, *label.shape[2:])
    features = torch.where(allowed[:, classes].any(1, keepdim=True), numbers, -7.0).expand(-1, 32, *label.shape[2:])
    monkeypatch.setattr(ss_net.taps, "encode", lambda *a: None)
    monkeypatch.setattr(ss_net.taps, "decode", lambda *a: ([logits], features.clone()))
    method.projection.forward = lambda rows, valid=None: rows
    method._labelled_pass(trainer.network, batch, 0.1)
    assert list(method.classes) == classes and len(method.memory.count) == len(classes)
    for k, c in enumerate(classes):
        rows = method.memory.rows[k, : int(method.memory.count[k]), 0].long()
        possible = allowed[:, c].flatten().nonzero().flatten()
        assert len(rows) == min(32, len(possible)) > 0 and -7 not in rows
        assert set(rows.tolist()) <= set(possible.tolist()) and len(set(rows.tolist())) == len(rows)


@pytest.mark.parametrize("select", ["highest", "lowest"])
def test_highest_or_lowest_scores_are_kept(tiny, select):
    trainer = build(tiny, proto_select=select)
    method = trainer.method
    features = torch.randn(2, 4, 6, 6, 6)
    candidates = (torch.rand(1, 432) < 0.5).clone()
    method._renew_prototypes(features, candidates)
    rows = features.movedim(1, -1).reshape(-1, 4)[candidates[0]]
    with torch.no_grad():
        z = method.projection(rows)
        scores = method.selectors[0](z, torch.ones(len(z), dtype=torch.bool))[:, 0]
    kept = z[scores.argsort(descending=select == "highest")[:32]]
    assert {tuple(r.tolist()) for r in method.memory.rows[0]} == {tuple(r.tolist()) for r in kept}
    assert not method.memory.rows.requires_grad


def test_prototypes_are_of_this_step_and_stay_where_a_class_is_missing(datasets, use):
    trainer = build(use(datasets("4 classes")))
    memory = trainer.method.memory
    terms(trainer, make_batch(trainer))
    before = memory.rows.clone()
    assert (memory.count > 0).all()
    batch = make_batch(trainer, 1)
    batch["target"][0][batch["target"][0] == 2] = 1
    terms(trainer, batch)
    assert (memory.rows != before).flatten(1).any(1).tolist() == [True, False, True]


def test_an_overflowed_forward_leaves_nothing_in_the_memory(tiny):
    method = build(tiny).method
    features = torch.randn(2, 4, 6, 6, 6)
    features[:, :, :3] = float("inf")
    method._renew_prototypes(features, torch.ones(1, 432, dtype=torch.bool))
    everywhere = torch.ones(432, dtype=torch.bool)
    separation = method._separation(features, everywhere[None], everywhere)
    assert torch.isfinite(separation) and int(method.memory.count) == 32
    assert all(torch.isfinite(b).all() for b in method.buffers())


# ------------------------------------------------------------------------------------------------------- the separation


EVERYWHERE = torch.ones(432, dtype=torch.bool)


def separation(method, features, voxels):
    return method._separation(features, voxels, EVERYWHERE)


@pytest.fixture
def filled(datasets, use):
    """A method of four classes, 32 prototypes of class 1 and 5 of class 2, features, and the voxels of each class."""
    method = build(use(datasets("4 classes"))).method
    features = torch.randn(2, 4, 6, 6, 6, requires_grad=True)
    label = torch.randint(0, 4, (432,))
    voxels = torch.stack([label == c for c in (1, 2, 3)])
    candidates = voxels & torch.tensor([True, True, False])[:, None]
    candidates[1, candidates[1].nonzero().flatten()[5:]] = False
    method._renew_prototypes(features, candidates)
    assert method.memory.count.tolist() == [32, 5, 0]
    return method, features, label, voxels


def test_background_and_classes_without_memory_get_no_gradient_but_through_the_statistics(filled):
    method, features, label, voxels = filled
    for head in (method.projection, method.prediction):
        head.forward = lambda rows, valid, norm=head.forward: norm(rows)  # running statistics
    separation(method, features, voxels).backward()
    pulled = features.grad.movedim(1, -1).reshape(432, 4).any(1)
    assert torch.equal(pulled, (label == 1) | (label == 2))


def test_a_single_class_is_pulled_as_a_whole(tiny):
    """Were its own voxels alone the statistics of batch norm, the gradients of its voxels would sum to 0."""
    method = build(tiny).method
    features = torch.randn(2, 4, 6, 6, 6)
    foreground = torch.rand(432) < 0.2
    flat = features.movedim(1, -1).reshape(432, 4)
    flat[foreground] += 1.0
    features = flat.reshape(2, 6, 6, 6, 4).movedim(-1, 1).clone().requires_grad_(True)
    method._renew_prototypes(features, foreground[None])
    separation(method, features, foreground[None]).backward()
    pulls = features.grad.movedim(1, -1).reshape(432, 4)
    assert float(pulls[foreground].sum(0).norm()) > 0.05 * float(pulls[foreground].norm(dim=1).sum())
    assert pulls[~foreground].any(1).all()


def test_ignored_voxels_are_not_in_the_statistics(datasets, use):
    method = build(use(datasets("ignore"))).method
    labels = torch.randint(0, 2, (2, 1, 6, 6, 6))
    ignored = torch.rand(labels.shape) < 0.3
    target = torch.where(ignored, method.task.ignore_label, labels)
    assert torch.equal(known_voxels([target], False, method.task.ignore_label).flatten(), ~ignored.flatten())


def test_a_class_needs_two_prototypes_and_two_voxels(filled):
    method, features, _, voxels = filled
    one = voxels.clone()
    one[0] = False
    one[0, voxels[0].nonzero()[0]] = True  # one voxel of class 1
    only_second = voxels & torch.tensor([False, True, False])[:, None]
    assert torch.equal(separation(method, features, one), separation(method, features, only_second))
    method.memory.count[1] = 1
    nothing = separation(method, features, only_second)
    nothing.backward()
    assert nothing.item() == 0 and not features.grad.any()


def test_selectors_learn_but_do_not_steer_the_gradient_of_the_features(filled, monkeypatch):
    method, features, _, voxels = filled
    separation(method, features, voxels).backward()
    mine, features.grad = features.grad, None
    assert all(p.grad.any() for k in (0, 1) for p in method.selectors[k].last.parameters() if p.ndim > 1)
    assert not any(p.grad is not None and p.grad.any() for p in method.selectors[2].parameters())
    scores = method._scores
    monkeypatch.setattr(method, "_scores", lambda *a: scores(*a).detach())
    separation(method, features, voxels).backward()
    torch.testing.assert_close(features.grad, mine)


def test_divisor_counts_the_background(filled):
    """Antiparallel everywhere: each of the two classes is at its largest, 2, of four."""
    method, features, _, voxels = filled
    direction = torch.randn(32)
    method.memory.rows[:] = -direction
    method.prediction.forward = lambda rows, valid: direction.expand(len(rows), 32)
    assert separation(method, features, voxels).item() == pytest.approx((2 + 2) / 4, abs=1e-5)


def test_capped_rows_estimate_the_same_loss(filled):
    method, features, _, voxels = filled
    everything = separation(method, features, voxels).item()
    assert everything == separation(method, features, voxels).item(), "no chance where all rows fit"
    method.settings = dataclasses.replace(method.settings, cs_max_rows=40)
    capped = [separation(method, features, voxels).item() for _ in range(60)]
    assert len(set(capped)) > 1 and sum(capped) / 60 == pytest.approx(everything, rel=0.02)


# ---------------------------------------------------------------------------------------------- weights, ramp, switches


def test_terms_come_in_order_and_labelled_last(tiny):
    trainer = build(tiny)
    batch = make_batch(trainer)
    groups = [list(g) for g in trainer.method.losses(trainer.network, batch, batch["unlabelled"], 0.5)]
    assert groups == [[TERMS[0]], [TERMS[1]], [TERMS[2]], [TERMS[3], TERMS[4]]]
    assert all(value > 0 for value in values(terms(trainer, batch)).values())


@pytest.mark.parametrize(("step", "ramp"), [(0, math.exp(-5)), (3000, 0.2865), (6000, 1.0), (15000, 1.0)])
def test_weights_follow_the_published_ramp(tiny, step, ramp):
    trainer = build(tiny, lambda_max=0.8, unlabeled_batch_size=6, ramp_fraction=0.4)
    found = {n: w for n, (w, _) in terms(trainer, make_batch(trainer), progress=step / 15000).items()}
    expected = {"separation_unlabelled": 0.08, "separation_labelled": 0.08}
    expected |= {"smoothness_unlabelled": 0.8 * 6 / 8, "smoothness_labelled": 0.8 * 2 / 8}
    expected = {n: w * ramp for n, w in expected.items()} | {"supervised": 1.0}
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("fraction", "ramp"), [(0.0, 1.0), (0.2, 1.0), (1.0, math.exp(-5 * 0.8**2))])
def test_ramp_ends_where_it_is_asked_to(tiny, fraction, ramp):
    trainer = build(tiny, ramp_fraction=fraction)
    weights = {n: w for n, (w, _) in terms(trainer, make_batch(trainer), progress=0.2).items()}
    assert weights["separation_labelled"] == pytest.approx(0.1 * ramp)


def test_a_run_without_cross_entropy_is_not_nnu_nets_own(tiny):
    assert build(tiny, lambda_max=0.0).is_supervised
    assert not build(tiny, lambda_max=0.0, seg_ce_weight=0.0).is_supervised


@pytest.mark.parametrize("names", [["separation_unlabelled", "separation_labelled"], TERMS[1:3]], ids=" ".join)
def test_each_pair_of_terms_falls_when_it_is_trained_alone(tiny, names):
    trainer = build(tiny, "2d", vat_eps_rms=0.1, vat_xi_rms=0.1)
    batch, history = make_batch(trainer), []
    for step in range(40):
        trainer.optimizer.zero_grad()
        found = terms(trainer, batch, seed=step)
        loss = sum(found[name][1] for name in names)
        loss.backward()
        trainer.optimizer.step()
        history.append(loss.item())
    assert sum(history[-5:]) < 0.7 * sum(history[:5])


def test_without_separation_there_are_no_prototypes(tiny):
    trainer = build(tiny, cs_ratio=0.0)
    backward(trainer, make_batch(trainer))
    assert not any(k.startswith("method") for k in gradients(trainer)) and int(trainer.method.memory.count.sum()) == 0
    batch = make_batch(trainer)
    assert list(terms(trainer, batch)) == [TERMS[1], TERMS[2], TERMS[4]]
    both = build(tiny)
    assert values(terms(trainer, batch))["supervised"] == values(terms(both, batch))["supervised"]


def test_without_smoothness_no_noise_is_searched(tiny, monkeypatch):
    trainer = build(tiny, lds_ratio=0.0)
    monkeypatch.setattr(trainer.method, "_under_noise", lambda *_: pytest.fail("a pass under noise"))
    assert list(terms(trainer, make_batch(trainer))) == [TERMS[0], TERMS[3], TERMS[4]]


@pytest.mark.parametrize("kind", ["2 classes", "regions"])
def test_supervised_loss_without_cross_entropy(kind, datasets, use):
    dataset = use(datasets(kind))
    both, dice = build(dataset), build(dataset, seg_ce_weight=0.0)
    dice.network.load_state_dict(both.network.state_dict())
    batch = make_batch(both)
    output = both.network(batch["data"])
    cross_entropy = sum(
        w * (both.loss.loss.ce(o, t.float() if kind == "regions" else t[:, 0].long()))
        for w, o, t in zip(both.loss.weight_factors, output, batch["target"], strict=True)
    )
    torch.testing.assert_close(both.loss(output, batch["target"]) - cross_entropy, dice.loss(output, batch["target"]))


@pytest.mark.parametrize(
    "setting",
    [
        {"lambda_max": -1.0},
        {"lds_ratio": -0.1},
        {"lds_ratio": 0.0, "cs_ratio": 0.0},
        {"cs_ratio": -0.1},
        {"ramp_fraction": 1.5},
        {"lds_smooth": 0.0},
        {"vat_eps_rms": 0.0},
        {"vat_xi": -1.0},
        {"cs_max_rows": 1},
        {"proto_select": "best"},
    ],
)
def test_settings_out_of_range(tiny, setting):
    with pytest.raises(InputError, match=next(iter(setting))):
        tiny.trainer(NAME, **setting)


def test_batch_norm_keeps_no_trace_of_the_noise(tiny):
    """Running statistics are those of the clean passes."""
    plans = tiny.plans
    arguments = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    arguments |= {"norm_op": "torch.nn.modules.batchnorm.BatchNorm3d"}
    trainer = build(tiny, plans=plans)
    batch = make_batch(trainer)
    expected = build(tiny, plans=plans).network
    for images in (batch["data"], batch["unlabelled"]["data"]):
        expected(images)
    backward(trainer, batch)
    for (key, mine), (_, clean) in zip(trainer.network.named_buffers(), expected.named_buffers(), strict=True):
        assert "num_batches" in key or torch.equal(mine, clean), key


def test_the_device_is_never_waited_for(datasets, use, monkeypatch):
    """On the meta device a tensor has no values, so whatever would fetch one from a GPU fails."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # knows no meta device
    trainer = build(use(datasets("4 classes")), proto_attention="normalised")
    trainer.network.to("meta")
    trainer.method.to("meta")
    batch = make_batch(trainer)
    on_meta = {"data": batch["data"].to("meta"), "target": [t.to("meta") for t in batch["target"]]}
    unlabelled = {"data": batch["unlabelled"]["data"].to("meta")}
    names = [name for group in trainer.method.losses(trainer.network, on_meta, unlabelled, 0.5) for name in group]
    assert names == TERMS


def test_compiled_taps_give_the_same_gradients(tiny, monkeypatch):
    """Frozen weights in the search, a graph that waits for its backward: also where the network is compiled."""
    trainer = build(tiny)
    batch = make_batch(trainer)
    saved = {k: v.clone() for k, v in trainer.method.state_dict().items()}
    backward(trainer, batch)
    expected = gradients(trainer)
    trainer.method.load_state_dict(saved)
    eager = torch.compile  # the real one, with a backend that needs no compiler
    monkeypatch.setattr(taps.torch, "compile", lambda f: eager(f, backend="aot_eager"))
    taps._compiled.cache_clear()
    taps.compile_taps(trainer.network)
    backward(trainer, batch)
    assert_close(gradients(trainer), expected, atol=1e-5)
    taps._compiled.cache_clear()


# ------------------------------------------------------------------------------------------------ saving, several ranks


def test_heads_and_memory_are_saved_and_restored_and_gone_at_inference(tiny, tmp_path):
    trainer = build(tiny)
    keys = list(trainer.network.state_dict())
    for seed in range(2):
        trainer.train_step(make_batch(trainer, seed))
    assert int(trainer.method.memory.count.sum()) > 0
    file = str(tmp_path / "checkpoint_latest.pth")
    trainer.save_checkpoint(file)
    saved = torch.load(file, weights_only=False)
    assert list(saved["network_weights"]) == keys
    resumed = tiny.trainer(NAME, resume=True)
    resumed.load_checkpoint(file)
    state = resumed.method.state_dict()
    assert {"memory.rows", "memory.count", "projection.norm.running_mean", "selectors.0.last.weight"} <= set(state)
    assert all(torch.equal(state[k], v) for k, v in trainer.method.state_dict().items())
    assert resumed.optimizer.state_dict()["state"].keys() == trainer.optimizer.state_dict()["state"].keys()


def test_heads_are_optimised_and_diagnostics_logged(tiny):
    trainer = build(tiny, cs_ratio=1.0, ramp_fraction=0.0)
    before = {k: v.clone() for k, v in trainer.method.named_parameters()}
    trainer.train_step(make_batch(trainer))
    assert all(not torch.equal(before[k], v) for k, v in trainer.method.named_parameters() if "weight" in k)
    row = trainer.training_log.end_epoch(0)
    shares = {k: v for k, v in row.items() if k.startswith("share_")}
    assert len(shares) == 6 and all(0 <= v <= 1 for v in shares.values())
    assert shares["share_direction_found_labelled"] == shares["share_direction_found_unlabelled"] == 1
    assert shares["share_of_prototypes_filled"] > 0


def test_a_whole_run(tiny):
    trainer = tiny.trainer(NAME, num_epochs=2, num_iterations_per_epoch=2, num_val_iterations_per_epoch=1)
    trainer.run_training()
    assert {"checkpoint_final.pth", "semisup_log.csv"} <= {f.name for f in Path(trainer.output_folder).iterdir()}


def step_on_rank(rank: int, folder: Path, variables: dict, dataset) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for key, value in variables.items():
            patch.setenv(key, value)
        patch.setattr(dist, "is_initialized", lambda: False)  # else nnU-Net forces CUDA while the trainer is built
        trainer = build(dataset, cs_ratio=1.0)
    trainer.local_rank = rank
    with torch.no_grad():
        next(trainer.method.projection.parameters()).add_(rank)  # rank 0's must win
    broadcast_state(trainer.network, trainer.method)
    for seed in range(2):
        trainer.train_step(make_batch(trainer, 10 * seed + rank))
    own = dict(trainer.method.named_parameters())
    torch.save([trainer.network.state_dict(), own, trainer.method.memory.state_dict()], folder / f"rank{rank}.pth")


def test_two_processes_keep_equal_heads_and_their_own_prototypes(tiny, tmp_path):
    spawn(tmp_path, step_on_rank, tiny.variables(tmp_path / "results"), tiny)
    first, second = (torch.load(tmp_path / f"rank{r}.pth", weights_only=False) for r in range(2))
    for part in range(2):
        assert all(torch.equal(first[part][k], second[part][k]) for k in first[part])
    assert not torch.equal(first[2]["rows"], second[2]["rows"])
