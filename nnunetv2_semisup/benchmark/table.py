"""From ``runs.csv`` and ``cases/*.csv`` to comparisons with the stock baseline, and to Markdown.

Data sets of one name (after ``DatasetXXX_``) with as many labelled cases are labelled subsets of one task: their runs
are one comparison per trainer, plans, length, fold, inference and post-processing. Its baseline is stock
``nnUNetTrainer`` where all of these are equal, and a second one is a stock run long enough for equal compute.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import wilcoxon

from nnunetv2_semisup.benchmark import records
from nnunetv2_semisup.benchmark.grid import BASELINE, family
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.evaluation import statistics
from nnunetv2_semisup.evaluation.metrics import METRICS

#: What must be equal for two trainers to be compared, but for the length.
PLACE = ("family", "labeled", "configuration", "plans", "fold", "inference", "postprocessing")
SETTING = (*PLACE, "epochs", "steps")
EMPTY = "No results yet.\n"


@dataclass(frozen=True)
class Difference:
    """A trainer's Dice minus a baseline's, on the labelled subsets that both ran; each case's mean over seeds first.

    Attributes:
        mean: over cases and subsets.
        low, high: 95 % interval of that mean, see :func:`statistics.bootstrap_interval`.
        p: Wilcoxon's signed-rank test over cases (each the mean over subsets), two-sided; NaN where all are equal.
        better, cases: number of cases in which the trainer is better, and of all; each the mean over subsets.
        subsets: number of labelled subsets.
    """

    mean: float
    low: float
    high: float
    p: float
    better: int
    cases: int
    subsets: int


@dataclass(frozen=True)
class Comparison:
    """One trainer in one setting, against the stock baseline of that setting.

    Attributes:
        setting: values of :data:`SETTING`.
        trainer: without epoch suffix.
        runs: (data set, seed) of each; data sets are labelled subsets.
        mean, sd: metric -> mean and sd (n - 1) over runs of their means over cases; sd is NaN for one run.
        dice: of each of ``runs``, mean over cases.
        failures, masks: over all runs: masks of which exactly one of prediction and reference is empty, and all.
        cases: Dice of each case (rows) and data set (columns), mean over labels and seeds.
        curves: of those of ``runs`` that have one, a row per epoch, see :func:`worker.curve`.
        cost: a step's time over the stock step's; NaN where no row of ``speed.csv`` is of a machine of the runs.
        difference: to the baseline; None without one.
        p: of the difference, corrected for the number of methods in the setting (Holm).
        verdict: see :func:`statistics.verdict`.
        equal_compute: difference to the shortest stock run that took at least ``steps * cost`` steps, in the same place
            at another length; None without one.
        equal_compute_steps: of that stock run, 0 without one.
    """

    setting: dict
    trainer: str
    runs: tuple[tuple[str, int], ...]
    mean: dict[str, float]
    sd: dict[str, float]
    dice: tuple[float, ...]
    failures: int
    masks: int
    cases: pd.DataFrame = field(repr=False)
    cost: float
    difference: Difference | None = None
    p: float = math.nan
    verdict: str = ""
    equal_compute: Difference | None = None
    equal_compute_steps: int = 0
    curves: tuple[pd.DataFrame, ...] = field(default=(), repr=False)

    @property
    def subsets(self) -> tuple[str, ...]:
        """The data sets of its runs, each once."""
        return tuple(dict.fromkeys(dataset for dataset, _ in self.runs))

    @property
    def is_plain(self) -> bool:
        """Whether it is of nnU-Net's own inference without post-processing, as the front page and pictures show."""
        return (self.setting["inference"], self.setting["postprocessing"]) == ("nnunet", "none")


def load(results: Path) -> list[Comparison]:
    """All comparisons of a results folder, from ``runs.csv``, ``cases``, ``curves`` and ``speed.csv``."""
    runs, cases = read(results)
    curves = {file.stem: pd.read_csv(file) for file in sorted((results / "curves").glob("*.csv"))}
    return compare(runs, cases, records.read_csv(results / "speed.csv"), curves)


def read(results: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """``runs.csv`` with a column ``family``, and all rows of its runs' files in ``cases`` with a column ``run``.

    Both are empty without results.
    """
    if not (results / "runs.csv").is_file():
        return pd.DataFrame(), pd.DataFrame()
    texts = ["fold", "commit", "versions", "hardware", "device"]
    try:
        runs = pd.read_csv(results / "runs.csv", dtype=dict.fromkeys(texts, str))
    except ValueError as error:  # pandas' own and UnicodeDecodeError
        raise InputError(f"{results / 'runs.csv'} is damaged ({error}): bring it back from git") from None
    needed = {"run", "dataset", "trainer", "seed", "failures", "threads", *texts, *SETTING, *METRICS} - {"family"}
    if missing := sorted(needed - set(runs.columns)):
        raise InputError(f"{results / 'runs.csv'} is damaged, it has no column {missing[0]}: bring it back from git")
    runs[texts] = runs[texts].fillna("")
    runs["family"] = runs["dataset"].map(family)
    cases = []
    for run in runs["run"].unique():
        file = results / "cases" / f"{run}.csv"
        if not file.is_file():
            raise InputError(
                f"{file} is missing, but {results / 'runs.csv'} has its run: bring it back, or remove the row"
            )
        cases.append(pd.read_csv(file, dtype={"case": str, "label": str}).assign(run=run))
    return runs, pd.concat(cases, ignore_index=True) if cases else pd.DataFrame()


def compare(
    runs: pd.DataFrame,
    cases: pd.DataFrame,
    speeds: Sequence[dict] = (),
    curves: Mapping[str, pd.DataFrame] = MappingProxyType({}),
) -> list[Comparison]:
    """All comparisons, ordered by setting, the baseline first.

    Args:
        runs, cases: see :func:`read`.
        speeds: rows of ``speed.csv``.
        curves: run -> its training, a row per epoch.
    """
    if runs.empty:
        return []
    keys = ["run", "inference", "postprocessing"]
    cases = cases.merge(runs[[*keys, "dataset", "trainer", "seed", *(s for s in SETTING if s not in keys)]], on=keys)
    rows_by_place = cases.groupby(list(PLACE))
    comparisons = []
    for place, of_place in runs.groupby(list(PLACE), sort=False):
        rows = dict(list(_comparable(rows_by_place.get_group(place)).groupby(["trainer", "epochs", "steps"])))
        alone = []
        for (trainer, epochs, steps), made in of_place.groupby(["trainer", "epochs", "steps"], sort=False):
            setting = {**dict(zip(PLACE, place, strict=True)), "epochs": epochs, "steps": steps}
            known = _alone(setting, trainer, made, rows[trainer, epochs, steps], speeds)
            alone.append(replace(known, curves=tuple(curves[run] for run in made["run"] if run in curves)))
        comparisons += _against_stock(alone)
    return sorted(comparisons, key=_order)


def _alone(setting: dict, trainer: str, runs: pd.DataFrame, rows: pd.DataFrame, speeds: Sequence[dict]) -> Comparison:
    """What is known of a trainer without a baseline: rows of ``runs.csv``, and of its cases."""
    runs = runs.sort_values(["dataset", "seed"])
    dice = rows.groupby(["case", "dataset", "seed"])["dice"].mean()  # over labels
    return Comparison(
        setting=setting,
        trainer=trainer,
        runs=tuple(zip(runs["dataset"], runs["seed"], strict=True)),
        mean={m: runs[m].mean() for m in METRICS},
        sd={m: runs[m].std(ddof=1) for m in METRICS},
        dice=tuple(runs["dice"]),
        failures=int(runs["failures"].sum()),
        masks=len(rows),
        cases=dice.groupby(["case", "dataset"]).mean().unstack("dataset"),
        cost=math.nan if trainer == BASELINE else _cost(runs, setting, speeds),
    )


def _against_stock(alone: list[Comparison]) -> list[Comparison]:
    """The comparisons of one place, each with its differences to the stock ones among them."""
    stock = sorted((c for c in alone if c.trainer == BASELINE), key=lambda c: c.setting["steps"])
    compared = []
    for length in dict.fromkeys((c.setting["epochs"], c.setting["steps"]) for c in alone):
        here = [c for c in alone if (c.setting["epochs"], c.setting["steps"]) == length]
        baseline = next((c for c in here if c.trainer == BASELINE), None)
        methods = [c for c in here if c is not baseline]
        differences = [paired_difference(c.cases, baseline.cases) if baseline else None for c in methods]
        corrected = statistics.holm([math.nan if d is None else d.p for d in differences])
        compared += [baseline] if baseline else []
        for method, difference, p in zip(methods, differences, corrected, strict=True):
            changes: dict[str, Any] = {"difference": difference, "p": p}
            if difference is not None and baseline is not None:
                interval = difference.low, difference.high
                changes["verdict"] = statistics.verdict(difference.mean, interval, baseline.dice)
            for longer in stock:
                if longer.setting["steps"] >= method.setting["steps"] * method.cost:  # never for NaN
                    equal = paired_difference(method.cases, longer.cases)
                    if equal is not None:
                        changes |= {"equal_compute": equal, "equal_compute_steps": int(longer.setting["steps"])}
                        break
            compared.append(replace(method, **changes))
    return compared


def _comparable(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, all runs on the same cases; a mask rightly left empty has a Dice of 1 where another run's was not."""
    tested = rows.groupby("run")["case"].agg(frozenset)
    if tested.nunique() > 1:
        first, other = tested.index[0], tested.index[(tested != tested.iloc[0]).to_numpy()][0]
        raise InputError(
            f"{first} and {other} were tested on different cases ({len(tested[first])} and {len(tested[other])}), so "
            "their means cannot be compared: repeat one of them, or give the data sets different names"
        )
    someone = rows.groupby(["case", "label"])["dice"].transform("count") > 0
    return rows.assign(dice=rows["dice"].mask(rows["dice"].isna() & someone, 1.0))


def paired_difference(method: pd.DataFrame, baseline: pd.DataFrame) -> Difference | None:
    """The method's Dice minus the baseline's, case by case and subset by subset; None where no subset is common.

    Subsets are tested on the same cases, so a case counts once, as its mean over subsets: what it gains with one subset
    tells what it gains with the next, and as independent values the two would make the interval too narrow.

    Args:
        method, baseline: Dice of each case (rows) and data set (columns).
    """
    differences = (method - baseline).dropna(axis="columns", how="all")
    if differences.empty:
        return None
    cases = differences.mean(axis="columns").dropna()
    low, high = statistics.bootstrap_interval(cases.to_numpy())
    return Difference(
        mean=float(cases.mean()),
        low=low,
        high=high,
        p=float(wilcoxon(cases).pvalue) if cases.any() else math.nan,
        better=int((cases > 0).sum()),
        cases=len(cases),
        subsets=differences.shape[1],
    )


def _cost(runs: pd.DataFrame, setting: dict, speeds: Sequence[dict]) -> float:
    """Ratio measured in one process, steps taking turns: the runs' own seconds hold whatever else the machine did."""
    keys = ["trainer", "configuration", "plans", "device", "hardware", "threads"]
    machines = {(*map(str, row), str(row[3] == "cuda")) for row in runs[keys].itertuples(index=False)}
    ratios = [
        float(speed["step_ratio"])
        for speed in speeds
        if family(speed["dataset"]) == setting["family"]
        and tuple(str(speed[key]) for key in (*keys, "compiled")) in machines
    ]
    return float(np.median(ratios)) if ratios else math.nan


def _order(comparison: Comparison) -> tuple:
    setting = comparison.setting
    where = tuple(setting[key] for key in ("family", "configuration", "plans", "fold", "labeled"))
    how = (setting["inference"] != "nnunet", setting["postprocessing"] != "none", setting["steps"], setting["epochs"])
    return (*where, *how, comparison.trainer != BASELINE, comparison.trainer)


# ------------------------------------------------------------------------------------------------------------- Markdown


def place(setting: dict) -> str:
    """Data, configuration and plans, for people: "LA, 3d_fullres, plans cpu"; nnU-Net's default plans are not named."""
    plans = "" if setting["plans"] == "nnUNetPlans" else f", plans {setting['plans']}"
    return f"{setting['family']}, {setting['configuration']}{plans}"


_DIFFERENCE, _EQUAL_COMPUTE, _COST = "difference [95 % interval]", "at equal compute", "step cost"
_COMPARED = (_DIFFERENCE, "p", "better", "verdict", _EQUAL_COMPUTE, _COST)


def _compared(c: Comparison) -> tuple[str, ...]:
    """Cells under :data:`_COMPARED`."""
    d = c.difference
    return (
        _difference(c, d),
        "" if d is None else _p(c.p),
        "" if d is None else f"{d.better} of {d.cases}",
        c.verdict,
        _difference(c, c.equal_compute, f"{c.equal_compute_steps:,} steps"),
        "" if math.isnan(c.cost) else f"{c.cost:.1f}",
    )


def short_table(comparisons: list[Comparison]) -> str:
    """For the front page: nnU-Net's own inference, no post-processing, Dice alone, and what it takes to judge a gain.

    Stock runs whose only use is a comparison at equal compute have no row: that comparison is a column.
    """
    plain = [c for c in comparisons if c.is_plain]
    of_methods = [c.setting for c in plain if c.trainer != BASELINE]
    places = [[setting[key] for key in PLACE] for setting in of_methods]
    chosen = [c for c in plain if c.setting in of_methods or [c.setting[key] for key in PLACE] not in places]
    if not chosen:
        return EMPTY
    header = "data", "labelled", "trainer", "steps", "runs", "Dice in %", _DIFFERENCE, _EQUAL_COMPUTE, _COST
    rows = [
        (
            place(c.setting),
            f"{c.setting['labeled']}",
            f"`{c.trainer}`",
            f"{c.setting['steps']:,}",
            f"{len(c.runs)}",
            _mean_sd(c, "dice").removesuffix(" ± –"),
            *(cell for name, cell in zip(_COMPARED, _compared(c), strict=True) if name in header),
        )
        for c in chosen
    ]
    return _markdown(header, rows)


def full_tables(comparisons: list[Comparison]) -> str:
    """One table per task, labelled budget and plans, with every length, metric, inference and post-processing."""
    if not comparisons:
        return EMPTY
    header = (
        *("trainer", "steps", "inference", "component", "subsets × seeds", "Dice %", "sd over cases", *_COMPARED),
        *("Jaccard %", "95HD voxel", "ASD voxel", "95HD mm", "ASSD mm", "failures"),
    )
    sections: dict[str, list[Comparison]] = {}
    for c in comparisons:
        s = c.setting
        title = (
            f"### {s['family']}: {s['labeled']} labelled, {s['configuration']}, plans `{s['plans']}`, "
            f"fold {s['fold']}, {len(c.cases)} test cases"
        )
        sections.setdefault(title, []).append(c)
    texts = []
    for title, of_section in sections.items():
        rows = [
            (
                *(f"`{c.trainer}`", f"{c.setting['steps']:,}", c.setting["inference"]),
                "all" if c.setting["postprocessing"] == "none" else "largest",
                *(runs_text(c), _mean_sd(c, "dice"), _case_sd(c), *_compared(c)),
                *(_mean_sd(c, metric) for metric in METRICS if metric != "dice"),
                f"{c.failures} of {c.masks}",
            )
            for c in of_section
        ]
        subsets = ", ".join(sorted({dataset for c in of_section for dataset in c.subsets}))
        texts.append(f"{title}\n\nLabelled subsets: {subsets}.\n\n{_markdown(header, rows)}")
    return "\n".join(texts)


def provenance(runs: pd.DataFrame) -> str:
    """Which code on which machine made the rows."""
    if runs.empty:
        return ""
    columns = ["commit", "versions", "hardware", "threads", "loader_processes"]
    rows = [
        (*(f"{row[c]}" for c in columns), f"{row['runs']}")
        for row in runs.groupby(columns, sort=True)["run"].nunique().reset_index(name="runs").to_dict("records")
    ]
    return _markdown(("commit", "versions", "hardware", "threads", "loader processes", "runs"), rows)


def _mean_sd(c: Comparison, metric: str) -> str:
    factor, digits = (100, 1) if metric in ("dice", "jaccard") else (1, 2)
    if math.isnan(c.mean[metric]):
        return "–"
    sd = "–" if math.isnan(c.sd[metric]) else f"{factor * c.sd[metric]:.{digits}f}"
    return f"{factor * c.mean[metric]:.{digits}f} ± {sd}"


def _case_sd(c: Comparison) -> str:
    sd = c.cases.mean(axis="columns").std(ddof=1)
    return "–" if math.isnan(sd) else f"{100 * sd:.1f}"


def runs_text(c: Comparison) -> str:
    """``3 × 2``: three labelled subsets with two seeds each; ``3 × 1–2`` where they differ."""
    seeds = [sum(dataset == subset for dataset, _ in c.runs) for subset in c.subsets]
    return f"{len(seeds)} × {min(seeds)}" + (f"–{max(seeds)}" if min(seeds) < max(seeds) else "")


def _difference(c: Comparison, d: Difference | None, *notes: str) -> str:
    """``+1.2 [0.3, 2.1]`` in points; a note says where a subset of the trainer has no baseline."""
    if d is None:
        return ""
    if d.subsets < len(c.subsets):
        notes = (*notes, f"{d.subsets} of {len(c.subsets)} subsets")
    interval = "" if math.isnan(d.low) else f" [{100 * d.low:.1f}, {100 * d.high:.1f}]"
    return f"{100 * d.mean:+.1f}{interval}" + (f" ({', '.join(notes)})" if notes else "")


def _p(p: float) -> str:
    return "–" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table without the columns that are empty in every row."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    lines = [[line[i] for i in kept] for line in (header, ("---",) * len(header), *rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
