"""One optimiser step from a method's groups of loss terms: backward, all-reduce, clip, check, step. Torch alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from nnunetv2_semisup.training.distributed import average_gradients

MAX_GRADIENT_NORM = 12  # nnU-Net's value

Group = dict[str, tuple[float, Tensor]]  # name of a loss term -> its weight and value


@dataclass(frozen=True)
class StepResult:
    """What a step did, as numbers on the host.

    Attributes:
        scalars: ``loss_<term>``, ``gradient_norm`` and the method's diagnostics.
        weights: weight of each term.
        overflow: a term or a gradient was not finite, here or on another process; the method must not be updated.
        stop: a process was asked to stop.
    """

    scalars: dict[str, float]
    weights: dict[str, float]
    overflow: bool
    stop: bool

    @property
    def total(self) -> float:
        """The weighted sum of all terms."""
        return sum(weight * self.scalars[f"loss_{name}"] for name, weight in self.weights.items())

    @property
    def not_finite(self) -> list[str]:
        """Names of the scalars that are not finite here."""
        return [name for name, value in self.scalars.items() if not math.isfinite(value)]


def back_propagate(
    groups: Iterator[Group], autocast: Callable[[], AbstractContextManager], scaler: GradScaler | None
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Compute each group under autocast and back-propagate it, outside, before the next one is asked for.

    Args:
        groups: as ``SemiSupMethod.losses`` yields them; they share no graph.
        autocast: makes the context of the forward passes.
        scaler: of mixed precision, or None.

    Returns:
        Weight and value (scalar, no gradient) of each term.
    """
    weights: dict[str, float] = {}
    values: dict[str, Tensor] = {}
    while True:
        with autocast():
            group = next(groups, None)
        if group is None:
            return weights, values
        first, *others = (weight * value for weight, value in group.values())
        total = sum(others, first)
        (total if scaler is None else scaler.scale(total)).backward()
        for name, (weight, value) in group.items():
            weights[name], values[name] = weight, value.detach()


def finish_step(
    weights: dict[str, float],
    values: dict[str, Tensor],
    diagnostics: dict[str, Tensor],
    network_parameters: Iterable[nn.Parameter],
    method_parameters: Iterable[nn.Parameter],
    optimizer: Optimizer,
    scaler: GradScaler | None,
    stop_wanted: bool,
) -> StepResult:
    """Average the gradients over the processes, clip, and take the optimiser's step.

    The method's own parameters are clipped apart, so that the network is clipped exactly as nnU-Net does it. There is
    one transfer from the device. The step is not taken where a value is not finite.

    Args:
        weights, values: of the terms, see :func:`back_propagate`.
        diagnostics: scalars of the step for the log.
        network_parameters, method_parameters: what is clipped together.
        optimizer: of both.
        scaler: of mixed precision, or None.
        stop_wanted: this process was asked to stop.
    """
    network_parameters, method_parameters = list(network_parameters), list(method_parameters)
    device = network_parameters[0].device
    flags = torch.full((1,), float(stop_wanted), device=device)
    flags = torch.cat([flags, torch.stack([~torch.isfinite(v) for v in values.values()]).any()[None].float()])
    trained = [p for p in (*network_parameters, *method_parameters) if p.requires_grad]
    flags = average_gradients(trained, flags)
    if scaler is not None:
        scaler.unscale_(optimizer)
    norm = clip_grad_norm_(network_parameters, MAX_GRADIENT_NORM)
    if method_parameters:
        norm = norm + 0 * clip_grad_norm_(method_parameters, MAX_GRADIENT_NORM)  # not finite if either is not

    scalars = {**{f"loss_{name}": value for name, value in values.items()}, "gradient_norm": norm, **diagnostics}
    stacked = torch.stack([scalar.detach().float().reshape(()) for scalar in scalars.values()])
    numbers = torch.cat([stacked, flags.float()]).tolist()
    named = dict(zip(scalars, numbers, strict=False))
    stop, not_finite, *had_gradient = numbers[len(scalars) :]
    for parameter, had in zip(trained, had_gradient, strict=False):  # empty in a single process
        if not had:  # on no process: without a gradient the optimiser leaves it alone, weight decay included
            parameter.grad = None
    overflow = bool(not_finite) or not math.isfinite(named["gradient_norm"])
    if not overflow:
        optimizer.step() if scaler is None else scaler.step(optimizer)
    if scaler is not None:
        scaler.update()
    return StepResult(named, weights, overflow, bool(stop))
