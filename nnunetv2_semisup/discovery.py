"""How stock nnU-Net finds our trainers, and how to check that it does.

nnU-Net looks for trainers in its own package and then in the folders named by the environment variable
``nnUNet_extTrainer``. The start-up line ``nnunetv2_semisup.pth`` in site-packages calls :func:`register` in every
Python process of the environment, so this module must stay cheap: nothing but the standard library at the top.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from nnunetv2_semisup.settings import SemiSupSettings
    from nnunetv2_semisup.trainers.base import nnUNetTrainerSemiSup

VARIABLE = "nnUNet_extTrainer"


def ext_trainers_folder() -> str:
    """The folder that nnU-Net has to scan."""
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "ext_trainers")


def register() -> None:
    """Append our folder to ``nnUNet_extTrainer``, keeping what is there."""
    folders = [f for f in os.environ.get(VARIABLE, "").split(os.pathsep) if f]
    if ext_trainers_folder() not in folders:
        os.environ[VARIABLE] = os.pathsep.join([*folders, ext_trainers_folder()])


def trainers() -> dict[str, type[nnUNetTrainerSemiSup]]:
    """Every trainer this package offers, by name (without the ``_<N>epochs`` variants)."""
    from nnunetv2_semisup.trainers import TRAINERS

    return TRAINERS


def nearest(name: str) -> str | None:
    """The trainer of ours that ``name`` was most likely meant to be, with its epoch suffix; None if none is near."""
    from nnunetv2_semisup import names

    return names.nearest(name, trainers())


def refuse_near_miss(name: str) -> None:
    """Tell which trainer of ours ``name``, which nnU-Net searches in vain, was meant to be, if one is near.

    Raises:
        UnknownTrainer: with that line, if ours is the last folder that nnU-Net would look in; else the line is printed.
    """
    import sys

    from nnunetv2_semisup.errors import UnknownTrainer

    if (near := nearest(name)) is None:
        return
    line = f"nnunetv2_semisup has no trainer {name!r}. Did you mean {near}?"
    folders = [f for f in os.environ.get(VARIABLE, "").split(os.pathsep) if f]
    if folders[-1:] == [ext_trainers_folder()]:
        raise UnknownTrainer(f"{line} A trainer of your own needs its folder in {VARIABLE}")
    print(line, file=sys.stderr)


def settings_class(trainer_name: str) -> type[SemiSupSettings]:
    """The settings dataclass of a trainer named without epoch suffix.

    Raises:
        InputError: there is no such trainer; the nearest name is suggested.
    """
    from nnunetv2_semisup import names

    names.require_known(trainer_name, trainers())
    return trainers()[trainer_name].method_class.settings_class


def check() -> dict[str, str]:
    """Resolve every trainer through nnU-Net's own finder.

    Returns:
        Trainer name to the file it comes from.

    Raises:
        InputError: nnU-Net does not find a trainer, or finds another class under its name.
    """
    import contextlib
    import inspect
    import io

    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnunetv2_semisup.errors import InputError

    found = {}
    for name, expected in trainers().items():
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                resolved = recursive_find_trainer_class_by_name(name)
            except RuntimeError as error:
                if "torchvision::" in str(error):
                    raise InputError(_unlike_torchvision()) from error
                raise InputError(
                    f"nnU-Net does not find {name}: {str(error).rstrip('. ')}. "
                    f"Set export {VARIABLE}=$(nnUNetv2_semisup_trainers --folder)"
                ) from error
        if resolved is not expected:
            raise InputError(
                f"nnU-Net resolves {name} to a class of the module {resolved.__module__}, not to ours in "
                f"{inspect.getfile(expected)}: remove the other one from {VARIABLE}={os.environ.get(VARIABLE)}"
            )
        found[name] = inspect.getfile(resolved)
    return found


def _unlike_torchvision() -> str:
    """What to tell where torchvision was built for another torch: then importing nnU-Net fails."""
    from importlib.metadata import version

    return (
        f"torch {version('torch')} and torchvision {version('torchvision')} do not match: run pip install --upgrade "
        f"torch torchvision, with the --index-url of your torch if you gave one"
    )


def overview(width: int) -> str:
    """Every trainer with what it is, what a step costs and holds, and when to use it, in lines of ``width`` columns."""
    import sys

    head = "Cost of a step and live tensors: counted with 128 x 128 x 128 voxels, batch 2, fp16 (stock: 1.0, 4.6 GiB)."
    lines = _wrapped(head, width, "")
    for name, trainer in sorted(trainers().items()):
        what = (sys.modules[trainer.__module__].__doc__ or "").split("\n\n")[0]
        method = trainer.method_class
        cost = f"{method.cost:.1f} stock steps, {method.memory_gib:.1f} GiB"
        lines += [name, *_wrapped(what, width), *_wrapped(f"{cost}; {method.use}", width)]
    lines += _wrapped("Each also as NAME_1epoch and NAME_<N>epochs. Settings: --settings NAME.", width, "")
    return "\n".join(lines)


def settings_overview(trainer_name: str, plans_file: Path | None, width: int) -> str:
    """All settings of a trainer, in lines of ``width`` columns.

    Args:
        trainer_name: without epoch suffix; a near miss is an error that says what was meant.
        plans_file: whose values are shown beside the defaults where it has any, by name or by a preset; None: none.
        width: of the terminal.
    """
    from nnunetv2_semisup import settings
    from nnunetv2_semisup.files import listed, plans_in, read_object

    current = None
    settings_of = settings_class(trainer_name)
    if plans_file is not None:
        there = listed(plans_in(plans_file.parent)) or "none"
        plans = read_object(plans_file, f"name plans that are there with -p: {there}")
        resolved = settings.as_json(settings.of_trainer(plans, trainer_name, settings_of, trainers()))
        named, defaults = plans.get("semisup", {}).get(trainer_name, {}), settings.as_json(settings_of())
        current = {key: value for key, value in resolved.items() if key in named or value != defaults[key]}
    lines = []
    for row in settings.describe(settings_of, current):
        values = [f"{row['name']} = {row['default']}"]
        values += [f"published: {row['published']}"] if row["published"] else []
        values += [f"{plans_file.stem if plans_file else ''}: {row['plans']}"] if row.get("plans") else []
        unit = f" {row['unit']}" if row["unit"] else ""
        lines += _wrapped("; ".join(values), width, "")
        lines += _wrapped(f"{row['range']}{unit}. {row['source']}", width)
    return "\n".join(lines)


def _wrapped(text: str, width: int, indent: str = "    ") -> list[str]:
    import textwrap

    wrapper = textwrap.TextWrapper(width, indent, indent or "    ", break_long_words=False, break_on_hyphens=False)
    return wrapper.wrap(" ".join(text.split()))
