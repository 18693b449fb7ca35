"""Everything imported is declared in pyproject.toml: we must not rely on what others happen to bring along."""

import re
import sys
from importlib.metadata import packages_distributions

import pytest
from imports import PACKAGE, REPOSITORY, files_below, imported

tomllib = pytest.importorskip("tomllib")  # Python 3.11 and newer

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OURS = {PACKAGE, "dataset_conversion", "tools", *(file.stem for file in files_below("tests"))}
DISTRIBUTIONS = packages_distributions()
EXTRAS = {  # what may be imported in a folder beside the dependencies
    f"{PACKAGE}": (),
    f"{PACKAGE}/benchmark": ("bench", "slurm"),
    "dataset_conversion": ("convert",),
    "tools": ("test",),
    "tests": ("test",),
}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(extras: tuple[str, ...]) -> set[str]:
    requirements = [*PROJECT["dependencies"], *(r for e in extras for r in PROJECT["optional-dependencies"][e])]
    return {normalized(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}


def undeclared(modules: set[str], extras: tuple[str, ...]) -> list[str]:
    """Of top-level module names, those of distributions that are not declared; what is not installed is among them."""
    foreign = modules - sys.stdlib_module_names - OURS
    return sorted(m for m in foreign if not declared(extras) & {normalized(d) for d in DISTRIBUTIONS.get(m, ())})


@pytest.mark.parametrize("folder", EXTRAS)
def test_imports_are_declared(folder):
    files = files_below(folder)
    if folder == PACKAGE:
        files = [file for file in files if "benchmark" not in file.parts]
    modules = {name.split(".")[0] for file in files for name in imported(file)}
    missing = undeclared(modules, EXTRAS[folder])
    where = " or ".join(["dependencies", *EXTRAS[folder]])
    assert not missing, f"{folder} imports {', '.join(missing)}: declare it in pyproject.toml under {where}"


def test_an_undeclared_import_would_be_seen():
    assert undeclared({"os", "torch", "SimpleITK", "nnunetv2_semisup"}, ()) == []
    assert undeclared({"pytest", "yaml", "no_such_module"}, ("bench",)) == ["no_such_module", "pytest"]
