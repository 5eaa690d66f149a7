"""Collect the page about a study of `nnunetv2_macl.compare`: verdict, figure and tables, and its progress."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markupsafe import Markup

from nnunetv2_macl.compare.steps import DONE_FILE
from nnunetv2_macl.compare.study import STUDY_FILE, Study
from nnunetv2_macl.report.pictures import data_uri

TEMPLATE = "study.html.jinja"


def is_study(folder: Path) -> bool:
    return (folder / STUDY_FILE).is_file()


def describe_study(folder: Path) -> dict[str, Any]:
    """Return the values of the template for a study, finished or not. Raises UserError if the study is damaged."""
    study = Study.read(folder)
    done = [cell.name for cell in study.cells if (study.cell_folder(cell) / DONE_FILE).is_file()]
    written = folder / "compare.md"
    return {
        "study": study,
        "done": len(done),
        "left": [cell.name for cell in study.cells if cell.name not in done],
        "results": _as_html(written) if written.is_file() else None,
    }


def _as_html(file: Path) -> Markup:
    """Return ``compare.md`` as HTML without its title, with the picture embedded and each table in a scrolling frame."""
    text = file.read_text(encoding="utf-8").partition("\n")[2]
    html = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    html = html.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")

    def inside(match: re.Match) -> str:
        picture = data_uri((file.parent / match[1]).read_bytes(), "png")
        return f'<img class="views" src="{picture}" alt="Dice of the arms"'

    return Markup(re.sub(r'<img src="(\w+\.png)" alt="[^"]*"', inside, html))
