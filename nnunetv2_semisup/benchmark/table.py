"""From ``runs.csv`` and ``cases/*.csv`` to comparisons with the stock baseline, and to Markdown.

One comparison per trainer, data set (labelled budget), plans, length, fold, inference and post-processing. Its baseline
is stock ``nnUNetTrainer`` where all of these are equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import wilcoxon

from nnunetv2_semisup.benchmark.grid import family
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.evaluation.metrics import METRICS

BASELINE = "nnUNetTrainer"
#: What must be equal for two trainers to be compared.
SETTING = ("dataset", "labeled", "configuration", "plans", "epochs", "steps", "fold", "inference", "postprocessing")
EMPTY = "No results yet.\n"


@dataclass(frozen=True)
class Comparison:
    """One trainer in one setting, against the stock baseline of that setting.

    Attributes:
        setting: values of :data:`SETTING`.
        trainer: without epoch suffix.
        seeds: of its runs.
        mean, sd: metric -> mean and sd (n - 1) over seeds of the runs' means over cases; sd is NaN for one seed.
        failures, masks: over all seeds: masks of which exactly one of prediction and reference is empty, and all.
        cases: case -> Dice, mean over labels and seeds.
        difference: mean over cases of Dice minus the baseline's, each case's mean over seeds taken first; NaN without
            baseline, as is what follows.
        p: Wilcoxon's signed-rank test of these differences, two-sided.
        verdict: see :func:`verdict`.
        cost: a step's time over the stock step's; NaN where no row of ``speed.csv`` is of the runs' machine.
    """

    setting: dict
    trainer: str
    seeds: tuple[int, ...]
    mean: dict[str, float]
    sd: dict[str, float]
    failures: int
    masks: int
    cases: pd.Series = field(repr=False)
    difference: float
    p: float
    verdict: str
    cost: float


def read(results: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """``runs.csv``, and all rows of its runs' files in ``cases`` with a column ``run``; both empty without results."""
    if not (results / "runs.csv").is_file():
        return pd.DataFrame(), pd.DataFrame()
    texts = ["fold", "commit", "versions", "hardware", "device"]
    try:
        runs = pd.read_csv(results / "runs.csv", dtype=dict.fromkeys(texts, str))
    except ValueError as error:  # pandas' own and UnicodeDecodeError
        raise InputError(f"{results / 'runs.csv'} is damaged ({error}): bring it back from git") from None
    needed = {"run", "trainer", "seed", "failures", "threads", *texts, *SETTING, *METRICS}
    if missing := sorted(needed - set(runs.columns)):
        raise InputError(f"{results / 'runs.csv'} is damaged, it has no column {missing[0]}: bring it back from git")
    runs[texts] = runs[texts].fillna("")
    cases = []
    for run in runs["run"].unique():
        file = results / "cases" / f"{run}.csv"
        if not file.is_file():
            raise InputError(
                f"{file} is missing, but {results / 'runs.csv'} has its run: bring it back, or remove the row"
            )
        cases.append(pd.read_csv(file, dtype={"case": str, "label": str}).assign(run=run))
    return runs, pd.concat(cases, ignore_index=True) if cases else pd.DataFrame()


def compare(runs: pd.DataFrame, cases: pd.DataFrame, speeds: Sequence[dict] = ()) -> list[Comparison]:
    """All comparisons, ordered by setting, the baseline first.

    Args:
        runs, cases: see :func:`read`.
        speeds: rows of ``speed.csv``.
    """
    if runs.empty:
        return []
    cases = cases.merge(runs[["run", "trainer", "seed", *SETTING]], on=["run", "inference", "postprocessing"])
    rows_by_setting = cases.groupby(list(SETTING))
    comparisons = []
    for values, of_setting in runs.groupby(list(SETTING), sort=False):
        setting = dict(zip(SETTING, values, strict=True))
        rows_of_setting = _comparable(rows_by_setting.get_group(values))
        baseline = of_setting[of_setting["trainer"] == BASELINE]
        dice = {t: _dice_per_case(rows) for t, rows in rows_of_setting.groupby("trainer", sort=False)}
        for trainer, of_trainer in of_setting.groupby("trainer", sort=False):
            masks = (rows_of_setting["trainer"] == trainer).sum()
            difference, p = math.nan, math.nan
            if trainer != BASELINE and not baseline.empty:
                difference, p = paired_difference(dice[trainer], dice[BASELINE])
            comparisons.append(
                Comparison(
                    setting=setting,
                    trainer=trainer,
                    seeds=tuple(sorted(of_trainer["seed"])),
                    mean={m: of_trainer[m].mean() for m in METRICS},
                    sd={m: of_trainer[m].std(ddof=1) for m in METRICS},
                    failures=int(of_trainer["failures"].sum()),
                    masks=int(masks),
                    cases=dice[trainer],
                    difference=difference,
                    p=p,
                    verdict=verdict(difference, _spread(baseline["dice"])),
                    cost=math.nan if trainer == BASELINE else _cost(of_trainer, setting, speeds),
                )
            )
    return sorted(comparisons, key=_order)


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


def paired_difference(method: pd.Series, baseline: pd.Series) -> tuple[float, float]:
    """Mean over common cases of the difference, and Wilcoxon's p (NaN where every difference is 0).

    Args:
        method, baseline: case -> Dice.
    """
    differences = (method - baseline).dropna()
    if differences.empty or not differences.any():
        return (0.0 if len(differences) else math.nan), math.nan
    return float(differences.mean()), float(wilcoxon(differences).pvalue)


def verdict(difference: float, baseline_sd: float) -> str:
    """``beats``: mean difference above twice the baseline's sd over seeds. ``worse``: below minus that.

    Without a baseline nothing is said, and with fewer than three seeds of it there is no measure of chance.
    """
    if math.isnan(difference):
        return ""
    if math.isnan(baseline_sd):
        return "too few seeds"
    if abs(difference) <= 2 * baseline_sd:
        return "no difference"
    return "beats" if difference > 0 else "worse"


def _spread(dice: pd.Series) -> float:
    """Sd over the seeds; NaN for fewer than three, whose sd may be small by chance."""
    return dice.std(ddof=1) if len(dice) >= 3 else math.nan


def _dice_per_case(rows: pd.DataFrame) -> pd.Series:
    by_run = rows.groupby(["case", "seed"])["dice"].mean()  # over labels
    return by_run.groupby("case").mean()  # over seeds


def _cost(runs: pd.DataFrame, setting: dict, speeds: Sequence[dict]) -> float:
    """Ratio measured in one process, steps taking turns: the runs' own seconds hold whatever else the machine did."""
    run = runs.iloc[0]
    here = {key: str(run[key]) for key in ("trainer", "configuration", "plans", "device", "hardware", "threads")}
    here["compiled"] = str(run["device"] == "cuda")
    ratios = [
        float(speed["step_ratio"])
        for speed in speeds
        if family(speed["dataset"]) == family(setting["dataset"]) and all(str(speed[k]) == v for k, v in here.items())
    ]
    return float(np.median(ratios)) if ratios else math.nan


def _order(comparison: Comparison) -> tuple:
    setting = comparison.setting
    where = (family(setting["dataset"]), setting["configuration"], setting["plans"], setting["steps"], setting["fold"])
    how = (setting["inference"] != "nnunet", setting["postprocessing"] != "none")
    return (*where, setting["labeled"], setting["dataset"], *how, comparison.trainer != BASELINE, comparison.trainer)


# ------------------------------------------------------------------------------------------------------------- Markdown


def place(setting: dict) -> str:
    """Data, configuration and plans, for people: "LA, 3d_fullres, plans cpu"; nnU-Net's default plans are not named."""
    plans = "" if setting["plans"] == "nnUNetPlans" else f", plans {setting['plans']}"
    return f"{family(setting['dataset'])}, {setting['configuration']}{plans}"


def short_table(comparisons: list[Comparison]) -> str:
    """For the front page: nnU-Net's own inference, no post-processing, Dice alone."""
    chosen = [c for c in comparisons if (c.setting["inference"], c.setting["postprocessing"]) == ("nnunet", "none")]
    if not chosen:
        return EMPTY
    header = "data", "labelled", "trainer", "steps", "seeds", "Dice in %", "difference (p)", "verdict", "step cost"
    rows = [
        (
            place(c.setting),
            f"{c.setting['labeled']}",
            f"`{c.trainer}`",
            f"{c.setting['steps']:,}",
            f"{len(c.seeds)}",
            _mean_sd(c, "dice"),
            _difference(c),
            c.verdict,
            _ratio(c.cost),
        )
        for c in chosen
    ]
    return _markdown(header, rows)


def full_tables(comparisons: list[Comparison]) -> str:
    """One table per data set, plans and length, with every metric, inference and post-processing."""
    if not comparisons:
        return EMPTY
    header = (
        *("trainer", "inference", "component", "seeds", "Dice %", "Jaccard %", "95HD voxel", "ASD voxel"),
        *("95HD mm", "ASSD mm", "failures", "difference (p)", "verdict", "step cost"),
    )
    sections: dict[str, list[tuple[str, ...]]] = {}
    for c in comparisons:
        s = c.setting
        title = (
            f"### {s['dataset']}: {s['labeled']} labelled, {s['configuration']}, plans `{s['plans']}`, "
            f"{s['epochs']} epochs ({s['steps']:,} steps), fold {s['fold']}, {len(c.cases)} test cases"
        )
        row = (
            *(f"`{c.trainer}`", s["inference"], "all" if s["postprocessing"] == "none" else "largest"),
            " ".join(map(str, c.seeds)),
            *(_mean_sd(c, metric) for metric in METRICS),
            *(f"{c.failures} of {c.masks}", _difference(c), c.verdict, _ratio(c.cost)),
        )
        sections.setdefault(title, []).append(row)
    return "\n".join(f"{title}\n\n{_markdown(header, rows)}" for title, rows in sections.items())


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


def _difference(c: Comparison) -> str:
    if math.isnan(c.difference):
        return ""
    p = "–" if math.isnan(c.p) else "< 0.001" if c.p < 0.001 else f"{c.p:.3f}"
    return f"{100 * c.difference:+.1f} ({p})"


def _ratio(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.1f}"


def _markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
