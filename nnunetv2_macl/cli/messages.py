"""Print user errors, and the reason why the output cannot be written, as plain messages."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.messages import log_to, show_any_character


def call(parser: argparse.ArgumentParser, function: str) -> None:
    """Run a function of the package, such as ``demo:demo``, with the parsed arguments by their names, see `run`."""
    arguments = vars(parser.parse_args())
    module, _, name = function.partition(":")
    # imported last, because nnU-Net takes seconds to import
    run(lambda: getattr(import_module(f"nnunetv2_macl.{module}"), name)(**arguments))


def run(action: Callable[[], object]) -> None:
    """Run a command. Print a user error as a message instead of a traceback, and exit with code 1."""
    show_any_character()
    try:
        with exit_where_output_is_full():
            try:
                with log_to(partial(print, flush=True)):
                    action()
            except (UserError, NotImplementedError) as error:
                sys.exit(f"\nError: {error}")
    except SystemExit as end:
        if end.code != 128 + signal.SIGINT:
            raise
        # Python then ends by the signal. A shell ends a loop of commands only if one of them ends so.
        sys.excepthook = lambda *about: None
        raise KeyboardInterrupt from None


@contextmanager
def exit_where_output_is_full() -> Iterator[None]:
    """Exit with a message and code 1 if the output cannot be written, for example because the disk is full."""
    end: SystemExit | OSError | None = None
    try:
        yield
    except (SystemExit, OSError) as error:
        end = error
    reason = _why_unwritable("\n" if isinstance(end, OSError) else "")
    # Keep an error that the command already reports, because it says more.
    if reason and not (isinstance(end, SystemExit) and end.code):
        sys.exit(
            f"\nError: The output of this command cannot be written: {reason}. Redirect it to a file on a disk with free space."
        )
    if end is not None:
        raise end


def _why_unwritable(text: str) -> str | None:
    """Write a text to the output and flush it. Return why that fails, or None."""
    if sys.stdout is None:
        return None
    try:
        print(text, end="", flush=True)
    except OSError as error:
        # Python flushes again at exit and would print a second error, so send the rest to the null device.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error.strerror or str(error)
    return None
