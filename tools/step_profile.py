"""Where the CPU time of a training step goes: shares of torch's operators, Python between them left out.

python -m tools.step_profile DATASET_ID CONFIGURATION PLANS [TRAINER ...]
"""

from __future__ import annotations

import sys
from collections import defaultdict
from time import process_time

import torch
from torch.profiler import ProfilerActivity, profile

from nnunetv2_semisup.files import find_preprocessed
from nnunetv2_semisup.training import rehearsal

STEPS = 5  # at each point of training
KINDS = {  # part of an operator's name -> what it is; the first that fits
    "conv": "convolution",
    "norm": "normalisation",
    "leaky_relu": "activation",
    "upsample": "interpolation",
    "grid_sampler": "interpolation",
    "Optimizer": "optimiser, weight averages",
    "_foreach": "optimiser, weight averages",
    "lerp": "optimiser, weight averages",
}


def shares(dataset: str, configuration: str, plans: str, name: str) -> tuple[float, dict[str, float]]:
    """Milliseconds of CPU time of a step without the profiler, and kind of operator -> share of all operators' time."""
    trainer = rehearsal.build(dataset, configuration, plans, name, "cpu")
    batch = rehearsal.random_batch(trainer)
    steps = [point for point in rehearsal.POINTS for _ in range(STEPS)]
    for point in rehearsal.POINTS:
        rehearsal.step(trainer, batch, point)
    start = process_time()
    for point in steps:
        rehearsal.step(trainer, batch, point)
    plain = process_time() - start
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for point in steps:
            rehearsal.step(trainer, batch, point)
    times: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        kind = next((kind for part, kind in KINDS.items() if part in event.key), "all other operators")
        times[kind] += event.self_cpu_time_total / 1e6
    total = sum(times.values())
    return 1000 * plain / len(steps), {kind: seconds / total for kind, seconds in times.items()}


def main(dataset: str, configuration: str, plans: str, *names: str) -> None:
    torch.set_num_threads(1)
    folder = find_preprocessed(dataset).name
    for name in names or ("nnUNetTrainer", "nnUNetTrainerPasteMatch"):
        step, found = shares(folder, configuration, plans, name)
        print(f"\n{folder} {configuration} {plans} {name}: {step:.0f} ms of CPU time a step")
        for kind, share in sorted(found.items(), key=lambda item: -item[1]):
            print(f"{100 * share:5.1f} %  {kind}")


if __name__ == "__main__":
    main(*sys.argv[1:])
