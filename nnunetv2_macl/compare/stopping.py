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
# signal mask of each thread that is forking
_forking = threading.local()


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


def _hold_sigterm() -> None:
    """Block SIGTERM in this thread while it forks, so that the child receives the signal only after `_forget`."""
    if _listening:
        _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _release_sigterm() -> None:
    mask = _forking.__dict__.pop("mask", None)
    if mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _forget() -> None:
    """Restore the default handler in a forked process.

    Pools end their workers with SIGTERM and wait for them. A blocked worker would never run a Python handler.
    """
    if _listening:
        _listening.clear()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _release_sigterm()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_hold_sigterm, after_in_parent=_release_sigterm, after_in_child=_forget)


def _end(number: int, frame: FrameType | None) -> None:
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            child.terminate()
    raise SystemExit(128 + number)
