import csv

import pytest
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
