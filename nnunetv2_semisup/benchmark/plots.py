"""Pictures of a results folder: label efficiency, per-case comparison with stock, and overlays of single cases.

Overlays show image data, whose terms may not allow passing it on: they go into the work folder, never into ``results``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nnunetv2_semisup.benchmark import table
from nnunetv2_semisup.benchmark.grid import family
from nnunetv2_semisup.benchmark.records import WorkFolder
from nnunetv2_semisup.benchmark.table import BASELINE, Comparison
from nnunetv2_semisup.colours import COLOURS
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.files import read_json, whole_file

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DIGEST = "Description"  # key of a PNG's text that holds the digest of the numbers in it


def plan(comparisons: list[Comparison]) -> dict[str, str]:
    """File name -> what it shows, for every picture that these numbers give."""
    return {name: text for name, (text, _, _) in _pictures(comparisons).items()}


def draw_all(results: Path) -> list[Path]:
    """Draw every picture into ``results/plots`` and remove those that nothing gives any more."""
    pictures = _pictures(table.compare(*table.read(results)))
    folder = results / "plots"
    written = []
    with style.context("default"):  # nnU-Net's plot leaves seaborn's settings
        for name, (_, draw, chosen) in pictures.items():
            folder.mkdir(exist_ok=True)
            _save(draw(chosen), folder / name, digest(chosen))
            written.append(folder / name)
    for file in folder.glob("*.png"):
        if file.name not in pictures:
            file.unlink()
    return written


def stale(results: Path) -> list[str]:
    """Names of pictures that are missing or show other numbers than the CSV files."""
    from PIL import Image

    names = []
    for name, (_, _, chosen) in _pictures(table.compare(*table.read(results))).items():
        file = results / "plots" / name
        if not file.is_file() or Image.open(file).text.get(DIGEST) != digest(chosen):
            names.append(name)
    return names


def digest(comparisons: list[Comparison]) -> str:
    """The same for the same numbers, to 4 decimals."""
    content = []
    for c in comparisons:
        numbers = [c.mean["dice"], c.sd["dice"], c.difference, *c.cases.sort_index()]
        content.append([*map(str, c.setting.values()), c.trainer, *c.seeds, *(f"{n:.4f}" for n in numbers)])
    return hashlib.sha256(json.dumps(content, default=int).encode()).hexdigest()[:16]


def _pictures(
    comparisons: list[Comparison],
) -> dict[str, tuple[str, Callable[[list[Comparison]], Figure], list[Comparison]]]:
    """File name -> caption, drawing function, the comparisons it takes. nnU-Net's inference, no post-processing."""
    chosen = [c for c in comparisons if (c.setting["inference"], c.setting["postprocessing"]) == ("nnunet", "none")]
    pictures = {}
    for key in dict.fromkeys(map(_curve, chosen)):
        of_curve = [c for c in chosen if _curve(c) == key]
        if len(of_curve) < 2:
            continue  # a single point, as of an ablation, is in the tables
        name, configuration, plans, epochs, steps, fold = key
        what = f"{name}, {configuration}, plans {plans}, {epochs} epochs ({steps:,} steps), fold {fold}"
        caption = f"Test Dice against the number of labelled cases: {what}. Mean and sd over seeds."
        file = f"labels__{name}__{configuration}__{plans}__{epochs}epochs__fold_{fold}.png"
        pictures[file] = caption, draw_label_efficiency, of_curve
        for dataset in dict.fromkeys(c.setting["dataset"] for c in of_curve):
            of_dataset = [c for c in of_curve if c.setting["dataset"] == dataset]
            trainers = {c.trainer for c in of_dataset}
            if BASELINE not in trainers or len(trainers) < 2:
                continue
            labelled = of_dataset[0].setting["labeled"]
            caption = f"Test Dice of every case, {labelled} labelled: {what} ({dataset}). Mean over seeds."
            file = f"cases__{dataset}__{configuration}__{plans}__{epochs}epochs__fold_{fold}.png"
            pictures[file] = caption, draw_cases, of_dataset
    return pictures


def _curve(c: Comparison) -> tuple:
    s = c.setting
    return (family(s["dataset"]), s["configuration"], s["plans"], s["epochs"], s["steps"], s["fold"])


def draw_label_efficiency(comparisons: list[Comparison]) -> Figure:
    """Dice over the number of labelled cases, a line per trainer; data sets of one budget are points beside another."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    trainers = _trainers(comparisons)
    for i, trainer in enumerate(trainers):
        points = sorted((c for c in comparisons if c.trainer == trainer), key=lambda c: c.setting["labeled"])
        # a little apart, or the bars of one budget cover each other
        x = [c.setting["labeled"] * 1.03 ** (i - (len(trainers) - 1) / 2) for c in points]
        y = [100 * c.mean["dice"] for c in points]
        sd = [100 * c.sd["dice"] for c in points]  # NaN, no bar, for one seed
        axis.errorbar(
            x, y, sd, marker=_marker(i), color=_colour(i), capsize=3, linewidth=1.3, label=_short(trainer), zorder=3
        )
    budgets = sorted({c.setting["labeled"] for c in comparisons})
    axis.set_xscale("log")
    axis.set_xticks(budgets, [str(n) for n in budgets])
    axis.minorticks_off()
    axis.set_xlim(0.8 * min(budgets), 1.25 * max(budgets))
    axis.set_xlabel("labelled cases (log scale)")
    axis.set_ylabel("test Dice in % (mean, bar = sd over seeds)")
    seeds = sorted({len(c.seeds) for c in comparisons})
    one = "; no bar = one seed" if seeds[0] == 1 else ""
    s = comparisons[0].setting
    axis.set_title(f"{table.place(s)}, {s['steps']:,} steps{one}", fontsize="medium")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    return figure


def draw_cases(comparisons: list[Comparison]) -> Figure:
    """A panel per method: Dice of every case, stock on x, the method on y; above the diagonal the method is better."""
    baseline = next(c for c in comparisons if c.trainer == BASELINE)
    methods = [c for c in comparisons if c.trainer != BASELINE]
    columns = min(3, len(methods))
    lines = math.ceil(len(methods) / columns)
    figure = Figure(figsize=(3.4 * columns + 0.4, 3.9 * lines + 0.4), layout="compressed")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    everything = np.concatenate([100 * c.cases.dropna().to_numpy() for c in comparisons])
    low, high = everything.min(), everything.max()
    margin = max(1.0, 0.06 * (high - low))
    limits = (low - margin, high + margin)
    trainers = _trainers(comparisons)
    for axis, method in zip(axes, methods, strict=False):
        x, y = baseline.cases.align(method.cases, join="inner")
        i = trainers.index(method.trainer)
        axis.plot(limits, limits, color="0.5", linewidth=1, zorder=1)
        axis.scatter(100 * x, 100 * y, s=26, color=_colour(i), marker=_marker(i), alpha=0.85, zorder=2)
        better = int((y > x).sum())
        axis.set_title(
            f"{_short(method.trainer)}\nbetter in {better} of {len(x)}, mean {100 * method.difference:+.1f} points",
            fontsize="medium",
        )
        axis.set_aspect("equal")
        axis.set(xlim=limits, ylim=limits, xlabel="test Dice in %, stock nnU-Net")
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axis.grid(alpha=0.3)
    for axis in axes[len(methods) :]:
        axis.set_axis_off()
    s = baseline.setting
    for axis in axes[::columns]:
        axis.set_ylabel("test Dice in %, method")
    figure.suptitle(f"{table.place(s)}, {s['labeled']} labelled, {s['steps']:,} steps", fontsize="medium")
    return figure


def draw_overlays(results: Path, work: WorkFolder) -> list[Path]:
    """Worst, median and best case of every trainer, with contours of truth, stock and trainer, into ``work/overlays``.

    Cases are ranked by the trainer's Dice (mean over seeds); the predictions are those of its first seed. A trainer
    whose predictions are not in ``work`` is left out.
    """
    comparisons = table.compare(*table.read(results))
    written = []
    for c in comparisons:
        if (c.setting["inference"], c.setting["postprocessing"]) != ("nnunet", "none"):
            continue
        predictions = {t: _predictions(work, c, t) for t in dict.fromkeys((BASELINE, c.trainer))}
        if not predictions[c.trainer].is_dir():
            continue
        raw = Path(os.environ.get("nnUNet_raw", ""), c.setting["dataset"])
        if not (raw / "labelsTs").is_dir():
            raise InputError(f"{raw} is not there: export nnUNet_raw=FOLDER, the overlays need the test images")
        ranked = c.cases.dropna().sort_values()
        chosen = {"worst": ranked.index[0], "median": ranked.index[len(ranked) // 2], "best": ranked.index[-1]}
        with style.context("default"):
            figure = _overlay(raw, chosen, ranked, {t: f for t, f in predictions.items() if f.is_dir()}, c)
            file = work.root / "overlays" / f"{_run_name(c, c.trainer)}.png"
            file.parent.mkdir(exist_ok=True)
            _save(figure, file, digest([c]))
        written.append(file)
    return written


def _overlay(raw: Path, chosen: dict, ranked, predictions: dict[str, Path], c: Comparison) -> Figure:
    dataset_json = read_json(raw / "dataset.json", "it belongs to nnU-Net's raw data")
    ending = dataset_json["file_ending"]
    figure = Figure(figsize=(3.4 * (1 + len(predictions)), 3.3 * len(chosen) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(chosen), 1 + len(predictions), squeeze=False)
    for row, (rank, case) in zip(axes, chosen.items(), strict=True):
        image, spacing = _volume(raw / "imagesTs" / f"{case}_0000{ending}", dataset_json)
        truth, _ = _volume(raw / "labelsTs" / f"{case}{ending}", dataset_json)
        z = int((truth > 0).sum((1, 2)).argmax())
        low, high = np.percentile(image[z], (1, 99))
        titles = [f"{rank}: {case[:12]}, slice {z}", *(f"{_short(t)}" for t in predictions)]
        titles[-1] += f", Dice {100 * ranked[case]:.1f} %" + (" (mean)" if len(c.seeds) > 1 else "")
        for axis, title, folder in zip(row, titles, (None, *predictions.values()), strict=True):
            axis.imshow(image[z], cmap="gray", vmin=low, vmax=high, aspect=spacing[1] / spacing[2])
            axis.set_title(title, fontsize="small")
            axis.set_axis_off()
            axis.contour(truth[z] > 0, [0.5], colors=COLOURS[4], linewidths=1.4)
            if folder is not None:
                mask, _ = _volume(folder / f"{case}{ending}", dataset_json)
                if (mask[z] > 0).any():
                    axis.contour(mask[z] > 0, [0.5], colors=COLOURS[5], linewidths=1.4, linestyles="dashed")
    s = c.setting
    figure.suptitle(
        f"{s['dataset']}, {s['labeled']} labelled, {s['steps']:,} steps: truth (orange), prediction (blue, dashed) of "
        f"seed {c.seeds[0]}, any label",
        fontsize="small",
    )
    return figure


def _volume(file: Path, dataset_json: dict) -> tuple[np.ndarray, list[float]]:
    """First channel (Z, Y, X) and voxel size, read as nnU-Net does."""
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    reader = determine_reader_writer_from_dataset_json(dataset_json, str(file), verbose=False)
    array, properties = reader().read_images([str(file)])
    return array[0], list(properties["spacing"])


def _predictions(work: WorkFolder, c: Comparison, trainer: str) -> Path:
    return work.root / "predictions" / _run_name(c, trainer) / c.setting["inference"]


def _run_name(c: Comparison, trainer: str) -> str:
    from nnunetv2_semisup.benchmark.grid import Run

    names = ("dataset", "epochs", "configuration", "plans", "fold")
    return Run(**{n: c.setting[n] for n in names}, trainer=trainer, seed=c.seeds[0], inference=()).id


def _trainers(comparisons: list[Comparison]) -> list[str]:
    """Baseline first, so that it has the same colour in every picture."""
    return sorted({c.trainer for c in comparisons}, key=lambda name: (name != BASELINE, name))


def _short(trainer: str) -> str:
    return "stock nnU-Net" if trainer == BASELINE else trainer.removeprefix(BASELINE)


def _colour(i: int) -> str:
    return ("#000000", *COLOURS[:-1])[i % len(COLOURS)]


def _marker(i: int) -> str:
    return MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]  # another one when the colours begin again


def _save(figure: Figure, file: Path, numbers: str) -> None:
    with whole_file(file) as temporary:
        figure.savefig(temporary, dpi=130, format="png", metadata={DIGEST: numbers})
