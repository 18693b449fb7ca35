"""What a training step costs and holds, counted on tensors without values: no GPU, no images and hardly any time.

Operations: floating-point operations of convolutions and matrix products, over those of the stock step; the mean over
four points of the training after the burn-in. Memory: the largest sum of live tensors at any moment of a step, weights,
gradients, momentum, activations (fp16 where torch's autocast has it) and the batch together. cuDNN's scratch space, the
CUDA context (about 0.5 GiB) and what torch's allocator keeps in reserve come on top.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from nnunetv2_semisup import discovery
from nnunetv2_semisup.benchmark import records
from nnunetv2_semisup.benchmark.grid import BASELINE
from nnunetv2_semisup.training import rehearsal

COLUMNS = ("dataset", "configuration", "plans", "patch", "batch", "trainer", "operations_ratio", "gib", "commit")
CARDS = (11, 24, 40)  # GB


def count(dataset: str, configuration: str, plans: str, trainers: Iterable[str] | None = None) -> list[dict]:
    """Rows (:data:`COLUMNS`) of the stock trainer and of ``trainers``.

    Args:
        dataset: full name of a preprocessed data set; no image of it is read.
        configuration: e.g. ``3d_fullres``.
        plans: name of the plans.
        trainers: names without epoch suffix; None for all of ours.
    """
    names = [BASELINE, *(name for name in trainers or discovery.trainers() if name != BASELINE)]
    rows: list[dict] = []
    for name in names:
        trainer = rehearsal.build(dataset, configuration, plans, name, "cpu")
        operations, gib = rehearsal.count(trainer)
        patch, batch = trainer.configuration_manager.patch_size, trainer.batch_size
        stock = rows[0]["operations"] if rows else operations
        common = {"dataset": dataset, "configuration": configuration, "plans": plans, "commit": records.commit()}
        numbers = {"operations": operations, "operations_ratio": operations / stock, "gib": gib}
        rows.append({**common, "patch": " x ".join(map(str, patch)), "batch": batch, "trainer": name, **numbers})
    return rows


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    cards = [f"{card} GB" for card in CARDS]
    header = ["trainer", "counted over stock", "live tensors, GiB", *cards]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in rows:
        needed = float(row["gib"]) + rehearsal.ROOM
        fits = ["yes" if needed * 2**30 <= card * 1e9 else "no" for card in CARDS]
        cells = [f"`{row['trainer']}`", f"{float(row['operations_ratio']):.2f}", f"{float(row['gib']):.1f}", *fits]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sections(results: Path) -> str:
    """``results/counted.csv`` as Markdown, a table per plans; empty without that file."""
    groups: dict[str, list[dict]] = {}
    for row in records.read_csv(results / "counted.csv"):
        what = f"patches of {row['patch']} voxels, batch {row['batch']}"
        groups.setdefault(f"{row['configuration']}, {what}, commit {row['commit']}:", []).append(row)
    return "\n".join(f"{title}\n\n{table(rows)}\n" for title, rows in groups.items())


def write(results: Path, rows: list[dict]) -> Path:
    """Put ``rows`` into ``results/counted.csv``, in the place of earlier ones of the same plans and trainers."""
    file = results / "counted.csv"

    def key(row: dict) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in ("configuration", "patch", "batch", "trainer"))

    new = {key(row) for row in rows}
    records.write_csv(file, COLUMNS, [*(row for row in records.read_csv(file) if key(row) not in new), *rows])
    return file
