"""Pictures of a results folder: label efficiency, differences to stock, every case, learning curves, and overlays.

Overlays show image data, whose terms may not allow passing it on: they go into the work folder, never into ``results``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable
from colorsys import hsv_to_rgb
from dataclasses import astuple
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from nnunetv2_semisup.benchmark import costs, table
from nnunetv2_semisup.benchmark.grid import BASELINE, Run
from nnunetv2_semisup.benchmark.records import WorkFolder
from nnunetv2_semisup.benchmark.table import Comparison
from nnunetv2_semisup.data.folders import read_dataset_json
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.evaluation import statistics
from nnunetv2_semisup.files import whole_file
from nnunetv2_semisup.names import split_epochs

# A trainer looks the same in every picture, whatever others are in it. The first ones are Okabe & Ito's colours:
# distinguishable with the common colour blindnesses; with so many trainers the markers help.
LOOKS = {
    "": ("#000000", "o"),  # stock
    "MeanTeacher": ("#0072B2", "s"),
    "CrossMatch": ("#D55E00", "^"),
    "SSNet": ("#009E73", "D"),
    "SimCVD": ("#CC79A7", "v"),
    "ACTION": ("#E69F00", "P"),
    "ACTIONPlusPlus": ("#56B4E9", "X"),
    "PasteMatch": ("#882255", "<"),
    "UAMT": ("#332288", ">"),
    "CPS": ("#999933", "p"),
    "BCP": ("#8C510A", "h"),
    "UniMatch": ("#E0218A", "d"),
}
TRUTH, PREDICTION = "#E69F00", "#56B4E9"
DIGEST = "Description"  # key of a PNG's text that holds the digest of the numbers in it

Pictures = dict[str, tuple[str, Callable[[list[Comparison]], Figure], list[Comparison]]]


def plan(comparisons: list[Comparison]) -> dict[str, str]:
    """File name -> what it shows, for every picture that these numbers give."""
    return {name: text for name, (text, _, _) in _pictures(comparisons).items()}


def draw_all(results: Path) -> list[Path]:
    """Draw every picture into ``results/plots`` and remove those that nothing gives any more."""
    pictures = _pictures(table.load(results))
    folder = results / "plots"
    written = []
    with style.context("default"):  # nnU-Net's plot leaves seaborn's settings
        for name, (_, draw, chosen) in pictures.items():
            folder.mkdir(exist_ok=True)
            _save(draw(chosen), folder / name, digest(chosen))
            written.append(folder / name)
        if found := costs.series(results):
            folder.mkdir(exist_ok=True)
            _save(costs.draw(found), folder / costs.FILE, costs.digest(found))
            written.append(folder / costs.FILE)
    for file in folder.glob("*.png"):
        if file not in written:
            file.unlink()
    return written


def stale(results: Path) -> list[str]:
    """Names of pictures that are missing or show other numbers than the CSV files."""
    from PIL import Image

    wanted = {name: digest(chosen) for name, (_, _, chosen) in _pictures(table.load(results)).items()}
    if found := costs.series(results):
        wanted[costs.FILE] = costs.digest(found)
    files = {name: results / "plots" / name for name in wanted}
    return [n for n, file in files.items() if not file.is_file() or Image.open(file).info.get(DIGEST) != wanted[n]]


def digest(comparisons: list[Comparison]) -> str:
    """The same for the same numbers, to 4 decimals."""
    content = []
    for c in comparisons:
        numbers = [*c.dice, c.p, *c.cases.sort_index().to_numpy().ravel()]
        numbers += [n for d in (c.difference, c.equal_compute) if d is not None for n in astuple(d)]
        numbers += [n for curve in c.curves for n in curve.to_numpy(float).ravel()]
        texts = [*map(str, c.setting.values()), c.trainer, *map(str, c.runs), c.verdict, str(c.equal_compute_steps)]
        content.append([*texts, *(f"{n:.4f}" for n in numbers)])
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _pictures(comparisons: list[Comparison]) -> Pictures:
    """File name -> caption, drawing function, the comparisons it takes. nnU-Net's inference, no post-processing."""
    chosen = [c for c in comparisons if c.is_plain]
    pictures: Pictures = {}
    for key in dict.fromkeys(map(_curve, chosen)):
        of_curve = [c for c in chosen if _curve(c) == key]
        if all(c.difference is None for c in of_curve):
            continue  # an ablation, or stock alone: in the tables
        name, configuration, plans, epochs, steps, fold = key
        what = f"{name}, {configuration}, plans {plans}, {epochs} epochs ({steps:,} steps), fold {fold}"
        file = f"{name}__{configuration}__{plans}__{epochs}epochs__fold_{fold}.png"
        caption = f"Dice against stock nnU-Net, mean over cases with its 95 % interval: {what}."
        pictures[f"differences__{file}"] = caption, draw_differences, of_curve
        budgets = dict.fromkeys(c.setting["labeled"] for c in of_curve)
        if len(budgets) > 1:
            caption = f"Test Dice against the number of labelled cases: {what}. Mean and sd over runs."
            pictures[f"labels__{file}"] = caption, draw_label_efficiency, of_curve
        for labelled in budgets:
            of_budget = [c for c in of_curve if c.setting["labeled"] == labelled]
            if any(c.difference for c in of_budget):
                caption = f"Test Dice of every case, {labelled} labelled: {what}. Mean over runs."
                pictures[f"cases__{labelled}_labelled__{file}"] = caption, draw_cases, of_budget
            if with_curves := [c for c in of_budget if c.curves]:
                caption = (
                    f"Learning curves, {labelled} labelled: {what}. Every run is a line; nothing of the test cases."
                )
                pictures[f"curves__{labelled}_labelled__{file}"] = caption, draw_curves, with_curves
    return pictures


def _curve(c: Comparison) -> tuple:
    return tuple(c.setting[key] for key in ("family", "configuration", "plans", "epochs", "steps", "fold"))


def draw_label_efficiency(comparisons: list[Comparison]) -> Figure:
    """Dice over the number of labelled cases, a line per trainer; the ceiling is stock where it alone ran."""
    figure = Figure(figsize=(7.8, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    ceiling = _ceiling(comparisons)
    points = [c for c in comparisons if c is not ceiling]
    trainers = _trainers(points)
    for i, trainer in enumerate(trainers):
        of_trainer = sorted((c for c in points if c.trainer == trainer), key=lambda c: c.setting["labeled"])
        # a little apart, or the bars of one budget cover each other
        x = [c.setting["labeled"] * 1.02 ** (i - (len(trainers) - 1) / 2) for c in of_trainer]
        y = [100 * c.mean["dice"] for c in of_trainer]
        sd = [100 * c.sd["dice"] for c in of_trainer]  # NaN, no bar, for one run
        colour, marker = look(trainer)
        axis.errorbar(x, y, sd, color=colour, marker=marker, capsize=3, linewidth=1.3, label=_short(trainer), zorder=3)
        for left, c in zip(x, of_trainer, strict=True):
            axis.scatter([left] * len(c.dice), 100 * np.array(c.dice), s=9, color=colour, alpha=0.5, zorder=4)
    if ceiling:
        label = f"stock nnU-Net, {ceiling.setting['labeled']} labelled"
        axis.axhline(100 * ceiling.mean["dice"], color=look(BASELINE)[0], linestyle="--", linewidth=1.1, label=label)
    budgets = sorted({c.setting["labeled"] for c in points})
    axis.set_xscale("log")
    axis.set_xticks(budgets, [str(n) for n in budgets])
    axis.minorticks_off()
    axis.set_xlim(0.85 * min(budgets), max(budgets) / 0.85)
    axis.set_xlabel("labelled cases (log scale)" if len(budgets) > 1 else "labelled cases")
    axis.set_ylabel("test Dice in %: mean, sd, and every run")
    s = comparisons[0].setting
    axis.set_title(f"{table.place(s)}, {s['steps']:,} steps", fontsize="medium")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def _ceiling(comparisons: list[Comparison]) -> Comparison | None:
    """Stock at the largest budget, where no method ran with as many labelled cases; None where one did."""
    largest = max(c.setting["labeled"] for c in comparisons)
    at_most = [c for c in comparisons if c.setting["labeled"] == largest]
    return at_most[0] if [c.trainer for c in at_most] == [BASELINE] else None


def draw_differences(comparisons: list[Comparison]) -> Figure:
    """A line per method and budget: mean difference to stock with its interval, at equal steps and at equal compute."""
    methods = [(c, c.difference) for c in comparisons if c.difference]
    methods.sort(key=lambda method: (method[0].setting["labeled"], -method[1].mean))
    figure = Figure(figsize=(7.6, 1.5 + 0.42 * len(methods)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.axvline(0, color="0.4", linewidth=1, zorder=2)
    stock = {c.setting["labeled"]: c for c in comparisons if c.trainer == BASELINE}
    for y, (c, difference) in enumerate(methods):
        baseline = stock[c.setting["labeled"]]
        if len(baseline.dice) >= statistics.FEWEST_RUNS:
            half = 200 * baseline.sd["dice"]
            axis.fill_betweenx([y - 0.5, y + 0.5], -half, half, color="0.9", linewidth=0, zorder=1)
        colour, marker = look(c.trainer)
        lines = [(difference, -0.12 if c.equal_compute else 0, colour)]
        lines += [(c.equal_compute, 0.16, "white")] if c.equal_compute else []
        for d, shift, face in lines:
            axis.plot([100 * d.low, 100 * d.high], [y + shift] * 2, color=colour, linewidth=1.6, zorder=3)
            axis.plot(100 * d.mean, y + shift, marker, color=colour, markerfacecolor=face, markersize=7, zorder=4)
        text = f"{difference.better} of {difference.cases} better; {c.verdict}"
        axis.annotate(text, (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize="small")
    names = [f"{_short(c.trainer)}, {c.setting['labeled']} labelled, {table.runs_text(c)}" for c, _ in methods]
    axis.set_yticks(range(len(methods)), names, fontsize="small")
    axis.set_ylim(len(methods) - 0.5, -0.5)
    axis.set_xlabel("test Dice minus stock nnU-Net's, points (mean and 95 % interval)")
    axis.grid(axis="x", alpha=0.3)
    handles: list[Line2D | Patch] = [Line2D([], [], color="0.3", marker="o", label="at equal steps")]
    if any(c.equal_compute for c, _ in methods):
        handles.append(Line2D([], [], color="0.3", marker="o", markerfacecolor="white", label="at equal compute"))
    if any(len(c.dice) >= statistics.FEWEST_RUNS for c in stock.values()):
        handles.append(Patch(color="0.9", label="twice stock's sd over runs"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize="small")
    s = comparisons[0].setting
    axis.set_title(f"{table.place(s)}, {s['steps']:,} steps; subsets × seeds", fontsize="medium")
    return figure


def draw_cases(comparisons: list[Comparison]) -> Figure:
    """A panel per method: Dice of every case, stock on x, the method on y; above the diagonal the method is better."""
    baseline = next(c for c in comparisons if c.trainer == BASELINE)
    methods = [(c, c.difference) for c in comparisons if c.difference]
    columns = min(3, len(methods))
    lines = math.ceil(len(methods) / columns)
    figure = Figure(figsize=(3.4 * columns + 0.4, 3.9 * lines + 0.4), layout="compressed")
    FigureCanvasAgg(figure)
    cast(ConstrainedLayoutEngine, figure.get_layout_engine()).set(h_pad=0.1, w_pad=0.1)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    pairs = [_common(baseline.cases, method.cases) for method, _ in methods]
    everything = 100 * np.concatenate([np.concatenate(pair) for pair in pairs])
    low, high = everything.min(), everything.max()
    margin = max(1.0, 0.06 * (high - low))
    limits = (low - margin, high + margin)
    for axis, (method, d), (x, y) in zip(axes, methods, pairs, strict=False):
        colour, marker = look(method.trainer)
        size = 26 if len(x) < 100 else 12
        axis.plot(limits, limits, color="0.5", linewidth=1, zorder=1)
        axis.scatter(100 * x, 100 * y, s=size, color=colour, marker=marker, alpha=0.75, linewidth=0, zorder=2)
        axis.set_title(
            f"{_short(method.trainer)}\nbetter in {d.better} of {d.cases}, mean {100 * d.mean:+.1f} points",
            fontsize="medium",
        )
        axis.set_aspect("equal")
        axis.set(xlim=limits, ylim=limits)
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axis.grid(alpha=0.3)
    for axis in axes[len(methods) :]:
        axis.set_axis_off()
    s = baseline.setting
    for axis in axes[::columns]:
        axis.set_ylabel("test Dice in %, method")
    for axis in axes[: len(methods)][-columns:]:  # the last of each column
        axis.set_xlabel("test Dice in %, stock nnU-Net")
    figure.suptitle(f"{table.place(s)}, {s['labeled']} labelled, {s['steps']:,} steps", fontsize="medium")
    return figure


def draw_curves(comparisons: list[Comparison]) -> Figure:
    """Over the epochs, a line per run: online Dice, share of kept pseudo-labels, volume of the classes in them."""
    panels = {
        "online Dice, mean of classes": "online_dice_",
        "share of pseudo-labels kept": "share_kept",
        "share of voxels, all classes,\nin the pseudo-labels": "share_volume_",
    }
    drawn: dict[str, list[tuple[str, pd.Series]]] = {title: [] for title in panels}
    for c in comparisons:
        for curve in c.curves:
            for title, prefix in panels.items():
                columns = curve[[name for name in curve if name.startswith(prefix)]]
                if columns.shape[1]:
                    line = columns.mean(axis=1) if title.startswith("online") else columns.sum(axis=1, min_count=1)
                    drawn[title].append((c.trainer, line))
    drawn = {title: lines for title, lines in drawn.items() if lines}
    figure = Figure(figsize=(8.6, 0.6 + 2.5 * len(drawn)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(drawn), 1, squeeze=False, sharex=True)[:, 0]
    for axis, (title, lines) in zip(axes, drawn.items(), strict=True):
        for trainer, line in lines:
            axis.plot(line.index + 1, line, color=look(trainer)[0], linewidth=1.2)
        axis.margins(x=0.01)
        if title.startswith("online") and _cut_off_the_beginning(axis, [line for _, line in lines]):
            title += "\n(axis without the beginning)"
        axis.set_ylabel(title, fontsize="small")
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("epochs done")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    handles = [Line2D([], [], color=look(t)[0], label=_short(t)) for t in _trainers(comparisons)]
    figure.legend(handles=handles, loc="outside right upper", fontsize="small")
    s = comparisons[0].setting
    on = "training cases" if s["fold"] == "all" else "validation cases"
    figure.suptitle(f"{table.place(s)}, {s['labeled']} labelled; online Dice on {on}", fontsize="medium")
    return figure


def _cut_off_the_beginning(axis: Axes, lines: list[pd.Series]) -> bool:
    """Let the axis begin with what the lines are after a tenth of the training, if they rise from far below."""
    every, later = pd.concat(lines), pd.concat([line.iloc[len(line) // 10 :] for line in lines])
    low, high, height = later.min(), every.max(), every.max() - every.min()
    if not high - low < 0.7 * height:
        return False
    margin = max(0.01, 0.05 * (high - low))
    axis.set_ylim(low - margin, high + margin)
    return True


def _common(baseline: pd.DataFrame, method: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Dice of the cases that both have, each the mean over their common subsets."""
    known = (baseline + method).dropna(axis="columns", how="all")
    x, y = (d.reindex_like(known).where(known.notna()).mean(axis="columns").dropna() for d in (baseline, method))
    return x.to_numpy(), y.to_numpy()


def draw_overlays(results: Path, work: WorkFolder) -> list[Path]:
    """Worst, median and best case of every trainer, with contours of truth, stock and trainer, into ``work/overlays``.

    Of the first labelled subset: cases are ranked by the trainer's Dice there (mean over seeds), the predictions are
    those of the first seed. A trainer whose predictions are not in ``work`` is left out.
    """
    comparisons = table.load(results)
    written = []
    for c in comparisons:
        if not c.is_plain:
            continue
        dataset = c.subsets[0]
        predictions = {t: _predictions(work, c, t) for t in dict.fromkeys((BASELINE, c.trainer))}
        if not predictions[c.trainer].is_dir():
            continue
        raw = Path(os.environ.get("nnUNet_raw", ""), dataset)
        if not (raw / "labelsTs").is_dir():
            raise InputError(f"{raw} is not there: export nnUNet_raw=FOLDER, the overlays need the test images")
        ranked = c.cases[dataset].dropna().sort_values()
        chosen = {"worst": ranked.index[0], "median": ranked.index[len(ranked) // 2], "best": ranked.index[-1]}
        with style.context("default"):
            figure = _overlay(raw, chosen, ranked, {t: f for t, f in predictions.items() if f.is_dir()}, c)
            file = work.root / "overlays" / f"{_run_name(c, c.trainer)}.png"
            file.parent.mkdir(exist_ok=True)
            _save(figure, file, digest([c]))
        written.append(file)
    return written


def _overlay(raw: Path, chosen: dict, ranked, predictions: dict[str, Path], c: Comparison) -> Figure:
    dataset_json = read_dataset_json(raw)
    ending = dataset_json["file_ending"]
    figure = Figure(figsize=(3.4 * (1 + len(predictions)), 3.3 * len(chosen) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(chosen), 1 + len(predictions), squeeze=False)
    for row, (rank, case) in zip(axes, chosen.items(), strict=True):
        image, spacing = _volume(raw / "imagesTs" / f"{case}_0000{ending}", dataset_json)
        truth, _ = _volume(raw / "labelsTs" / f"{case}{ending}", dataset_json)
        z = int((truth > 0).sum((1, 2)).argmax())
        low, high = np.percentile(image[z], (1, 99))
        titles = [f"{rank}: {case[-16:]}, slice {z}", *(f"{_short(t)}" for t in predictions)]
        titles[-1] += f", Dice {100 * ranked[case]:.1f} %"
        for axis, title, folder in zip(row, titles, (None, *predictions.values()), strict=True):
            axis.imshow(image[z], cmap="gray", vmin=low, vmax=high, aspect=spacing[1] / spacing[2])
            axis.set_title(title, fontsize="small")
            axis.set_axis_off()
            axis.contour(truth[z] > 0, [0.5], colors=TRUTH, linewidths=1.4)
            if folder is not None:
                mask, _ = _volume(folder / f"{case}{ending}", dataset_json)
                if (mask[z] > 0).any():
                    axis.contour(mask[z] > 0, [0.5], colors=PREDICTION, linewidths=1.4, linestyles="dashed")
    s = c.setting
    figure.suptitle(
        f"{c.subsets[0]}, {s['labeled']} labelled, {s['steps']:,} steps: truth (orange),\nprediction (blue, dashed) of "
        f"seed {c.runs[0][1]}, any label; Dice: mean over seeds",
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
    dataset, seed = c.runs[0]
    names = ("epochs", "configuration", "plans", "fold")
    return Run(**{n: c.setting[n] for n in names}, dataset=dataset, trainer=trainer, seed=seed, inference=()).id


def _trainers(comparisons: list[Comparison]) -> list[str]:
    """Their names, the baseline first."""
    return sorted({c.trainer for c in comparisons}, key=lambda name: (name != BASELINE, name))


def _short(trainer: str) -> str:
    return "stock nnU-Net" if trainer == BASELINE else trainer.removeprefix(BASELINE)


def look(trainer: str) -> tuple[str, str]:
    """Colour and marker of a trainer, with or without its number of epochs; one that is new has its own by its name."""
    name = split_epochs(trainer)[0].removeprefix(BASELINE)
    if name in LOOKS:
        return LOOKS[name]
    number = zlib.crc32(name.encode())
    return to_hex(hsv_to_rgb(number % 360 / 360, 0.6, 0.6)), "sDvPX"[number % 5]


def _save(figure: Figure, file: Path, numbers: str) -> None:
    with whole_file(file) as temporary:
        figure.savefig(temporary, dpi=130, format="png", metadata={DIGEST: numbers})
