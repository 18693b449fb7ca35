"""The decoder walk equals the stock forward, also compiled; copies keep their own weights."""

import copy

import pytest
import torch
from helpers import architecture
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunetv2_semisup.network import taps


@pytest.fixture(params=[(d, r, s) for d in (2, 3) for r in (False, True) for s in (False, True)], ids=str)
def network(request):
    dim, residual, deep_supervision = request.param
    spec = architecture(dim, residual)
    return get_network_from_plans(
        spec["network_class_name"],
        spec["arch_kwargs"],
        spec["_kw_requires_import"],
        2,
        3,
        allow_init=True,
        deep_supervision=deep_supervision,
    )


def images_for(network):
    return torch.randn(2, 2, *[16] * (network.encoder.conv_op(1, 1, 1).weight.ndim - 2))


def as_list(output):
    return output if isinstance(output, list) else [output]


def test_equals_stock_forward_and_gradient(network):
    images = images_for(network)
    expected = as_list(network(images))
    sum(o.square().mean() for o in expected).backward()
    gradients = {k: p.grad.clone() for k, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()

    output, features = taps.decode(network, taps.encode(network, images))
    sum(o.square().mean() for o in as_list(output)).backward()
    assert all(torch.equal(a, b) for a, b in zip(as_list(output), expected, strict=True))
    assert gradients.keys() == {k for k, p in network.named_parameters() if p.grad is not None}
    assert all(torch.equal(p.grad, gradients[k]) for k, p in network.named_parameters() if k in gradients)
    assert torch.equal(taps.segment(network, features), expected[0])
    assert torch.equal(taps.logits(network, images), expected[0])


@pytest.mark.parametrize("frozen", ["nothing", "first stage", "encoder"])
def test_shared_skips_have_the_gradients_of_one_graph(network, frozen):
    """Two decoder passes back-propagated one by one, also with a part of the encoder frozen."""
    for module in {"nothing": [], "first stage": [network.encoder.stages[0]], "encoder": [network.encoder]}[frozen]:
        module.requires_grad_(False)
    images = images_for(network)
    skips = taps.encode(network, images)
    sum((factor * taps.logits_of(network, [factor * s for s in skips])).square().mean() for factor in (1, 2)).backward()
    expected = {k: p.grad.clone() for k, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    skips = taps.encode(network, images)
    shared = taps.share(skips)
    for factor in (1, 2):
        (factor * taps.logits_of(network, [factor * s for s in shared])).square().mean().backward()
    taps.back_propagate_shared(skips, shared)
    found = {k: p.grad for k, p in network.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5 * scale)


def test_channels_last_changes_the_layout_only(network):
    images = images_for(network)
    expected = as_list(network(images))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    taps.use_channels_last(network)
    after = network.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    weight = network.encoder.stages[-1].state_dict()[next(iter(network.encoder.stages[-1].state_dict()))]
    if images.ndim == 4:
        assert weight.is_contiguous(), "in 2D it is slower"
    else:
        assert weight.is_contiguous(memory_format=torch.channels_last_3d) and not weight.is_contiguous()
    output, _ = taps.decode(network, taps.encode(network, images))
    for a, b in zip(as_list(output), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_compiled_in_place(network, monkeypatch):
    """Same values, same keys; a copy made before its weights change follows its own weights, not the original's."""
    eager = torch.compile  # the real one, with a backend that needs no compiler
    monkeypatch.setattr(taps.torch, "compile", lambda f: eager(f, backend="aot_eager"))
    taps._compiled.cache_clear()
    keys = list(network.state_dict())
    images = images_for(network)
    expected = taps.logits(network, images)
    taps.compile_taps(network)
    duplicate = copy.deepcopy(network)
    torch.testing.assert_close(taps.logits(network, images), expected)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.5)
    torch.testing.assert_close(taps.logits(duplicate, images), expected)
    torch.testing.assert_close(taps.logits(network, images), as_list(network(images))[0])
    assert list(network.state_dict()) == keys
    taps._compiled.cache_clear()


def test_other_networks_are_refused_by_name():
    with pytest.raises(NotImplementedError, match="Linear"):
        taps.check_supported(torch.nn.Linear(1, 1))


def test_levels_are_the_inputs_of_the_segmentation_layers(network):
    images = images_for(network)
    skips = taps.encode(network, images)
    output, levels = taps.decode_levels(network, skips)
    plain, last = taps.decode(network, skips)
    assert all(torch.equal(a, b) for a, b in zip(as_list(output), as_list(plain), strict=True))
    assert torch.equal(levels[0], last)
    assert [level.shape[1] for level in levels] == taps.level_channels(network)
    layers = network.decoder.seg_layers[::-1]
    for logits, layer, level in zip(as_list(output), layers, levels, strict=False):
        assert torch.equal(logits, layer(level))
    assert skips[-1].shape[1] == taps.bottleneck_channels(network)
    steps = [a // b for a, b in zip(levels[0].shape[2:], levels[1].shape[2:], strict=True)]
    assert tuple(steps) == taps.first_stride(network)
