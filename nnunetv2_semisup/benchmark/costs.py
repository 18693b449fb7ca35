"""A bar chart of what a step of every trainer costs: counted for a GPU's plans, and measured."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nnunetv2_semisup.benchmark import records
from nnunetv2_semisup.benchmark.grid import BASELINE

FILE = "costs.png"
CAPTION = "Time of a training step over the stock step's, after the burn-in: counted operations, and measured."
COLOURS = ("0.25", "#0072B2", "#E69F00", "#009E73", "#CC79A7")

Series = dict[str, dict[str, float]]  # plans and how -> trainer -> stock steps


def series(results: Path) -> Series:
    """Counted costs of ``counted.csv`` first, then what ``speed.csv`` measured without compilation."""
    found: Series = {}
    for row in records.read_csv(results / "counted.csv"):
        name = f"counted, {row['patch']} voxels, batch {row['batch']}"
        found.setdefault(name, {})[row["trainer"]] = float(row["operations_ratio"])
    for row in records.read_csv(results / "speed.csv"):
        if row["compiled"] != "True":
            data = row["dataset"].split("_", 1)[-1]
            plans = f"{data} {row['configuration']}, plans {row['plans']}"
            name = f"measured, {plans}, {row['hardware']}, threads: {row['threads']}"
            found.setdefault(name, {})[row["trainer"]] = float(row["step_ratio"])
    return found


def digest(found: Series) -> str:
    """The same for the same numbers, to 4 decimals."""
    content = [(name, sorted((t, f"{v:.4f}") for t, v in values.items())) for name, values in found.items()]
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def draw(found: Series) -> Figure:
    """A group of bars per trainer, cheapest first."""
    mean = {t: np.mean([v[t] for v in found.values() if t in v]) for values in found.values() for t in values}
    trainers = sorted((t for t in mean if t.startswith(BASELINE) and t != BASELINE), key=lambda t: mean[t])
    height = 0.8 / len(found)
    figure = Figure(figsize=(8, 1.4 + 0.16 * len(trainers) * (len(found) + 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for i, (name, values) in enumerate(found.items()):
        shown = [(y, values[t]) for y, t in enumerate(trainers) if t in values]
        places = [y + (i - (len(found) - 1) / 2) * height for y, _ in shown]
        axis.barh(places, [v for _, v in shown], height, color=COLOURS[i % len(COLOURS)], label=name)
    axis.axvline(1, color="0.4", linewidth=1)
    axis.set_yticks(
        range(len(trainers)), [t.replace(f"{BASELINE},", "stock,").removeprefix(BASELINE) for t in trainers]
    )
    axis.set_ylim(len(trainers) - 0.5, -0.5)
    axis.set_xlabel("stock steps")
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", fontsize="small")
    return figure
