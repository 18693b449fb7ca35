"""Passes that leave no trace: weights, their gradients and batch norm's statistics stay; earlier graphs stay valid."""

import copy

import pytest
import torch
from torch import nn

from nnunetv2_semisup.network.freeze import frozen_parameters, frozen_statistics


def make_network() -> nn.Module:
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.LeakyReLU(), nn.Conv2d(3, 2, 1))
    network[3].bias.requires_grad_(False)  # must stay so
    return network


def gradients(network) -> list:
    return [None if p.grad is None else p.grad.clone() for p in network.parameters()]


def test_frozen_parameters():
    network, images = make_network(), torch.randn(2, 1, 8, 8)
    trained = [p.requires_grad for p in network.parameters()]
    expected = copy.deepcopy(network)
    expected(images).square().sum().backward()

    earlier = network(images).square().sum()
    noise = torch.zeros_like(images, requires_grad=True)
    with pytest.raises(ZeroDivisionError), frozen_parameters(network):
        assert not any(p.requires_grad for p in network.parameters())
        network(images + noise).square().sum().backward()
        raise ZeroDivisionError
    assert noise.grad.any() and gradients(network) == [None] * len(trained)
    assert [p.requires_grad for p in network.parameters()] == trained
    earlier.backward()
    for mine, theirs in zip(gradients(network), gradients(expected), strict=True):
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)


def test_frozen_statistics():
    network, images = make_network(), torch.randn(2, 1, 8, 8)
    earlier = network(images).square().sum()
    before = {k: v.clone() for k, v in network[1].named_buffers() if k != "num_batches_tracked"}
    with frozen_statistics(network):
        noisy = network(5 + images)
    assert all(torch.equal(before[k], dict(network[1].named_buffers())[k]) for k in before)
    (earlier + noisy.sum()).backward()
    assert network[1].momentum == 0.1
    network(5 + images)
    assert not torch.equal(before["running_mean"], network[1].running_mean)
