"""The user's mistakes as sentences."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.messages import log_to, show_any_character


def run(action: Callable[[], object]) -> None:
    """Show the user his mistakes as sentences, with exit code 1."""
    show_any_character()
    try:
        with log_to(partial(print, flush=True)):
            action()
    except (UserError, NotImplementedError) as error:
        sys.exit(f"\nError: {error}")
