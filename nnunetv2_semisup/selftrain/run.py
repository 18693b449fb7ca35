"""Offline self-training: nnU-Net trains, predicts imagesUn, and trains anew with its predictions as labels.

Round 0 trains on the labelled cases. Every later round predicts the unlabelled cases with the models of the round
before, makes a data set of the labelled and the pseudo-labelled ones, and trains on it from scratch with the plans of
round 0. Each step is nnU-Net's own function and is noted in a state file when it is done; the same command goes on.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from time import perf_counter

from nnunetv2_semisup import discovery
from nnunetv2_semisup.data import splits
from nnunetv2_semisup.data.checks import require_whole_nifti
from nnunetv2_semisup.data.folders import find_unlabeled_cases, labelled_identifiers, read_dataset_json
from nnunetv2_semisup.data.preprocess import check_plans
from nnunetv2_semisup.data.reading import damaged, read_errors
from nnunetv2_semisup.datasets.raw import find_dataset, locked, new_dataset_path
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.files import (
    PREPROCESSED,
    RAW,
    RESULTS,
    nnunet_folder,
    read_json,
    read_object,
    require_preprocessed,
    write_json,
)
from nnunetv2_semisup.selftrain import dataset as dataset_module
from nnunetv2_semisup.selftrain.predict import predict_cases
from nnunetv2_semisup.training.ready import require_device

ALL = ("all",)
STATE = ("arguments", "seconds")  # keys of the state file


@dataclass(frozen=True)
class Options:
    """What makes one self-training differ from another.

    Args:
        dataset: id or name in nnUNet_raw; it has labelled cases and imagesUn.
        first_id: id of round 1's data set; round 2 has the next, and so on.
        rounds: of pseudo-labelling, 1 or more; there is one more round of training.
        configuration: nnU-Net's, e.g. 2d or 3d_fullres.
        folds: ("all",) or numbers; with two or more the disagreement is that between folds, else between rounds.
        trainer: stock nnU-Net's, any length.
        plans: name of the plans that all rounds share.
        drop: share of the unlabelled cases that is left out in a round, 0 to below 1.
        min_confidence: voxels below get the ignore label, between 0 and 1; None: none do.
    """

    dataset: str
    first_id: int
    rounds: int = 1
    configuration: str = "3d_fullres"
    folds: tuple[str, ...] = ALL
    trainer: str = "nnUNetTrainer"
    plans: str = "nnUNetPlans"
    drop: float = 0.0
    min_confidence: float | None = None


def self_train(options: Options, device: str = "cuda", processes: int = 1) -> str:
    """Do all rounds, or what is left of them; see the module's docstring.

    Args:
        options: the same again to go on after an interruption.
        device: cuda, cpu or mps.
        processes: for nnU-Net's preprocessing.

    Returns:
        A report for people.

    Raises:
        InputError: something given is wrong, or differs from what the interrupted command was given.
    """
    _check_values(options)
    source = find_dataset(options.dataset)
    preprocessed = nnunet_folder(PREPROCESSED) / source.name
    dataset_json = read_dataset_json(source)
    cases = find_unlabeled_cases(source, dataset_json)
    labelled = labelled_identifiers(source, dataset_json)
    work = nnunet_folder(RESULTS) / f"selftrain_Dataset{options.first_id:03d}"
    fresh = not (work / "state.json").is_file()
    if fresh:
        for number in range(options.rounds):
            new_dataset_path(options.first_id + number, source.name.split("_", 1)[-1], "-o")
        _check_nnunet(options, preprocessed)
        dataset_module.require_no_prefix(source, labelled)
        for file in (file for images in cases.values() for file in images):
            with read_errors(damaged(file)):
                require_whole_nifti(file, finite=True)
    if options.folds != ALL:
        splits.ensure_splits(preprocessed, labelled)
        _check_folds(options.folds, preprocessed)
    require_device(device)
    work.mkdir(parents=True, exist_ok=True)
    with locked(work / ".lock", f"another process does this self-training in {work}"):
        state = State(work / "state.json", {**asdict(options), "dataset": source.name, "unlabelled": sorted(cases)})
        run = _Run(options, source, preprocessed, work, cases, device, processes)
        steps = run.steps()
        for number, (name, step) in enumerate(steps):
            if name in state.seconds:
                continue
            left = state.time_left([later for later, _ in steps[number:]])
            print(f"[{number + 1}/{len(steps)}] {name}{left}", flush=True)
            start = perf_counter()
            step()
            state.done(name, perf_counter() - start)
    return run.report()


class State:
    """``state.json``: the arguments, and the seconds of every step that is done.

    Args:
        file: read if it is there, else written.
        arguments: what must not change from one start to the next.

    Raises:
        InputError: it was written with other arguments.
    """

    def __init__(self, file: Path, arguments: dict):
        self.file = file
        self.arguments = json.loads(json.dumps(arguments))
        self.seconds: dict[str, float] = {}
        if not file.is_file():
            self._write()
            return
        content = read_object(file, "repair it, or remove its folder and the new data sets and start again", *STATE)
        before = content["arguments"]
        changed = [key for key, value in self.arguments.items() if before.get(key) != value]
        if changed:
            told = ", ".join(f"{key} {_short(before.get(key))} -> {_short(self.arguments[key])}" for key in changed)
            raise InputError(
                f"{file}: this self-training was begun with other arguments ({told}): give the same ones to go on, or "
                f"another -o to begin anew"
            )
        self.seconds = content["seconds"]

    def done(self, name: str, seconds: float) -> None:
        """Note that a step is done."""
        self.seconds[name] = round(seconds, 1)
        self._write()

    def time_left(self, names: list[str]) -> str:
        """`` (about 3:05:00 left)`` from finished steps of the same kind; kinds that never ran are not counted."""
        known: dict[str, list[float]] = {}
        for name, seconds in self.seconds.items():
            known.setdefault(_kind(name), []).append(seconds)
        left = [sum(known[kind]) / len(known[kind]) for kind in map(_kind, names) if kind in known]
        if not left:
            return ""
        how = "about" if len(left) == len(names) else "more than"
        return f" ({how} {timedelta(seconds=round(sum(left)))} left)"

    def _write(self) -> None:
        write_json(self.file, {"arguments": self.arguments, "seconds": self.seconds})


@dataclass(frozen=True)
class _Run:
    options: Options
    source: Path
    preprocessed: Path
    work: Path
    cases: dict[str, list[str]]
    device: str
    processes: int

    def steps(self) -> list[tuple[str, Callable[[], None]]]:
        """Every step in order, by name."""
        steps: list[tuple[str, Callable[[], None]]] = []

        def add(name: str, step: Callable, *arguments) -> None:
            steps.append((name, lambda: step(*arguments)))

        for number in range(self.options.rounds + 1):
            if number:
                folds = self.folds(number - 1)
                for fold in folds if len(folds) > 1 else ():
                    add(f"round {number}: predict with fold {fold}", self.predict, number, (fold,))
                add(f"round {number}: predict with {_words(folds)}", self.predict, number, folds)
                add(f"round {number}: write data set", self.write, number)
                add(f"round {number}: preprocess", self.preprocess, number)
            for fold in self.folds(number):
                add(f"round {number}: train fold {fold}", self.train, number, fold)
        return steps

    def name(self, number: int) -> str:
        """Name of a round's data set."""
        if number == 0:
            return self.source.name
        return f"Dataset{self.options.first_id + number - 1:03d}_{self.source.name.split('_', 1)[-1]}_round{number}"

    def folds(self, number: int) -> tuple[str, ...]:
        """Folds to train in a round; where round 0 has "all", a later round has its data set's only fold."""
        return ("0",) if number and self.options.folds == ALL else self.options.folds

    def model(self, number: int) -> Path:
        """nnU-Net's model folder of a round."""
        model = f"{self.options.trainer}__{self.options.plans}__{self.options.configuration}"
        return nnunet_folder(RESULTS) / self.name(number) / model

    def predictions(self, number: int, folds: tuple[str, ...]) -> Path:
        return self.work / f"round_{number}" / f"fold_{'_'.join(folds)}"

    def predict(self, number: int, folds: tuple[str, ...]) -> None:
        labels = folds == self.folds(number - 1)  # else only for comparison
        threshold = self.options.min_confidence if labels else None
        output = self.predictions(number, folds)
        predict_cases(self.model(number - 1), folds, self.cases, output, self.device, threshold)

    def write(self, number: int) -> None:
        target = nnunet_folder(RAW) / self.name(number)
        if (target / dataset_module.RECORD).is_file():
            return  # the folder appears whole: it was killed between that and the note
        folds = self.folds(number - 1)
        labels = self.predictions(number, folds)
        if len(folds) > 1:
            compared, what = tuple(self.predictions(number, (fold,)) for fold in folds), "folds"
        elif number > 1:
            compared, what = (self.predictions(number - 1, self.folds(number - 2)), labels), "rounds"
        else:
            compared, what = (), "nothing"
        predictions = dataset_module.Predictions(labels, compared, what)
        folds_of_source = None
        if self.options.folds != ALL:
            folds_of_source = read_json(self.preprocessed / "splits_final.json", "it was there in round 0: restore it")
        dataset_module.write_dataset(
            self.source,
            target,
            self.cases,
            predictions,
            folds_of_source,
            number,
            self.options.drop,
            self.options.min_confidence,
        )

    def preprocess(self, number: int) -> None:
        from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess_dataset
        from nnunetv2.experiment_planning.plans_for_pretraining.move_plans_between_datasets import (
            move_plans_between_datasets,
        )

        raw, target = (nnunet_folder(variable) / self.name(number) for variable in (RAW, PREPROCESSED))
        target.mkdir(exist_ok=True)
        for folder, name in (
            (raw, "dataset.json"),
            (raw, "splits_final.json"),
            (self.preprocessed, "dataset_fingerprint.json"),  # what the plans were made from
        ):
            shutil.copyfile(folder / name, target / name)
        move_plans_between_datasets(self.source.name, target.name, self.options.plans)
        new_id = self.options.first_id + number - 1
        preprocess_dataset(new_id, self.options.plans, [self.options.configuration], [self.processes])

    def train(self, number: int, fold: str) -> None:
        import torch
        from nnunetv2.run.run_training import run_training

        folder = self.model(number) / f"fold_{fold}"
        for checkpoint in folder.glob("checkpoint_*.pth"):
            if not zipfile.is_zipfile(checkpoint):  # as torch writes them: this one was cut off by a kill
                checkpoint.unlink()
        run_training(
            self.name(number),
            self.options.configuration,
            fold,
            self.options.trainer,
            self.options.plans,
            continue_training=any(folder.glob("checkpoint_*.pth")),
            device=torch.device(self.device),
        )

    def report(self) -> str:
        """What became of the rounds, and how to predict with the last."""
        last = self.options.rounds
        lines = []
        for number in range(1, last + 1):
            file = nnunet_folder(RAW) / self.name(number) / dataset_module.RECORD
            record = read_object(file, "restore it", "kept", "dropped")
            lines.append(f"{self.name(number)}: {record['kept']} pseudo-labelled cases, {record['dropped']} dropped")
        how = f"-tr {self.options.trainer} -p {self.options.plans} -f {' '.join(self.folds(last))}"
        lines.append(f"next: nnUNetv2_predict -d {self.name(last)} -c {self.options.configuration} {how} -i ... -o ...")
        return "\n".join(lines)


def _check_values(options: Options) -> None:
    if options.rounds < 1:
        raise InputError(f"--rounds {options.rounds}: at least 1 round of pseudo-labels is needed")
    if not 0 <= options.drop < 1:
        raise InputError(f"--drop {options.drop}: a share of the cases from 0 to below 1, e.g. 0.2")
    if options.min_confidence is not None and not 0 < options.min_confidence < 1:
        raise InputError(f"--min_confidence {options.min_confidence}: a probability between 0 and 1, e.g. 0.7")
    numbers = all(fold.isdecimal() for fold in options.folds) and len(set(options.folds)) == len(options.folds)
    if options.folds != ALL and not (numbers and options.folds):
        raise InputError(f"-f {' '.join(options.folds)}: give all, or different numbers, e.g. 0 1 2 3 4")


def _check_nnunet(options: Options, preprocessed: Path) -> None:
    """Everything that nnU-Net would stumble over hours later."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    file = preprocessed / f"{options.plans}.json"
    plans = read_object(file, f"run nnUNetv2_plan_and_preprocess -d {options.dataset} first", "plans_name")
    check_plans(plans, options.configuration, f"-c {options.configuration}: {file}", "plan again")
    if plans["plans_name"] != options.plans:
        raise InputError(f'{file} has the "plans_name" {plans["plans_name"]}: set it to {options.plans}')
    configuration = PlansManager(plans).get_configuration(options.configuration)
    if configuration.previous_stage_name is not None:
        raise InputError(f"-c {options.configuration}: the cascade's second stage cannot be self-trained, use another")
    require_preprocessed(preprocessed, configuration.data_identifier, options.plans, options.configuration)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            found = recursive_find_trainer_class_by_name(options.trainer)
    except RuntimeError:
        raise InputError(
            f"-tr {options.trainer}: nnU-Net finds no such trainer; nnUNetTrainer is the stock one"
        ) from None
    if issubclass(found, tuple(discovery.trainers().values())):
        raise InputError(f"-tr {options.trainer} learns from imagesUn itself: self-training takes a stock trainer")


def _check_folds(folds: tuple[str, ...], preprocessed: Path) -> None:
    """nnU-Net would divide the cases anew, pseudo-labelled ones too, for a fold that its file does not have."""
    file = preprocessed / "splits_final.json"
    known = len(read_json(file, "repair it, or remove it to get new folds")) if file.is_file() else 5
    if wrong := [fold for fold in folds if int(fold) >= known]:
        raise InputError(
            f"-f {' '.join(wrong)}: {preprocessed.name} has the folds 0 to {known - 1} (splits_final.json)"
        )


def _kind(name: str) -> str:
    """``train`` of ``round 1: train fold 0``."""
    return name.split(": ")[1].split()[0]


def _words(folds: tuple[str, ...]) -> str:
    return f"fold {folds[0]}" if len(folds) == 1 else f"folds {' '.join(folds)} together"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
