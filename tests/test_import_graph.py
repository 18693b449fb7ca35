"""Which part of the package may import which: every import points downwards, and none runs in a circle."""

import subprocess
import sys

import pytest
from imports import PACKAGE, files_below, imported, module_name, room

# A room (a folder or a top-level module) may import rooms of its own line and of the lines above it.
LAYERS = (
    ("__init__", "errors", "files", "settings", "names", "colours"),
    ("boxes", "labels", "losses", "memory", "perturbations", "schedules"),
    ("data", "network", "training"),
    ("trainers",),
    ("discovery",),
    ("datasets", "evaluation", "ext_trainers", "plans", "export"),
    ("benchmark", "demo", "selftrain"),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
KNOW_THE_TRAINERS = {"trainers", "discovery", "ext_trainers"}
MATHEMATICS = {"boxes", "labels", "losses", "memory", "perturbations", "schedules"}
MATHEMATICAL_LIBRARIES = {"torch", "numpy", "scipy"}

FILES = {module_name(file): file for file in files_below(PACKAGE)}


def module_of(name: str) -> str:
    """The module of ours that an imported name is, or is defined in."""
    while name not in FILES:
        name = name.rpartition(".")[0]
    return name


IMPORTS = {module: list(imported(file)) for module, file in FILES.items()}
EDGES = {
    (module, module_of(name)) for module, names in IMPORTS.items() for name in names if name.split(".")[0] == PACKAGE
}


def forbidden(importer: str, target: str) -> bool:
    importer, target = room(importer), room(target)
    hidden = target == "trainers" and importer not in KNOW_THE_TRAINERS
    return hidden or LEVEL[target] > LEVEL[importer]


def circle(edges: set[tuple[str, str]]) -> list[str]:
    """Nodes of one circle, the first again at the end; empty if there is none."""
    targets: dict[str, list[str]] = {}
    for importer, target in sorted(edges):
        targets.setdefault(importer, []).append(target)
    finished: set[str] = set()

    def search(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in finished:
            return []
        for target in targets.get(node, []):
            if found := search(target, [*path, node]):
                return found
        finished.add(node)
        return []

    return next((found for node in sorted(targets) if (found := search(node, []))), [])


def test_every_room_has_its_place():
    unplaced = {room(module) for module in FILES} - set(LEVEL)
    assert not unplaced, f"say in LAYERS where {unplaced} stands"


def test_every_import_points_downwards():
    wrong = [f"{importer} -> {target}" for importer, target in sorted(EDGES) if forbidden(importer, target)]
    assert not wrong, f"imports that point upwards, or to trainers: {', '.join(wrong)}"


def test_no_circle_of_modules():
    found = circle(EDGES)
    assert not found, " -> ".join(found)


def test_no_circle_of_rooms():
    found = circle({(room(a), room(b)) for a, b in EDGES if room(a) != room(b)})
    assert not found, " -> ".join(found)


def test_a_wrong_edge_and_a_circle_would_be_seen():
    assert len(EDGES) > 150 and len(FILES) > 60
    assert ("nnunetv2_semisup.plans", "nnunetv2_semisup.discovery") in EDGES, "imports within functions count"
    data, metrics = "nnunetv2_semisup.data.sdm", "nnunetv2_semisup.evaluation.metrics"
    assert forbidden(data, metrics) and not forbidden(metrics, data)
    assert forbidden("nnunetv2_semisup.cli", "nnunetv2_semisup.trainers.base")
    assert circle({("a", "b"), ("b", "c"), ("c", "b")}) == ["b", "c", "b"] and circle({("a", "b"), ("a", "c")}) == []


@pytest.mark.parametrize("module", [module for module in FILES if room(module) in MATHEMATICS])
def test_mathematics_needs_torch_numpy_and_scipy_only(module):
    others = {name.split(".")[0] for name in IMPORTS[module]} - sys.stdlib_module_names - {PACKAGE}
    assert others <= MATHEMATICAL_LIBRARIES
    rooms = {room(target) for importer, target in EDGES if importer == module}
    assert rooms <= MATHEMATICS


def test_mathematics_network_and_distributed_run_without_nnunet():
    free = [module for module in FILES if room(module) in {*MATHEMATICS, "network", "settings"}]
    free.append("nnunetv2_semisup.training.distributed")
    code = "import importlib, sys\nsys.modules['nnunetv2'] = None\nfor m in sys.argv[1:]: importlib.import_module(m)"
    subprocess.run([sys.executable, "-c", code, *free], check=True)


def test_importing_the_package_or_registering_imports_nothing_heavy():
    heavy = ("torch", "numpy", "difflib")
    code = f"import sys, nnunetv2_semisup.discovery; sys.exit(any(m in sys.modules for m in {heavy}))"
    subprocess.run([sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"], check=True)
    assert not IMPORTS[PACKAGE], f"{PACKAGE}/__init__.py imports {IMPORTS[PACKAGE]}"
