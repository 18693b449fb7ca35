"""One run in a process of its own: seed, train with nnU-Net's own trainer, predict the test images, evaluate, record.

Started by ``run.py`` as ``python -m nnunetv2_semisup.benchmark.worker JOB``. Stock trainers and ours go the same way.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import threading
from datetime import datetime, timezone
from itertools import pairwise
from math import isnan
from pathlib import Path
from pickle import UnpicklingError
from statistics import median
from time import perf_counter
from typing import Any

from filelock import FileLock, Timeout

from nnunetv2_semisup.benchmark import records
from nnunetv2_semisup.benchmark.grid import Run
from nnunetv2_semisup.benchmark.records import WorkFolder
from nnunetv2_semisup.data.folders import RAW_FOLDER, labelled_cases, labelled_identifiers, read_dataset_json
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.files import read_object, whole_file

BUSY = 75  # exit code when another process does this run (EX_TEMPFAIL)
LOCK_SECONDS = 10  # a killed runner's process needs a moment to die


def main(job: dict) -> int:
    """Do a job and return the exit code.

    Args:
        job: ``run`` (fields of :class:`Run`), ``work`` (folder), ``device``, ``threads`` (None: all cores).
    """
    run = Run(**{**job["run"], "inference": tuple(job["run"]["inference"])})
    work = WorkFolder(Path(job["work"]))
    work.lock(run).parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(str(work.lock(run)), timeout=LOCK_SECONDS):
            print(f"\n===== {run.id}, {now()} =====", flush=True)
            execute(run, work, job["device"], job["threads"])
    except Timeout:
        return BUSY
    return 0


def execute(run: Run, work: WorkFolder, device: str, threads: int | None) -> None:
    """Train unless that is recorded, then do and record the inferences that are missing, one by one."""
    if not work.missing(run):
        return
    raw = Path(os.environ["nnUNet_raw"], run.dataset)
    plans_file = Path(os.environ["nnUNet_preprocessed"], run.dataset, f"{run.plans}.json")
    plans = read_object(plans_file, "run nnUNetv2_plan_and_preprocess")
    model = work.model(run, plans["plans_name"])
    os.environ["nnUNet_results"] = str(work.nnunet_results(run))
    set_threads(device, threads)
    record = work.read(run)
    if record is None:
        dataset_json = read_dataset_json(raw)
        same = {"plans": plans, "data": data_digest(raw, dataset_json), "device": device}
        begun = begin(run, work, {**same, "versions": records.versions()}, model / f"fold_{run.fold}")
        record = {
            "format": records.FORMAT,
            "run": run.id,
            **{key: value for key, value in vars(run).items() if key != "inference"},
            "labeled": len(labelled_identifiers(raw, dataset_json)),
            "started": begun["started"],
            "resumed": begun["resumed"],
            "device": device,
            "hardware": "; ".join(begun["hardware"]),
            "commit": "; ".join(filter(None, begun["commits"])),
            "versions": begun["versions"],
            **train(run, device, work.checkpoint(run)),
            "evaluations": {},
        }
        records.write(work.record(run), record)
    elif not (model / f"fold_{run.fold}" / "checkpoint_final.pth").is_file():
        raise InputError(
            f"{model} no longer holds the checkpoint of a trained run: remove {work.record(run)} to train it again"
        )
    _remove(work.unfinished(run))
    for inference in work.missing(run):
        record["evaluations"][inference] = predict_and_evaluate(run, work, model, raw, inference, device)
        records.write(work.record(run), record)
    work.failure(run).unlink(missing_ok=True)


def data_digest(raw: Path, dataset_json: dict) -> str:
    """The same for the same data set, wherever it lies: names and sizes of all images, content of all labels."""
    labelled = labelled_cases(raw, dataset_json)
    images = [Path(file) for case in labelled.values() for file in case["images"]]
    images += sorted((raw / RAW_FOLDER).glob("[!.]*"))
    sizes = [(file.parent.name, file.name, file.stat().st_size) for file in images]
    labels = {case: hashlib.sha256(Path(files["label"]).read_bytes()).hexdigest() for case, files in labelled.items()}
    meaning = {key: dataset_json.get(key) for key in ("labels", "regions_class_order", "channel_names", "modality")}
    return hashlib.sha256(json.dumps([sizes, labels, meaning], sort_keys=True).encode()).hexdigest()[:16]


def begin(run: Run, work: WorkFolder, same: dict, fold_folder: Path) -> dict:
    """Note that a training begins; or goes on, with its checkpoint and if what must not change is ``same``.

    Returns:
        ``started``, ``resumed`` (how many times), ``commits`` and ``hardware`` (of all attempts), and ``same``.
    """
    checkpoint, note = work.checkpoint(run), work.unfinished(run) / "begun.json"
    begun: dict[str, Any] = {"started": now(), "resumed": 0, "commits": [], "hardware": [], **same}
    if checkpoint.is_file():
        needed = [key for key in begun if key not in ("data", "hardware")]  # earlier versions did not note these
        before = begun | read_object(note, f"remove {note.parent}, and the training starts again", *needed)
        changed = [key for key in same if before[key] != same[key]]
        if changed:
            print(f"{', '.join(changed)} changed since the training began: it starts again", flush=True)
        else:
            begun = {**before, "resumed": before["resumed"] + 1}
    if begun["resumed"]:
        for left in fold_folder.glob(".*.tmp"):  # of a checkpoint that was being written
            left.unlink()
    else:
        _remove(fold_folder)
        checkpoint.unlink(missing_ok=True)
    begun["commits"] = list(dict.fromkeys([*begun["commits"], records.commit()]))
    begun["hardware"] = list(dict.fromkeys([*begun["hardware"], records.hardware(same["device"])]))
    records.write(note, begun)
    return begun


def train(run: Run, device: str, checkpoint: Path) -> dict:
    """Train; returns what was measured. nnU-Net's validation afterwards is left out: no choice rests on it.

    Args:
        checkpoint: written at the end of every epoch but the last. Where there is one, the training goes on from it.
    """
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args
    from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

    seed_everything(run.seed)
    fold = run.fold if run.fold == "all" else int(run.fold)
    resume = checkpoint.is_file()
    trainer = get_trainer_from_args(
        run.dataset, run.configuration, fold, run.trainer_name, run.plans, resume, torch.device(device)
    )
    if resume:
        _load(trainer, checkpoint)
        seed_everything(run.seed + 1000 * trainer.current_epoch)  # or it would draw the first epochs' patches again
    earlier_steps = trainer.current_epoch * trainer.num_iterations_per_epoch
    earlier_seconds = sum(_epoch_seconds(trainer))
    if device == "cuda":
        torch.backends.cudnn.deterministic = False  # as nnUNetv2_train
        torch.backends.cudnn.benchmark = True
        torch.cuda.reset_peak_memory_stats()
    ends = _note_ends_of_steps(trainer)
    _save_every_epoch(trainer, checkpoint)
    start = perf_counter()
    trainer.run_training()
    measured = {
        "steps": earlier_steps + len(ends),
        "seconds_per_step": _median_difference(ends),
        "train_seconds": round(earlier_seconds + perf_counter() - start, 1),
        "peak_memory_mb": round(peak_memory_mb(device)),
        "threads": torch.get_num_threads(),
        "loader_processes": get_allowed_n_proc_DA(),
        "curve": curve(trainer),
    }
    del trainer
    gc.collect()  # prediction needs the memory
    if device == "cuda":
        torch.cuda.empty_cache()
    return measured


def curve(trainer) -> list[dict[str, float | None]]:
    """A row per epoch: nnU-Net's losses and online Dice per class, and what a trainer of ours logged; None for NaN."""
    losses = (trainer.logger.get_value(key, None) for key in ("train_losses", "val_losses"))
    dice = trainer.logger.get_value("dice_per_class_or_region", None)
    rows: list[dict[str, float]] = []
    for epoch, (train_loss, val_loss, of_classes) in enumerate(zip(*losses, dice, strict=True)):
        numbers = {"train_loss": train_loss, "val_loss": val_loss}
        numbers |= {f"online_dice_{i}": value for i, value in enumerate(of_classes, 1)}
        rows.append({"epoch": epoch, **numbers})
    if hasattr(trainer, "training_log"):
        rows = [row | ours for row, ours in zip(rows, trainer.training_log.rows, strict=True)]
    return [{key: None if isnan(value) else round(float(value), 6) for key, value in row.items()} for row in rows]


def _note_ends_of_steps(trainer) -> list[float]:
    """A list that will hold the time at the end of every training step of ``trainer``."""
    ends: list[float] = []
    step = trainer.train_step

    def timed_step(batch):
        result = step(batch)
        ends.append(perf_counter())
        return result

    trainer.train_step = timed_step
    return ends


def _save_every_epoch(trainer, checkpoint: Path) -> None:
    """Let ``trainer`` save at the end of every epoch but the last, and write every checkpoint whole or not at all.

    Its own ``checkpoint_latest.pth`` does not serve: stock nnU-Net writes it every 50 epochs, ours within an epoch too,
    and then the resumed run would have more steps than the others of the grid.
    """
    end_epoch, save = trainer.on_epoch_end, trainer.save_checkpoint

    def save_whole(file):
        with whole_file(Path(file), only_writer=True) as temporary:
            save(str(temporary))

    def end_and_save():
        end_epoch()
        if trainer.current_epoch < trainer.num_epochs:
            trainer.current_epoch -= 1  # save_checkpoint writes current_epoch + 1
            save_whole(checkpoint)
            trainer.current_epoch += 1

    trainer.on_epoch_end, trainer.save_checkpoint = end_and_save, save_whole


def _load(trainer, checkpoint: Path) -> None:
    try:
        trainer.load_checkpoint(str(checkpoint))
    except (RuntimeError, ValueError, LookupError, EOFError, OSError, UnpicklingError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{checkpoint} cannot be gone on from ({reason}): remove {checkpoint.parent}, and the training starts again"
        ) from error
    print(f"Going on from {checkpoint}: {trainer.current_epoch} of {trainer.num_epochs} epochs are done", flush=True)


def _epoch_seconds(trainer) -> list[float]:
    """Of the epochs that are done, from nnU-Net's own log."""
    starts, ends = (trainer.logger.get_value(f"epoch_{kind}_timestamps", None) for kind in ("start", "end"))
    return [end - start for start, end in zip(starts, ends, strict=True)]


def predict_and_evaluate(run: Run, work: WorkFolder, model: Path, raw: Path, inference: str, device: str) -> dict:
    from nnunetv2_semisup.evaluation.folder import evaluate_folder
    from nnunetv2_semisup.evaluation.inference import predict_folder

    start = perf_counter()
    output = work.predictions(run) / inference
    _remove(output)
    predict_folder(model, raw / "imagesTs", output, inference, device, folds=(run.fold,))
    predicted = perf_counter()
    cases = evaluate_folder(raw / "labelsTs", output, raw / "dataset.json", None, largest_component=True)
    return {
        "commit": records.commit(),
        "predict_seconds": round(predicted - start, 1),
        "evaluate_seconds": round(perf_counter() - predicted, 1),
        "cases": [{k: None if isinstance(v, float) and isnan(v) else v for k, v in case.items()} for case in cases],
    }


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch of this process.

    nnU-Net gives its loader workers fresh random seeds, so with workers only the initial weights and what is drawn in
    this process (noise, boxes) repeat; with ``nnUNet_n_proc_DA=0`` a run on the CPU repeats exactly.
    """
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def peak_memory_mb(device: str) -> float:
    """CUDA: most memory torch had allocated. Else: largest resident set of this process, interpreter included."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def end_with_parent() -> None:
    """Kill this process group when the runner's end of our standard input closes, even if it was killed itself."""

    def wait():
        while os.read(0, 1):
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def set_threads(device: str, threads: int | None) -> None:
    """torch's threads: ``threads``, or without it all cores on the CPU and one beside a GPU, as ``nnUNetv2_train``."""
    import torch

    if threads is not None or device == "cuda":
        torch.set_num_threads(threads or 1)


def _remove(folder: Path) -> None:
    """Remove what an interrupted attempt may have left."""
    if folder.exists():
        shutil.rmtree(folder)


def _median_difference(times: list[float]) -> float | None:
    """Median time from the end of one step to the end of the next, loading included; None for a single step."""
    return round(median(b - a for a, b in pairwise(times)), 5) if len(times) > 1 else None


if __name__ == "__main__":
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # submitit's, of the time limit: Slurm sends it to every process
    end_with_parent()
    sys.exit(main(json.loads(sys.argv[1])))
