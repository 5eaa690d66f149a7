"""Send messages of the package to a console or a log file, in any encoding."""

from __future__ import annotations

import io
import locale
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


def show_any_character() -> None:
    """Show characters that the output's encoding lacks as escapes, because printing them would raise an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def progress_bar(items: Iterable[Any] | None = None, *, hidden: bool = False, **options: Any) -> tqdm:
    """Return tqdm's progress bar, which is shown only on a terminal. Programs without a console have no ``sys.stderr``."""
    return tqdm(items, disable=hidden or sys.stderr is None or not sys.stderr.isatty(), **options)


def for_log_file(text: object) -> str:
    """Escape characters that the system's encoding lacks, because nnU-Net's log file has this encoding."""
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
    """Within the context, call ``log`` with each message of this package, from level INFO on."""
    logger, handler = logging.getLogger("nnunetv2_macl"), _CallbackHandler(log)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
