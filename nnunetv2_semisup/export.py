"""A trained model as stock nnU-Net made it: installed and used without this package.

What prediction needs is kept: the network's weights, plans, data set description. The trainer's name becomes
``nnUNetTrainer``; where the weights come from stands in a JSON file beside them.
"""

from __future__ import annotations

import hashlib
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch

from nnunetv2_semisup import __version__, discovery, files, names
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.files import RESULTS, cannot_write, read_object, write_json
from nnunetv2_semisup.training import checkpoints

STOCK = "nnUNetTrainer"
PROVENANCE = "semisup_provenance.json"
LAST = "checkpoint_final.pth"
END_FIRST = "train to the end first, or name another checkpoint with -chk"
SHOWN = 3  # commands in a message
Weights = Literal["as_trained", "student", "teacher"]


def export(
    dataset: str,
    trainer: str,
    plans: str,
    configuration: str,
    folds: list[str],
    output: Path,
    weights: Weights = "as_trained",
    checkpoint: str = LAST,
) -> str:
    """Write a model as a folder, or as a zip file for ``nnUNetv2_install_pretrained_model_from_zip``.

    Args:
        dataset: id or name of a data set in nnUNet_results.
        trainer: as it was trained, with its number of epochs.
        plans: name of the plans.
        configuration: e.g. ``3d_fullres``.
        folds: numbers, or ``all``.
        output: a file that ends with ``.zip``, or a folder for ``DatasetXXX_NAME/nnUNetTrainer__PLANS__CONFIGURATION``.
        weights: those that the training predicts with, or the student's or the teacher's.
        checkpoint: name of the checkpoint files.

    Returns:
        a report for people.

    Raises:
        InputError: something is missing, or is there already; nothing was written.
    """
    source = files.find_dataset(dataset, RESULTS, "train first, or give the id of a data set that was trained")
    model = source / f"{trainer}__{plans}__{configuration}"
    if not model.is_dir():
        asked = trainer, plans, configuration
        options = ["-o", str(output)]
        options += ["--weights", weights] if weights != "as_trained" else []
        options += ["-chk", checkpoint] if checkpoint != LAST else []
        raise InputError(f"{model} does not exist: {_instead(source, dataset, asked, options, checkpoint)}")
    name = Path(source.name) / f"{STOCK}__{plans}__{configuration}"
    target = output if output.suffix == ".zip" else output / name
    if target.exists():
        raise InputError(f"{target} exists: name another output, or remove it")
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=".tmp_export_") as temporary:
        folder = Path(temporary) / name
        folder.mkdir(parents=True)
        try:
            provenance = _write_model(model, folder, trainer, folds, weights, checkpoint)
            write_json(folder / PROVENANCE, provenance, indent=2)
            if output.suffix == ".zip":
                whole = shutil.make_archive(str(Path(temporary) / "model"), "zip", temporary, source.name)
                shutil.move(whole, output)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                folder.rename(target)
        except OSError as error:
            raise cannot_write(target, error.strerror or str(error)) from error
    how = (
        f"nnUNetv2_install_pretrained_model_from_zip {output}" if output.suffix == ".zip" else f"copy it to ${RESULTS}"
    )
    use = (
        f"nnUNetv2_predict -d {source.name} -c {configuration} -p {plans} -f {' '.join(folds)} -i IMAGES -o PREDICTIONS"
    )
    unused = [fold for fold, content in provenance["folds"].items() if content["terms_started_after_steps"] is None]
    warning = f"\n  WARNING: no unlabelled image was used in fold {', '.join(unused)}: that model is stock nnU-Net's"
    return f"{target}\n  install: {how}\n  use, without this package: {use}{warning if unused else ''}"


def _instead(source: Path, dataset: str, asked: tuple[str, str, str], options: list[str], checkpoint: str) -> str:
    """The commands that export what there is, the most similar to trainer, plans and configuration ``asked`` first."""
    wanted = (names.split_epochs(asked[0])[0], *asked[1:])
    found = []
    for folder in sorted(source.iterdir()):
        folds = _trained_folds(folder, checkpoint)
        trainer, *rest = folder.name.split("__")
        stem = names.split_epochs(trainer)[0]
        if len(rest) != 2 or not folds or stem not in discovery.trainers():
            continue
        plans, configuration = rest
        model = ["-d", dataset, "-tr", trainer, "-p", plans, "-c", configuration, "-f", *folds]
        equal = sum(a == b for a, b in zip(wanted, (stem, plans, configuration), strict=True))
        found.append((-equal, shlex.join(["nnUNetv2_semisup_export", *model, *options])))
    if not found:
        return f"no trainer of ours has a {checkpoint} in {source}: {END_FIRST}"
    commands = [command for _, command in sorted(found)]
    more = f" ({len(commands) - SHOWN} more in {source})" if len(commands) > SHOWN else ""
    return f"what is trained is exported by {' or by '.join(commands[:SHOWN])}{more}"


def _trained_folds(model: Path, checkpoint: str) -> list[str]:
    """For ``-f``: ``all`` alone, or else the numbers of the folds that have the checkpoint."""
    folds = sorted(f.name.removeprefix("fold_") for f in model.glob("fold_*") if (f / checkpoint).is_file())
    return ["all"] if "all" in folds else folds


def _write_model(
    model: Path, folder: Path, trainer: str, folds: list[str], weights: Weights, checkpoint: str
) -> dict[str, Any]:
    plans = read_object(model / "plans.json", "train again, it is written at the start")
    settings = plans.pop("semisup", {})
    write_json(folder / "plans.json", plans, indent=4)
    for name in ("dataset.json", "dataset_fingerprint.json"):
        if (model / name).is_file():
            shutil.copyfile(model / name, folder / name)
    from_folds = {}
    for fold in folds:
        file = model / f"fold_{fold}" / checkpoint
        if not file.is_file():
            trained = _trained_folds(model, checkpoint)
            remedy = f"there is -f {' '.join(trained)}" if trained else f"no fold has it: {END_FIRST}"
            raise InputError(f"{file} does not exist: {remedy}")
        content = checkpoints.load_plain(str(file))
        ours = content.pop(checkpoints.KEY, None)
        if not isinstance(ours, dict):
            raise InputError(f"{file} is a checkpoint of {content.get('trainer_name')}, not of a trainer of ours")
        content["network_weights"] = chosen_weights(content, ours, weights, str(file))
        content |= {"trainer_name": STOCK, "optimizer_state": None, "grad_scaler_state": None}
        (folder / f"fold_{fold}").mkdir()
        torch.save(content, folder / f"fold_{fold}" / checkpoint)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        from_folds[fold] = {
            "sha256": digest,
            "epochs": content["current_epoch"],
            "terms_started_after_steps": ours.get("start", {"step": 0})["step"],  # version 0.1.0: with the first
            "settings": ours["settings"],
        }
    return {
        "trainer": trainer,
        "weights": weights,
        "package": f"nnunetv2_semisup {__version__}",
        "plans_settings": settings,
        "checkpoint": checkpoint,
        "folds": from_folds,
    }


def chosen_weights(content: dict, ours: dict, weights: Weights, file: str) -> dict:
    """The network's weights of a checkpoint: those of prediction, the student's or the teacher's.

    Args:
        content: nnU-Net's part.
        ours: our part.
        weights: which.
        file: for the error.
    """
    if weights == "as_trained":
        return content["network_weights"]
    if weights == "student":
        return ours["training_weights"] or content["network_weights"]
    prefix = "teacher.module."
    teacher = {key.removeprefix(prefix): value for key, value in ours["method"].items() if key.startswith(prefix)}
    if teacher.keys() != content["network_weights"].keys():
        raise InputError(f"{file}: the method of {ours['trainer']} has no teacher: leave --weights out")
    return teacher
