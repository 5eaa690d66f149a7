"""What the package tells while it is at work, on its way to a console or a log file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class _Saying(logging.Handler):
    def __init__(self, say: Callable[[str], object]) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(record.getMessage())


@contextmanager
def heard(say: Callable[[str], object]) -> Iterator[None]:
    """Meanwhile ``say`` is called with each message, from progress on."""
    logger, handler = logging.getLogger("nnunetv2_macl"), _Saying(say)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
