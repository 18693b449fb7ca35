"""MkDocs hook: brings the pages of ``results`` into the site, and makes links of the repository work there.

The pages are written to be read in the repository too, where links lead from file to file. On the site a link to a page
or picture leads to it, and a link to any other file of the repository becomes the file's name.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
#: Code first, so that what looks like a link in it stays as it is.
LINK = re.compile(r"```.*?```|(?P<code>`+)[^`].*?(?P=code)|(?P<show>!?)\[(?P<text>[^\]]*)\]\((?P<to>[^)\s]+)\)", re.S)


def on_files(files: Files, config) -> Files:
    """Add the pages of ``results`` and the pictures that they show."""
    for file in sorted((ROOT / "results").rglob("*")):
        if file.name == "README.md" or file.suffix == ".png":
            files.append(File.generated(config, file.relative_to(ROOT).as_posix(), abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Rewrite the links of a page."""
    return LINK.sub(lambda match: _rewritten(match, page.file.src_uri, files), markdown)


def _rewritten(match: re.Match, page: str, files: Files) -> str:
    target, _, anchor = (match["to"] or "").partition("#")
    if not target or re.match(r"[a-z]+:", target):  # code, a place on the page, another site
        return match[0]
    there = posixpath.normpath(posixpath.join(posixpath.dirname(_in_repository(page)), target))
    on_site = there.removeprefix("docs/")
    if files.get_file_from_path(on_site) is not None:
        relative = posixpath.relpath(on_site, posixpath.dirname(page) or ".")
        return f"{match['show']}[{match['text']}]({relative}{'#' + anchor if anchor else ''})"
    if not (ROOT / there).exists():
        return match[0]  # mkdocs names it
    name = f"`{there}`"
    return name if match["text"].strip("`") in there else f"{match['text']} ({name})"


def _in_repository(page: str) -> str:
    return page if page.startswith("results/") else f"docs/{page}"
