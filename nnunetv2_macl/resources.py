"""Where the trainers and recipes lie: inside the installed package, or beside it in a source checkout."""

from __future__ import annotations

from pathlib import Path


def resource_folder(name: str) -> Path:
    """The folder ``trainers`` or ``plans``. A wheel installs it in the package; an editable install leaves it beside."""
    package = Path(__file__).resolve().parent
    installed = package / name
    return installed if installed.is_dir() else package.parent / name
