"""Settings of a method: a frozen dataclass with the paper's values, overridden in the plans file.

    "semisup": {"nnUNetTrainerMeanTeacher": {"consistency_weight": 0.2}}

The key is the trainer's name without the ``_<N>epochs`` suffix. Unknown trainers, unknown keys and wrong types are
errors: a typo must not train for a day with the default value.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from nnunetv2_semisup import names
from nnunetv2_semisup.errors import InputError


def setting(default, source: str, unit: str = "", within: str = ""):
    """A dataclass field.

    Args:
        default: its value where the plans file has none.
        source: paper section, equation, or our reason.
        unit: of the value.
        within: the interval of allowed values, as in ``(0, 1]`` or ``[1, inf)``; of a tuple, for each entry. None is
            always allowed.
    """
    return field(default=default, metadata={"source": source, "unit": unit, "within": within})


@dataclass(frozen=True)
class SemiSupSettings:
    """What every method has. Each method's dataclass inherits from this one."""

    num_epochs: int = setting(
        1000, "nnU-Net; the suffix of nnUNetTrainerX_<N>epochs beats it", "epochs", within="[1, inf)"
    )
    num_iterations_per_epoch: int = setting(250, "nnU-Net", "optimiser steps", within="[1, inf)")
    num_val_iterations_per_epoch: int = setting(50, "nnU-Net", "batches", within="[1, inf)")
    unlabeled_batch_size: int | None = setting(
        None, "as many as labelled ones, the literature's choice", "patches", within="[1, inf)"
    )
    save_every_minutes: float = setting(10.0, "ours: at most this plus one epoch is lost", "minutes", within="[0, inf)")
    preset: Literal["default", "published"] = setting("default", "published: the paper's values for what is not set")
    start_dice: float = setting(
        0.5, "ours: online Dice that every class must reach before the terms start; 0: at once", within="[0, 1]"
    )
    start_latest: float = setting(
        0.3, "ours: then they start for classes that have reached it", "share of training", within="[0, 1]"
    )
    ramp_share: float = setting(
        0.2, "ours: ramp of all terms from the start on; 0: none", "share of what is left", within="[0, 1]"
    )
    guards: bool = setting(True, "ours: absent and vanishing classes count less, see docs/start.md")
    pictures: int = setting(
        20, "ours: of three unlabelled patches, spread over the training; 0: none", "about so many", within="[0, inf)"
    )
    tensorboard: bool = setting(False, "ours: log and pictures for TensorBoard too; needs pip install tensorboard")
    deterministic_seed: int | None = setting(
        None, "ours: weights, loaders and noise; with nnUNet_n_proc_DA=0 exact, after a resume too"
    )

    #: The paper's values where the defaults differ, for ``preset = published``; a subclass adds to those of its base.
    published: ClassVar[dict[str, Any]] = {"start_dice": 0.0, "ramp_share": 0.0, "guards": False}

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, within = getattr(self, f.name), f.metadata.get("within")
            if within and value is not None:
                entries = value if isinstance(value, tuple) else (value,)
                self.require(all(_lies_in(within, entry) for entry in entries), f.name, f"in {within}")

    def require(self, condition: bool, key: str, range_: str) -> None:
        """Raise an InputError unless ``condition``; for relations between settings, in ``__post_init__``."""
        if not condition:
            raise InputError(f"setting {key} = {getattr(self, key)!r} is out of range: it must be {range_}")


def resolve(settings_class: type[SemiSupSettings], overrides: dict, where: str) -> SemiSupSettings:
    """Build the settings with ``overrides``, checking names and types.

    With ``preset = published`` what ``overrides`` does not name has the paper's value.

    Args:
        settings_class: the method's dataclass.
        overrides: key to value, as read from JSON. Lists become tuples, whole numbers pass as floats.
        where: what to name in an error, e.g. ``nnUNetPlans.json: semisup: nnUNetTrainerMeanTeacher``.

    Raises:
        InputError: unknown key, wrong type, or a value out of range.
    """
    if not isinstance(overrides, dict):
        raise InputError(f"{where}: expected keys and values, got {overrides!r}")
    hints = typing.get_type_hints(settings_class)
    known = {f.name for f in dataclasses.fields(settings_class)}
    values = {}
    for key, value in overrides.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            raise InputError(f"{where}: unknown setting {key!r}; {hint}")
        values[key] = _checked(value, hints[key], f"{where}: {key}")
    if values.get("preset") == "published":
        values = settings_class.published | values
    try:
        return settings_class(**values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def of_trainer(
    plans: dict,
    trainer_name: str,
    settings_class: type[SemiSupSettings],
    known: Collection[str],
    epochs_of_name: int | None = None,
) -> SemiSupSettings:
    """Settings of ``trainer_name`` (without epoch suffix) with the overrides of ``plans``.

    Args:
        plans: of nnU-Net, maybe with settings under "semisup".
        trainer_name: key of its settings.
        settings_class: of its method.
        known: names of all trainers; the plans may hold settings of the others too.
        epochs_of_name: number of epochs that the suffix of the trainer's name asks for; it beats that of the plans.

    Raises:
        InputError: the plans name an unknown trainer, or as :func:`resolve`.
    """
    overrides = plans.get("semisup", {})
    where = f"{plans.get('plans_name', 'plans')}.json: semisup"
    if not isinstance(overrides, dict):
        raise InputError(f"{where}: expected trainer names, got {overrides!r}")
    for name in overrides:
        if name != trainer_name:
            try:
                names.require_known(name, known)
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
    mine = overrides.get(trainer_name, {})
    if epochs_of_name is not None and isinstance(mine, dict):
        mine = {**mine, "num_epochs": epochs_of_name}
    return resolve(settings_class, mine, f"{where}: {trainer_name}")


def parse_value(text: str):
    """Read a value typed on the command line: JSON where it is JSON (``0.9``, ``true``), else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def describe(settings_class: type[SemiSupSettings], current: dict | None = None) -> list[dict[str, str]]:
    """A row for every setting: name, default, published where that differs, range, unit, source.

    Args:
        settings_class: of a method.
        current: what plans set for it; then the rows have ``plans`` too, empty where they say nothing.
    """
    rows = []
    for f in dataclasses.fields(settings_class):
        other = settings_class.published.get(f.name, f.default)
        row = {
            "name": f.name,
            "default": json.dumps(f.default),
            "published": "" if other == f.default else json.dumps(other),
            "range": f.metadata["within"] or _readable_hint(typing.get_type_hints(settings_class)[f.name]),
            "unit": f.metadata["unit"],
            "source": f.metadata["source"],
        }
        if current is not None:
            row["plans"] = json.dumps(current[f.name]) if f.name in current else ""
        rows.append(row)
    return rows


def _readable_hint(hint) -> str:
    """What a setting without an interval may be."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return " or ".join("true or false" if option is bool else _readable(option) for option in options)


def as_json(settings: SemiSupSettings) -> dict:
    """The settings as a dict that ``json.dump`` takes and ``resolve`` reads back."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(settings).items()}


def with_numbers_of(settings: SemiSupSettings, before: dict[str, Any]) -> SemiSupSettings:
    """``settings`` with the method's own values of ``before`` (:func:`as_json`) where only those are not null."""
    shared = {f.name for f in dataclasses.fields(SemiSupSettings)}
    names = (f.name for f in dataclasses.fields(settings) if f.name not in shared)
    null = [name for name in names if getattr(settings, name) is None and before.get(name) is not None]
    return dataclasses.replace(settings, **{name: before[name] for name in null})


def _lies_in(interval: str, value: float) -> bool:
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval.startswith("[") else value > low
    return above and (value <= high if interval.endswith("]") else value < high)


def _checked(value, hint, where: str):
    """``value`` converted to ``hint``, or an InputError."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        origin = typing.get_origin(option)
        if option is type(None) and value is None:
            return None
        if origin is typing.Literal and value in typing.get_args(option):
            return value
        if option is float and type(value) in (int, float) and math.isfinite(value):
            return float(value)
        if option in (int, str, bool) and type(value) is option:
            return value
        if origin is tuple and isinstance(value, (list, tuple)):
            (item_hint, _) = typing.get_args(option)  # only tuple[X, ...] is used
            return tuple(_checked(item, item_hint, where) for item in value)
    readable = " or ".join(map(_readable, options))
    raise InputError(f"{where} = {value!r} has the wrong type: it must be {readable}")


def _readable(option) -> str:
    if typing.get_origin(option) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(option)))
    return "null" if option is type(None) else option.__name__
