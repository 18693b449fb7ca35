"""What a semi-supervised run records beside nnU-Net's own log, which takes a fixed set of keys."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

from nnunetv2_semisup import files
from nnunetv2_semisup.colours import COLOURS


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

    def draw(self, file: Path) -> None:
        """One panel per kind of value: losses, weights, shares in [0, 1], and the gradient's norm."""
        from matplotlib import style
        from matplotlib.figure import Figure

        prefixes = {"loss (unweighted)": "loss_", "weight": "weight_", "share": "share_", "gradient": "gradient_"}
        panels = {title: keys for title, prefix in prefixes.items() if (keys := self._columns(prefix))}
        if not panels:  # every step so far overflowed
            return
        with style.context("default"):  # nnU-Net's plot leaves seaborn's settings, with letters 2.5 times as large
            figure = Figure(figsize=(8, 2.3 * len(panels)), layout="constrained")
            axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
            for axis, (title, keys) in zip(axes, panels.items(), strict=True):
                for i, key in enumerate(keys):
                    x, y = zip(*((row["epoch"], row.get(key, math.nan)) for row in self.rows), strict=True)
                    line = ("-", "--", ":")[i // len(COLOURS) % 3]
                    label = key.split("_", 1)[1].replace("_", " ")
                    axis.plot(x, y, line, color=COLOURS[i % len(COLOURS)], marker=".", label=label)
                axis.set_ylabel(title)
                axis.grid(alpha=0.3)
                axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
            axes[-1].set_xlabel("epoch")
            axes[-1].xaxis.get_major_locator().set_params(integer=True)
            with files.whole_file(file) as temporary:
                figure.savefig(temporary, dpi=120, format="png")

    def _columns(self, prefix: str) -> list[str]:
        return list(dict.fromkeys(key for row in self.rows for key in row if key.startswith(prefix)))
