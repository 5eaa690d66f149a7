"""The documentation agrees with the code: links, generated pages, recipes, options, commands, and the length of pages."""

import json
import re
import runpy
import warnings
from pathlib import Path

import pytest

from nnunetv2_macl import _FOUND_IN, __version__
from nnunetv2_macl.files import resource_folder
from nnunetv2_macl.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
SCRIPTS = {name: runpy.run_path(str(DOCS / name)) for name in ("recipe_table.py", "command_reference.py")}
GENERATED = {page: text for script in SCRIPTS.values() for page, text in script["pages"]().items()}
OPTION = r"(?<![\w-])--?[a-zA-Z_]+"
# The options of each of our commands, by its name.
COMMANDS = {
    name: set(re.findall(OPTION, parser.format_help()))
    for name, parser in SCRIPTS["command_reference.py"]["parsers"]().items()
}


def name_of(page):
    return page.relative_to(ROOT).as_posix()


over_pages = pytest.mark.parametrize("page", PAGES, ids=name_of)
over_written_pages = pytest.mark.parametrize("page", [page for page in PAGES if page not in GENERATED], ids=name_of)


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


@over_pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http|#)([^)]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target.partition("#")[0]).exists(), target


def test_every_page_is_in_the_index():
    index = DOCS / "README.md"
    linked = {
        (DOCS / target).resolve() for target in re.findall(r"\]\((?!http|#)([^)#]+)", index.read_text(encoding="utf-8"))
    }
    assert set(DOCS.rglob("*.md")) - {index} <= linked


@over_written_pages
def test_pages_are_short(page):
    """A page has at most 1,200 words, and README at most 150 lines. Bars of tables and signs are no words."""
    text = page.read_text(encoding="utf-8")
    assert len([word for word in text.split() if re.search(r"\w", word)]) <= 1200
    if page == ROOT / "README.md":
        assert len(text.splitlines()) <= 150


@over_written_pages
def test_lines_are_short(page):
    """Only code, rows of tables, and words that cannot be broken are longer than 130 characters."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for line in text.splitlines():
        assert len(line) <= 130 or line.startswith("|") or len(line.split()) <= 3, line


@pytest.mark.parametrize("page", GENERATED, ids=name_of)
def test_generated_pages_are_up_to_date(page):
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
def test_every_option_in_the_text_is_one_of_its_command(page):
    """The options of our commands exist, wherever the commands are in the text."""
    text = page.read_text(encoding="utf-8")
    for name, known in COMMANDS.items():
        for line in re.findall(rf"{name} ([^\n`|&;#)]*)", text):
            options = set(re.findall(OPTION, line))
            assert options <= known, f"{name} has no {options - known}"
    named = set(re.findall(r"nnUNetv2_(?:macl_\w+|train_macl\w*)", text))
    assert named <= set(COMMANDS), named - set(COMMANDS)


def test_every_installation_without_internet_keeps_the_pytorch_that_was_downloaded():
    """Without a constraint, pip takes the highest version, which is the one of PyPI."""
    text = "\n".join(blocks(DOCS / "how_to" / "offline_and_windows.md", "text"))
    (downloaded,) = re.findall(r'pip download -d wheels "(torch==\S+)"', text)
    assert f'echo "{downloaded}" > constraints.txt' in text
    assert all(
        "-c constraints.txt" in line for line in text.splitlines() if line.startswith(("pip wheel", "pip install"))
    )


def test_the_version_is_the_same_everywhere():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_api_reference_can_be_built(tmp_path):
    """pdoc renders each module, and each docstring with its sections."""
    pdoc = pytest.importorskip("pdoc")
    pdoc.render.configure(docformat="google")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="pdoc")
        # pdoc does not find the types of a dataclass that another module exports, and then sets no links to them.
        warnings.filterwarnings("ignore", "Error parsing type annotation")
        pdoc.pdoc("nnunetv2_macl", output_directory=tmp_path)
    for name, module in _FOUND_IN.items():
        page = tmp_path.joinpath("nnunetv2_macl", *module.split(".")).with_suffix(".html")
        assert f'id="{name}"' in page.read_text(encoding="utf-8"), f"{page} does not have {name}"
    for page in tmp_path.rglob("*.html"):
        # pdoc leaves a section that it does not understand as a paragraph.
        section = re.search(r"<p>(Args|Returns|Raises|Attributes):", page.read_text(encoding="utf-8"))
        assert section is None, f"{page}: {section.group()}"
