import csv
import math

import pytest
from matplotlib.figure import Figure
from PIL import Image

from nnunetv2_semisup.training.log import TrainingLog


def test_means_columns_and_repeated_epochs(tmp_path):
    log = TrainingLog()
    log.add({"loss_a": 1.0, "weight_a": 0.5})
    log.add({"loss_a": 3.0})
    assert log.end_epoch(0, progress=0.5) == {"epoch": 0, "progress": 0.5, "loss_a": 2.0, "weight_a": 0.5}
    log.add({"loss_a": 100.0})
    log.start_epoch()  # the epoch was not finished
    log.add({"loss_b": 4.0, "share_c": 0.25, "gradient_norm": 1.0})
    log.end_epoch(1)
    log.add({"loss_b": 5.0})
    log.end_epoch(1)  # repeated after a resume: replaces
    file = tmp_path / "log.csv"
    log.write_csv(file)
    with open(file, encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert [r["epoch"] for r in rows] == ["0", "1"]
    assert rows[0]["loss_a"] == "2" and rows[0]["loss_b"] == "" and rows[1]["loss_a"] == "" and rows[1]["loss_b"] == "5"
    assert [f.name for f in tmp_path.iterdir()] == ["log.csv"]


def test_an_epoch_of_overflows_alone_draws_nothing(tmp_path):
    log = TrainingLog()
    log.add({"overflows": 1.0})
    log.end_epoch(0)
    log.draw(tmp_path / "p.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("epochs", [1, 3])
def test_picture(tmp_path, epochs):
    log = TrainingLog()
    for epoch in range(epochs):
        log.add({"loss_a": 1.0 / (epoch + 1), "weight_a": 0.1, "share_x": 0.5, "gradient_norm": 2.0})
        log.end_epoch(epoch)
    log.draw(tmp_path / "p.png")
    assert [f.name for f in tmp_path.iterdir()] == ["p.png"]
    with Image.open(tmp_path / "p.png") as image:
        assert min(image.size) > 500 and len(set(image.convert("L").getdata())) > 10


def test_picture_does_not_depend_on_what_nnunet_drew_before(tmp_path):
    import seaborn

    log = TrainingLog()
    log.add({"loss_a": 1.0, "weight_a": 0.1})
    log.end_epoch(0)
    log.draw(tmp_path / "before.png")
    seaborn.set_theme(font_scale=2.5)  # as nnU-Net's plot_progress_png
    try:
        log.draw(tmp_path / "after.png")
    finally:
        seaborn.reset_orig()
    assert (tmp_path / "before.png").read_bytes() == (tmp_path / "after.png").read_bytes()


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved."""
    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k)))
    return saved


def panels(figure) -> dict:
    """Label of the axis -> name of the line -> its values."""
    return {
        a.get_ylabel(): {x.get_label(): x.get_ydata() for x in a.get_legend_handles_labels()[0]} for a in figure.axes
    }


@pytest.mark.parametrize("epochs", [10, 1000])
def test_dice_weighted_terms_start_and_stages_are_shown(tmp_path, figures, epochs):
    log, dice = TrainingLog(), []
    for epoch in range(epochs):
        on = epoch >= epochs // 5
        if on:
            log.add({"loss_consistency": 0.5, "weight_consistency": 0.2, "loss_small": 0.002, "weight_small": 1.0})
            log.add({"share_volume_1": 0.1, "share_kept": 0.9})
        log.add({"loss_supervised": -0.8, "weight_supervised": 1.0, "loss_total": -0.7, "gradient_norm": 2.0})
        log.end_epoch(epoch, progress=epoch / epochs, ramp=0.5 * on, stage=1 + (epoch >= epochs // 2))
        dice.append([0.6, math.nan if epoch == 0 else 0.8])
    log.draw(tmp_path / "p.png", "trainer, data set, 2d, fold 0", {1: "left", 2: "right"}, dice)
    (figure,) = figures
    assert figure.get_suptitle() == "trainer, data set, 2d, fold 0"
    shown = panels(figure)
    assert shown["online Dice"]["mean"][:2] == pytest.approx([0.6, 0.7])
    assert math.isnan(shown["online Dice"]["right"][0]) and shown["online Dice"]["left"][0] == 0.6
    weighted = shown["unsupervised terms,\nweight × term"]
    assert weighted["consistency"][-1] == pytest.approx(0.1) and math.isnan(weighted["consistency"][0])
    assert shown["unsupervised terms\n(unweighted)"]["consistency"][-1] == 0.5
    assert set(shown["loss on labels\nand weighted total"]) == {"supervised", "total"}
    assert list(shown["share of voxels in\nthe pseudo-labels:\nleft"]) == ["left"] and list(shown["share:\nkept"]) == [
        "kept"
    ]
    scales = {axis.get_ylabel(): axis.get_yscale() for axis in figure.axes}
    assert scales["unsupervised terms,\nweight × term"] == "log", "0.1 beside 0.002"
    assert scales["loss on labels\nand weighted total"] == scales["share:\nkept"] == "linear"
    assert figure.axes[-1].get_xlabel() == "epoch" and all(axis.get_ylabel() for axis in figure.axes)
    marks = {text.get_text().strip(): text.xy[0] for text in figure.axes[0].texts}
    assert marks == {"the method's terms start": epochs // 5, "stage 2": epochs // 2}
    for axis in figure.axes:
        assert {line.get_xdata()[0] for line in axis.lines if len(line.get_xdata()) == 2} == set(marks.values())
    markers = {line.get_marker() for line in figure.axes[0].get_legend_handles_labels()[0]}
    assert markers == ({"."} if epochs == 10 else {""}), "a thousand markers would hide the line"


def drawn_of(figures, tmp_path, ramps, **arguments) -> dict:
    """Axes by label, of a log in which the method is on where ``ramps`` is above 0."""
    log = TrainingLog()
    for epoch, ramp in enumerate(ramps):
        log.add({"loss_supervised": 1.0, "weight_supervised": 1.0, "loss_total": 1.0, "gradient_norm": 2.0})
        if ramp:
            log.add({"share_volume_1": 0.1, "share_volume_2": 0.3})
        log.end_epoch(epoch, progress=0.5, ramp=ramp, stage=1)
    dice = [[0.0, 0.03]] * len(ramps)
    log.draw(tmp_path / "p.png", "title", {1: "left", 2: "right"}, dice, **arguments)
    return {axis.get_ylabel(): axis for axis in figures[-1].axes}


def test_dice_is_drawn_from_0_to_1_with_the_threshold_that_the_method_waits_for(tmp_path, figures):
    axes = drawn_of(figures, tmp_path, [0.0, 0.0], dice_of="training cases", threshold=0.25)
    panel = axes["online Dice\n(training cases)"]
    assert panel.get_ylim() == (0, 1)
    entries = [text.get_text() for text in panel.get_legend().get_texts()]
    assert entries == ["left", "right", "mean", "the method waits\nfor 0.25"]
    assert list(panel.lines[3].get_ydata()) == [0.25, 0.25]
    at_once = drawn_of(figures, tmp_path, [0.1, 1.0])["online Dice"]
    assert len(at_once.lines) == 3, "no threshold, and nothing said of the cases"


@pytest.mark.parametrize(
    ("ramps", "expected"),
    [
        ([0.0, 0.0], "title\nthe method has not started"),
        ([0.2, 1.0], "title\nthe method is on from the first step"),
        ([0.0, 0.2], "title"),
    ],
)
def test_the_title_says_whether_the_method_has_started(tmp_path, figures, ramps, expected):
    drawn_of(figures, tmp_path, ramps)
    assert figures[-1].get_suptitle() == expected


def test_volumes_of_the_labelled_cases_are_dotted_in_the_colour_of_their_class(tmp_path, figures):
    panel = drawn_of(figures, tmp_path, [0.0, 0.5], labelled_volumes=[0.12, 0.34])[
        "share of voxels in\nthe pseudo-labels"
    ]
    colours = {line.get_label(): line.get_color() for line in panel.lines[:2]}
    dotted = {
        line.get_ydata()[0]: line.get_color()
        for line in panel.lines[2:]
        if len(line.get_ydata()) == 2 and line.get_linestyle() == ":"
    }
    assert dotted == {0.12: colours["left"], 0.34: colours["right"]}
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["left", "right", "in labelled cases"]
    assert panel.get_ylim()[0] == 0


def test_equal_lines_are_both_seen_and_a_single_one_is_named_at_the_axis(tmp_path, figures):
    axes = drawn_of(figures, tmp_path, [0.0, 0.0])
    losses = {line.get_label(): line for line in axes["loss on labels\nand weighted total"].lines}
    below, above = losses["supervised"], losses["total"]
    assert above.get_linestyle() == "--" and above.get_zorder() > below.get_zorder()
    assert below.get_linewidth() > above.get_linewidth() and below.get_markersize() > above.get_markersize()
    weight = axes["weight:\nsupervised"]
    assert weight.get_legend() is None and weight.get_ylim()[0] == 0 and weight.get_ylim()[1] > 1
    assert axes["gradient norm"].get_legend() is None


def test_marks_of_a_resumed_run_and_of_one_epoch(tmp_path, figures):
    log = TrainingLog()
    old = [{"epoch": 0, "loss_a": 1.0}, {"epoch": 1, "loss_a": 1.0}]  # version 0.1.0 wrote neither ramp nor stage
    new = [(2, 0.5, 2), (3, 0.0, 2), (4, 0.5, 3)]
    log.rows = [*old, *({"epoch": epoch, "loss_a": 1.0, "ramp": ramp, "stage": stage} for epoch, ramp, stage in new)]
    log.draw(tmp_path / "p.png")
    texts = {text.get_text().strip(): text.xy[0] for text in figures[0].axes[0].texts}
    assert texts == {"the method's terms start, stage 3": 4}, "nothing began where the run was resumed"


def test_rows_of_an_older_version_are_drawn(tmp_path):
    log = TrainingLog()
    log.rows = [{"epoch": 0, "loss_a": 1.0}, {"epoch": 1, "loss_a": 2.0, "weight_b": 1.0}]
    log.draw(tmp_path / "p.png", "", {1: "organ"}, [[0.5]])
    assert (tmp_path / "p.png").is_file()
