"""Release locks and end child processes on SIGTERM, with which a cluster ends a job."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import psutil

# id of this process while it handles SIGTERM, else empty
_listening: set[int] = set()


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Within this context, raise SystemExit on SIGTERM, and pass the signal on to the child processes.

    Outside of the main thread this context has no effect, because Python handles signals only in the main thread.
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
    """Restore the default handler in a forked process.

    Pools end their workers with SIGTERM and wait for them. A blocked worker would never run a Python handler.
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
