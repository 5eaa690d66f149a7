"""Pre-training recipes: every setting that a user may choose, its default and what it may be.

A recipe is a flat JSON file. ``inherits_from`` names another recipe whose values it starts from. The ones that come with the
package lie in ``plans/``.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.losses import EQUIVARIANCE_FORMS
from nnunetv2_macl.network import AUXILIARY_ENCODERS
from nnunetv2_macl.views import INTENSITY_ON

AUTO = "auto"
OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("cosine", "poly", "constant")


class _Allowed(NamedTuple):
    words: str
    check: Callable[[Any], bool]

    def __or__(self, other: _Allowed) -> _Allowed:  # type: ignore[override]
        return _Allowed(f"{self.words} or {other.words}", lambda value: self.check(value) or other.check(value))


def _number(low: float, high: float = math.inf, *, above: bool = False, whole: bool = False) -> _Allowed:
    kind = "a whole number" if whole else "a number"
    words = f"{kind} {'above' if above else 'from'} {low:g}" + (f" to {high:g}" if high < math.inf else "")

    def check(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            return False
        return math.isfinite(value) and (value > low if above else value >= low) and value <= high

    return _Allowed(words, check)


def _one_of(*values: Any) -> _Allowed:
    return _Allowed(
        "one of " + ", ".join(json.dumps(v) for v in values) if len(values) > 1 else json.dumps(values[0]),
        lambda value: any(value == v and type(value) is type(v) for v in values),
    )


def _list_of(item: _Allowed, lengths: tuple[int, ...], extra: Callable[[list], bool] = lambda _: True) -> _Allowed:
    return _Allowed(
        f"a list of {' or '.join(map(str, lengths))} values, each {item.words}",
        lambda value: (
            isinstance(value, list) and len(value) in lengths and all(map(item.check, value)) and extra(value)
        ),
    )


_TEXT = _Allowed("text", lambda value: isinstance(value, str))
_TRUTH = _one_of(True, False)


def _key(default: Any, allowed: _Allowed, meaning: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"allowed": allowed, "meaning": meaning})
    return field(default=default, metadata={"allowed": allowed, "meaning": meaning})


@dataclass(frozen=True)
class Recipe:
    """One pre-training setting. Build it with `load_recipe`, which checks every value."""

    description: str = _key("", _TEXT, "what the recipe is for")

    weight_global: float = _key(1.0, _number(0), "λ1, of the image-level loss L_g")
    weight_dense: float = _key(0.5, _number(0), "λ2, of the pixel-level loss L_d")
    weight_equivariance: float = _key(1.0, _number(0), "λ3, of the feature-level loss L_ER")
    weight_restoration: float = _key(
        0.0, _number(0), "of restoring hidden voxels, L_R: no part of the paper, see plans/restore.json"
    )
    restoration_share: float = _key(0.6, _number(0, 1), "of the blocks of a patch, hidden from restoration")
    equivariance_form: str = _key(
        "l1",
        _one_of(*EQUIVARIANCE_FORMS),
        "l1: the paper's; standardised: of maps centred and scaled over the batch, so that maps alike for every image do not pay",
    )
    temperature: float = _key(0.1, _number(0, above=True), "τ")
    base_temperature: float | None = _key(
        0.07, _number(0, above=True) | _one_of(None), "L_g and L_d are multiplied by τ / this; null: not at all"
    )
    threshold: float = _key(0.1, _number(0, 1), "t, fraction of the volume within which two patches are positives")
    threshold_warmup: float = _key(0.0, _number(0, 1), "share of the steps over which t rises from 0")
    own_view_weight: float = _key(0.0, _number(0, 1), "a in a·(own view) + (1-a)·(mean over all positives)")
    limit_positives: bool = _key(
        True, _TRUTH, "lower t until an anchor has at most about N/8 positives beside its own view"
    )

    decoder_stages: int | str = _key(AUTO, _number(0, whole=True) | _one_of(AUTO), "K, decoder stages that are trained")
    auxiliary_stage: int | str = _key(
        AUTO, _number(1, whole=True) | _one_of(AUTO, "bottleneck"), "e, encoder stage of the auxiliary dense map"
    )
    scale: int | list[int] | str = _key(
        AUTO,
        _number(1, whole=True) | _list_of(_number(1, whole=True), (2, 3)) | _one_of(AUTO),
        "s, how much smaller the dominant branch sees the patch: the largest axis, or one value an axis",
    )
    auxiliary_encoder: str = _key("shared", _one_of(*AUXILIARY_ENCODERS), "the encoder of the auxiliary branch")
    ema_decay: float = _key(0.999, _number(0, 1), "of the averaged auxiliary encoder")
    standardise_projector: bool = _key(True, _TRUTH, "standardise pooled features over the batch")
    embedding_dim: int = _key(128, _number(2, whole=True), "length of the image-level vectors")
    training_stages: int = _key(
        1,
        _one_of(1, 2),
        "1: all at once; 2: all but the dense loss for half of the epochs, then that alone on the fixed encoder",
    )
    downsample_first_stage: bool = _key(
        True,
        _TRUTH,
        "with two training stages: false shows the dominant branch the views at full size in the first, which leaves out L_ER",
    )

    mirroring: bool = _key(True, _TRUTH, "mirror the variance group")
    rotation: float = _key(180.0, _number(0, 180), "largest angle in plane, degrees")
    scaling: list[float] = _key(
        [0.7, 1.3], _list_of(_number(0, above=True), (2,), lambda v: v[0] <= v[1]), "smallest and largest factor"
    )
    translation: float = _key(0.1, _number(0, 1), "largest shift, fraction of the patch edge")

    intensity: float = _key(
        0.0, _number(0, 2), "strength of random gamma, contrast, brightness, bias field, noise and blur; 0: none"
    )
    intensity_on: str = _key(
        "all",
        _one_of(*INTENSITY_ON),
        "what is changed so: both groups in both branches, the variance group, or what the auxiliary branch sees",
    )

    optimizer: str = _key("sgd", _one_of(*OPTIMIZERS), "")
    learning_rate: float = _key(0.01, _number(0, above=True), "at its highest")
    momentum: float = _key(0.9, _number(0, 0.9999), "of sgd")
    weight_decay: float = _key(1e-5, _number(0), "")
    schedule: str = _key("cosine", _one_of(*SCHEDULES), "of the learning rate, down to 0")
    learning_rate_warmup: float = _key(0.0, _number(0, 1), "share of the steps over which the rate rises from 0")
    num_epochs: int = _key(250, _number(1, whole=True), "")
    num_iterations_per_epoch: int = _key(250, _number(1, whole=True), "")
    batch_size: int | str = _key(AUTO, _number(2, whole=True) | _one_of(AUTO), "N, patches a step over all GPUs")
    patches_at_once: int | str = _key(
        AUTO,
        _number(1, whole=True) | _one_of(AUTO),
        "patches of a batch (of each GPU's share) whose activations are held at a time; fewer than the batch: same gradient, "
        "less memory, and with contrast a third more time",
    )
    seed: int = _key(12345, _number(0, 2**32 - 1, whole=True), "of every random number")
    probe_every: int = _key(
        0,
        _number(0, whole=True),
        "epochs between two looks at what the features are worth, labels being read for that alone; 0: none",
    )
    collapse_patience: int = _key(
        10, _number(0, whole=True), "epochs in collapse after which the run stops; 0: it goes on whatever happens"
    )

    def __post_init__(self) -> None:
        if not self.is_contrastive and self.weight_restoration <= 0:
            raise UserError(
                "weight_global, weight_dense and weight_restoration are all 0, which leaves nothing to learn from. Set one of "
                "them above 0."
            )
        if not self.is_contrastive and self.weight_equivariance > 0:
            raise UserError(
                "weight_equivariance is above 0 and weight_global and weight_dense are 0: features that are the same for every "
                "image would do. Set weight_equivariance to 0, or one of the others above 0."
            )

    @property
    def is_contrastive(self) -> bool:
        """Whether patches are compared at all, or restored alone."""
        return self.weight_global + self.weight_dense > 0

    @property
    def full_size_first(self) -> bool:
        """Whether there is a first of two training stages, and the dominant branch sees the views at full size in it."""
        return self.training_stages == 2 and not self.downsample_first_stage

    @property
    def weights(self) -> dict[str, float]:
        """Of the losses that are trained, by name."""
        names = ("global", "dense", "equivariance", "restoration")
        return {name: weight for name in names if (weight := getattr(self, f"weight_{name}"))}

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


_FIELDS = {f.name: f for f in fields(Recipe)}


def meaning(key: str) -> str:
    """What a recipe key means, in words; empty where its name says it."""
    return _FIELDS[key].metadata["meaning"]


def check_values(values: dict[str, Any], where: str) -> None:
    """Check recipe keys and values.

    Raises:
        UserError: an unknown key or a value of the wrong type or out of range; names ``where``, the key, what it may be and
            what it got.
    """
    if not isinstance(values, dict):
        raise UserError(f'{where} must be a JSON object ({{"key": value, ...}}), got {type(values).__name__}.')
    for key, value in values.items():
        if key not in _FIELDS:
            near = difflib.get_close_matches(key, _FIELDS, n=1)
            hint = f"Did you mean '{near[0]}'?" if near else f"The keys are: {', '.join(_FIELDS)}."
            raise UserError(f"{where}: unknown key '{key}'. {hint}")
        allowed: _Allowed = _FIELDS[key].metadata["allowed"]
        if not allowed.check(value):
            raise UserError(f"{where}: '{key}' must be {allowed.words}, got {value!r}. Correct it and try again.")


def recipe_from_values(values: dict[str, Any], where: str) -> Recipe:
    """A recipe from its JSON values, checked. Raises UserError as `check_values` does."""
    check_values(values, where)
    try:
        return Recipe(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


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
        values, where = {**values, **settings}, f"{where} with {', '.join(settings_as_text(settings))}"
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
        values = _inherited_values(parent, folder, (*visited, path))[0] | values
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
