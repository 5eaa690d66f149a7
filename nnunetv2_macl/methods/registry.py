"""Find pre-training methods by their names in recipes."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Sequence
from functools import cache
from inspect import isabstract
from itertools import combinations

from nnunetv2_macl import methods
from nnunetv2_macl.checkpoints import NNUNET_CITATION
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.extensions import announced
from nnunetv2_macl.methods.base import Method

ENTRY_POINTS = "nnunetv2_macl.methods"


@cache
def all_methods() -> dict[str, type[Method]]:
    """Return all methods by name: those of `nnunetv2_macl.methods` and those that installed packages register."""
    names = [f"{methods.__name__}.{module.name}" for module in pkgutil.iter_modules(methods.__path__)]
    found = [value for name in names for value in vars(importlib.import_module(name)).values()]
    found += announced(ENTRY_POINTS)
    classes = {value for value in found if isinstance(value, type) and issubclass(value, Method)}
    return {method.name: method for method in sorted(classes - {Method}, key=_order) if not isabstract(method)}


def _order(method: type[Method]) -> str:
    return getattr(method, "name", "")


def methods_of(name: str) -> tuple[type[Method], ...]:
    """Return the methods that a recipe's ``method`` names. Several names are joined by +, and their losses are added.

    At most one of them may compare embeddings, because their curves, their collapse lines and their views would be confused.

    Raises:
        UserError: There is no such method, a method or a name of a loss occurs twice, two methods compare embeddings, or two
            methods have different defaults of the same key.
    """
    found = []
    for part in name.split("+"):
        if part not in all_methods():
            near = difflib.get_close_matches(part, all_methods(), n=1)
            hint = f"Did you mean '{near[0]}'?" if near else f"The methods are: {', '.join(all_methods())}."
            raise UserError(f"There is no method '{part}'. {hint} Join several by +, as in macl+restoration.")
        found.append(all_methods()[part])
    for names in ([m.name for m in found], [loss for m in found for loss in m.loss_labels]):
        if twice := {n for n in names if names.count(n) > 1}:
            raise UserError(f"The method '{name}' has {', '.join(sorted(twice))} twice. Name each method once.")
    if len(comparing := [m.name for m in found if m.couples_samples]) > 1:
        raise UserError(
            f"The method '{name}' joins {' and '.join(comparing)}, which all compare embeddings. Name one of them, alone or "
            f"with restoration: {comparing[0]}+restoration"
        )
    for one, other in combinations(found, 2):
        defaults, others = ({k: f.default for k, f in m.Config.model_fields.items()} for m in (one, other))
        if unequal := [key for key, value in defaults.items() if others.get(key, value) != value]:
            raise UserError(
                f"The method '{name}' joins {one.name} and {other.name}, which have different defaults of the same key "
                f"({', '.join(unequal)}). Name one of them: {one.name}, or {other.name}"
            )
    return tuple(found)


def citations_of(found: Sequence[type[Method]]) -> list[str]:
    """Return the references to cite for methods, and the one of nnU-Net."""
    return list(dict.fromkeys([*(citation for method in found for citation in method.citations), NNUNET_CITATION]))


def loss_labels() -> dict[str, str]:
    """Return the labels of the losses of all methods, by the name of the loss."""
    return {loss: label for method in all_methods().values() for loss, label in method.loss_labels.items()}
