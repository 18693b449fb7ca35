"""Write docs/robustness.md: odd and hostile inputs, and the answers to them, from the docstrings of the tests.

    python tools/robustness_page.py

A test marked ``robustness`` begins with "Input: ... Answer: ...".
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "robustness.md"
TITLES = {
    "tests/data": "Images, folds and plans: preprocessing and training",
    "tests/datasets": "Bringing in images and hiding labels",
    "tests/dataset_conversion": "Converting public data sets",
    "tests/trainers": "Checkpoints, logs and training",
    "tests/training": "Processes",
    "tests": "Everywhere",
}
HEAD = """# What is refused, and what is taken

Made from the tests by `python tools/robustness_page.py`: change the docstrings of the tests, not this page. Every
line is tested with the input that it names and with others of its kind. An error is one line that names the file,
what is wrong and what to do, and nothing half-written stays.

Besides, random input (tests/test_fuzz.py) goes into `dataset.json`, `splits_final.json`, plans, the manifest, NIfTI
headers and the command lines: it is taken, or refused in one line.

**What remains nnU-Net's.** Its own labelled `.pkl` files, and the checkpoints that `nnUNetv2_predict` and
`-pretrained_weights` open, are pickles that it loads without a check: take them from people you trust. With `--c`
ours is read first, tensors and plain values only.
"""


def documented(file: Path) -> Iterator[tuple[str, str]]:
    """(input, answer) of every test in ``file`` that is marked.

    Raises:
        ValueError: a docstring has another form.
    """
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef):
            continue
        if not any(ast.unparse(decorator) == "pytest.mark.robustness" for decorator in node.decorator_list):
            continue
        text = " ".join((ast.get_docstring(node) or "").split())
        match = re.fullmatch(r"Input: (.+?)\.? Answer: (.+?)\.?", text)
        if match is None:
            raise ValueError(f"{file}, {node.name}: its docstring must be 'Input: ... Answer: ...'")
        yield match[1], match[2]


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for folder, title in TITLES.items():
        files = sorted((ROOT / folder).glob("test_*.py"))
        rows = [row for file in files for row in documented(file)]
        if rows:
            table = "\n".join(f"| {given} | {answer} |".replace("\\", "") for given, answer in dict.fromkeys(rows))
            parts.append(f"## {title}\n\n| input | answer |\n|---|---|\n{table}\n")
    return "\n".join(parts)


def main() -> int:
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
