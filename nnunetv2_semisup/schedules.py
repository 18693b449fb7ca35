"""Schedules as pure functions of ``progress``, the share of optimiser steps done, in [0, 1].

A function of the share, not of the step, so that a run of ``_20epochs`` passes through the same schedule as 1000.
"""

import math


def sigmoid_ramp_up(progress: float, fraction: float) -> float:
    """Weight that rises from 0.0067 to 1 over the first ``fraction`` of training and stays there.

    Args:
        progress: share of optimiser steps done, in [0, 1].
        fraction: share of training after which the ramp has ended; 0 means no ramp.

    Returns:
        exp(-5 (1 - min(progress / fraction, 1))^2).

    Reference: Laine & Aila, ICLR 2017, section 2.2; as used by Tarvainen & Valpola, NeurIPS 2017.
    Deviation: published code raises the weight every 150 iterations; ours rises at every step.
    """
    if fraction <= 0:
        return 1.0
    return math.exp(-5.0 * (1.0 - min(progress / fraction, 1.0)) ** 2)


def cosine_temperature(progress: float, low: float, high: float) -> float:
    """Temperature that goes from ``high`` down to ``low`` and back once: low + (1 + cos(2 pi p)) / 2 * (high - low).

    Args:
        progress: p, share of the steps done, in [0, 1].
        low: at half time, above 0.
        high: at both ends.

    Reference: ACTION++ (You et al., MICCAI 2023), after Kukleva et al., ICLR 2023.
    """
    return low + 0.5 * (1.0 + math.cos(2.0 * math.pi * progress)) * (high - low)


def stage_bounds(fractions: tuple[float, ...], epochs: int) -> tuple[int, ...]:
    """First epochs of the stages of a run, and its end: (0, floor(f1 E), floor((f1 + f2) E), ..., E).

    Args:
        fractions: share of training of each stage; their sum is 1, 0 leaves a stage out.
        epochs: E.
    """
    shares = (sum(fractions[:i]) for i in range(1, len(fractions)))
    return (0, *(math.floor(share * epochs + 1e-9) for share in shares), epochs)
