"""Pre-training recipes: every setting that a user may choose, its default and what it may be.

A recipe is a flat JSON file. ``method`` names how it trains, and the method says which keys there are beside those that all
recipes have. ``inherits_from`` names another recipe whose values it starts from. The recipes that come with the package lie in
``plans/``.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, create_model

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.methods.config import AUTO, Auto, Count, Fraction, MethodConfig, NotNegative, Positive
from nnunetv2_macl.methods.registry import all_methods, methods_of

__all__ = ["AUTO", "Recipe", "load_recipe", "recipe_from_values"]


PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class Recipe(MethodConfig):
    """The keys that all recipes have. `recipe_from_values` adds those of the method and checks every value."""

    method: str = Field(description="how it trains; several methods are joined by +, and their losses are added")
    description: str = Field("", description="what the recipe is for")
    decoder_stages: Annotated[int, Field(ge=0)] | Auto = Field(
        AUTO, description="K, the number of decoder stages that are trained"
    )
    padding_mode: PaddingMode = Field(
        "zeros",
        description="what convolutions see beyond the edge while the network is pre-trained; in fine-tuning it is zeros, from "
        "which a network can read where in the patch it is",
    )
    optimizer: Literal["sgd", "adam", "adamw"] = Field("sgd", description="the optimiser")
    learning_rate: Positive = Field(0.01, description="the highest learning rate")
    momentum: Annotated[float, Field(ge=0, le=0.9999)] = Field(0.9, description="of `sgd`")
    weight_decay: NotNegative = Field(1e-5, description="the weight decay")
    schedule: Literal["cosine", "poly", "constant"] = Field("cosine", description="of the learning rate, down to 0")
    learning_rate_warmup: Fraction = Field(0.0, description="fraction of the steps over which the rate rises from 0")
    num_epochs: Count = Field(250, description="number of epochs")
    num_iterations_per_epoch: Count = Field(250, description="number of steps in an epoch")
    batch_size: Annotated[int, Field(ge=2)] | Auto = Field(AUTO, description="N, patches of a step over all GPUs")
    patches_at_once: Count | Auto = Field(
        AUTO,
        description="patches of a batch (of each GPU's part) whose activations are held at a time; fewer than the batch: the "
        "same gradient, less memory, and with contrast a third more time",
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(12345, description="of every random number")
    probe_every: Annotated[int, Field(ge=0)] = Field(
        0,
        description="epochs between two measurements of what the features are worth, for which alone labels are read; `0`: none",
    )
    collapse_patience: Annotated[int, Field(ge=0)] = Field(
        10, description="epochs in collapse after which the run stops; `0`: it goes on whatever happens"
    )

    @property
    def losses(self) -> dict[str, float]:
        """Return the losses that are trained, by name, each with its weight."""
        return {loss: weight for m in methods_of(self.method) for loss, weight in m.weights(self).items()}

    @property
    def couples_samples(self) -> bool:
        """Return whether the loss of a patch depends on the other patches of the batch."""
        return any(method.couples_samples for method in methods_of(self.method))

    @property
    def compares_positions(self) -> bool:
        """Return whether patches of near positions are positives of each other."""
        return any(method.compares_positions for method in methods_of(self.method))

    @property
    def uses_neighbours(self) -> bool:
        """Return whether the views show a neighbour of each patch."""
        return any(method.uses_neighbours for method in methods_of(self.method))

    @property
    def trains_in_stages(self) -> bool:
        """Return whether some weights get their first gradient later than others."""
        return any(method.trains_in_stages(self) for method in methods_of(self.method))

    def as_dict(self) -> dict[str, Any]:
        """Return all values by key, as JSON has them."""
        return self.model_dump()


@cache
def recipe_type(method: str) -> type[Recipe]:
    """Return the recipe model with the keys of a method. Raises UserError where there is no such method."""
    configs = tuple(m.Config for m in methods_of(method))
    bases: Any = (*configs, Recipe)
    return create_model(f"Recipe_{method.replace('+', '_')}", __base__=bases)


def defaults_of(method: str) -> dict[str, Any]:
    """Return the default of each key of a method's recipes that has one."""
    return {key: f.get_default() for key, f in recipe_type(method).model_fields.items() if not f.is_required()}


def meaning(key: str) -> str:
    """Return what a recipe key means; empty for a key that no recipe has."""
    return next((t.model_fields[key].description or "" for t in _known_types() if key in t.model_fields), "")


def _known_types() -> list[type[Recipe]]:
    return [recipe_type(method) for method in all_methods()]


# Version 0.1 knew these two methods, named none in a recipe, and read off the weights which of them a recipe used.
_WEIGHTS_OF_0_1 = {
    "macl": {"weight_global": 1.0, "weight_dense": 0.5, "weight_equivariance": 1.0},
    "restoration": {"weight_restoration": 0.0},
}


def _with_method(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the values with their method. A recipe of version 0.1 has none, and its weights say which it is."""
    if "method" in values:
        return values
    weights = {key: default for keys in _WEIGHTS_OF_0_1.values() for key, default in keys.items()}
    weights = {key: values.get(key, default) for key, default in weights.items()}
    for key, weight in weights.items():
        _check({"method": "macl+restoration", key: weight}, where, only=key)
    contrasts, restores = weights["weight_global"] + weights["weight_dense"] > 0, weights["weight_restoration"] > 0
    if not contrasts and weights["weight_equivariance"] > 0:
        raise UserError(
            f"{where}: weight_equivariance is above 0, and weight_global and weight_dense are 0: features that are the same for "
            "every image would do. Set weight_equivariance to 0, or one of the others above 0."
        )
    if not (contrasts or restores):
        raise UserError(
            f"{where}: weight_global, weight_dense and weight_restoration are all 0, which leaves nothing to learn from. Set one "
            "of them above 0."
        )
    method = "+".join(name for name, used in (("macl", contrasts), ("restoration", restores)) if used)
    unused = recipe_type("macl+restoration").model_fields.keys() - recipe_type(method).model_fields.keys()
    return {key: value for key, value in values.items() if key not in unused} | {"method": method}


def with_settings(values: dict[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with new ones in their place.

    New values as version 0.1 wrote them name no method and set a weight of another one. Then the weights say again which
    methods there are.
    """
    method = values.get("method")
    parts = method.split("+") if isinstance(method, str) else []
    missing = [name for name in _WEIGHTS_OF_0_1 if name not in parts]
    sets_weights = any(key in new for keys in _WEIGHTS_OF_0_1.values() for key in keys)
    if not parts or "method" in new or not sets_weights or not set(parts) <= set(_WEIGHTS_OF_0_1):
        return {**values, **new}
    zero = {key: 0.0 for name in missing for key in _WEIGHTS_OF_0_1[name]}
    return {**zero, **{key: value for key, value in values.items() if key != "method"}, **new}


def _check(values: dict[str, Any], where: str, only: str | None = None) -> Recipe | None:
    """Return the recipe of values that name their method.

    Args:
        values: Recipe values.
        where: What an error message names as their source.
        only: Report errors of this key alone, and return None.

    Raises:
        UserError: An unknown key, or a value of the wrong type or out of range.
    """
    model = recipe_type(values["method"])
    try:
        return model(**values)
    except ValidationError as error:
        problems = error.errors()
    if only is not None:
        problems = [p for p in problems if p["loc"][:1] == (only,)]
        if not problems:
            return None
    problem = problems[0]
    if not problem["loc"]:
        raise UserError(f"{where}: {problem['msg'].removeprefix('Value error, ')}. Correct it and try again.")
    key = str(problem["loc"][0])
    if problem["type"] == "extra_forbidden":
        raise UserError(f"{where}: {_unknown_key(key, values['method'])}")
    said = [
        p["msg"].removeprefix("Input should be ").removeprefix("Value error, ") for p in problems if p["loc"][0] == key
    ]
    raise UserError(
        f"{where}: '{key}' must be {' or '.join(dict.fromkeys(said))}, got {values.get(key)!r}. Correct it and try again."
    )


def _unknown_key(key: str, method: str | None) -> str:
    """Return what an error message says of a key that a method does not have; None: that no method has."""
    others = [name for name, m in all_methods().items() if key in m.Config.model_fields]
    if others:
        return (
            f"'{key}' is a key of method {' and '.join(others)}, and the method is {method}. Leave it out, or name the method: "
            f'"method": "{others[0]}" alone, or joined by + with others.'
        )
    types = _known_types() if method is None else [recipe_type(method)]
    keys = list(dict.fromkeys(key for known in types for key in known.model_fields))
    near = difflib.get_close_matches(key, keys, n=1)
    hint = f"Did you mean '{near[0]}'?" if near else f"The keys are: {', '.join(keys)}."
    return f"unknown key '{key}'. {hint}"


def check_values(values: Any, where: str) -> None:
    """Check recipe keys and values that may be a part of a recipe.

    Raises:
        UserError: An unknown key, or a value of the wrong type or out of range; names ``where``, the key, what it may be and
            what it is.
    """
    if not isinstance(values, dict):
        raise UserError(f'{where} must be a JSON object ({{"key": value, ...}}), got {type(values).__name__}.')
    if "method" in values:
        if not isinstance(values["method"], str):
            raise UserError(f"{where}: 'method' must be text, got {values['method']!r}. Correct it and try again.")
        recipe_type(values["method"])
    for key in values:
        own = values.get("method")
        if own is not None and key in recipe_type(own).model_fields:
            names = [own]
        else:
            # Another recipe may name the method, because this one inherits from it. So a key of any method may be here.
            names = [name for name in all_methods() if key in recipe_type(name).model_fields]
        if not names:
            raise UserError(f"{where}: {_unknown_key(key, None)}")
        if key != "method":
            _check_one(key, values[key], where, names)


def _check_one(key: str, value: Any, where: str, methods: Sequence[str]) -> None:
    """Check the value of a key that several methods have. Raises UserError where none of them takes it."""
    refusals = []
    for method in methods:
        try:
            _check({"method": method, key: value}, where, only=key)
            return
        except UserError as refused:
            refusals.append(refused)
    raise refusals[0]


def recipe_from_values(values: Any, where: str) -> Recipe:
    """Return the recipe with JSON values, checked. Raises UserError as `check_values` does."""
    check_values(values, where)
    try:
        recipe = _check(_with_method(values, where), where)
    except UserError as error:
        raise error if str(error).startswith(where) else UserError(f"{where}: {error}") from None
    assert recipe is not None
    return recipe


def parse_settings(texts: Iterable[str], where: str) -> dict[str, Any]:
    """Return recipe values from KEY=VALUE texts, checked as the values of a recipe file are.

    A value is written as in a recipe file, and text needs no quotation marks.

    Args:
        texts: Settings, each ``KEY=VALUE``.
        where: What an error message names as their source.

    Raises:
        UserError: A text without ``=``, a key with two different values, or what `check_values` refuses.
    """
    values: dict[str, Any] = {}
    for text in texts:
        key, equals, written = text.partition("=")
        if not (key and equals):
            raise UserError(f"{where}: a setting must be KEY=VALUE, got '{text}'. Correct it and try again.")
        value = _value_of(written)
        check_values({key: value}, where)
        if values.get(key, value) != value:
            raise UserError(f"{where}: '{key}' is set to {values[key]!r} and to {value!r}. Give it once.")
        values[key] = value
    return values


def settings_as_text(values: Mapping[str, Any]) -> list[str]:
    """Return recipe values as the KEY=VALUE texts that `parse_settings` reads."""
    return [
        f"{key}={value if isinstance(value, str) and _value_of(value) == value else json.dumps(value)}"
        for key, value in values.items()
    ]


def _value_of(written: str) -> Any:
    """Return the JSON value of a text, or the text itself where it is no JSON."""
    try:
        return json.loads(written)
    except (ValueError, RecursionError):
        return written


def load_recipe(name_or_file: str | Path, recipes_folder: Path, settings: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe and those that it inherits from.

    Args:
        name_or_file: The name of a recipe in ``recipes_folder``, or a JSON file.
        recipes_folder: The folder of the recipes that have a name.
        settings: Checked values that replace those of the recipe.

    Raises:
        UserError: no such recipe, no JSON, an unknown key, a wrong value, or values that do not go together.
    """
    values, where = _inherited_values(name_or_file, recipes_folder, ())
    if settings:
        values, where = with_settings(values, settings), f"{where} with {', '.join(settings_as_text(settings))}"
    return recipe_from_values(values, where)


def values_in(file: str | Path, recipes_folder: Path) -> dict[str, Any]:
    """What a recipe's file and those that it inherits from say, and not what is left to the defaults; see `load_recipe`."""
    return _inherited_values(file, recipes_folder, ())[0]


def _inherited_values(name_or_file: str | Path, folder: Path, visited: tuple[Path, ...]) -> tuple[dict[str, Any], str]:
    path = _find(name_or_file, folder, relative_to=visited[-1].parent if visited else Path())
    where = f"Recipe {path}"
    if path in visited:
        raise UserError(f"{where} inherits from itself, by way of {' -> '.join(p.name for p in visited)}.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{where} is not valid JSON: {error}. Correct it and try again.") from None
    except (OSError, RecursionError) as error:
        raise UserError(f"{where} cannot be read: {error}.") from None
    if isinstance(values, dict) and "inherits_from" in values:
        parent = values.pop("inherits_from")
        if not isinstance(parent, str):
            raise UserError(f"{where}: 'inherits_from' must be the name or file of a recipe, got {parent!r}.")
        values = with_settings(_inherited_values(parent, folder, (*visited, path))[0], values)
    check_values(values, where)
    return values, where


def _find(name_or_file: str | Path, folder: Path, relative_to: Path) -> Path:
    candidates = [relative_to / name_or_file, folder / f"{name_or_file}.json"]
    for candidate in candidates:
        try:
            if candidate.is_file():
                return candidate.resolve()
        except (OSError, ValueError):  # a name that no file can have
            continue
    names = sorted(p.stem for p in folder.glob("*.json"))
    raise UserError(
        f"No recipe '{name_or_file}': it is neither a file nor one of those that come with nnunetv2_macl. "
        f"Take one of: {', '.join(names)}; or give the path of a JSON file."
    )
