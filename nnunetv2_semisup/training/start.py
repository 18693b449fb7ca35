"""When a method's own terms begin, how they ramp up, and how much each class counts in them.

Terms that begin before the network knows a class teach it that the class is absent. So a step is nnU-Net's own until
the online Dice of every class has passed a threshold; then the terms ramp up, and a class that vanishes from the
pseudo-labels counts less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from nnunetv2_semisup.schedules import sigmoid_ramp_up

VANISHING = 0.5  # share of the labelled cases' volume below which a class counts less


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
        passed: per class, whether its Dice has passed.
        scales: per class in [0, 1], 1 unless it vanishes.
    """

    names: Sequence[str]
    has_background: bool
    threshold: float
    latest: float
    ramp_share: float
    step: int | None = None
    told: list[str] = field(default_factory=list)
    passed: list[bool] = field(init=False)
    scales: list[float] = field(init=False)

    def __post_init__(self):
        self.passed = [False] * len(self.names)
        self.scales = [1.0] * len(self.names)
        if self.threshold <= 0:
            self.start_at_once()

    def start_at_once(self) -> None:
        """Without a burn-in: all classes are on from the first step."""
        self.step, self.passed = 0, [True] * len(self.names)

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
        if all(self.passed):
            return []
        before = list(self.passed)
        self.passed = [old or value >= self.threshold for old, value in zip(self.passed, dice, strict=True)]
        late = steps >= self.latest * total
        messages = []
        if self.step is None and steps < total and (all(self.passed) or (late and any(self.passed))):
            self.step = steps
            messages.append(f"The method's terms start after {steps} of {total} steps.")
        elif self.started and (new := self._those([a and not b for a, b in zip(self.passed, before, strict=True)])):
            messages.append(f"The method's terms of {new} start after {steps} of {total} steps.")
        missing = self._those([not p for p in self.passed])
        if late and missing:
            what = "its own terms stay off until then" if self.started else "the method's terms stay off until then"
            text = f"WARNING: the online Dice of {missing} has not reached {self.threshold:g}: {what}."
            messages += self._once(f"late {missing} {self.started}", text)
        return messages

    def note_volumes(self, predicted: Sequence[float], labelled: Sequence[float]) -> list[str]:
        """Let a class whose predicted volume is below half of the labelled ones' count less, in proportion.

        Args:
            predicted: share of the voxels of unlabelled patches that the pseudo-labels give to each class.
            labelled: the same in the labelled cases.

        Returns:
            What to tell the user, once a class.
        """
        messages = []
        for i, (name, mine, theirs) in enumerate(zip(self.names, predicted, labelled, strict=True)):
            self.scales[i] = min(1.0, mine / (VANISHING * theirs)) if theirs > 0 else 1.0
            if self.scales[i] < 1 and self.passed[i]:
                text = (
                    f"WARNING: {name} vanishes from the pseudo-labels: {100 * mine:.2g} % of the voxels, "
                    f"{100 * theirs:.2g} % in the labelled cases. Its terms count less until it comes back."
                )
                messages += self._once(f"vanishes {name}", text)
        return messages

    def ramp(self, steps: int, total: int) -> float:
        """Factor of the method's weights in [0, 1]."""
        return sigmoid_ramp_up(self.progress(steps, total), self.ramp_share) if self.started else 0.0

    def progress(self, steps: int, total: int) -> float:
        """Share of the steps since the start that are done, in [0, 1); 0 before it."""
        return (steps - self.step) / (total - self.step) if self.step is not None else 0.0

    def head_weights(self) -> list[float]:
        """How much each head counts: 0 before its class has passed; the background as little as any class."""
        classes = [scale if passed else 0.0 for passed, scale in zip(self.passed, self.scales, strict=True)]
        return [min(classes), *classes] if self.has_background else classes

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {key: value for key, value in asdict(self).items() if key in ("step", "passed", "scales", "told")}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.step, self.told = state["step"], list(state["told"])
        self.passed, self.scales = list(state["passed"]), list(state["scales"])

    def _those(self, chosen: Sequence[bool]) -> str:
        return ", ".join(name for name, wanted in zip(self.names, chosen, strict=True) if wanted)

    def _once(self, key: str, text: str) -> list[str]:
        if key in self.told:
            return []
        self.told.append(key)
        return [text]
