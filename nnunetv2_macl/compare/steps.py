"""Steps of a study, each done once: by one process, or by several, on one machine or on several that share the folder.

A step has a folder. ``done.json`` in it, written last, says that the step is done; a lock file beside it says who is at it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import CannotWriteError, write_error, write_json
from nnunetv2_macl.text import duration
from nnunetv2_macl.training.run_folder import RunLock

logger = logging.getLogger(__name__)

DONE_FILE = "done.json"


@dataclass(frozen=True)
class Task:
    """Work that leaves its results in a folder of its own; ``run`` returns what ``done.json`` shall say."""

    name: str
    folder: Path
    run: Callable[[], dict[str, Any]]
    needs: tuple[Task, ...] = ()

    @property
    def is_done(self) -> bool:
        return (self.folder / DONE_FILE).is_file()


def run_steps(steps: Sequence[Task], jobs: int, poll_seconds: float = 5.0) -> None:
    """Run all steps that are not done, some at a time, in their order, and wait for those that other processes are at.

    Raises:
        UserError: A step failed, or a folder cannot be written; the others at work are finished first.
    """
    work = _TaskQueue(steps, poll_seconds)
    with ThreadPoolExecutor(jobs) as pool:
        workers = [pool.submit(work.go_on) for _ in range(jobs)]
        try:
            for worker in workers:
                worker.result()
        finally:
            # also where the user interrupts
            work.stop()


class _TaskQueue:
    def __init__(self, steps: Sequence[Task], poll_seconds: float) -> None:
        self._todo = [step for step in steps if not step.is_done]
        self._total, self._done = len(steps), len(steps) - len(self._todo)
        self._poll_seconds = poll_seconds
        self._guard = threading.Lock()
        self._stop = threading.Event()
        self._told: set[str] = set()
        if self._done:
            logger.info("%d of %d steps are done already", self._done, self._total)

    def stop(self) -> None:
        self._stop.set()

    def go_on(self) -> None:
        try:
            while not self._stop.is_set():
                claimed = self._claim()
                if claimed is None:
                    if not self._todo:
                        return
                    self._stop.wait(self._poll_seconds)
                    continue
                step, lock = claimed
                try:
                    self._do(step)
                finally:
                    lock.release()
        except BaseException:
            self.stop()
            raise

    def _claim(self) -> tuple[Task, RunLock] | None:
        """The first step that can be done now. Those that others have done meanwhile leave the list."""
        with self._guard:
            for step in list(self._todo):
                if step.is_done:
                    self._todo.remove(step)
                    self._done += 1
                    continue
                if not all(need.is_done for need in step.needs):
                    continue
                lock = RunLock(step.folder)
                try:
                    step.folder.mkdir(parents=True, exist_ok=True)
                    lock.acquire()
                except OSError as error:
                    raise write_error(error, step.folder) from error
                except CannotWriteError:
                    raise
                except UserError as held:
                    if step.name not in self._told:
                        self._told.add(step.name)
                        logger.info("Waiting: %s", held)
                    continue
                if step.is_done:  # by the process that held the lock a moment ago
                    lock.release()  # type: ignore[unreachable]
                    continue
                self._todo.remove(step)
                return step, lock
        return None

    def _do(self, step: Task) -> None:
        began = perf_counter()
        logger.info("%s ...", step.name)
        result = step.run()
        seconds = perf_counter() - began
        write_json({"seconds": seconds} | result, step.folder / DONE_FILE)
        with self._guard:
            self._done += 1
            logger.info("[%d/%d] %s, done in %s", self._done, self._total, step.name, duration(seconds))
