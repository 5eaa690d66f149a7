"""The documentation says what is there: links, tables, recipes, options, commands."""

import importlib
import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from nnunetv2_macl import __version__
from nnunetv2_macl.files import resource_folder
from nnunetv2_macl.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# A page that a script writes is looked up and not read, so it may be long.
WRITTEN = [page for page in PAGES if page.parent.name == "docs" and page.name != "recipe_keys.md"]
COMMANDS = {
    name: getattr(importlib.import_module(module), entry)
    for name, module, entry in re.findall(
        r"(nnUNetv2_\w+) = (nnunetv2_macl\.cli\.\w+):(\w+)", (ROOT / "setup.cfg").read_text(encoding="utf-8")
    )
}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http|#)([^)]+)\)", page.read_text()):
        assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_pages_are_short(page):
    assert len(page.read_text().splitlines()) <= 100


def test_the_page_of_recipe_keys_is_that_of_the_code():
    script = runpy.run_path(str(ROOT / "docs" / "recipe_table.py"))
    assert script["PAGE"].read_text(encoding="utf-8") == script["page"](), "type: python docs/recipe_table.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_in_the_text_load(page, tmp_path):
    for number, block in enumerate(blocks(page, "json")):
        file = tmp_path / f"{number}.json"
        file.write_text(block)
        assert (
            load_recipe(file, resource_folder("plans")).as_dict().items()
            >= {key: value for key, value in json.loads(block).items() if key != "inherits_from"}.items()
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_in_the_text_is_one_of_its_command(page, capsys, monkeypatch):
    """Of our commands, wherever they stand in the text."""
    for name, entry in COMMANDS.items():
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit):
            entry()
        known = set(re.findall(r"(?<![\w-])--?[a-zA-Z_]+", capsys.readouterr().out))
        for line in re.findall(rf"{name} ([^\n`|&;#)]*)", page.read_text()):
            options = set(re.findall(r"(?<![\w-])--?[a-zA-Z_]+", line))
            assert options <= known, f"{name} has no {options - known}"
    told = set(re.findall(r"nnUNetv2_(?:macl_\w+|train_macl\w*)", page.read_text()))
    assert told <= set(COMMANDS), told - set(COMMANDS)


def test_the_version_is_one():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
