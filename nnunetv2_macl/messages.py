"""What the package tells while it is at work, on its way to a console or a log file."""

from __future__ import annotations

import io
import locale
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def show_any_character() -> None:
    """Have this process show a character that its output's encoding lacks as an escape, instead of ending with an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def for_log_file(text: object) -> str:
    """Return a text in which what a file of the system's encoding cannot hold is an escape: nnU-Net opens its log so."""
    encoding = locale.getpreferredencoding(False)
    return str(text).encode(encoding, "backslashreplace").decode(encoding)


class _CallbackHandler(logging.Handler):
    def __init__(self, log: Callable[[str], object]) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log(record.getMessage())


@contextmanager
def log_to(log: Callable[[str], object]) -> Iterator[None]:
    """Meanwhile ``log`` is called with each message, from progress on."""
    logger, handler = logging.getLogger("nnunetv2_macl"), _CallbackHandler(log)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
