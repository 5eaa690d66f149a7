"""SIGTERM, by which a cluster ends a job, ends a study as Ctrl-C does: what it holds is given back."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import psutil

# the process that listens, if any
_listening: set[int] = set()


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Meanwhile SIGTERM is passed on to the processes started from here, and raises SystemExit.

    Python allows it in the main thread alone; elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _end)
    _listening.add(os.getpid())
    try:
        yield
    finally:
        _listening.clear()
        signal.signal(signal.SIGTERM, before)


def _forget() -> None:
    """In a forked process: pools, nnU-Net's too, end their workers by SIGTERM and wait for them, and a worker that sleeps would
    not come to hear Python's handler.
    """
    if _listening:
        _listening.clear()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _end(number: int, frame: FrameType | None) -> None:
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            child.terminate()
    raise SystemExit(128 + number)
