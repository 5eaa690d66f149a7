"""Handle signals that stop the run after a step, or ask for a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType
from typing import Any

from nnunetv2_macl.distributed import any_rank, world_size

# torchrun forwards a signal that the cluster has already sent to every rank. Within this many seconds it is a duplicate.
_REPEATS = 5.0

_STOP = [signal.SIGTERM, signal.SIGINT]
_SAVE = [signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []


class StoppedWhileWaiting(BaseException):
    """A signal to stop, received while the run waited for the next batch.

    Like KeyboardInterrupt this is no Exception, because code that handles errors must not catch it.
    """


class Signals:
    """SIGTERM and SIGINT ask to stop, SIGUSR1 asks for a checkpoint. A second SIGTERM or SIGINT stops at once.

    Python allows signal handlers only in the main thread; in another thread `install` does nothing.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._stop_since: float | None = None
        self.stopped_by: int | None = None  # number of the signal that asked this process to stop
        self._save = False
        self._is_waiting = False

    def install(self) -> None:
        """Replace the handlers of these signals."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _STOP:
            self._before[number] = signal.signal(number, self._on_stop)
        for number in _SAVE:
            self._before[number] = signal.signal(number, self._on_save)

    def restore(self) -> None:
        """Restore the earlier handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def pending_requests(self) -> tuple[bool, bool]:
        """Return whether to stop and whether to write a checkpoint, the same on all ranks. A checkpoint is asked for once."""
        stop, save = self._stop_since is not None, self._save
        self._save = False
        if not any_rank(stop or save):
            return False, False
        return any_rank(stop), any_rank(save)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within the context, a signal to stop raises `StoppedWhileWaiting` at once, because a batch may never come.

        Several ranks can only stop together, so with more than one rank the signal takes effect after the step.
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
            self._stop_since, self.stopped_by = monotonic(), number
            if self._is_waiting:
                raise StoppedWhileWaiting
        elif monotonic() - self._stop_since >= (_REPEATS if world_size() > 1 else 0):
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True


def ignore_save_requests() -> None:
    """Ignore the signal that asks for a checkpoint, until `Signals.install`. It would end a run that has not yet trained."""
    for number in _SAVE:
        signal.signal(number, signal.SIG_IGN)


def ignore_in_worker(worker: int) -> None:
    """Make a data worker ignore the signals, which a cluster sends to all processes. The training process ends the workers."""
    for number in (*_STOP, *_SAVE):
        signal.signal(number, signal.SIG_IGN)
