"""Time and memory of one training step of every trainer, over the stock step on the same plans, in one process.

The steps are nnU-Net's and ours as they are trained (loss, backward, clipping, optimiser, teacher), on random batches
that lie ready: loaders are left out. So is the burn-in, whose steps are stock nnU-Net's. A method may cost more or less
in the course of training, so its time is the mean over four points of it. Trainers take turns, step by step, so that
other load on the machine hits all of them; a ratio is the median over rounds of the method's time over the stock step's
in the same round. In 3D on a CPU our trainers store weights with channels last, which is faster; stock nnU-Net with the
same layout is a row of its own, so that what is the method's and what is the layout's can be told apart.

Counted: floating-point operations of convolutions and matrix products over those of the stock step, the mean over the
same points: what the time comes to where nothing else costs any.

Peak memory: CUDA's ``max_memory_allocated``; on the CPU what torch allocated at most in one step (profiler) beside the
weights, optimiser state and batch that were there before. Scratch space inside oneDNN is in neither number.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_semisup import discovery
from nnunetv2_semisup.benchmark import records
from nnunetv2_semisup.benchmark.grid import BASELINE
from nnunetv2_semisup.files import environment
from nnunetv2_semisup.network import taps
from nnunetv2_semisup.training.rehearsal import POINTS, build, is_ours, random_batch, step

CHANNELS_LAST = f"{BASELINE}, channels last"  # how our trainers lay weights out on a CPU in 3D, which nnU-Net does not
WARM_UP = 2  # steps per trainer: memory pools, algorithms, compilation
COLUMNS = (
    *("dataset", "configuration", "plans", "trainer", "compiled", "counted_ratio", "step_seconds", "step_ratio"),
    *("peak_memory_mb", "memory_ratio", "rounds", "device", "hardware", "threads", "commit", "versions"),
)


def measure(
    dataset: str, configuration: str, plans: str, device: str, rounds: int = 5, trainers: Iterable[str] | None = None
) -> list[dict]:
    """Rows (:data:`COLUMNS`) of the stock trainer and of ``trainers``, compiled and not where nnU-Net compiles (CUDA).

    Args:
        dataset: full name of a preprocessed data set; no image of it is read.
        configuration: e.g. ``3d_fullres``.
        plans: name of the plans.
        device: cuda, cpu or mps.
        rounds: steps timed per trainer and point of training.
        trainers: names without epoch suffix; None for all of ours.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports missing GPUs as errors otherwise
    names = [BASELINE, *(name for name in trainers or discovery.trainers() if name != BASELINE)]
    common = {"dataset": dataset, "configuration": configuration, "plans": plans, "rounds": rounds, "device": device}
    common |= {"hardware": records.hardware(device), "threads": torch.get_num_threads(), "commit": records.commit()}
    common["versions"] = records.versions_text(records.versions())
    rows = []
    for compiled in (False, True) if device == "cuda" else (False,):
        with environment(nnUNet_compile=str(compiled)):
            memory, operations = {}, {}
            for name in names:  # one at a time: nothing of another trainer lies in memory
                trainer = build(dataset, configuration, plans, name, device)
                memory[name], operations[name] = peak_memory_mb(trainer), counted_operations(trainer)
                del trainer
                release()
            built = [build(dataset, configuration, plans, name, device) for name in names]
            if device == "cpu" and len(built[0].configuration_manager.patch_size) == 3:
                built.append(build(dataset, configuration, plans, BASELINE, device))
                taps.use_channels_last(built[-1].network)
            times = step_times(built, rounds)
            for name, seconds in zip([*names, CHANNELS_LAST], times, strict=False):
                ratios = [s / stock for s, stock in zip(seconds, times[0], strict=True)]
                measured = {"step_seconds": median(seconds), "step_ratio": median(ratios)}
                if name in memory:
                    measured["counted_ratio"] = operations[name] / operations[BASELINE]
                    measured |= {"peak_memory_mb": memory[name], "memory_ratio": memory[name] / memory[BASELINE]}
                rows.append({**common, "trainer": name, "compiled": compiled, **measured})
            del built
            release()
    return rows


def pinned(value: Any) -> Any:
    """A batch with its tensors in pinned memory, as nnU-Net's augmenters hand it over for a GPU."""
    return tree_map_only(torch.Tensor, torch.Tensor.pin_memory, value)


def step_times(trainers: list[nnUNetTrainer], rounds: int) -> list[list[float]]:
    """Seconds per step, for each trainer a list over rounds of the mean over :data:`POINTS`; they take turns."""
    batches = [
        pinned(random_batch(trainer)) if trainer.device.type == "cuda" else random_batch(trainer)
        for trainer in trainers
    ]
    for trainer, batch in zip(trainers, batches, strict=True):
        for point in POINTS:
            for _ in range(WARM_UP):
                step(trainer, batch, point)
    times: list[list[float]] = [[] for _ in trainers]
    for _ in range(rounds):
        for i, (trainer, batch) in enumerate(zip(trainers, batches, strict=True)):
            times[i].append(sum(_timed(trainer, batch, point) for point in POINTS) / len(POINTS))
    return times


def peak_memory_mb(trainer: nnUNetTrainer) -> float:
    """Largest amount that one step of ``trainer`` held, over all points of training, in MiB."""
    batch = random_batch(trainer)
    for point in POINTS if trainer.device.type == "cuda" else POINTS[:1]:
        step(trainer, batch, point)  # the optimiser's state exists from the first step on; cuDNN chooses algorithms
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        for point in POINTS:
            step(trainer, batch, point)
        return torch.cuda.max_memory_allocated() / 2**20
    return max(_peak_on_cpu(trainer, batch, point) for point in POINTS) / 2**20


def counted_operations(trainer: nnUNetTrainer) -> float:
    """Floating-point operations of a step, the mean over all points of training."""
    batch = random_batch(trainer)
    with FlopCounterMode(display=False) as counter:
        for point in POINTS:
            step(trainer, batch, point)
    return counter.get_total_flops() / len(POINTS)


def _peak_on_cpu(trainer: nnUNetTrainer, batch: dict, point: float) -> int:
    trainer.optimizer.zero_grad(set_to_none=True)  # as the step does first; the profiler would miss it
    before = _bytes(_tensors(trainer, batch))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(trainer, batch, point)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        held += change
        peak = max(peak, held)
    return before + peak


def _tensors(trainer: nnUNetTrainer, batch: dict) -> Iterator[torch.Tensor]:
    """Weights, optimiser state, the method's buffers, and the batch's tensors."""
    modules = [trainer.network, *([trainer.method] if is_ours(trainer) else [])]
    for module in modules:
        yield from module.buffers()
        yield from module.parameters()
    for state in trainer.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))
    yield batch["data"]
    yield from batch["target"]
    if "unlabelled" in batch:
        yield batch["unlabelled"]["data"]


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in {t.data_ptr(): t for t in tensors}.values())


def _timed(trainer: nnUNetTrainer, batch: dict, point: float) -> float:
    _synchronise(trainer)
    start = perf_counter()
    step(trainer, batch, point)
    _synchronise(trainer)
    return perf_counter() - start


def _synchronise(trainer: nnUNetTrainer) -> None:
    """Wait for the GPU: optimiser and teacher go on there after the step's losses have been read."""
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()


def release() -> None:
    """Give back what objects that are gone held, so that it is not counted for the next trainer."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    header = "trainer", "compiled", "counted over stock", "s per step", "over stock", "peak MiB", "over stock"
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    digits = {"counted_ratio": 2, "step_seconds": 4, "step_ratio": 2, "peak_memory_mb": 0, "memory_ratio": 2}
    for row in rows:
        cells = [row["trainer"], "yes" if str(row["compiled"]) == "True" else "no"]
        cells += [f"{float(row[key]):.{n}f}" if row.get(key) else "" for key, n in digits.items()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sections(results: Path) -> str:
    """``results/speed.csv`` as Markdown, a table per plans and machine; empty without that file."""
    groups: dict[str, list[dict]] = {}
    for row in records.read_csv(results / "speed.csv"):
        where = f"{row['dataset']}, {row['configuration']}, plans `{row['plans']}`"
        how = f"{row['hardware']}, {row['threads']} threads, {row['rounds']} rounds, commit {row['commit']}"
        groups.setdefault(f"{where}; {how}:", []).append(row)
    return "\n".join(f"{title}\n\n{table(rows)}\n" for title, rows in groups.items())


def write(results: Path, rows: list[dict]) -> Path:
    """Put ``rows`` into ``results/speed.csv``, in the place of earlier ones of the same trainer, plans and hardware."""
    file = results / "speed.csv"

    def key(row: dict) -> tuple[str, ...]:
        names = ("dataset", "configuration", "plans", "trainer", "compiled", "device", "hardware", "threads")
        return tuple(str(row[name]) for name in names)

    new = {key(row) for row in rows}
    records.write_csv(file, COLUMNS, [*(row for row in records.read_csv(file) if key(row) not in new), *rows])
    return file
