"""What Python files import, read from their source: at the top and within functions."""

import ast
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PACKAGE = "nnunetv2_semisup"


def imported(file: Path) -> Iterator[str]:
    """Full names: ``import a.b`` gives ``a.b``, ``from a import b`` gives ``a.b``, whether b is a module or not."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # "from .x import y" within the tests' folders: nothing outside
            yield from () if node.level else (f"{node.module}.{alias.name}" for alias in node.names)


def files_below(folder: str) -> list[Path]:
    return sorted((REPOSITORY / folder).rglob("*.py"))


def module_name(file: Path) -> str:
    """``a/b.py`` -> ``a.b``; ``a/__init__.py`` -> ``a``."""
    return ".".join(file.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def room(module: str) -> str:
    """The folder or top-level module that a module of the package belongs to; ``__init__`` for the package itself."""
    return module.split(".")[1] if "." in module else "__init__"
