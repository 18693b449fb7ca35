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
