"""What a semi-supervised run records beside nnU-Net's own log, which takes a fixed set of keys."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_semisup import files
from nnunetv2_semisup.colours import COLOURS

MOST_WITH_MARKERS = 50  # epochs; with more the markers would hide the lines
ORDERS = 10.0  # how many times the largest line is the smallest before the axis is logarithmic
MOST_IN_COLUMN = 8  # names in a column of a legend

DICE = "online Dice"
VOLUMES = "share of voxels in\nthe pseudo-labels"
WEIGHT = "weight"
FROM_ZERO = (WEIGHT, VOLUMES)  # panels

Lines = dict[str, np.ndarray]  # name -> value per row of the log, NaN where it has none


class TrainingLog:
    """Means over the steps of each epoch, as one row per epoch; the rows travel in the checkpoint."""

    def __init__(self):
        self.rows: list[dict[str, float]] = []
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)

    def add(self, values: dict[str, float]) -> None:
        """Record the values of one optimiser step; not every step needs to have every key."""
        for key, value in values.items():
            self._sums[key] += value
            self._counts[key] += 1

    def start_epoch(self) -> None:
        """Forget steps of an epoch that was not finished."""
        self._sums.clear()
        self._counts.clear()

    def end_epoch(self, epoch: int, **extra: float) -> dict[str, float]:
        """Close the epoch; returns its row."""
        row = {"epoch": epoch, **extra, **{key: self._sums[key] / self._counts[key] for key in self._sums}}
        self.rows = [r for r in self.rows if r["epoch"] < epoch] + [row]
        self.start_epoch()
        return row

    def write_csv(self, file: Path) -> None:
        """Write all rows; a key that a row lacks (a term of another stage) is an empty cell."""
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        files.write_csv(file, columns, ({k: f"{v:.6g}" for k, v in row.items()} for row in self.rows))

    def draw(
        self,
        file: Path,
        title: str = "",
        heads: Mapping[int, str] | None = None,
        dice: Sequence[Sequence[float]] = (),
        dice_of: str = "",
        threshold: float = 0.0,
        labelled_volumes: Sequence[float] = (),
    ) -> None:
        """One panel per kind of value over the epochs; vertical lines where the method's terms and its stages begin.

        A panel with a single line has its name at the axis and no legend.

        Args:
            file: PNG to write.
            title: above all panels.
            heads: number of a head in the log's names -> name of its class or region.
            dice: nnU-Net's online Dice: per epoch a value for each of ``heads``, NaN where a class is nowhere.
            dice_of: what it is measured on, for instance "training cases".
            threshold: online Dice that the method waits for; 0: it waits for none.
            labelled_volumes: for each of ``heads`` its share of the labelled cases' voxels; empty if not known.
        """
        from matplotlib import style
        from matplotlib.figure import Figure

        heads = heads or {}
        panels = {label: lines for label, lines in self._panels(heads).items() if lines}
        if not panels:  # every step so far overflowed
            return
        if len(dice):
            panels = {DICE + (f"\n({dice_of})" if dice_of else ""): self._dice(list(heads.values()), dice), **panels}
        epochs = [row["epoch"] for row in self.rows]
        with style.context("default"):  # nnU-Net's plot leaves seaborn's settings, with letters 2.5 times as large
            figure = Figure(figsize=(10, 0.7 + 2.2 * len(panels)), layout="constrained")
            axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
            for axis, (label, lines) in zip(axes, panels.items(), strict=True):
                _draw_lines(axis, epochs, lines, may_be_log=not label.startswith(("share", DICE)))
                if label.startswith(DICE):
                    axis.set_ylim(0, 1)
                    if threshold > 0:
                        name = f"the method waits\nfor {threshold:g}"
                        axis.axhline(threshold, color="0.4", linestyle=":", linewidth=1, label=name)
                elif label == VOLUMES and len(labelled_volumes):
                    _draw_labelled_volumes(axis, dict(zip(heads.values(), labelled_volumes, strict=True)))
                if label in FROM_ZERO and axis.get_yscale() == "linear":
                    axis.set_ylim(bottom=0)
                for line in axis.lines:
                    line.set_clip_on(False)  # a class at 0 is seen whole
                _name_lines(axis, label)
                for epoch, _ in self._marks():
                    axis.axvline(epoch, color="0.4", linestyle=(0, (4, 3)), linewidth=1, zorder=1)
            for epoch, text in self._marks():
                axes[0].annotate(
                    f" {text}", (epoch, 1.01), xycoords=("data", "axes fraction"), fontsize="small", va="bottom"
                )
            axes[-1].set_xlabel("epoch")
            axes[-1].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            if len(set(epochs)) == 1:
                axes[-1].set_xlim(epochs[0] - 0.5, epochs[0] + 0.5)
            figure.suptitle("\n".join(filter(None, (title, self._state()))), fontsize="medium")
            with files.whole_file(file) as temporary:
                figure.savefig(temporary, dpi=120, format="png")

    def _panels(self, heads: Mapping[int, str]) -> dict[str, Lines]:
        """Label of the axis -> lines, maybe none."""
        losses, weights = self._lines("loss_"), self._lines("weight_")
        on_labels = {name: y for name, y in losses.items() if name.startswith("supervised") or name == "total"}
        terms = {name: y for name, y in losses.items() if name not in on_labels}
        weighted = {name: weights[name] * y for name, y in terms.items() if name in weights}
        shares, volumes = self._lines("share_"), self._lines("share_volume_")
        return {
            "loss on labels\nand weighted total": on_labels,
            "unsupervised terms\n(unweighted)": terms,
            "unsupervised terms,\nweight × term": weighted,
            WEIGHT: {name: weights[name] for name in [*weighted, *weights]},  # in the terms' colours
            "share": {name: y for name, y in shares.items() if not name.startswith("volume ")},
            VOLUMES: {heads.get(int(name), name) if name.isdecimal() else name: y for name, y in volumes.items()},
            "gradient norm": self._lines("gradient_norm"),
        }

    def _lines(self, prefix: str) -> Lines:
        keys = list(dict.fromkeys(key for row in self.rows for key in row if key.startswith(prefix)))
        names = [key.removeprefix(prefix).replace("_", " ") for key in keys]
        return {
            name: np.array([row.get(key, math.nan) for row in self.rows]) for name, key in zip(names, keys, strict=True)
        }

    def _dice(self, names: list[str], dice: Sequence[Sequence[float]]) -> Lines:
        """Of each class, and the mean of several."""
        by_epoch = {epoch: np.asarray(values, float) for epoch, values in enumerate(dice)}
        values = np.array([by_epoch.get(int(row["epoch"]), np.full(len(names), math.nan)) for row in self.rows])
        lines = dict(zip(names, values.T, strict=True))
        if len(names) > 1:
            known = np.isfinite(values)
            lines["mean"] = np.where(known, values, 0).sum(1) / np.where(known.any(1), known.sum(1), math.nan)
        return lines

    def _state(self) -> str:
        """What no mark can say of the method's start."""
        ramps = [row["ramp"] for row in self.rows if "ramp" in row]  # version 0.1.0 did not write it
        if ramps and not any(ramps):
            return "the method has not started"
        first = self.rows[0]
        return "the method is on from the first step" if first["epoch"] == 0 and first.get("ramp") else ""

    def _marks(self) -> list[tuple[float, str]]:
        """Epochs with which something begins after the first one, and what."""
        marks: dict[float, list[str]] = defaultdict(list)
        for before, row in zip(self.rows, self.rows[1:], strict=False):
            if not {"ramp", "stage"} <= before.keys() & row.keys():  # version 0.1.0 wrote neither
                continue
            if before["ramp"] == 0 < row["ramp"]:
                marks[row["epoch"]].append("the method's terms start")
            if before["stage"] < row["stage"]:
                marks[row["epoch"]].append(f"stage {row['stage']:g}")
        return [(epoch, ", ".join(texts)) for epoch, texts in marks.items()]


def _draw_lines(axis: Any, epochs: list[float], lines: Lines, may_be_log: bool) -> None:
    """Curves; ``axis`` is logarithmic if it may and they differ by orders of magnitude."""
    marker = "." if len(epochs) <= MOST_WITH_MARKERS else ""
    colours = COLOURS[:-1]  # black is kept for sums
    for i, (name, y) in enumerate(lines.items()):
        colour, dashes = colours[i % len(colours)], ("-", "--", ":")[i // len(colours) % 3]
        width, order = 1.3, 2.0
        if name in ("mean", "total"):
            colour, dashes, order = "black", "-" if name == "mean" else "--", 3.0
        elif name == "supervised":  # wider than the total, which it equals until the method's terms start
            colour, dashes, width, order = "0.65", "-", 3.0, 1.5
        elif name.startswith("supervised"):
            colour, dashes = "0.55", "--"
        size = 4 + 2 * width
        axis.plot(
            epochs, y, dashes, color=colour, marker=marker, markersize=size, linewidth=width, zorder=order, label=name
        )
    found = [y[np.isfinite(y) & (y != 0)] for y in lines.values()]
    typical = [float(np.median(y)) for y in found if y.size]
    if may_be_log and typical and min(y.min() for y in found if y.size) > 0 and max(typical) > ORDERS * min(typical):
        axis.set_yscale("log", nonpositive="mask")
    axis.margins(x=0.01)
    axis.grid(alpha=0.3)


def _draw_labelled_volumes(axis: Any, volumes: Mapping[str, float]) -> None:
    """A dotted line for each class that has a curve, in its colour; one entry of the legend for all."""
    curves = {line.get_label(): line.get_color() for line in axis.lines}
    for name in curves.keys() & volumes.keys():
        axis.axhline(volumes[name], color=curves[name], linestyle=":", linewidth=1.3)
    axis.plot([], [], ":", color="black", linewidth=1.3, label="in labelled cases")


def _name_lines(axis: Any, label: str) -> None:
    """The axis's ``label``, and a legend beside it; the name of a single line goes to the label instead."""
    handles, names = axis.get_legend_handles_labels()
    axis.set_ylabel(label if len(names) != 1 else f"{label}:\n{names[0]}", fontsize="small")
    if len(names) > 1:
        columns = -(-len(names) // MOST_IN_COLUMN)
        axis.legend(handles, names, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1), ncols=columns)
