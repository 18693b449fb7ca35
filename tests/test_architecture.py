"""docs/architecture.md lists the rooms of the package, in the order in which they may import each other."""

import re

from imports import PACKAGE, REPOSITORY, files_below, module_name, room
from test_import_graph import LEVEL

PAGE = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
LISTED = re.findall(r"^\| `(\w+)` \| [A-Z`].*\. \|$", PAGE, re.MULTILINE)


def test_every_room_is_listed_once_with_a_sentence():
    assert sorted(LISTED) == sorted({room(module_name(file)) for file in files_below(PACKAGE)} - {"__init__"})


def test_rooms_are_listed_from_the_bottom_to_the_top():
    levels = [LEVEL[name] for name in LISTED]
    assert levels == sorted(levels)
    groups = [line for line in PAGE.splitlines() if line.startswith("| | **")]
    assert len(groups) == len(set(levels))


def test_files_that_the_page_names_exist():
    named = {name for name in re.findall(r"`([\w/]+\.py)`", PAGE) if "/" in name}
    assert named and all((REPOSITORY / PACKAGE / name).is_file() for name in named)
