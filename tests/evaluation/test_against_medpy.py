"""The comparison with MedPy that the documentation shows."""

import re
import sys
from pathlib import Path

import pytest

from nnunetv2_semisup.errors import InputError
from tools import against_medpy

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"


def test_the_page_shows_the_table():
    assert against_medpy.table() in PAGE.read_text(encoding="utf-8")


def test_in_the_table_both_agree():
    lines = [line.split("|")[3:-1] for line in against_medpy.table().splitlines()[2:]]
    assert len(lines) == 2 * len(against_medpy.example_pairs())
    for (by, *theirs), (us, *ours) in zip(lines[::2], lines[1::2], strict=True):
        assert (by.strip(), us.strip()) == ("MedPy", "ours")
        assert [cell.replace("error", "nan") for cell in theirs] == ours


def test_speed_reports_a_ratio(monkeypatch):
    monkeypatch.setattr(against_medpy, "SPEED_SHAPE", (20, 16, 12))
    lines = against_medpy.speed(repeats=1).splitlines()
    assert lines[0].startswith("20 x 16 x 12") and len(lines) == 3
    assert all(re.search(r"MedPy [\d.]+ s, ours [\d.]+ s, ratio [\d.]+$", line) for line in lines[1:])


def test_speed_refuses_different_numbers(monkeypatch):
    monkeypatch.setattr(against_medpy, "SPEED_SHAPE", (20, 16, 12))
    right = against_medpy.compare_masks
    monkeypatch.setattr(against_medpy, "compare_masks", lambda *pair: {**right(*pair), "asd_voxel": 0.0})
    with pytest.raises(AssertionError, match="asd_voxel"):
        against_medpy.speed(repeats=1)


def test_without_medpy(monkeypatch):
    monkeypatch.setitem(sys.modules, "medpy.metric", None)
    with pytest.raises(InputError, match="pip install medpy"):
        against_medpy.medpy_metrics(*next(iter(against_medpy.example_pairs().values())))
