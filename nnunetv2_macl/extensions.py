"""Load the classes that other installed packages register in their entry points."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

from nnunetv2_macl.errors import UserError


def announced(group: str) -> Iterator[Any]:
    """Yield the classes that the entry points of a group name. An entry point names a class or the module that holds it.

    Raises:
        UserError: A package cannot be imported. The message names it.
    """
    for entry in entry_points(group=group):
        try:
            loaded = entry.load()
        # Another package's code can raise any exception.
        except Exception as error:
            package = entry.dist.name if entry.dist else "?"
            raise UserError(
                f"The package {package} names {entry.value} in its entry points {group}, but it cannot be imported: "
                f"{error}. Correct the package, or remove it."
            ) from error
        yield from [loaded] if isinstance(loaded, type) else vars(loaded).values()
