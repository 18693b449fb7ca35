"""README and docs say what is so: commands, links, numbers, messages, columns of the log, the example of a method."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import json
import re
import sys
from importlib.metadata import entry_points
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from helpers import make_batch
from imports import PACKAGE, REPOSITORY, files_below
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunetv2_semisup import cli, discovery, trainers
from nnunetv2_semisup.benchmark import records, table

README = REPOSITORY / "README.md"
DOCS = REPOSITORY / "docs"
PAGES = [README, REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
CODE = re.compile(r"```.*?```|^ {4}.*?$|`[^`]*`", re.S | re.M)
NAMES = sorted(discovery.trainers())

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda file: file.relative_to(REPOSITORY).as_posix())


def text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------- README


def test_readme_is_read_in_three_minutes():
    """600 words of prose: no code, tables, comments, pictures, or addresses of links."""
    prose = re.sub(
        r"<!--.*?-->|```.*?```|^(?: {4}|\|).*?$|!\[.*?\]\(.*?\)|(?<=\])\(.*?\)", "", text(README), flags=re.S | re.M
    )
    assert 300 < len(prose.split()) <= 600


def test_readme_cites_this_package_as_the_citation_file_does():
    version = re.search(r"^version: (\S+)$", text(REPOSITORY / "CITATION.cff"), re.M)[1]
    assert f"version = {{{version}}}" in text(README)


# ------------------------------------------------------------------------------------------------ commands and trainers


@each_page
def test_commands_exist(page):
    ours = re.findall(r"^(nnUNetv2_\w+) = ", text(REPOSITORY / "pyproject.toml"), re.M)
    known = {*ours, *(script.name for script in entry_points(group="console_scripts"))}
    named = set(re.findall(r"\bnnUNetv2_\w*\w\b(?!\*)", text(page)))
    assert named <= known, named - known


@each_page
def test_options_exist(page):
    """Each option behind a command of ours, up to the end of the command."""
    helps: dict[str, str] = {}
    joined = re.sub(r"\\\n\s*", " ", text(page))
    for name, rest in re.findall(r"\bnnUNetv2_semisup_(\w+)([^`\n|;&#)]*)", joined):
        if name not in helps:
            with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
                getattr(cli, name)(["-h"])
            helps[name] = out.getvalue()
        for option in re.findall(r"(?<=[\s\[])--?[a-z][\w-]*", rest):
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", helps[name]), f"{name} has no {option}"


@each_page
def test_trainers_exist(page):
    for name in re.findall(r"-tr (nnUNetTrainer\w*)", text(page)):
        found = nnUNetTrainer if name == "nnUNetTrainer" else getattr(trainers, name)
        assert issubclass(found, nnUNetTrainer)


# ---------------------------------------------------------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    """Of the headings, as both MkDocs and code hosts make them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text(page), flags=re.S), re.M)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title.lower())) for title in titles}


@each_page
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", re.sub(r"(?<=\[)`([^`]*)`(?=\])", r"\1", text(page))))
    for target, _, anchor in (link.partition("#") for link in links if not re.match(r"[a-z]+:", link)):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}#{anchor}"


# -------------------------------------------------------------------------------------------------------------- numbers


@pytest.fixture(scope="module")
def differences() -> str:
    """All tables of results, and every pair of the study's runs, whose plans differ."""
    study = [c.cases for c in table.load(REPOSITORY / "results" / "study_hippocampus") if c.is_plain]
    pairs = [table.paired_difference(a, b) for a, b in permutations(study, 2)]
    lines = [f"{100 * d.mean:+.1f} [{100 * d.low:.1f}, {100 * d.high:.1f}]" for d in pairs if d]  # of one task
    return "\n".join([*(text(file) for file in (REPOSITORY / "results").rglob("README.md")), *lines])


@each_page
def test_intervals_are_those_of_the_results(page, differences):
    """``+1.2 [0.3, 2.1]``: a difference and its interval, from files of single cases."""
    for interval in re.findall(r"[+-]\d+\.\d\s\[-?\d+\.\d,\s-?\d+\.\d\]", text(page)):
        assert " ".join(interval.split()) in differences, f"{interval} comes from no results"


def costs(name: str) -> dict[str, str]:
    """Of a trainer: counted and measured stock steps, and GiB."""
    counted, measured = (records.read_csv(REPOSITORY / "results" / f"{kind}.csv") for kind in ("counted", "speed"))
    [count] = [row for row in counted if row["trainer"] == name and row["patch"] == "128 x 128 x 128"]
    [speed] = [
        row
        for row in measured
        if row["trainer"] == name and (row["dataset"], row["configuration"]) == ("Dataset704_Hippocampus", "2d")
    ]
    values = {"counted": count["operations_ratio"], "measured": speed["step_ratio"], "gib": count["gib"]}
    return {key: f"{float(value):.1f}" for key, value in values.items()}


@pytest.mark.parametrize("name", NAMES)
def test_every_trainer_has_a_page_with_its_costs(name):
    cost = costs(name)
    index = text(DOCS / "methods" / "index.md")
    row = re.search(rf"^\| `{name}` \| \[.*?\]\((\w+\.md)\).* \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", index, re.M)
    assert row and row.groups()[1:4] == tuple(cost.values())
    head = text(DOCS / "methods" / row[1]).split("\n## ")[0]
    assert f"`{name}`" in head and f"settings.md#{name.lower()}" in head
    assert f"{cost['counted']} stock steps (measured {cost['measured']}), {cost['gib']} GiB" in head
    assert re.findall(r"^\| (\w+) \|", head, re.M) == ["trainer", "idea", "when", "cost", "settings"]


# --------------------------------------------------------------------------------------------- messages and log columns


def strings_of_the_package() -> list[str]:
    """All texts in its source, each part between the values of an f-string for itself."""
    trees = (ast.parse(text(file)) for file in files_below(PACKAGE))
    return [
        n.value for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    ]


def test_messages_are_those_of_the_code():
    """``...`` stands for what differs from case to case."""
    page, known = text(DOCS / "troubleshooting.md"), strings_of_the_package()
    rows = re.findall(r"^\| (.*`.*) \| [^|]+ \|$", page, re.M)
    messages = [
        m for row in rows if not re.search(r"\((nnU-Net|torch)'s\)", row) for m in re.findall(r"`([^`]+)`", row)
    ]
    assert len(messages) >= 40
    for message in messages:
        for part in filter(None, message.split("...")):
            assert any(part in string for string in known), f"no message has {part!r}"


@pytest.mark.parametrize("name", NAMES)
def test_columns_of_the_log_are_explained(name, tiny):
    """Those of a step in each stage; a number at the end is a head."""
    staged = {"num_epochs": 9, "stage_fractions": (1 / 3, 1 / 3, 1 / 3)} if "ACTION" in name else {}
    trainer = tiny.trainer(name, "2d", **staged)
    trainer.initialize()
    trainer.method.reset(trainer.network)
    for epoch in (0, 3, 6) if staged else (0,):
        trainer.current_epoch, trainer._steps_in_epoch = epoch, 0
        trainer.train_step(make_batch(trainer))
    row = trainer.training_log.end_epoch(0, progress=0.0, ramp=0.0)
    explained = text(DOCS / "log.md")
    [own] = [line for line in explained.splitlines() if line.startswith("| `") and f"`{name}`" in line]
    common = explained.split("## Columns of single trainers")[0]
    for column in row:
        column = re.sub(r"(?<=^share_volume_)\d+|(?<=^share_trust_)\d+", "<head>", column)
        term = re.sub(r"^(loss|weight)_", "", column)
        numbered = re.sub(r"[23]$", "1", term)  # "teacher_1 to teacher_4"
        assert any(f"`{known}`" in common + own for known in (column, term, numbered)), f"{column} is not explained"


# ----------------------------------------------------------------------------------------------------------- your data


def test_the_lines_of_your_data_prepare_pairs(nnunet_raw, tmp_path, monkeypatch):
    """Seven pairs and two scans without a label in one folder; then the command that follows on the page."""
    (tmp_path / "scans").mkdir()
    for number in range(9):
        name = tmp_path / "scans" / f"MR {number:03d} T1"
        voxels = np.random.default_rng(number).normal(0, 50, (4, 5, 6)).astype(np.float32)
        sitk.WriteImage(sitk.GetImageFromArray(voxels), f"{name}.nii.gz")
        if number < 7:
            sitk.WriteImage(sitk.GetImageFromArray((voxels > 0).astype(np.uint8)), f"{name}_seg.nii.gz")
    monkeypatch.chdir(tmp_path)
    page = text(DOCS / "your_data.md")
    [code] = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(compile(code, "your_data.md", "exec"), {})
    dataset = nnunet_raw / "Dataset508_Mine"
    content = json.loads(text(dataset / "dataset.json"))
    cases = get_filenames_of_train_images_and_targets(str(dataset), content)
    assert content["numTraining"] == len(cases) == len(list((dataset / "labelsTr").iterdir())) == 2
    assert len(list((dataset / "imagesTs").iterdir())) == len(list((dataset / "labelsTs").iterdir())) == 5
    for case, files in cases.items():
        for file, ending in ((files["images"][0], ""), (files["label"], "_seg")):
            assert Path(file).read_bytes() == Path(f"scans/{case.replace('_', ' ')}{ending}.nii.gz").read_bytes()
    [command] = re.findall(r"^    nnUNetv2_semisup_add_unlabeled (-d 508 scans .*)$", page, re.M)
    assert cli.add_unlabeled(command.split()) == 0
    assert sorted(f.name for f in (dataset / "imagesUn").iterdir()) == [f"MR_00{n}_T1_0000.nii.gz" for n in (7, 8)]


# --------------------------------------------------------------------------------------------------------- a new method


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The trainer of the page's code block, loaded as a file of the package's folder would be."""
    [code] = re.findall(r"```python\n(.*?)```", text(DOCS / "add_a_method.md"), re.S)
    file = tmp_path / "pi_model.py"
    file.write_text(code, encoding="utf-8")
    before = set(trainers.TRAINERS)
    spec = importlib.util.spec_from_file_location("nnunetv2_semisup.trainers.pi_model", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    [name] = set(trainers.TRAINERS) - before
    yield trainers.TRAINERS[name]
    del trainers.TRAINERS[name]


@pytest.mark.parametrize("kind", ["4 classes", "regions", "ignore"])
@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_the_example_of_add_a_method_trains(example, configuration, kind, datasets, use, monkeypatch):
    dataset = use(datasets(kind))
    monkeypatch.setattr(trainers, example.__name__, example, raising=False)
    trainer = dataset.trainer(example.__name__, configuration, num_epochs=2)
    trainer.initialize()
    trainer.method.reset(trainer.network)
    before = [p.clone() for p in trainer.network.parameters()]
    trainer.train_step(make_batch(trainer))
    row = trainer.training_log.end_epoch(0)
    assert row["loss_consistency"] > 0 and row["weight_consistency"] == 1 and row["overflows"] == 0
    assert 0 <= row["share_views_agree"] <= 1
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.network.parameters(), strict=True))
