"""Pre-training recipes: all settings that a user may choose, with their types, ranges and defaults.

A recipe is a flat JSON file. The key ``method`` names the pre-training method, which defines further keys in addition to the keys
of all recipes. ``inherits_from`` names another recipe, which provides the defaults. The recipes of the package are in ``plans/``.
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
    """The keys of all recipes. `recipe_from_values` adds the keys of the method and checks every value."""

    method: str = Field(
        description="pre-training method; `restoration` and another method can be joined by +, and their losses are added"
    )
    description: str = Field("", description="description of the recipe")
    decoder_stages: Annotated[int, Field(ge=0)] | Auto = Field(
        AUTO, description="K, number of trained decoder stages, counted from the bottleneck"
    )
    padding_mode: PaddingMode = Field(
        "zeros",
        description="padding of the convolutions during pre-training; fine-tuning always pads with zeros, from which a network "
        "can infer positions in the patch",
    )
    optimizer: Literal["sgd", "adam", "adamw"] = Field("sgd", description="optimiser")
    learning_rate: Positive = Field(0.01, description="maximum learning rate")
    momentum: Annotated[float, Field(ge=0, le=0.9999)] = Field(0.9, description="momentum of `sgd`")
    weight_decay: NotNegative = Field(1e-5, description="weight decay")
    schedule: Literal["cosine", "poly", "constant"] = Field(
        "cosine", description="decay of the learning rate to 0, or a constant rate"
    )
    learning_rate_warmup: Fraction = Field(
        0.0, description="fraction of the steps over which the learning rate rises linearly from 0"
    )
    num_epochs: Annotated[Count, Field(le=1_000_000)] = Field(16, description="number of epochs")
    num_iterations_per_epoch: Annotated[Count, Field(le=1_000_000)] = Field(
        250, description="number of steps per epoch"
    )
    batch_size: Annotated[int, Field(ge=2, le=65536)] | Auto = Field(
        AUTO, description="N, number of patches of a step over all GPUs"
    )
    patches_at_once: Count | Auto = Field(
        AUTO,
        description="number of patches (of each GPU's part of the batch) whose activations are in memory at once; fewer than the "
        "batch need less memory for the same gradient, and with contrastive losses a third more time",
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(12345, description="seed of all random numbers")
    probe_every: Annotated[int, Field(ge=0)] = Field(
        0,
        description="evaluate the features every `probe_every` epochs, which uses labels for evaluation only; `0` disables it",
    )
    collapse_patience: Annotated[int, Field(ge=0)] = Field(
        10,
        description="number of collapsed epochs in a row after which the run stops; `0`: it never stops for collapse",
    )

    @property
    def losses(self) -> dict[str, float]:
        """Return the weight of each trained loss, by the name of the loss."""
        return {loss: weight for m in methods_of(self.method) for loss, weight in m.weights(self).items()}

    @property
    def couples_samples(self) -> bool:
        """Return whether the loss of a patch depends on the other patches of the batch."""
        return any(method.couples_samples for method in methods_of(self.method))

    @property
    def compares_positions(self) -> bool:
        """Return whether patches at nearby positions are positives of each other."""
        return any(method.compares_positions for method in methods_of(self.method))

    @property
    def uses_neighbours(self) -> bool:
        """Return whether the views also show a neighbour of each patch."""
        return any(method.uses_neighbours for method in methods_of(self.method))

    @property
    def trains_in_stages(self) -> bool:
        """Return whether some weights get their first gradient later than others."""
        return any(method.trains_in_stages(self) for method in methods_of(self.method))

    def as_dict(self) -> dict[str, Any]:
        """Return all values by key, as JSON values."""
        return self.model_dump()


@cache
def recipe_type(method: str) -> type[Recipe]:
    """Return the recipe model with the keys of a method. Raise UserError if there is no such method."""
    configs = tuple(m.Config for m in methods_of(method))
    bases: Any = (*configs, Recipe)
    return create_model(f"Recipe_{method.replace('+', '_')}", __base__=bases)


def defaults_of(method: str) -> dict[str, Any]:
    """Return the defaults of all keys of a method's recipes that have one."""
    return {key: f.get_default() for key, f in recipe_type(method).model_fields.items() if not f.is_required()}


def meaning(key: str) -> str:
    """Return the description of a recipe key, or an empty string if no recipe has the key."""
    return next((t.model_fields[key].description or "" for t in _known_types() if key in t.model_fields), "")


def _known_types() -> list[type[Recipe]]:
    return [recipe_type(method) for method in all_methods()]


# Recipes of version 0.1 do not name a method. Their weights determine which of these two methods they use.
_WEIGHTS_OF_0_1 = {
    "macl": {"weight_global": 1.0, "weight_dense": 0.5, "weight_equivariance": 1.0},
    "restoration": {"weight_restoration": 0.0},
}
_EPOCHS_OF_0_1 = 250


def _with_method(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the values with their method. For a recipe of version 0.1, the weights determine the method.

    Raises:
        UserError: All weights are 0, or only that of the feature-level loss is not.
    """
    if "method" in values:
        return values
    weights = {key: default for keys in _WEIGHTS_OF_0_1.values() for key, default in keys.items()}
    weights = {key: values.get(key, default) for key, default in weights.items()}
    for key, weight in weights.items():
        _check({"method": "macl+restoration", key: weight}, where, only=key)
    contrasts, restores = weights["weight_global"] + weights["weight_dense"] > 0, weights["weight_restoration"] > 0
    if not contrasts and weights["weight_equivariance"] > 0:
        raise UserError(
            f"{where}: weight_equivariance is above 0, and weight_global and weight_dense are 0, so the loss is minimal if all "
            "images have the same features. Set weight_equivariance to 0, or one of the others above 0."
        )
    if not (contrasts or restores):
        raise UserError(
            f"{where}: weight_global, weight_dense and weight_restoration are all 0, so there is nothing to learn from. Set "
            "one of them above 0."
        )
    method = "+".join(name for name, used in (("macl", contrasts), ("restoration", restores)) if used)
    unused = recipe_type("macl+restoration").model_fields.keys() - recipe_type(method).model_fields.keys()
    return {key: value for key, value in values.items() if key not in unused} | {"method": method}


def with_settings(values: dict[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return recipe values with some of them replaced by new values.

    New values in the format of version 0.1 name no method and may set the weight of a method that is not in use. In this case
    the method is removed, so that the weights determine it again. A method that was named keeps its own default weights.
    """
    method = values.get("method")
    parts = method.split("+") if isinstance(method, str) else []
    missing = [name for name in _WEIGHTS_OF_0_1 if name not in parts]
    sets_weights = any(key in new for keys in _WEIGHTS_OF_0_1.values() for key in keys)
    if not parts or "method" in new or not sets_weights or not set(parts) <= set(_WEIGHTS_OF_0_1):
        return {**values, **new}
    zero = {key: 0.0 for name in missing for key in _WEIGHTS_OF_0_1[name]}
    defaults = {key: defaults_of(name)[key] for name in parts for key in _WEIGHTS_OF_0_1[name]}
    return {**zero, **defaults, **{key: value for key, value in values.items() if key != "method"}, **new}


def _check(values: dict[str, Any], where: str, only: str | None = None) -> Recipe | None:
    """Return the recipe with given values, which must include the method.

    Args:
        values: Recipe values.
        where: Source of the values, for error messages.
        only: Report only errors of this key, and then return None if there are none.

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
    allowed = [
        p["msg"].removeprefix("Input should be ").removeprefix("Value error, ") for p in problems if p["loc"][0] == key
    ]
    raise UserError(
        f"{where}: '{key}' must be {' or '.join(dict.fromkeys(allowed))}, got {values.get(key)!r}. Correct it and try again."
    )


def _unknown_key(key: str, method: str | None) -> str:
    """Return an error message about a key that a method does not have. ``method`` is None if no method has the key."""
    others = [name for name, m in all_methods().items() if key in m.Config.model_fields]
    if others:
        return (
            f"'{key}' is a key of method {' and '.join(others)}, and the method is {method}. Leave out the key, or set "
            f'"method" to "{others[0]}".'
        )
    types = _known_types() if method is None else [recipe_type(method)]
    keys = list(dict.fromkeys(key for known in types for key in known.model_fields))
    near = difflib.get_close_matches(key, keys, n=1)
    hint = f"Did you mean '{near[0]}'?" if near else f"The keys are: {', '.join(keys)}."
    return f"unknown key '{key}'. {hint}"


def check_values(values: Any, where: str) -> None:
    """Check the keys and values of a recipe or of a part of a recipe.

    Args:
        values: The values by key.
        where: Source of the values, for error messages.

    Raises:
        UserError: A key is unknown, or a value has the wrong type or is out of range. The message names ``where``, the key, the
            allowed values and the value.
    """
    if not isinstance(values, dict):
        raise UserError(f'{where} must be a JSON object ({{"key": value, ...}}), got {type(values).__name__}.')
    if "method" in values:
        if not isinstance(values["method"], str):
            raise UserError(f"{where}: 'method' must be text, got {values['method']!r}. Correct it and try again.")
        try:
            recipe_type(values["method"])
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    for key in values:
        own = values.get("method")
        if own is not None and key in recipe_type(own).model_fields:
            names = [own]
        else:
            # The method may come from the recipe that this one inherits from, so keys of all methods are allowed.
            names = [name for name in all_methods() if key in recipe_type(name).model_fields]
        if not names:
            raise UserError(f"{where}: {_unknown_key(key, None)}")
        if key != "method":
            _check_one(key, values[key], where, names)


def _check_one(key: str, value: Any, where: str, methods: Sequence[str]) -> None:
    """Check the value of a key that several methods have. Raise UserError if no method allows the value."""
    refusals = []
    for method in methods:
        try:
            _check({"method": method, key: value}, where, only=key)
            return
        except UserError as refused:
            refusals.append(refused)
    raise refusals[0]


def recipe_from_values(values: Any, where: str) -> Recipe:
    """Return the recipe with given JSON values, after checking them. Raise UserError like `check_values`."""
    check_values(values, where)
    try:
        recipe = _check(_with_method(values, where), where)
    except UserError as error:
        raise error if str(error).startswith(where) else UserError(f"{where}: {error}") from None
    assert recipe is not None
    return recipe


def parse_settings(texts: Iterable[str], where: str) -> dict[str, Any]:
    """Return recipe values from texts of the form KEY=VALUE, after checking them like those of a recipe file.

    A value is written as in a recipe file, but text needs no quotation marks.

    Args:
        texts: Settings, each ``KEY=VALUE``.
        where: Source of the settings, for error messages.

    Raises:
        UserError: A text has no ``=``, a key has two different values, or `check_values` rejects a value.
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
    """Return recipe values as texts of the form KEY=VALUE, which `parse_settings` reads."""
    return [
        f"{key}={value if isinstance(value, str) and _value_of(value) == value else json.dumps(value)}"
        for key, value in values.items()
    ]


def _value_of(written: str) -> Any:
    """Return the JSON value of a text, or the text itself if it is not JSON."""
    try:
        return json.loads(written)
    except (ValueError, RecursionError):
        return written


def load_recipe(name_or_file: str | Path, recipes_folder: Path, settings: Mapping[str, Any] | None = None) -> Recipe:
    """Return a recipe, including the values that it inherits from other recipes.

    Args:
        name_or_file: The name of a recipe in ``recipes_folder``, or a JSON file.
        recipes_folder: The folder in which recipes are found by name.
        settings: Checked values that replace those of the recipe.

    Raises:
        UserError: There is no such recipe, it is not JSON, a key is unknown, a value is wrong, or values contradict each other.
    """
    values, where = _inherited_values(name_or_file, recipes_folder, ())
    if settings:
        values, where = with_settings(values, settings), f"{where} with {', '.join(settings_as_text(settings))}"
    return recipe_from_values(values, where)


def _inherited_values(name_or_file: str | Path, folder: Path, visited: tuple[Path, ...]) -> tuple[dict[str, Any], str]:
    path = _find(name_or_file, folder, relative_to=visited[-1].parent if visited else Path())
    where = f"Recipe {path}"
    if path in visited:
        raise UserError(
            f"{where} inherits from itself through {' -> '.join(p.name for p in visited)}. Correct 'inherits_from'."
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))  # Windows' Notepad writes a mark at the start
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{where} is not valid JSON: {error}. Correct it and try again.") from None
    except (OSError, RecursionError) as error:
        raise UserError(f"{where} cannot be read: {error}.") from None
    if isinstance(values, dict) and "inherits_from" in values:
        parent = values.pop("inherits_from")
        if not isinstance(parent, str):
            raise UserError(f"{where}: 'inherits_from' must be the name or file of a recipe, got {parent!r}.")
        values = with_settings(_inherited_values(parent, folder, (*visited, path))[0], values)
    elif isinstance(values, dict) and "method" not in values:
        values = {"num_epochs": _EPOCHS_OF_0_1, **values}
    check_values(values, where)
    return values, where


def _find(name_or_file: str | Path, folder: Path, relative_to: Path) -> Path:
    candidates = [relative_to / name_or_file, folder / f"{name_or_file}.json"]
    for candidate in candidates:
        try:
            if candidate.is_file():
                return candidate.resolve()
        except (OSError, ValueError):  # No file can have this name.
            continue
    names = sorted(p.stem for p in folder.glob("*.json"))
    raise UserError(f"There is no recipe '{name_or_file}'. Give one of {', '.join(names)}, or the path of a JSON file.")
