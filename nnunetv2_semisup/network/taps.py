"""The planned network in two halves, so that a method can work on what lies between them.

The only place that walks through nnU-Net's decoder. ``decode(network, encode(network, x))[0]`` equals ``network(x)``
for PlainConvUNet and ResidualEncoderUNet, with and without deep supervision.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

COMPILED = "semisup_compiled_taps"  # attribute of a network


def encode(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Run the encoder.

    Args:
        network: a network of nnU-Net's plans, not wrapped.
        images: (B, C, X, Y, Z) or (B, C, X, Y) float.

    Returns:
        Skips, highest resolution first; the last one is the bottleneck.
    """
    return _compiled(_encode)(network, images) if _is_compiled(network) else _encode(network, images)


def decode(
    network: nn.Module, skips: list[Tensor], deep_supervision: bool = True
) -> tuple[Tensor | list[Tensor], Tensor]:
    """Run the decoder.

    Args:
        network: a network of nnU-Net's plans, not wrapped.
        skips: as :func:`encode` returns them.
        deep_supervision: False: the logits at full resolution alone, also where the network has it switched on. Outputs
            that no loss uses cost memory, and compiled they get gradients of zeros.

    Returns:
        What ``network(x)`` returns: logits (B, heads, X, Y, Z), or under deep supervision a list of them, highest
        resolution first; and the last features (B, F, X, Y, Z), the input of the last segmentation layer.
    """
    function = _compiled(_decode) if _is_compiled(network) else _decode
    return function(network, skips, deep_supervision)


def decode_levels(
    network: nn.Module, skips: list[Tensor], deep_supervision: bool = True
) -> tuple[Tensor | list[Tensor], list[Tensor]]:
    """As :func:`decode`, but with the features of every decoder level, highest resolution first."""
    function = _compiled(_decode_levels) if _is_compiled(network) else _decode_levels
    return function(network, skips, deep_supervision)


def share(skips: list[Tensor]) -> list[Tensor]:
    """Skips for several decoder passes that are back-propagated one by one, so that only one of them is in memory.

    The gradients gather in the copies that are returned; :func:`back_propagate_shared` hands them to the encoder.
    """
    return [skip.detach().requires_grad_() for skip in skips]


def back_propagate_shared(skips: list[Tensor], shared: list[Tensor]) -> None:
    """Back-propagate through the encoder what has gathered in ``shared``, the copies of ``skips``: their sum, once."""
    pairs = zip(skips, shared, strict=True)  # a frozen encoder's skips have no graph
    reached = [(skip, copy.grad) for skip, copy in pairs if copy.grad is not None and skip.requires_grad]
    with torch.autocast(skips[0].device.type, enabled=False):
        torch.autograd.backward([skip for skip, _ in reached], [gradient for _, gradient in reached])


def segment(network: nn.Module, features: Tensor) -> Tensor:
    """Logits (B, heads, X, Y, Z) of last features, as :func:`decode` returns them, changed or not."""
    return _decoder(network).seg_layers[-1](features)


def full_resolution(output: Tensor | list[Tensor]) -> Tensor:
    """The full-resolution logits (B, heads, X, Y, Z) of a network's output, under deep supervision the first of it."""
    return output[0] if isinstance(output, list) else output


def logits_of(network: nn.Module, skips: list[Tensor]) -> Tensor:
    """Full-resolution logits (B, heads, X, Y, Z) from skips, whether deep supervision is on or not."""
    return full_resolution(decode(network, skips, deep_supervision=False)[0])


def logits(network: nn.Module, images: Tensor) -> Tensor:
    """Full-resolution logits (B, heads, X, Y, Z) of ``images``, whether deep supervision is on or not."""
    return logits_of(network, encode(network, images))


def feature_channels(network: nn.Module) -> int:
    """F of the last features that :func:`decode` returns."""
    return _decoder(network).seg_layers[-1].in_channels


def level_channels(network: nn.Module) -> list[int]:
    """Channels of the features that :func:`decode_levels` returns."""
    return [layer.in_channels for layer in _decoder(network).seg_layers][::-1]


def first_stride(network: nn.Module) -> tuple[int, ...]:
    """Voxels of the highest decoder level per voxel of the second, on each axis."""
    return tuple(_decoder(network).transpconvs[-1].stride)


def bottleneck_channels(network: nn.Module) -> int:
    """Channels of the last skip that :func:`encode` returns."""
    return _encoder(network).output_channels[-1]


def compile_taps(network: nn.Module) -> None:
    """Let ``encode`` and ``decode`` run compiled for this network and later copies of it; its keys do not change."""
    vars(network)[COMPILED] = True


def use_channels_last(network: nn.Module, *others: nn.Module) -> None:
    """Store weights with channels last, in place: on a CPU, 3D convolutions of small networks are faster by far.

    Args:
        network: decides on 2D or 3D; in 2D nothing is changed.
        others: modules of the same dimensions.

    Measured on 2 cores: with the CPU preset in 3D forward and backward of two patches take 0.20 s instead of 0.36 s; in
    2D with the small preset a step takes 4 % longer. Keys, shapes and checkpoints do not change.
    """
    if any(parameter.dim() == 5 for parameter in network.parameters()):
        for module in (network, *others):
            module.to(memory_format=torch.channels_last_3d)


def check_supported(network: nn.Module) -> None:
    """Raise NotImplementedError if the network is not one whose decoder we know how to walk."""
    parts = ("encoder", "decoder")
    decoder_parts = ("stages", "transpconvs", "seg_layers", "deep_supervision")
    if not all(hasattr(network, p) for p in parts) or not all(hasattr(network.decoder, p) for p in decoder_parts):
        raise NotImplementedError(
            f"semi-supervised trainers work with nnU-Net's U-Nets (PlainConvUNet, ResidualEncoderUNet), not with "
            f"{type(network).__name__}: choose other plans with -p"
        )


def _encoder(network: nn.Module) -> Any:  # nnU-Net's networks have no types
    return network.encoder


def _decoder(network: nn.Module) -> Any:
    return network.decoder


def _encode(network: nn.Module, images: Tensor) -> list[Tensor]:
    return _encoder(network)(images)


def _decode(network: nn.Module, skips: list[Tensor], deep_supervision: bool) -> tuple[Tensor | list[Tensor], Tensor]:
    output, levels = _decode_levels(network, skips, deep_supervision)
    return output, levels[0]


def _decode_levels(
    network: nn.Module, skips: list[Tensor], deep_supervision: bool
) -> tuple[Tensor | list[Tensor], list[Tensor]]:
    decoder = _decoder(network)
    every_level = deep_supervision and decoder.deep_supervision
    features = skips[-1]
    outputs, levels = [], []
    for depth, (upsample, stage) in enumerate(zip(decoder.transpconvs, decoder.stages, strict=True)):
        features = stage(torch.cat((upsample(features), skips[-(depth + 2)]), 1))
        levels.append(features)
        if every_level:
            outputs.append(decoder.seg_layers[depth](features))
    if not every_level:
        return decoder.seg_layers[-1](features), levels[::-1]
    return outputs[::-1], levels[::-1]


def _is_compiled(network: nn.Module) -> bool:
    return getattr(network, COMPILED, False)


@cache
def _compiled(function):
    return torch.compile(function)
