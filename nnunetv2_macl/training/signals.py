"""Signals that a cluster sends: stop after this step, or write a checkpoint and go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType
from typing import Any

from nnunetv2_macl.distributed import any_rank, world_size

# what started the ranks passes on to them what the cluster has sent to them already: seconds
_REPEATS = 5.0

_STOP = [signal.SIGTERM, signal.SIGINT]
_SAVE = [signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []


class StoppedWhileWaiting(BaseException):
    """Asked to stop between two steps, while the next batch was waited for.

    Not an Exception, as KeyboardInterrupt is none: what handles errors on its way must not take it for one.
    """


class Signals:
    """SIGTERM and SIGINT ask to stop, SIGUSR1 asks for a checkpoint. A second SIGTERM or SIGINT stops at once.

    Python allows it in the main thread alone; elsewhere nothing is listened to.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._stop_since: float | None = None
        self._save = False
        self._is_waiting = False

    def install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _STOP:
            self._before[number] = signal.signal(number, self._on_stop)
        for number in _SAVE:
            self._before[number] = signal.signal(number, self._on_save)

    def restore(self) -> None:
        """Leave the signals to whoever had them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def pending_requests(self) -> tuple[bool, bool]:
        """Whether to stop, and whether to write a checkpoint; the same on all ranks, once for each time it was asked."""
        stop, save = self._stop_since is not None, self._save
        self._save = False
        if not any_rank(stop or save):
            return False, False
        return any_rank(stop), any_rank(save)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within, a signal to stop raises `StoppedWhileWaiting` at once: a batch may never come.

        Of several ranks none can stop alone, so there the signal is heeded after the step.
        """
        if self._stop_since is not None and world_size() == 1:
            raise StoppedWhileWaiting
        self._is_waiting = world_size() == 1
        try:
            yield
        finally:
            self._is_waiting = False

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        if self._stop_since is None:
            self._stop_since = monotonic()
            if self._is_waiting:
                raise StoppedWhileWaiting
        elif monotonic() - self._stop_since >= (_REPEATS if world_size() > 1 else 0):
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True


def ignore_in_worker(worker: int) -> None:
    """For data workers: the training process decides, and a cluster signals them all. It ends them by itself."""
    for number in (*_STOP, *_SAVE):
        signal.signal(number, signal.SIG_IGN)
