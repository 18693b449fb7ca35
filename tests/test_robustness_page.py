"""docs/robustness.md is what the tests say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

TOOL = Path(__file__).resolve().parents[1] / "tools" / "robustness_page.py"


def test_the_page_is_fresh_and_every_marked_test_tells_input_and_answer():
    spec = importlib.util.spec_from_file_location("robustness_page", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.PAGE.read_text(encoding="utf-8") == tool.page(), "run python tools/robustness_page.py"
    assert tool.page().count("\n| ") > 60
