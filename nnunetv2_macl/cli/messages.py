"""The user's mistakes as sentences."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.messages import heard


def run(action: Callable[[], object]) -> None:
    """Show the user his mistakes as sentences, with exit code 1."""
    try:
        with heard(partial(print, flush=True)):
            action()
    except (UserError, NotImplementedError) as error:
        sys.exit(f"\nError: {error}")
