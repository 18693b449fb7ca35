"""Draw docs/overview.svg: the two streams, the method, the checkpoint.

python -m tools.overview_picture

Text is drawn as outlines on a light ground of its own, so that the picture looks alike in light and dark pages.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

FILE = Path(__file__).resolve().parents[1] / "docs" / "overview.svg"
INK, LABELLED, UNLABELLED, BOTH = "#1b1b1b", "#cfe8e2", "#fbe3c4", "#e4e4ee"
WIDTH, HEIGHT = 21.0, 12.0
COLUMNS = (12.5, 38.5, 64.5, 90.5, 116.5)  # centres
TOP, MIDDLE, BOTTOM = 31.0, 19.0, 7.0
BOXES = {  # text -> column, height, colour
    "imagesTr, labelsTr\nfew labelled scans": (0, TOP, LABELLED),
    "imagesUn\nmany unlabelled scans": (0, BOTTOM, UNLABELLED),
    "nnU-Net's patches\nand augmentation": (1, TOP, LABELLED),
    "random patches,\nmoved and mirrored": (1, BOTTOM, UNLABELLED),
    "nnU-Net's loss\n(Dice + cross-entropy)": (2, TOP, LABELLED),
    "the method's terms,\nonce the network\nknows every class": (2, BOTTOM, UNLABELLED),
    "one step of nnU-Net's\noptimiser on the\nplanned network": (3, MIDDLE, BOTH),
    "a checkpoint for\nnnUNetv2_predict": (4, MIDDLE, BOTH),
}
ARROWS = [
    *(((i, height), (i + 1, height)) for i in (0, 1) for height in (TOP, BOTTOM)),
    ((2, TOP), (3, MIDDLE)),
    ((2, BOTTOM), (3, MIDDLE)),
    ((3, MIDDLE), (4, MIDDLE)),
]


def draw() -> Figure:
    """The figure."""
    figure = Figure(figsize=(10.3, 3.1), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.5, 129.5), ylim=(-0.5, 38.5))
    axes.set_axis_off()
    for text, (column, height, colour) in BOXES.items():
        x, y = COLUMNS[column] - WIDTH / 2, height - HEIGHT / 2
        axes.add_patch(FancyBboxPatch((x, y), WIDTH, HEIGHT, "round,pad=0,rounding_size=1.5", fc=colour, ec=INK, lw=1))
        axes.text(COLUMNS[column], height, text, ha="center", va="center", size=9.5, color=INK, linespacing=1.35)
    for (start, start_height), (end, end_height) in ARROWS:
        a = COLUMNS[start] + WIDTH / 2, start_height
        b = COLUMNS[end] - WIDTH / 2, end_height + (start_height - end_height) / 6
        axes.add_patch(
            FancyArrowPatch(a, b, arrowstyle="-|>", mutation_scale=12, color=INK, lw=1, shrinkA=0, shrinkB=1)
        )
    return figure


def main() -> int:
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "overview"}):
        draw().savefig(FILE, format="svg", metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
