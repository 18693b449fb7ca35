"""Make README.md and study.png of this folder from the runs' NAME.json and NAME.csv: python report.py"""

import itertools
import json
from pathlib import Path

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

HERE = Path(__file__).parent
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2", "#999999")  # Okabe and Ito
HEAD = """# How CrossMatch learns on LA with 4 labelled cases

Made by `study.py` and `report.py` in this folder. CPU preset, trained on the first 4 labelled cases, validated on the
other 4 of LA-8, 72 unlabelled cases; test cases were not used. One run each: differences of a point are chance.
Pseudo-label Dice: against the hidden labels of 24 fixed patches of as many unlabelled cases, all voxels together; for
stock nnU-Net it is its prediction. Gradient parts: norms, mean over the second half of the steps, two fixed batches.
Stock ran in float32, CrossMatch with convolutions in bfloat16.

"""


def load() -> dict[str, tuple[dict, pd.DataFrame]]:
    """name -> (record, curve), by length, stock first."""
    found = {f.stem: json.loads(f.read_text(encoding="utf-8")) for f in HERE.glob("*.json")}
    names = sorted(found, key=lambda n: (found[n]["steps"], found[n]["trainer"] != "nnUNetTrainer", n))
    return {name: (found[name], pd.read_csv(HERE / f"{name}.csv")) for name in names}


def table(runs: dict) -> str:
    header = (
        *("run", "settings changed", "steps", "validation Dice (each case)"),
        *("pseudo-label Dice at 250", "at the end", "above 0.85 at the end (of these wrong)"),
        *("gradient: supervised", "image", "teacher", "decoder", "cosine of all unsupervised with supervised"),
    )
    lines = [header, ("---",) * len(header)]
    for name, (record, curve) in runs.items():
        late = curve[curve["step"] >= record["steps"] / 2]
        last = curve.iloc[-1]
        each = ", ".join(f"{value:.3f}" for value in record["validation_dice_per_case"].values())
        parts = [f"gradient_{part}" for part in ("supervised", "image", "teacher", "decoder")]
        row = (
            *(f"`{name}`", ", ".join(f"{k} {v}" for k, v in record["changed"].items()) or "–", f"{record['steps']:,}"),
            *(f"{record['validation_dice']:.3f} ({each})",),
            f"{curve.loc[curve['step'] == 250, 'pseudo_dice'].iloc[0]:.3f}",
            f"{last['pseudo_dice']:.3f}",
            f"{100 * last['share_confident_0.85']:.1f} % ({100 * last['share_wrong_of_confident_0.85']:.1f} %)",
            *(f"{late[part].mean():.2f}" if part in curve else "" for part in parts),
            f"{late['cosine_unsupervised'].mean():.2f}" if "cosine_unsupervised" in curve else "",
        )
        lines.append(row)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(runs: dict, file: Path) -> None:
    """A row of pictures per length of training."""
    lengths = sorted({record["steps"] for record, _ in runs.values()})
    figure = Figure(figsize=(11, 4.2 * len(lengths)), layout="constrained")
    FigureCanvasAgg(figure)
    for (left, right), length in zip(figure.subplots(len(lengths), 2, squeeze=False), lengths, strict=True):
        curves = {name: curve for name, (record, curve) in runs.items() if record["steps"] == length}
        for colour, (name, curve) in zip(itertools.cycle(COLOURS), curves.items(), strict=False):
            left.plot(curve["step"], curve["pseudo_dice"], "o-", markersize=3, color=colour, label=name)
            if "gradient_unsupervised" in curve:
                ratio = curve["gradient_unsupervised"] / curve["gradient_supervised"]
                right.plot(curve["step"], ratio, "o-", markersize=3, color=colour, label=name)
        left.set_ylabel("pseudo-label Dice against hidden labels")
        right.set_ylabel("norm of gradient, unsupervised / supervised")
        for axis in (left, right):
            axis.set_xlabel("optimiser step")
            axis.grid(alpha=0.3)
        left.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    runs = load()
    draw(runs, HERE / "study.png")
    notes = (HERE / "notes.md").read_text(encoding="utf-8") if (HERE / "notes.md").is_file() else ""
    (HERE / "README.md").write_text(f"{HEAD}{table(runs)}\n![Learning curves](study.png)\n\n{notes}", encoding="utf-8")


if __name__ == "__main__":
    main()
