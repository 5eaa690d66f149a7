"""SIGTERM, by which a cluster ends a job, ends a study as Ctrl-C does: what it holds is given back."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import psutil


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Meanwhile SIGTERM is passed on to the processes started from here, and raises SystemExit.

    Python allows it in the main thread alone; elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: FrameType | None) -> None:
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            child.terminate()
    raise SystemExit(128 + number)
