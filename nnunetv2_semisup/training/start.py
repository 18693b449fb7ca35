"""When a method's own terms begin, how they ramp up, and how much each class counts in them.

Terms that begin before the network knows a class teach it that the class is absent. So a step is nnU-Net's own until
the online Dice of every class has passed a threshold; then the terms ramp up, and a class that vanishes from the
pseudo-labels counts less.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nnunetv2_semisup.schedules import sigmoid_ramp_up

VANISHING = 0.5  # share of the labelled cases' volume below which a class counts less
STATE = ("step", "told", "passed_at", "measured", "volumes", "scales")


@dataclass
class Start:
    """State of the burn-in; see the module.

    Attributes:
        names: of the foreground classes or regions, as nnU-Net's online Dice lists them.
        has_background: True for softmax, where the background is the first head.
        threshold: online Dice that every class must reach at an epoch's end; 0: the terms begin with the first step.
        latest: share of all steps after which they begin for the classes that have passed, if any.
        ramp_share: share of the steps after the start over which the weights ramp up; 0: none.
        step: optimiser steps before the first one with the method's terms; None before the start.
        passed_at: per class, the steps after which it had passed; None before.
        measured: per class, whether it ever had an online Dice.
        volumes: per class, moving average of its share of the pseudo-labels; None before the first.
        scales: per class in [0, 1], 1 unless it vanishes.
        told: what the user has been told.
    """

    names: Sequence[str]
    has_background: bool
    threshold: float
    latest: float
    ramp_share: float
    step: int | None = None
    told: list[str] = field(default_factory=list)
    passed_at: list[int | None] = field(init=False)
    measured: list[bool] = field(init=False)
    volumes: list[float] | None = field(init=False, default=None)
    scales: list[float] = field(init=False)

    def __post_init__(self):
        self.passed_at = [None] * len(self.names)
        self.measured = [False] * len(self.names)
        self.scales = [1.0] * len(self.names)
        if self.threshold <= 0:
            self.start_at(0)

    def start_at(self, steps: int) -> None:
        """Begin after ``steps`` steps with every class."""
        self.step, self.passed_at = steps, [steps] * len(self.names)

    @property
    def started(self) -> bool:
        return self.step is not None

    def after_epoch(self, dice: Sequence[float], steps: int, total: int) -> list[str]:
        """Note the online Dice at an epoch's end.

        Args:
            dice: per class, NaN where neither prediction nor label has it.
            steps: optimiser steps done.
            total: of the training.

        Returns:
            What to tell the user.
        """
        if None not in self.passed_at or steps >= total:
            return []
        messages, late = [], steps >= self.latest * total
        for i, (name, value) in enumerate(zip(self.names, dice, strict=True)):
            self.measured[i] = self.measured[i] or not math.isnan(value)
            if self.passed_at[i] is None and value >= self.threshold:
                self.passed_at[i] = steps
                if self.started:
                    messages.append(f"The method's terms of {name} start after {steps} of {total} steps.")
            elif self.passed_at[i] is None and late and not self.measured[i]:
                self.passed_at[i] = steps
                text = f"WARNING: {name} had no online Dice so far, as no validation patch has it: it counts untested."
                messages += self._once(f"unmeasured {name}", text)
        missing = [name for name, at in zip(self.names, self.passed_at, strict=True) if at is None]
        if self.step is None and (not missing or (late and len(missing) < len(self.names))):
            self.step = steps
            messages.append(f"The method's terms start after {steps} of {total} steps.")
        if late:
            what = "its own terms stay off until then" if self.started else "the method's terms stay off until then"
            for name in missing:
                text = f"WARNING: the online Dice of {name} has not reached {self.threshold:g}: {what}."
                messages += self._once(f"late {name}", text)
        return messages

    def note_volumes(self, predicted: Sequence[float], labelled: Sequence[float]) -> list[str]:
        """Let a class whose predicted volume is below half of the labelled ones' count less, in proportion.

        Args:
            predicted: share of the voxels of unlabelled patches that the pseudo-labels gave to each class in an epoch.
            labelled: what is to be expected of the labelled cases.

        Returns:
            What to tell the user, once a class.
        """
        before = predicted if self.volumes is None else self.volumes
        self.volumes = [(old + new) / 2 for old, new in zip(before, predicted, strict=True)]
        messages = []
        for i, (name, mine, theirs) in enumerate(zip(self.names, self.volumes, labelled, strict=True)):
            self.scales[i] = min(1.0, mine / (VANISHING * theirs)) if theirs > 0 else 1.0
            if self.scales[i] < 1 and self.passed_at[i] is not None:
                text = (
                    f"WARNING: {name} vanishes from the pseudo-labels: {100 * mine:.2g} % of the voxels, "
                    f"{100 * theirs:.2g} % in the labelled cases. Its terms count less until it comes back."
                )
                messages += self._once(f"vanishes {name}", text)
        return messages

    def unused(self, dice: Sequence[float]) -> str:
        """What the user must know at the end of a training whose unlabelled images taught nothing, or not all classes.

        Args:
            dice: last online Dice per class.
        """
        missing = [
            f"{name} was never measured" if math.isnan(value) else f"{name} ended at {value:.2f}"
            for name, value, at in zip(self.names, dice, self.passed_at, strict=True)
            if at is None
        ]
        if not missing:
            return ""
        if self.started:
            what = "not every class learned from the unlabelled images"
        else:
            what = "the unlabelled images were NOT used, this is a model of stock nnU-Net"
        return (
            f"WARNING: {what}: a class waits for an online Dice of {self.threshold:g} before the last epoch "
            f"({', '.join(missing)}). Train more epochs, or lower start_dice."
        )

    def ramp(self, steps: int, total: int) -> float:
        """Factor of the method's weights in [0, 1]."""
        return self._ramp_from(self.step, steps, total)

    def progress(self, steps: int, total: int) -> float:
        """Share of the steps since the start that are done, in [0, 1); 0 before it."""
        return (steps - self.step) / (total - self.step) if self.step is not None else 0.0

    def head_weights(self, steps: int, total: int) -> list[float]:
        """How much each head counts: 0 before its class has passed; the background as little as any class.

        A class that passes after the start has a ramp of its own, so that it is no jump.
        """
        classes = [
            scale * (1.0 if at is not None and at <= (self.step or 0) else self._ramp_from(at, steps, total))
            for at, scale in zip(self.passed_at, self.scales, strict=True)
        ]
        return [min(classes), *classes] if self.has_background else classes

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {key: copy.copy(getattr(self, key)) for key in STATE}

    def load(self, state: dict[str, Any], steps: int) -> None:
        """Go on from :meth:`state` after ``steps`` steps; what had not started starts now if there is no threshold."""
        for key in STATE:
            setattr(self, key, copy.copy(state[key]))
        if self.threshold <= 0 and not self.started:
            self.start_at(steps)

    def _ramp_from(self, start: int | None, steps: int, total: int) -> float:
        if start is None:
            return 0.0
        return sigmoid_ramp_up((steps - start) / max(1, total - start), self.ramp_share)

    def _once(self, key: str, text: str) -> list[str]:
        if key in self.told:
            return []
        self.told.append(key)
        return [text]
