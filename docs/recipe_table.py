"""Prints the table of recipe keys that stands in docs/plan.md: ``python docs/recipe_table.py``."""

import json
from dataclasses import fields

from nnunetv2_macl.recipe import Recipe


def table() -> str:
    rows = ["| key | by itself | may be | meaning |", "|---|---|---|---|"]
    values = Recipe().as_dict()
    for field in fields(Recipe):
        allowed = field.metadata["allowed"].words
        rows.append(
            f"| `{field.name}` | `{json.dumps(values[field.name])}` | {allowed} | {field.metadata['meaning']} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
