"""A user's mistake inside nnU-Net's own commands ends in its message, not in a traceback."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from nnunetv2_macl.errors import UserError


def user_errors_end_the_run(method: Callable) -> Callable:
    """Turn a UserError of a trainer's method into an exit with code 1 that shows the message alone.

    nnU-Net's commands have no place for a user's mistake: they would print a traceback.
    """

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except UserError as error:
            self.print_to_log_file(f"Error: {error}", also_print_to_console=False)
            raise SystemExit(f"\nError: {error}") from error

    return wrapped
