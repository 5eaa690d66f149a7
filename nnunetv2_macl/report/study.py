"""The page of a study of `nnunetv2_macl.compare`: its verdict, figure and tables, or how far it is."""

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
    """Return what the template shows of a study that is done or at work. Raises UserError for a damaged one."""
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
    """``compare.md`` without its title, its picture inside, each table in a frame that scrolls."""
    text = file.read_text(encoding="utf-8").partition("\n")[2]
    html = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    html = html.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")

    def inside(match: re.Match) -> str:
        picture = data_uri((file.parent / match[1]).read_bytes(), "png")
        return f'<img class="views" src="{picture}" alt="Dice of the arms"'

    return Markup(re.sub(r'<img src="(\w+\.png)" alt="[^"]*"', inside, html))
