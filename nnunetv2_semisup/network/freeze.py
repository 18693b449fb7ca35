"""Passes through the network that must not leave a trace in it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def frozen_parameters(network: nn.Module) -> Iterator[None]:
    """No gradient for the weights, so that a backward to the input computes nothing else, compiled or not.

    Graphs that were built before stay valid and reach the weights as ever.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def frozen_statistics(network: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch norm as they are; without effect for nnU-Net's default, instance norm.

    Through the momentum: overwriting the buffers afterwards would invalidate graphs that refer to them.
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
