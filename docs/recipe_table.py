"""Write the references of all recipes and of their keys, from the recipes and the code: ``python docs/recipe_table.py``."""

import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nnunetv2_macl.files import resource_folder
from nnunetv2_macl.methods.registry import all_methods
from nnunetv2_macl.recipe import Recipe, load_recipe, recipe_type

REFERENCE = Path(__file__).parent / "reference"
INTRODUCTION = """# Recipe keys

`python docs/recipe_table.py` writes this page from the code. [The plan](plan.md) says what a recipe is. A recipe has the keys of
the first table and those of the methods that its `method` names. [Recipes](recipes.md) lists the recipes of the package."""
RECIPES = """# Recipes

`python docs/recipe_table.py` writes this page from the files in `plans/`. Use a recipe with `-recipe NAME`. The last column lists
the values that differ from the defaults in [Recipe keys](recipe_keys.md)."""
TYPES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "null": "`null`",
    "boolean": "`true` or `false`",
}


def pages() -> dict[Path, str]:
    """Return the text of each page by its file."""
    return {REFERENCE / "recipe_keys.md": keys_page(), REFERENCE / "recipes.md": recipes_page()}


def recipes_page() -> str:
    """Return the table of the recipes that come with the package."""
    folder = resource_folder("plans")
    rows = ["| recipe | method | description | other values |", "|---|---|---|---|"]
    for name in sorted(file.stem for file in folder.glob("*.json")):
        recipe = load_recipe(name, folder)
        fields = type(recipe).model_fields
        values = recipe.as_dict()
        others = ", ".join(
            f"`{key}` {json.dumps(value)}"
            for key, value in values.items()
            if key not in ("method", "description") and value != fields[key].default
        )
        rows.append(f"| `{name}` | `{recipe.method}` | {recipe.description} | {others} |")
    return f"{RECIPES}\n\n" + "\n".join(rows) + "\n"


def keys_page() -> str:
    """Return the tables of the keys: those of every recipe, then those of each method."""
    sections = [INTRODUCTION, "## Keys of every recipe", table(Recipe, Recipe.model_fields)]
    for name, method in all_methods().items():
        about = (inspect.getdoc(method) or "").partition("\n")[0]
        sections += [f"## Method `{name}`", about, table(recipe_type(name), method.Config.model_fields)]
    return "\n\n".join(sections) + "\n"


def table(model: type[Recipe], keys: Iterable[str]) -> str:
    """Return the Markdown table of some keys of a recipe model."""
    rows = ["| key | default | may be | meaning |", "|---|---|---|---|"]
    schemas = model.model_json_schema()["properties"]
    for key in keys:
        field = model.model_fields[key]
        default = "must be given" if field.is_required() else f"`{json.dumps(field.default)}`"
        rows.append(f"| `{key}` | {default} | {allowed(schemas[key])} | {field.description} |")
    return "\n".join(rows)


def allowed(schema: dict[str, Any]) -> str:
    """Return in words which values a JSON schema allows."""
    if "anyOf" in schema:
        return ", or ".join(allowed(part) for part in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema.get("enum", [schema.get("const")]))
    if schema["type"] == "array":
        lengths = dict.fromkeys((schema["minItems"], schema["maxItems"]))
        return f"list of {' or '.join(map(str, lengths))} values, each a {allowed(schema['items'])}"
    words = TYPES[schema["type"]]
    limits = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "and below"}
    return " ".join([words, *(f"{word} {schema[limit]}" for limit, word in limits.items() if limit in schema)])


if __name__ == "__main__":
    for file, text in pages().items():
        file.write_text(text, encoding="utf-8")
