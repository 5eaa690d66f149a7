"""The documentation agrees with the code: links, generated pages, recipes, options, commands, and the length of pages."""

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
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
GENERATED = {
    page: text
    for script in ("recipe_table.py", "command_reference.py")
    for page, text in runpy.run_path(str(DOCS / script))["pages"]().items()
}
COMMANDS = {
    name: getattr(importlib.import_module(module), entry)
    for name, module, entry in re.findall(
        r"(nnUNetv2_\w+) = (nnunetv2_macl\.cli\.\w+):(\w+)", (ROOT / "setup.cfg").read_text(encoding="utf-8")
    )
}


def name_of(page):
    return page.relative_to(ROOT).as_posix()


over_pages = pytest.mark.parametrize("page", PAGES, ids=name_of)
over_written_pages = pytest.mark.parametrize("page", [page for page in PAGES if page not in GENERATED], ids=name_of)


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.M | re.S)


@over_pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http|#)([^)]+)\)", page.read_text()):
        assert (page.parent / target.partition("#")[0]).exists(), target


def test_every_page_is_in_the_index():
    index = DOCS / "README.md"
    linked = {(DOCS / target).resolve() for target in re.findall(r"\]\((?!http|#)([^)#]+)", index.read_text())}
    assert set(DOCS.rglob("*.md")) - {index} <= linked


@over_written_pages
def test_pages_are_short(page):
    """A page has at most 1,200 words, and README at most 150 lines. Bars of tables and signs are no words."""
    text = page.read_text()
    assert len([word for word in text.split() if re.search(r"\w", word)]) <= 1200
    if page == ROOT / "README.md":
        assert len(text.splitlines()) <= 150


@over_written_pages
def test_lines_are_short(page):
    """Only rows of tables, and words that cannot be broken, are longer than 130 characters."""
    for line in page.read_text().splitlines():
        assert len(line) <= 130 or line.startswith("|") or len(line.split()) <= 3, line


@pytest.mark.parametrize("page", GENERATED, ids=name_of)
def test_generated_pages_are_those_of_the_code(page):
    assert page.read_text(encoding="utf-8") == GENERATED[page], (
        "type: python docs/recipe_table.py && python docs/command_reference.py"
    )


@over_pages
def test_recipes_in_the_text_load(page, tmp_path):
    for number, block in enumerate(blocks(page, "json")):
        file = tmp_path / f"{number}.json"
        file.write_text(block)
        assert (
            load_recipe(file, resource_folder("plans")).as_dict().items()
            >= {key: value for key, value in json.loads(block).items() if key != "inherits_from"}.items()
        )


@over_pages
def test_every_option_in_the_text_is_one_of_its_command(page, capsys, monkeypatch):
    """The options of our commands exist, wherever the commands are in the text."""
    for name, entry in COMMANDS.items():
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit):
            entry()
        known = set(re.findall(r"(?<![\w-])--?[a-zA-Z_]+", capsys.readouterr().out))
        for line in re.findall(rf"{name} ([^\n`|&;#)]*)", page.read_text()):
            options = set(re.findall(r"(?<![\w-])--?[a-zA-Z_]+", line))
            assert options <= known, f"{name} has no {options - known}"
    named = set(re.findall(r"nnUNetv2_(?:macl_\w+|train_macl\w*)", page.read_text()))
    assert named <= set(COMMANDS), named - set(COMMANDS)


def test_the_version_is_one():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
