"""Collect the page about a study of `nnunetv2_macl.compare`: verdict, figure and tables, and its progress."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markupsafe import Markup

from nnunetv2_macl.compare.report import REPORT_FILE
from nnunetv2_macl.compare.steps import DONE_FILE
from nnunetv2_macl.compare.study import Study, study_folders
from nnunetv2_macl.report.pictures import data_uri

TEMPLATE = "study.html.jinja"


def is_study(folder: Path) -> bool:
    return bool(study_folders(folder))


def describe_study(folder: Path) -> dict[str, Any]:
    """Return the values of the template for a study, finished or not. Raises UserError if the study is damaged."""
    studies = [Study.read(part) for part in study_folders(folder)]
    cells = [
        (f"{study.folder.relative_to(folder)}/{cell.name}", (study.cell_folder(cell) / DONE_FILE).is_file())
        for study in studies
        for cell in study.cells
    ]
    written = folder / REPORT_FILE
    return {
        "study": studies[0],
        "splits": len(studies) // len({study.options.finetuning for study in studies}),
        "done": sum(is_done for _, is_done in cells),
        "cells": len(cells),
        "left": [name.removeprefix("./") for name, is_done in cells if not is_done],
        "results": _as_html(written) if written.is_file() else None,
    }


def _as_html(file: Path) -> Markup:
    """Return ``compare.md`` as HTML without its title, with the picture embedded and each table in a scrolling frame."""
    text = file.read_text(encoding="utf-8").partition("\n")[2]
    html = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    html = html.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")

    def inside(match: re.Match) -> str:
        if not (file.parent / match[1]).is_file():
            return '<img alt="Dice of the arms (the picture is missing)"'
        picture = data_uri((file.parent / match[1]).read_bytes(), "png")
        return f'<img class="views" src="{picture}" alt="Dice of the arms"'

    return Markup(re.sub(r'<img src="([\w/]+\.png)" alt="[^"]*"', inside, html))
