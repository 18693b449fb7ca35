"""Write docs/settings.md: every setting of every trainer, from the dataclasses.

python -m tools.settings_page
"""

from __future__ import annotations

import sys
from pathlib import Path

from nnunetv2_semisup import discovery
from nnunetv2_semisup.settings import SemiSupSettings, describe

PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
HEAD = """# Settings

Made from the trainers by `python -m tools.settings_page`. `nnUNetv2_semisup_trainers --settings TRAINER -d ID -p PLANS`
prints the same for one trainer, with what the plans say. To change one, derive plans and train with them:

    nnUNetv2_semisup_plans -d 508 -o mine --set nnUNetTrainerCrossMatch.conf_tau=0.9
    nnUNetv2_train 508 3d_fullres 0 -tr nnUNetTrainerCrossMatch -p mine

`published`: the value with `preset = published`, where it is another one.
"""


def table(rows: list[dict[str, str]]) -> str:
    """Rows of ``settings.describe`` as Markdown."""
    lines = ["| setting | default | published | range | unit | source |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = [f"`{row['name']}`", *(f"`{row[key]}`" if row[key] else "" for key in ("default", "published"))]
        cells += [row["range"], row["unit"], row["source"].replace("|", "\\|")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    common = {row["name"]: row for row in describe(SemiSupSettings)}
    parts = [HEAD, f"## All trainers\n\n{table(list(common.values()))}\n"]
    for name in sorted(discovery.trainers()):
        rows = describe(discovery.settings_class(name))
        own = [row for row in rows if row != common.get(row["name"])]
        parts.append(f"## {name}\n\n{table(own)}\n")
    return "\n".join(parts)


def main() -> int:
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
