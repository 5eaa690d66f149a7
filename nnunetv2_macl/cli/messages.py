"""The user's mistakes, and an output that is full, as sentences."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.messages import log_to, show_any_character


def run(action: Callable[[], object]) -> None:
    """Show the user his mistakes as sentences, with exit code 1."""
    show_any_character()
    with exit_where_output_is_full():
        try:
            with log_to(partial(print, flush=True)):
                action()
        except (UserError, NotImplementedError) as error:
            sys.exit(f"\nError: {error}")


@contextmanager
def exit_where_output_is_full() -> Iterator[None]:
    """End a command with a sentence and exit code 1 where its output cannot be written: a full disk, a program that ended."""
    try:
        yield
    except SystemExit as end:
        # an error that was to be shown anyway says more
        if (reason := _why_unwritable("")) and not end.code:
            sys.exit(_told(reason))
        raise
    except OSError:
        if reason := _why_unwritable("\n"):
            sys.exit(_told(reason))
        raise
    if reason := _why_unwritable(""):
        sys.exit(_told(reason))


def _told(reason: str) -> str:
    return f"\nError: The output of this command cannot be written: {reason}. Make space, or send it somewhere else."


def _why_unwritable(text: str) -> str | None:
    """Write a text and what is still to be written to the output. Return why that fails, or None."""
    if sys.stdout is None:
        return None
    try:
        print(text, end="", flush=True)
    except OSError as error:
        # Python tries once more when it ends, and would tell of it in words of its own
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error.strerror or str(error)
    return None
