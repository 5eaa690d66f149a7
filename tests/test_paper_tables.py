"""The paper's ablations: Tables III, IV and VI have a recipe for each row, Table V and Figure 7 a command."""

import itertools
import re
from pathlib import Path

import pytest

from nnunetv2_macl.files import resource_folder
from nnunetv2_macl.recipe import load_recipe, parse_settings

FOLDER = resource_folder("plans")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "paper_tables.md"
PCL = {"decoder_stages": 0, "scale": 1, "weight_dense": 0.0, "weight_equivariance": 0.0}
# For each row of the paper's tables, the name of the recipe and its differences from MACL in the paper.
ROWS = {
    "table3_global": PCL,
    "table3_global_decoder": {"weight_dense": 0.0, "weight_equivariance": 0.0},
    "table3_global_decoder_equivariance": {"weight_dense": 0.0},
    "table3_all": {},
    "table4_0_decoder_stages": PCL,
    "table4_1_decoder_stages": {"decoder_stages": 1, "scale": 2},
    "table4_2_decoder_stages": {"decoder_stages": 2, "scale": 4},
    "table4_3_decoder_stages": {"decoder_stages": 3, "scale": 8},
    "table4_4_decoder_stages": {"decoder_stages": 4, "scale": 16},
    "table6_independent_encoder_one_stage": {"auxiliary_encoder": "independent"},
    "table6_ema_encoder_one_stage": {"auxiliary_encoder": "ema"},
    "table6_shared_encoder_one_stage": {"auxiliary_encoder": "shared", "training_stages": 1},
    "table6_two_stages_downsampling": {"training_stages": 2, "downsample_first_stage": True},
    "table6_two_stages_no_downsampling": {"training_stages": 2, "downsample_first_stage": False},
}
TABLE_5 = set(itertools.product((0.25, 0.5, 0.75, 1.0), repeat=2))
FIGURE_7 = {(weight, 1.0) for weight in (0.1, 0.3, 0.5, 0.7, 0.9)}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_differs_from_macl_exactly_as_in_the_paper(name):
    ours, paper = load_recipe(name, FOLDER).as_dict(), load_recipe("paper", FOLDER).as_dict()
    del ours["description"], paper["description"]
    assert ours == paper | ROWS[name]
    assert paper | {"weight_global": 1.0, "weight_dense": 0.5, "weight_equivariance": 1.0} == paper


def test_every_recipe_of_a_table_is_a_row_of_the_paper():
    assert {file.stem for file in FOLDER.glob("table*.json")} == set(ROWS)
    for name in ROWS:
        table = {"table3": "Table III", "table4": "Table IV", "table6": "Table VI"}[name.partition("_")[0]]
        assert load_recipe(name, FOLDER).description.startswith(table)


def section(title):
    (text,) = re.findall(rf"^## {title}\b.*?\n(.*?)(?=^## |\Z)", PAGE.read_text(), flags=re.M | re.S)
    return text


def recipes_in(text):
    """Return the recipes of the commands in a text, ``-recipe NAME --set KEY=VALUE ...``."""
    commands = re.findall(r"-recipe (\w+)(?: --set ([^`|]+))?", text)
    return [load_recipe(name, FOLDER, parse_settings(settings.split(), PAGE.name)) for name, settings in commands]


@pytest.mark.parametrize("table", ["III", "IV", "VI"])
def test_the_page_has_each_row(table):
    number = {"III": "table3", "IV": "table4", "VI": "table6"}[table]
    rows = re.findall(r"^\| .*?`-recipe (\w+)`", section(f"Table {table}"), flags=re.M)
    assert rows == [name for name in ROWS if name.startswith(number)]


def test_the_page_has_each_pair_of_weights():
    recipes = recipes_in(section("Table V and Figure 7"))
    pairs = [(recipe.weight_dense, recipe.weight_equivariance) for recipe in recipes]
    assert set(pairs) == TABLE_5 | FIGURE_7 and len(set(pairs)) == len(pairs)
    paper = load_recipe("paper", FOLDER).as_dict()
    for recipe in recipes:
        changed = {key for key, value in recipe.as_dict().items() if value != paper[key]}
        assert changed <= {"weight_dense", "weight_equivariance"}
