"""MkDocs hooks that let the pages link to files of the repository, as they do on GitHub.

A relative link out of docs/ (`../lt_adv/main.py`) leads to a copy of that file in the site, under `repository/`. A line
`<!-- include ../page.md -->` is replaced by that page without its title; GitHub does not show the line.
"""

import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
FOLDER = "repository"
LINK = re.compile(r"(\]\()((?!https?:|mailto:|#)[^)#\s]+)")
INCLUDE = re.compile(r"^<!-- include (\S+) -->$", re.MULTILINE)


def expand(text: str, page: Path) -> str:
    """`text` of the file `page` with its includes; the links of an included page are relative to `page`."""

    def include(match: re.Match) -> str:
        source = (page.parent / match[1]).resolve()
        _, _, body = source.read_text().partition("\n")  # without its title
        return LINK.sub(lambda m: m[1] + os.path.relpath(source.parent / m[2], page.parent), body)

    return INCLUDE.sub(include, text)


def outside(link: str, page: Path) -> Path | None:
    """The file of the repository outside docs/ that a link leads to, else None."""
    target = (page.parent / link).resolve()
    if target.is_relative_to(ROOT / "docs") or not target.is_relative_to(ROOT):
        return None
    return target.relative_to(ROOT)


def site_name(path: Path) -> str:
    """Where a file of the repository lies in the site; sources are shown as text, which browsers do not download."""
    text = path.suffix in (".py", ".md", ".sh", "")
    return f"{FOLDER}/{path}{'.txt' if text else ''}"


def on_files(files, config):
    """Adds every linked file of the repository to the site."""
    linked = set()
    for file in files.documentation_pages():
        page = Path(file.abs_src_path)
        for match in LINK.finditer(expand(page.read_text(), page)):
            if (path := outside(match[2], page)) and (ROOT / path).is_file():
                linked.add(path)
    for path in sorted(linked):
        files.append(File.generated(config, site_name(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Expands includes, and leads links out of docs/ to the copies; links to folders become text."""
    source = Path(page.file.abs_src_path)

    def rewrite(match: re.Match) -> str:
        path = outside(match[2], source)
        if path is None:
            return match[0]
        return match[1] + os.path.relpath(ROOT / "docs" / site_name(path), source.parent)

    text = expand(markdown, source)
    folders = [m[2] for m in LINK.finditer(text) if (path := outside(m[2], source)) and (ROOT / path).is_dir()]
    for folder in folders:
        text = re.sub(rf"\[([^\]]*)\]\({re.escape(folder)}\)", r"\1", text)
    return LINK.sub(rewrite, text)
